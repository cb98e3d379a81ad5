"""An aggregator that wants to see one wearer's update: real devices and helpers, and every key of the real aggregator.

Each attack ends with what it takes for the victim's update. Against the study as it is that is none: a helper or a
device refuses, or what comes out is noise. Against a copy without the one check that stands in its way it is the
update that the device protected, to within one step of the grid in every number; so it is that check that holds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec.structs import replace
from numpy.typing import NDArray

from aggregator.helper import answering
from aggregator.helper import service as helper_service
from aggregator.helper.known_devices import KnownDevices
from aggregator.task_file import Participation
from device_client import manifest_checks, participation, secure_update
from device_client.floors import Floors
from device_client.ports import Float32
from fl_protocol.integer_noise import Entropy
from fl_protocol.messages import RoundManifestMsg
from fl_protocol.plans import TrainingPlanMsg
from fl_protocol.sealing import RoundKey
from fl_protocol.secagg import masks, parties
from fl_protocol.secagg.masks import SEED_BYTES
from fl_protocol.secagg.messages import HelperKeyMsg, SecureBodyMsg, SecureTermsMsg
from fl_protocol.secagg.packing import unpack
from fl_protocol.secagg.parties import Sender, contribute, entry_for
from fl_protocol.secagg.terms import secure_round
from fl_protocol.signing import sign
from tests.enrolments import broken_copy
from tests.system.malice import AttackFailedError, Residues, RogueAggregator, listen_to_updates
from tests.system.test_secure_studies import HELPERS, secure_task
from tests.virtual_fleet import SeededEntropy, VirtualFleet

VICTIM, OTHERS = "watch-0", ("watch-1", "watch-2", "watch-3")
ALL = (VICTIM, *OTHERS)
COHORT = 3
OWN_KEY = RoundKey("x25519", bytes(range(32)))
"""Of the aggregator, where a helper's should be."""


class Stage:
    """A study with a rogue aggregator in it, before any device has come; its first round stays open for 20 seconds."""

    def __init__(self, folder: Path, truth: dict[tuple[str, int], Float32]) -> None:
        once = Participation(minimum_separation_s=900.0)
        task = secure_task(goal=10, minimum_cohort=COHORT, round_duration_s=20.0, participation=once)
        self.fleet = VirtualFleet(folder, devices=0, task=task, helpers=HELPERS)
        self.rogue, self._truth = RogueAggregator(self.fleet), truth
        self.manifest = self.rogue.run_until_published()

    def start(self, *names: str) -> None:
        """These devices come, and send."""
        for name in names:
            self.fleet.start_device(name, minimum_helpers=2, minimum_operators=2, minimum_cohort=COHORT)
        gives_up_s = self.fleet.clock.time_s + 5.0
        self.rogue.run(lambda: set(names) <= self.rogue.sent() or self.fleet.clock.time_s > gives_up_s)
        if not set(names) <= self.rogue.sent():
            (note, *_) = self.fleet.journals[names[0]].named("message_refused")
            raise AttackFailedError(f"no device sends anything: {note['reason']}")

    def sums(self, *names: str, manifest: RoundManifestMsg | None = None) -> Residues:
        """All helpers' sums of masks over these devices' updates."""
        asked = [self.rogue.ask(one, self.rogue.entries(one, names), manifest=manifest) for one in HELPERS]
        return np.sum(asked, axis=0, dtype=np.int64)

    def confirm(self, found: NDArray[np.float64]) -> None:
        """Raise AttackFailedError unless this is the victim's update to within one step of the grid."""
        assert self.manifest.secure is not None
        step, truth = self.manifest.secure.step, self._truth[VICTIM, 1]
        assert np.linalg.norm(truth) > 10 * step * np.sqrt(len(truth)), "the update is lost in the grid"
        if np.abs(found - truth).max() > 1.001 * step:
            assert np.linalg.norm(found) > 100 * np.linalg.norm(truth)
            raise AttackFailedError("what comes out is noise")


Attack = Callable[[Stage], NDArray[np.float64]]


# Lists.


def two_lists_for_each_helper(stage: Stage) -> NDArray[np.float64]:
    """All devices, then all but one: the difference is that one."""
    stage.start(*ALL)
    mask = stage.sums(*ALL) - stage.sums(*OTHERS)
    return stage.rogue.read(stage.rogue.masked([VICTIM]) - mask)


def a_second_list_after_the_helpers_were_killed(stage: Stage) -> NDArray[np.float64]:
    """And after the round has been committed, with the first list's answers from the wire."""
    stage.start(*ALL)
    first = stage.sums(*ALL)
    stage.rogue.run(lambda: stage.fleet.state.committed == 1)
    for name in HELPERS:
        stage.fleet.kill_helper(name)
        stage.fleet.start_helper(name)
    return stage.rogue.read(stage.rogue.masked([VICTIM]) - first + stage.sums(*OTHERS))


def another_list_for_each_helper(stage: Stage) -> NDArray[np.float64]:
    """No helper is asked twice. If masks were the same for all helpers, the difference would be the victim's."""
    stage.start(*ALL)
    ask, entries = stage.rogue.ask, stage.rogue.entries
    first, other = HELPERS
    mask = ask(first, entries(first, ALL)) - ask(other, entries(other, OTHERS))
    return stage.rogue.read(stage.rogue.masked([VICTIM]) - len(HELPERS) * mask)


def a_list_of_one(stage: Stage) -> NDArray[np.float64]:
    """The manifest promises devices a cohort of three."""
    stage.start(*ALL)
    return stage.rogue.read(stage.rogue.masked([VICTIM]) - stage.sums(VICTIM))


def one_device_among_sybils(stage: Stage) -> NDArray[np.float64]:
    """A list that is long enough, of names that the aggregator made up: it knows what is in all updates but one."""
    stage.start(*ALL)
    terms, rogue = stage.rogue.terms(), stage.rogue
    length, entropy = terms.fixed_point.length, SeededEntropy("sybils")
    bodies = [
        contribute(
            terms,
            np.zeros(length, np.float32),
            np.zeros(length, np.int64),
            sender=Sender(f"sybil-{index}", entropy(16), Ed25519PrivateKey.from_private_bytes(entropy(32))),
            entropy=entropy,
        )
        for index in range(COHORT - 1)
    ]
    total = rogue.masked([VICTIM])
    for body in bodies:
        total += unpack(body.masked, length, terms.fixed_point.bits)
    for helper in HELPERS:
        entries = [*rogue.entries(helper, [VICTIM]), *(entry_for(terms, body, helper) for body in bodies)]
        total -= rogue.ask(helper, entries)
    return rogue.read(total)


def updates_of_an_old_round_in_a_new_one(stage: Stage) -> NDArray[np.float64]:
    """Round 1 was answered for all; round 2, in which nobody takes part, is asked for all of round 1 but one."""
    stage.start(*ALL)
    first = stage.sums(*ALL)
    stage.rogue.run_until_published(2)
    mask = first - stage.sums(*OTHERS, manifest=stage.rogue.manifests[2])
    return stage.rogue.read(stage.rogue.masked([VICTIM]) - mask)


# Manifests.


def another_model_for_the_others(stage: Stage) -> NDArray[np.float64]:
    """Model inconsistency: all but one get a model and a plan after which there is nothing in their updates.

    D. Pasquini, D. Francati, G. Ateniese, "Eluding Secure Aggregation in Federated Learning via Model Inconsistency",
    CCS 2022, arXiv 2111.07380. Here noise is in every update, so the plan has to make that vanish too.
    """
    params = stage.fleet.params(0) * np.float32(0.5)
    plan = stage.manifest.plan
    assert isinstance(plan, TrainingPlanMsg)
    digest = hashlib.sha256(params.astype("<f4").tobytes()).digest()
    stage.rogue.announce(replace(stage.manifest, model_digest=digest, plan=replace(plan, learning_rate=1e-12)), params)
    stage.start(*OTHERS)
    stage.rogue.announce(stage.manifest)
    stage.start(VICTIM)
    return stage.rogue.read(stage.rogue.masked(ALL) - stage.sums(*ALL))


def a_manifest_below_the_wearers_floor(stage: Stage) -> NDArray[np.float64]:
    """Devices are told that they may be alone, and the helpers too."""
    alone = replace(stage.manifest, minimum_cohort=1)
    stage.rogue.announce(alone)
    stage.rogue.manifests[1] = alone
    stage.start(VICTIM)
    return stage.rogue.read(stage.rogue.masked([VICTIM]) - stage.sums(VICTIM))


def its_own_keys_for_the_helpers(stage: Stage) -> NDArray[np.float64]:
    """The aggregator opens all seeds by itself and asks nobody."""
    secure = stage.manifest.secure
    assert secure is not None
    mine = Ed25519PrivateKey.from_private_bytes(b"\x0a" * 32)
    keys = tuple(
        sign(
            HelperKeyMsg(helper=one, operator=f"operator-of-{one}", recipient=OWN_KEY.recipient(), not_after_s=2e9),
            mine,
        )
        for one in HELPERS
    )
    forged = replace(stage.manifest, secure=replace(secure, helpers=keys))
    stage.rogue.announce(forged)
    stage.start(VICTIM)
    found = stage.rogue.masked([VICTIM])
    for helper in HELPERS:
        found -= stage.rogue.mask_of(VICTIM, helper, OWN_KEY, terms=secure_round(forged))
    return stage.rogue.read(found)


# Without which check each succeeds.


def helpers_forget(patch: pytest.MonkeyPatch) -> None:
    """A helper that keeps no ledger."""
    copy = broken_copy(
        "aggregator.helper.answerer",
        ("given = given_before(question, self._past(question))", "given = None"),
        ("chain = self._store.answers.add(record, answer, self._helper.identity)", "chain = b''"),
    )
    patch.setattr(helper_service, "Answerer", copy.Answerer)


def masks_are_replicated(patch: pytest.MonkeyPatch) -> None:
    """A device that gives all helpers one seed, and a mask that does not follow from whose it is."""
    copy = broken_copy(
        "fl_protocol.secagg.parties",
        (
            "    for helper, key in terms.helpers.items():",
            "    one = entropy(16)\n    for helper, key in terms.helpers.items():",
        ),
        ("seed, info = entropy(SEED_BYTES),", "seed, info = one,"),
        ("            helper,\n        ]", "        ]"),
    )
    patch.setattr(secure_update, "contribute", copy.contribute)
    patch.setattr(parties.SecureRound, "seed_info", copy.SecureRound.seed_info)


def helpers_have_no_floor(patch: pytest.MonkeyPatch) -> None:
    copy = broken_copy("fl_protocol.secagg.parties", ("if len(entries) < fewest:", "if False:"))
    patch.setattr(answering, "sum_of_masks", copy.sum_of_masks)


def helpers_take_unknown_names(patch: pytest.MonkeyPatch) -> None:
    """A helper that leaves out of its question who a device is what it does not know."""
    every = "for device, entry in zip(question.devices, question.entries, strict=True)\n"
    copy = broken_copy("aggregator.helper.known_devices", (every, every + "if device in listed\n"))
    patch.setattr(KnownDevices, "keys", copy.KnownDevices.keys)


def helpers_know_every_name(patch: pytest.MonkeyPatch) -> None:
    """A helper that moreover believes what a device signed whose key it does not know."""
    helpers_take_unknown_names(patch)
    copy = broken_copy(
        "fl_protocol.secagg.parties",
        (
            "if key is None or not contribution_signature_is_valid(",
            "if key is not None and not contribution_signature_is_valid(",
        ),
    )
    patch.setattr(answering, "sum_of_masks", copy.sum_of_masks)
    trusting = broken_copy(
        "aggregator.helper.known_devices",
        ("            raise ProtocolError(self._unknown(device, credential))\n", "            return None\n"),
    )
    patch.setattr(KnownDevices, "_key", trusting.KnownDevices._key)


def nothing_is_bound_to_its_manifest(patch: pytest.MonkeyPatch) -> None:
    """Neither what a device signs nor its masks; each alone would do, see tests/aggregator/helper/test_answering.py."""
    copy = broken_copy(
        "fl_protocol.secagg.parties",
        (
            "named == (terms.tenant, terms.task, terms.number, terms.manifest_digest)",
            "named[:2] == (terms.tenant, terms.task)",
        ),
        ("            self.number,\n            self.manifest_digest,\n", ""),
    )
    patch.setattr(parties, "_is_of", copy._is_of)
    patch.setattr(parties.SecureRound, "seed_info", copy.SecureRound.seed_info)


def helpers_forget_a_little(patch: pytest.MonkeyPatch) -> None:
    """A helper that does not look into its ledger, but has one."""
    copy = broken_copy(
        "aggregator.helper.answerer", ("given = given_before(question, self._past(question))", "given = None")
    )
    patch.setattr(helper_service, "Answerer", copy.Answerer)


def wearers_have_no_floor(patch: pytest.MonkeyPatch) -> None:
    copy = broken_copy("device_client.floors", ("if manifest.minimum_cohort < self.minimum_cohort:", "if False:"))
    patch.setattr(Floors, "check", copy.Floors.check)


def nobody_has_a_floor(patch: pytest.MonkeyPatch) -> None:
    wearers_have_no_floor(patch)
    helpers_have_no_floor(patch)


def devices_pin_no_keys(patch: pytest.MonkeyPatch) -> None:
    """A device that goes by a helper's name."""
    copy = broken_copy("fl_protocol.secagg.terms", ("        verify(signed, HelperKeyMsg, identity.key)\n", ""))
    patch.setattr(manifest_checks, "verified_helpers", copy.verified_helpers)


@dataclass(frozen=True)
class Case:
    """An attack, what withstands it, and the copy that does not."""

    attack: Attack
    withstood: str
    weakened: Callable[[pytest.MonkeyPatch], None]


CASES = [
    Case(two_lists_for_each_helper, "helper-a refuses: second_list", helpers_forget),
    Case(a_second_list_after_the_helpers_were_killed, "helper-a refuses: second_list", helpers_forget),
    Case(another_list_for_each_helper, "what comes out is noise", masks_are_replicated),
    Case(a_list_of_one, "helper-a refuses: too_few", helpers_have_no_floor),
    Case(one_device_among_sybils, "helper-a refuses: unsigned", helpers_know_every_name),
    Case(updates_of_an_old_round_in_a_new_one, "helper-a refuses: other_round", nothing_is_bound_to_its_manifest),
    Case(another_model_for_the_others, "helper-a refuses: other_round", nothing_is_bound_to_its_manifest),
    Case(a_manifest_below_the_wearers_floor, "minimum_cohort 1 is below the wearer's floor 3", nobody_has_a_floor),
    Case(its_own_keys_for_the_helpers, "HelperKeyMsg is not signed by the pinned key", devices_pin_no_keys),
]

HALF_WEAKENED = [
    Case(two_lists_for_each_helper, "helper-a says nothing", helpers_forget_a_little),
    Case(a_manifest_below_the_wearers_floor, "helper-a refuses: too_few", wearers_have_no_floor),
    Case(one_device_among_sybils, "helper-a refuses: unsigned", helpers_take_unknown_names),
]
"""Where two checks stand in the way, one is enough."""


@pytest.fixture
def truth(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, int], Float32]:
    """What each device protects, by device and round."""
    return listen_to_updates(monkeypatch)


def named(case: Case) -> str:
    return case.attack.__name__


@pytest.mark.parametrize("case", CASES, ids=named)
def test_a_study_withstands(tmp_path: Path, truth: dict[tuple[str, int], Float32], case: Case) -> None:
    stage = Stage(tmp_path, truth)
    with pytest.raises(AttackFailedError, match=case.withstood):
        stage.confirm(case.attack(stage))


@pytest.mark.parametrize("case", CASES, ids=named)
def test_without_that_check_the_aggregator_has_the_update_by(
    tmp_path: Path, truth: dict[tuple[str, int], Float32], monkeypatch: pytest.MonkeyPatch, case: Case
) -> None:
    case.weakened(monkeypatch)
    stage = Stage(tmp_path, truth)
    stage.confirm(case.attack(stage))


@pytest.mark.parametrize("case", HALF_WEAKENED, ids=named)
def test_with_one_of_two_checks_a_study_still_withstands(
    tmp_path: Path, truth: dict[tuple[str, int], Float32], monkeypatch: pytest.MonkeyPatch, case: Case
) -> None:
    case.weakened(monkeypatch)
    test_a_study_withstands(tmp_path, truth, case)


def test_a_round_that_was_attacked_comes_to_its_honest_end(
    tmp_path: Path, truth: dict[tuple[str, int], Float32]
) -> None:
    stage = Stage(tmp_path, truth)
    for attack in (a_list_of_one, one_device_among_sybils):
        with pytest.raises(AttackFailedError, match="refuses"):
            attack(stage)
    stage.rogue.run(lambda: stage.fleet.state.committed == 1)
    mean = np.mean([truth[name, 1] for name in ALL], axis=0)
    assert stage.manifest.secure is not None
    assert np.abs(stage.fleet.params(1) - stage.fleet.params(0) - mean).max() <= 1.001 * stage.manifest.secure.step


# A device whose random numbers repeat.


def difference_of_two_rounds(folder: Path, patch: pytest.MonkeyPatch) -> tuple[NDArray[np.float64], Float32, float]:
    """What the aggregator finds from two messages of a device that draws the same seeds; the truth; the grid's step."""
    truth, really = listen_to_updates(patch), participation.protected_update

    def with_stuck_seeds(
        terms: SecureTermsMsg, manifest: RoundManifestMsg, change: Float32, **how: Any
    ) -> SecureBodyMsg:
        entropy: Entropy = how.pop("entropy")

        def stuck(count: int) -> bytes:
            return b"\x07" * count if count == SEED_BYTES else entropy(count)

        return really(terms, manifest, change, **how, entropy=stuck)

    patch.setattr(participation, "protected_update", with_stuck_seeds)
    fleet = VirtualFleet(folder, devices=0, task=secure_task(), helpers=HELPERS)
    rogue = RogueAggregator(fleet)
    manifest = rogue.run_until_published()
    for name in ALL[:3]:
        fleet.start_device(name)
    rogue.run(lambda: 2 in rogue.manifests and VICTIM in rogue.sent(2))
    found = rogue.read(rogue.masked([VICTIM]) - rogue.masked([VICTIM], number=2))
    assert manifest.secure is not None
    return found, truth[VICTIM, 1] - truth[VICTIM, 2], manifest.secure.step


def test_a_seed_that_comes_back_still_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, truth, _ = difference_of_two_rounds(tmp_path, monkeypatch)
    assert np.linalg.norm(found) > 100 * np.linalg.norm(truth)


def test_if_masks_followed_from_seeds_alone_two_messages_would_tell_their_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = broken_copy("fl_protocol.secagg.masks", (' + b"\\0" + context', ""))
    monkeypatch.setattr(masks, "_key", copy._key)
    found, truth, step = difference_of_two_rounds(tmp_path, monkeypatch)
    assert np.linalg.norm(truth) > 10 * step * np.sqrt(len(truth))
    assert np.abs(found - truth).max() <= 2.001 * step
