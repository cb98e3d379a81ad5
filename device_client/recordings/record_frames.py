"""What a frame of recordings holds, and the index of it that stays in memory. Pure."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from device_client.errors import StoreError
from device_client.ports import Float32, Labels
from device_client.recordings.retention import SeenTime

ID_BYTES = 16


class RecordFrame(msgspec.Struct, frozen=True, array_like=True):
    """Records that were stored together, little-endian; one without records marks the time.

    Args:
        first: how many records were stored before these, ever.
        time: `SeenTime` as it was then: passed_s, latest_s, highest_s.
        shape: of one window.
        label_columns: K of float32 labels [n, K]; 0 for int32 labels [n].
        ids: 16 random bytes a record.
        x: float32 [n, *shape].
        y: labels.
    """

    first: int
    time: tuple[float, float, float]
    shape: tuple[int, ...] = ()
    label_columns: int = 0
    ids: bytes = b""
    x: bytes = b""
    y: bytes = b""

    def __len__(self) -> int:
        return len(self.ids) // ID_BYTES

    def seen_time(self) -> SeenTime:
        """The time when it was stored."""
        return SeenTime(*self.time)

    def windows(self) -> Float32:
        """The windows, float32 [n, *shape]."""
        return np.frombuffer(self.x, "<f4").reshape(-1, *self.shape)

    def labels(self) -> Labels:
        """The labels."""
        if self.label_columns:
            return np.frombuffer(self.y, "<f4").reshape(-1, self.label_columns)
        return np.frombuffer(self.y, "<i4")


@dataclass(frozen=True)
class FrameEntry:
    """A frame without its records: `marks` uint64 [n] decides which are held out."""

    first: int
    passed_s: float
    marks: NDArray[np.uint64]

    @property
    def end(self) -> int:
        """Number of the record after its last."""
        return self.first + len(self.marks)


@dataclass
class Segment:
    """One file: its number, its bytes, roughly, and its frames, of which there is at least one."""

    number: int
    stored_bytes: int
    entries: list[FrameEntry]

    @property
    def first(self) -> int:
        """Number of its first record."""
        return self.entries[0].first

    @property
    def end(self) -> int:
        """Number of the record after its last."""
        return self.entries[-1].end


def new_frame(x: Float32, y: Labels, *, first: int, time: SeenTime, ids: bytes) -> RecordFrame:
    """A frame of records.

    Args:
        x: float32 [n, ...].
        y: int32 [n] or float32 [n, K].
        first: how many records were stored before, ever.
        time: now.
        ids: 16 random bytes a record.
    """
    columns = y.shape[1] if y.ndim == 2 else 0
    return RecordFrame(
        first=first,
        time=(time.passed_s, time.latest_s, time.highest_s),
        shape=x.shape[1:],
        label_columns=columns,
        ids=ids,
        x=np.ascontiguousarray(x, "<f4").tobytes(),
        y=np.ascontiguousarray(y, "<f4" if columns else "<i4").tobytes(),
    )


def time_mark(first: int, time: SeenTime) -> RecordFrame:
    """A frame that only says what time it is."""
    return RecordFrame(first, (time.passed_s, time.latest_s, time.highest_s))


def entry_of(frame: RecordFrame) -> FrameEntry:
    """A frame without its records."""
    ids = (frame.ids[start : start + ID_BYTES] for start in range(0, len(frame.ids), ID_BYTES))
    marks = b"".join(hashlib.sha256(record_id).digest()[:8] for record_id in ids)
    return FrameEntry(frame.first, frame.time[0], np.frombuffer(marks, "<u8").astype(np.uint64))


def decode_frames(frames: list[bytes]) -> list[RecordFrame]:
    """The frames of a segment. Raises StoreError where another version of this program wrote them."""
    try:
        return [msgspec.msgpack.decode(frame, type=RecordFrame) for frame in frames]
    except msgspec.DecodeError as error:
        raise StoreError(
            f"the recordings cannot be read ({error}); another version of this program wrote them"
        ) from error
