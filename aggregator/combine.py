"""Combining client updates into the next global model: a streaming mean, then a server optimiser step. Pure.

FedAvg: H. B. McMahan et al., arXiv 1602.05629. Server momentum (FedAvgM): T. H. Hsu et al., arXiv 1909.06335.

The mean is unweighted: weighting by the number of examples would reveal that number, which record-level privacy under
add-or-remove-one neighbours does not allow.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aggregator.errors import CombineError

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class ServerOptimiser:
    """FedAvg with momentum; learning rate 1 and momentum 0 is plain FedAvg.

    Args:
        learning_rate: factor on the (momentum-averaged) mean update.
        momentum: in [0, 1).
    """

    learning_rate: float = 1.0
    momentum: float = 0.0


@dataclass(frozen=True)
class GlobalModel:
    """Parameters and the optimiser's velocity, both float32 [d]."""

    params: Float32
    velocity: Float32


def mean_update(updates: Iterable[Float32], length: int) -> tuple[NDArray[np.float64], int]:
    """Unweighted mean, float64 [length], and how many there were; one update is in memory at a time.

    Raises:
        CombineError: there are none.
    """
    # Summed in float64 in the order given; the store gives a fixed order, so a repeated combination is bit-identical.
    total, count = np.zeros(length), 0
    for update in updates:
        total += update
        count += 1
    if count == 0:
        raise CombineError("no updates to combine")
    return total / count, count


def average_models(models: Iterable[GlobalModel]) -> GlobalModel:
    """The mean of several versions' parameters (B. Polyak, A. Juditsky, 1992), with the last one's velocity.

    Raises:
        CombineError: there are none.
    """
    total, count, velocity = None, 0, None
    for model in models:
        params = model.params.astype(np.float64)
        total = params if total is None else total + params
        count, velocity = count + 1, model.velocity
    if total is None or velocity is None:
        raise CombineError("no models to average")
    return GlobalModel((total / count).astype(np.float32), velocity)


def apply(model: GlobalModel, mean: NDArray[np.float64], optimiser: ServerOptimiser) -> GlobalModel:
    """One server step: v <- momentum v + mean; params <- params + learning_rate v.

    Raises:
        CombineError: the result holds numbers that are not finite.
    """
    velocity = optimiser.momentum * model.velocity.astype(np.float64) + mean
    params = model.params.astype(np.float64) + optimiser.learning_rate * velocity
    result = GlobalModel(params.astype(np.float32), velocity.astype(np.float32))
    if not (np.isfinite(result.params).all() and np.isfinite(result.velocity).all()):
        raise CombineError("the combined model holds numbers that are not finite; lower the learning rates")
    return result
