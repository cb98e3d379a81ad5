"""What a DP-SGD step costs over a plain one, and how exact it is.

Both graphs are built in the run, from the same layers and the same hand-written kernels; the plain one sums the
gradients of the batch without clipping. A step is one call of the ``train`` signature, arrays in and out, on one
thread. Plain and private steps alternate in blocks, so that a slow moment of the machine hits both; a block gives its
median, and the figure is the median over blocks. The error is against per-example automatic differentiation.

    python -m benchmarks.dpsgd_step            # tables
    python -m benchmarks.dpsgd_step --json
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from benchmarks.command import parser
from models import catalog, check, steps
from models.convert import convert_signatures, input_tensors
from models.network import Network

BATCH_SIZE = 32
HEADLINE = ("watch_cnn", "litert")
PACKAGES = ("ai-edge-litert", "tflite-runtime", "tensorflow", "numpy")


def main() -> None:
    """Measure, and print."""
    command = parser("dpsgd_step", __doc__)
    command.add_argument("--blocks", type=int, default=9, help="alternating blocks, at least 5 (default 9)")
    command.add_argument("--steps", type=int, default=40, help="steps in a block (default 40)")
    arguments = command.parse_args()
    if arguments.blocks < 5:
        command.error("--blocks: at least 5, or the median says little")
    rows = [row for name in catalog.MODELS for row in measure(name, arguments.blocks, arguments.steps)]
    headline = next(row for row in rows if (row["model"], row["runtime"]) == HEADLINE)
    result = {
        "max_rel_error": max(row["max_rel_error"] for row in rows),
        "dp_over_plain": headline["dp_over_plain"],
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


def measure(name: str, blocks: int, steps_per_block: int) -> list[dict[str, Any]]:
    """One row per runtime."""
    network = Network(catalog.load(name))
    tensors = input_tensors(network, batch_size=BATCH_SIZE)
    plain_tensors = {key: value for key, value in tensors.items() if key != "clip"}
    private = convert_signatures({"train": (functools.partial(steps.clipped_step, network), tensors)})
    plain = convert_signatures({"train": (functools.partial(steps.plain_step, network), plain_tensors)})
    some = list(check.cases(network.spec, num_parameters=network.num_parameters, batch_size=BATCH_SIZE))
    inputs = next(case.inputs for case in some if case.name == "full, half clipped")
    rows = []
    for runtime in check.RUNTIMES:
        private_step = check.interpreter(runtime, private).get_signature_runner("train")
        plain_step = check.interpreter(runtime, plain).get_signature_runner("train")
        private_ms, plain_ms = alternate(
            functools.partial(private_step, **inputs),
            functools.partial(plain_step, **{key: inputs[key] for key in plain_tensors}),
            blocks=blocks,
            calls=steps_per_block,
        )
        rows.append(
            {
                "model": name,
                "runtime": runtime,
                "parameters": network.num_parameters,
                "dp_ms": statistics.median(private_ms),
                "plain_ms": statistics.median(plain_ms),
                "dp_over_plain": statistics.median(private_ms) / statistics.median(plain_ms),
                "max_rel_error": check.worst_error(private_step, some),
                "dp_ms_by_block": private_ms,
                "plain_ms_by_block": plain_ms,
            }
        )
    return rows


def alternate(
    one: Callable[[], Any], other: Callable[[], Any], *, blocks: int, calls: int
) -> tuple[list[float], list[float]]:
    """The median milliseconds of every block of both, in turns, after a block each to warm up."""
    times: tuple[list[float], list[float]] = ([], [])
    for block in range(blocks + 1):
        for step, kept in zip((one, other), times, strict=True):
            median = statistics.median(milliseconds(step) for _ in range(calls))
            if block:
                kept.append(median)
    return times


def milliseconds(step: Callable[[], Any]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    step()
    return 1000 * (time.perf_counter() - start)


def cpu_name() -> str:
    """The processor, as Linux names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


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


if __name__ == "__main__":
    main()
