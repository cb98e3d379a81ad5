"""Flower's and Apple's simulators on the job that ours is compared with: client-rounds per second, and memory.

Each run is a new process tree in the peer's own environment (``.peers``, made once). Runs of the peers alternate, so
that a slow moment of the machine hits all. The rate is that of the median round after the warm-up, by the peer's own
clock between rounds; starting Ray, importing torch and making data do not count. A run whose tree holds more memory
than ``--memory-limit-mb`` is ended, and so reported. How each peer is run, and why so: docs/simulation-benchmarks.md.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks import process_tree
from benchmarks.command import parser
from benchmarks.peers.client import PeerError
from benchmarks.peers.environments import PeerMissingError, isolated, prepare
from benchmarks.peers.simulation_job import (
    CNN_PARAMETERS,
    MODES,
    Job,
    JobError,
    client_rounds_per_s,
    round_seconds,
)
from benchmarks.timing import cpu_name

SCRIPTS = Path(__file__).resolve().parent / "peers"
PEERS: Mapping[str, str] = {"flower_simulation": "flower_simulation.py", "pfl": "pfl_simulation.py"}
"""Environment and its script."""
MEMORY_LIMIT_MB = 14_000.0
RUN_WITHIN_S = 900.0
FEWEST_LOOKS = 2
LOOK_EVERY_S = 0.25  # looking costs the kernel a walk over the pages; oftener would slow what is measured


@dataclass(frozen=True)
class Result:
    """One run: client-rounds per second, its rounds' seconds, the tree's peak memory in MB of 2^20 bytes, versions.

    `cpu_ms` is what processors worked for one client-round, in all processes; others on the machine disturb it less.
    None if the timed rounds were over between two looks.
    """

    client_rounds_per_s: float
    cpu_ms: float | None
    round_s: tuple[float, ...]
    peak_pss_mb: float
    peak_rss_mb: float
    versions: dict[str, str]


@dataclass(frozen=True)
class Bounds:
    """When a run is ended: proportional memory of its tree in MB, and seconds."""

    memory_mb: float = MEMORY_LIMIT_MB
    within_s: float = RUN_WITHIN_S


def run_job(peer: str, job: Job, *, bounds: Bounds | None = None) -> Result:
    """Run it once, in a process tree of its own.

    Args:
        peer: a name in `PEERS`.
        job: what to do.
        bounds: when to give up.

    Raises:
        PeerMissingError: its environment could not be made.
        PeerError: it failed, took too long, or wanted too much memory; the message says which.
    """
    command = [str(prepare(peer)), str(SCRIPTS / PEERS[peer])]
    return run_command(peer, [*command, job.text()], job, bounds=bounds)


def run_command(name: str, command: Sequence[str], job: Job, *, bounds: Bounds | None = None) -> Result:
    """Run a job by a command, in a process tree of its own.

    Args:
        name: who does it.
        command: whose last line of output is the result.
        job: what it does.
        bounds: when to give up.

    Raises:
        PeerError: it failed, took too long, or wanted too much memory; the message says which.
    """
    bounds = bounds or Bounds()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        with (
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=said, text=True, env=_environment(job), start_new_session=True
            ) as process,
            process_tree.MemoryWatch(process.pid, every_s=LOOK_EVERY_S) as watch,
            _Guard(process, watch, bounds) as guard,
        ):
            answer = process.stdout.read() if process.stdout else ""
            process.wait()
        if guard.reason:
            raise PeerError(f"The peer {name} was ended: {guard.reason}.")
        if process.returncode:
            said.seek(0)
            raise PeerError(f"The peer {name} failed with {process.returncode}; its last words: {_last_line(said)}")
    return result_of(name, job, answer, peak=watch.peak(), looks=guard.looks)


def result_of(
    peer: str, job: Job, answer: str, *, peak: process_tree.Memory, looks: Sequence[tuple[float, float]] = ()
) -> Result:
    """What the last line of a peer's output says.

    Args:
        peer: who said it.
        job: what it was asked for.
        answer: its standard output.
        peak: of its tree.
        looks: by the peer's clock, the processor seconds that its tree had used.

    Raises:
        PeerError: it is no result of this job.
    """
    line = _last_line(answer.splitlines())
    try:
        fields = json.loads(line)
        times = [float(each) for each in fields["times"]]
        versions = {str(name): str(version) for name, version in fields["versions"].items()}
        if len(times) != job.warm_up + job.rounds + 1:
            raise JobError(f"{len(times)} times for {job.warm_up + job.rounds} rounds")
        seconds = round_seconds(times, warm_up=job.warm_up)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise PeerError(f"The peer {peer} said {line[:80]!r} instead of its result: {error}.") from error
    cpu_s = spent_between(looks, times[job.warm_up], times[-1])
    return Result(
        client_rounds_per_s=client_rounds_per_s(seconds, clients=job.clients),
        cpu_ms=None if cpu_s is None else 1000 * cpu_s / (job.clients * job.rounds),
        round_s=tuple(seconds),
        peak_pss_mb=peak.pss_mb,
        peak_rss_mb=peak.rss_mb,
        versions=versions,
    )


def spent_between(looks: Sequence[tuple[float, float]], start: float, end: float) -> float | None:
    """Processor seconds from start to end, straight between looks; None with fewer than two looks in between.

    Args:
        looks: pairs of time and of the seconds used until then, both rising.
        start: a time.
        end: a later one.
    """
    if sum(start <= at <= end for at, _ in looks) < FEWEST_LOOKS:
        return None
    times, used = zip(*looks, strict=True)
    return float(np.interp(end, times, used) - np.interp(start, times, used))


def interleaved(
    peers: Sequence[str],
    jobs: Iterable[Job],
    *,
    repeats: int,
    bounds: Bounds,
    fit: Callable[[str, Job], Job] | None = None,
) -> list[dict[str, object]]:
    """One record for each job and peer; a peer that fails at a job is not asked for it again.

    Args:
        peers: names in `PEERS`; they take turns.
        jobs: one after the other.
        repeats: turns of each peer at each job.
        bounds: when a run is given up.
        fit: makes the job into the peer's; `tuned` if not given.
    """
    fit = fit or tuned
    records = []
    for job in jobs:
        runs: dict[str, list[Result]] = {peer: [] for peer in peers}
        failures: dict[str, str] = {}
        for _ in range(repeats):
            for peer in peers:
                if peer in failures:
                    continue
                try:
                    runs[peer].append(run_job(peer, fit(peer, job), bounds=bounds))
                except (PeerError, PeerMissingError) as error:
                    failures[peer] = str(error)
                print(
                    f"simulation_peers: {peer} {job.text()}: {_summary(runs[peer], failures.get(peer))}",
                    file=sys.stderr,
                )
        for peer in peers:
            records.append({"peer": peer, "job": asdict(fit(peer, job)), **medians(runs[peer])})
            if peer in failures:
                records[-1]["failure"] = failures[peer]
    return records


def tuned(peer: str, job: Job) -> Job:
    """The job with the workers that were fastest for this peer on two cores; docs/simulation-benchmarks.md."""
    return replace(job, workers=FASTEST_WORKERS[peer][job_kind(job)])


def job_kind(job: Job) -> str:
    """``real``, ``noop`` or ``million``: what the numbers are called after."""
    return "real" if job.mode == "real" else "noop" if job.parameters < 100_000 else "million"


# pfl's no-op: adding up over two processes costs more than it saves. Its others were not decided on a busy machine.
FASTEST_WORKERS: Mapping[str, Mapping[str, int]] = {
    "flower_simulation": {"real": 2, "noop": 2, "million": 2},
    "pfl": {"real": 2, "noop": 1, "million": 2},
}


def medians(runs: Sequence[Result]) -> dict[str, object]:
    """Over repeats: the median rate with all rates, and the highest memory."""
    if not runs:
        return {"runs": 0}
    rates = [run.client_rounds_per_s for run in runs]
    cpu_ms = [run.cpu_ms for run in runs if run.cpu_ms is not None]
    return {
        "runs": len(runs),
        "client_rounds_per_s": statistics.median(rates),
        "all_client_rounds_per_s": rates,
        "cpu_ms": statistics.median(cpu_ms) if cpu_ms else None,
        "peak_pss_mb": max(run.peak_pss_mb for run in runs),
        "peak_rss_mb": max(run.peak_rss_mb for run in runs),
        "versions": runs[0].versions,
    }


class _Guard:
    """Ends a tree that holds too much memory or takes too long, as a context manager; also whatever is left of it."""

    def __init__(self, process: subprocess.Popen[str], watch: process_tree.MemoryWatch, bounds: Bounds) -> None:
        self._process, self._watch, self._bounds = process, watch, bounds
        self.reason: str | None = None
        self.looks: list[tuple[float, float]] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> _Guard:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        if self._process.poll() is None:
            self._end()

    def _run(self) -> None:
        deadline = time.monotonic() + self._bounds.within_s
        while not self._done.wait(LOOK_EVERY_S):
            # A peer's times are of the same clock: Linux has one that is monotonic for all processes.
            self.looks.append((time.perf_counter(), process_tree.cpu_s(self._process.pid)))
            if (held := self._watch.peak().pss_mb) > self._bounds.memory_mb:
                self.reason = f"it held {held:.0f} MB, more than the {self._bounds.memory_mb:.0f} MB it may"
            elif time.monotonic() > deadline:
                self.reason = f"it had not ended within {self._bounds.within_s:g} s"
            if self.reason:
                self._end()
                return

    def _end(self) -> None:
        """Every process of the tree: those of Ray are in sessions of their own."""
        for member in reversed(process_tree.processes(self._process.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(member, signal.SIGKILL)


def _environment(job: Job) -> dict[str, str]:
    """As many threads as the job says, no graphics card."""
    threads = {name: str(job.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    return isolated() | threads | {"CUDA_VISIBLE_DEVICES": ""}


def _last_line(lines: Iterable[str]) -> str:
    """The last that is not empty."""
    return next((line.strip() for line in reversed(list(lines)) if line.strip()), "nothing")


def _summary(runs: Sequence[Result], failure: str | None) -> str:
    """What came of the latest run."""
    return failure or f"{runs[-1].client_rounds_per_s:.1f} client-rounds/s, {runs[-1].peak_pss_mb:.0f} MB"


def main() -> None:
    """The command line."""
    options = parser("simulation_peers", __doc__)
    options.add_argument("--peer", action="append", choices=PEERS, help="only this one (may be repeated)")
    options.add_argument("--mode", action="append", choices=(*MODES, "million"), help="only this one (may be repeated)")
    options.add_argument("--clients", type=int, action="append", help="may be repeated; 100 unless given")
    options.add_argument("--rounds", type=int, default=5, help="timed rounds of each run")
    options.add_argument("--repeats", type=int, default=3, help="runs of each peer and job")
    options.add_argument(
        "--workers", type=int, action="append", help="instead of what was found fastest; may be repeated"
    )
    options.add_argument("--memory-limit-mb", type=float, default=MEMORY_LIMIT_MB)
    arguments = options.parse_args()
    modes = arguments.mode or [*MODES, "million"]
    try:
        jobs = [make_job(mode, clients, arguments.rounds) for mode in modes for clients in arguments.clients or [100]]
        jobs = [replace(job, workers=workers) for job in jobs for workers in arguments.workers or [job.workers]]
    except JobError as error:
        raise SystemExit(str(error)) from error
    records = interleaved(
        arguments.peer or list(PEERS),
        jobs,
        repeats=arguments.repeats,
        bounds=Bounds(memory_mb=arguments.memory_limit_mb),
        fit=(lambda _, job: job) if arguments.workers else tuned,
    )
    if arguments.json:
        print(json.dumps({"processor": cpu_name(), "cores": os.cpu_count(), "runs": records}, indent=1))
        return
    for record in records:
        print(json.dumps(record))


def make_job(mode: str, clients: int, rounds: int) -> Job:
    """The job that a word of the command line stands for; ``million`` is a no-op of a million parameters."""
    if mode == "million":
        return Job("noop", clients=clients, rounds=rounds, parameters=1_000_000)
    return Job(mode, clients=clients, rounds=rounds, parameters=CNN_PARAMETERS)


if __name__ == "__main__":
    main()
