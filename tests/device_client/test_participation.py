"""Charge, train, seal, store, then send: in this order, and whatever is cut short."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from device_client.errors import BudgetSpentError, StoreError, TrainingError
from device_client.events import PendingUpdate
from device_client.ledger import LOG_NAME, Budget, PrivacyLedger
from device_client.participation import Outbox, Participant, sealed_digest_of
from device_client.personal import PersonalLayers
from device_client.ports import Float32, Labels
from device_client.training import train_locally
from fl_protocol.errors import LocalMisuseError
from fl_protocol.messages import RoundManifestMsg, UpdateEnvelopeMsg, UpdateHeaderMsg, decode
from fl_protocol.sealing import open_update
from fl_protocol.signing import header_signature_is_valid
from tests.device_client.ports import (
    DEVICE,
    ROUND_KEY,
    TASK,
    LogisticGraph,
    MemoryStore,
    PowerCutError,
    make_manifest,
    make_plan,
    make_records,
)
from tests.virtual_fleet import SeededEntropy

KEY = Ed25519PrivateKey.from_private_bytes(b"\x03" * 32)
PARAMS = np.zeros(12, np.float32)


@dataclass
class WatchedGraph(LogisticGraph):
    """Writes into the store's record when a gradient is computed."""

    store: MemoryStore | None = None

    def train(
        self, params: Float32, x: Float32, y: Labels, mask: Float32, *, clip: float, dropout: Float32 | None = None
    ) -> Float32:
        assert self.store is not None
        if self.store.operations[-1:] != [("compute", "gradient")]:
            self.store.operations.append(("compute", "gradient"))
        return super().train(params, x, y, mask, clip=clip)


class EagerParticipant(Participant):
    """Broken: trains before it charges."""

    def participate(self, manifest: RoundManifestMsg, params: Float32, *, now_s: float) -> PendingUpdate:
        change = train_locally(self.graph, params, self.records, plan=manifest.plan, entropy=self.entropy)
        self.ledger.reserve(task=manifest.task, round_number=manifest.round, plan=manifest.plan, now_s=now_s)
        pending = self._seal(manifest, change)
        self.outbox.put(pending)
        return pending


class CarelessParticipant(Participant):
    """Broken: hands the update out without keeping it."""

    def participate(self, manifest: RoundManifestMsg, params: Float32, *, now_s: float) -> PendingUpdate:
        self.ledger.reserve(task=manifest.task, round_number=manifest.round, plan=manifest.plan, now_s=now_s)
        change = train_locally(self.graph, params, self.records, plan=manifest.plan, entropy=self.entropy)
        return self._seal(manifest, change)


def participant(store: MemoryStore, kind: type[Participant] = Participant, *, epsilon: float = 5.0) -> Participant:
    return kind(
        device=DEVICE,
        signing_key=KEY,
        ledger=PrivacyLedger(store, Budget(epsilon, 1e-5)),
        graph=WatchedGraph(batch_size=8, num_inputs=6, store=store),
        records=make_records(),
        personal=PersonalLayers(store, task="watch", initial=np.zeros(0, np.float32)),
        outbox=Outbox(store),
        entropy=SeededEntropy("participant"),
    )


def check_the_charge_is_durable_before_the_first_gradient(kind: type[Participant]) -> None:
    store = MemoryStore()
    subject = participant(store, kind)
    store.operations.clear()
    subject.participate(make_manifest(), PARAMS, now_s=1.0)
    first = store.operations.index(("compute", "gradient"))
    assert ("append", LOG_NAME) in store.operations[:first], f"trained before charging: {store.operations}"


def check_the_update_is_kept_before_it_is_handed_out(kind: type[Participant]) -> None:
    store = MemoryStore()
    pending = participant(store, kind).participate(make_manifest(), PARAMS, now_s=1.0)
    assert list(Outbox(store.after_restart())) == [pending]


CHECKS = [
    check_the_charge_is_durable_before_the_first_gradient,
    check_the_update_is_kept_before_it_is_handed_out,
]


@pytest.mark.parametrize("check", CHECKS)
def test_participation_passes(check: Callable[[type[Participant]], None]) -> None:
    check(Participant)


@pytest.mark.parametrize(("check", "broken"), list(zip(CHECKS, [EagerParticipant, CarelessParticipant], strict=True)))
def test_a_broken_participation_is_caught(
    check: Callable[[type[Participant]], None], broken: type[Participant]
) -> None:
    with pytest.raises(AssertionError):
        check(broken)


def test_the_update_opens_only_with_the_rounds_key_and_says_who_and_what() -> None:
    manifest = make_manifest(round=4)
    pending = participant(MemoryStore()).participate(manifest, PARAMS, now_s=1.0)
    envelope = decode(pending.envelope, UpdateEnvelopeMsg)
    header = decode(envelope.header, UpdateHeaderMsg)
    assert header_signature_is_valid(envelope.header, envelope.signature, KEY.public_key())
    assert (header.task, header.round, header.device) == (TASK, 4, DEVICE)
    assert (header.model_digest, header.update_id) == (manifest.model_digest, pending.update_id)
    assert header.sealed_digest == pending.sealed_digest == sealed_digest_of(pending.envelope)
    body = open_update(header, envelope.sealed, ROUND_KEY)
    assert body.num_parameters == 12
    change = np.frombuffer(body.values, "<f4")
    plan = manifest.plan
    expected = train_locally(
        LogisticGraph(8, 6), PARAMS, make_records(), plan=plan, entropy=SeededEntropy("participant")
    )
    np.testing.assert_array_equal(change, expected)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("cut_at", range(5))
def test_a_power_cut_anywhere_never_trains_a_round_twice_and_never_releases_what_was_not_charged(
    cut_at: int, *, after: bool
) -> None:
    # Operations: charge line, head, (gradient), outbox. The head of the empty ledger is written on opening.
    store = MemoryStore()
    subject = participant(store)
    store.operations.clear()
    store.cut_at, store.cut_after = cut_at, after
    with contextlib.suppress(PowerCutError):
        subject.participate(make_manifest(), PARAMS, now_s=1.0)
    restarted = participant(store.after_restart())
    charged, kept = len(restarted.ledger.reservations), list(restarted.outbox)
    assert len(kept) <= charged <= 1
    if charged:
        with pytest.raises(BudgetSpentError, match="charged before"):
            restarted.participate(make_manifest(), PARAMS, now_s=2.0)
        assert list(restarted.outbox) == kept


def test_a_spent_budget_computes_nothing() -> None:
    store = MemoryStore()
    subject = participant(store, epsilon=0.01)
    store.operations.clear()
    with pytest.raises(BudgetSpentError):
        subject.participate(make_manifest(), PARAMS, now_s=1.0)
    assert store.operations == []


def test_a_full_disk_computes_nothing() -> None:
    store = MemoryStore()
    subject = participant(store)
    store.full = True
    store.operations.clear()
    with pytest.raises(StoreError):
        subject.participate(make_manifest(), PARAMS, now_s=1.0)
    assert store.operations == []


@pytest.mark.parametrize(
    ("plan", "error"),
    [
        (make_plan(learning_rate=1e38, expected_batch_size=1e-3), TrainingError),
        (make_plan(noise_multiplier=1e13), LocalMisuseError),
        (make_plan(l2_norm_clip=1e-300), LocalMisuseError),
    ],
)
def test_a_plan_that_cannot_be_carried_out_keeps_its_charge_and_gives_no_update(
    plan: object, error: type[Exception]
) -> None:
    store = MemoryStore()
    subject = participant(store)
    with pytest.raises(error), np.errstate(all="ignore"):
        subject.participate(make_manifest(plan=plan), PARAMS, now_s=1.0)  # type: ignore[arg-type]
    assert len(subject.ledger.reservations) == 1
    assert list(subject.outbox) == []


def test_update_ids_and_noise_differ_between_rounds() -> None:
    subject = participant(MemoryStore())
    pending = [subject.participate(make_manifest(round=number), PARAMS, now_s=1.0) for number in (1, 2, 3)]
    assert len({update.update_id for update in pending}) == 3
    assert len({update.sealed_digest for update in pending}) == 3


def test_a_damaged_outbox_entry_is_named() -> None:
    store = MemoryStore()
    store.blobs["outbox/00"] = b"\xc1"
    with pytest.raises(StoreError, match="outbox/00"):
        list(Outbox(store))
