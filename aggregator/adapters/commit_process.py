"""Commits batches in a process of its own, so that two cores work on one ingest: this one has the network.

Python runs one thread at a time, and of an update's ingest half is Python or holds its lock; threads for signatures and
digests were measured to gain nothing. So whole updates go to a second process, through shared memory, and their
verdicts come back; meanwhile the next ones are received. The second process opens the database itself. What it has
promised is there; if it dies, it is started again, and the batch is looked at anew.

Writing to shared memory for which there is no room ends a process with SIGBUS (containers often have 64 MiB of it).
So batches take no more than leaves half of it free, and what does not fit goes through a pipe. An update that is an
error nobody has foreseen costs its batch two attempts; then it is tried alone, and found unusable.
"""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable, Sequence
from mmap import PAGESIZE
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from typing import NamedTuple, NoReturn

from aggregator.adapters.freed_memory import keep_freed_memory
from aggregator.batches import MOST_BATCHES, Decided
from aggregator.committer import PendingUpdate, Verdict
from aggregator.errors import DatabaseError
from aggregator.transfers import Key

Commit = Callable[[Sequence[PendingUpdate]], list[Verdict]]
"""What the second process does with a batch."""
GATHER_S = 0.03
"""How long a batch gathers updates; its syncs take about half of that."""
ARENA_BYTES = 128 * 2**20
RESERVED_BYTES = 32 * 2**20
"""Of the arena, taken at the start: enough for batches of a watch's updates, and nobody else can take it any more."""
SHARED_MEMORY = "/dev/shm"  # noqa: S108 - where Linux keeps it; nothing is opened there by this name


MOST_FAILURES = 2
"""Of a batch, of a kind that nobody has foreseen, before its updates are committed one at a time."""


class _Place(NamedTuple):
    """An update of a batch: its envelope is in shared memory, or beside it when there is no more room."""

    device: str
    update_id: bytes
    start: int
    length: int
    envelope: bytes | None = None


class _Asked(NamedTuple):
    """A batch for the second process; carefully: one update at a time."""

    places: list[_Place]
    carefully: bool


class _Answer(NamedTuple):
    """What became of a batch; and why some of it, by index, were unusable."""

    verdicts: list[Verdict]
    unusable: dict[int, str]


class _Failure(NamedTuple):
    """Why a batch was not committed."""

    reason: str
    is_unforeseen: bool = False


class _SharedBatch:
    """A batch in a part of the shared memory, which is written from its start.

    Args:
        memory: all of the arena.
        start: of the part.
        begin: has the batch committed.
    """

    def __init__(self, memory: memoryview, start: int, begin: Callable[[_SharedBatch], None]) -> None:
        self._memory, self._start, self._begin = memory, start, begin
        self.taken_bytes = 0  # as far as any batch reached
        self.reserved = (start, 0)
        self.clear(0)

    def reserve(self, num_bytes: int) -> None:
        """Take memory from the start on, before anything is in it."""
        self._memory[self._start : self._start + num_bytes] = bytes(num_bytes)
        self.reserved, self.taken_bytes = (self._start, num_bytes), num_bytes

    def clear(self, room: int) -> None:
        """Forget what is in it; `room`: bytes that may be written from now on."""
        self._room, self._used = room, 0
        self.keys: list[Key] = []
        self.places: list[_Place] = []
        self.num_bytes = self.failures = 0

    def add(self, update: PendingUpdate) -> None:
        """Take another one: a copy, so that what it came in can be freed."""
        length = update.num_bytes
        self.keys.append((update.device, update.update_id))
        self.num_bytes += length
        if self._used + length > self._room:
            self.places.append(_Place(*self.keys[-1], 0, 0, bytes(update.envelope)))
            return
        end = start = self._start + self._used
        for part in update.parts:
            self._memory[end : end + len(part)] = part
            end += len(part)
        self.places.append(_Place(*self.keys[-1], start, length))
        self._used += length
        self.taken_bytes = max(self.taken_bytes, self._used)

    def begin(self) -> None:
        """Have it committed. Raises DatabaseError: it will be tried again."""
        self._begin(self)

    @property
    def is_shared(self) -> bool:
        """Whether all of it is in shared memory."""
        return self._used == self.num_bytes


class CommitProcess:
    """`aggregator.batches.Commits` by a second process; see the module docstring.

    Args:
        make_commit: makes, in the second process, what commits; a function of a module with plain arguments.
        arena_bytes: address space for all batches; memory is taken as far as batches reach, and stays taken.
        reserved_bytes: of it, taken at once.
        free_bytes: of shared memory, as of now; asked before each batch.
    """

    gather_s = GATHER_S

    def __init__(
        self,
        make_commit: Callable[[], Commit],
        *,
        arena_bytes: int = ARENA_BYTES,
        reserved_bytes: int = RESERVED_BYTES,
        free_bytes: Callable[[], int] | None = None,
    ) -> None:
        self._make_commit = make_commit
        self._free_bytes = free_bytes or shared_memory_free
        self._arena = SharedMemory(create=True, size=arena_bytes)
        self._memory = _memory(self._arena)
        self._part_bytes = arena_bytes // MOST_BATCHES // PAGESIZE * PAGESIZE
        self._parts = [
            _SharedBatch(self._memory, index * self._part_bytes, self._begin) for index in range(MOST_BATCHES)
        ]
        for part in self._parts:
            part.reserve(min(reserved_bytes // MOST_BATCHES, self._room(part)))
        self._idle = deque(self._parts)
        self._waiting: deque[_SharedBatch] = deque()
        self._sent: deque[_SharedBatch] = deque()
        self._start()

    def batch(self) -> _SharedBatch | None:
        """An empty batch; None while there are `MOST_BATCHES`."""
        if not self._idle:
            return None
        batch = self._idle.popleft()
        batch.clear(self._room(batch))
        return batch

    @property
    def is_busy(self) -> bool:
        """Whether a batch that was begun is not decided."""
        return bool(self._waiting or self._sent)

    def decided(self, wait_s: float) -> Decided | None:
        """A batch that was decided and not told of yet; None if there is none after `wait_s`.

        Raises:
            DatabaseError: a batch was not committed, or nobody knows; it is tried again from the next call on.
        """
        self._send()
        if not self._sent:
            return None
        try:
            if not self._connection.poll(wait_s):
                return None
            answer: _Answer | _Failure = self._connection.recv()
        except (EOFError, OSError) as error:
            self._start_again(error)
        batch = self._sent.popleft()
        if isinstance(answer, _Failure):
            batch.failures += answer.is_unforeseen
            self._waiting.appendleft(batch)
            raise DatabaseError(answer.reason)
        self._idle.append(batch)
        return Decided(batch.keys, answer.verdicts, answer.unusable)

    def close(self) -> None:
        """End the second process."""
        self._connection.close()  # which it takes as the end
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()
        self._memory.release()
        self._arena.close()
        self._arena.unlink()
        # Python's own third process, which cleans up after killed ones; it would end a moment after this one.
        end_tracker = getattr(resource_tracker._resource_tracker, "_stop", None)
        if end_tracker is not None:
            end_tracker()

    def _room(self, batch: _SharedBatch) -> int:
        """Bytes that a batch may write: its share of what is taken already, and as much more as leaves half free."""
        taken = sum(part.taken_bytes for part in self._parts)
        share = (taken + self._free_bytes()) // 2 // MOST_BATCHES
        return min(self._part_bytes, max(batch.taken_bytes, share))

    def _begin(self, batch: _SharedBatch) -> None:
        """Have a batch committed. Raises DatabaseError: it will be tried again."""
        self._waiting.append(batch)
        self._send()

    def _send(self) -> None:
        """Hand over what waits; where a pipe has to carry updates, only when nothing else is in it."""
        while self._waiting and (not self._sent or self._waiting[0].is_shared):
            batch = self._waiting.popleft()
            self._sent.append(batch)
            try:
                self._connection.send(_Asked(batch.places, batch.failures >= MOST_FAILURES))
            except OSError as error:
                self._start_again(error)

    def _start(self) -> None:
        """Start the second process."""
        context = get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve,
            args=(theirs, self._arena.name, [part.reserved for part in self._parts], self._make_commit),
            name="commits",
            daemon=True,
        )
        self._process.start()
        theirs.close()

    def _start_again(self, error: Exception) -> NoReturn:
        """Replace a process that has died."""
        self._connection.close()
        self._process.join(timeout=1)
        self._waiting.extendleft(reversed(self._sent))
        self._sent.clear()
        self._start()
        raise DatabaseError(f"the process that commits has ended ({error or 'no reason known'}) and was started again")


def shared_memory_free(status: Callable[[str], os.statvfs_result] = os.statvfs) -> int:
    """Bytes of shared memory that nobody has taken.

    Args:
        status: of the file system at a path.

    Returns:
        At least `2 * ARENA_BYTES` where the system does not say: only Linux keeps it in a file system.
    """
    try:
        found = status(SHARED_MEMORY)
    except FileNotFoundError:
        return 2 * ARENA_BYTES
    return found.f_bavail * found.f_frsize


def _serve(
    connection: Connection, arena_name: str, reserved: Sequence[tuple[int, int]], make_commit: Callable[[], Commit]
) -> None:
    """The second process: commit batches until the first one is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the first process
    keep_freed_memory()
    arena = SharedMemory(arena_name)
    with _memory(arena).toreadonly() as memory:
        for start, length in reserved:
            bytes(memory[start : start + length : PAGESIZE])  # has each page mapped here too
        _answer_batches(connection, memory, make_commit)
    arena.close()


def _answer_batches(connection: Connection, memory: memoryview, make_commit: Callable[[], Commit]) -> None:
    """Commit what comes, one batch after the other."""
    commit: Commit | None = None
    while True:
        try:
            asked: _Asked = connection.recv()
        except (EOFError, OSError):
            return
        try:
            commit = commit or make_commit()
            batch = [_pending(place, memory) for place in asked.places]
            answer: _Answer | _Failure = _one_by_one(commit, batch) if asked.carefully else _Answer(commit(batch), {})
        except DatabaseError as error:
            answer = _Failure(str(error))
        except Exception as error:
            answer = _Failure(f"a batch could not be committed: {_in_words(error)}", is_unforeseen=True)
        connection.send(answer)
        # Refusals remember where they were made, and with it the shared memory.
        batch, answer = [], _Failure("")


def _one_by_one(commit: Commit, batch: Sequence[PendingUpdate]) -> _Answer:
    """Commit updates that have failed together. Raises DatabaseError."""
    verdicts: list[Verdict] = []
    unusable: dict[int, str] = {}
    for index, update in enumerate(batch):
        try:
            verdicts += commit([update])
        except DatabaseError:
            raise
        except Exception as error:
            unusable[index] = _in_words(error)
            verdicts.append(None)
    return _Answer(verdicts, unusable)


def _in_words(error: Exception) -> str:
    """What an error nobody has foreseen says of itself; some say nothing but their name."""
    return f"{type(error).__name__}: {error}"[:200]


def _memory(arena: SharedMemory) -> memoryview:
    """All of it."""
    if arena.buf is None:
        raise DatabaseError("the shared memory of the process that commits is closed")
    return arena.buf


def _pending(place: _Place, memory: memoryview) -> PendingUpdate:
    """An update as the committer takes it; its envelope is borrowed from shared memory."""
    if place.envelope is not None:
        return PendingUpdate(place.device, place.update_id, [place.envelope])
    return PendingUpdate(place.device, place.update_id, [memory[place.start : place.start + place.length]])
