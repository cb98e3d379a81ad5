"""The display while a run goes: one line per round, the current one with a progress bar (rich)."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from firmware_sim.observation import ModelScore, Observation, RoundRecord

_BAR_CELLS = 6
"""So short that a round fits 80 columns."""


class LiveRounds:
    """Prints each round once it and its measurement are complete, and keeps the open round's line moving."""

    def __init__(self, console: Console, observation: Observation) -> None:
        self._observation = observation
        self._console = console
        self._printed: set[int] = set()
        self._progress = Progress(
            TextColumn("round {task.fields[number]:>3}"),
            BarColumn(bar_width=_BAR_CELLS),
            TextColumn("{task.completed:>2.0f}/{task.total:.0f} {task.fields[text]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: TaskID = self._progress.add_task("round", total=1, number=0, text="devices are starting")

    def __enter__(self) -> LiveRounds:
        self._progress.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        self._console.print(text, highlight=False, soft_wrap=True)

    def refresh(self) -> None:
        """Show what the observation holds."""
        rounds = sorted(self._observation.rounds.values(), key=lambda record: record.number)
        for record in rounds:
            self._print_when_complete(record, newest=rounds[-1].number)
        if rounds:
            record = rounds[-1]
            score = self._observation.latest_score()
            text = self._text(record, score, max(self._observation.epsilon.values(), default=0.0))
            self._progress.update(
                self._task,
                completed=record.arrived,
                total=record.goal,
                number=record.number,
                text=f"waits: {escape(self._observation.waits_for)}" if self._observation.waits_for else text,
            )

    def _print_when_complete(self, record: RoundRecord, *, newest: int) -> None:
        """Print a closed round when its model was measured, or when that is overdue."""
        if record.number in self._printed or record.outcome == "open":
            return
        score = self._observation.score_after(record)
        if (
            score is None
            and record.version is not None
            and newest < record.number + 2
            and not self._observation.finished
        ):
            return
        self._printed.add(record.number)
        if record.outcome == "aborted":
            self.say(f"round {record.number:>3} [yellow]aborted[/]: {escape(record.reason)}")
            return
        bar = "━" * round(_BAR_CELLS * min(1.0, record.arrived / record.goal))
        text = self._text(record, score, record.epsilon_max or 0.0)
        self.say(f"round {record.number:>3} [green]{bar:<{_BAR_CELLS}}[/] {record.arrived:>2}/{record.goal} {text}")

    def _text(self, record: RoundRecord, score: ModelScore | None, epsilon: float) -> str:
        """Bytes, unmasking, accuracy and privacy of a round, in words."""
        budget = self._observation.settings.epsilon
        parts = [f"{record.bytes_up / 1000:4.1f} kB up"]
        if record.unmasking_s is not None:
            parts.append(f"unmasked in {record.unmasking_s:.1f} s")
        elif record.unmasking_since_s is not None and record.outcome == "open":
            parts.append("helpers are asked")
        parts.append("accuracy      –" if score is None else f"accuracy {100 * score.accuracy:4.1f} %")
        parts.append("no privacy claimed" if budget is None else f"ε {epsilon:4.2f}/{budget:g}")
        return ", ".join(parts)
