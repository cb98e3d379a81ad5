"""What a DP-SGD step costs: over a plain step of the same graph, and beside the peers.

Zoo: for every model of the catalogue and both runtimes, the ``train`` signature (clipped sum) against the same graph
without clipping, arrays in and out, one thread. Both graphs are built in the run; the error is against per-example
automatic differentiation.

Peers: one network (Conv1D 32 k5, ReLU, MaxPool 2, Conv1D 32 k5, ReLU, global average pool, Dense 64, ReLU, Dense 6 on
128x6 windows, 8,646 parameters, B=32) in PyTorch with Opacus and in TensorFlow with tensorflow-privacy, each in an
environment of its own that is made once below .peers (some GB). A peer's private step clips, adds noise and updates; so
does ours (`device_client.training.train_locally`, one step of 32 records), and the ratios compare these. A peer that
cannot be installed is named, and its keys are null.

Everything takes turns in blocks, so that a slow moment of the machine hits all; a block gives its median, and the
figure is the median over blocks.

    python -m benchmarks.dpsgd_step              # tables
    python -m benchmarks.dpsgd_step --json
    python -m benchmarks.dpsgd_step --no-peers   # the zoo only
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf

from benchmarks.command import parser
from benchmarks.peers import client, environments
from benchmarks.timing import Lengths, alternate, cpu_name, timed
from device_client.adapters.system_entropy import system_entropy
from device_client.training import Records, train_locally
from fl_protocol.adapters.tflite_graph import TfliteGraph
from fl_protocol.messages import TrainingPlanMsg
from fl_protocol.model_manifest import InputSchema, LabelSchema, LossSpec, TrainingDefaults
from models import catalog, check, steps
from models.convert import convert_network, convert_signatures, input_tensors
from models.network import Network
from models.quiet import quiet_tensorflow
from models.specs import ModelSpec

BATCH_SIZE = 32
HEADLINE = ("watch_cnn", "litert")
PACKAGES = ("ai-edge-litert", "tflite-runtime", "tensorflow", "numpy")
OURS, CLIPPED_SUM = "covey", "covey, clipped sum only"
PRIVATE_MODES = {
    "torch": ("hooks", "functorch", "ew", "ghost"),
    "tensorflow": ("dp_model", "dp_model_xla", "dp_model_fast", "vectorized", "vectorized_xla"),
}
PLAIN_MODES = {"torch": ("plain",), "tensorflow": ("plain", "plain_xla")}


def main() -> None:
    """Measure, and print."""
    command = parser("dpsgd_step", __doc__)
    command.add_argument("--blocks", type=int, default=9, help="alternating blocks, at least 5 (default 9)")
    command.add_argument("--steps", type=int, default=40, help="steps in a block (default 40)")
    command.add_argument("--no-peers", action="store_true", help="measure the zoo only")
    command.add_argument("--peers-folder", type=Path, default=Path(".peers"), help="where peers are installed")
    arguments = command.parse_args()
    if arguments.blocks < 5:
        command.error("--blocks: at least 5, or the median says little")
    lengths = Lengths(arguments.blocks, arguments.steps)
    rows = [row for name in catalog.MODELS for row in measure_model(name, lengths)]
    headline = next(row for row in rows if (row["model"], row["runtime"]) == HEADLINE)
    result = {
        "max_rel_error": max(row["max_rel_error"] for row in rows),
        "dp_over_plain": headline["dp_over_plain"],
        **({} if arguments.no_peers else measure_peers(arguments.peers_folder, lengths)),
        "batch_size": BATCH_SIZE,
        "threads": 1,
        "rows": rows,
        "cpu": cpu_name(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }
    if arguments.json:
        print(json.dumps(result, indent=1))
    else:
        print_tables(result)


def measure_model(name: str, lengths: Lengths) -> list[dict[str, Any]]:
    """One row per runtime."""
    say(f"{name}: converting")
    network = Network(catalog.load(name))
    tensors = input_tensors(network, batch_size=BATCH_SIZE)
    plain_tensors = {key: value for key, value in tensors.items() if key != "clip"}
    with quiet_tensorflow():
        private = convert_signatures({"train": (functools.partial(steps.clipped_step, network), tensors)})
        plain = convert_signatures({"train": (functools.partial(steps.plain_step, network), plain_tensors)})
        some = list(check.cases(network, batch_size=BATCH_SIZE))
    inputs = next(case.inputs for case in some if case.name == "full, half clipped")
    rows = []
    for runtime in check.RUNTIMES:
        say(f"{name}: {runtime}")
        private_step = check.interpreter(runtime, private).get_signature_runner("train")
        plain_step = check.interpreter(runtime, plain).get_signature_runner("train")
        times = alternate(
            {
                "dp": timed(functools.partial(private_step, **inputs)),
                "plain": timed(functools.partial(plain_step, **{key: inputs[key] for key in plain_tensors})),
            },
            lengths,
        )
        rows.append(
            {
                "model": name,
                "runtime": runtime,
                "parameters": network.num_parameters,
                "dp_ms": statistics.median(times["dp"]),
                "plain_ms": statistics.median(times["plain"]),
                # Of neighbouring blocks: what slows the machine for a while slows both.
                "dp_over_plain": statistics.median(a / b for a, b in zip(times["dp"], times["plain"], strict=True)),
                "max_rel_error": check.worst_error(private_step, some),
                "dp_ms_by_block": times["dp"],
                "plain_ms_by_block": times["plain"],
            }
        )
    return rows


def measure_peers(folder: Path, lengths: Lengths) -> dict[str, Any]:
    """The same network here and in the peers."""
    missing: dict[str, str] = {}
    unsupported: dict[str, str] = {}
    versions: dict[str, str] = {}
    blocks: dict[str, Callable[[int], list[float]]] = dict(our_steps())
    with ExitStack() as stack:
        for name in PLAIN_MODES:  # other environments hold no library that takes steps
            try:
                python = environments.prepare(name, cache=folder)
                peer = stack.enter_context(client.Peer(name, python))
            except (environments.PeerMissingError, client.PeerError) as error:
                missing[name] = str(error)
                continue
            versions |= peer.ready.versions
            unsupported |= {f"{name} {mode}": why for mode, why in peer.ready.modes.items() if why is not None}
            blocks |= {f"{name} {mode}": functools.partial(peer.time, mode) for mode in peer.ready.supported}
        say("peers: timing")
        times = alternate(blocks, lengths)
    ms = {name: statistics.median(each) for name, each in times.items()}
    return {
        "examples_per_s_over_tf_privacy": over_best(ms, "tensorflow"),
        "examples_per_s_over_opacus": over_best(ms, "torch"),
        "private_over_tf_plain": over_plain(ms, OURS),
        "clipped_sum_over_tf_plain": over_plain(ms, CLIPPED_SUM),
        "peers": {
            "ms": ms,
            "ms_by_block": times,
            "missing": missing,
            "unsupported": unsupported,
            "versions": versions,
        },
    }


def our_steps() -> dict[str, Callable[[int], list[float]]]:
    """Our own step of the peers' network: the graph alone, and with noise and update as a device runs it."""
    say("covey: converting the peers' network")
    with quiet_tensorflow():
        network = Network(peers_network())
        graph_bytes = convert_network(network, batch_size=BATCH_SIZE)
    graph = TfliteGraph(graph_bytes, batch_size=BATCH_SIZE, num_parameters=network.num_parameters, runtime="litert")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((BATCH_SIZE, *network.spec.input.shape)).astype(np.float32)
    records = Records(x, rng.integers(0, 6, BATCH_SIZE).astype(np.int32))
    params, mask = network.initial_parameters, np.ones(BATCH_SIZE, np.float32)
    plan = TrainingPlanMsg(
        sampling_rate=1.0,
        local_steps=1,
        learning_rate=0.1,
        l2_norm_clip=1.0,
        noise_multiplier=1.0,
        expected_batch_size=float(BATCH_SIZE),
    )
    return {
        OURS: timed(lambda: train_locally(graph, params, records, plan=plan, entropy=system_entropy)),
        CLIPPED_SUM: timed(lambda: graph.train(params, records.x, records.y, mask, clip=1.0)),
    }


def peers_network() -> ModelSpec:
    """The network that `benchmarks.peers` has in PyTorch and TensorFlow."""
    layers = tf.keras.layers
    model = tf.keras.Sequential(
        [
            tf.keras.Input((128, 6)),
            layers.Conv1D(32, 5, activation="relu"),
            layers.MaxPooling1D(2),
            layers.Conv1D(32, 5, activation="relu"),
            layers.GlobalAveragePooling1D(),
            layers.Dense(64, activation="relu"),
            layers.Dense(6),
        ],
        name="peers_network",
    )
    return ModelSpec(
        name="peers_network",
        description="For comparison.",
        model=model,
        input=InputSchema((128, 6), tuple("abcdef"), ("1",) * 6, 0.0),
        label=LabelSchema("class", tuple("uvwxyz")),
        loss=LossSpec("softmax_cross_entropy"),
        defaults=TrainingDefaults(0.1, 1.0, 0.0),
    )


def over_best(ms: dict[str, float], peer: str) -> float | None:
    """How many times the examples a second of the peer's best private mode we process; None if it was not measured."""
    found = [ms[f"{peer} {mode}"] for mode in PRIVATE_MODES[peer] if f"{peer} {mode}" in ms]
    return min(found) / ms[OURS] if found else None


def over_plain(ms: dict[str, float], ours: str) -> float | None:
    """Our step's time over TensorFlow's non-private one, the faster of its modes; None if it was not measured."""
    found = [ms[f"tensorflow {mode}"] for mode in PLAIN_MODES["tensorflow"] if f"tensorflow {mode}" in ms]
    return ms[ours] / min(found) if found else None


def say(text: str) -> None:
    """Progress, for whoever waits."""
    if sys.stderr.isatty():
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def print_tables(result: dict[str, Any]) -> None:
    """For people."""
    print(f"One step, B={BATCH_SIZE}, one thread, {result['cpu']}\n")
    print(f"{'model':<16}{'runtime':<16}{'private ms':>11}{'plain ms':>10}{'ratio':>7}{'max rel. error':>16}")
    for row in result["rows"]:
        print(
            f"{row['model']:<16}{row['runtime']:<16}{row['dp_ms']:>11.3f}{row['plain_ms']:>10.3f}"
            f"{row['dp_over_plain']:>7.3f}{row['max_rel_error']:>16.1e}"
        )
    print(f"\nmax_rel_error {result['max_rel_error']:.1e}   dp_over_plain {result['dp_over_plain']:.3f} {HEADLINE}")
    if "peers" not in result:
        return
    print(f"\n{'8,646 parameters':<32}{'ms':>8}{'examples/s':>12}")
    for name, ms in sorted(result["peers"]["ms"].items(), key=lambda item: item[1]):
        print(f"{name:<32}{ms:>8.3f}{1000 * BATCH_SIZE / ms:>12,.0f}")
    for kind in ("missing", "unsupported"):
        for name, why in result["peers"][kind].items():
            print(f"{name}: {kind}: {why}")
    print()
    for key in (
        "examples_per_s_over_tf_privacy",
        "examples_per_s_over_opacus",
        "private_over_tf_plain",
        "clipped_sum_over_tf_plain",
    ):
        print(f"{key:<32}{'not measured' if result[key] is None else f'{result[key]:.2f}'}")


if __name__ == "__main__":
    main()
