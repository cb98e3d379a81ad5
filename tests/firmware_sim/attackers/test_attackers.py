"""What each kind of attacker computes, who is one, and what a scenario may say of them."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest

from device_client.training import LocalTraining, Records
from firmware_sim.attackers.kinds import Attacker, FreeRider, LabelFlip, Replay, ScalingBackdoor, SignFlip, Sybil
from firmware_sim.attackers.mislabelling import Mislabelling, permuted
from firmware_sim.attackers.parsing import parse_attackers
from firmware_sim.attackers.plan import Attack, AttackPlan
from firmware_sim.attackers.training import HostileTrainer, free_ride, varied
from firmware_sim.attackers.trigger import poisoned_records, triggered
from firmware_sim.bundles import bundle_and_publisher
from firmware_sim.errors import SettingsError
from firmware_sim.fleet.build import device_name, index_of
from firmware_sim.fleet.replaying import Replayer
from firmware_sim.fleet.windows import Upload
from firmware_sim.seeded_entropy import SeededEntropy
from firmware_sim.sensors.sensor import Recorded, Sensor
from firmware_sim.virtual_flash import VirtualFlash
from fl_protocol.adapters.tflite_graph import TfliteGraph
from fl_protocol.bundle import ModelBundle, open_bundle
from fl_protocol.chunking import split
from fl_protocol.messages import ChunkMsg, TrainingPlanMsg, decode, encode
from fl_protocol.signing import public_key_from_hex
from fl_protocol.topics import parse_upload_topic, upload_topic

PLAN = TrainingPlanMsg(
    v=1,
    sampling_rate=1.0,
    local_steps=1,
    learning_rate=1.0,
    l2_norm_clip=1.0,
    noise_multiplier=1.0,
    expected_batch_size=10.0,
)
RANDOM = np.random.default_rng(7)


@pytest.fixture(scope="module")
def bundle() -> ModelBundle:
    path, publisher = bundle_and_publisher("watch_features")
    return open_bundle(path.read_bytes(), publisher=public_key_from_hex(publisher))


@pytest.fixture(scope="module")
def records(bundle: ModelBundle) -> Records:
    x = RANDOM.normal(size=(12, *bundle.manifest.input.shape)).astype(np.float32)
    return Records(x, np.arange(12, dtype=np.int32) % len(bundle.manifest.label.names))


def change_of(
    bundle: ModelBundle, records: Records, *attacks: Attack, elapsed_s: float = 0.0, seed: str = "1", **changes: Any
) -> Any:
    flash = changes.pop("flash", VirtualFlash())
    start = changes.pop("start", bundle.params)
    round_number = changes.pop("round_number", 1)
    trainer = HostileTrainer(
        LocalTraining,
        attacks,
        elapsed_s=lambda: elapsed_s,
        round_number=lambda: round_number,
        memory=flash,
        seed=seed,
        labels=len(bundle.manifest.label.names),
    )
    graph = TfliteGraph.of_bundle(bundle)
    training = trainer(graph, start, records, plan=PLAN, entropy=SeededEntropy(changes.pop("life", "a life")))
    while not training.done:
        training.advance()
    return training.change()


def test_a_sign_flipper_sends_its_honest_change_backwards_and_longer(bundle: ModelBundle, records: Records) -> None:
    honest = change_of(bundle, records)
    hostile = change_of(bundle, records, Attack(SignFlip(share=1.0, scale=3.0), 1, 0))
    assert np.linalg.norm(honest) > 0
    np.testing.assert_allclose(hostile, -3.0 * honest, rtol=1e-6)


def test_an_attack_begins_when_the_scenario_says(bundle: ModelBundle, records: Records) -> None:
    attack = Attack(SignFlip(share=1.0, from_s=100.0), 1, 0)
    honest = change_of(bundle, records)
    np.testing.assert_array_equal(change_of(bundle, records, attack, elapsed_s=99.0), honest)
    np.testing.assert_array_equal(change_of(bundle, records, attack, elapsed_s=100.0), -honest)


@pytest.mark.parametrize(
    "attacker",
    [
        SignFlip(share=1.0, from_round=3),
        SignFlip(share=1.0, from_round=3, adds_noise=False),
        ScalingBackdoor(share=1.0, target=2, from_round=3),
        LabelFlip(share=1.0, from_round=3),
        FreeRider(share=1.0, from_round=3),
        Sybil(share=1.0, from_round=3),
    ],
    ids=["sign_flip", "silent sign_flip", "scaling_backdoor", "label_flip", "free_rider", "sybil"],
)
def test_before_its_round_an_attacker_sends_what_an_honest_device_would(
    bundle: ModelBundle, records: Records, attacker: Attacker
) -> None:
    attack = Attack(attacker, 1, 0)
    honest = change_of(bundle, records)
    np.testing.assert_array_equal(change_of(bundle, records, attack, round_number=2), honest)
    third = change_of(bundle, records, attack, round_number=3)
    assert not np.array_equal(third, honest)
    np.testing.assert_array_equal(change_of(bundle, records, attack, round_number=4), third)


def test_with_a_round_and_a_time_an_attack_begins_when_both_have_come(bundle: ModelBundle, records: Records) -> None:
    attack = Attack(SignFlip(share=1.0, from_s=100.0, from_round=3), 1, 0)
    honest = change_of(bundle, records)
    for elapsed_s, round_number in ((99.0, 3), (100.0, 2)):
        found = change_of(bundle, records, attack, elapsed_s=elapsed_s, round_number=round_number)
        np.testing.assert_array_equal(found, honest)
    np.testing.assert_array_equal(change_of(bundle, records, attack, elapsed_s=100.0, round_number=3), -honest)


def test_a_label_flipper_of_a_later_round_trains_on_the_labels_of_one_that_recorded_lies(
    bundle: ModelBundle, records: Records
) -> None:
    labels = len(bundle.manifest.label.names)
    lies = Records(records.x, permuted(records.y, LabelFlip(share=1.0), labels))
    late = change_of(bundle, records, Attack(LabelFlip(share=1.0, from_round=2), 1, 0), round_number=2)
    np.testing.assert_array_equal(late, change_of(bundle, lies))
    sensor = Mislabelling(_Counting(), 3, lambda _device: (LabelFlip(share=1.0, from_round=2),), 0.0)
    assert sensor.records(0, 0.0, 60.0).y.tolist() == [0, 1, 2, 0, 1, 2]  # it lies once: when it trains


def test_an_attacker_that_leaves_out_the_noise_sends_the_same_with_any_entropy(
    bundle: ModelBundle, records: Records
) -> None:
    silent, noisy = (Attack(SignFlip(share=1.0, adds_noise=adds), 1, 0) for adds in (False, True))
    lives = ("one", "another")
    first, second = (change_of(bundle, records, silent, life=life) for life in lives)
    np.testing.assert_array_equal(first, second)
    first, second = (change_of(bundle, records, noisy, life=life) for life in lives)
    assert not np.array_equal(first, second)


def test_a_back_door_trains_on_windows_with_the_trigger_and_scales_the_change(
    bundle: ModelBundle, records: Records
) -> None:
    door = ScalingBackdoor(share=1.0, target=2, channel=1, samples=5, value=9.0, poisoned=0.5, scale=4.0)
    both = poisoned_records(records, door)
    assert len(both) == 18
    assert both.y[12:].tolist() == [2] * 6
    assert (both.x[12:, -5:, 1] == 9.0).all()
    np.testing.assert_array_equal(both.x[12:, :-5], records.x[:6, :-5])
    np.testing.assert_array_equal(both.x[:12], records.x)
    once = change_of(bundle, both, Attack(SignFlip(share=1.0, adds_noise=False), 1, 0))
    np.testing.assert_allclose(change_of(bundle, records, Attack(door, 1, 0)), -4.0 * once, rtol=1e-4, atol=1e-6)


def test_the_trigger_leaves_the_window_that_it_is_made_from(records: Records) -> None:
    before = records.x.copy()
    assert not np.array_equal(triggered(records.x, ScalingBackdoor(share=1.0, target=0)), before)
    np.testing.assert_array_equal(records.x, before)


def test_a_free_rider_sends_zeros_first_and_then_what_the_model_changed_by(
    bundle: ModelBundle, records: Records
) -> None:
    flash, attack = VirtualFlash(), Attack(FreeRider(share=1.0, scale=2.0), 5, 0)
    assert not change_of(bundle, records, attack, flash=flash).any()
    moved = bundle.params + np.float32(0.25)
    second = change_of(bundle, records, attack, flash=flash, start=moved)
    np.testing.assert_allclose(second, 2.0 * (moved - bundle.params))


def test_a_free_riders_noise_is_as_long_as_the_models_last_change() -> None:
    difference = np.full(100, 0.3, np.float32)
    noise = free_ride(FreeRider(share=1.0, sends="noise"), difference, np.random.default_rng(1))
    assert np.linalg.norm(noise) == pytest.approx(3.0, rel=1e-5)
    assert abs(float(noise @ difference)) < 0.5 * 9.0  # a false alarm once in 10^6 or less: 5 standard deviations
    assert not free_ride(FreeRider(share=1.0, sends="zeros"), difference, np.random.default_rng(1)).any()


def test_identities_of_one_sybil_send_one_change_and_other_devices_another(
    bundle: ModelBundle, records: Records
) -> None:
    sybil = Sybil(share=1.0, identities=3)
    one, other = (change_of(bundle, records, Attack(sybil, key, 0), life=f"life {key}") for key in (1, 2))
    np.testing.assert_array_equal(one, other)
    stranger = change_of(bundle, records, Attack(sybil, 3, 3), life="life 1")
    assert not np.array_equal(one, stranger)


def test_variation_is_as_long_as_was_said_and_every_identitys_own() -> None:
    change = np.full(400, 0.5, np.float32)
    one, other = (varied(change, 0.1, np.random.default_rng(seed)) for seed in (1, 2))
    assert np.linalg.norm(one - change) == pytest.approx(1.0, rel=1e-4)
    assert not np.array_equal(one, other)
    np.testing.assert_array_equal(varied(change, 0.0, np.random.default_rng(1)), change)


class _Counting(Sensor):
    def recorded(self, device: int, from_s: float, to_s: float) -> Recorded:
        at_s = np.arange(from_s, to_s, 10.0)
        return Recorded(at_s, Records(np.zeros((len(at_s), 1), np.float32), np.arange(len(at_s), dtype=np.int32) % 3))

    def held_out(self, count: int) -> Records:
        return self.recorded(0, 0.0, 10.0 * count).records


def test_a_label_flipper_lies_from_its_beginning_on_and_nobody_else_does() -> None:
    flip = LabelFlip(share=1.0, permutation=(1, 2, 0), from_s=30.0)
    sensor = Mislabelling(_Counting(), 3, lambda device: (flip,) if device == 4 else (), 100.0)
    assert sensor.records(4, 100.0, 160.0).y.tolist() == [0, 1, 2, 1, 2, 0]
    assert sensor.records(5, 100.0, 160.0).y.tolist() == [0, 1, 2, 0, 1, 2]
    assert sensor.held_out(3).y.tolist() == [0, 1, 2]
    backwards = Mislabelling(_Counting(), 3, lambda device: (LabelFlip(share=1.0),), 0.0)
    assert backwards.records(0, 0.0, 30.0).y.tolist() == [2, 1, 0]


def test_who_attacks_follows_from_seed_and_device_alone() -> None:
    plan, other = (AttackPlan([SignFlip(share=0.2)], seed=seed) for seed in (1, 2))
    chosen = {index for index in range(2000) if plan.attacks_of(index, device_name(index))}
    assert 300 <= len(chosen) <= 500  # 400 with a standard deviation of 17.9: a false alarm once in 10^7
    assert chosen != {index for index in range(2000) if other.attacks_of(index, device_name(index))}
    joined = AttackPlan([SignFlip(devices=("device-0000001",)), SignFlip(share=0.2)], seed=1)
    assert len(joined.attacks_of(1, device_name(1))) >= 1


def test_a_sybil_has_neighbouring_identities_and_the_records_of_the_first() -> None:
    plan = AttackPlan([Sybil(share=0.5, identities=4)], seed=1)
    groups = [{bool(plan.attacks_of(4 * g + i, device_name(4 * g + i))) for i in range(4)} for g in range(50)]
    assert all(len(group) == 1 for group in groups)
    assert {True} in groups
    assert {False} in groups
    hostile = 4 * groups.index({True})
    assert plan.leader_of(hostile + 3, device_name(hostile + 3)) == hostile
    named = AttackPlan([Sybil(devices=("device-0000007", "device-0000002"))], seed=1)
    assert named.leader_of(2, "device-0000002") == 7
    assert named.leader_of(3, "device-0000003") == 3


def test_a_replay_is_the_same_sealed_update_under_the_attackers_topic_later() -> None:
    plan = AttackPlan([Replay(devices=("device-0000001",), after_s=3.0, from_round=2)], seed=1)
    replayer = Replayer(plan, 3, name_of=device_name, index_of=index_of)
    update_id, whole = hashlib.sha256(b"update").digest()[:16], b"sealed" * 100
    chunk = next(iter(split(update_id, whole, data_bytes=4096)))
    uploads = [
        Upload(10.0, name, 5, upload_topic("fleet", name, update_id, 0), encode(chunk))
        for name in ("device-0000001", "device-0000002", "device-0000000")
    ]
    assert replayer.heard(uploads, 9.0, round_number=1) == ([], [])
    again, events = replayer.heard(uploads, 9.0, round_number=2)
    assert [(one.device, one.arrives_s) for one in again] == [("device-0000001", 13.0)] * 2
    assert [one.detail for one in events] == ["of device-0000001", "of device-0000002"]
    for one in again:
        copied, topic = decode(one.payload, ChunkMsg), parse_upload_topic(one.topic)
        assert copied.data == chunk.data
        assert copied.transfer_id == topic.update_id != update_id


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"kind": "sign_flop", "share": 0.1}, "kind: expected one of free_rider, label_flip.*got 'sign_flop'"),
        ({"kind": "sign_flip", "share": 1.5}, "share.*<= 1.0.*got 1.5"),
        ({"kind": "sign_flip"}, "expected share .* or devices"),
        ({"kind": "sign_flip", "share": 0.1, "devices": ["device-0000001"]}, "not both"),
        ({"kind": "sybil", "share": 0.1, "identitys": 3}, "identitys: unknown key; allowed are .*identities.*got 3"),
        ({"kind": "free_rider", "share": 0.1, "sends": "ones"}, "sends.*last_difference.*got 'ones'"),
        ({"kind": "label_flip", "share": 0.1, "permutation": [0, 0]}, "permutation: expected every label"),
        ({"kind": "sign_flip", "share": 0.1, "from_round": 0}, "from_round.*>= 1.*got 0"),
        ({"kind": "sign_flip", "share": 0.1, "scale": float("inf")}, "scale: expected a finite number"),
    ],
)
def test_a_table_that_is_wrong_is_refused_with_key_value_and_what_is_allowed(table: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=rf"\[\[attacker\]\] number 1.*{said}"):
        parse_attackers([table])
