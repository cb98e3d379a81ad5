"""Rényi differential privacy at fixed orders: conversion to (epsilon, delta), a filter's order, sampled noise. Pure.

Both sides account with this: devices for their own noise (`device_client.accounting`), the aggregator for what a whole
device costs (`aggregator.privacy`) and for what a model's lineage cost a record (`aggregator.record_privacy`). Which
neighbours are meant is theirs to say.

Sources: C. Canonne, G. Kamath, T. Steinke, "The Discrete Gaussian for Differential Privacy", arXiv 2004.00010,
proposition 12 (conversion); V. Feldman, T. Zrnic, "Individual Privacy Accounting via a Rényi Filter", arXiv 2008.11193
(filter); I. Mironov, K. Talwar, L. Zhang, "Rényi Differential Privacy of the Sampled Gaussian Mechanism", arXiv
1908.10530, section 3.3 (integer orders).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fl_protocol.errors import LocalMisuseError

Vector = NDArray[np.float64]

FRACTIONAL_ORDERS = (1.25, 1.5, 1.75, 2.25, 2.5, 2.75, 3.25, 3.5, 3.75, 4.5, 5.5, 6.5, 7.5, 8.5, 9.5, 10.5)
INTEGER_ORDERS: tuple[int, ...] = (*range(2, 65), 72, 80, 96, 128, 192, 256, 512, 1024)
ORDERS: tuple[float, ...] = tuple(sorted({float(order) for order in (*FRACTIONAL_ORDERS, *INTEGER_ORDERS)}))
"""The fixed Rényi orders of every ledger; a ledger's totals are vectors over them."""


def conversion_terms(delta: float, orders: Sequence[float] = ORDERS) -> Vector:
    """What the conversion to (epsilon, delta) adds to the RDP at each order.

    Args:
        delta: in (0, 1).
        orders: each above 1.

    Raises:
        LocalMisuseError: `delta` is out of range.
    """
    if not 0 < delta < 1:
        raise LocalMisuseError(f"delta: expected 0 < delta < 1, got {delta}")
    return _conversion_terms(delta, tuple(orders))


@functools.lru_cache(maxsize=16)
def _conversion_terms(delta: float, orders: tuple[float, ...]) -> Vector:
    """`conversion_terms`, computed once for each budget; nobody may write to them."""
    alpha = np.asarray(orders, np.float64)
    terms: Vector = np.log1p(-1 / alpha) - (math.log(delta) + np.log(alpha)) / (alpha - 1)
    terms.setflags(write=False)
    return terms


def epsilon_by_order(rdp: Vector, delta: float, orders: Sequence[float] = ORDERS) -> Vector:
    """The epsilon that each single order gives for `delta`."""
    return np.maximum(0.0, rdp + conversion_terms(delta, orders))


def rdp_to_epsilon(rdp: Vector, delta: float, orders: Sequence[float] = ORDERS) -> float:
    """The best epsilon over the orders, for mechanisms that were fixed in advance; 0 for nothing spent."""
    if not rdp.any():
        return 0.0
    return float(epsilon_by_order(rdp, delta, orders).min())


def filter_order_index(*, epsilon: float, delta: float, cost: Vector, orders: Sequence[float] = ORDERS) -> int:
    """Index into `orders` of the order at which the budget admits the most participations of this cost.

    A Rényi filter is proven for one order chosen before anything is released (Feldman & Zrnic, arXiv 2008.11193,
    theorem 4.3), whatever the later steps depend on; with the first participation's cost this is such an order.

    Args:
        epsilon: of the budget, above 0, may be infinite.
        delta: of the budget.
        cost: RDP of one participation at each of `orders`.
        orders: each above 1.
    """
    room = epsilon - conversion_terms(delta, orders)
    with np.errstate(divide="ignore", invalid="ignore"):
        admitted = np.where(room > 0, room / cost, -1.0)
    return int(np.argmax(np.nan_to_num(admitted, nan=0.0, posinf=np.inf)))


@functools.lru_cache(maxsize=1)
def _binomials() -> tuple[Vector, Vector, Vector, NDArray[np.intp]]:
    """For all integer orders in a row: k from 2 to the order, order - k, the log binomials, and where each begins."""
    k = np.concatenate([np.arange(2, order + 1, dtype=np.float64) for order in INTEGER_ORDERS])
    rest = np.concatenate([np.arange(order - 2, -1, -1, dtype=np.float64) for order in INTEGER_ORDERS])
    log_factorial = np.array([math.lgamma(n + 1) for n in range(INTEGER_ORDERS[-1] + 1)])
    i, j = k.astype(np.intp), rest.astype(np.intp)
    lengths = [order - 1 for order in INTEGER_ORDERS]
    starts = np.cumsum([0, *lengths[:-1]])
    return k, rest, log_factorial[i + j] - log_factorial[i] - log_factorial[j], starts


def sampled_gaussian_log_moments(sampling_rate: float, noise_multiplier: float) -> Vector:
    """Log of the binomial sum in Mironov et al., section 3.3, at each of `INTEGER_ORDERS`: (order - 1) times the RDP.

    The sum of the binomial probabilities, which is 1, is taken out: 1 + Σ C(α, k) (1 - q)^(α - k) q^k (exp((k² - k) /
    2z²) - 1) over k from 2. All its terms are positive, so that next to no cost is exact too.

    Args:
        sampling_rate: q, in (0, 1).
        noise_multiplier: z, noise standard deviation over sensitivity, from 1e-100 to 1e100.
    """
    k, rest, log_binomial, starts = _binomials()
    exponent = (k * k - k) / (2 * noise_multiplier**2)
    terms = log_binomial + rest * math.log1p(-sampling_rate) + k * math.log(sampling_rate)
    terms += exponent + np.log(-np.expm1(-exponent))
    top = np.maximum.reduceat(terms, starts)
    lengths = np.diff([*starts, len(terms)])
    total: Vector = top + np.log(np.add.reduceat(np.exp(terms - np.repeat(top, lengths)), starts))
    return np.logaddexp(0.0, total)
