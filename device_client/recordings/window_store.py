"""The wearer's labelled windows of one stream: encrypted, append-only, bounded, whole after every power cut.

Records lie in frames, frames in segments (``recordings/STREAM.00000007``); appending touches the last segment only, and
what is too old or too much goes by whole segments, oldest first. On reading the limits hold exactly, by record number
and by the time seen to pass (`device_client.recordings.retention`); on the medium a record may outlast them by one
segment, which is at most an eighth of the count and a sixteenth of the age.

Every frame says how many records came before it, so a missing frame or segment is noticed, except at the very end:
there an old copy of the newest segment cannot be told from one that a power cut tore.

Each record has 16 random bytes stored with it; whether it is held out depends on their hash alone. It therefore stays
on its side whatever is added or erased, and a changed fraction moves only the records in between. Windows that overlap
are not independent: cut recordings without overlap where the held-out result is to mean anything.

No I/O but through `WindowFiles`; the time is an argument.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import msgspec
import numpy as np
from numpy.typing import NDArray

from device_client.errors import StoreError
from device_client.ports import Float32, Labels
from device_client.recordings.fitting import check_stored, fitting_batch, label_columns
from device_client.recordings.frames import FRAME_OVERHEAD_BYTES, DamagedFramesError, WindowFiles
from device_client.recordings.record_frames import (
    ID_BYTES,
    FrameEntry,
    RecordFrame,
    Segment,
    decode_frames,
    entry_of,
    new_frame,
    time_mark,
)
from device_client.recordings.retention import Retention, SeenTime
from device_client.training import Records
from fl_protocol.errors import LocalMisuseError
from fl_protocol.model_manifest import LabelSchema

__all__ = ["Retention", "WindowFiles", "WindowStore"]

SEGMENT_BYTES, SEGMENT_FRAMES = 1 << 20, 256
_MARK_TIME_EVERY_S = 86_400.0


class WindowStore:
    """The records of one stream; one `WindowStore` a stream.

    Args:
        store: where they lie.
        stream: its name.
        window_shape: of one window, as the model takes it.
        label: what the model predicts.
        retention: what is kept.
        held_out_fraction: of the records, never trained on; at least 0, below 1.

    Raises:
        StoreError: what is stored does not fit the model, or is damaged. A damaged segment is set aside
            (``damaged/STREAM.NUMBER``), so that the next attempt opens all others; `appended` may then be lower.
    """

    def __init__(
        self,
        store: WindowFiles,
        stream: str,
        *,
        window_shape: tuple[int, ...],
        label: LabelSchema,
        retention: Retention,
        held_out_fraction: float,
    ) -> None:
        if not 0 <= held_out_fraction < 1:
            raise LocalMisuseError(f"held_out_fraction: expected 0 up to but not including 1, got {held_out_fraction}")
        self._store, self._stream = store, stream
        self._shape, self._label, self._retention = tuple(window_shape), label, retention
        self._threshold = int(held_out_fraction * 2**64)
        self._segments: list[Segment] = []
        self._time: SeenTime | None = None
        self._stored_s = 0.0
        self._appended = self._first_kept = 0
        self._load()
        self._expire()
        self._reported = self._first_kept

    def __len__(self) -> int:
        """How many records there are within the limits."""
        return sum(max(0, entry.end - max(entry.first, self._first_kept)) for entry in self._entries())

    @property
    def appended(self) -> int:
        """How many records were ever stored; retention does not lower it."""
        return self._appended

    def append(self, x: Float32, y: Labels, *, at_s: float) -> int:
        """Store records durably, and return how many.

        Up to a mebibyte is one frame, there whole or not at all after a power cut; more is stored in order, frame by
        frame.

        Args:
            x: windows, float32 [n, *window_shape], finite.
            y: labels: int32 [n], or float32 [n, K].
            at_s: the time now, Unix seconds.

        Raises:
            StoreError: they do not fit, and nothing was stored; or the disk does not take them, and the sentence says
                how many it took.
        """
        x, y = fitting_batch(x, y, window_shape=self._shape, label=self._label)
        _check_time(at_s)
        rows = max(1, SEGMENT_BYTES // max(1, x[:1].nbytes + y[:1].nbytes + ID_BYTES))
        for start in range(0, len(x), rows):
            try:
                self._append(x[start : start + rows], y[start : start + rows], at_s)
            except StoreError as error:
                if not start:
                    raise
                raise StoreError(f"only the first {start} of {len(x)} windows were stored: {error}") from error
        return len(x)

    def training(self) -> Records:
        """The records to train on, oldest first. Raises StoreError."""
        return self._records(held_out=False)

    def held_out(self) -> Records:
        """The records to measure on, oldest first. Raises StoreError."""
        return self._records(held_out=True)

    def prune(self, now_s: float) -> int:
        """Drop what is too old or too much.

        Args:
            now_s: Unix seconds.

        Returns:
            how many records went since the last call, or since the store was opened.

        Raises:
            StoreError: the disk refuses.
        """
        _check_time(now_s)
        if self._time is None or not self._segments:
            return 0
        before = self._first_kept
        self._time = self._time.at(now_s)
        self._expire()
        went, self._reported = self._first_kept - self._reported, self._first_kept
        # What can go goes first: a full disk must not be in its way.
        self._drop_segments()
        # A clock set back passes no time, but the reading must not be forgotten: the next step is counted from it.
        if self._first_kept > before or abs(self._time.latest_s - self._stored_s) >= _MARK_TIME_EVERY_S:
            self._append_frame(time_mark(self._appended, self._time))
            self._drop_segments()
        self._drop_set_aside()
        return went

    def _append(self, x: Float32, y: Labels, at_s: float) -> None:
        """Store records as one frame."""
        time = SeenTime.begin(at_s) if self._time is None else self._time.at(at_s)
        ids = self._store.entropy(ID_BYTES * len(x))
        frame = new_frame(x, y, first=self._appended, time=time, ids=ids)
        self._append_frame(frame)
        self._time = time
        self._appended += len(x)
        self._expire()

    def _append_frame(self, frame: RecordFrame) -> None:
        """Durably append a frame to the last segment, or to a new one where that is full."""
        data, entry = msgspec.msgpack.encode(frame), entry_of(frame)
        if not self._segments or self._is_full(self._segments[-1], frame, len(data)):
            self._drop_segments()
            number = self._next_number()
            self._store.append_frame(self._name(number), 0, data)
            self._segments.append(Segment(number, 0, []))
        else:
            last = self._segments[-1]
            self._store.append_frame(self._name(last.number), len(last.entries), data)
        self._stored_s = frame.seen_time().latest_s
        self._segments[-1].entries.append(entry)
        self._segments[-1].stored_bytes += len(data) + FRAME_OVERHEAD_BYTES

    def _is_full(self, segment: Segment, frame: RecordFrame, frame_bytes: int) -> bool:
        """Whether a frame belongs into a new segment."""
        oldest_s = segment.entries[0].passed_s
        return (
            len(segment.entries) >= SEGMENT_FRAMES
            or segment.stored_bytes + frame_bytes > SEGMENT_BYTES
            or segment.end - segment.first + len(frame) > max(1, self._retention.maximum_count // 8)
            or frame.time[0] - oldest_s > self._retention.maximum_age_s / 16
            or segment.first < segment.end <= self._first_kept
        )

    def _expire(self) -> None:
        """Move the border between what is kept and what is not."""
        first_kept = self._appended - self._retention.maximum_count
        if self._time is not None:
            oldest_s = self._time.passed_s - self._retention.maximum_age_s
            young = (entry.first for entry in self._entries() if entry.passed_s >= oldest_s)
            first_kept = max(first_kept, next(young, self._appended))
        self._first_kept = max(self._first_kept, first_kept)

    def _drop_segments(self) -> None:
        """Delete the segments, oldest first and never the last, of which no record is kept."""
        while len(self._segments) > 1 and self._segments[0].end <= self._first_kept:
            self._store.delete(self._name(self._segments[0].number))
            del self._segments[0]

    def _drop_set_aside(self) -> None:
        """Delete damaged segments that would have gone by now."""
        for number in self._numbers("damaged"):
            if number < self._segments[0].number:
                self._store.delete(self._name(number, "damaged"))

    @property
    def held_out_count(self) -> int:
        """How many are held out; reads none of them."""
        return self._count(held_out=True)

    def _count(self, *, held_out: bool) -> int:
        """How many records are on a side."""
        return sum(int(np.count_nonzero(self._chosen(entry, held_out=held_out))) for entry in self._entries())

    def _records(self, *, held_out: bool) -> Records:
        """One side's records."""
        count = self._count(held_out=held_out)
        x = np.empty((count, *self._shape), np.float32)
        columns = label_columns(self._label)
        y: Labels = np.empty((count, columns), np.float32) if columns else np.empty(count, np.int32)
        at = 0
        for segment in list(self._segments):
            if segment.end <= self._first_kept:
                continue
            for frame, entry in zip(self._opened(segment), segment.entries, strict=True):
                chosen = self._chosen(entry, held_out=held_out)
                end = at + int(np.count_nonzero(chosen))
                if end > at:
                    every = end - at == len(chosen)
                    x[at:end] = frame.windows() if every else frame.windows()[chosen]
                    y[at:end] = frame.labels() if every else frame.labels()[chosen]
                at = end
        return Records(x, y)

    def _chosen(self, entry: FrameEntry, *, held_out: bool) -> NDArray[np.bool_]:
        """Which records of a frame are within the limits and on one side."""
        side = entry.marks < np.uint64(self._threshold) if held_out else entry.marks >= np.uint64(self._threshold)
        side[: max(0, self._first_kept - entry.first)] = False
        return side

    def _opened(self, segment: Segment) -> list[RecordFrame]:
        """A segment's frames, read again. Raises StoreError, the segment set aside if it is damaged by now."""
        try:
            frames = decode_frames(self._store.frames(self._name(segment.number)))
            if len(frames) != len(segment.entries):  # the file is gone
                raise DamagedFramesError(f"{len(frames)} of {len(segment.entries)} frames are there")
        except DamagedFramesError as error:
            self._set_aside(segment.number)
            self._segments.remove(segment)
            raise self._damaged([segment.number]) from error
        return frames

    def _load(self) -> None:
        """Read what is there, without its records. Raises StoreError."""
        damaged = []
        for number in self._numbers("recordings"):
            try:
                frames = decode_frames(self._store.frames(self._name(number)))
            except DamagedFramesError:
                damaged.append(number)
                continue
            if not frames:
                continue  # begun when the power went
            damaged += self._lost_before(number, frames[0].first, known=damaged)
            for frame in filter(len, frames):
                check_stored(frame, stream=self._stream, window_shape=self._shape, label=self._label)
            stored = sum(len(frame.x) + len(frame.y) + len(frame.ids) + FRAME_OVERHEAD_BYTES for frame in frames)
            self._segments.append(Segment(number, stored, [entry_of(frame) for frame in frames]))
            self._appended, self._time = self._segments[-1].end, frames[-1].seen_time()
            self._stored_s = self._time.latest_s
        if damaged:
            for number in damaged:
                self._set_aside(number)
            raise self._damaged(damaged)

    def _lost_before(self, number: int, first: int, *, known: list[int]) -> list[int]:
        """Segments before `number`, which begins with record `first`, that lost records and are not `known`."""
        if not self._segments:
            return []
        last, aside = self._segments[-1], {*known, *self._numbers("damaged")}
        if number > last.number + 1:
            return [gone for gone in range(last.number + 1, number) if gone not in aside]
        if last.end == first:
            return []
        self._segments.pop()
        return [last.number]

    def _set_aside(self, number: int) -> None:
        """Durably take a damaged segment out of the way; one that is missing leaves an empty file."""
        name, new = self._name(number), self._name(number, "damaged")
        if number in self._numbers("recordings"):
            self._store.set_aside(name, new)
        else:
            self._store.write(new, b"")

    def _damaged(self, numbers: list[int]) -> StoreError:
        """The sentence about damage."""
        names = ", ".join(self._name(number) for number in numbers)
        aside = ", ".join(self._name(number, "damaged") for number in numbers)
        return StoreError(
            f"the recordings of stream {self._stream} are damaged or incomplete in {names}, now set aside as {aside}; "
            "the others are whole: start again to go on with them"
        )

    def _entries(self) -> Iterator[FrameEntry]:
        """All frames, oldest first."""
        return (entry for segment in self._segments for entry in segment.entries)

    def _numbers(self, folder: str) -> list[int]:
        """Numbers of the stream's segments in a folder, in order."""
        prefix = f"{folder}/{self._stream}."
        found = (name.removeprefix(prefix) for name in self._store.names(prefix))
        return sorted(int(number) for number in found if number.isdecimal())

    def _next_number(self) -> int:
        """Number of a new segment: never one that was used, or an old segment could be put in its place."""
        return max([0, *self._numbers("damaged"), *(segment.number for segment in self._segments)]) + 1

    def _name(self, number: int, folder: str = "recordings") -> str:
        """A segment's name."""
        return f"{folder}/{self._stream}.{number:08d}"


def _check_time(time_s: float) -> None:
    """Refuse a time that is none. Raises StoreError."""
    if not math.isfinite(time_s):
        raise StoreError(f"expected a time in Unix seconds, got {time_s}; nothing was stored")
