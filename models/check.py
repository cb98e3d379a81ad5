"""Hold what trains in a converted graph to the oracle, on either runtime; tests and the benchmark share this check."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from models.convert import training_rows
from models.layers.embedding import EmbeddingLayer
from models.network import Network
from models.reference import Floats, Reference, clipped_sum

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


def random_batch(network: Network, *, batch_size: int, seed: int = 0) -> dict[str, Any]:
    """Parameters, examples, labels and dropout masks; normal values, except where the model looks them up."""
    rng = np.random.default_rng(seed)
    batch = {
        "params": 0.2 * rng.standard_normal(network.num_parameters).astype(np.float32),
        "x": _examples(network, batch_size, rng),
        "y": _labels(network, batch_size, rng),
    }
    if network.dropout:
        kept = [rng.random((batch_size, mask.units)) >= mask.rate for mask in network.dropout]
        batch["dropout"] = np.concatenate(kept, 1).astype(np.float32)
    return batch


def cases(network: Network, *, batch_size: int, seed: int = 0, batch: dict[str, Any] | None = None) -> Iterator[Case]:
    """Full and partial masks, padding of data and of NaN, every example clipped, half of them, none."""
    batch = batch or random_batch(network, batch_size=batch_size, seed=seed)
    losses, gradients = Reference(network).example_gradients(
        batch["params"], batch["x"], batch["y"], batch.get("dropout")
    )
    lengths = np.linalg.norm(gradients, axis=1)
    clips = {
        "all clipped": 0.5 * lengths.min(),
        "half clipped": np.median(lengths),
        "none clipped": 100 * lengths.max(),
    }
    partial = (np.arange(batch_size) % 3 > 0).astype(np.float32)
    masks = {
        "full": (np.ones_like(partial), batch["x"]),
        "partial": (partial, batch["x"]),
        "NaN padding": (partial, _spoilt(batch["x"], partial)),
    }
    for mask_name, (mask, rows) in masks.items():
        for clip_name, clip in clips.items():
            grad, norms = clipped_sum(
                gradients, mask=mask, clip=float(clip), groups=network.norm_clips, layout=network.parameters
            )
            yield Case(
                name=f"{mask_name}, {clip_name}",
                inputs={**batch, "x": rows, "mask": mask, "clip": np.float32(clip)},
                expected={"grad": grad, "norms": norms, "loss": losses * mask},
            )


def installed_runtimes() -> tuple[str, ...]:
    """The runtimes of `RUNTIMES` that can be imported."""
    return tuple(name for name, module in RUNTIMES.items() if importlib.util.find_spec(module.split(".")[0]))


def worst_errors(network: Network, graph: bytes, *, batch_size: int) -> dict[str, float]:
    """By installed runtime, the largest relative error of a converted graph against automatic differentiation."""
    some_cases = {name: list(cases(network, batch_size=rows)) for name, rows in training_rows(batch_size).items()}
    return {
        runtime: max(
            worst_error(interpreter(runtime, graph).get_signature_runner(name), some)
            for name, some in some_cases.items()
        )
        for runtime in installed_runtimes()
    }


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


def _examples(network: Network, batch_size: int, rng: np.random.Generator) -> Floats:
    """Normal values, or ids that every embedding has."""
    shape = (batch_size, *network.spec.input.shape)
    sizes = [node.layer.vocabulary for node in network.nodes if isinstance(node.layer, EmbeddingLayer)]
    if not sizes and network.spec.model.inputs[0].dtype.is_integer:
        return rng.integers(0, 128, shape).astype(np.float32)
    drawn = rng.integers(0, min(sizes), shape) if sizes else _typical_size(network) * rng.standard_normal(shape)
    return drawn.astype(np.float32)


def _typical_size(network: Network) -> float:
    """What to multiply normal values by, so that the first trained layer sees values of about 1.

    Of a model that divides pixels by 255, small values would make near-ties of every maximum.
    """
    probe = np.random.default_rng(0).standard_normal((4, *network.spec.input.shape)).astype(np.float32)
    zeros = np.zeros(network.num_parameters, np.float32)
    seen = network.forward(network.split(tf.constant(zeros)), tf.constant(probe)).window.numpy()
    return 1 / max(float(np.sqrt(np.mean(seen * seen))), 1e-6)


def _labels(network: Network, batch_size: int, rng: np.random.Generator) -> NDArray[Any]:
    """Labels of the model's kind."""
    label, outputs = network.spec.label, network.loss.outputs
    if label.kind in ("class", "input"):
        return rng.integers(0, max(len(label.names), 1), batch_size).astype(np.int32)
    if label.kind == "binary":
        return rng.integers(0, 2, (batch_size, outputs)).astype(np.float32)
    return rng.standard_normal((batch_size, outputs)).astype(np.float32)


def _spoilt(x: Floats, mask: Floats) -> Floats:
    """The examples, with NaN in the masked rows."""
    spoilt = x.copy()
    spoilt[mask == 0] = np.nan
    return spoilt
