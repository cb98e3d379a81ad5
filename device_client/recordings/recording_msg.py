"""One recording as it is sent, or given in Python: the message, decoded strictly into arrays. No I/O.

Invariants: `RecordingError` is the only error that decoding raises; a broken row is named by its number; what a message
can make this process hold is bounded. Whether it fits a model is checked in `ingestion`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from device_client.errors import DeviceError
from fl_protocol.model_manifest import InputSchema
from fl_protocol.topics import NAME_PATTERN

Encoding = Literal["json", "msgpack"]
Label = str | int | float | Sequence[float] | None

MAX_MESSAGE_BYTES = 2 * 1024 * 1024
"""Largest message; decoded JSON takes up to some forty times its bytes for a moment."""

_MAX_DIMENSIONS = 4


class RecordingError(DeviceError):
    """A recording cannot be taken: it is malformed, or not what the model takes; nothing of it was stored."""


class RecordingMsg(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One recording as it is sent, JSON or MessagePack.

    Args:
        channels: a name for each entry of the last axis of `x`.
        units: one per channel.
        sampling_rate_hz: samples per second; 0 or absent where the model's first axis is not time.
        x: rows [samples][channels] of numbers; in MessagePack also bytes, little-endian float32, with `shape`.
        shape: of `x`, where that is bytes.
        label: class name or index; a number, or a list of one number for each of the model's labels.
        stream: the stream that takes it.
        hop: samples between the starts of successive windows; by default a window's length: no overlap.
    """

    channels: Annotated[tuple[str, ...], Meta(min_length=1)]
    units: tuple[str, ...]
    x: Any
    sampling_rate_hz: Annotated[float, Meta(ge=0)] = 0.0
    shape: Annotated[tuple[Annotated[int, Meta(ge=1)], ...], Meta(min_length=1, max_length=_MAX_DIMENSIONS)] | None = (
        None
    )
    label: str | int | float | tuple[float, ...] | None = None
    stream: Annotated[str, Meta(pattern=NAME_PATTERN)] = "default"
    hop: Annotated[int, Meta(ge=1)] | None = None


@dataclass(frozen=True, eq=False)
class Recording:
    """One labelled recording, not yet checked against a model; fields as in `RecordingMsg`.

    Args:
        x: [samples, ..., channels], numbers of any kind; may hold NaN.
    """

    channels: tuple[str, ...]
    units: tuple[str, ...]
    sampling_rate_hz: float
    x: NDArray[Any]
    label: Label = None
    stream: str = "default"
    hop: int | None = None


def decode_recording(payload: bytes, encoding: Encoding) -> Recording:
    """One message, decoded strictly; what it says is not yet checked against a model.

    Raises:
        RecordingError: it is too large, malformed, has an unknown field, or rows that are not numbers.
    """
    if len(payload) > MAX_MESSAGE_BYTES:
        raise RecordingError(
            f"message: expected at most {MAX_MESSAGE_BYTES:,} bytes, got {len(payload):,}; send it in pieces"
        )
    decode = msgspec.json.decode if encoding == "json" else msgspec.msgpack.decode
    try:
        message = decode(payload, type=RecordingMsg)
    # msgspec: UnicodeDecodeError for strings that are not UTF-8, RecursionError for deep nesting.
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        if encoding == "json":
            _blame_rows_of_nan(payload)
        raise RecordingError(f"message: expected one recording in {encoding}, got something else ({error})") from error
    if not math.isfinite(message.sampling_rate_hz):
        raise RecordingError(f"sampling_rate_hz: expected a finite number, got {message.sampling_rate_hz}")
    channels = len(message.channels)
    x = (
        _from_bytes(message.x, message.shape, channels)
        if isinstance(message.x, bytes)
        else _from_rows(message.x, message.shape, channels)
    )
    return Recording(
        channels=message.channels,
        units=message.units,
        sampling_rate_hz=message.sampling_rate_hz,
        x=x,
        label=message.label,
        stream=message.stream,
        hop=message.hop,
    )


def recording_of(
    x: Any,
    label: Any,
    *,
    input: InputSchema,
    stream: str = "default",
    hop: int | None = None,
) -> Recording:
    """A recording from Python, already in the model's own channels, units and rate.

    Args:
        x: [samples, channels], or one example in the schema's shape; numbers.
        label: class name or index, a number, or K numbers.
        input: the schema that the caller vouches for.
        stream: the stream that takes it.
        hop: samples between the starts of successive windows; None for no overlap.

    Raises:
        RecordingError: `x` is not an array of numbers, or an argument is out of range.
    """
    try:
        array = np.asarray(x)
    except ValueError:  # rows of different lengths
        array = np.empty(0, object)
    if array.dtype.kind not in "iuf":
        raise RecordingError("x: expected an array of numbers, every row as long as the others")
    if hop is not None and hop < 1:
        raise RecordingError(f"hop: expected at least 1 sample, got {hop}")
    plain = label.tolist() if isinstance(label, np.ndarray | np.generic) else label
    return Recording(input.channels, input.units, input.sampling_rate_hz, array, plain, stream, hop)


def _from_bytes(raw: bytes, shape: tuple[int, ...] | None, channels: int) -> NDArray[Any]:
    """Little-endian float32 in a shape."""
    if shape is None:
        raise RecordingError("shape: expected one beside x as bytes, such as [samples, channels], got none")
    if shape[-1] != channels or math.prod(shape) * 4 != len(raw):
        raise RecordingError(
            f"x: expected float32 of shape {shape} with {channels} channels last, got {len(raw):,} bytes"
        )
    return np.frombuffer(raw, "<f4").reshape(shape)


def _from_rows(rows: Any, shape: tuple[int, ...] | None, channels: int) -> NDArray[np.float64]:
    """Nested lists of numbers; a row that is not like the first is named."""
    if shape is not None:
        raise RecordingError("shape: expected only beside x as bytes, got one beside rows")
    if not isinstance(rows, list) or not rows:
        raise RecordingError(f"x: expected a list of rows of numbers, got {shown(rows)}")
    inner: list[int] = []
    probe = rows[0]
    while isinstance(probe, list) and len(inner) < _MAX_DIMENSIONS:
        inner.append(len(probe))
        probe = probe[0] if probe else None
    if inner:
        inner[-1] = channels  # so that a first row with too few is the one that is named
    if len(inner) >= _MAX_DIMENSIONS:
        raise RecordingError(f"x: expected at most {_MAX_DIMENSIONS} axes, got rows nested deeper")
    for index, row in enumerate(rows):
        if not _fits(row, inner):
            raise RecordingError(f"x, row {index} (the first is 0): {_fault(row, inner)}")
    return np.array(rows, np.float64)


def _fits(item: Any, shape: list[int]) -> bool:
    """Whether an item is nested lists of this shape, of numbers only (a bool is none)."""
    if not shape:
        return type(item) is float or type(item) is int
    if type(item) is not list or len(item) != shape[0]:
        return False
    if len(shape) == 1:
        return all(type(value) is float or type(value) is int for value in item)
    return all(_fits(part, shape[1:]) for part in item)


def _fault(row: Any, shape: list[int]) -> str:
    """What is wrong with a row, as half a sentence."""
    expected = f"{' x '.join(map(str, shape))} numbers" if shape else "a number"
    if len(shape) == 1 and isinstance(row, list):
        if len(row) != shape[0]:
            return f"expected {expected}, one for each channel, got {len(row)}"
        column = next(index for index, value in enumerate(row) if not _fits(value, []))
        return f"expected {expected}, got {shown(row[column])} in column {column}"
    return f"expected {expected}, got {shown(row)}"


def _blame_rows_of_nan(payload: bytes) -> None:
    """Name the row where a sender wrote the NaN or Infinity that JSON does not have (Python's json does)."""
    if b"NaN" not in payload and b"Infinity" not in payload:
        return
    try:
        loose = json.loads(payload)
        rows, channels = loose["x"], len(loose["channels"])
        x = _from_rows(rows, None, channels)
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return  # broken in other ways too: the caller says so
    check_finite(x)


def check_finite(x: NDArray[Any]) -> None:
    """Refuse NaN and infinity.

    Args:
        x: [samples, ...], at least one.

    Raises:
        RecordingError: there is one; the text names its row.
    """
    finite = np.isfinite(x)
    if not finite.all():
        row = int(np.argmin(finite.reshape(len(x), -1).all(axis=1)))
        raise RecordingError(
            f"x, row {row} (the first is 0): expected finite numbers in the range of float32, got NaN, infinity or "
            "one beyond; leave broken samples out and send the pieces around them as recordings of their own"
        )


def listed(names: Sequence[str]) -> str:
    """Names for a sentence; a sender's list may be long."""
    shown = ", ".join(name if len(name) <= 40 else name[:37] + "..." for name in names[:12])
    return f"{shown} and {len(names) - 12} more" if len(names) > 12 else shown or "none"


def shown(value: object) -> str:
    """A value for a sentence, cut short."""
    if isinstance(value, list | tuple) and len(value) > 8:
        return f"{len(value)} entries"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
