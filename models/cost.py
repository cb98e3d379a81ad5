"""What one call of a signature costs, from the flatbuffer's own tables: floating-point operations, working memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from models.flatbuffer import operator_names, read_model, text

_MOVES_DATA = frozenset(
    {
        *("CAST", "CONCATENATION", "EXPAND_DIMS", "FILL", "GATHER", "GATHER_ND", "PACK", "PAD", "PADV2", "RESHAPE"),
        *("SCATTER_ND", "SELECT", "SELECT_V2", "SHAPE", "SLICE", "SPLIT", "SPLIT_V", "SQUEEZE", "STRIDED_SLICE"),
        *("TILE", "TRANSPOSE", "UNPACK"),
    }
)
"""Operators that only copy or choose."""

_REDUCTIONS = frozenset(
    {"SUM", "MEAN", "REDUCE_MAX", "REDUCE_MIN", "REDUCE_PROD", "REDUCE_ANY", "ARG_MAX", "SOFTMAX", "LOG_SOFTMAX"}
)
"""Operators whose work goes with the size of their input."""

_MEMORY_ALIGNMENT = 64
"""TFLite aligns tensors in its arena so."""


@dataclass(frozen=True)
class SignatureCost:
    """One call.

    Args:
        flops: a multiplication and its addition are two; a function such as exp is one.
        arena_bytes: of inputs, outputs and everything between, placed greedily by size with lifetimes (Pisarchyk & Lee
            2020, arXiv 2001.03288, as TFLite's planner does); constants and what a delegate keeps are not in it.
    """

    flops: int
    arena_bytes: int


def signature_cost(graph: bytes, signature: str) -> SignatureCost:
    """The cost of a signature of a graph with static shapes."""
    model = read_model(graph)
    index = next(d.subgraphIndex for d in model.signatureDefs if text(d.signatureKey) == signature)
    subgraph, names = model.subgraphs[index], operator_names(model)
    flops = sum(_flops(names[operator.opcodeIndex], operator, subgraph.tensors) for operator in subgraph.operators)
    return SignatureCost(flops=flops, arena_bytes=_arena_bytes(model, subgraph))


def _flops(name: str, operator: Any, tensors: Any) -> int:
    """Operations of one operator."""
    inputs = [_elements(tensors[i]) for i in operator.inputs if i >= 0]
    outputs = sum(_elements(tensors[i]) for i in operator.outputs)
    if name in _MOVES_DATA:
        return 0
    if name in ("BATCH_MATMUL", "FULLY_CONNECTED"):
        left = tensors[operator.inputs[0]].shape
        if name == "BATCH_MATMUL" and operator.builtinOptions.adjX:
            return int(2 * outputs * left[-2])
        return int(2 * outputs * left[-1])
    if name in ("CONV_2D", "DEPTHWISE_CONV_2D"):
        # Each output multiplies one filter: all of it, or one channel's.
        taps = inputs[1] // (tensors[operator.inputs[1]].shape[0 if name == "CONV_2D" else 3])
        return int(2 * outputs * taps)
    if name == "ADD_N":
        return outputs * (len(inputs) - 1)
    return inputs[0] if name in _REDUCTIONS else outputs


def _elements(tensor: Any) -> int:
    return math.prod(int(side) for side in tensor.shape) if tensor.shape is not None else 1


def _arena_bytes(model: Any, subgraph: Any) -> int:
    """The arena of one subgraph."""
    lifetimes = _lifetimes(model, subgraph)
    placed: list[tuple[int, int, int, int]] = []
    # Largest first, at the lowest offset that is free during its lifetime.
    for size, first, last in sorted(lifetimes, key=lambda each: (-each[0], each[1])):
        offset = 0
        for other, end, start, stop in sorted(placed):
            if start <= last and first <= stop:
                if other - offset >= size:
                    break
                offset = max(offset, end)
        placed.append((offset, offset + size, first, last))
    return max((end for _, end, _, _ in placed), default=0)


def _lifetimes(model: Any, subgraph: Any) -> list[tuple[int, int, int]]:
    """Aligned bytes, first and last operator of every tensor that is not a constant."""
    last = len(subgraph.operators)
    spans: dict[int, list[int]] = {int(i): [0, last] for i in subgraph.inputs}
    for number, operator in enumerate(subgraph.operators):
        for i in (*operator.inputs, *operator.outputs):
            if i >= 0 and not _is_constant(model, subgraph.tensors[i]):
                spans.setdefault(int(i), [number, number])[1] = max(spans.get(int(i), [0, 0])[1], number)
    for i in subgraph.outputs:
        spans[int(i)][1] = last
    return [(_aligned_bytes(subgraph.tensors[i]), first, end) for i, (first, end) in spans.items()]


def _is_constant(model: Any, tensor: Any) -> bool:
    data = model.buffers[tensor.buffer].data
    return data is not None and len(data) > 0


_SIZES = {0: 4, 1: 2, 2: 4, 3: 1, 4: 8, 6: 1, 7: 2, 9: 1}
"""Bytes by ``TensorType``: float32, float16, int32, uint8, int64, bool, int16, int8."""


def _aligned_bytes(tensor: Any) -> int:
    size = _elements(tensor) * _SIZES.get(tensor.type, 4)
    return int(np.ceil(size / _MEMORY_ALIGNMENT)) * _MEMORY_ALIGNMENT
