"""An overview for people: as lines that are printed once, and as a screen that is drawn again every second (rich)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.text import Text

from aggregator.command_line import make_table, moment, span
from aggregator.overview import Overview, TaskOverview, WorkerOverview
from aggregator.store.presence import FleetCounts

_TASK_COLUMNS = ("task", "kind", "phase", "round", "committed", "arrived", "deadline", "model", "p")
_PROCESS_COLUMNS = ("process", "state", "shards", "last seen", "says")
_NARROW = 90
"""Columns of a terminal below which only what changes is shown."""
_WITH_BARS = 120
"""And from which on there is room for a bar."""
_BAR = 24
_OF_NARROW_TASKS = (0, 2, 5, 6)
_OF_NARROW_PROCESSES = (0, 1, 3)


def print_overview(found: Overview, console: Console) -> None:
    """Print it once."""
    console.print(
        make_table(f"Tasks of {found.tenant}", _TASK_COLUMNS, [_task_row(t, found.at_s) for t in found.tasks])
    )
    for line in _reasons(found):
        console.print(Text(line), soft_wrap=True)
    rows = [_worker_row(worker, found.at_s) for worker in found.workers]
    console.print(make_table("Processes", _PROCESS_COLUMNS, rows))
    for line in (f"registered names: {found.devices}", *_fleet(found.fleet), *_refused(found), *_degraded(found)):
        console.print(Text(line), soft_wrap=True)


def screen(found: Overview | None, *, width: int, trouble: str | None = None) -> RenderableType:
    """What a terminal shows.

    Args:
        found: how things stand, or stood when they could last be read; None before that.
        width: of the terminal, in columns.
        trouble: why it cannot be read now.
    """
    parts: list[RenderableType] = []
    if trouble is not None:
        parts.append(Text(f"cannot be read: {trouble}", style="bold red"))
    if found is None:
        parts.append(Text("nothing was read yet; trying again every second"))
        return Group(*parts)
    stood = "stood" if trouble is not None else "stands"
    parts.append(Text(f"{found.tenant}, as it {stood} at {moment(found.at_s)}; {found.devices} registered names"))
    parts += [_tasks(found, width), *(Text(line) for line in _reasons(found)), _processes(found, width)]
    parts += [Text(line) for line in _fleet(found.fleet)]
    parts += [Text(line, style="yellow") for line in _refused(found)]
    problems = [Text(line, style="bold red") for line in _degraded(found)]
    parts += problems or [Text("nothing is degraded", style="green")]
    return Group(*parts)


def _tasks(found: Overview, width: int) -> RenderableType:
    """The table of tasks; where there is room with a bar for the open round."""
    if not found.tasks:
        return Text("no task yet: covey-aggregator task create")
    rows = [_task_row(task, found.at_s) for task in found.tasks]
    if width < _NARROW:
        return make_table("", *_picked(_TASK_COLUMNS, rows, _OF_NARROW_TASKS))
    if width < _WITH_BARS:
        return make_table("", _TASK_COLUMNS, rows)
    bars = [_bar(task) for task in found.tasks]
    return make_table("", (*_TASK_COLUMNS, ""), [(*row, bar) for row, bar in zip(rows, bars, strict=True)])


def _bar(task: TaskOverview) -> RenderableType:
    """How full the open round is; empty while none is open."""
    if task.deadline_s is None or not task.goal:
        return Text("")
    return ProgressBar(total=task.goal, completed=min(task.arrived, task.goal), width=_BAR)


def _processes(found: Overview, width: int) -> RenderableType:
    """The table of processes."""
    rows = [_worker_row(worker, found.at_s) for worker in found.workers]
    if not rows:
        return Text("no process was started yet: covey-aggregator run")
    columns: Sequence[str] = _PROCESS_COLUMNS
    return make_table("", *(_picked(columns, rows, _OF_NARROW_PROCESSES) if width < _NARROW else (columns, rows)))


def _picked(
    columns: Sequence[str], rows: Sequence[Sequence[object]], numbers: Sequence[int]
) -> tuple[list[str], list[list[object]]]:
    """Some columns of a table."""
    return [columns[n] for n in numbers], [[row[n] for n in numbers] for row in rows]


def _fleet(fleet: FleetCounts) -> list[str]:
    """Devices by state, and what keeps those that are there from training."""
    states = f"devices: {fleet.active} active ({fleet.online} online, {fleet.offline} offline, {fleet.unheard} unheard)"
    lines = [f"{states}, {fleet.quarantined} quarantined, {fleet.revoked} revoked"]
    waiting = [f"{count} for {reason}" for reason, count in sorted(fleet.reasons.items()) if count]
    return lines + ([f"not training: {', '.join(waiting)}"] if waiting else [])


def _reasons(found: Overview) -> list[str]:
    return [f"{task.name} is {task.phase}: {task.reason}" for task in found.tasks if task.reason]


def _refused(found: Overview) -> list[str]:
    return [f"refused: {re.sub('_', ' ', reason)}: {times}" for reason, times in sorted(found.refused.items())]


def _degraded(found: Overview) -> list[str]:
    return [f"degraded: {problem}" for problem in found.degraded]


def _task_row(task: TaskOverview, now_s: float) -> tuple[object, ...]:
    """A task's line."""
    deadline = ""
    if task.deadline_s is not None:
        left_s = task.deadline_s - now_s
        deadline = f"in {span(left_s)}" if left_s >= 0 else f"{span(-left_s)} ago"
    phase = f"{task.phase}, pausing" if task.pausing else task.phase
    arrived = f"{task.arrived} of {task.goal}" if task.deadline_s is not None else ""
    committed = f"{task.committed} of {task.rounds}"
    return task.name, task.kind, phase, task.round, committed, arrived, deadline, task.version, task.probability


def _worker_row(worker: WorkerOverview, now_s: float) -> tuple[object, ...]:
    """A process' line."""
    is_alive = worker.state == "alive"
    state = ("coordinates" if worker.coordinates else "takes uploads") if is_alive else worker.state
    seen = f"{span(max(0.0, now_s - worker.seen_s))} ago" if is_alive else moment(worker.seen_s)
    return worker.name, state, worker.shards, seen, worker.detail
