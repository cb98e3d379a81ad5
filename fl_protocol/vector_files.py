"""Vectors of float32 as ``.npy`` files: written in one way, and read from bytes that nobody vouches for. Pure."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fl_protocol.errors import BundleError, LocalMisuseError


def save_vector(vector: NDArray[np.float32], count: int) -> bytes:
    """A vector of `count` as ``.npy`` bytes. Raises LocalMisuseError."""
    stream = io.BytesIO()
    np.save(stream, checked_vector(vector, count))
    return stream.getvalue()


def load_vector(member: str, raw: bytes, count: int | None) -> NDArray[np.float32]:
    """A vector from its ``.npy`` bytes; pickles are never loaded.

    Args:
        member: whose bytes they are, for the error.
        raw: untrusted.
        count: how long it has to be; None for any length.

    Raises:
        BundleError: it is something else.
    """
    stream = io.BytesIO(raw)
    try:
        if np.lib.format.read_magic(stream) != (1, 0):  # type: ignore[no-untyped-call]
            raise ValueError("expected .npy version 1.0")
        shape, _fortran, dtype = np.lib.format.read_array_header_1_0(stream)  # type: ignore[no-untyped-call]
        data = raw[stream.tell() :]
        wanted = len(data) // 4 if count is None else count
        if (shape, dtype.str) != ((wanted,), "<f4"):
            raise ValueError(f"expected <f4 [{wanted}], got {dtype.str} {list(shape)}")
        return checked_vector(np.frombuffer(data, "<f4").astype(np.float32), wanted)
    # numpy reads the header as a Python literal: TokenError, IndentationError, RecursionError, MemoryError, TypeError.
    except Exception as error:
        cause = error if isinstance(error, ValueError) else f"its header is none: {type(error).__name__}"
        raise BundleError(f"The bundle's {member} cannot be used ({cause}): get the bundle again.") from error


def checked_vector(values: Any, count: int) -> NDArray[np.float32]:
    """`values` as a contiguous float32 [count] vector of finite numbers. Raises LocalMisuseError."""
    array = np.ascontiguousarray(values)
    if array.dtype != np.float32 or array.shape != (count,):
        raise LocalMisuseError(f"parameters: expected float32 [{count}], got {array.dtype} {list(array.shape)}")
    if not np.isfinite(array).all():
        raise LocalMisuseError("parameters: expected finite numbers, got NaN or infinity")
    return array
