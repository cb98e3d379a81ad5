"""Run a flatbuffer on arrays of any length, as the one who gets it would: on LiteRT."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from models.check import RUNTIMES, interpreter

Floats = NDArray[np.float32]

_CHUNK = 64
"""Examples a call, where the graph takes any number."""


class GraphRunner:
    """A graph with one input and one output, on the installed runtime: LiteRT, else tflite-runtime, else TensorFlow.

    Args:
        graph: the flatbuffer.
    """

    def __init__(self, graph: bytes) -> None:
        installed = [name for name in ("litert", "tflite-runtime") if is_installed(RUNTIMES[name])]
        self.runtime = {"litert": "LiteRT"}.get(installed[0], installed[0]) if installed else "TensorFlow"
        self._interpreter = (
            interpreter(installed[0], graph) if installed else tf.lite.Interpreter(model_content=graph, num_threads=1)
        )
        (self._input,) = self._interpreter.get_input_details()
        (self._output,) = self._interpreter.get_output_details()
        self.takes_any_number = bool(self._input["shape_signature"][0] == -1)

    def __call__(self, x: Floats) -> Floats:
        """Outputs float32 [n, K] of examples x [n, ...]; int8 ends are converted here."""
        size = _CHUNK if self.takes_any_number else int(self._input["shape"][0])
        if self.takes_any_number:
            self._interpreter.resize_tensor_input(self._input["index"], [size, *x.shape[1:]])
        self._interpreter.allocate_tensors()
        parts = [self._run(_padded(x[start : start + size], size)) for start in range(0, len(x), size)]
        outputs = np.concatenate(parts)[: len(x)]
        return outputs.reshape(len(x), -1)

    def _run(self, x: Floats) -> Floats:
        # An LSTM keeps its state from call to call otherwise, and every window stands alone.
        self._interpreter.reset_all_variables()
        self._interpreter.set_tensor(self._input["index"], quantised(x, *self._input["quantization"]))
        self._interpreter.invoke()
        return dequantised(self._interpreter.get_tensor(self._output["index"]), *self._output["quantization"])


def quantised(x: Floats, scale: float, zero_point: int) -> NDArray[Any]:
    """Int8 of real numbers; the numbers themselves if the scale is zero, that is, if the tensor is float32."""
    if not scale:
        return x
    q: NDArray[Any] = np.clip(np.round(x / np.float32(scale)) + zero_point, -128, 127).astype(np.int8)
    return q


def dequantised(q: NDArray[Any], scale: float, zero_point: int) -> Floats:
    """The inverse of `quantised`."""
    return (np.float32(scale) * (q.astype(np.float32) - zero_point)) if scale else q.astype(np.float32)


def _padded(x: Floats, size: int) -> Floats:
    """`x` with zeros after it."""
    return x if len(x) == size else np.concatenate([x, np.zeros((size - len(x), *x.shape[1:]), np.float32)])


def is_installed(module: str) -> bool:
    """Whether a module's package is there, without importing it."""
    return importlib.util.find_spec(module.split(".", maxsplit=1)[0]) is not None
