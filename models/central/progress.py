"""What a person sees while a model is trained: a bar on a terminal, elsewhere one line an epoch."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from models.central.plan import CentralPlan
from models.central.release import rounded_up
from models.central.training import EpochResult, StepDone

_NAMES = {"mean_absolute_error": "mean absolute error", "within_tolerance": "within tolerance"}
_SHARES = ("accuracy", "within_tolerance")
_REFRESH_S = 0.2


class TrainingDisplay:
    """A context manager whose `on_step` is for `train_centrally`.

    Args:
        console: where to print.
        plan: of the training.
        seeded: epsilon is not shown for noise that anybody can repeat.
    """

    def __init__(self, console: Console, plan: CentralPlan, *, seeded: bool) -> None:
        self._console, self._plan, self._show_epsilon = console, plan, plan.is_private and not seeded
        self._bar = Progress(
            TextColumn("steps"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[said]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=plan.steps, said="")
        self._shown_at, self._began_at = -_REFRESH_S, 0
        self._measured = ""

    def __enter__(self) -> TrainingDisplay:
        self._bar.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._bar.stop()

    def on_step(self, done: StepDone) -> None:
        """Show where the training is."""
        if not self._began_at:
            self._began_at = done.step
        if done.epoch is not None:
            self._measured = as_text(done.epoch.measured)
            self._console.print(self._line(done, done.epoch), markup=False, highlight=False, soft_wrap=True)
        now = time.monotonic()
        if not self._bar.disable and (now - self._shown_at > _REFRESH_S or done.step == self._plan.steps):
            self._shown_at = now
            said = ", ".join(part for part in (self._measured, self._epsilon(done), self._speed(done)) if part)
            self._bar.update(self._task, completed=done.step, said=said)

    def _line(self, done: StepDone, epoch: EpochResult) -> str:
        number = self._plan.epochs if done.step == self._plan.steps else self._plan.epochs_after(done.step)
        begin = f"epoch {number}/{self._plan.epochs}, step {done.step}/{self._plan.steps}"
        return ", ".join(
            part for part in (begin, as_text(epoch.measured), self._epsilon(done), self._speed(done)) if part
        )

    def _epsilon(self, done: StepDone) -> str:
        return f"epsilon {rounded_up(self._plan.epsilon(done.noisy_sums))}" if self._show_epsilon else "no privacy"

    def _speed(self, done: StepDone) -> str:
        examples = (done.step - self._began_at + 1) * self._plan.expected_batch_size
        return f"{examples / done.seconds:,.0f} examples/s" if done.seconds else ""


def as_text(measured: dict[str, float]) -> str:
    """Measurements as part of a sentence."""
    shown = [
        f"{_NAMES.get(name, name)} {100 * value:.1f} %" if name in _SHARES else f"{_NAMES.get(name, name)} {value:.4g}"
        for name, value in measured.items()
    ]
    return f"validation {', '.join(shown)}" if shown else ""
