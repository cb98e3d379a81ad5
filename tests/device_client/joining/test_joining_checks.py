"""What a device joins by is checked before it asks and before it installs; each thing that is wrong has its name."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aggregator.admission import Admitter
from aggregator.certificates import make_ca
from device_client.errors import DeviceError
from device_client.joining import checks as checks_module
from device_client.joining.checks import check_before_asking, clock_words
from device_client.pseudonyms import NoPseudonym
from fl_protocol.enrolment import DAY_S
from fl_protocol.errors import ProtocolError
from fl_protocol.joining import parse_token, token_text
from tests.device_client.joining.rig import DeskRig, JoiningDevice, claim_of, join
from tests.enrolments import AGGREGATOR, CA, NOW_S, TASK, TENANT, broken_copy

YEAR_S = 365.25 * DAY_S


def check_the_claim_is_held_against_the_token(module: ModuleType) -> None:
    rig = DeskRig()
    token = rig.token()
    other_key = Ed25519PrivateKey.from_private_bytes(b"\x07" * 32)
    other_ca = make_ca("another", now_s=NOW_S)
    for changed in (claim_of(key=other_key), claim_of(ca=other_ca), claim_of(task="sleep"), claim_of(tenant="x")):
        with pytest.raises(ProtocolError, match="not the one that this token is for"):
            module.check_before_asking(changed, token, now_s=NOW_S)
    module.check_before_asking(rig.claim, token, now_s=NOW_S)


def check_a_clock_that_is_years_off_is_named(module: ModuleType) -> None:
    rig = DeskRig()
    token = rig.token()
    for now_s, outcome in ((0.0, "clock_behind"), (NOW_S + 30 * YEAR_S, "claim_ended")):
        with pytest.raises(DeviceError, match="clock") as raised:
            module.check_before_asking(rig.claim, token, now_s=now_s)
        assert getattr(raised.value, "outcome", "") == outcome


def grant(rig: DeskRig, device: JoiningDevice, **changes: Any) -> bytes:
    """A signed pseudonym answer for what a device asked."""
    office = DeskRig().office
    request = device.names.prepare(entropy=rig.office._entropy)
    admitter = replace_admitter(office.admitter, **changes)
    return admitter.certify(request, first_s=NOW_S).answer


def replace_admitter(admitter: Any, **changes: Any) -> Any:
    """The same office with another CA or key."""
    given = {"ca": CA, "key": AGGREGATOR} | changes
    return Admitter(admitter.store, TENANT, given["ca"], given["key"])


def check_what_was_granted_is_checked(module: ModuleType) -> None:
    rig = DeskRig()
    device = JoiningDevice(rig)
    right = grant(rig, device)
    module.check_grant(right, rig.claim, is_renewal=False)
    foreign = {
        "wrong_aggregator": grant(rig, device, key=Ed25519PrivateKey.from_private_bytes(b"\x07" * 32)),
        "wrong_issuer": grant(rig, device, ca=make_ca("another", now_s=NOW_S)),
        "wrong_study": right.replace(f'"task": "{TASK}"'.encode(), b'"task": "sleep"'),
        "not_installed": b"{}",
    }
    for outcome, names in foreign.items():
        with pytest.raises(DeviceError) as raised:
            module.check_grant(names, rig.claim, is_renewal=False)
        assert getattr(raised.value, "outcome", "") == outcome
    module.check_grant(foreign["wrong_issuer"], rig.claim, is_renewal=True)  # the study's next CA


BROKEN_CHECKS: list[tuple[Callable[[ModuleType], None], tuple[str, str]]] = [
    (check_the_claim_is_held_against_the_token, ("    check_claim(claim, token)\n", "")),
    (check_a_clock_that_is_years_off_is_named, ("if now_s < begins_s:", "if False:")),
    (check_a_clock_that_is_years_off_is_named, ("if now_s > ends_s:", "if False:")),
    (check_what_was_granted_is_checked, ("if there != here:", "if False:")),
    (check_what_was_granted_is_checked, ("if answer.aggregator_key != claim.aggregator_key:", "if False:")),
    (check_what_was_granted_is_checked, ("if not is_renewal and _der(", "if False and _der(")),
]


@pytest.mark.parametrize("check", dict.fromkeys(check for check, _ in BROKEN_CHECKS))
def test_it_is_checked(check: Callable[[ModuleType], None]) -> None:
    check(checks_module)


@pytest.mark.parametrize(("check", "change"), BROKEN_CHECKS)
def test_a_check_that_is_left_out_is_caught(check: Callable[[ModuleType], None], change: tuple[str, str]) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check(broken_copy("device_client.joining.checks", change))


@pytest.mark.parametrize("outcome", ["wrong_aggregator", "wrong_issuer"])
def test_a_grant_that_the_token_does_not_vouch_for_installs_nothing(outcome: str) -> None:
    """The desk signs rightly, and hands on names of somebody else: named, told, and nothing is installed."""
    rig = DeskRig()
    changes: dict[str, Any] = (
        {"key": Ed25519PrivateKey.from_private_bytes(b"\x07" * 32)}
        if outcome == "wrong_aggregator"
        else {"ca": make_ca("another", now_s=NOW_S)}
    )
    object.__setattr__(rig.office.desk, "admitter", replace_admitter(rig.office.admitter, **changes))
    device = JoiningDevice(rig)
    join(rig, device)
    assert device.outcome == outcome
    assert device.names.installed() == ()
    assert device.names.waiting == 3


@pytest.mark.parametrize(("ahead_s", "outcome"), [(-20 * YEAR_S, "not_yet_valid"), (20 * YEAR_S, "expired")])
def test_names_that_come_while_the_clock_is_years_off_are_kept_and_it_is_named(ahead_s: float, outcome: str) -> None:
    rig = DeskRig()
    device = JoiningDevice(rig, ahead_s=ahead_s)
    join(rig, device)
    assert device.outcome == ""
    periods = [one.period for one in device.names.installed()]
    assert len(periods) == 3
    found = clock_words(periods, device.clock.time_s)
    assert found is not None
    assert found[0] == outcome
    assert "set the clock" in found[1]
    none = device.names.current(device.clock.time_s)
    assert isinstance(none, NoPseudonym)
    assert none.reason == outcome
    assert clock_words(periods, NOW_S) is None


def test_a_token_for_another_study_is_found_out_before_anything_is_sent() -> None:
    rig = DeskRig()
    token = parse_token(token_text(bytes(16), claim_of(task="sleep")))
    with pytest.raises(ProtocolError, match="not the one that this token is for"):
        check_before_asking(rig.claim, token, now_s=NOW_S)
