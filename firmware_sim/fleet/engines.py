"""Where shards are simulated: in this process, or in processes of this machine. Ray is in
`firmware_sim.fleet.ray_engine`.

Every engine gives the same bytes: what a shard does follows from its devices and from what it is handed.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import multiprocessing
import resource
import signal
import threading
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from firmware_sim.errors import FleetError
from firmware_sim.fleet.build import ShardBuilder, index_of
from firmware_sim.fleet.record import DeviceRecord
from firmware_sim.fleet.shard import Left, Shard
from firmware_sim.fleet.shared_memory import AnswerReader, AnswerWriter, SharedFile, SharedFiles, ask, asked
from firmware_sim.fleet.windows import Download, Totals, Window, WindowReport
from fl_protocol.errors import ConfigError

_END_WITHIN_S = 10.0


class PutDown(NamedTuple):
    """What a shard leaves, what it counted, and how much memory its process took at most."""

    left: Left
    totals: Totals
    peak_rss_bytes: int


class Engine(Protocol):
    """Simulates all shards of a fleet."""

    def start(self, starts_s: float, records: Sequence[DeviceRecord] | None) -> None:
        """Make the shards: new, or of a run that is resumed at `starts_s`."""

    def begin(self, window: Window) -> None:
        """Let all shards simulate a window; `collect` waits for them. At most two are begun and not collected."""

    def collect(self) -> list[WindowReport]:
        """What came of the first window that was begun and not collected, by shard."""

    def put_down(self, now_s: float) -> list[PutDown]:
        """End what runs in every shard; `start` goes on."""

    def close(self) -> None:
        """End it."""


class ShardHost:
    """One shard and the commands that an engine gives it; the same in this process and in any other.

    Args:
        scenario: path of the run's scenario file.
        number: of the shard.
        count: of shards.
        traced: name of a device of which every event is told.
        owns_process: whether nothing else runs in this process.
    """

    def __init__(
        self, scenario: Path, number: int, count: int, *, traced: str = "", owns_process: bool = False
    ) -> None:
        self._builder = ShardBuilder(scenario, number, count, traced=traced)
        self._owns_process = owns_process
        self._made: Shard | None = None

    def start(self, starts_s: float, records: tuple[DeviceRecord, ...] | None) -> None:
        """Make the shard."""
        self._made = self._builder.build(records, starts_s=starts_s)
        if self._owns_process:
            _leave_records_alone()

    def advance(self, window: Window) -> WindowReport:
        """Simulate a window."""
        return self._shard.advance(window)

    def put_down(self, now_s: float) -> PutDown:
        """End what runs."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return PutDown(self._shard.put_down(now_s), self._shard.totals, peak)

    @property
    def _shard(self) -> Shard:
        """The shard, once `start` has made it."""
        if self._made is None:
            raise FleetError("a shard was asked to work before it was made")
        return self._made


def dealt(records: Sequence[DeviceRecord] | None, number: int, count: int) -> tuple[DeviceRecord, ...] | None:
    """A shard's devices: in turn, as `firmware_sim.fleet.build.new_records` deals them."""
    return None if records is None else tuple(one for one in records if one.index % count == number)


def addressed(window: Window, number: int, count: int) -> Window:
    """A window without what is meant for other shards' devices."""
    return replace(window, down=tuple(one for one in window.down if not one.device or shard_of(one, count) == number))


def shard_of(message: Download, count: int) -> int:
    """Which shard has the device that a message is for."""
    return index_of(message.device) % count


class InProcess:
    """All shards in this process, one after the other.

    Args:
        scenario: path of the run's scenario file.
        count: of shards.
        traced: name of a device of which every event is told.
    """

    def __init__(self, scenario: Path, *, count: int = 1, traced: str = "") -> None:
        self._hosts = [ShardHost(scenario, number, count, traced=traced) for number in range(count)]
        self._begun: deque[Window] = deque()

    def start(self, starts_s: float, records: Sequence[DeviceRecord] | None) -> None:
        """Make the shards."""
        for number, host in enumerate(self._hosts):
            host.start(starts_s, dealt(records, number, len(self._hosts)))

    def begin(self, window: Window) -> None:
        """Note the window."""
        self._begun.append(window)

    def collect(self) -> list[WindowReport]:
        """Simulate it."""
        if not self._begun:
            raise FleetError("a window was collected that was not begun")
        window = self._begun.popleft()
        count = len(self._hosts)
        return [host.advance(addressed(window, number, count)) for number, host in enumerate(self._hosts)]

    def put_down(self, now_s: float) -> list[PutDown]:
        """End what runs."""
        return [host.put_down(now_s) for host in self._hosts]

    def close(self) -> None:
        """Nothing to end."""


@dataclass
class _Worker:
    """A process that simulates one shard, the line to it, and what both have in memory."""

    process: BaseProcess
    line: Connection
    files: SharedFiles
    answers: AnswerReader
    asked: int = 0


@dataclass
class Processes:
    """Each shard in a process of its own on this machine.

    Args:
        scenario: path of the run's scenario file.
        count: of shards.
    """

    scenario: Path
    count: int
    _workers: list[_Worker] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        context = multiprocessing.get_context("spawn")  # a forked copy of open databases and threads would not be safe
        for number in range(self.count):
            (mine, theirs), files = context.Pipe(), SharedFiles((SharedFile(), SharedFile()), SharedFile())
            process = context.Process(
                target=_serve,
                args=(theirs, files, self.scenario, number, self.count),
                name=f"shard-{number}",
                daemon=True,
            )
            with _ignoring_interrupts():
                process.start()
            theirs.close()
            self._workers.append(_Worker(process, mine, files, AnswerReader(files.answers)))

    def start(self, starts_s: float, records: Sequence[DeviceRecord] | None) -> None:
        """Make the shards."""
        for number in range(self.count):
            self._ask(number, "start", starts_s, dealt(records, number, self.count))
        self._answers()

    def begin(self, window: Window) -> None:
        """Let all simulate it."""
        for number in range(self.count):
            self._ask(number, "advance", addressed(window, number, self.count))

    def collect(self) -> list[WindowReport]:
        """Wait for all."""
        return self._answers()

    def put_down(self, now_s: float) -> list[PutDown]:
        """End what runs."""
        for number in range(self.count):
            self._ask(number, "put_down", now_s)
        return self._answers()

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            with contextlib.suppress(OSError):
                worker.line.close()
                for file in (*worker.files.questions, worker.files.answers):
                    file.close()
        for worker in self._workers:
            worker.process.join(_END_WITHIN_S)
            if worker.process.is_alive():
                worker.process.kill()

    def _ask(self, number: int, command: str, *arguments: Any) -> None:
        """Give a process something to do. Raises FleetError."""
        try:
            worker = self._workers[number]
            file, worker.asked = worker.files.questions[worker.asked % 2], worker.asked + 1
            ask(worker.line, file, (command, arguments, worker.answers.take_done()))
        except OSError as error:
            raise self._died(number) from error

    def _died(self, number: int) -> FleetError:
        """What to say of a process that is not there any more."""
        process = self._workers[number].process
        process.join(_END_WITHIN_S)
        return FleetError(
            f"the process of shard {number} died (exit code {process.exitcode}); is the memory full? "
            "The run can be resumed"
        )

    def _answers(self) -> list[Any]:
        """An answer of every process. Raises FleetError, ConfigError."""
        return [self._answer(number, worker) for number, worker in enumerate(self._workers)]

    def _answer(self, number: int, worker: _Worker) -> Any:
        """What a process says."""
        try:
            answer, failure = worker.answers.loads(*worker.line.recv())
        except (EOFError, OSError) as error:
            raise self._died(number) from error
        if isinstance(failure, ConfigError):
            raise failure
        if failure is not None:
            raise FleetError(f"shard {number} failed: {failure}")
        return answer


def _leave_records_alone() -> None:
    """Have the garbage collector pass over what is there now, the records of sleeping devices for the most part, and
    look less often: what one life leaves is small, and looking through tens of thousands of records for it is not.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@contextlib.contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    """What is started here ignores Ctrl-C, which a terminal sends to all: a run ends after the window it is in."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _serve(line: Connection, files: SharedFiles, scenario: Path, number: int, count: int) -> None:
    """A process that simulates one shard, until the line is closed."""
    host, answers = ShardHost(scenario, number, count, owns_process=True), AnswerWriter(files.answers)
    for file in itertools.cycle(files.questions):
        try:
            command, arguments, done = asked(line, file)
        except EOFError:
            return
        answers.take_back(done)
        try:
            line.send(answers.dumps((getattr(host, command)(*arguments), None)))
        except ConfigError as error:
            line.send(answers.dumps((None, error)))
        except Exception:
            line.send(answers.dumps((None, traceback.format_exc())))
