"""Whether windows and labels are what a model takes. Pure."""

from __future__ import annotations

import numpy as np

from device_client.errors import StoreError
from device_client.ports import Float32, Labels
from device_client.recordings.record_frames import RecordFrame
from fl_protocol.model_manifest import LabelSchema, label_problem


def label_columns(label: LabelSchema) -> int:
    """K of float32 labels [n, K]; 0 for int32 labels [n]."""
    return len(label.names) if label.kind in {"binary", "value"} else 0


def fitting_batch(
    x: Float32, y: Labels, *, window_shape: tuple[int, ...], label: LabelSchema
) -> tuple[Float32, Labels]:
    """The arrays as float32 and int32 or float32, if the model takes them.

    Args:
        x: windows [n, *window_shape].
        y: labels [n] or [n, K].
        window_shape: of one window.
        label: what the model predicts.

    Raises:
        StoreError: it does not take them.
    """
    with np.errstate(over="ignore"):
        x = np.asarray(x, np.float32)
    if x.ndim != len(window_shape) + 1 or x.shape[1:] != window_shape:
        raise StoreError(f"the windows are {x.shape[1:]}, the model takes {window_shape}; nothing was stored")
    if not np.isfinite(x).all():
        raise StoreError("the windows hold numbers that are not finite; nothing was stored")
    columns, given = label_columns(label), np.asarray(y)
    shape = (len(x), columns) if columns else (len(x),)
    if given.shape != shape or given.dtype.kind not in ("iuf" if columns else "iu"):
        kind = "float32" if columns else "int32"
        raise StoreError(
            f"the labels are {given.dtype} {given.shape}, the model takes {kind} {shape}; nothing was stored"
        )
    with np.errstate(over="ignore"):
        labels: Labels = given.astype(np.float32) if columns else given.astype(np.int32)
    problem = label_problem(labels if columns else given, label)
    if problem:
        raise StoreError(f"{problem}; nothing was stored")
    return x, labels


def check_stored(frame: RecordFrame, *, stream: str, window_shape: tuple[int, ...], label: LabelSchema) -> None:
    """Whether stored records suit the model.

    Args:
        frame: the records.
        stream: where they lie, for the sentence.
        window_shape: of one window, as the model takes it.
        label: what the model predicts.

    Raises:
        StoreError: they do not.
    """
    columns = label_columns(label)
    if frame.shape != window_shape:
        problem = f"the windows are {frame.shape}, the model takes {window_shape}"
    elif frame.label_columns != columns:
        stored, wanted = (f"{count} numbers" if count else "a class" for count in (frame.label_columns, columns))
        problem = f"a label is {stored}, the model takes {wanted}"
    else:
        problem = label_problem(frame.labels(), label)
    if problem:
        raise StoreError(
            f"the recordings of stream {stream} are another model's: {problem}; name another stream in the study's "
            "configuration, or run covey-device erase --data"
        )
