"""The converter's graphs are safe from the runtimes' memory planner, which writes over values that are still needed."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.tensorflow
tf = pytest.importorskip("tensorflow")

from models import check  # noqa: E402
from models.convert import convert_signatures  # noqa: E402
from models.flatbuffer import read_model  # noqa: E402

OTHER = np.linspace(0.5, 1.5, 24).reshape(2, 3, 4).astype(np.float32)
OVERWRITERS: dict[str, Callable[[Any], Any]] = {
    "add": lambda c: c + OTHER,
    "subtract": lambda c: c - OTHER,
    "subtract from": lambda c: OTHER - c,
    "multiply": lambda c: c * OTHER,
    "divide": lambda c: c / OTHER,
    "softmax": tf.nn.softmax,
}
SPEC = {"x": tf.TensorSpec([2, 12], tf.float32, name="x")}


def chain(overwriter: Callable[[Any], Any], *, x: Any) -> dict[str, Any]:
    """B = a·2, c = reshape(b), d = overwriter(c), and b is needed after d."""
    b = tf.tanh(x) * 2.0
    d = overwriter(tf.reshape(b, [-1, 3, 4]))
    return {"d": tf.cos(d), "after": tf.sin(b + tf.reduce_sum(tf.cos(d)))}


@functools.cache
def graph() -> bytes:
    # Names of signatures are identifiers.
    chains = {name.replace(" ", "_"): functools.partial(chain, each) for name, each in OVERWRITERS.items()}
    return convert_signatures({name: (function, SPEC) for name, function in chains.items()})


@pytest.mark.parametrize("delegate", [True, False])
@pytest.mark.parametrize("name", OVERWRITERS)
def test_a_value_that_is_read_later_is_not_overwritten(name: str, delegate: bool, runtime: str) -> None:
    module = importlib.import_module(check.RUNTIMES[runtime])
    resolver = module.OpResolverType.AUTO if delegate else module.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    interpreter = module.Interpreter(model_content=graph(), experimental_op_resolver_type=resolver)
    x = np.linspace(-1, 1, 24).reshape(2, 12).astype(np.float32)
    got = interpreter.get_signature_runner(name.replace(" ", "_"))(x=x)
    for key, value in chain(OVERWRITERS[name], x=tf.constant(x)).items():
        np.testing.assert_allclose(got[key], value.numpy(), atol=1e-5)


def test_a_chain_that_nothing_reads_later_is_left_alone() -> None:
    def harmless(x: Any) -> dict[str, Any]:
        return {"d": tf.cos(tf.reshape(tf.tanh(x) * 2.0, [-1, 3, 4]) * OTHER)}

    left = read_model(convert_signatures({"chain": (harmless, SPEC)}))
    assert len(left.subgraphs[0].outputs) == 1
    assert all(len(subgraph.outputs) == 3 for subgraph in read_model(graph()).subgraphs)
