"""Streams of random numbers that are found by what they are for, not by who asked before. Pure.

NumPy's seed sequences hash all entropy words into the state of a generator (M. O'Neill's design; numpy.random,
"Parallel random number generation"), so a device's streams are the same whatever was drawn for other devices. For
simulated recordings only: never for noise that privacy rests on, nor for keys.
"""

from __future__ import annotations

import enum

import numpy as np


class Purpose(enum.IntEnum):
    """What a stream is for."""

    HABITS = 1
    DAY = 2
    BODY = 3
    WINDOW = 4
    STYLE = 5
    WRONG_LABEL = 6
    DRIFT = 7
    TEST_SET = 8


def stream(seed: int, purpose: Purpose, *names: int) -> np.random.Generator:
    """The stream of a purpose.

    Args:
        seed: of the run, at least 0.
        purpose: what is drawn.
        names: of what it is drawn for, such as a device and a day; each at least 0.
    """
    return np.random.default_rng([seed, int(purpose), *names])
