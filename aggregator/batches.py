"""Whole updates on their way into the database: gathered in a batch, handed over, and decided all at once.

What commits has room for two batches, so that the next one can be handed over, and gathered before that, while one is
being committed. A batch that fails is kept and tried again, until it is decided.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from aggregator.committer import PendingUpdate, Verdict
from aggregator.transfers import Key
from fl_protocol.recency import happened_within

FULL_BATCH = 256
FULL_BATCH_BYTES = 48 * 2**20
"""Whole updates that a batch does not wait any longer for more of."""
MOST_IN_BATCH = 2 * FULL_BATCH
MOST_BATCH_BYTES = 64 * 2**20
"""From so many on nothing is added to a batch."""
LONGEST_PENDING_S = 0.5
"""How long a whole update waits for others to be committed with it."""
MOST_BATCHES = 2
"""That are gathered or on their way."""


class Batch(Protocol):
    """Updates that are committed together."""

    keys: list[Key]
    """Whose they are."""
    num_bytes: int
    """Of their envelopes."""

    def add(self, update: PendingUpdate) -> None:
        """Take another one."""

    def begin(self) -> None:
        """Have it committed. Raises DatabaseError: it will be tried again, as any batch that fails."""


class Decided(NamedTuple):
    """What became of a batch.

    Args:
        keys: of its updates.
        verdicts: on each.
        unusable: which updates, by index, failed by an error nobody has foreseen, and it in words.
    """

    keys: Sequence[Key]
    verdicts: Sequence[Verdict]
    unusable: Mapping[int, str] = {}


class Commits(Protocol):
    """Commits batches, in this process or beside it (`aggregator.adapters.commit_process`).

    Attributes:
        gather_s: how long a batch gathers updates before it is handed over; 0 where nothing is gained by that.
    """

    gather_s: float

    def batch(self) -> Batch | None:
        """An empty batch; None while there are `MOST_BATCHES`."""

    @property
    def is_busy(self) -> bool:
        """Whether a batch that was begun is not decided."""

    def decided(self, wait_s: float) -> Decided | None:
        """A batch that was decided and not told of yet; None if there is none after `wait_s`.

        Raises:
            DatabaseError: a batch was not committed, or nobody knows; it is tried again from the next call on.
        """

    def close(self) -> None:
        """End it."""


class _BatchHere:
    """A batch in this process's memory."""

    def __init__(self, begin: Callable[[_BatchHere], None]) -> None:
        self._begin = begin
        self.updates: list[PendingUpdate] = []
        self.keys: list[Key] = []
        self.num_bytes = 0

    def add(self, update: PendingUpdate) -> None:
        """Take another one."""
        self.updates.append(update)
        self.keys.append((update.device, update.update_id))
        self.num_bytes += update.num_bytes

    def begin(self) -> None:
        """Have it committed."""
        self._begin(self)


class CommitsHere:
    """Commits in this process, when it is asked what was decided.

    Args:
        commit: makes updates count; raises DatabaseError.
    """

    gather_s = 0.0

    def __init__(self, commit: Callable[[Sequence[PendingUpdate]], Sequence[Verdict]]) -> None:
        self._commit = commit
        self._made = 0
        self._begun: deque[_BatchHere] = deque()

    def batch(self) -> _BatchHere | None:
        """An empty batch; None while there are `MOST_BATCHES`."""
        if self._made == MOST_BATCHES:
            return None
        self._made += 1
        return _BatchHere(self._begun.append)

    @property
    def is_busy(self) -> bool:
        """Whether a batch that was begun is not decided."""
        return bool(self._begun)

    def decided(self, wait_s: float) -> Decided | None:
        """Commit the oldest batch. Raises DatabaseError: it is tried again at the next call."""
        if not self._begun:
            return None
        batch = self._begun[0]
        verdicts = self._commit(batch.updates)
        self._begun.popleft()
        self._made -= 1
        return Decided(batch.keys, verdicts)

    def close(self) -> None:
        """Nothing to end."""


class Batches:
    """The batch that is gathered, and those that were handed over.

    Args:
        commits: them.
        now_s: Unix seconds.
    """

    def __init__(self, commits: Commits, now_s: Callable[[], float]) -> None:
        self._commits, self._now_s = commits, now_s
        self._gathered: Batch | None = None
        self._first_s = 0.0  # when the first of those that are gathered came

    def add(self, update: PendingUpdate) -> bool:
        """Gather an update; whether there was room for it."""
        if not self.make_room() or self._gathered is None:
            return False
        if not self._gathered.keys:
            self._first_s = self._now_s()
        self._gathered.add(update)
        return True

    def make_room(self) -> bool:
        """Whether an update can be gathered."""
        if self._gathered is None:
            self._gathered = self._commits.batch()
        return self._gathered is not None and not _reaches(self._gathered, MOST_IN_BATCH, MOST_BATCH_BYTES)

    @property
    def num_gathered(self) -> int:
        """Updates that were not handed over yet."""
        return 0 if self._gathered is None else len(self._gathered.keys)

    @property
    def is_busy(self) -> bool:
        """Whether something that was handed over is not decided."""
        return self._commits.is_busy

    @property
    def is_gathering(self) -> bool:
        """Whether more is waited for, a moment, before a batch is handed over: each costs the same few syncs."""
        return bool(self.num_gathered) and not self._is_full and self._came_within(self._commits.gather_s)

    def is_due(self, *, more_wait: bool) -> bool:
        """Whether what is gathered should be handed over.

        Args:
            more_wait: whether there is more that could be gathered now.
        """
        if not self.num_gathered or self._is_full:
            return bool(self.num_gathered)
        if self.is_busy or self.is_gathering:
            return False
        # Under a flood, of junk perhaps, there is always more to come first.
        return not more_wait or self._commits.gather_s > 0 or not self._came_within(LONGEST_PENDING_S)

    def hand_over(self) -> None:
        """Have what is gathered committed. Raises DatabaseError: it will be tried again, as any batch that fails."""
        if self._gathered is not None and self._gathered.keys:
            batch, self._gathered = self._gathered, None
            batch.begin()

    def decided(self, wait_s: float) -> Decided | None:
        """As `Commits.decided`."""
        return self._commits.decided(wait_s)

    @property
    def _is_full(self) -> bool:
        return self._gathered is not None and _reaches(self._gathered, FULL_BATCH, FULL_BATCH_BYTES)

    def _came_within(self, duration_s: float) -> bool:
        """Whether the first of what is gathered came less than so long ago."""
        return happened_within(duration_s, self._first_s, self._now_s())


def _reaches(batch: Batch, count: int, num_bytes: int) -> bool:
    """Whether a batch is as long or as large as this."""
    return len(batch.keys) >= count or batch.num_bytes >= num_bytes
