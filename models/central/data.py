"""Recordings for central training: an ``.npz`` with x and y, checked against the bundle, never unpickled."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from device_client.ports import Float32
from device_client.training import Records
from fl_protocol.errors import LocalMisuseError
from fl_protocol.model_manifest import BundleManifest, label_array, label_problem

_UNREADABLE = (
    ValueError,
    EOFError,
    zipfile.BadZipFile,
    zlib.error,
    AttributeError,
    TypeError,
    NotImplementedError,
    RuntimeError,
    MemoryError,
)
"""What numpy raises for a file that is of another kind, damaged, a pickle, or a single array."""


def read_records(path: Path, manifest: BundleManifest, *, option: str) -> Records:
    """The examples x [n, ...] and labels y of an ``.npz``, as the graph takes them.

    Numbers of any kind become float32 as they are: 8-bit images stay 0 to 255, and scaling is the graph's.

    Args:
        path: of the file.
        manifest: of the bundle that will be trained.
        option: what errors call the file, such as ``--data``.

    Raises:
        LocalMisuseError: the file cannot be read, or its arrays do not fit the model.
    """
    name = f"{option} {path}"
    x, y = _arrays(path, name)
    checked = _checked_x(name, x, manifest)
    if y is not None and (y.ndim == 0 or len(y) != len(checked)):
        raise LocalMisuseError(f"{name}: there are {len(checked)} examples in x and y has shape {list(y.shape)}.")
    if y is not None and y.dtype.kind not in "fiub":
        raise LocalMisuseError(f"{name}: y holds {y.dtype}; expected numbers.")
    try:
        labels = label_array(y, len(checked), label=manifest.label)
    except KeyError:
        raise LocalMisuseError(f"{name}: there is no array y, and the model needs labels.") from None
    except ValueError as error:
        raise LocalMisuseError(f"{name}: {error}.") from error
    if labels.ndim != (1 if manifest.label.kind in ("class", "input") else 2):
        raise LocalMisuseError(f"{name}: y has shape {list(labels.shape)}; expected one class index an example.")
    problem = label_problem(labels, manifest.label)
    if problem:
        raise LocalMisuseError(f"{name}: {problem}.")
    return Records(checked, labels)


def _arrays(path: Path, name: str) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """The members x and y."""
    try:
        # Security: a pickle can run any code.
        with np.load(path, allow_pickle=False) as archive:
            found = {member: archive[member] for member in ("x", "y") if member in archive}
    except OSError as error:
        raise LocalMisuseError(f"{name}: cannot be read ({error.strerror or error}).") from error
    except _UNREADABLE as error:
        raise LocalMisuseError(f"{name}: expected an .npz file with the arrays x and y.") from error
    if "x" not in found:
        raise LocalMisuseError(f"{name}: there is no array x.")
    return found["x"], found.get("y")


def _checked_x(name: str, x: NDArray[Any], manifest: BundleManifest) -> Float32:
    """Finite float32 examples of the model's shape, at least one."""
    shape = manifest.input.shape
    if x.ndim == 0 or x.shape[1:] != shape or not len(x):
        raise LocalMisuseError(
            f"{name}: the model takes x of shape [n, {', '.join(map(str, shape))}], got {list(x.shape)}."
        )
    if x.dtype.kind not in "fiub":
        raise LocalMisuseError(f"{name}: x holds {x.dtype}; expected numbers.")
    with np.errstate(over="ignore"):
        numbers = np.ascontiguousarray(x, np.float32)
    spoilt = ~np.isfinite(numbers.reshape(len(numbers), -1)).all(1)
    if spoilt.any():
        raise LocalMisuseError(
            f"{name}: x[{int(spoilt.argmax())}] holds NaN or infinity, {int(spoilt.sum())} examples in all: leave them "
            "out."
        )
    return numbers
