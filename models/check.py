"""Hold a converted ``train`` graph to the oracle, on either runtime; tests and the benchmark share this one check."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.reference import ExampleGradients, Floats, clipped_sum
from models.specs import ModelSpec

RUNTIMES = {"tflite-runtime": "tflite_runtime.interpreter", "litert": "ai_edge_litert.interpreter"}
"""Both runtimes that a device may have, and the module of each."""


@dataclass(frozen=True)
class Case:
    """One call of ``train`` and what it has to return."""

    name: str
    inputs: dict[str, Any]
    expected: dict[str, Floats]


def interpreter(runtime: str, graph: bytes) -> Any:
    """An interpreter of `graph` on one thread, as devices run it."""
    return importlib.import_module(RUNTIMES[runtime]).Interpreter(model_content=graph, num_threads=1)


def cases(spec: ModelSpec, *, num_parameters: int, batch_size: int, seed: int = 0) -> Iterator[Case]:
    """Full and partial masks, padding of data and of NaN, every example clipped, half of them, none."""
    rng = np.random.default_rng(seed)
    params = 0.2 * rng.standard_normal(num_parameters).astype(np.float32)
    x = rng.standard_normal((batch_size, *spec.input.shape)).astype(np.float32)
    y = rng.integers(0, len(spec.label.names), batch_size).astype(np.int32)
    losses, gradients = ExampleGradients(spec)(params, x, y)
    lengths = np.linalg.norm(gradients, axis=1)
    clips = {"all clipped": 0.5 * lengths.min(), "half clipped": np.median(lengths), "none clipped": 2 * lengths.max()}
    partial = (np.arange(batch_size) % 3 > 0).astype(np.float32)
    masks = {"full": (np.ones_like(partial), x), "partial": (partial, x), "NaN padding": (partial, _spoilt(x, partial))}
    for mask_name, (mask, rows) in masks.items():
        for clip_name, clip in clips.items():
            grad, norms = clipped_sum(gradients, mask=mask, clip=float(clip))
            yield Case(
                name=f"{mask_name}, {clip_name}",
                inputs={"params": params, "x": rows, "y": y, "mask": mask, "clip": np.float32(clip)},
                expected={"grad": grad, "norms": norms, "loss": losses * mask},
            )


def worst_error(runner: Any, some_cases: Iterable[Case]) -> float:
    """The largest relative error of any output over the cases; `runner` is the signature runner of ``train``."""
    return max(
        relative_error(runner(**case.inputs)[name], expected)
        for case in some_cases
        for name, expected in case.expected.items()
    )


def relative_error(got: NDArray[Any], expected: NDArray[Any]) -> float:
    """Max |got − expected| / max |expected|; infinite where `got` is not finite, or not zero where it has to be."""
    if got.shape != expected.shape or not np.isfinite(got).all():
        return float("inf")
    difference, scale = np.abs(got - expected).max(), np.abs(expected).max()
    return float(difference / scale) if scale else (float("inf") if difference else 0.0)


def _spoilt(x: Floats, mask: Floats) -> Floats:
    """The windows, with NaN in the masked rows."""
    spoilt = x.copy()
    spoilt[mask == 0] = np.nan
    return spoilt
