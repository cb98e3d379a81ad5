"""Personal layers stay on the device, are as noisy as the rest, and outlive a restart; broken copies are caught."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec.structs import replace

from device_client.errors import StoreError
from device_client.events import PendingUpdate
from device_client.ledger import Budget, PrivacyLedger
from device_client.participation import Outbox, Participant
from device_client.personal import PersonalLayers
from device_client.ports import Float32
from device_client.training import Records, train_locally
from fl_protocol.messages import RoundManifestMsg, UpdateBodyMsg, UpdateEnvelopeMsg, UpdateHeaderMsg, decode
from fl_protocol.sealing import open_update
from tests.device_client import noise_checks
from tests.device_client.noise_checks import FALSE_ALARM_RATE
from tests.device_client.ports import (
    DEVICE,
    ROUND_KEY,
    LogisticGraph,
    MemoryStore,
    make_manifest,
    make_plan,
    make_records,
)
from tests.virtual_fleet import SeededEntropy

KEY = Ed25519PrivateKey.from_private_bytes(b"\x03" * 32)
SHARED, ALL = 8, 12
PARAMS = np.zeros(SHARED, np.float32)
INITIAL = np.full(ALL - SHARED, 0.25, np.float32)


class SharingEverything(Participant):
    """Broken: sends the personal layers too."""

    def participate(self, manifest: RoundManifestMsg, params: Float32, *, now_s: float) -> PendingUpdate:
        self.ledger.reserve(task=manifest.task, round_number=manifest.round, plan=manifest.plan, now_s=now_s)
        start = np.concatenate([params, self.personal.values])
        change = train_locally(self.graph, start, self.records, plan=manifest.plan, entropy=self.entropy)
        self.personal.keep(self.personal.values + change[len(params) :])
        return self._seal(manifest, change)


class TrainingWithoutNoise(Participant):
    """Broken: the personal layers are trained on the bare gradient."""

    def participate(self, manifest: RoundManifestMsg, params: Float32, *, now_s: float) -> PendingUpdate:
        before = self.personal.values
        pending = super().participate(manifest, params, now_s=now_s)
        bare = replace(manifest.plan, noise_multiplier=0.0)
        start = np.concatenate([params, before])
        change = train_locally(self.graph, start, self.records, plan=bare, entropy=self.entropy)
        self.personal.keep(before + change[len(params) :])
        return pending


def participant(
    store: MemoryStore, kind: type[Participant] = Participant, *, records: Records | None = None, inputs: int = 6
) -> Participant:
    personal = np.full(2 * inputs - SHARED, 0.25, np.float32)
    return kind(
        device=DEVICE,
        signing_key=KEY,
        ledger=PrivacyLedger(store, Budget(50.0, 1e-5)),
        graph=LogisticGraph(batch_size=8, num_inputs=inputs),
        records=make_records() if records is None else records,
        personal=PersonalLayers(store, task="watch", initial=personal),
        outbox=Outbox(store),
        entropy=SeededEntropy("personal"),
    )


def sent(pending: PendingUpdate) -> UpdateBodyMsg:
    envelope = decode(pending.envelope, UpdateEnvelopeMsg)
    return open_update(decode(envelope.header, UpdateHeaderMsg), envelope.sealed, ROUND_KEY)


def check_only_the_shared_layers_are_sent(kind: type[Participant]) -> None:
    subject = participant(MemoryStore(), kind)
    body = sent(subject.participate(make_manifest(num_parameters=SHARED), PARAMS, now_s=1.0))
    assert body.num_parameters == SHARED
    start = np.concatenate([PARAMS, INITIAL])
    whole = train_locally(
        LogisticGraph(8, 6), start, make_records(), plan=make_plan(), entropy=SeededEntropy("personal")
    )
    np.testing.assert_array_equal(np.frombuffer(body.values, "<f4"), whole[:SHARED])
    np.testing.assert_array_equal(subject.personal.values, INITIAL + whole[SHARED:])


def check_personal_layers_carry_the_accounted_noise(kind: type[Participant]) -> None:
    """Records of zeros have no gradient, so the layers move by noise alone. False-alarm rate: FALSE_ALARM_RATE."""
    inputs = 3000
    records = Records(np.zeros((10, inputs // 2, 2), np.float32), np.zeros(10, np.int32))
    subject = participant(MemoryStore(), kind, records=records, inputs=inputs)
    before = subject.personal.values
    plan = make_plan(noise_multiplier=3.0, l2_norm_clip=0.8, learning_rate=0.5, expected_batch_size=25.0)
    subject.participate(make_manifest(plan=plan, num_parameters=SHARED), PARAMS, now_s=1.0)
    moved = (subject.personal.values - before).astype(np.float64) * 25.0 / 0.5 / (3.0 * 0.8)
    assert noise_checks.p_value_of_standard_deviation(moved, 1.0) > FALSE_ALARM_RATE


CHECKS = [check_only_the_shared_layers_are_sent, check_personal_layers_carry_the_accounted_noise]


@pytest.mark.parametrize("check", CHECKS)
def test_personal_layers_pass(check: Callable[[type[Participant]], None]) -> None:
    check(Participant)


@pytest.mark.parametrize(("check", "broken"), list(zip(CHECKS, [SharingEverything, TrainingWithoutNoise], strict=True)))
def test_a_broken_copy_is_caught(check: Callable[[type[Participant]], None], broken: type[Participant]) -> None:
    with pytest.raises(AssertionError):
        check(broken)


def test_they_outlive_a_restart_and_measure_with_the_global_model() -> None:
    store = MemoryStore()
    subject = participant(store)
    subject.participate(make_manifest(num_parameters=SHARED), PARAMS, now_s=1.0)
    again = participant(store.after_restart())
    np.testing.assert_array_equal(again.personal.values, subject.personal.values)
    assert not np.array_equal(again.personal.values, INITIAL)
    assert again.measure(PARAMS).count == len(again.records)


def test_layers_of_another_size_are_refused_and_another_task_has_its_own() -> None:
    store = MemoryStore()
    PersonalLayers(store, task="watch", initial=INITIAL).keep(INITIAL * 2)
    with pytest.raises(StoreError, match="hold 4 parameters, the model has 3"):
        _ = PersonalLayers(store, task="watch", initial=INITIAL[:3]).values
    np.testing.assert_array_equal(PersonalLayers(store, task="other", initial=INITIAL).values, INITIAL)


def test_a_model_without_personal_layers_stores_nothing() -> None:
    store = MemoryStore()
    none = PersonalLayers(store, task="watch", initial=np.zeros(0, np.float32))
    none.keep(none.values)
    assert not store.operations
