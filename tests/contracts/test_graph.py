"""The graph port over both TFLite runtimes: the same clipped sums, the same measurements, the same errors."""

from __future__ import annotations

import importlib.util
import os
import sys

import numpy as np
import pytest

from device_client.training import clipped_gradient_sum, evaluate
from fl_protocol.adapters.tflite_graph import Runtime, TfliteGraph
from fl_protocol.errors import BundleError, GraphError
from tests.virtual_fleet import load_bundle, synthetic_records

RUNTIMES: dict[Runtime, str] = {"litert": "ai_edge_litert", "tflite_runtime": "tflite_runtime"}
INSTALLED = [name for name, module in RUNTIMES.items() if importlib.util.find_spec(module) is not None]
MODELS = ("watch_features", "watch_cnn")


def graph_of(model: str, runtime: Runtime) -> TfliteGraph:
    return TfliteGraph.of_bundle(load_bundle(model), runtime=runtime)


def some_params(model: str) -> np.ndarray:
    count = load_bundle(model).manifest.num_parameters
    return np.random.default_rng(3).normal(scale=0.1, size=count).astype(np.float32)


def test_a_runtime_is_installed() -> None:
    assert INSTALLED


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("runtime", INSTALLED)
def test_no_record_moves_the_sum_by_more_than_the_clip(model: str, runtime: Runtime) -> None:
    graph, params = graph_of(model, runtime), some_params(model)
    records, clip = synthetic_records(load_bundle(model), seed=1, count=40), 0.05
    everyone = clipped_gradient_sum(graph, params, records, np.arange(40), clip=clip, entropy=os.urandom)
    for left_out in (0, 17, 39):
        others = np.delete(np.arange(40), left_out)
        difference = everyone - clipped_gradient_sum(graph, params, records, others, clip=clip, entropy=os.urandom)
        assert 0 < np.linalg.norm(difference) <= clip * (1 + 2.0**-10)  # the margin that the noise is scaled up by


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("runtime", INSTALLED)
@pytest.mark.parametrize("count", [3, 8, 13, 16, 17, 35])
def test_what_is_left_of_a_batch_is_summed_alike_on_few_rows_and_on_many(
    model: str, runtime: Runtime, count: int
) -> None:
    graph, params = graph_of(model, runtime), some_params(model)
    records = synthetic_records(load_bundle(model), seed=4, count=count)
    assert graph.train_sizes == (8, 32)
    ours = clipped_gradient_sum(graph, params, records, np.arange(count), clip=0.5, entropy=os.urandom)
    graph.train_sizes = (32,)  # as graphs have that were built before there was a signature for few rows
    padded = clipped_gradient_sum(graph, params, records, np.arange(count), clip=0.5, entropy=os.urandom)
    np.testing.assert_allclose(ours, padded, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_installed_runtimes_agree(model: str) -> None:
    params, records = some_params(model), synthetic_records(load_bundle(model), seed=2, count=50)
    graphs = [graph_of(model, runtime) for runtime in INSTALLED]
    sums = [
        clipped_gradient_sum(graph, params, records, np.arange(50), clip=0.5, entropy=os.urandom) for graph in graphs
    ]
    results = [evaluate(graph, params, records) for graph in graphs]
    for other, result in zip(sums, results, strict=True):
        np.testing.assert_allclose(other, sums[0], rtol=1e-4, atol=1e-5)
        assert result.loss_sum == pytest.approx(results[0].loss_sum, rel=1e-5)
        assert (result.correct, result.count) == (results[0].correct, 50)


@pytest.mark.parametrize("runtime", INSTALLED)
@pytest.mark.parametrize("rubbish", [b"", b"TFL3", b"\0" * 1000])
def test_a_flatbuffer_that_does_not_load_is_one_sentence(runtime: Runtime, rubbish: bytes) -> None:
    with pytest.raises(BundleError, match="graph"):
        TfliteGraph(rubbish, batch_size=32, num_parameters=10, runtime=runtime)


@pytest.mark.parametrize("runtime", INSTALLED)
def test_an_input_of_another_shape_is_one_sentence(runtime: Runtime) -> None:
    graph, params = graph_of("watch_features", runtime), some_params("watch_features")
    x, y, mask = np.zeros((32, 64, 6), np.float32), np.zeros(32, np.int32), np.ones(32, np.float32)
    with pytest.raises(GraphError, match=r"takes inputs of shapes .* got {'x': \(32, 64, 6\)}"):
        graph.evaluate(params, x, y, mask)
    with pytest.raises(GraphError, match=r"takes inputs of shapes .* got {'x': \(32, 64, 6\)}"):
        graph.train(params, x, y, mask, clip=1.0)


@pytest.mark.parametrize("runtime", INSTALLED)
def test_what_the_runtime_itself_refuses_is_one_sentence(runtime: Runtime) -> None:
    graph, params = graph_of("watch_features", runtime), some_params("watch_features")
    x, wrong_kind, mask = np.zeros((32, 128, 6), np.float32), np.zeros(32, np.float32), np.ones(32, np.float32)
    with pytest.raises(GraphError, match="runtime failed"):
        graph.evaluate(params, x, wrong_kind, mask)


def test_where_no_runtime_is_installed_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in RUNTIMES.values():
        monkeypatch.setitem(sys.modules, f"{module}.interpreter", None)  # what importing a missing module sees
    with pytest.raises(GraphError, match=r"ai-edge-litert or tflite-runtime.*pip install"):
        TfliteGraph.of_bundle(load_bundle("watch_features"))
    with pytest.raises(GraphError, match="expected litert to be installed"):
        graph_of("watch_features", "litert")
