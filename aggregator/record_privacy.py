"""What a model's lineage has cost, at record level, a device that took part in every round of it. Pure.

Neighbours: add or remove one record (one window of one wearer's data). Adversary: everyone who sees the models that
were made along the lineage, every update behind them included. An aggregator also sees updates of rounds that it then
gave up or rejected; each device's own ledger charges those as well and is what protects the wearer. Nothing is enforced
here: this is a figure for the operator, and never below what such a device was charged for the same rounds.

By dp-accounting's Rényi accountant at the integer ones of the ledgers' orders (fewer give no smaller epsilon), where it
is exact: I. Mironov, K. Talwar, L. Zhang, "Rényi Differential Privacy of the Sampled Gaussian Mechanism", arXiv
1908.10530, section 3.3. One step is accounted and kept, and multiplied. Converted by `fl_protocol.renyi`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aggregator.errors import AggregatorError
from fl_protocol.errors import LocalMisuseError
from fl_protocol.plans import PlanMsg
from fl_protocol.renyi import INTEGER_ORDERS, conversion_terms

_LEAST_NOISE = 1e-100
"""Less than this is no noise: the moments overflow, and devices refuse to take part."""
_MOST_NOISE = 1e100
"""More than this is accounted as this: its square would leave float64."""
_ROUNDING_UP = 1 + 1e-9
_LOST_DIGITS = 1e-12
"""dp-accounting adds up logarithms of numbers that sum to nearly 1, which costs it up to 1.3e-13 of a log moment
(measured against the devices' accounting, which does not); so a tiny cost is never taken for none."""

Vector = NDArray[np.float64]


def record_epsilon(
    plan: PlanMsg, rounds: int, *, delta: float = 1e-5, earlier: Sequence[tuple[PlanMsg, int]] = ()
) -> float:
    """Epsilon at `delta` of one record of a device that took part in all these rounds; infinite without noise.

    Args:
        plan: of the rounds: training of `local_steps` releases each, evaluation or statistics of one.
        rounds: how many, at least 0.
        delta: in (0, 1).
        earlier: plans and rounds of the tasks that the lineage began with (``start_from``), if any.

    Raises:
        AggregatorError: dp-accounting is not installed.
        LocalMisuseError: an argument is out of range.
    """
    conversion = conversion_terms(delta, INTEGER_ORDERS)
    spent = [one for one in ((plan, rounds), *earlier) if one[1] != 0]
    if any(count < 0 for _, count in spent):
        raise LocalMisuseError(f"rounds: expected at least 0, got {min(count for _, count in spent)}")
    if not spent:
        return 0.0
    rdp = sum(_rounds_rdp(one, count) for one, count in spent)
    return max(0.0, float((rdp + conversion).min()))


def _rounds_rdp(plan: PlanMsg, rounds: int) -> Vector:
    """RDP of all releases of some rounds at each of `INTEGER_ORDERS`."""
    noise_multiplier = min(plan.noise_multiplier, _MOST_NOISE)
    if noise_multiplier < _LEAST_NOISE:
        return np.full(len(INTEGER_ORDERS), math.inf)
    total: Vector = rounds * plan.local_steps * _step_rdp(plan.sampling_rate, noise_multiplier)
    return total


@functools.lru_cache(maxsize=256)
def _step_rdp(sampling_rate: float, noise_multiplier: float) -> Vector:
    """RDP of one release at each of `INTEGER_ORDERS`, rounded up."""
    dp_accounting, rdp = _dp_accounting()
    step = dp_accounting.GaussianDpEvent(noise_multiplier)
    sampled = step if sampling_rate == 1 else dp_accounting.PoissonSampledDpEvent(sampling_rate, step)
    accountant = rdp.RdpAccountant(list(INTEGER_ORDERS), dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    accountant.compose(sampled)
    lost = _LOST_DIGITS / (np.array(INTEGER_ORDERS) - 1)
    # The accountant's own vector: what it offers publicly is accounted again for every number of steps.
    result: Vector = np.maximum(0.0, np.asarray(accountant._rdp)) * _ROUNDING_UP + lost
    result.setflags(write=False)
    return result


def load_accounting() -> None:
    """Import dp-accounting now, so that nobody who asks for an account waits for it. Raises AggregatorError."""
    _dp_accounting()


def _dp_accounting() -> tuple[Any, Any]:
    """The library, imported when it is first needed: it brings SciPy, which takes a second or two."""
    try:
        import dp_accounting  # noqa: PLC0415
        from dp_accounting import rdp  # noqa: PLC0415
    except ImportError as error:
        raise AggregatorError(
            "what a model has cost in privacy is computed by dp-accounting, which is not installed; try pip install "
            "'covey[aggregator]'"
        ) from error
    return dp_accounting, rdp
