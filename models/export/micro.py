"""TensorFlow Lite Micro: which operators it has, what its resolver calls them, and how a graph runs on it."""

from __future__ import annotations

import importlib
import os
import re
import sys
import tempfile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.errors import ConversionError
from models.export.convert import Precision
from models.export.run import dequantised, is_installed, quantised
from models.flatbuffer import operators

Floats = NDArray[np.float32]

_NAMES = """
ABS ADD ADD_N ARG_MAX ARG_MIN ASSIGN_VARIABLE AVERAGE_POOL_2D BATCH_MATMUL BATCH_TO_SPACE_ND BROADCAST_ARGS
BROADCAST_TO CALL_ONCE CAST CEIL CONCATENATION CONV_2D COS CUMSUM DEPTHWISE_CONV_2D DEPTH_TO_SPACE DEQUANTIZE DIV
ELU EMBEDDING_LOOKUP EQUAL EXP EXPAND_DIMS FILL FLOOR FLOOR_DIV FLOOR_MOD FULLY_CONNECTED GATHER GATHER_ND GREATER
GREATER_EQUAL HARD_SWISH IF L2_NORMALIZATION L2_POOL_2D LEAKY_RELU LESS LESS_EQUAL LOG LOGICAL_AND LOGICAL_NOT
LOGICAL_OR LOGISTIC LOG_SOFTMAX MAXIMUM MAX_POOL_2D MEAN MINIMUM MIRROR_PAD MUL NEG NOT_EQUAL PACK PAD PADV2 PRELU
QUANTIZE READ_VARIABLE REDUCE_MAX REDUCE_MIN RELU RELU6 RESHAPE RESIZE_BILINEAR RESIZE_NEAREST_NEIGHBOR REVERSE_V2
ROUND RSQRT SELECT_V2 SHAPE SIN SLICE SOFTMAX SPACE_TO_BATCH_ND SPACE_TO_DEPTH SPLIT SPLIT_V SQRT SQUARE
SQUARED_DIFFERENCE SQUEEZE STRIDED_SLICE SUB SUM SVDF TANH TRANSPOSE TRANSPOSE_CONV UNIDIRECTIONAL_SEQUENCE_LSTM
UNPACK VAR_HANDLE WHILE ZEROS_LIKE
"""
_OPERATORS = frozenset(_NAMES.split())
"""What there is a kernel for: its micro_mutable_op_resolver.h of 2025."""

_FLOAT_ONLY = frozenset(("CEIL", "COS", "FLOOR", "LOG", "NEG", "ROUND", "SIN", "SQRT", "SQUARE"))
"""Those whose kernel takes no int8; TFLite's own LOG does."""

_RESOLVER_NAMES = {
    "ADD_N": "AddN",
    "AVERAGE_POOL_2D": "AveragePool2D",
    "BATCH_MATMUL": "BatchMatMul",
    "CONV_2D": "Conv2D",
    "CUMSUM": "CumSum",
    "DEPTHWISE_CONV_2D": "DepthwiseConv2D",
    "L2_POOL_2D": "L2Pool2D",
    "MAX_POOL_2D": "MaxPool2D",
    "PADV2": "PadV2",
    "UNIDIRECTIONAL_SEQUENCE_LSTM": "UnidirectionalSequenceLSTM",
}
"""Where MicroMutableOpResolver's method is not simply the operator's name in camel case."""

_MODULE = "tflite_micro.python.tflite_micro.runtime"
_LARGEST_ARENA = 1 << 26


def check_operators(graph: bytes, *, precision: Precision) -> None:
    """Hold a graph to the operators that there are.

    Raises:
        ConversionError: one of them is not there, or not for int8.
    """
    used = set(operators(graph))
    foreign = sorted(used - _OPERATORS)
    if foreign:
        raise ConversionError(
            f"tflm: TensorFlow Lite Micro has no {', '.join(foreign)}: use another layer or activation."
        )
    float_only = sorted(used & _FLOAT_ONLY)
    if precision == "int8" and float_only:
        raise ConversionError(f"tflm: TensorFlow Lite Micro has no 8-bit {', '.join(float_only)}: give --float.")


def resolver_name(operator: str) -> str:
    """The operator in the spelling of MicroMutableOpResolver: ``Conv2D`` of ``AddConv2D``."""
    return _RESOLVER_NAMES.get(operator) or "".join(part.title() for part in operator.split("_"))


class MicroRunner:
    """A graph on TensorFlow Lite Micro's own interpreter, if ``tflite-micro`` is installed.

    Args:
        graph: the flatbuffer, one example a call.

    Raises:
        ConversionError: it cannot run the graph.
    """

    runtime = "TensorFlow Lite Micro"

    def __init__(self, graph: bytes) -> None:
        module = importlib.import_module(_MODULE)
        try:
            self._interpreter = module.Interpreter.from_bytes(graph, arena_size=_LARGEST_ARENA)
        except RuntimeError as error:
            raise ConversionError(f"tflm: TensorFlow Lite Micro does not load the model ({error}).") from error

    @staticmethod
    def is_installed() -> bool:
        """Whether the package is there."""
        return is_installed(_MODULE)

    def __call__(self, x: Floats) -> Floats:
        """Outputs float32 [n, K] of examples x [n, ...]."""
        try:
            return np.concatenate([self._run(example[None]) for example in x]).reshape(len(x), -1)
        except RuntimeError as error:
            raise ConversionError(f"tflm: TensorFlow Lite Micro does not run the model ({error}).") from error

    def arena_bytes(self) -> int:
        """The part of the tensor arena that the model takes on this machine, by the interpreter's own account."""
        # It only prints the account, from C++ to standard error; trying ever smaller arenas crashes some kernels.
        sys.stderr.flush()
        kept = os.dup(2)
        with tempfile.TemporaryFile() as printed:
            os.dup2(printed.fileno(), 2)
            try:
                self._interpreter.print_allocations()
            finally:
                os.dup2(kept, 2)
                os.close(kept)
            printed.seek(0)
            found = re.search(rb"Arena allocation total (\d+) bytes", printed.read())
        if found is None:
            raise ConversionError("tflm: TensorFlow Lite Micro did not say how large its arena is.")
        return int(found[1])

    def _run(self, x: Floats) -> Floats:
        """The output of one example [1, ...]."""
        given, found = self._interpreter.get_input_details(0), self._interpreter.get_output_details(0)
        # An LSTM keeps its state from call to call otherwise.
        self._interpreter.reset()
        self._interpreter.set_input(quantised(x, *_scale(given)), 0)
        self._interpreter.invoke()
        return dequantised(self._interpreter.get_output(0), *_scale(found))


def _scale(details: dict[str, Any]) -> tuple[float, int]:
    """TensorFlow Lite Micro's form of a tensor's scale and zero point."""
    quantisation = details["quantization_parameters"]
    if details["dtype"] != np.int8:
        return 0.0, 0
    return float(quantisation["scales"][0]), int(quantisation["zero_points"][0])
