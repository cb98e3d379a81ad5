"""A peer's side of the conversation: builds its modes, proves them, then times steps on request. Standard library only.

JSON, one object a line. First out: ``{"ready": true, "versions": {}, "parameters": 8646, "modes": {name: null or
"unsupported: why"}, "check": {name: max relative error}, "noise": {name: multiplier}}``. Then ``{"mode": name,
"calls": n}`` is answered by ``{"ms": [..n..]}``, and ``{"quit": true}`` by ``{"peak_rss_mb": x}`` and the end.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TextIO

import clipping

WARM_UP_CALLS = 3
CHECKED_EXAMPLES = 4


class UnsupportedError(Exception):
    """The library cannot do this mode on this network, or not rightly; the message says why."""


@dataclass(frozen=True)
class Setting:
    """What a step is built for."""

    batch_size: int
    noise_multiplier: float
    clip: float
    learning_rate: float


TIMED = Setting(batch_size=32, noise_multiplier=1.0, clip=1.0, learning_rate=0.01)


class Trainer(NamedTuple):
    """A model with its optimizer and its fixed batch."""

    step: Callable[[], object]
    """One training step; complete when it returns."""
    parameters: Callable[[], list[float]]
    """All parameters, in the order of the library's naive gradients."""


class Mode(NamedTuple):
    """A way to take the step."""

    build: Callable[[Setting], Trainer]
    """Always from the same initial parameters; raises UnsupportedError."""
    private: bool
    """Whether it clips and adds noise; a mode that is not takes no notice of the setting's clip and noise."""


class Library(NamedTuple):
    """A peer."""

    versions: Mapping[str, str]
    parameters: int
    modes: Mapping[str, Mode]
    naive_gradients: Callable[[int], Sequence[clipping.Vector]]
    """Of the first so many examples, one by one, at the initial parameters."""


class Proof(NamedTuple):
    """What the check of one mode found."""

    error: float
    noise_multiplier: float | None


def main(library: Library) -> None:
    """Serve the library on standard input and output."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--mode", action="append", choices=library.modes, help="only this one (may be repeated)")
    options.add_argument("--unchecked", action="store_true", help="no check, whose memory would count as the step's")
    arguments = options.parse_args()
    wanted = {name: library.modes[name] for name in arguments.mode or library.modes}
    # What a library prints goes to standard error; only the protocol has the real standard output.
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as channel:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        serve(library._replace(modes=wanted), sys.stdin, channel, check=not arguments.unchecked)


def serve(library: Library, requests: Iterable[str], channel: TextIO, *, check: bool) -> None:
    """Everything up to the quit request, or the end of the requests."""
    gradients = library.naive_gradients(CHECKED_EXAMPLES) if check else None
    steps: dict[str, Callable[[], object]] = {}
    proofs: dict[str, Proof] = {}
    refusals: dict[str, str | None] = {}
    for name, mode in library.modes.items():
        try:
            if gradients is not None:
                proofs[name] = prove(mode, gradients)
            steps[name] = warm(mode.build(TIMED).step)
            refusals[name] = None
        except UnsupportedError as error:
            refusals[name] = f"unsupported: {error}"
        except Exception as error:  # whatever a library raises on this network is the finding
            traceback.print_exc()
            refusals[name] = f"unsupported: {type(error).__name__}: {_first_line(error)}"
    ready = {
        "ready": True,
        "versions": dict(library.versions),
        "parameters": library.parameters,
        "modes": refusals,
        "check": {name: proof.error for name, proof in proofs.items()},
        "noise": {name: proof.noise_multiplier for name, proof in proofs.items() if proof.noise_multiplier is not None},
    }
    _say(channel, ready)
    for line in requests:
        request = json.loads(line)
        if request.get("quit"):
            _say(channel, {"peak_rss_mb": peak_rss_mb()})
            return
        _say(channel, {"ms": [milliseconds(steps[request["mode"]]) for _ in range(request["calls"])]})


def prove(mode: Mode, gradients: Sequence[clipping.Vector]) -> Proof:
    """Take one step without noise and one with, and compare with the clipped mean of these gradients.

    Raises:
        UnsupportedError: the step is not what it should be.
    """
    clip = clipping.half_clipping(gradients) if mode.private else math.inf
    expected = clipping.clipped_mean(gradients, clip)
    exact = Setting(batch_size=len(gradients), noise_multiplier=0.0, clip=clip, learning_rate=1.0)
    got = _applied(mode.build(exact))
    error = clipping.relative_error(got, expected)
    if not (error <= clipping.TOLERANCE and clipping.norm(got) <= clip * (1 + clipping.TOLERANCE)):
        raise UnsupportedError(f"its gradient is off the naively clipped one by {error:.1e}")
    if not mode.private:
        return Proof(error, None)
    noisy = Setting(batch_size=len(gradients), noise_multiplier=1.0, clip=clip, learning_rate=1.0)
    found = clipping.noise_multiplier(_applied(mode.build(noisy)), expected, clip=clip, batch_size=len(gradients))
    if not abs(found - noisy.noise_multiplier) <= clipping.NOISE_TOLERANCE:
        raise UnsupportedError(f"its noise multiplier is {found:.2f} where {noisy.noise_multiplier:.2f} was set")
    return Proof(error, found)


def warm(step: Callable[[], object]) -> Callable[[], object]:
    """The same step after it has compiled and allocated what it does only at first."""
    for _ in range(WARM_UP_CALLS):
        step()
    return step


def milliseconds(step: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    step()
    return 1000 * (time.perf_counter() - start)


def peak_rss_mb() -> float:
    """The most memory this program has held.

    Linux carries getrusage's maximum over from the process that started this one, so its own high-water mark is read.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024
    except (OSError, StopIteration):
        bytes_per_unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * bytes_per_unit / 2**20


def _applied(trainer: Trainer) -> list[float]:
    """What one step at learning rate 1 took off the parameters."""
    before = trainer.parameters()
    trainer.step()
    return clipping.difference(before, trainer.parameters())


def _first_line(error: Exception) -> str:
    """An exception's text without its stack of causes."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")


def _say(channel: TextIO, message: Mapping[str, object]) -> None:
    """One line, at once."""
    channel.write(json.dumps(message) + "\n")
    channel.flush()
