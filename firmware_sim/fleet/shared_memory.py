"""Asking another process on this machine: what is large is not sent, but left in memory that both have.

The memory is a file without a name: the system takes it back when the last process that has it open is gone, however
that ended. A question lies in a file of its own until it is answered. Of an answer, large arrays stay where they were
written: one side writes and the other only reads; when nothing there refers to an array any more, it says so, and the
place is written to again. So there is as much of it as arrays were in use at a time, and a place that is used again
costs one copy and nothing else.
"""

from __future__ import annotations

import mmap
import os
import pickle
import sys
import tempfile
import weakref
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.reduction import DupFd
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

LEAST_BYTES = 16 * 1024
"""Smaller arrays are sent as they are."""
MOST_AT_ONCE = 2**30
"""Linux writes and reads no more than 2 GiB less a page at a time, and says of the rest nothing (write(2), Notes)."""
SEGMENT_BYTES = 64 * 1024 * 1024
"""So much is mapped at a time; larger arrays are sent as they are."""


class Span(NamedTuple):
    """Where an array's bytes are."""

    offset: int
    length: int


class SharedFile:
    """See the module docstring; it can be handed to a process that `multiprocessing` starts, as an argument."""

    def __init__(self) -> None:
        if sys.platform == "linux":
            self.descriptor = os.memfd_create("covey-fleet")
        else:
            with tempfile.TemporaryFile() as file:
                self.descriptor = os.dup(file.fileno())

    def close(self) -> None:
        """Let go of it; what is mapped stays so. Raises OSError if that was done."""
        descriptor, self.descriptor = self.descriptor, -1
        os.close(descriptor)

    def segment(self, number: int, access: int) -> mmap.mmap:
        """Map one of its segments. Raises OSError."""
        return mmap.mmap(self.descriptor, SEGMENT_BYTES, offset=number * SEGMENT_BYTES, access=access)

    def __getstate__(self) -> Any:
        return DupFd(self.descriptor)

    def __setstate__(self, handed: Any) -> None:
        self.descriptor = handed.detach()


class SharedFiles(NamedTuple):
    """What two processes have in common: files for questions, in turn, and one for answers.

    One question may be asked before the last is answered, so there are two files.
    """

    questions: tuple[SharedFile, SharedFile]
    answers: SharedFile


def ask(line: Connection, file: SharedFile, question: object) -> None:
    """Send a question; the one before that lay in this file was answered. Raises OSError.

    Args:
        line: to the other process.
        file: that it has too, for questions alone.
        question: can be pickled.
    """
    data = pickle.dumps(question, protocol=5)
    if len(data) >= LEAST_BYTES:
        _write(file.descriptor, data)
        line.send(len(data))
    else:
        line.send(data)


def asked(line: Connection, file: SharedFile) -> Any:
    """The next question of this program's own; it is a pickle. Raises EOFError: there is none any more; OSError."""
    data = line.recv()
    return pickle.loads(_read(file.descriptor, data) if isinstance(data, int) else data)  # noqa: S301 - see above


def _write(descriptor: int, data: bytes) -> None:
    """All of it, from the beginning of a file. Raises OSError."""
    view = memoryview(data)
    for start in range(0, len(view), MOST_AT_ONCE):
        os.pwrite(descriptor, view[start : start + MOST_AT_ONCE], start)


def _read(descriptor: int, length: int) -> bytes:
    """So many bytes from the beginning of a file. Raises OSError."""
    starts = range(0, length, MOST_AT_ONCE)
    return b"".join(os.pread(descriptor, min(MOST_AT_ONCE, length - start), start) for start in starts)


class AnswerWriter:
    """The side that answers.

    Args:
        file: that the other side has too.
    """

    def __init__(self, file: SharedFile) -> None:
        self._file = file
        self._segments: list[mmap.mmap] = []
        self._end = 0
        self._lengths: dict[int, int] = {}  # of all places, by offset
        self._free: defaultdict[int, list[int]] = defaultdict(list)  # offsets, by length

    def take_back(self, offsets: Iterable[int]) -> None:
        """The other side needs what is there no more."""
        for offset in offsets:
            self._free[self._lengths[offset]].append(offset)

    def dumps(self, answer: object) -> tuple[bytes, list[Span]]:
        """What is to be sent, for `AnswerReader.loads`. Raises OSError: the memory is full."""
        spans: list[Span] = []

        def is_sent(buffer: pickle.PickleBuffer) -> bool:
            with buffer.raw() as raw:
                if not LEAST_BYTES <= raw.nbytes <= SEGMENT_BYTES:
                    return True
                spans.append(self._written(raw))
                return False

        return pickle.dumps(answer, protocol=5, buffer_callback=is_sent), spans

    def _written(self, raw: memoryview) -> Span:
        """Put bytes into a place that is free, or a new one."""
        length = -(-raw.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        free = self._free[length]
        if free:
            offset = free.pop()
            segment, begin = divmod(offset, SEGMENT_BYTES)
            self._segments[segment][begin : begin + raw.nbytes] = raw
        else:
            offset = self._new(length)
            os.pwrite(self._file.descriptor, raw, offset)  # the first time this is faster than through the mapping
        return Span(offset, raw.nbytes)

    def _new(self, length: int) -> int:
        """Where there is a place that was never used."""
        left = -self._end % SEGMENT_BYTES
        offset = self._end if length <= left else self._end + left
        if offset % SEGMENT_BYTES == 0:
            os.ftruncate(self._file.descriptor, offset + SEGMENT_BYTES)
            self._segments.append(self._file.segment(len(self._segments), mmap.ACCESS_WRITE))
        self._end, self._lengths[offset] = offset + length, length
        return offset


class AnswerReader:
    """The side that asks.

    Args:
        file: that the other side has too.
    """

    def __init__(self, file: SharedFile) -> None:
        self._file = file
        self._segments: list[mmap.mmap] = []
        self._done: deque[int] = deque()

    def loads(self, data: bytes, spans: Sequence[Span]) -> Any:
        """The answer; its arrays are read-only. Only of what `AnswerWriter` of this program gave: it is a pickle."""
        return pickle.loads(data, buffers=[self._view(span) for span in spans])  # noqa: S301 - see above

    def take_done(self) -> tuple[int, ...]:
        """Places that nothing here refers to any more and that were not named yet, for `AnswerWriter.take_back`."""
        return tuple(self._done.popleft() for _ in range(len(self._done)))

    def _view(self, span: Span) -> NDArray[np.uint8]:
        """What is in a place, for as long as somebody refers to it."""
        number, begin = divmod(span.offset, SEGMENT_BYTES)
        while number >= len(self._segments):
            self._segments.append(self._file.segment(len(self._segments), mmap.ACCESS_READ))
        view = np.frombuffer(self._segments[number], np.uint8, span.length, begin)
        weakref.finalize(view, self._done.append, span.offset).atexit = False
        return view
