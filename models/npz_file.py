"""Recordings as ``train`` and ``export`` are given them: the arrays x and y of an ``.npz``, never unpickled."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fl_protocol.errors import LocalMisuseError
from fl_protocol.model_manifest import BundleManifest

UNREADABLE = (
    ValueError,
    EOFError,
    KeyError,
    zipfile.BadZipFile,
    zlib.error,
    AttributeError,
    TypeError,
    NotImplementedError,
    RuntimeError,
    MemoryError,
)
"""What numpy raises for a file that is of another kind, damaged, a pickle, or a single array."""


def read_arrays(path: Path, name: str) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """The members x and, if there is one, y.

    Args:
        path: of the file.
        name: what errors call it, such as ``--data windows.npz``.

    Raises:
        LocalMisuseError: the file cannot be read, or has no x.
    """
    try:
        # Security: a pickle can run any code.
        with np.load(path, allow_pickle=False) as archive:
            found = {member: archive[member] for member in ("x", "y") if member in archive}
    except OSError as error:
        raise LocalMisuseError(f"{name}: cannot be read ({error.strerror or error}).") from error
    except UNREADABLE as error:
        raise LocalMisuseError(f"{name}: expected an .npz file with the arrays x and y.") from error
    if "x" not in found:
        raise LocalMisuseError(f"{name}: there is no array x.")
    return found["x"], found.get("y")


def checked_x(name: str, x: NDArray[Any], manifest: BundleManifest, *, kinds: str) -> NDArray[np.float32]:
    """Finite float32 examples of the model's shape, at least one.

    Args:
        name: what errors call the file.
        x: any array.
        manifest: of the model.
        kinds: numpy's letters of the dtypes that are taken, such as ``fiu``.

    Raises:
        LocalMisuseError: they are not.
    """
    shape = manifest.input.shape
    if x.ndim == 0 or x.shape[1:] != shape or not len(x):
        raise LocalMisuseError(
            f"{name}: the model takes x of shape [n, {', '.join(map(str, shape))}], got {list(x.shape)}."
        )
    if x.dtype.kind not in kinds:
        raise LocalMisuseError(f"{name}: x holds {x.dtype}; expected numbers that can be taken as float32.")
    with np.errstate(over="ignore"):
        numbers = np.ascontiguousarray(x, np.float32)
    spoilt = ~np.isfinite(numbers.reshape(len(numbers), -1)).all(1)
    if spoilt.any():
        raise LocalMisuseError(
            f"{name}: x[{int(spoilt.argmax())}] holds NaN or infinity, {int(spoilt.sum())} examples in all: leave them "
            "out."
        )
    return numbers
