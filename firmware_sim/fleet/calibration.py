"""The curve of a surrogate, fitted to a run in which a model was really trained. Pure.

Accuracy after n updates is taken to be floor + (ceiling − floor)·(1 − exp(−n / updates)). For each `updates` of a fine
grid the two others follow by linear least squares, so the best of the grid is the best fit to its spacing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from firmware_sim.errors import FleetError
from firmware_sim.fleet_metrics import FleetRound
from firmware_sim.scenario.schema import Curve

_LEAST_ROUNDS = 5
_GRID = 400


class Fit(NamedTuple):
    """A curve, and the root of the mean square of its errors (accuracy, 0 to 1)."""

    curve: Curve
    error: float


def fitted_curve(rounds: Sequence[FleetRound]) -> Fit:
    """The best curve for a run.

    Args:
        rounds: of a run with the fidelity ``real``.

    Raises:
        FleetError: fewer than five of them have an accuracy.
    """
    points, updates = list[tuple[int, float]](), 0
    for one in rounds:
        updates += one.arrived if one.outcome == "committed" else 0
        if one.accuracy is not None:
            points.append((updates, one.accuracy))
    if len(points) < _LEAST_ROUNDS:
        raise FleetError(
            f"calibration: expected at least {_LEAST_ROUNDS} committed rounds with an accuracy, got {len(points)}; "
            "take a run with fidelity real and [sensors]"
        )
    counts, accuracies = (np.array(column, np.float64) for column in zip(*points, strict=True))
    scales = np.geomspace(counts[0] / 10, counts[-1] * 10, _GRID)
    fits = [_for_scale(counts, accuracies, float(scale)) for scale in scales]
    return min(fits, key=lambda fit: fit.error)


def _for_scale(counts: NDArray[np.float64], accuracies: NDArray[np.float64], scale: float) -> Fit:
    """The best floor and ceiling, each between 0 and 1, for one number of updates."""
    gone = -np.expm1(-counts / scale)
    design = np.stack([1 - gone, gone], axis=1)
    (floor, ceiling), *_ = np.linalg.lstsq(design, accuracies, rcond=None)
    curve = Curve(floor=float(np.clip(floor, 0, 1)), ceiling=float(np.clip(ceiling, 0, 1)), updates=scale)
    errors = curve.floor + (curve.ceiling - curve.floor) * gone - accuracies
    return Fit(curve, float(np.sqrt(np.mean(errors**2))))
