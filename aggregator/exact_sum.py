"""Sums that do not depend on the order of their terms, so that restarts, shards and workers change no bit of a model.

A float32 value is rounded to the nearest multiple of 2^-32 (ties to even); such multiples add up exactly, as integers
or as float64 of moderate size, and exact addition is associative, while that of rounded floats is not. (J. Demmel and
H. D. Nguyen, "Fast Reproducible Floating-Point Summation", 2013, get the same by splitting floats against a common
grid.) Rounding changes a value by at most 2^-33, which for any value above 2^-9 is less than float32 itself rounds by.

**No overflow.** An update whose L2 norm is above `LARGEST_NORM` is refused, so no value exceeds 2^10 and `MOST_UPDATES`
of them stay below 2^62 in int64. Masked updates are words below 2^32, of which as many stay below 2^52.

**From float to integer in one addition.** From 2^20 to 2^21, float64 has just the multiples of 2^-32, and their bits,
read as an integer, count them. So the sum of a value and R = 1.5 * 2^20 is rounded as it should be (R is an even
multiple, so that ties go to even multiples of the value too), and its bits are those of R, plus the value in units of
2^-32. They are added up modulo 2^64, and the bits of R are taken off once for all updates.

**A few updates at a time.** The sum is larger than the processor's cache and twice as long as an update, so each part
of it is fetched once for several updates. Pure.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aggregator.errors import CombineError
from fl_protocol.squared_norm import squared_norm

LARGEST_NORM = 2.0**10
"""Largest L2 norm of an update; what training gives is a thousandth of it."""
MOST_UPDATES = 2**20
UNIT = 2.0**-32
"""What 1 in a total stands for."""
_ROUNDER = 1.5 * 2.0**20
_ROUNDER_BITS = int(np.float64(_ROUNDER).view(np.int64))
_MOST_WAITING, _MOST_WAITING_BYTES = 8, 32 * 2**20
_BLOCK = 65_536  # float64 blocks of this many stay in the processor's cache


def norm_of(values: NDArray[np.float32]) -> float:
    """L2 norm; infinite or NaN exactly if a value is, or if the norm does not fit float32."""
    squared = squared_norm(values)
    if math.isnan(squared):  # no square of a number is
        return math.nan
    if squared == 0 and values.max(initial=0) == values.min(initial=0):
        return 0.0
    # Of values near the limits the squares may underflow; float64 has room for all of them.
    return math.sqrt(squared) if 1e-20 < squared < math.inf else float(np.linalg.norm(values.astype(np.float64)))


class ExactSum:
    """A running sum of updates.

    Args:
        total: int64 [d], of earlier ones in units of `UNIT`; it is changed in place.
        count: how many went into it.
    """

    def __init__(self, total: NDArray[np.int64], count: int = 0) -> None:
        self._total, self.count = total, count
        self._num_rounders = 0  # whose bits are in the total
        self._waiting: list[NDArray[np.float32]] = []
        self._block = np.empty(min(_BLOCK, len(total)))

    @classmethod
    def zeros(cls, length: int) -> ExactSum:
        """The sum of nothing."""
        return cls(np.zeros(length, np.int64))

    @property
    def total(self) -> NDArray[np.int64]:
        """The sum, int64 [d] in units of `UNIT`."""
        self._add_waiting()
        if self._num_rounders:
            modular = self._total.view(np.uint64)
            modular -= np.uint64(self._num_rounders * _ROUNDER_BITS % 2**64)
            self._num_rounders = 0
        return self._total

    def add(self, values: NDArray[np.float32]) -> None:
        """Add one update, float32 [d], whose norm was checked; it must not be changed until `total` is looked at.

        Raises CombineError when there are too many.
        """
        self._make_room(1)
        self._waiting.append(values)
        self.count += 1
        if len(self._waiting) == _MOST_WAITING or len(self._waiting) * values.nbytes >= _MOST_WAITING_BYTES:
            self._add_waiting()

    def _add_waiting(self) -> None:
        """Add what was put off."""
        for start in range(0, len(self._total) if self._waiting else 0, _BLOCK):
            total = self._total[start : start + _BLOCK]
            block = self._block[: len(total)]
            for values in self._waiting:
                block[:] = values[start : start + _BLOCK]
                block += _ROUNDER
                total += block.view(np.int64)
        self._num_rounders += len(self._waiting)
        self._waiting.clear()

    def add_masked(self, vector: NDArray[np.unsignedinteger[Any]]) -> None:
        """Add one masked update, words [d] of at most 32 bits; `total` is then a sum of words. Raises CombineError."""
        self._make_room(1)
        total = self.total
        total += vector
        self.count += 1

    def merge(self, other: ExactSum) -> None:
        """Add another sum. Raises CombineError when there are too many updates in both."""
        self._make_room(other.count)
        total = self.total
        total += other.total
        self.count += other.count

    def _make_room(self, more: int) -> None:
        """Refuse what could overflow."""
        if self.count + more > MOST_UPDATES:
            raise CombineError(f"a round takes at most {MOST_UPDATES} updates; lower its goal")
