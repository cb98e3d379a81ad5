"""A device that lost its connection asks with one chunk where its update stands, and is told soon, whatever came
before.

Devices wait 15 s for the answer; docs/protocol.md, section 5.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from aggregator.intake import FORGET_AFTER_S, RECEIPT_EVERY_S, STALLED_AFTER_S, Intake
from firmware_sim.virtual_broker import VirtualTransport
from fl_protocol.chunking import missing_indices
from fl_protocol.errors import RefusalReason
from fl_protocol.messages import ChunkMsg, NackMsg, ReceiptMsg, decode, encode
from fl_protocol.signing import verify
from fl_protocol.topics import down_filter
from fl_protocol.transport import Received
from tests.aggregator.desk import Desk, make_update, messages
from tests.aggregator.quadratics import quadratics
from tests.aggregator.small_study import PUBLIC, SmallStudy
from tests.fl_protocol.examples import TENANT

CHUNKS = messages(make_update(round=3), data_bytes=300)
COUNT = len(CHUNKS)
SECONDS_A_DEVICE_WAITS = 15.0


def let_pass(desk: Desk, seconds: float, *, step_s: float = 0.5) -> None:
    """Time as the daemon lets it pass, which asks for missing chunks at each step."""
    for _ in range(round(seconds / step_s)):
        desk.clock.time_s += step_s
        desk.intake.ask_for_missing_chunks()


def asked_for(desk: Desk) -> list[list[int]]:
    """The chunks that each NACK since the last time asked for."""
    answers = desk.said()
    for answer in answers:
        assert isinstance(answer, NackMsg)
        assert answer.reason is RefusalReason.TRUNCATED
    return [missing_indices(answer.missing, COUNT) for answer in answers if isinstance(answer, NackMsg)]


# Silence of every length between what came before and the question: before and after NACKs, around the drop.
SILENCES_S = [0.5, 4.0, 9.5, 10.5, 15.0, 19.5, 60.0, *(FORGET_AFTER_S + offset for offset in range(-12, 3)), 500.0]


def check_a_question_is_answered_in_time(make: Callable[..., Intake], folder: Path) -> None:
    for number, silence_s in enumerate(SILENCES_S):
        (folder / str(number)).mkdir()
        desk = Desk(folder / str(number), make)
        desk.take([CHUNKS[0], CHUNKS[2], CHUNKS[-1]])
        let_pass(desk, silence_s)
        desk.said()
        desk.take([CHUNKS[-1]])
        let_pass(desk, SECONDS_A_DEVICE_WAITS)
        was_dropped = silence_s > FORGET_AFTER_S
        held = {COUNT - 1} if was_dropped else {0, 2, COUNT - 1}
        assert asked_for(desk) == [[index for index in range(COUNT) if index not in held]], silence_s
        assert desk.take([CHUNKS[index] for index in range(COUNT) if index not in held]) == 1


def test_a_question_is_answered_in_time_even_when_its_chunk_is_held(tmp_path: Path) -> None:
    check_a_question_is_answered_in_time(Intake, tmp_path)


class IntakeThatCountsOnlyProgress(Intake):
    """Broken: a chunk that it holds already does not keep a transfer from being dropped before the answer."""

    def take(self, message: Received, current: object) -> bool:
        before = {
            (device, key): (transfer.heard_s, len(transfer.parts))
            for device, transfers in self._transfers.items()
            for key, transfer in transfers._open.items()
        }
        result = super().take(message, current)  # type: ignore[arg-type]
        for device, transfers in self._transfers.items():
            for key, transfer in transfers._open.items():
                heard_s, parts = before.get((device, key), (0.0, -1))
                if parts == len(transfer.parts):
                    transfer.heard_s = heard_s
        return result


def test_an_intake_that_counts_only_progress_is_caught(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        check_a_question_is_answered_in_time(IntakeThatCountsOnlyProgress, tmp_path)


def test_a_restarted_aggregator_that_never_saw_the_transfer_asks_for_the_rest(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.take([CHUNKS[-1]])
    let_pass(desk, STALLED_AFTER_S)
    assert desk.said() == []
    let_pass(desk, 1.0)
    assert asked_for(desk) == [list(range(COUNT - 1))]


def test_every_question_is_answered_however_often_it_is_asked(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    for _ in range(20):
        desk.take([CHUNKS[-1]])
        let_pass(desk, SECONDS_A_DEVICE_WAITS)
        assert asked_for(desk) == [list(range(COUNT - 1))]


def test_a_whole_that_is_sent_again_slowly_is_not_interrupted_by_nacks(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.take(CHUNKS[:-1])
    for chunk in CHUNKS:
        let_pass(desk, STALLED_AFTER_S - 1.0)
        assert desk.said() == []
        desk.take([chunk])
    assert [type(answer) for answer in desk.said()] == [ReceiptMsg]


def test_another_devices_transfer_under_the_same_id_takes_no_answer_away(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    theirs = messages(make_update("watch-1", round=3), "watch-1", data_bytes=300)
    desk.take(theirs[:1])
    let_pass(desk, 5.0)
    desk.take(CHUNKS[:1])
    let_pass(desk, SECONDS_A_DEVICE_WAITS)
    answers = [(answer.device, answer.update_id) for answer in desk.said()]
    assert len(set(answers)) == 2


def test_answers_do_not_wait_for_a_clock_that_was_set_back(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.take(CHUNKS[:1])
    let_pass(desk, STALLED_AFTER_S + 1.0)
    assert len(asked_for(desk)) == 1
    desk.clock.time_s -= 86_400.0
    desk.take(CHUNKS[:1])
    let_pass(desk, SECONDS_A_DEVICE_WAITS)
    assert len(asked_for(desk)) == 1
    desk.take(CHUNKS)
    desk.clock.time_s -= 86_400.0
    desk.take(CHUNKS[:1])
    assert [type(answer) for answer in desk.said()] == [ReceiptMsg, ReceiptMsg]


@pytest.mark.parametrize("index", range(COUNT))
def test_any_one_chunk_of_a_committed_update_brings_its_receipt_at_once(tmp_path: Path, index: int) -> None:
    desk = Desk(tmp_path)
    desk.take(CHUNKS)
    (receipt,) = desk.said()
    desk.current = None  # the round may be over
    desk.clock.time_s += 3600.0
    assert desk.take([CHUNKS[index]]) == 0
    assert desk.said() == [receipt]  # with the time of its commit, not of now
    assert not any(len(transfers) for transfers in desk.intake._transfers.values())
    let_pass(desk, 2 * SECONDS_A_DEVICE_WAITS)
    assert desk.said() == []  # no NACK for the rest
    assert len(desk.stored()) == 1


def test_the_receipt_survives_a_restart_of_the_aggregator(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.take(CHUNKS)
    (receipt,) = desk.said()
    desk.intake._receipted_s.clear()
    desk.intake._transfers.clear()
    desk.take([CHUNKS[-1]])
    assert desk.said() == [receipt]


def test_a_committed_update_sent_again_in_a_burst_gets_one_receipt_a_second(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.take(CHUNKS)
    desk.take(CHUNKS * 50)
    assert len(desk.said()) == 1
    desk.clock.time_s += RECEIPT_EVERY_S
    desk.take(CHUNKS * 50)
    assert len(desk.said()) == 1
    desk.clock.time_s += RECEIPT_EVERY_S
    desk.intake.ask_for_missing_chunks()
    assert desk.intake._receipted_s == {}


def test_a_forged_chunk_of_a_committed_update_changes_nothing_and_is_told_only_the_truth(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.take(CHUNKS)
    (receipt,) = desk.said()
    desk.clock.time_s += RECEIPT_EVERY_S
    forged = replace(decode(CHUNKS[0].payload, ChunkMsg), digest=bytes(32), data=bytes(300))
    assert desk.take([Received(CHUNKS[0].topic, encode(forged))]) == 0
    assert desk.said() == [receipt]
    assert desk.store.refusals() == {}


def test_a_chunk_of_another_device_brings_no_receipt_for_what_it_did_not_send(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.take(CHUNKS)
    desk.said()
    desk.take(messages(make_update("watch-1", round=3), "watch-1", data_bytes=300)[:1])
    assert desk.said() == []


def answers_within(study: SmallStudy, device: VirtualTransport, seconds: float) -> list[Received]:
    """What the daemon tells a device while this much time passes."""
    for _ in range(round(seconds / 0.5)):
        study.settle()
        study.clock.time_s += 0.5
    found = []
    while (event := device.poll(0.0)) is not None:
        if isinstance(event, Received):
            found.append(event)
    return found


def test_the_daemon_answers_also_after_it_was_killed(tmp_path: Path) -> None:
    """From the first chunk to the receipt; the daemon dies half-way, and again after the commit."""
    study = SmallStudy(tmp_path, quadratics(5, 700), np.zeros(700, np.float32))
    device = VirtualTransport(study.broker)
    device.open()
    device.subscribe(down_filter(TENANT, "watch-0"))
    update = study.update_of(0)
    for topic, payload in update[:3]:
        study.broker.publish(topic, payload, retain=False)
    study.settle()
    study.crash()
    study.start()
    study.broker.publish(*update[-1], retain=False)
    (answer,) = answers_within(study, device, SECONDS_A_DEVICE_WAITS)
    nack = verify(answer.payload, NackMsg, PUBLIC)
    missing = missing_indices(nack.missing, len(update))
    assert (nack.reason, missing) == (RefusalReason.TRUNCATED, list(range(len(update) - 1)))
    for index in missing:
        study.broker.publish(*update[index], retain=False)
    (first,) = answers_within(study, device, 1.0)
    study.crash()
    study.start()
    study.broker.publish(*update[-1], retain=False)
    (second,) = answers_within(study, device, 1.0)
    assert first == second
    assert verify(first.payload, ReceiptMsg, PUBLIC).device == "watch-0"
    assert study.daemon.state.arrived == 1
