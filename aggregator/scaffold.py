"""The server's half of SCAFFOLD without an extra upload. Pure.

SCAFFOLD: S. P. Karimireddy et al., arXiv 1910.06378, algorithm 1 with option II. A device takes K plain steps
y <- y - eta (g(y) - c_i + c) from y = x and then sets c_i+ = c_i - c + (x - y) / (K eta). With its update
dy = y - x, the change of its control variate is therefore

    dc_i = c_i+ - c_i = -c - dy / (K eta),

which does not depend on c_i: c was published by the server, and dy is what the device sends anyway. The mean over a
round follows from the mean update alone, so nothing more is sent and nothing more is revealed; under noise at the
devices dy is the released, noisy change, and c is computed from released numbers only.

Algorithm 1 starts with c = mean of all c_i and moves c by |S| / N mean(dc_i), which keeps it that mean. When
devices join, they begin with c_i = 0, so the sum N c is what stays, and c is rescaled to the new N. An N that is only
an estimate scales every c alike: at the optimum c is zero whatever N is, so only the way there differs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aggregator.errors import CombineError


@dataclass(frozen=True)
class ServerControl:
    """The server's control variate as of one model version.

    Args:
        values: c, float32 [d], in units of a gradient.
        population: N that c is a mean over; 0 while c is still zero.
    """

    values: NDArray[np.float32]
    population: int = 0


@dataclass(frozen=True)
class PlainSteps:
    """The local steps that an update is the result of.

    Args:
        count: K, steps per round.
        learning_rate: eta on the device.
    """

    count: int
    learning_rate: float


def next_control(
    control: ServerControl, mean: NDArray[np.float64], *, count: int, population: int, steps: PlainSteps
) -> ServerControl:
    """C after a round: algorithm 1, line 17, for the N of now.

    Args:
        control: what the round's devices were sent.
        mean: of their updates, float64 [d], before the server's optimiser.
        count: |S|, updates in the mean, at least 1.
        population: N, devices that may take part; never taken as fewer than `count`.
        steps: what the round's plan asked for.

    Raises:
        CombineError: the result holds numbers that are not finite.
    """
    population = max(population, count)
    c = control.values.astype(np.float64)
    mean_change = -c - mean / (steps.count * steps.learning_rate)
    values = ((control.population * c + count * mean_change) / population).astype(np.float32)
    if not np.isfinite(values).all():
        raise CombineError("the combined control variate holds numbers that are not finite; lower the learning rates")
    return ServerControl(values, population)
