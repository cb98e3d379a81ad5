"""A card for every model of the zoo: what it takes and gives, what it weighs, and what a step costs on this machine.

Everything but time and resident memory comes from the committed bundles. The step is one call of ``train`` at the
bundle's batch size on one thread, the median over interleaved blocks; resident memory is what a fresh process grows by
when it loads the graph and runs three steps of each size that the graph has.

    python -m benchmarks.zoo_cards                       # the cards
    python -m benchmarks.zoo_cards --json
    python -m benchmarks.zoo_cards --write docs/zoo.md   # put the cards into the page, between its two markers
"""

from __future__ import annotations

import functools
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.command import parser
from benchmarks.timing import Lengths, alternate, timed
from device_client.training import keep_masks
from fl_protocol.adapters.tflite_graph import Runtime, TfliteGraph
from fl_protocol.bundle import ModelBundle, open_bundle
from fl_protocol.signing import public_key_from_hex
from models import catalog

BUNDLES = Path(__file__).parents[1] / "models" / "bundles"
RUNTIMES: tuple[Runtime, ...] = ("litert", "tflite_runtime")
BEGIN, END = "<!-- cards: python -m benchmarks.zoo_cards --write docs/zoo.md -->", "<!-- end of cards -->"
GROWTH = """
import sys
from benchmarks.zoo_cards import every_size, opened, resident_bytes
steps_of = every_size
import numpy as np, ai_edge_litert.interpreter
before = resident_bytes()
for step in steps_of(opened(sys.argv[1]), "litert"):
    for _ in range(3): step()
print(resident_bytes() - before)
"""


def main() -> None:
    """Measure, and print or write."""
    command = parser("zoo_cards", __doc__)
    command.add_argument("--write", type=Path, help="page with the markers to put the cards into")
    command.add_argument("--blocks", type=int, default=9, help="alternating blocks (default 9)")
    arguments = command.parse_args()
    times = step_times(arguments.blocks)
    cards = [card(name, {runtime: times[name, runtime] for runtime in RUNTIMES}) for name in catalog.MODELS]
    if arguments.write:
        page = arguments.write.read_text(encoding="utf-8")
        before, rest = page.split(BEGIN)
        text = "\n".join(as_text(each) for each in cards)
        arguments.write.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8")
    elif arguments.json:
        print(json.dumps(cards, indent=1))
    else:
        print("\n".join(as_text(each) for each in cards))


@functools.cache
def opened(name: str) -> ModelBundle:
    """A committed bundle."""
    publisher = public_key_from_hex((BUNDLES / "publisher.pub").read_text(encoding="ascii"))
    return open_bundle((BUNDLES / f"{name}.covey").read_bytes(), publisher=publisher)


def one_step(bundle: ModelBundle, runtime: Runtime) -> functools.partial[Any]:
    """A call of ``train`` on random examples, loaded and ready."""
    return every_size(bundle, runtime)[-1]


def every_size(bundle: ModelBundle, runtime: Runtime) -> list[functools.partial[Any]]:
    """A call on each number of rows that the graph takes, the most last."""
    graph = TfliteGraph.of_bundle(bundle, runtime=runtime)
    return [_call(graph, bundle, size) for size in graph.train_sizes]


def _call(graph: TfliteGraph, bundle: ModelBundle, size: int) -> functools.partial[Any]:
    """On random examples."""
    manifest, rng = bundle.manifest, np.random.default_rng(0)
    label = manifest.label
    if label.kind in ("class", "input"):
        y = rng.integers(0, max(len(label.names), 1), size).astype(np.int32)
    else:
        y = rng.random((size, len(label.names))).astype(np.float32)
    return functools.partial(
        graph.train,
        bundle.params,
        rng.standard_normal((size, *manifest.input.shape)).astype(np.float32),
        y,
        np.ones(size, np.float32),
        clip=1.0,
        dropout=keep_masks(manifest.dropout, size, rng.bytes) if manifest.dropout else None,
    )


def step_times(blocks: int) -> dict[tuple[str, Runtime], float]:
    """Milliseconds of a step by model and runtime, all taking turns."""
    steps = {(name, runtime): one_step(opened(name), runtime) for name in catalog.MODELS for runtime in RUNTIMES}
    times = alternate({key: timed(step) for key, step in steps.items()}, Lengths(blocks, 15))
    return {key: statistics.median(each) for key, each in times.items()}


def resident_bytes() -> int:
    """Of this process, now."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return 1024 * int(line.split()[1])


def card(name: str, step_ms: dict[Runtime, float]) -> dict[str, Any]:
    """Everything a reader asks first."""
    bundle = opened(name)
    manifest = bundle.manifest
    growth = subprocess.run([sys.executable, "-c", GROWTH, name], capture_output=True, text=True, check=True)
    return {
        "name": name,
        "description": manifest.description,
        "input": [
            f"{channel} [{unit}]" for channel, unit in zip(manifest.input.channels, manifest.input.units, strict=True)
        ],
        "shape": list(manifest.input.shape),
        "sampling_rate_hz": manifest.input.sampling_rate_hz,
        "label": manifest.label.kind,
        "outputs": list(manifest.label.names),
        "output_units": list(manifest.label.units),
        "loss": manifest.loss.name,
        "preprocessing": manifest.preprocessing,
        "layers": [f"{layer.kind} {'x'.join(map(str, layer.output_shape))}" for layer in manifest.layers],
        "parameters": manifest.num_parameters,
        "batch_size": manifest.batch_size,
        "train_mflop": manifest.train_flops / 1e6,
        "train_arena_bytes": manifest.train_arena_bytes,
        "resident_growth_bytes": int(growth.stdout),
        "step_ms": dict(step_ms),
        "bundle_bytes": (BUNDLES / f"{name}.covey").stat().st_size,
        "data": manifest.data,
    }


def as_text(values: dict[str, Any]) -> str:
    """One card in Markdown."""
    shape = " x ".join(map(str, values["shape"]))
    rate = f" at {values['sampling_rate_hz']:g} Hz" if values["sampling_rate_hz"] else ""
    outputs = ", ".join(values["outputs"]) or "the input itself"
    units = f" [{', '.join(values['output_units'])}]" if values["output_units"] else ""
    rows = {
        "input": f"{shape}{rate}: {', '.join(values['input'])}",
        "output": f"{values['label']}: {outputs}{units}; {values['loss']}",
        "in the graph": values["preprocessing"],
        "layers": ", ".join(values["layers"]),
        "parameters": f"{values['parameters']:,}; bundle {values['bundle_bytes'] / 1000:,.0f} kB",
        f"a step of {values['batch_size']}": f"{values['train_mflop']:,.1f} MFLOP; LiteRT "
        f"{values['step_ms']['litert']:.2f} ms, tflite-runtime {values['step_ms']['tflite_runtime']:.2f} ms",
        "memory": f"arena {values['train_arena_bytes'] / 1e6:,.1f} MB planned; "
        f"process grew by {values['resident_growth_bytes'] / 1e6:,.1f} MB",
        "data": values["data"],
    }
    lines = [f"### {values['name']}", "", values["description"], "", "| | |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {text} |" for name, text in rows.items()), ""])


if __name__ == "__main__":
    main()
