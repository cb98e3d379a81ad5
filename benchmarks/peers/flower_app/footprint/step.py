"""The local round without Flower: clipped gradients through the TFLite graph, noise, one step.

The same round as `device_client.training` runs with ``sampling_rate = 1`` and ``local_steps = 1`` (a test compares
them). Noise comes from numpy's generator: Flower offers no cryptographic one, and the cheaper draw is to its advantage.
Imports only numpy and a TFLite runtime.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

try:
    from ai_edge_litert.interpreter import Interpreter
except ImportError:
    from tflite_runtime.interpreter import Interpreter

Float32 = NDArray[np.float32]


def take_step(graph: str, params: Float32, x: Float32, y: NDArray[np.int32], plan: Mapping[str, float]) -> Float32:
    """The parameters after one full-batch step with clipped gradients and Gaussian noise, float32 [d]."""
    clip = plan["l2-norm-clip"]
    total = clipped_sum(graph, params, x, y, clip=clip)
    total += np.random.default_rng().normal(0.0, plan["noise-multiplier"] * clip, total.shape)
    stepped: Float32 = (params - plan["learning-rate"] / plan["expected-batch-size"] * total).astype(np.float32)
    return stepped


def clipped_sum(graph: str, params: Float32, x: Float32, y: NDArray[np.int32], *, clip: float) -> NDArray[np.float64]:
    """Sum of the records' clipped gradients, float64 [d], in as many calls of the graph as they need.

    Args:
        graph: path of the trainable graph.
        params: float32 [d].
        x: all records, float32 [n, ...].
        y: their labels, int32 [n].
        clip: bound on each record's gradient norm.
    """
    train = Interpreter(model_path=graph, num_threads=1).get_signature_runner("train")
    size = int(train.get_input_details()["mask"]["shape"][0])
    total = np.zeros(len(params))
    for start in range(0, len(y), size):
        count = len(y[start : start + size])
        batch, mask = np.zeros((size, *x.shape[1:]), np.float32), np.zeros(size, np.float32)
        batch[:count], mask[:count] = x[start : start + size], 1
        labels = np.resize(y[start : start + size], size)
        total += train(params=params, x=batch, y=labels, mask=mask, clip=np.float32(clip))["grad"]
    return total
