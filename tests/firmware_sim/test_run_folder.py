"""A run folder: provisioned whole or not at all, keys for their owner only, recordings nowhere in the clear."""

from __future__ import annotations

import stat
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

import msgspec
import numpy as np
import pytest

from aggregator.assembly import AggregatorFiles, bundle_of
from aggregator.errors import DatabaseError
from aggregator.helper.assembly import HelperFiles
from aggregator.task_file import TrainingPlan, read_task
from device_client.assembly import DeviceFiles, RealDevice
from firmware_sim.bundles import bundle_and_publisher
from firmware_sim.demo_folder import create_run, write_configs
from firmware_sim.errors import FleetError, SettingsError
from firmware_sim.run_folder import RunFolder
from firmware_sim.settings import AGGREGATOR, TASK, TENANT, DemoSettings
from firmware_sim.watch_data import Recording, Wrist, all_wrists, windows_of
from fl_protocol.bundle import open_bundle
from fl_protocol.helper_config import pinned
from fl_protocol.signing import public_key_from_hex, public_key_hex

SETTINGS = DemoSettings(held_out=(2, 5), rounds=4)
SAMPLES = 128


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, recordings: list[Recording]) -> RunFolder:
    return create_run(tmp_path_factory.mktemp("runs") / "run", SETTINGS, recordings)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_settings_are_read_back(run: RunFolder) -> None:
    assert run.load_settings() == SETTINGS


def test_every_configuration_loads_and_they_agree(run: RunFolder) -> None:
    aggregator = AggregatorFiles.load(run.aggregator_toml)
    with closing(aggregator.open_store(create=False)) as store:
        stored = store.tasks.get(TASK)
        graph_digest = bundle_of(store, stored).graph_digest
    task = read_task(stored.spec, "the database")
    assert stored.spec == run.task_toml.read_text()
    assert aggregator.config.aggregator.client_id == AGGREGATOR
    assert (task.rounds, task.goal, task.minimum_cohort) == (4, 16, 8)
    assert (task.engine, task.secure) == ("secure", SETTINGS.secure(378))
    pins = pinned(aggregator.config.helpers)
    key = public_key_hex(aggregator.signing_key().public_key())
    for wrist in all_wrists():
        device = DeviceFiles.load(run.device_toml(wrist.device_id))
        (study,) = device.config.studies
        assert study.id == wrist.device_id
        assert study.role == ("evaluate" if wrist.person in SETTINGS.held_out else "train")
        assert study.aggregator_key == key
        assert (study.tenant, study.task) == (TENANT, task.name)
        assert study.broker == aggregator.config.broker
        assert (device.config.privacy.epsilon, device.config.privacy.delta) == (SETTINGS.epsilon, SETTINGS.delta)
        # A wrist sends its updates masked by both or not at all.
        assert [(pin.name, pin.operator, pin.key) for pin in study.helpers] == [
            (one.name, one.operator, public_key_hex(one.key)) for one in pins.values()
        ]
        assert (device.config.privacy.minimum_helpers, device.config.privacy.minimum_operators) == (2, 2)
        assert isinstance(task.plan, TrainingPlan)
        assert device.config.privacy.minimum_noise_multiplier == task.plan.noise_multiplier
        assert device.open_bundle(study).graph_digest == graph_digest == stored.graph_digest


def test_the_helpers_are_of_two_operators_and_pinned_by_their_own_keys(run: RunFolder) -> None:
    aggregator = AggregatorFiles.load(run.aggregator_toml)
    key = public_key_hex(aggregator.signing_key().public_key())
    assert [(pin.name, pin.operator) for pin in aggregator.config.helpers] == [
        ("helper-a", "patients"),
        ("helper-b", "hospital-b"),
    ]
    for pin in aggregator.config.helpers:
        files = HelperFiles.load(run.helper_toml(pin.name))
        helper, (study,) = files.helper(), files.config.studies
        assert (helper.name, helper.operator) == (pin.name, pin.operator)
        assert public_key_hex(helper.identity.public_key()) == pin.key
        assert (study.tenant, study.aggregator_key) == (TENANT, key)
        assert study.broker == aggregator.config.broker
        assert files.config.helper.minimum_cohort == SETTINGS.minimum_cohort


def test_with_the_engine_open_there_are_no_helpers(tmp_path: Path, recordings: list[Recording]) -> None:
    settings = msgspec.structs.replace(SETTINGS, engine="open")
    run = create_run(tmp_path / "run", settings, recordings)
    assert not (run.path / "helpers").exists()
    assert read_task(run.task_toml.read_text(), "task.toml").engine == "open"
    assert AggregatorFiles.load(run.aggregator_toml).config.helpers == ()
    device = DeviceFiles.load(run.device_toml(Wrist(1, "left").device_id)).config
    assert device.studies[0].helpers == ()
    assert (device.privacy.minimum_helpers, device.privacy.minimum_operators) == (0, 0)


def test_only_wrists_that_train_are_registered_with_the_aggregator_and_with_each_helper(run: RunFolder) -> None:
    expected = [wrist.device_id for wrist in SETTINGS.training_wrists]
    with closing(AggregatorFiles.load(run.aggregator_toml).open_store(create=False)) as store:
        registered = dict(store.devices.all())
    assert list(registered) == expected
    for name in SETTINGS.operators:
        with HelperFiles.load(run.helper_toml(name)).store() as believed:
            keys = {device: key for tenant, device, key in believed.devices.all() if tenant == TENANT}
        assert keys == registered


def test_each_wrist_holds_its_own_windows(run: RunFolder, recordings: list[Recording]) -> None:
    for wrist in (Wrist(1, "left"), Wrist(2, "right"), Wrist(10, "right")):
        with RealDevice.open(run.device_toml(wrist.device_id)) as device:
            records = device.streams["default"].training()
            assert device.consent_problem(device.config.studies[0].study) == ""
        expected = windows_of(recordings, wrist, samples=SAMPLES)
        np.testing.assert_array_equal(records.x, expected.x)
        np.testing.assert_array_equal(records.y, expected.y)


def test_configuration_can_be_written_again_for_another_port_and_without_tls(
    tmp_path: Path, recordings: list[Recording]
) -> None:
    run = create_run(tmp_path / "run", SETTINGS, recordings)
    before = AggregatorFiles.load(run.aggregator_toml)
    key, pins = before.signing_key().private_bytes_raw(), before.config.helpers
    write_configs(run, SETTINGS, port=12_345, tls=False)
    aggregator = AggregatorFiles.load(run.aggregator_toml)
    assert (aggregator.config.broker.port, aggregator.config.broker.ca) == (12_345, None)
    assert aggregator.signing_key().private_bytes_raw() == key  # devices have pinned it
    helper = HelperFiles.load(run.helper_toml("helper-a"))
    assert public_key_hex(helper.helper().identity.public_key()) == pins[0].key
    assert aggregator.config.helpers == pins
    assert helper.config.studies[0].broker == aggregator.config.broker


def test_a_helper_whose_store_is_lost_does_not_start_again_with_an_empty_one(
    tmp_path: Path, recordings: list[Recording]
) -> None:
    run = create_run(tmp_path / "run", SETTINGS, recordings)
    files = HelperFiles.load(run.helper_toml("helper-b"))
    (run.helper_toml("helper-b").parent / "helper.db").unlink()
    write_configs(run, SETTINGS, port=12_345, tls=True)
    with pytest.raises(DatabaseError, match="there is no store"), files.store():
        pass


# Secrets.


def check_secrets_are_private(folder: Path) -> None:
    """Keys and whatever holds a secret: no permission for anybody but the owner, in a folder of the same kind."""
    secret = [
        path
        for path in files(folder)
        if path.suffix == ".key" or path.parent.name in {"identity", "recordings"} or path.name == "helper.db"
    ]
    assert len(secret) == 1 + 2 + 20 * 4 + 2 * 3
    for path in secret:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    for name in ("aggregator", "broker", "devices", "helpers", "helpers/helper-a", "logs"):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o700, name


def test_keys_are_for_their_owner_only(run: RunFolder) -> None:
    check_secrets_are_private(run.path)
    key = run.device_toml(Wrist(1, "left").device_id).parent / "store.key"
    key.chmod(0o640)
    with pytest.raises(AssertionError):
        check_secrets_are_private(run.path)
    key.chmod(0o600)


def test_no_key_is_in_two_places(run: RunFolder) -> None:
    keys = [path.read_bytes() for path in files(run.path) if path.suffix == ".key"]
    assert len(set(keys)) == len(keys) == 1 + 1 + 1 + 20 * 2 + 2 * 2
    assert not list(run.path.rglob("ca.key")), "nothing can be issued in the CA's name afterwards"


def fragments(recordings: list[Recording], wrist: Wrist) -> Iterable[bytes]:
    """Pieces of a wrist's windows as they would look in a file: 4 samples of 6 channels, from the middle of each."""
    for window in windows_of(recordings, wrist, samples=SAMPLES).x:
        yield window[60:64].astype("<f4").tobytes()


def check_no_window_is_readable(folder: Path, recordings: list[Recording]) -> None:
    for wrist in all_wrists():
        own = list(fragments(recordings, wrist))
        assert len(own) > 50
        for path in files(folder):
            if wrist.device_id in path.parts:
                data = path.read_bytes()
                assert not any(fragment in data for fragment in own), f"{path} holds windows in the clear"


def test_recordings_are_nowhere_in_the_clear(run: RunFolder, recordings: list[Recording]) -> None:
    check_no_window_is_readable(run.path, recordings)


def test_a_window_in_the_clear_would_be_noticed(run: RunFolder, recordings: list[Recording], tmp_path: Path) -> None:
    wrist = Wrist(3, "right")
    store = DeviceFiles.load(run.device_toml(wrist.device_id)).open_store()
    (name,) = store.names("recordings/")
    plain = b"".join(store.frames(name))
    store.close()
    leak = tmp_path / wrist.device_id / "records"
    leak.parent.mkdir()
    leak.write_bytes(b"xyz" + plain)
    with pytest.raises(AssertionError, match="in the clear"):
        check_no_window_is_readable(tmp_path, recordings)


# Refusals.


def test_a_folder_with_anything_in_it_is_not_touched(tmp_path: Path, recordings: list[Recording]) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(FleetError, match=r"is not empty; name a new folder, or use --resume"):
        create_run(tmp_path, SETTINGS, recordings)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_empty_folder_may_be_named(tmp_path: Path, recordings: list[Recording]) -> None:
    assert create_run(tmp_path, SETTINGS, recordings).load_settings() == SETTINGS


@pytest.mark.parametrize("name", ["file", "file/run"])
def test_a_path_that_cannot_be_a_folder_is_one_sentence(tmp_path: Path, recordings: list[Recording], name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FleetError, match=r"cannot be written \(Not a directory\)"):
        create_run(tmp_path / name, SETTINGS, recordings)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (DemoSettings(epsilon=1e-9), "too small for 60 rounds"),
        (
            DemoSettings(model="watch_transformer"),
            "there is no bundle watch_transformer; covey comes with .*watch_cnn, ",
        ),
        (DemoSettings(model="image_cnn"), r"image_cnn is not for the watch recordings.*takes \(28, 28, 1\)"),
    ],
    ids=["budget", "model", "other data"],
)
def test_settings_that_cannot_be_carried_out_leave_no_folder(
    tmp_path: Path, recordings: list[Recording], settings: DemoSettings, complaint: str
) -> None:
    with pytest.raises(FleetError, match=complaint):
        create_run(tmp_path / "run", settings, recordings)
    assert not (tmp_path / "run").exists()


def test_a_folder_without_settings_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(FleetError, match=r"is not a run folder: run\.json No such file"):
        RunFolder(tmp_path).load_settings()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"rounds": "many"}', '{"noise": 1}', "\xff"])
def test_settings_that_cannot_be_read_are_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_bytes(text.encode("latin1"))
    with pytest.raises(FleetError, match=r"run\.json cannot be read"):
        RunFolder(tmp_path).load_settings()


def test_settings_of_an_older_covey_are_not_filled_up_with_todays_defaults(tmp_path: Path) -> None:
    old = msgspec.to_builtins(SETTINGS)
    del old["engine"], old["helpers"]  # such a run's updates are not masked
    (tmp_path / "run.json").write_bytes(msgspec.json.encode(old))
    with pytest.raises(FleetError, match="written by an older covey: expected engine, helpers; start a new run"):
        RunFolder(tmp_path).load_settings()


def test_settings_out_of_range_are_refused_on_reading(tmp_path: Path) -> None:
    changed = msgspec.to_builtins(SETTINGS) | {"rounds": 0}
    (tmp_path / "run.json").write_bytes(msgspec.json.encode(changed))
    with pytest.raises(SettingsError, match="rounds: expected at least 1"):
        RunFolder(tmp_path).load_settings()


def test_the_bundles_that_come_with_covey_are_signed_by_the_publisher_named_beside_them() -> None:
    for model in ("watch_features", "watch_cnn"):
        path, publisher = bundle_and_publisher(model)
        assert open_bundle(path.read_bytes(), publisher=public_key_from_hex(publisher)).manifest.name == model
