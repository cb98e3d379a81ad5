"""What every simulator in the benchmark is asked to do: the job, its data, its model's shapes, and its arithmetic.

Each peer's script imports this in its own environment, as a file beside it; so it needs nothing but numpy. Federated
averaging (McMahan et al. 2017, arXiv 1602.05629): all clients take part in every round and weigh the same. With
``real`` each takes `STEPS` steps of plain SGD on batches of `BATCH_SIZE`; with ``noop`` each returns the parameters
that it was given.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

CHANNELS, WINDOW, CLASSES = 6, 128, 7
FILTERS, KERNEL, HIDDEN = 32, 5, 64
CHANNEL_SCALE = (1.0, 1.0, 1.0, math.pi, math.pi, math.pi)
SHAPES: Mapping[str, tuple[int, ...]] = {
    "conv1/kernel": (KERNEL, CHANNELS, FILTERS),
    "conv1/bias": (FILTERS,),
    "conv2/kernel": (KERNEL, FILTERS, FILTERS),
    "conv2/bias": (FILTERS,),
    "hidden/kernel": (FILTERS, HIDDEN),
    "hidden/bias": (HIDDEN,),
    "logits/kernel": (HIDDEN, CLASSES),
    "logits/bias": (CLASSES,),
}
"""The parameters of `watch_cnn`, as its bundle's manifest has them."""
CNN_PARAMETERS = sum(math.prod(shape) for shape in SHAPES.values())
EXAMPLES, STEPS, BATCH_SIZE = 256, 8, 32
LEARNING_RATE = 0.05
MODES = ("real", "noop")


class JobError(ValueError):
    """A job that nobody can run, or that a peer did not do; the message says what was expected."""


@dataclass(frozen=True)
class Job:
    """One run of a simulator.

    Args:
        mode: ``real`` or ``noop``.
        clients: all of them train in every round; at least 2.
        rounds: timed rounds, at least 1.
        warm_up: rounds before those, which are not counted; at least 1.
        parameters: float32 values in the model; `CNN_PARAMETERS` if the mode is ``real``.
        workers: processes that simulate clients; at least 1.
        threads: of torch in each of them; at least 1.
        seed: of the data; 0 or more.

    Raises:
        JobError: a value is outside these ranges.
    """

    mode: str
    clients: int = 100
    rounds: int = 5
    warm_up: int = 1
    parameters: int = CNN_PARAMETERS
    workers: int = 2
    threads: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise JobError(f"The mode must be one of {', '.join(MODES)}, not {self.mode!r}.")
        lowest = {"clients": 2, "rounds": 1, "warm_up": 1, "parameters": 1, "workers": 1, "threads": 1, "seed": 0}
        for name, least in lowest.items():
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise JobError(f"{name} must be a whole number of at least {least}, not {value!r}.")
        if self.mode == "real" and self.parameters != CNN_PARAMETERS:
            raise JobError(f"A real job trains {CNN_PARAMETERS} parameters, not {self.parameters}; leave that out.")

    def text(self) -> str:
        """As one line of JSON, for a peer's command line."""
        return json.dumps(asdict(self))


def parse_job(text: str) -> Job:
    """Read what `Job.text` wrote.

    Raises:
        JobError: not such a line.
    """
    try:
        fields = json.loads(text)
        return Job(**fields)
    except (TypeError, json.JSONDecodeError) as error:
        raise JobError(f"Expected a job as one JSON object, not {text[:80]!r}: {error}.") from error


def client_windows(client: int, *, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """One client's windows, the same for everybody who asks: noise, on a sine whose frequency is the class.

    Args:
        client: its number, 0 or more.
        seed: of the whole population.

    Returns:
        float32 ``[256, 128, 6]`` in the units of `watch_cnn`, and labels int32 ``[256]`` in 0..6.
    """
    random = np.random.default_rng([seed, client])
    labels = random.integers(CLASSES, size=EXAMPLES, dtype=np.int32)
    windows = random.standard_normal((EXAMPLES, WINDOW, CHANNELS), dtype=np.float32)
    time = np.arange(WINDOW, dtype=np.float32)[None, :, None]
    frequency = (labels[:, None, None].astype(np.float32) + 1) / 32
    windows += np.sin(2 * np.pi * frequency * time).astype(np.float32)
    return windows, labels


def flat_parameters(count: int) -> NDArray[np.float32]:
    """What a no-op job hands round: float32 ``[count]``, nowhere zero, so that losing it would be seen."""
    return np.linspace(0.5, 1.5, count, dtype=np.float32)


def round_seconds(times: Sequence[float], *, warm_up: int) -> list[float]:
    """How long each timed round took.

    Args:
        times: when the job began its first round and when each round ended, in seconds, rising.
        warm_up: rounds that do not count.

    Raises:
        JobError: too few times, or time went backwards.
    """
    if len(times) < warm_up + 2:
        raise JobError(f"{len(times)} times are too few for {warm_up} rounds of warm-up and one that counts.")
    taken = [end - start for start, end in itertools.pairwise(times)]
    if min(taken) <= 0:
        raise JobError("Every round must end after the one before it.")
    return taken[warm_up:]


def client_rounds_per_s(seconds: Sequence[float], *, clients: int) -> float:
    """Clients trained per second in the median round: one slow moment of the machine does not decide."""
    return clients / statistics.median(seconds)


def check_unchanged(parameters: NDArray[np.float32], *, count: int) -> None:
    """A no-op job's last global model is its first, but for the rounding of averages.

    Raises:
        JobError: it is not, so the peer did something else.
    """
    expected = flat_parameters(count)
    if parameters.shape != expected.shape or not np.allclose(parameters, expected, rtol=1e-4, atol=0):
        raise JobError("The global model of a no-op job must stay as it was, and it did not.")


def check_learned(before: float, after: float) -> None:
    """A real job's loss on the first client's windows falls.

    Raises:
        JobError: it does not, so nobody trained, or nobody aggregated.
    """
    if not after < before:
        raise JobError(f"The loss must fall in a real job; it went from {before:.4f} to {after:.4f}.")


def main(run: Callable[[Job], Mapping[str, object]]) -> None:
    """A peer's command line: the job is the only argument, and the last line of standard output is its result."""
    if len(sys.argv) != 2:
        raise SystemExit("Expected one argument: the job as JSON.")
    print(json.dumps(run(parse_job(sys.argv[1]))), flush=True)
