"""Creating a task: everything is checked once, stored, and never read from its paths again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec.structs import replace as with_fields

from aggregator.assembly import bundle_of
from aggregator.errors import AggregatorError, DatabaseError
from aggregator.store.sweep import named_blobs
from aggregator.task_creation import create_task
from aggregator.task_file import Rule, StatisticsPlan, TaskConfig, Validation, read_task, write_task
from fl_protocol.bundle import add_signature
from fl_protocol.errors import BundleError, ConfigError
from fl_protocol.signing import public_key_hex
from tests.aggregator.desk import PUBLISHER, D, Desk, pack_small_bundle, task_config
from tests.aggregator.small_study import plain_study
from tests.aggregator.tagging import tag
from tests.fl_protocol.examples import TASK


def write(folder: Path, task: TaskConfig, bundle: bytes | None = None) -> Path:
    (folder / "model.covey").write_bytes(pack_small_bundle() if bundle is None else bundle)
    path = folder / f"{task.name}.toml"
    path.write_text(write_task(with_fields(task, bundle="model.covey")))
    return path


STRANGER = public_key_hex(Ed25519PrivateKey.from_private_bytes(b"\x77" * 32).public_key())


def several(threshold: int, *others: str) -> dict[str, Any]:
    """What pins the bundle's own publisher beside others."""
    keys = (public_key_hex(PUBLISHER.public_key()), *others)
    return {"publisher_key": None, "publishers": keys, "publisher_threshold": threshold}


def new(**changes: Any) -> TaskConfig:
    return task_config(**{"name": "new", **changes})


def test_what_is_created_needs_none_of_its_files_any_more(tmp_path: Path) -> None:
    study = plain_study(tmp_path)
    study.crash()
    for name in ("model.covey", f"{TASK}.toml"):
        (tmp_path / name).unlink(missing_ok=True)
    study.start()
    study.plain_round([1.0, 1.0, 1.0])
    assert study.state.committed == 1


def test_a_task_pins_several_publishers_and_keeps_to_them(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    for number, threshold in enumerate((1, 2)):
        task = new(**several(threshold, STRANGER), name=f"new-{number}")
        assert read_task(write_task(task), "again") == task
        signed = add_signature(pack_small_bundle(), Ed25519PrivateKey.from_private_bytes(b"\x77" * 32))
        create_task(desk.store, write(tmp_path, task, signed if threshold == 2 else None), now_s=5.0)
        assert len(bundle_of(desk.store, desk.store.tasks.get(task.name)).shared_params) == D


def test_the_aggregators_own_key_publishes_nothing(tmp_path: Path) -> None:
    desk, own = Desk(tmp_path), Ed25519PrivateKey.from_private_bytes(b"\x77" * 32).public_key()
    for threshold in (1, 2):
        path = write(tmp_path, new(**several(threshold, STRANGER)))
        with pytest.raises(ConfigError, match="expected publishers' keys, got the aggregator's own among them"):
            create_task(desk.store, path, now_s=5.0, aggregator_key=own)
    assert [one.name for one in desk.store.tasks.all()] == [TASK]


def test_a_name_is_taken_once(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    created = create_task(desk.store, write(tmp_path, new()), now_s=5.0)
    assert (created.is_new, created.config.name) == (True, "new")
    with pytest.raises(DatabaseError, match="there is a task new already"):
        create_task(desk.store, write(tmp_path, new()), now_s=6.0)
    stored = desk.store.tasks.get("new")
    assert (stored.created_s, stored.state.version) == (5.0, 0)
    assert [one.origin for one in desk.store.models.records("new")] == ["initial"]


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"publisher_key": STRANGER}, BundleError, "not signed by"),
        ({"publisher_key": "12"}, ConfigError, "publisher_key"),
        (several(2, "12"), ConfigError, "publishers"),
        (several(2, STRANGER), BundleError, "signed by 1 of the 2 pinned publishers, and 2 of them"),
        ({"rule": Rule(name="krum", byzantine_fraction=0.4), "minimum_cohort": 2}, ConfigError, "minimum_cohort"),
        ({"rule": Rule(name="median", memory_bytes=1000), "minimum_cohort": 5}, ConfigError, "memory"),
        ({"start_from": "nowhere"}, DatabaseError, "no task nowhere"),
        ({"start_from": f"{TASK}/7"}, DatabaseError, "no model version 7"),
        ({"start_from": f"{TASK}/released"}, DatabaseError, "has the tag released"),
        ({"validation": Validation(data="gone.npz")}, ConfigError, "validation.data"),
        (
            {
                "plan": StatisticsPlan(
                    noise_multiplier=1.0,
                    features=[{"name": "x", "statistic": "moments", "channel": 2, "low": -1.0, "high": 1.0}],
                )
            },
            ConfigError,
            "channels 0 to 1, got 2",
        ),
    ],
)
def test_what_cannot_work_is_refused_and_nothing_is_stored(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], words: str
) -> None:
    desk = Desk(tmp_path)
    named = named_blobs(desk.store.database)
    with pytest.raises(error, match=words):
        create_task(desk.store, write(tmp_path, new(**changes)), now_s=5.0)
    assert set(desk.store.tasks.specs()) == {TASK}
    assert named_blobs(desk.store.database) == named


def test_a_file_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    with pytest.raises(ConfigError, match=r"gone\.toml"):
        create_task(desk.store, tmp_path / "gone.toml", now_s=5.0)
    path = write(tmp_path, new())
    (tmp_path / "model.covey").unlink()
    with pytest.raises(ConfigError, match=r"model\.covey"):
        create_task(desk.store, path, now_s=5.0)


@pytest.mark.parametrize(("where", "expected"), [(TASK, 0.75), (f"{TASK}/1", 0.5), (f"{TASK}/released", 0.5)])
def test_a_task_can_begin_where_another_one_is(tmp_path: Path, where: str, expected: float) -> None:
    study = plain_study(tmp_path)
    study.plain_round([0.5] * 3)
    study.plain_round([0.25] * 3)
    tag(study.store, TASK, "released", 1)
    bundle = pack_small_bundle(np.zeros(40, np.float32))
    create_task(study.store, write(tmp_path, new(start_from=where), bundle), now_s=5.0)
    np.testing.assert_array_equal(study.params(0, task="new"), np.full(40, expected, np.float32))
    study.settle(seconds=1.5)
    assert study.manifest("new").model_digest == study.store.models.record("new", 0).digest


def test_a_task_of_another_graph_is_no_beginning(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    other = pack_small_bundle(np.zeros(D, np.float32), graph=b"another graph")
    with pytest.raises(AggregatorError, match="another model graph"):
        create_task(desk.store, write(tmp_path, new(start_from=TASK), other), now_s=5.0)


def test_personal_layers_stay_with_the_device(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    bundle = pack_small_bundle(np.arange(D, dtype=np.float32), num_personal=20)
    create_task(desk.store, write(tmp_path, new(), bundle), now_s=5.0)
    params = desk.store.models.params(desk.store.models.record("new", 0))
    np.testing.assert_array_equal(params, np.arange(D - 20, dtype=np.float32))
