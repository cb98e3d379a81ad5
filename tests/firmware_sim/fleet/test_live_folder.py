"""What a scenario means for real processes, and what a live run refuses or leaves out."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace as with_fields

from aggregator.assembly import AggregatorFiles
from aggregator.helper.assembly import HelperFiles
from device_client.assembly import DeviceFiles
from device_client.config import BoardConfig
from firmware_sim.errors import SettingsError
from firmware_sim.fleet.build import device_maker
from firmware_sim.fleet.live_folder import left_out, require_live
from firmware_sim.scenario.loading import load_scenario
from fl_protocol.helper_config import pinned
from fl_protocol.signing import public_key_hex
from tests.firmware_sim.fleet.live_scenarios import SMALL, configured, small_scenario


def test_each_process_is_configured_as_the_scenario_has_it(tmp_path: Path) -> None:
    changes = {"privacy": {"epsilon": 2.0, "minimum_cohort": 3}, "eligibility": {"minimum_separation_hours": 0.5}}
    made = configured(tmp_path, **changes)
    aggregator = AggregatorFiles.load(made.run.aggregator_toml)
    key = public_key_hex(aggregator.signing_key().public_key())
    virtual = device_maker(made.loaded).config
    for name in ("device-0000000", "device-0000003"):
        files = DeviceFiles.load(made.run.device_toml(name))
        (study,), (meant,) = files.config.studies, virtual(name).studies
        # What differs is where things are and who holds which key; nothing of what was agreed to.
        assert with_fields(files.config, studies=(), device=meant, board=BoardConfig()) == with_fields(
            virtual(name), studies=(), device=meant
        )
        same = ("tenant", "task", "id", "role", "stream", "epsilon", "tags", "maximum_participations")
        assert [getattr(study, one) for one in same] == [getattr(meant, one) for one in same]
        assert study.aggregator_key == key
        assert study.broker == aggregator.config.broker
        assert pinned(study.helpers).keys() == pinned(meant.helpers).keys()
        assert files.open_bundle(study).graph_digest == made.loaded.bundle.graph_digest
    for pin in aggregator.config.helpers:
        helper = HelperFiles.load(made.run.helper_toml(pin.name))
        assert helper.config.helper.minimum_cohort == 4
        assert public_key_hex(helper.helper().identity.public_key()) == pin.key


def test_this_machines_load_and_network_do_not_speak_for_a_wearer(tmp_path: Path) -> None:
    made = configured(tmp_path)
    board = DeviceFiles.load(made.run.device_toml("device-0000001")).config.board
    assert (board.battery, board.thermal_zone, board.network, board.idle) == ("none", "none", "unmetered", "idle")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"devices": 65}, r"has 65 devices.*: expected at most 64; set fewer, or leave --live out to simulate them"),
        ({"days": 0.25}, r"takes up to 6 hours of real time: expected at most 2; lower its days, or raise"),
        ({"fidelity": "surrogate"}, r'devices really train: expected fidelity = "real", got "surrogate"'),
    ],
    ids=["devices", "time", "fidelity"],
)
def test_what_cannot_be_run_live_is_one_sentence(tmp_path: Path, changes: dict[str, object], complaint: str) -> None:
    with pytest.raises(SettingsError, match=complaint):
        require_live(small_scenario(tmp_path, **changes), longest_hours=2.0)


def test_sixty_four_devices_and_two_hours_are_not_too_much(tmp_path: Path) -> None:
    require_live(small_scenario(tmp_path, devices=64, days=2 / 24), longest_hours=2.0)


def test_nothing_is_left_out_of_a_scenario_without_hardware(tmp_path: Path) -> None:
    assert left_out(small_scenario(tmp_path)) == ()


def test_what_only_virtual_hardware_has_is_left_out_and_named(tmp_path: Path) -> None:
    told = left_out(
        small_scenario(
            tmp_path,
            days=0.5,
            population={"profiles": {"smartwatch": 1.0}},
            fault=[{"kind": "broker_restart", "at_s": 60.0}],
        )
    )
    assert told[0] == "hardware profiles (smartwatch)"
    assert "batteries, chargers and thermometers" in told
    assert "1 planned faults" in told
    assert "what wearers record after the beginning" in told
    assert "putting down every 1 hours" in told


@pytest.mark.parametrize(("noise_from", "differs"), [("devices", False), ("helpers", True), ("aggregator", True)])
def test_noise_that_is_not_the_devices_own_is_not_seeded_and_said_to_be(
    tmp_path: Path, noise_from: str, differs: bool
) -> None:
    text = SMALL.replace("noise_multiplier = 0.5\n\n", f'noise_multiplier = 0.5\nnoise_from = "{noise_from}"\n\n')
    assert text != SMALL
    path = tmp_path / "scenario.toml"
    path.write_text(text)
    assert ("seeded noise of helpers and aggregator" in left_out(load_scenario(path))) == differs
