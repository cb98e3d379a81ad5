"""Random bytes that follow from a seed, for simulations only: whoever knows the seed knows every key and all noise."""

from __future__ import annotations

import hashlib
from collections.abc import Callable


class SeededEntropy:
    """`fl_protocol.integer_noise.Entropy`: SHAKE-256 of a seed and the number of the call.

    Args:
        seed: another one gives other bytes.

    Attributes:
        told: of everything that is drawn.
    """

    def __init__(self, seed: str) -> None:
        self._seed, self._counter = seed.encode(), 0
        self.told: Callable[[bytes], None] | None = None

    def __call__(self, count: int) -> bytes:
        """The next `count` bytes."""
        self._counter += 1
        drawn = hashlib.shake_256(self._counter.to_bytes(8, "little") + self._seed).digest(count)
        if self.told is not None:
            self.told(drawn)
        return drawn
