"""Rounds of real updates that are ingested beside something else, in processes of their own.

A real mosquitto and the real ``covey-aggregator run`` over a SQLite file, with updates that are signed and sealed as a
device does it. A round's updates are sent evenly over some seconds; each waits for its signed receipt, and the round is
committed. `Beside.ingests` is set from a round's first byte to its last receipt, and not while the next is sealed.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from benchmarks.load.generator import Generator, generator
from benchmarks.load.study import DATABASE, TENANT, Settings, running_study
from benchmarks.load.uploads import Upload, encoded, seal_all

NUM_PARAMETERS = 9_000
MOST_ROUNDS = 40
_READY_S = 120.0
_ENDS_S = 60.0


@dataclass(frozen=True)
class Beside:
    """The processes that ingest.

    Args:
        ingests: set while updates are on their way.
    """

    ingests: Event
    _pipe: Connection

    def begin(self) -> None:
        """Start the aggregator and the first round, now that the database has everything else."""
        self._pipe.send("begin")


@dataclass(frozen=True)
class Load:
    """What is ingested: into which folder, how many updates a round, over how many seconds."""

    folder: Path
    updates: int
    spread_s: float


@contextlib.contextmanager
def ingesting(folder: Path, *, updates: int, spread_s: float) -> Iterator[tuple[Beside, Path, list[dict[str, Any]]]]:
    """Yields the processes, the database that they share with whoever else opens it, and what was ingested, filled in
    the end: seconds and resent updates of each round.

    Args:
        folder: for the study's files.
        updates: in a round.
        spread_s: over how many seconds they are sent.
    """
    start = multiprocessing.get_context("spawn")
    here, there = start.Pipe()
    flag, stop = start.Event(), start.Event()
    load = Load(folder, updates, spread_s)
    process = start.Process(target=_ingest, args=(there, flag, stop, load))
    process.start()
    rounds: list[dict[str, Any]] = []
    try:
        _expect(here, "ready")
        yield Beside(flag, here), folder / DATABASE, rounds
    finally:
        stop.set()
        if here.poll(_ENDS_S + spread_s):
            with contextlib.suppress(EOFError):
                rounds.extend(here.recv())
        process.join(_ENDS_S)
        process.kill()


def _expect(pipe: Connection, what: str) -> None:
    """Wait until the process says this. Raises RuntimeError."""
    if not pipe.poll(_READY_S) or pipe.recv() != what:
        raise RuntimeError(f"the processes that ingest were not {what} within {_READY_S:g} s")


def _ingest(told: Connection, flag: Event, stop: Event, load: Load) -> None:
    """The process that sends."""
    settings = Settings(NUM_PARAMETERS, devices=load.updates * MOST_ROUNDS, goal=load.updates, rounds=MOST_ROUNDS)
    ingested: list[dict[str, Any]] = []
    with (
        ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool,
        running_study(load.folder, settings) as study,
    ):
        told.send("ready")
        if told.recv() != "begin":
            return
        with generator(study) as sender:
            for number in range(1, MOST_ROUNDS + 1):
                if stop.is_set():
                    break
                names = range((number - 1) * load.updates, number * load.updates)
                uploads = seal_all(pool, sender.observer.await_open(number), names)
                flag.set()
                ingested.append(_round(sender, uploads, load.spread_s))
                flag.clear()
    told.send(ingested)


def _round(sender: Generator, uploads: Sequence[Upload], spread_s: float) -> dict[str, Any]:
    """Send a round's updates over some seconds, and wait for their receipts."""
    sent = encoded(uploads, tenant=TENANT)
    begun_s = time.monotonic()
    for place, upload in enumerate(uploads):
        sender.connections.run_for(begun_s + spread_s * place / len(uploads) - time.monotonic())
        sender.publisher.send(sent[upload.device])
        sender.connections.flush(sender.publisher)
    delivered = sender.await_receipts(uploads, begun_s, sent)
    return {"updates": len(uploads), "seconds": round(delivered.seconds, 2), "resent": delivered.resent}
