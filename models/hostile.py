"""Parameters and records made to slip through the clip, and the most that a graph lets one of them contribute.

Whoever sends the parameters chooses what float32 makes of a norm: activations of 1e19 and an output gradient of 1e-19
multiply to an ordinary gradient, whose factors' squares float32 cannot hold (ADR 8). Comparing with automatic
differentiation never shows it, because no ordinary value comes near. Everything here is finite, seeded, and one record
counts; its contribution must not be longer than the clip.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.check import interpreter, random_batch
from models.network import Network
from models.reference import Floats

LARGEST_CONTRIBUTION = 1 + 1e-3
"""Of one record, relative to the clip: 2^-10 is the room that the devices' noise leaves for float32 in the graph."""

_SIZES = (1.6e19, 1e22)
"""Norms of a layer's input: the first has a square that float32 just holds, the second saturates."""


def worst_contribution(
    graph: bytes, runtime: str, probes: Iterable[dict[str, Any]], *, clips: Iterable[float], signature: str = "train"
) -> float:
    """The longest contribution over its clip; infinite if one is not finite. Probes are inputs of the signature."""
    runner, clips = interpreter(runtime, graph).get_signature_runner(signature), tuple(clips)
    found = [
        float(np.linalg.norm(runner(**probe, clip=np.float32(clip))["grad"].astype(np.float64)) / clip)
        for probe in probes
        for clip in clips
    ]
    return max(each if np.isfinite(each) else float("inf") for each in found)


def hostile_probes(
    network: Network, *, batch_size: int, gaps: Iterable[float], draws: int, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """Inputs of ``train`` but for the clip, in which the first record alone counts.

    Args:
        network: the model.
        batch_size: rows of the signature.
        gaps: how far the scores are on the right side: output gradients are about e^-gap, and nothing below 2^-126
            squared starts at 43.7.
        draws: how many probes with every tensor scaled at random come on top.
        seed: of the draws.
    """
    batch = random_batch(network, batch_size=batch_size, seed=seed)
    batch["mask"] = (np.arange(batch_size) == 0).astype(np.float32)
    if network.spec.label.kind in ("value", "binary"):
        batch["y"] = np.zeros_like(batch["y"])
    # An autoencoder's target is its input: zeros are matched as closely as its last bias says.
    exact = batch["x"] * np.float32(network.spec.label.kind != "input")
    for size in _SIZES:
        for gap in gaps:
            yield batch | {"x": exact, "params": _constant_layers(network, batch["y"], size=size, gap=gap)}
    rng = np.random.default_rng(seed)
    for _ in range(draws):
        scale = 10.0 ** (rng.uniform(-20, 25) * rng.integers(0, 2))
        x = _finite(scale * (exact if rng.random() < 0.5 else batch["x"]).astype(np.float64))
        params = _scaled_layers(network, batch["params"], batch["y"], rng)
        yield batch | {"x": x, "params": params}


def _constant_layers(network: Network, y: NDArray[Any], *, size: float, gap: float) -> Floats:
    """Kernels of zero: what enters the last layer is its neighbour's bias, `size` long, whatever the record is."""
    params = np.zeros(network.num_parameters)
    for name, values in _tensors(network, params):
        if name in [f"{layer}/bias" for layer in _trained(network)[-2:-1]]:
            values[:] = size / np.sqrt(values.size)
    _set_last_bias(network, params, y, gap=gap)
    return _finite(params)


def _scaled_layers(network: Network, params: Floats, y: NDArray[Any], rng: np.random.Generator) -> Floats:
    """Activations of any size up, and a last layer that sends next to nothing back."""
    scaled, last = params.astype(np.float64), _trained(network)[-1]
    for name, values in _tensors(network, scaled):
        if name.startswith(f"{last}/"):
            np.multiply(values, 10.0 ** rng.uniform(-22, 0), out=values)
        elif rng.random() < 0.5:
            np.multiply(values, 10.0 ** rng.uniform(-12, 12), out=values)
        if name.endswith(("bias", "beta")) and rng.random() < 0.5:
            values[:] = 10.0 ** rng.uniform(0, 25) * rng.integers(0, 2)
    _set_last_bias(network, scaled, y, gap=rng.uniform(20, 60))
    return _finite(scaled)


def _set_last_bias(network: Network, params: NDArray[np.float64], y: NDArray[Any], *, gap: float) -> None:
    """Put the first record's loss next to its least, so that its output gradient is about e^-gap."""
    for name, values in _tensors(network, params):
        if name == f"{_trained(network)[-1]}/bias":
            kind = network.spec.label.kind
            values[:] = {"class": 0.0, "binary": -gap}.get(kind, np.exp(-gap))
            if kind == "class":
                values[int(y[0])] = gap


def _tensors(network: Network, params: NDArray[np.float64]) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """By name, every tensor as a flat view of the vector."""
    for spec in network.parameters:
        yield spec.name, params[spec.offset : spec.offset + int(np.prod(spec.shape))]


def _trained(network: Network) -> list[str]:
    """The trained layers, the one nearest to the loss last."""
    return [node.name for node in network.nodes if node.is_trained]


def _finite(values: NDArray[np.float64]) -> Floats:
    """As float32, within what it holds."""
    return np.clip(values, -1e37, 1e37).astype(np.float32)
