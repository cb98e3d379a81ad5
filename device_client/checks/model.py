"""Checks of a study's model: the bundle verifies, and the installed runtime runs its graph."""

from __future__ import annotations

import time
from importlib import metadata

import numpy as np

from device_client.checks.findings import Result, ok, warning
from device_client.config import StudyConfig
from device_client.ports import Labels
from fl_protocol.adapters.tflite_graph import TfliteGraph
from fl_protocol.bundle import ModelBundle
from fl_protocol.model_manifest import BundleManifest

_PACKAGES = {"litert": "ai-edge-litert", "tflite_runtime": "tflite-runtime"}


def check_bundle(bundle: ModelBundle, study: StudyConfig) -> Result:
    """What a verified bundle holds; one that too few of the study's publishers have signed was refused on opening."""
    manifest, pins = bundle.manifest, study.publisher_pins
    shape = " x ".join(str(length) for length in manifest.input.shape)
    signed = "the pinned publisher"
    if len(pins.keys) > 1:
        signed = f"at least {pins.threshold} of the {len(pins.keys)} pinned publishers"
    found = (
        f"{manifest.name} version {manifest.version}, signed by {signed}: {manifest.num_parameters} "
        f"parameters, windows of {shape} ({', '.join(manifest.input.channels)})"
    )
    if study.aggregator_key.strip().lower() in pins.keys:
        return warning(
            f"{found}; the aggregator's key is pinned as a publisher's",
            "whoever has the aggregator's machine can have this device run any model: have the model signed with a key "
            "of its own (covey-aggregator publisher keygen), and pin that",
        )
    return ok(found)


def check_runtime(bundle: ModelBundle) -> Result:
    """Load the graph, and run it once each way on zeros. Raises GraphError, BundleError."""
    begun_s = time.perf_counter()
    graph = TfliteGraph.of_bundle(bundle)
    loaded_s = time.perf_counter()
    manifest, size = bundle.manifest, graph.batch_size
    x, mask = np.zeros((size, *manifest.input.shape), np.float32), np.ones(size, np.float32)
    y, units = _labels(manifest), sum(one.units for one in manifest.dropout)
    graph.evaluate(bundle.params, x, y, mask)
    evaluated_s = time.perf_counter()
    kept = np.ones((size, units), np.float32) if units else None
    for rows in graph.train_sizes[:-1]:
        few = kept[:rows] if kept is not None else None
        graph.train(bundle.params, x[:rows], y[:rows], mask[:rows], clip=1.0, dropout=few)
    others_s = time.perf_counter()
    graph.train(bundle.params, x, y, mask, clip=1.0, dropout=kept)
    trained_s = time.perf_counter()
    package = _PACKAGES[graph.runtime]
    return ok(
        f"{package} {metadata.version(package)} loads the graph in {_ms(loaded_s - begun_s)}, measures "
        f"{size} windows in {_ms(evaluated_s - loaded_s)}, their gradient takes {_ms(trained_s - others_s)}"
    )


def records_bytes(bundle: ModelBundle, *, maximum_count: int) -> int:
    """What the recordings of a stream take in memory when there are as many as may be kept."""
    manifest = bundle.manifest
    label_bytes = 4 * max(1, len(manifest.label.names) if manifest.label.kind in {"binary", "value"} else 1)
    return maximum_count * (4 * int(np.prod(manifest.input.shape)) + label_bytes)


def _labels(manifest: BundleManifest) -> Labels:
    """Zeros as the graph takes labels."""
    if manifest.label.kind in {"class", "input"}:
        return np.zeros(manifest.batch_size, np.int32)
    return np.zeros((manifest.batch_size, len(manifest.label.names)), np.float32)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"
