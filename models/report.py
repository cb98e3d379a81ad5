"""What is in a bundle, as tables for people."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from rich.markup import escape
from rich.table import Column, Table

from fl_protocol.bundle import ModelBundle
from fl_protocol.model_manifest import BundleManifest, LayerInfo
from fl_protocol.signing import public_key_hex
from models.flatbuffer import operators, signatures


def describe(bundle: ModelBundle, *, size_bytes: int, publisher: Ed25519PublicKey, key_file: str) -> Iterator[Table]:
    """The manifest, the layers, the signatures and the operators of a verified bundle."""
    yield _summary(bundle, size_bytes, f"{public_key_hex(publisher)} ({key_file}): signature good")
    yield _layers(bundle.manifest)
    yield _parameters(bundle.manifest)
    yield _signatures(bundle.graph)
    yield _operators(bundle.graph)


def _summary(bundle: ModelBundle, size_bytes: int, publisher: str) -> Table:
    """The manifest in short."""
    manifest = bundle.manifest
    table = Table("bundle", Column(escape(f"{manifest.name} version {manifest.version}"), overflow="fold"))
    shape = " x ".join(map(str, manifest.input.shape))
    rate = manifest.input.sampling_rate_hz
    channels = ", ".join(f"{c} [{u}]" for c, u in zip(manifest.input.channels, manifest.input.units, strict=True))
    for title, text in (
        ("publisher", publisher),
        ("description", manifest.description),
        ("data", manifest.data),
        ("input", f"{shape}{f' at {rate:g} Hz' if rate else ''}: {channels}"),
        ("label", _label(manifest)),
        ("loss", manifest.loss.name + (f", delta {manifest.loss.delta:g}" if manifest.loss.name == "huber" else "")),
        ("preprocessing", manifest.preprocessing),
        ("shared parameters", f"{manifest.num_shared_parameters:,} of {manifest.num_parameters:,}"),
        ("personal layers", ", ".join(manifest.personal_layers) or "none"),
        ("norm clip", _clip(manifest)),
        ("dropout", ", ".join(f"{m.layer}: rate {m.rate:g}, {m.units} units" for m in manifest.dropout) or "none"),
        ("batch size", str(manifest.batch_size)),
        ("train step", f"{manifest.train_flops / 1e6:,.2f} MFLOP, {manifest.train_arena_bytes:,} bytes of memory"),
        ("bundle, graph", f"{size_bytes:,} bytes, {len(bundle.graph):,} bytes"),
        ("graph digest", bundle.graph_digest.hex()),
    ):
        # Escaped: the unit [g] would read as markup.
        table.add_row(title, escape(text))
    return table


def _label(manifest: BundleManifest) -> str:
    """What the model predicts."""
    label = manifest.label
    if label.kind == "input":
        return f"the input itself, correct within {label.tolerance:g}"
    if label.kind == "value":
        values = ", ".join(f"{n} [{u}]" for n, u in zip(label.names, label.units or ("1",) * 99, strict=False))
        return f"{values}, correct within {label.tolerance:g}"
    return f"{label.kind}: {', '.join(label.names)}"


def _clip(manifest: BundleManifest) -> str:
    """One flat clip, or the groups."""
    if len(manifest.norm_clips) == 1:
        return "flat, over all layers"
    return "; ".join(f"{', '.join(group.layers)}: {group.share:.4g} of the clip" for group in manifest.norm_clips)


def _layers(manifest: BundleManifest) -> Table:
    """One row per Keras layer."""
    table = Table("layer", "kind", "output", Column("parameters", justify="right"), "per-example norm")
    for layer in manifest.layers:
        personal = " (personal)" if layer.name in manifest.personal_layers else ""
        shape = " x ".join(map(str, layer.output_shape))
        table.add_row(layer.name + personal, layer.kind, shape, f"{layer.num_parameters:,}", _methods(layer))
    return table


def _methods(layer: LayerInfo) -> str:
    """How per-example norms are computed."""
    if len(set(layer.norm_methods.values())) == 1:
        return next(iter(layer.norm_methods.values()))
    return ", ".join(f"{role}: {method}" for role, method in layer.norm_methods.items())


def _parameters(manifest: BundleManifest) -> Table:
    """One row per tensor of the flat vector."""
    right = {"justify": "right"}
    table = Table("parameter", "shape", Column("count", **right), Column("offset", **right))  # type: ignore[arg-type]
    for spec in manifest.parameters:
        shape = " x ".join(map(str, spec.shape))
        table.add_row(spec.name, shape, f"{math.prod(spec.shape):,}", f"{spec.offset:,}")
    table.add_row("total", "", f"{manifest.num_parameters:,}", "")
    return table


def _signatures(graph: bytes) -> Table:
    """One row per signature."""
    table = Table("signature", "inputs", "outputs")
    for name, (inputs, outputs) in signatures(graph).items():
        table.add_row(name, ", ".join(inputs), ", ".join(outputs))
    return table


def _operators(graph: bytes) -> Table:
    """How often each operator is used, over all signatures."""
    table = Table("operator", Column("uses", justify="right"))
    for name, count in Counter(operators(graph)).most_common():
        table.add_row(name, str(count))
    return table
