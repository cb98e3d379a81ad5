"""Helpers that lie, refuse, tell seeds or answer for others: what of it is caught, by which check, and what is not.

A helper that is not honest can keep a round from its end, and that is said. It cannot see an update as long as another
helper is honest. And it can move the model by what is short enough, as any malicious device can: nothing finds that.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec.structs import replace
from numpy.typing import NDArray

from aggregator.helper.answerer import Reply
from aggregator.rounds import Phase
from fl_protocol.errors import ProtocolError
from fl_protocol.messages import RoundManifestMsg, decode
from fl_protocol.sealing import RoundKey
from fl_protocol.secagg.fixed_point import FixedPoint
from fl_protocol.secagg.messages import MaskSumMsg
from fl_protocol.secagg.packing import pack, unpack
from fl_protocol.secagg.terms import secure_round
from fl_protocol.signing import sign, verify
from tests.enrolments import broken_copy
from tests.system.malice import Residues, RogueAggregator, listen_to_updates
from tests.system.study import check_counted_once, committed
from tests.system.test_secure_studies import secure_fleet
from tests.virtual_fleet import AGGREGATOR, TENANT, VirtualFleet, helper_identity

LIAR, HONEST = "helper-b", "helper-a"
ALL = ("watch-0", "watch-1", "watch-2")
STRANGER = Ed25519PrivateKey.from_private_bytes(b"\x0b" * 32)
CLIP, STEP = 8.0, 2.0**-9
"""Of the task, and of the grid that follows."""
Lie = Callable[[MaskSumMsg], MaskSumMsg]


def lies(fleet: VirtualFleet, lie: Lie, *, key: Ed25519PrivateKey | None = None) -> list[MaskSumMsg]:
    """From now on a helper answers something else, under its own name; what it would have said."""
    answerer, identity, honest_ones = fleet.helpers[LIAR].answerer, helper_identity(LIAR), []
    honest = answerer.answer

    def lying(tenant: str, data: bytes) -> Reply:
        reply = honest(tenant, data)
        if not reply.is_answer:
            return reply
        honest_ones.append(verify(reply.data, MaskSumMsg, identity.public_key()))
        return Reply(True, sign(lie(honest_ones[-1]), key or identity))

    answerer.answer = lying  # type: ignore[method-assign]
    return honest_ones


def with_residues(fleet: VirtualFleet, change: Callable[[Residues], Residues]) -> Lie:
    """An answer with another sum."""

    def lie(answer: MaskSumMsg) -> MaskSumMsg:
        (manifest,) = (one.manifest for one in fleet.store.rounds.live() if one.number == answer.round)
        assert manifest is not None
        point = secure_round(decode(manifest, RoundManifestMsg)).fixed_point
        residues = change(unpack(answer.total, point.length, point.bits).astype(np.int64)) & ((1 << point.bits) - 1)
        return replace(answer, total=pack(residues.astype(np.uint32), point.bits))

    return lie


def garbage(residues: Residues) -> Residues:
    return np.random.default_rng(1).integers(0, 1 << 32, len(residues))


def nothing(residues: Residues) -> Residues:
    """The masks stay in the sum."""
    return np.zeros_like(residues)


def one_number_far_off(residues: Residues) -> Residues:
    """Half of the modulus, in one number of many."""
    residues = residues.copy()
    residues[7] += 1 << 15
    return residues


WRONG_SUMS = [garbage, nothing, one_number_far_off]


@pytest.mark.parametrize("wrong", WRONG_SUMS)
def test_a_wrong_sum_is_never_committed_and_the_task_pauses_in_the_end(
    tmp_path: Path, wrong: Callable[[Residues], Residues]
) -> None:
    fleet = secure_fleet(tmp_path)
    lies(fleet, with_residues(fleet, wrong))
    fleet.run(until=lambda: fleet.state.phase is Phase.PAUSED)
    assert fleet.state.version == fleet.state.committed == 0
    assert "a helper's sum is wrong, or a device's vector is" in fleet.state.reason
    assert [note["round"] for note in fleet.journals[AGGREGATOR].named("round_aborted")] == [1, 2, 3]


@pytest.mark.parametrize("wrong", WRONG_SUMS)
def test_an_aggregator_that_believes_any_sum_commits_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: Callable[[Residues], Residues]
) -> None:
    copy = broken_copy("fl_protocol.secagg.fixed_point", ("if largest > most or norm > longest:", "if False:"))
    monkeypatch.setattr(FixedPoint, "decode", copy.FixedPoint.decode)
    fleet = secure_fleet(tmp_path)
    lies(fleet, with_residues(fleet, wrong))
    fleet.run(until=lambda: fleet.state.committed == 1)
    assert np.abs(fleet.params(1) - fleet.params(0)).max() > CLIP  # which no mean of clipped updates can reach


UNUSABLE: dict[str, tuple[Lie, Ed25519PrivateKey | None, str]] = {
    "of another list": (lambda one: replace(one, included_digest=bytes(32)), None, "the masks of another list"),
    "of another number of updates": (lambda one: replace(one, count=2), None, "the masks of another list"),
    "of another length": (
        lambda one: replace(one, total=one.total[:-1]),
        None,
        "the sum of helper-b is malformed: expected 756 bytes",
    ),
    "of another round": (lambda one: replace(one, round=9), None, "no answer of helper-b in time"),
    "of another manifest": (lambda one: replace(one, manifest_digest=bytes(32)), None, "no answer of helper-b in time"),
    "of another study": (lambda one: replace(one, tenant="hospital"), None, "no answer of helper-b in time"),
    "in another's name": (lambda one: replace(one, helper=HONEST), None, "no answer of helper-b in time"),
    "that a stranger signed": (lambda one: one, STRANGER, "no answer of helper-b in time"),
}


@pytest.mark.parametrize("what", UNUSABLE)
def test_an_answer_is_not_used(tmp_path: Path, what: str) -> None:
    lie, key, why = UNUSABLE[what]
    fleet = secure_fleet(tmp_path, secure={"unmasking_s": 20.0}, rounds=1)
    lies(fleet, lie, key=key)
    fleet.run(until=lambda: fleet.state.number == 2)
    (aborted,) = fleet.journals[AGGREGATOR].named("round_aborted")
    assert why in aborted["reason"]
    assert fleet.state.committed == 0


def test_a_helper_that_refuses_keeps_a_round_from_its_end_and_is_named(tmp_path: Path) -> None:
    fleet = secure_fleet(tmp_path)
    for name in ALL:
        fleet.helpers[LIAR].store.devices.remove(TENANT, name)
    fleet.run(until=lambda: fleet.state.phase is Phase.PAUSED)
    assert "helper helper-b refuses: unsigned" in fleet.state.reason
    assert fleet.state.committed == 0


# What nothing finds.


def test_a_wrong_sum_that_is_short_enough_passes_and_moves_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No update and no mask can be looked at, so a helper can do what each device can: add what it likes, if short."""
    truth = listen_to_updates(monkeypatch)
    fleet = secure_fleet(tmp_path)
    push = np.zeros(len(fleet.params(0)), np.int64)
    push[:4] = 1000
    lies(fleet, with_residues(fleet, lambda residues: residues - push))
    fleet.run(until=lambda: fleet.state.committed == 1)
    honest = np.mean([truth[name, 1] for name in ALL], axis=0)
    moved = fleet.params(1) - fleet.params(0) - honest
    np.testing.assert_allclose(moved, push * STEP / len(ALL), atol=1.001 * STEP)
    assert fleet.journals[AGGREGATOR].named("helper_message_refused") == []


# What a helper can see.


def key_of(fleet: VirtualFleet, helper: str) -> RoundKey:
    """A helper's private key, as its store has it."""
    stored = fleet.helpers[helper].store.keys.newest()
    assert stored is not None
    assert stored.secret is not None
    return RoundKey(stored.kem, stored.secret)


def update_by(rogue: RogueAggregator, *told_by: str) -> NDArray[np.float64]:
    """What is left of the first device's update when these helpers give the aggregator their keys."""
    found = rogue.masked(ALL[:1])
    for helper in told_by:
        found -= rogue.mask_of(ALL[0], helper, key_of(rogue.fleet, helper))
    return rogue.read(found)


def test_the_aggregator_and_all_helpers_but_one_see_nothing_and_with_that_one_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = listen_to_updates(monkeypatch)
    fleet = secure_fleet(tmp_path, devices=0)
    rogue = RogueAggregator(fleet)
    rogue.run_until_published()
    for name in ALL:
        fleet.start_device(name, minimum_helpers=2, minimum_operators=2)
    rogue.run(lambda: rogue.sent() == set(ALL))
    update = truth[ALL[0], 1]
    for told_by in ((), (LIAR,), (HONEST,)):
        assert np.linalg.norm(update_by(rogue, *told_by)) > 100 * np.linalg.norm(update)
    assert np.abs(update_by(rogue, LIAR, HONEST) - update).max() <= 1.001 * STEP
    assert np.linalg.norm(update) > 10 * STEP * np.sqrt(len(update))


def test_a_helpers_key_opens_no_seed_of_another(tmp_path: Path) -> None:
    fleet = secure_fleet(tmp_path, devices=0)
    rogue = RogueAggregator(fleet)
    rogue.run_until_published()
    fleet.start_device(ALL[0])
    rogue.run(lambda: rogue.sent() == {ALL[0]})
    with pytest.raises(ProtocolError, match="does not open"):
        rogue.mask_of(ALL[0], HONEST, key_of(fleet, LIAR))


# What a helper says of the past.


def test_an_answer_of_an_earlier_round_is_not_taken_for_this_one(tmp_path: Path) -> None:
    fleet = secure_fleet(tmp_path, secure={"unmasking_s": 20.0})
    first: list[MaskSumMsg] = []

    def again(answer: MaskSumMsg) -> MaskSumMsg:
        first.append(answer)
        return first[0]

    lies(fleet, again)
    fleet.run(until=lambda: fleet.state.number == 3)
    assert [note["round"] for note in committed(fleet)] == [1]
    (aborted,) = fleet.journals[AGGREGATOR].named("round_aborted")
    assert "no answer of helper-b in time" in aborted["reason"]
    assert fleet.journals[AGGREGATOR].named("helper_message_refused")
    check_counted_once(fleet)
