"""The port behind which work in the outbox holds its vectors. A device has one way, `IN_ENTRY`: they stand in the entry
itself, so that its store has all of it. No setting and no message names another; the simulator passes one where every
device of a process starts from the same array.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from device_client.ports import Float32


class WorkVectors(Protocol):
    """How a vector of the work in progress is written down; `InEntry` has all of its bytes."""

    def pack(self, values: Float32) -> bytes:
        """What stands for a vector, float32 [d], in an entry; of one with numbers it is not empty."""

    def unpack(self, packed: bytes) -> Float32:
        """The vector, float32 [d], not to be written to. Raises StoreError: it is not there any more."""


class InEntry:
    """Little-endian float32 bytes."""

    def pack(self, values: Float32) -> bytes:
        """All of them."""
        return np.ascontiguousarray(values, "<f4").tobytes()

    def unpack(self, packed: bytes) -> Float32:
        """A view of them."""
        return np.frombuffer(packed, "<f4").astype(np.float32, copy=False)


IN_ENTRY = InEntry()
