"""Whole studies in virtual time: the same seed gives the same bytes, and crashes, losses and attacks change nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any, Literal

import numpy as np
import pytest
from msgspec.structs import replace
from sqlalchemy import event

from aggregator.rounds import Phase
from device_client.adapters.counter_file import CounterFile
from device_client.ledger import Budget, PrivacyLedger
from firmware_sim.faults.packets import PacketRates
from firmware_sim.virtual_flash import PowerCut, PowerCutError
from fl_protocol.messages import NackMsg
from fl_protocol.sealing import round_key_bytes
from fl_protocol.signing import verify
from fl_protocol.topics import down_topic, parse_upload_topic
from fl_protocol.transport import Received
from tests.system.handmade import announced, device_key, make_update, messages, register, with_header
from tests.system.study import (
    accepted,
    aggregator_power_cut,
    check_study,
    final_digest,
    lose_power,
    published_updates,
    runner_of,
)
from tests.virtual_fleet import AGGREGATOR_KEY, TENANT, VirtualFleet, load_bundle, task_config

KEY_BYTES = round_key_bytes("x25519")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Digest of the final model when nothing goes wrong."""
    fleet = VirtualFleet(tmp_path_factory.mktemp("undisturbed"))
    fleet.run()
    check_study(fleet)
    assert len(accepted(fleet)) == 9
    return final_digest(fleet)


def test_the_same_seed_gives_the_same_model_and_another_seed_another(tmp_path: Path, undisturbed: str) -> None:
    for seed, same in (("fleet", True), ("another", False)):
        (tmp_path / seed).mkdir()
        fleet = VirtualFleet(tmp_path / seed, seed=seed)
        fleet.run()
        assert (final_digest(fleet) == undisturbed) == same
        assert hashlib.sha256(fleet.params(4).tobytes()).hexdigest() == final_digest(fleet)


@pytest.mark.parametrize("after_steps", range(1, 32, 2))
def test_a_killed_aggregator_loses_and_doubles_nothing(tmp_path: Path, undisturbed: str, after_steps: int) -> None:
    fleet = VirtualFleet(tmp_path)
    for _ in fleet.steps(after_steps):
        pass
    fleet.kill_aggregator()
    fleet.start_aggregator()
    fleet.run()
    check_study(fleet)
    assert final_digest(fleet) == undisturbed


@pytest.mark.parametrize("statement", range(1, 100, 5))
def test_an_aggregator_that_loses_power_at_any_statement_loses_and_doubles_nothing(
    tmp_path: Path, undisturbed: str, statement: int
) -> None:
    fleet = VirtualFleet(tmp_path)
    with aggregator_power_cut(fleet, statement):
        try:
            fleet.run()
        except PowerCutError:
            pass
        else:
            pytest.fail("the study has fewer statements")
    fleet.kill_aggregator()
    fleet.start_aggregator()
    fleet.run()
    check_study(fleet)
    assert final_digest(fleet) == undisturbed


def test_an_aggregator_killed_again_and_again_still_finishes(tmp_path: Path, undisturbed: str) -> None:
    fleet = VirtualFleet(tmp_path)
    for life in range(12):
        for _ in fleet.steps(3 + life % 4):
            pass
        fleet.clock.time_s += 3.0
        fleet.kill_aggregator()
        fleet.start_aggregator()
    fleet.run()
    check_study(fleet)
    assert final_digest(fleet) == undisturbed


@pytest.mark.parametrize("failing", ["INSERT INTO updates", "INSERT INTO models", "SELECT devices", "UPDATE tasks"])
def test_a_database_that_fails_for_a_while_stops_nothing(tmp_path: Path, undisturbed: str, failing: str) -> None:
    fleet = VirtualFleet(tmp_path)
    healthy_s = fleet.clock.time_s + 4.0

    def fail(_c: object, _cursor: object, text: str, values: Any, *_rest: object) -> tuple[str, Any]:
        broken = fleet.clock.time_s < healthy_s and text.startswith(failing)
        return ("SELECT * FROM no_such_table", ()) if broken else (text, values)

    event.listen(fleet.aggregator.store.database.engine, "before_cursor_execute", fail, retval=True)
    fleet.run()
    check_study(fleet)
    assert fleet.journals["aggregator"].named("degraded")
    assert fleet.journals["aggregator"].named("recovered")
    assert final_digest(fleet) == undisturbed


def test_lost_receipts_are_answered_again_and_count_once(tmp_path: Path, undisturbed: str) -> None:
    fleet = VirtualFleet(tmp_path)
    quiet_s = fleet.clock.time_s + 20.0
    fleet.broker.loses = lambda topic: "/down/" in topic and fleet.clock.time_s < quiet_s
    fleet.run(until=lambda: fleet.clock.time_s > quiet_s + 60.0)
    check_study(fleet)
    assert final_digest(fleet) == undisturbed
    sent = [topic for topic, _ in fleet.broker.published if "/up/" in topic]
    assert len(sent) > 2 * len(set(sent))
    assert all(not list(device.outbox) for device in fleet.devices.values())
    assert fleet.store.refusals("") == {}


@pytest.mark.parametrize("moment", ["before", "during", "after"])
@pytest.mark.parametrize("cut_at", range(0, 90, 6))
def test_a_device_that_loses_power_at_any_write_releases_no_more_than_it_was_charged(
    tmp_path: Path, cut_at: int, moment: Literal["before", "during", "after"]
) -> None:
    """Twice: while it takes part, and while it starts again or right after."""
    fleet = VirtualFleet(tmp_path, devices=3)
    random, lives = Random(f"{cut_at} {moment}"), 0  # noqa: S311 - a simulation repeats itself
    fleet.flashes["watch-2"][0].power_cut = PowerCut(fleet.flashes["watch-2"][0].operations + cut_at, moment)
    while fleet.state.phase is not Phase.FINISHED:
        try:
            if "watch-2" not in fleet.devices:
                fleet.start_device("watch-2")
            fleet.run()
        except PowerCutError:
            lives += 1
            lose_power(fleet, "watch-2", random)
            if lives == 1:
                fleet.flashes["watch-2"][0].power_cut = PowerCut(cut_at // 2, moment)
    assert 1 <= lives <= 2
    check_study(fleet)


@pytest.mark.parametrize("after_steps", range(1, 26, 3))
def test_a_device_killed_between_any_two_steps_is_charged_once_per_round(tmp_path: Path, after_steps: int) -> None:
    fleet = VirtualFleet(tmp_path)
    for _ in fleet.steps(after_steps):
        pass
    fleet.kill_device("watch-1")
    fleet.clock.time_s += 1.0
    fleet.start_device("watch-1")
    fleet.run()
    check_study(fleet)


@pytest.mark.parametrize("keep_retained", [True, False])
@pytest.mark.parametrize("after_steps", [1, 4, 6, 9])
def test_a_broker_restart_is_survived(
    tmp_path: Path, undisturbed: str, after_steps: int, *, keep_retained: bool
) -> None:
    fleet = VirtualFleet(tmp_path)
    for _ in fleet.steps(after_steps):
        pass
    fleet.broker.restart(keep_retained=keep_retained)
    fleet.run()
    check_study(fleet)
    assert final_digest(fleet) == undisturbed


@pytest.mark.parametrize(
    "faults",
    [
        pytest.param(PacketRates(repeat=0.5), id="repeated"),
        pytest.param(PacketRates(reorder=0.5), id="reordered"),
        pytest.param(PacketRates(drop=0.3), id="dropped"),
        pytest.param(PacketRates(corrupt=0.1), id="corrupted"),
        pytest.param(PacketRates(drop=0.3, repeat=0.2, reorder=0.3, corrupt=0.05), id="all"),
    ],
)
@pytest.mark.parametrize("maximum_packet_bytes", [None, 1024 + 256 + 400], ids=["whole", "in chunks"])
@pytest.mark.parametrize("seed", ["one", "two"])
def test_a_bad_network_delays_and_changes_nothing_else(
    tmp_path: Path, faults: PacketRates, maximum_packet_bytes: int | None, seed: str
) -> None:
    fleet = VirtualFleet(
        tmp_path,
        devices=5,
        faults=faults,
        seed=seed,
        maximum_packet_bytes=maximum_packet_bytes,
        budget=Budget(30.0, 1e-5),
        task=task_config(goal=4, minimum_cohort=2, rounds=2),
    )
    fleet.run(most_s=4000.0)
    check_study(fleet)


def hostile_messages(fleet: VirtualFleet, name: str) -> Iterator[Received]:
    """Everything bad that a registered device, and one that is not, may send for the open round."""
    manifest = announced(fleet)
    length = manifest.num_parameters

    def update(number: int, **changes: Any) -> bytes:
        return make_update(manifest, name, update_id=bytes([number]) * 16, **changes)

    nan = np.full(length, np.nan, "<f4").tobytes()
    envelopes = {
        1: b"garbage",
        2: update(2, values=nan),
        3: update(3, values=bytes(40)),
        4: update(4, round=manifest.round + 1),
        5: update(5, model_digest=bytes(32)),
        6: update(6, task="other"),
        7: with_header(update(7, round=manifest.round + 1), device_key(name), round=manifest.round),
        8: update(8)[:-1] + b"\x00",
        9: make_update(manifest, "watch-0", update_id=b"\x09" * 16),
    }
    for number, envelope in envelopes.items():
        yield from messages(envelope, name, update_id=bytes([number]) * 16)
        yield from messages(envelope, "nobody", update_id=bytes([number]) * 16)
    yield messages(update(10), name, update_id=b"\x0a" * 16)[0]  # and never the rest
    yield Received(f"fl/v1/{TENANT}/up/00/../x", b"")
    for topic, payload in [item for item in fleet.broker.published if "/up/" in item[0]][:20]:
        yield Received(topic, payload)  # replays of what honest devices sent


def test_a_hostile_device_is_refused_by_reason_and_the_study_goes_on(tmp_path: Path, undisturbed: str) -> None:
    fleet = VirtualFleet(tmp_path)
    register(fleet, "mallory")
    attacked: set[int] = set()
    answers: list[str] = []
    while fleet.state.phase is not Phase.FINISHED:
        state = fleet.state
        if state.phase is Phase.OPEN and state.number not in attacked:
            attacked.add(state.number)
            for message in hostile_messages(fleet, "mallory"):
                fleet.broker.publish(message.topic, message.payload, retain=False)
        for _ in fleet.steps(1):
            pass
        fleet.clock.time_s += 0.05
    while fleet.aggregator.transport.poll(0.0) is not None:
        pass
    assert attacked == {1, 2, 3}
    refused = fleet.store.refusals("")
    for reason in (
        "malformed",
        "not_finite",
        "wrong_length",
        "wrong_round",
        "wrong_model",
        "wrong_task",
        "unsealable",
        "bad_signature",
        "unknown_device",
    ):
        assert refused.get(reason, 0) >= 1, f"{reason} is not among {refused}"
    for topic, payload in fleet.broker.published:
        if topic == down_topic(TENANT, "mallory", "nack"):
            answers.append(verify(payload, NackMsg, AGGREGATOR_KEY.public_key()).reason.value)
        assert not topic.startswith(f"fl/v1/{TENANT}/down/nobody/"), "a stranger got an answer"
        assert topic != down_topic(TENANT, "mallory", "receipt")
    assert {"malformed", "not_finite", "unsealable", "bad_signature"} <= set(answers)
    # Honest updates count once each, and the model is the one that would have come without the attack.
    assert len(accepted(fleet)) == 9
    assert final_digest(fleet) == undisturbed


def test_devices_stop_when_their_budget_is_spent_and_the_round_says_why_it_aborts(tmp_path: Path) -> None:
    fleet = VirtualFleet(tmp_path, budget=Budget(1.2, 1e-5), task=task_config(rounds=50, goal=3, minimum_cohort=2))
    journal = fleet.journals["aggregator"]
    fleet.run(until=lambda: len(journal.named("round_aborted")) >= 2, most_s=2000.0)
    committed = len(journal.named("round_committed"))
    assert 1 <= committed < 50
    assert journal.named("round_aborted")[0]["reason"].startswith("0 of at least 2 updates had arrived by the deadline")
    for name, device in fleet.devices.items():
        ledger = device.ledger
        assert len(ledger.reservations) == committed
        assert ledger.spent_epsilon <= 1.2
        skipped = fleet.journals[name].named("round_skipped")
        assert "the privacy budget is spent" in skipped[0]["reason"]
        key = hashlib.sha256(name.encode()).digest()
        again = PrivacyLedger(device.store, CounterFile(fleet.flashes[name][1], "counter", key), ledger.budget)
        assert again.spent_epsilon == ledger.spent_epsilon
    assert {header.round for header in published_updates(fleet).values()} == set(range(1, committed + 1))


def test_nothing_on_the_wire_or_in_the_aggregators_journal_tells_of_the_wearers_data(tmp_path: Path) -> None:
    fleet = VirtualFleet(tmp_path)
    fleet.run()
    participants = [runner_of(fleet, name).participant for name in fleet.devices]
    secrets = [window.tobytes()[:64] for one in participants for window in one.training_records().x[:5]]
    keys = [one.signing_key.private_bytes_raw() for one in participants]
    for _, payload in fleet.broker.published:
        assert not any(secret in payload for secret in [*secrets, *keys])
    told = {field for _, fields in fleet.journals["aggregator"].events for field in fields}
    assert not told & {"loss_sum", "correct", "count", "epsilon", "norms"}
    # All updates have one length, whatever a wearer holds.
    sizes = {len(payload) for topic, payload in fleet.broker.published if "/up/" in topic}
    assert len(sizes) == 1
    for topic, _ in fleet.broker.published:
        if "/up/" in topic:
            assert parse_upload_topic(topic).device in fleet.devices


def test_a_finished_study_leaves_no_round_key_in_the_database_files(tmp_path: Path) -> None:
    fleet = VirtualFleet(tmp_path)
    keys: list[bytes] = []
    fleet.entropies["aggregator"].told = lambda drawn: keys.append(drawn) if len(drawn) == KEY_BYTES else None
    for _ in fleet.steps(1):
        assert len(keys) == 2  # its private key, and the secret of its sums
    files = [tmp_path / "aggregator.db", tmp_path / "aggregator.db-wal"]
    for key in keys:
        assert any(key in path.read_bytes() for path in files)
    fleet.run()
    for _ in fleet.steps(2):
        pass
    assert len(keys) == 6
    for path in files:
        content = path.read_bytes() if path.exists() else b""
        assert not any(secret in content for secret in keys), path.name


def test_personal_layers_stay_with_their_wearers(tmp_path: Path) -> None:
    whole = load_bundle("watch_cnn")
    # The head, which lies last, stays on the device.
    head = next(spec.offset for spec in whole.manifest.parameters if spec.name == "logits/kernel")
    bundle = replace(whole, manifest=replace(whole.manifest, num_shared_parameters=head))
    fleet = VirtualFleet(tmp_path, bundle=bundle)
    fleet.run()
    check_study(fleet)
    assert fleet.params().size == head
    own = [runner_of(fleet, name).participant.personal.values for name in sorted(fleet.devices)]
    assert all(values.size == whole.manifest.num_parameters - head for values in own)
    assert not any(np.array_equal(values, whole.params[head:]) for values in own)
    assert not np.array_equal(own[0], own[1])
    for values in own:
        assert not any(values[:64].tobytes() in payload for _, payload in fleet.broker.published)
