"""Where a task stands, and how its rounds are run: what `aggregator.rounds` takes and gives. Frozen data."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import Literal

from fl_protocol.errors import LocalMisuseError


class Phase(str, enum.Enum):
    """Where a task stands; finished and aborted are final."""

    IDLE = "idle"
    OPEN = "open"
    UNMASKING = "unmasking"
    PAUSED = "paused"
    FINISHED = "finished"
    ABORTED = "aborted"


@dataclass(frozen=True)
class RoundPolicy:
    """How a task's rounds are run.

    Args:
        rounds: committed rounds that finish the task.
        goal: updates at which a round closes early; the buffer's size when asynchronous.
        minimum_cohort: fewest updates that are combined.
        duration_s: seconds from opening to deadline.
        mode: sync counts updates of the open round only; async also those of rounds shortly before it.
        maximum_staleness: rounds by which an update may be late and still counts; 0 when synchronous.
        most_failures: rounds in a row that cannot be combined, or make the model worse, until the task pauses.
        makes_models: whether a commit makes a model; evaluations and statistics do not.
        unmasking_s: seconds that helpers have to answer; None where updates are not masked. Only when synchronous.
        halted: why no further round opens, in words; empty if one may.
    """

    rounds: int
    goal: int
    minimum_cohort: int
    duration_s: float
    mode: Literal["sync", "async"] = "sync"
    maximum_staleness: int = 0
    most_failures: int = 3
    makes_models: bool = True
    unmasking_s: float | None = None
    halted: str = ""

    def __post_init__(self) -> None:
        if not 1 <= self.minimum_cohort <= self.goal:
            raise LocalMisuseError(f"minimum_cohort: expected 1 to goal ({self.goal}), got {self.minimum_cohort}")
        if self.rounds < 1 or not 0 < self.duration_s < math.inf:
            raise LocalMisuseError(
                f"rounds {self.rounds} and duration_s {self.duration_s}: expected at least 1 and above 0, finite"
            )
        if self.mode not in ("sync", "async"):
            raise LocalMisuseError(f"mode: expected 'sync' or 'async', got {self.mode!r}")
        if self.maximum_staleness < 0 or (self.mode == "sync" and self.maximum_staleness > 0):
            raise LocalMisuseError(
                f"maximum_staleness: expected 0 when mode is 'sync' and at least 0 when it is 'async', "
                f"got {self.maximum_staleness} with {self.mode!r}"
            )
        if self.unmasking_s is not None and (self.mode == "async" or not 0 < self.unmasking_s < math.inf):
            raise LocalMisuseError(
                f"unmasking_s: expected above 0, finite, and only when mode is 'sync', got {self.unmasking_s} with "
                f"{self.mode!r}"
            )
        if self.most_failures < 1:
            raise LocalMisuseError(f"most_failures: expected at least 1, got {self.most_failures}")


@dataclass(frozen=True)
class RoundState:
    """A task's state: all that must be stored to go on after a crash.

    Args:
        number: the newest round's number; aborted rounds have numbers too. 0 before the first.
        committed: committed rounds.
        version: version of the model in force. A commit, the finished model and a rollback each make the next one.
        arrived: updates counted in the open round, or in the one that is being unmasked.
        opened_s: of that round, Unix seconds; 0 when there is none.
        deadline_s: of that round, and then by when its helpers should have answered, Unix seconds; 0 when there is
            none.
        pausing: the task pauses when that round closes.
        failures: rounds in a row that could not be combined or were rejected.
        reason: why the task is paused or aborted, for its operator; empty otherwise.
    """

    phase: Phase = Phase.IDLE
    number: int = 0
    committed: int = 0
    version: int = 0
    arrived: int = 0
    opened_s: float = 0.0
    deadline_s: float = 0.0
    pausing: bool = False
    failures: int = 0
    reason: str = ""
