"""How recordings come in: one message is one labelled recording, checked against the model's schema, cut into windows.

Invariants: nothing is resampled, scaled or relabelled silently (a conversion between units is noted to the sender); a
message is taken whole or refused in one sentence; what one message can make this process hold is bounded. A window that
is stored is one record, the unit of record-level privacy: overlapping windows put one moment into several records
(docs/recordings.md). No I/O: bytes, time and the store's `append` are arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from device_client.ports import Float32, Labels
from device_client.recordings.recording_msg import (
    Encoding,
    Label,
    Recording,
    RecordingError,
    check_finite,
    decode_recording,
    listed,
    shown,
)
from device_client.recordings.units import conversion_factor, spelt
from fl_protocol.errors import CoveyError
from fl_protocol.model_manifest import InputSchema, LabelSchema, label_array, label_problem

MAX_WINDOW_VALUES = 4 * 1024 * 1024
"""Most numbers that the windows of one message may hold (16 MiB); a small hop makes many windows of few samples."""

RATE_TOLERANCE = 0.01
"""A sampling rate this much off, as a fraction, is taken for the model's: crystals and names of rates differ so."""


@dataclass(frozen=True, eq=False)
class Windows:
    """Records made of one recording.

    Args:
        x: float32 [n, ...] in the model's channels and units.
        y: int32 [n] or float32 [n, K].
        notes: what was changed or left out, as sentences for the sender.
    """

    x: Float32
    y: Labels
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class StreamTarget:
    """Where a stream's recordings go: what its model takes, and `WindowStore.append` (x, y, at_s= the time now)."""

    input: InputSchema
    label: LabelSchema
    append: Callable[..., int]


def ingest(
    payload: bytes, encoding: Encoding, *, streams: Mapping[str, StreamTarget], now_s: float
) -> dict[str, object]:
    """Take one message; the reply to its sender is ``{"stored": n, "notes": [...]}`` or ``{"error": sentence}``.

    Args:
        payload: one message.
        encoding: how it is encoded.
        streams: what each stream takes.
        now_s: the device's time, Unix seconds; records age from when they are stored, since the store reckons age by
            the time that it sees pass.
    """
    try:
        recording = decode_recording(payload, encoding)
        target = streams.get(recording.stream)
        if target is None:
            raise RecordingError(f"stream: expected one of {listed(sorted(streams))}, got {recording.stream}")
        windows = windows_from(recording, input=target.input, label=target.label)
        target.append(windows.x, windows.y, at_s=now_s)
    except CoveyError as error:  # the store's own too, such as a full disk
        return {"error": str(error)}
    return {"stored": len(windows.x), "notes": list(windows.notes)}


def encode_reply(reply: Mapping[str, object], encoding: Encoding) -> bytes:
    """A reply, encoded like the message that it answers."""
    return msgspec.json.encode(reply) if encoding == "json" else msgspec.msgpack.encode(reply)


def windows_from(
    recording: Recording,
    *,
    input: InputSchema,
    label: LabelSchema,
) -> Windows:
    """Check a recording against a model's schema and cut it into windows.

    Args:
        recording: as it came.
        input: what the model takes; with a time axis (shape (samples, channels) and a rate) the recording may be
            longer than a window, otherwise it is exactly one example.
        label: what the model predicts.

    Raises:
        RecordingError: channels, units, rate, rows, length or label do not fit; the text says which and what to do.
    """
    _check_axes(recording, input)
    _check_rate(recording.sampling_rate_hz, input.sampling_rate_hz)
    x, notes = _in_channels_and_units(recording, input)
    check_finite(x)
    windows, left_out = _cut(x, input, recording.hop)
    y = _labels(recording.label, len(windows), label)
    if left_out:
        notes.append(f"the last {left_out} samples were less than a window of {input.shape[0]} and were left out")
    if label.kind == "input" and recording.label is not None:
        notes.append("the model takes no label; the label was not stored")
    return Windows(windows, y, tuple(notes))


def has_time_axis(input: InputSchema) -> bool:
    """Whether longer recordings can be cut into windows of this schema."""
    return input.sampling_rate_hz > 0 and len(input.shape) == 2


def _check_axes(recording: Recording, input: InputSchema) -> None:
    """The recording has the schema's axes, and a name and a unit for each channel."""
    channels, units, shape = recording.channels, recording.units, recording.x.shape
    if len(units) != len(channels):
        raise RecordingError(f"units: expected one for each of {len(channels)} channels, got {len(units)}")
    if channels != input.channels:
        missing = [name for name in input.channels if name not in channels]
        extra = [name for name in channels if name not in input.channels]
        if missing or extra or len(channels) != len(input.channels):
            found = "; ".join(
                f"{what} {listed(names)}" for what, names in (("missing", missing), ("unknown", extra)) if names
            )
            raise RecordingError(
                f"channels: expected {listed(input.channels)}, each once, in any order; {found or 'one is there twice'}"
            )
    if has_time_axis(input):
        if len(shape) != 2 or shape[1] != len(channels):
            raise RecordingError(f"x: expected rows of {len(channels)} numbers, got an array of shape {shape}")
    elif shape != input.shape:
        raise RecordingError(f"x: expected exactly one example of shape {input.shape}, got {shape}")


def _check_rate(given_hz: float, expected_hz: float) -> None:
    """The rate is the model's, within the tolerance."""
    if expected_hz == 0 and given_hz != 0:
        raise RecordingError(
            f"sampling_rate_hz: expected 0, as this model's input has no time axis, got {given_hz:g} Hz"
        )
    if given_hz == 0 and expected_hz != 0:
        raise RecordingError(f"sampling_rate_hz: expected {expected_hz:g} Hz, got none; say it in every message")
    if not abs(given_hz - expected_hz) <= RATE_TOLERANCE * expected_hz:
        raise RecordingError(
            f"sampling_rate_hz: expected {expected_hz:g} Hz within {RATE_TOLERANCE:.0%}, got {given_hz:g} Hz; "
            f"resample to {expected_hz:g} Hz (with a low-pass filter when going down) before sending"
        )


def _in_channels_and_units(recording: Recording, input: InputSchema) -> tuple[NDArray[Any], list[str]]:
    """The samples in the schema's order of channels and in its units, and notes on what was converted."""
    x, units = recording.x, recording.units
    if recording.channels != input.channels:
        order = [recording.channels.index(name) for name in input.channels]
        x, units = x[..., order], tuple(units[index] for index in order)
    converted: dict[str, list[str]] = {}
    factors = np.ones(len(units))
    for index, (name, given, expected) in enumerate(zip(input.channels, units, input.units, strict=True)):
        if given == expected:
            continue
        factors[index] = conversion_factor(name, given, expected)
        if factors[index] != 1:
            converted.setdefault(f"converted from {spelt(given)} to {spelt(expected)}", []).append(name)
    if converted:
        x = x.astype(np.float64) * factors
    with np.errstate(over="ignore"):  # too large for float32 becomes infinite, which the next check names
        return x.astype(np.float32), [f"{', '.join(names)}: {what}" for what, names in converted.items()]


def _cut(x: NDArray[Any], input: InputSchema, hop: int | None) -> tuple[Float32, int]:
    """Windows [n, ...], contiguous, and how many samples at the end were too few for one more."""
    if not has_time_axis(input):
        if hop is not None:
            raise RecordingError("hop: expected none, as this model's input has no time axis to cut along")
        return x[np.newaxis].astype(np.float32), 0
    length = input.shape[0]
    step = length if hop is None else hop
    if len(x) < length:
        raise RecordingError(f"x: expected at least one window of {length} samples, got {len(x)}")
    count = (len(x) - length) // step + 1
    if count * math.prod(input.shape) > MAX_WINDOW_VALUES:
        raise RecordingError(
            f"hop: {step} samples would make {count:,} windows, {MAX_WINDOW_VALUES:,} numbers are the most of one "
            "message; take a larger hop or send it in pieces"
        )
    views = np.lib.stride_tricks.sliding_window_view(x, length, axis=0)[::step]
    left_out = len(x) - ((count - 1) * step + length) if step <= length else 0
    return np.ascontiguousarray(np.moveaxis(views, -1, 1)), left_out


def _labels(given: Label, count: int, label: LabelSchema) -> Labels:
    """The recording's label for each of its windows."""
    if label.kind == "input":
        return label_array(None, count, label=label)
    if given is None:
        raise RecordingError(f"label: expected {_wanted(label)}, got none")
    if label.kind == "class":
        return label_array([_class_index(given, label)] * count, count, label=label)
    numbers = [given] if isinstance(given, int | float) else given
    if isinstance(numbers, str) or not all(type(number) in {int, float} for number in numbers):
        raise RecordingError(f"label: expected {_wanted(label)}, got {shown(given)}")
    try:
        with np.errstate(over="ignore"):  # too large for float32 becomes infinite, which the check names
            y = label_array(np.tile(np.array([numbers], np.float64), (count, 1)), count, label=label)
    except OverflowError:
        raise RecordingError(f"label: expected {_wanted(label)}, got {shown(given)}") from None
    problem = label_problem(y, label)
    if problem:
        raise RecordingError(f"label: expected {_wanted(label)}; {problem}")
    return y


def _class_index(given: Label, label: LabelSchema) -> int:
    """Which class a name or an index means."""
    if isinstance(given, str) and given in label.names:
        return label.names.index(given)
    if type(given) in {int, float} and given in range(len(label.names)):
        return int(given)  # type: ignore[arg-type] # a whole number, as it is in the range
    raise RecordingError(f"label: expected {_wanted(label)}, got {shown(given)}")


def _wanted(label: LabelSchema) -> str:
    """What a label of this schema looks like."""
    if label.kind == "class":
        return f"one of {listed(label.names)}, or its index from 0 to {len(label.names) - 1}"
    kind = "0 or 1" if label.kind == "binary" else "a number"
    return f"{kind} for each of {listed(label.names)}"
