"""One study at work: training that fails is given up for good, sealing that fails is tried again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from device_client.errors import TrainingError
from device_client.outbox import Outbox
from device_client.study_runner import MOST_EVENTS, RETRY_SEALING_S, StudyRunner
from firmware_sim.virtual_flash import VirtualFlash
from fl_protocol.transport import Received
from tests.device_client.one_device import OneDevice, real_graph

STEPS = {"local_steps": 4}


@dataclass
class FailingGraph:
    """The real graph, until it fails."""

    fails_at: int
    calls: int = 0
    dropout: tuple[Any, ...] = ()
    batch_size: int = field(default_factory=lambda: real_graph().batch_size)
    train_sizes: tuple[int, ...] = field(default_factory=lambda: real_graph().train_sizes)

    def train(self, *arguments: Any, **named: Any) -> Any:
        self.calls += 1
        if self.calls >= self.fails_at:
            raise TrainingError("the runtime failed on a record")
        return real_graph().train(*arguments, **named)

    def evaluate(self, *arguments: Any) -> tuple[float, float]:
        return real_graph().evaluate(*arguments)


class Stubborn(StudyRunner):
    """Broken: what failed stays in the outbox, to be tried again after a restart."""

    def _give_up(self, work: Any, reason: str) -> None:
        del work, reason
        self.work = None


def check_a_training_that_failed_is_given_up_for_good(*, broken: bool) -> None:
    one = OneDevice(graph=FailingGraph(fails_at=3))
    one.start()
    one.scripts["watch"].open_round(plan=STEPS)
    one.until("charged")
    if broken:
        one.runner().__class__ = Stubborn
    one.runner().put_aside()  # progress is on disk, as after a pause
    one.steps(20)
    one.graph = real_graph()
    device = one.restart()
    one.steps(40)
    assert one.scripts["watch"].updates() == {}
    assert device.outbox.size_bytes == 0
    assert len(device.ledger.reservations) == 1
    assert "the runtime failed on a record" in one.journal.named("participation_ended")[0]["reason"]


def test_a_training_that_failed_is_given_up_for_good_across_a_restart() -> None:
    check_a_training_that_failed_is_given_up_for_good(broken=False)


def test_a_runner_that_keeps_what_failed_is_noticed() -> None:
    with pytest.raises(AssertionError):
        check_a_training_that_failed_is_given_up_for_good(broken=True)


class Forgetful(Outbox):
    """Broken: what the disk did not delete is found again."""

    def give_up(self, update_id: bytes) -> None:
        self.discard(update_id)


def check_what_failed_is_not_tried_again_when_the_disk_does_not_delete_it(kind: type[Outbox]) -> None:
    one = OneDevice(graph=FailingGraph(fails_at=3))
    device = one.start()
    device.outbox.__class__ = kind
    one.scripts["watch"].open_round(plan=STEPS)
    one.until("charged")
    one.runner().put_aside()  # progress is on disk, as after a pause
    one.flash.__class__ = UndeletingFlash
    one.until("participation_ended")
    one.graph.fails_at = 10**9  # type: ignore[attr-defined]
    device.studies.stop("clinic/watch", "its name changes")
    device.studies.look_again()
    one.steps(40)
    assert one.scripts["watch"].updates() == {}
    assert "cannot be deleted" in device.status().studies[0].problem
    one.flash.__class__ = VirtualFlash
    one.clock.time_s += RETRY_SEALING_S
    one.steps(2)
    assert device.outbox.size_bytes == 0
    assert not one.flash.names("outbox/")


class UndeletingFlash(VirtualFlash):
    """It reads and appends, and neither deletes nor takes a new outbox entry."""

    def remove(self, name: str) -> None:
        self._refuse(name)
        super().remove(name)

    def rename(self, old: str, new: str) -> None:
        self._refuse(new)
        super().rename(old, new)

    def _refuse(self, name: str) -> None:
        if name.startswith("outbox/") and not name.endswith(".tmp"):
            raise OSError(5, "Input/output error")


def test_what_failed_is_not_tried_again_when_the_disk_does_not_delete_it() -> None:
    check_what_failed_is_not_tried_again_when_the_disk_does_not_delete_it(Outbox)


def test_an_outbox_that_forgets_what_was_given_up_is_noticed() -> None:
    with pytest.raises(AssertionError):
        check_what_failed_is_not_tried_again_when_the_disk_does_not_delete_it(Forgetful)


def test_the_next_round_is_taken_part_in_after_one_that_failed() -> None:
    one = OneDevice(graph=FailingGraph(fails_at=1))
    one.start()
    one.scripts["watch"].open_round(plan=STEPS)
    one.until("participation_ended")
    one.graph.fails_at = 10**9  # type: ignore[attr-defined]
    one.scripts["watch"].open_round(2)
    one.until("update_sent")
    assert [header.round for header in one.scripts["watch"].updates().values()] == [2]


def test_a_disk_that_is_full_at_sealing_is_tried_again_after_a_minute() -> None:
    one = OneDevice()
    device = one.start()
    one.scripts["watch"].open_round(plan=STEPS)
    one.until("charged")
    while not one.runner().work.done:  # type: ignore[union-attr]
        one.steps(1)
    one.flash.capacity_bytes = sum(one.flash.size(name) or 0 for name in one.flash.names())
    failed_s = one.until("store_failed")["at_s"]
    assert "No space left" in device.status().studies[0].problem
    one.steps(1)
    assert one.scripts["watch"].updates() == {}
    one.flash.capacity_bytes = None
    sent_s = one.until("update_sent")["at_s"]
    assert RETRY_SEALING_S <= sent_s - failed_s <= RETRY_SEALING_S + 20
    assert len(device.ledger.reservations) == len(device.ledger.releases) == 1


def test_a_deadline_that_passes_gives_the_work_up() -> None:
    one = OneDevice()
    device = one.start()
    one.scripts["watch"].open_round(plan={"local_steps": 1000, "noise_multiplier": 400.0}, lasts_s=30.0)
    one.until("charged")
    one.clock.time_s += 31.0
    assert "deadline" in one.until("participation_ended")["reason"]
    one.steps(20)
    assert one.runner().work is None
    assert device.outbox.size_bytes == 0
    assert one.scripts["watch"].updates() == {}


def test_training_gets_its_turn_while_messages_pour_in() -> None:
    one = OneDevice()
    one.start()
    one.scripts["watch"].open_round(plan=STEPS)
    one.until("charged")
    for _ in range(MOST_EVENTS * 20):
        one.transports[0]._events.append(Received("fl/v1/clinic/round/watch", b"garbage"))
    one.steps(6)
    assert one.journal.named("trained")
    assert len(one.transports[0]._events) > 0


def test_what_went_wrong_last_is_in_the_status() -> None:
    one = OneDevice()
    device = one.start()
    one.steps(3)
    one.transports[0]._events.append(Received("fl/v1/clinic/round/watch", b"garbage"))
    one.steps(1)
    assert device.status().studies[0].problem.startswith("message refused: ")


def test_held_out_records_measure_every_model_that_is_trained() -> None:
    one = OneDevice()
    device = one.start()
    one.scripts["watch"].open_round()
    one.until("measured")
    held_out = device.streams["default"].held_out()
    assert len(held_out) > 0
    (measured,) = device.status().studies[0].measured
    assert (measured.model, measured.round, measured.count) == ("global", 1, len(held_out))


class Chatty(StudyRunner):
    """Broken: it tells its journal what it measured, whatever its role is."""

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, "evaluate" if name == "role" else value)


def check_the_journal_says_nothing_about_the_records(*, broken: bool) -> None:
    one = OneDevice()
    device = one.start()
    one.steps(1)
    if broken:
        one.runner().__class__ = Chatty
        one.runner().role = "train"
    one.scripts["watch"].open_round()
    one.until("update_sent")
    (measured,) = device.status().studies[0].measured
    assert measured.count > 0
    for event, fields in one.journal.events:
        assert not {"count", "correct", "loss_sum", "global_correct"} & set(fields), event


def test_the_journal_of_a_device_that_trains_says_nothing_about_its_records() -> None:
    check_the_journal_says_nothing_about_the_records(broken=False)


def test_a_device_that_tells_its_journal_what_it_measured_is_noticed() -> None:
    with pytest.raises(AssertionError, match="evaluated"):
        check_the_journal_says_nothing_about_the_records(broken=True)


def test_a_device_that_only_measures_tells_its_journal_what_it_measured() -> None:
    one = OneDevice(study_settings={"watch": {"role": "evaluate"}})
    device = one.start()
    one.scripts["watch"].open_round()
    note = one.until("evaluated")
    (measured,) = device.status().studies[0].measured
    assert (note["count"], note["correct"]) == (measured.count, measured.correct)
    assert note["count"] == 40
