"""The first page: every task's open round, what does not work as it should, and who runs it."""

from __future__ import annotations

from nicegui.element import Element
from nicegui.elements.mixins.text_element import TextElement

from aggregator.dashboard.frame import Visit, empty
from aggregator.dashboard.gate import ROOT
from aggregator.dashboard.live_state import LiveState
from aggregator.dashboard.tags import attribute, box, count, span, text
from aggregator.overview import Overview, TaskOverview, WorkerOverview

_RUNS = {"open", "unmasking"}
"""Phases of tasks that come first."""
_PHASES = {
    "idle": "not begun",
    "open": "round open",
    "unmasking": "unmasking",
    "paused": "paused",
    "finished": "finished",
    "aborted": "aborted",
}


def live_page(visit: Visit) -> None:
    """Make the page, and keep it up."""
    attention = box("section", "cv-attention", aria_label="What does not work as it should")
    tasks = box("section", "cv-cards", aria_label="Tasks")
    processes = box("section", aria_label="Processes")
    parts = _Parts(attention, tasks, processes)
    visit.shows(parts.show)


class _Parts:
    """The parts of the page, each made anew only when what it consists of changes.

    Args:
        attention: list of what does not work.
        tasks: a card for each task.
        processes: a line for each process.
    """

    def __init__(self, attention: Element, tasks: Element, processes: Element) -> None:
        self._attention, self._tasks, self._processes = attention, tasks, processes
        self._cards: dict[str, TaskCard] | None = None
        self._said: list[str] | None = None
        self._lines: dict[str, tuple[TextElement, TextElement]] | None = None

    def show(self, state: LiveState) -> None:
        """Show a reading."""
        found = state.overview
        if found is None:
            return
        self._show_attention(found)
        self._show_tasks(found)
        self._show_processes(found)

    def _show_attention(self, found: Overview) -> None:
        # Seconds in a sentence would have the list made anew all the time: it is, but only where it shows.
        if found.degraded == self._said:
            return
        self._said = found.degraded
        self._attention.clear()
        with self._attention:
            if not found.degraded:
                text("p", "Everything works as it should.", "cv-good")
                return
            text("h2", f"Needs attention ({len(found.degraded)})")
            with box("ul"):
                for sentence in found.degraded:
                    text("li", sentence)

    def _show_tasks(self, found: Overview) -> None:
        names = [one.name for one in sorted(found.tasks, key=lambda one: (one.phase not in _RUNS, one.name))]
        if self._cards is None or list(self._cards) != names:
            self._tasks.clear()
            with self._tasks:
                self._cards = {name: TaskCard(name) for name in names}
                if not names:
                    empty(
                        "No task yet",
                        "A task says what is computed, and with which privacy. Its rounds appear here.",
                        "covey-aggregator task create exercises.toml --config aggregator.toml",
                    )
        for one in found.tasks:
            self._cards[one.name].show(one, found.at_s)

    def _show_processes(self, found: Overview) -> None:
        names = [one.name for one in found.workers]
        if self._lines is None or list(self._lines) != names:
            self._processes.clear()
            with self._processes:
                text("h2", "Processes")
                self._lines = {one.name: _line(one.name) for one in found.workers}
                if not names:
                    text("p", "None has been started yet: covey-aggregator run --config aggregator.toml", "cv-quiet")
        for one in found.workers:
            state, words = self._lines[one.name]
            state.set_text(one.state)
            attribute(state, "data-state", one.state)
            words.set_text(_words_about(one, found.at_s))


def _line(name: str) -> tuple[TextElement, TextElement]:
    """A process' line: what changes in it."""
    with box("p", "cv-line"):
        text("strong", name)
        return text("span", "", "cv-chip"), text("span", "", "cv-quiet")


def _words_about(one: WorkerOverview, at_s: float) -> str:
    """What a process does."""
    does = ["coordinates"] if one.coordinates else []
    does += [f"takes {one.shards} of 64 shards"] if one.shards else []
    does += [one.detail] if one.detail else []
    if one.state != "alive":
        does.append(f"last heard of {span(at_s - one.seen_s)} ago")
    return ", ".join(does)


class TaskCard:
    """One task.

    Args:
        name: of it.
    """

    def __init__(self, name: str) -> None:
        with box("article", "cv-card", aria_label=f"Task {name}"):
            with box("div", "cv-card-head"):
                text("h2", name)
                self._phase = text("span", "", "cv-chip")
            self._reason = text("p", "", "cv-told")
            with box("div", "cv-arrivals"):
                self._arrived = text("p", "", "cv-big")
                self._deadline = text("p", "", "cv-quiet")
            self._bar = box("progress", "cv-bar", max="1", value="0", aria_label=f"Updates of {name} that have arrived")
            with box("dl", "cv-facts"):
                self._round, self._committed, self._version, self._share = (
                    _fact(label) for label in ("Round", "Committed", "Model in force", "Asked to take part")
                )
            with box("p", "cv-links"):
                text("a", "Curves", href=f"{ROOT}/curves/{name}")
                text("a", "Models", href=f"{ROOT}/models/{name}")

    def show(self, task: TaskOverview, at_s: float) -> None:
        """Show how the task stands."""
        is_open = task.phase == "open"
        self._phase.set_text("pausing" if task.pausing and is_open else _PHASES.get(task.phase, task.phase))
        attribute(self._phase, "data-state", task.phase)
        self._reason.set_text(task.reason)
        self._reason.set_visibility(bool(task.reason))
        self._arrived.set_text(f"{count(task.arrived)} of {count(task.goal)} updates" if is_open else _standing(task))
        self._deadline.set_text(_closes(task, at_s) if is_open else "")
        attribute(self._bar, "value", f"{min(1.0, task.arrived / max(1, task.goal)):.4f}" if is_open else "0")
        self._bar.set_visibility(is_open)
        self._round.set_text(str(task.round))
        self._committed.set_text(f"{count(task.committed)} of {count(task.rounds)} rounds")
        self._version.set_text(f"version {task.version}")
        self._share.set_text(f"{task.probability:.0%} of devices a round")


def _fact(label: str) -> TextElement:
    """A name and a value below it."""
    with box("div"):
        text("dt", label)
        return text("dd", "")


def _standing(task: TaskOverview) -> str:
    """In place of arrivals, while no round is open."""
    words = {"unmasking": "Updates are being unmasked", "idle": "No round yet", "paused": "No round open"}
    return words.get(task.phase, "All rounds are over")


def _closes(task: TaskOverview, at_s: float) -> str:
    """When the round closes at the latest."""
    if task.deadline_s is None:
        return ""
    left_s = task.deadline_s - at_s
    return f"closes in {span(left_s)}" if left_s > 0 else f"should have closed {span(-left_s)} ago"
