"""Who vouches for models is pinned at enrolment, and by no renewal after; broken copies are caught."""

from __future__ import annotations

from dataclasses import replace as with_fields
from types import ModuleType
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from device_client.checks.identity import check_told_publishers
from device_client.config import DeviceConfig, StudyConfig
from device_client.joining import study_section
from device_client.joining.study_section import joined_study, with_section
from fl_protocol.errors import ConfigError
from fl_protocol.joining import StudyPins
from tests.aggregator.enrolment.desks import PINS, DeskOffice
from tests.device_client.joining.rig import DeskRig, JoiningDevice, claim_of
from tests.device_client.joining.test_joining import join, renew
from tests.enrolments import PERIOD_S, TASK, broken_copy

A, B, C, D = (bytes([number]) * 32 for number in (1, 2, 3, 4))
TOML = b"""[device]
store = "store"
store_key = "store.key"
[privacy]
epsilon = 3.0
delta = 1e-5
"""


def pins(threshold: int, *keys: bytes) -> StudyPins:
    return replace(PINS, publisher_key=None, publishers=tuple(sorted(keys)), publisher_threshold=threshold)


def study(given: StudyPins) -> StudyConfig:
    return joined_study(claim_of(), given, bundle="watch.covey")


@pytest.mark.parametrize("given", [PINS, pins(2, A, B, C), pins(1, A, B)])
def test_what_the_desk_names_is_what_the_configuration_pins(given: StudyPins) -> None:
    (found,) = msgspec.toml.decode(with_section(TOML, study(given)), type=DeviceConfig).studies
    assert found == study(given)
    assert found.publisher_pins == given.publisher_pins
    study_section.check_pins(found, study(given))


def check_other_publishers_are_refused(module: ModuleType) -> None:
    """Another key, one more, one less, a lower or higher threshold; whether there is one publisher or several."""
    there = study(pins(2, A, B, C))
    others: list[StudyPins] = [pins(2, A, B, D), pins(2, A, B, C, D), pins(2, A, B), PINS]
    for other in (*others, pins(1, A, B, C), pins(3, A, B, C)):
        with pytest.raises(ConfigError, match="publishers and publisher_threshold"):
            module.check_pins(there, study(other))
        with pytest.raises(ConfigError, match="publishers and publisher_threshold"):
            module.check_pins(study(other), there)
    with pytest.raises(ConfigError, match=r"publisher_key is 1111.* and the study says 2222"):
        module.check_pins(study(PINS), study(replace(PINS, publisher_key=b"\x22" * 32)))


def test_a_study_that_names_other_publishers_than_are_pinned_is_refused() -> None:
    check_other_publishers_are_refused(study_section)


@pytest.mark.parametrize(
    "change",
    [
        ("there.publisher_pins.words, joined.publisher_pins.words", '"", ""'),
        (
            "there.publisher_pins.words, joined.publisher_pins.words",
            '",".join(there.publisher_pins.keys), ",".join(joined.publisher_pins.keys)',
        ),
        (
            "there.publisher_pins.words, joined.publisher_pins.words",
            "str(there.publisher_pins.threshold), str(joined.publisher_pins.threshold)",
        ),
    ],
    ids=["nothing", "keys alone", "threshold alone"],
)
def test_a_comparison_that_leaves_something_out_is_caught(change: tuple[str, str]) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check_other_publishers_are_refused(broken_copy("device_client.joining.study_section", change))


def test_the_order_of_publishers_does_not_matter() -> None:
    here = study(pins(2, A, B, C))
    turned = replace(here, publishers=tuple(key.upper() for key in reversed(here.publishers)))
    study_section.check_pins(turned, here)


@pytest.mark.parametrize(
    "later", [pins(1, A, B, C), pins(2, A, B, D), replace(PINS, publisher_key=D)], ids=["lower", "another", "one"]
)
def test_a_renewal_changes_nothing_that_is_pinned_and_the_doctor_tells(later: StudyPins) -> None:
    office = DeskOffice()
    office.desk = with_fields(office.desk, pins={TASK: pins(2, A, B, C)})
    rig = DeskRig(office)
    device = JoiningDevice(rig)
    join(rig, device)
    state = device.joiner.state
    assert state is not None
    assert state.membership is not None
    configured = with_section(TOML, joined_study(state.claim, state.membership.pins, bundle="watch.covey"))
    (pinned,) = msgspec.toml.decode(configured, type=DeviceConfig).studies
    assert check_told_publishers(state, pinned) is None

    rig.service._desk = with_fields(office.desk, pins={TASK: later})
    rig.clock.time_s += 2 * PERIOD_S
    renew(rig, device)
    assert (device.outcome, len(device.names.installed())) == ("", 6)
    state = device.joiner.state
    assert state is not None
    found = check_told_publishers(state, pinned)
    assert found is not None
    assert found.verdict == "warning"
    assert later.publisher_pins.words in found.found
    assert pinned.publisher_pins == pins(2, A, B, C).publisher_pins
    assert pinned.publisher_pins.words in found.found
    with pytest.raises(ConfigError, match="publishers and publisher_threshold"):
        study_section.check_pins(pinned, joined_study(state.claim, _pins_of(state), bundle="watch.covey"))


def _pins_of(state: Any) -> StudyPins:
    found: StudyPins = state.membership.pins
    return found
