"""What is in a bundle, as tables for people."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from rich.table import Column, Table

from fl_protocol.bundle import ModelBundle
from models.flatbuffer import operators, signatures


def describe(bundle: ModelBundle, *, size_bytes: int) -> Iterator[Table]:
    """The manifest, the parameters, the signatures and the operators of a verified bundle."""
    yield _summary(bundle, size_bytes)
    yield _parameters(bundle)
    yield _signatures(bundle.graph)
    yield _operators(bundle.graph)


def _summary(bundle: ModelBundle, size_bytes: int) -> Table:
    """The manifest in short."""
    manifest = bundle.manifest
    table = Table("bundle", Column(f"{manifest.name} version {manifest.version}", overflow="fold"))
    window = " x ".join(map(str, manifest.input.shape))
    channels = ", ".join(f"{c} [{u}]" for c, u in zip(manifest.input.channels, manifest.input.units, strict=True))
    for row in (
        ("description", manifest.description),
        ("input", f"{window} at {manifest.input.sampling_rate_hz:g} Hz: {channels}"),
        ("labels", ", ".join(manifest.label.names)),
        ("preprocessing", manifest.preprocessing),
        ("batch size", str(manifest.batch_size)),
        ("bundle, graph", f"{size_bytes:,} bytes, {len(bundle.graph):,} bytes"),
        ("graph digest", bundle.graph_digest.hex()),
    ):
        # Escaped: the unit [g] would read as markup.
        table.add_row(row[0], row[1].replace("[", r"\["))
    return table


def _parameters(bundle: ModelBundle) -> Table:
    """One row per tensor of the flat vector."""
    manifest = bundle.manifest
    table = Table("parameter", "shape", "count", "offset", "per-example norm")
    methods = {f"{layer.name}/{role}": how for layer in manifest.layers for role, how in layer.norm_methods.items()}
    for spec in manifest.parameters:
        method = methods.get(spec.name, "")
        shape = " x ".join(map(str, spec.shape))
        table.add_row(spec.name, shape, f"{math.prod(spec.shape):,}", f"{spec.offset:,}", method)
    table.add_row("total", "", f"{manifest.num_parameters:,}", "", "")
    return table


def _signatures(graph: bytes) -> Table:
    """One row per signature."""
    table = Table("signature", "inputs", "outputs")
    for name, (inputs, outputs) in signatures(graph).items():
        table.add_row(name, ", ".join(inputs), ", ".join(outputs))
    return table


def _operators(graph: bytes) -> Table:
    """How often each operator is used, over all signatures."""
    table = Table("operators", "uses")
    for name, count in Counter(operators(graph)).most_common():
        table.add_row(name, str(count))
    return table
