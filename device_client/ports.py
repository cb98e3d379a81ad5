"""What the device's core needs of the outside, as small Protocols; `adapters` and the simulator implement them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from device_client.eligibility import Conditions
from fl_protocol.integer_noise import Entropy
from fl_protocol.model_manifest import DropoutMask
from fl_protocol.transport import Transport

__all__ = ["Bell", "Board", "Clock", "Entropy", "Graph", "Store", "Transport", "Watchdog"]

Float32 = NDArray[np.float32]
Labels = NDArray[np.int32] | NDArray[np.float32]
"""Class indices int32 [n], or float32 [n, K] (`fl_protocol.model_manifest.LabelSchema`)."""


class Clock(Protocol):
    """Where the time comes from."""

    def now_s(self) -> float:
        """Unix seconds."""

    def local_time_s(self) -> float:
        """Seconds since local midnight, as a clock on the wall shows them."""


class Bell(Protocol):
    """What the daemon waits on when there is nothing to do, so that it need not look again and again."""

    def ring(self) -> None:
        """End the wait, from any thread or signal handler; a ring before the wait counts."""

    def wait(self, timeout_s: float) -> None:
        """Wait for a ring, at most so long."""


class Watchdog(Protocol):
    """Who wants to know that the daemon lives."""

    def alive(self, status: str) -> None:
        """Called in every turn of the loop; `status` is for people."""

    @property
    def longest_wait_s(self) -> float:
        """How long the daemon may be silent."""


class Board(Protocol):
    """The sensors that decide whether this device may train now."""

    def read(self) -> Conditions:
        """The readings of this moment; a sensor that fails is named in them, never raised."""


class Graph(Protocol):
    """One loaded trainable TFLite graph (design section 3); the first axis of every array is of a static size."""

    @property
    def batch_size(self) -> int:
        """B, the rows that `evaluate` takes, and the most that `train` does."""

    @property
    def train_sizes(self) -> tuple[int, ...]:
        """How many rows `train` may be given, ascending; the last is B."""

    @property
    def dropout(self) -> tuple[DropoutMask, ...]:
        """The masks that `train` has to be fed; empty for a model without dropout."""

    def train(
        self,
        params: Float32,
        x: Float32,
        y: Labels,
        mask: Float32,
        *,
        clip: float,
        dropout: Float32 | None = None,
    ) -> Float32:
        """Sum [d] over the rows with mask 1 of their gradients, each scaled to an L2 norm of at most `clip`.

        Args:
            params: float32 [d].
            x: float32 [R, ...], R one of `train_sizes`.
            y: labels of the R rows.
            mask: float32 [R], 1 for a record and 0 for padding.
            clip: the L2 norm clip.
            dropout: float32 [R, units of all masks], 1 where a unit is kept; only for a model with dropout.
        """

    def evaluate(self, params: Float32, x: Float32, y: Labels, mask: Float32) -> tuple[float, float]:
        """Summed loss, and number predicted correctly, over the rows with mask 1."""


class Store(Protocol):
    """Named blobs, encrypted and authenticated at rest, replaced atomically and durably."""

    def read(self, name: str) -> bytes | None:
        """The blob, or None if there is none. Raises StoreError if it was tampered with."""

    def write(self, name: str, data: bytes) -> None:
        """Durably replace the blob. Raises StoreError, the old blob untouched, when the disk does not take it."""

    def delete(self, name: str) -> None:
        """Durably remove the blob, if there is one."""

    def names(self, prefix: str) -> Iterable[str]:
        """Names that begin with `prefix`, sorted."""

    def read_log(self, name: str) -> bytes:
        """All of an append-only log, empty if there is none."""

    def append_log(self, name: str, line: bytes) -> None:
        """Durably append one line (without its newline). Raises StoreError, the log unchanged, on failure."""

    def truncate_log(self, name: str, length: int) -> None:
        """Durably cut a log to its first `length` bytes (a line torn by a power cut)."""
