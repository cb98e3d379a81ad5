"""The sum of a vector's squares, without BLAS's threads. Pure."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_BLOCK = 8192
"""So few numbers that BLAS starts no threads for them, which would spin on the cores that others need."""


def squared_norm(values: NDArray[np.floating[Any]]) -> float:
    """Sum of squares of floats [d], each block's in the values' own precision; may overflow to infinity."""
    squared = 0.0
    for start in range(0, len(values), _BLOCK):
        part = values[start : start + _BLOCK]
        squared += float(np.dot(part, part))
    return squared
