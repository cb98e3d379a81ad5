"""Keep a runtime from overwriting values that are still needed: a workaround for TFLite's memory planner.

To save memory the planner lets RESHAPE share the memory of its input, and lets ADD, SUB, MUL, DIV and SOFTMAX write
over an input that nothing else reads. It looks at how often that input is read, and the tensor in which the memory was
first written, but not at tensors in between: with ``b = a·2``, ``c = reshape(b)``, ``d = c + 1`` it writes d over b,
though b is read again later. tflite-runtime 2.14 and LiteRT 2.3 both give wrong numbers then, wherever their delegate
leaves such a chain to them (https://github.com/google-ai-edge/LiteRT/issues/8889). An output of the graph counts as
one more reader, so the tensor that would be written over becomes one; signatures do not name it.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from models.flatbuffer import operator_names, read_model
from models.template import pack_model

_SAME_MEMORY = frozenset({"RESHAPE", "EXPAND_DIMS", "SQUEEZE", "BITCAST"})
_WRITES_OVER = {"ADD": 2, "SUB": 2, "MUL": 2, "DIV": 2, "SOFTMAX": 1, "DYNAMIC_UPDATE_SLICE": 1}
"""Which operators write their output over one of so many first inputs."""


def kept_apart(graph: bytes) -> bytes:
    """The graph, with further outputs where a value would be overwritten too early."""
    model = read_model(graph)
    names = operator_names(model)
    changed = False
    for subgraph in model.subgraphs:
        own = [names[operator.opcodeIndex] for operator in subgraph.operators]
        endangering = _endangering(subgraph, own, model.buffers)
        subgraph.outputs = [*subgraph.outputs, *endangering]
        changed = changed or bool(endangering)
    return pack_model(model) if changed else graph


def _endangering(subgraph: Any, kinds: list[str], buffers: list[Any]) -> list[int]:
    """The tensors that must not be written over, because others in the same memory are read later."""
    uses, last = _uses(subgraph)
    # By tensor: those that may lie in the same memory and were written before it, oldest first, and itself.
    lines: dict[int, list[int]] = {}
    found = []
    for at, (operator, kind) in enumerate(zip(subgraph.operators, kinds, strict=True)):
        candidates = operator.inputs[: 1 if kind in _SAME_MEMORY else _WRITES_OVER.get(kind, 0)]
        for source in (int(each) for each in candidates):
            line = lines.get(source, [source])
            if _is_constant(subgraph, source, buffers):
                continue
            if kind in _WRITES_OVER:
                if uses[source] > 1 or _size(subgraph, source) != _size(subgraph, operator.outputs[0]):
                    continue
                # Which tensor counts as the first depends on what a delegate takes over: any of them may.
                firsts = {tensor for tensor in line[:-1] if uses[tensor] == 1}
                others = {tensor for tensor, before in lines.items() if firsts & set(before)} | firsts
                if any(last.get(tensor, -1) > at for tensor in others - {source}):
                    found.append(source)
                    continue
            lines[int(operator.outputs[0])] = [*line, int(operator.outputs[0])]
            break
    return found


def _uses(subgraph: Any) -> tuple[Counter[int], dict[int, int]]:
    """How often each tensor is read, and by which operator last; inputs and outputs of the graph count once more."""
    uses, last = Counter(int(tensor) for tensor in subgraph.inputs), {}
    for at, operator in enumerate(subgraph.operators):
        for tensor in operator.inputs:
            uses[int(tensor)] += 1
            last[int(tensor)] = at
    for tensor in subgraph.outputs:
        uses[int(tensor)] += 1
        last[int(tensor)] = len(subgraph.operators)
    return uses, last


def _is_constant(subgraph: Any, tensor: int, buffers: list[Any]) -> bool:
    """Whether the tensor's values are in the file (or it is an input that was left out)."""
    data = buffers[subgraph.tensors[tensor].buffer].data if tensor >= 0 else b"x"
    return data is not None and len(data) > 0


def _size(subgraph: Any, tensor: int) -> int:
    """How many values a tensor has."""
    shape = subgraph.tensors[tensor].shape
    return math.prod(int(side) for side in shape) if shape is not None else 1
