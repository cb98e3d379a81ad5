"""What computing takes on a simulated device."""

from __future__ import annotations

import os

import numpy as np
import pytest

from device_client.training import clipped_gradient_sum, evaluate
from firmware_sim.fidelity import TimedGraph
from fl_protocol.adapters.tflite_graph import TfliteGraph
from tests.virtual_fleet import load_bundle, synthetic_records


@pytest.mark.parametrize(("count", "rows"), [(0, 0), (5, 8), (13, 16), (17, 32), (32, 32), (40, 40), (50, 64)])
def test_a_gradient_takes_the_operations_of_the_rows_that_were_run(count: int, rows: int) -> None:
    bundle, taken = load_bundle("watch_features"), list[float]()
    graph = TimedGraph(TfliteGraph.of_bundle(bundle), flop=3200.0, took=taken.append)
    records = synthetic_records(bundle, seed=1, count=50)
    clipped_gradient_sum(graph, bundle.params, records, np.arange(count), clip=1.0, entropy=os.urandom)
    assert sum(taken) == 100.0 * rows


def test_measuring_takes_a_third_of_training_on_all_rows() -> None:
    bundle, taken = load_bundle("watch_features"), list[float]()
    graph = TimedGraph(TfliteGraph.of_bundle(bundle), flop=3000.0, took=taken.append)
    evaluate(graph, bundle.params, synthetic_records(bundle, seed=1, count=33))
    assert taken == [1000.0, 1000.0]
