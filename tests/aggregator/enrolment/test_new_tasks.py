"""A task that is created while the desk runs is served without a restart, in virtual time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import pytest

from aggregator.enrolment import service as service_module
from aggregator.errors import AggregatorError, DatabaseError
from fl_protocol.errors import ConfigError
from fl_protocol.joining import StudyPins
from tests.aggregator.enrolment.desks import PINS, DeskOffice
from tests.device_client.joining.rig import DeskRig, JoiningDevice, join
from tests.enrolments import TASK, broken_copy


class Tasks:
    """The database's tasks, of which there are none at first; reading them fails as often as told."""

    def __init__(self, *failures: Exception) -> None:
        self.failures, self.found, self.reads = list(failures), dict[str, StudyPins](), 0

    def pins(self) -> dict[str, StudyPins]:
        self.reads += 1
        if self.failures:
            raise self.failures.pop(0)
        return self.found


def desk_of(tasks: Tasks, module: ModuleType) -> DeskRig:
    """A desk that was started before there was a task."""
    office = DeskOffice()
    office.desk = replace(office.desk, pins={})
    return DeskRig(office, service=module, pins=tasks.pins)


def check_a_new_task_is_taken_up(module: ModuleType) -> None:
    tasks = Tasks()
    rig = desk_of(tasks, module)
    device = JoiningDevice(rig)
    device.joiner.open_claim(rig.claim, rig.token())
    device.step()
    rig.service.step()
    assert rig.outcomes() == []  # nobody here could open it
    tasks.found = {TASK: PINS}
    join(rig, device, rig.token(), anew=True)
    assert device.joiner.is_enrolled
    assert ("enrolment_tasks", [TASK]) in [(name, fields.get("tasks")) for name, fields in rig.journal.events]


def check_a_failing_look_stops_nobody(module: ModuleType) -> None:
    for failure in (DatabaseError("away"), AggregatorError("no"), ConfigError("unreadable")):
        tasks = Tasks(failure)
        tasks.found = {TASK: PINS}
        rig = desk_of(tasks, module)
        device = JoiningDevice(rig)
        join(rig, device)
        assert device.joiner.is_enrolled


def check_it_is_looked_rarely(module: ModuleType) -> None:
    """A flood of requests makes no flood of reads."""
    tasks = Tasks()
    rig = desk_of(tasks, module)
    for _ in range(100):
        rig.service.step()
    assert tasks.reads == 1


CHECKS: list[tuple[Callable[[ModuleType], None], tuple[str, str]]] = [
    (check_a_new_task_is_taken_up, ("        self._take_up_tasks()\n", "")),
    (check_a_new_task_is_taken_up, ("if pins != self._desk.pins:", "if False:")),
    (check_a_failing_look_stops_nobody, ("except (AggregatorError, ConfigError) as", "except AggregatorError as")),
    (check_it_is_looked_rarely, ("        self._tasks_s = self._now_s()\n", "")),
]


@pytest.mark.parametrize("check", dict.fromkeys(check for check, _ in CHECKS))
def test_it_holds(check: Callable[[ModuleType], None]) -> None:
    check(service_module)


@pytest.mark.parametrize(("check", "change"), CHECKS)
def test_a_desk_that_does_not_look_is_caught(check: Callable[[ModuleType], None], change: tuple[str, str]) -> None:
    with pytest.raises((AssertionError, ConfigError)):
        check(broken_copy("aggregator.enrolment.service", change))
