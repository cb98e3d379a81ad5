"""The oracle's cases and the interpreters, each made once for all tests; importing this needs TensorFlow."""

from __future__ import annotations

from functools import cache
from typing import Any

from models import catalog, check
from models.convert import convert_network
from models.network import Network


@cache
def network(model: str) -> Network:
    """A catalogue model."""
    return Network(catalog.load(model))


@cache
def model_cases(model: str, batch_size: int) -> dict[str, check.Case]:
    """Every case of a catalogue model, by name."""
    return {case.name: case for case in check.cases(network(model), batch_size=batch_size)}


@cache
def single_example_graph(model: str) -> bytes:
    """The model converted for B=1."""
    return convert_network(network(model), batch_size=1)


@cache
def signature(graph: bytes, runtime: str, name: str) -> Any:
    """A signature runner; the interpreter lives as long as it."""
    return check.interpreter(runtime, graph).get_signature_runner(name)
