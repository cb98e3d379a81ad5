"""Shards as Ray actors, on this machine or on a cluster: the same shards, handed the same windows, give the same bytes.

Ray is an extra (``pip install 'covey[scale]'``). Without ``RAY_ADDRESS`` it is started on this machine, on loopback
only, without its dashboard and without usage statistics.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from firmware_sim.errors import FleetError
from firmware_sim.fleet.engines import PutDown, ShardHost, addressed, dealt
from firmware_sim.fleet.record import DeviceRecord
from firmware_sim.fleet.windows import Window, WindowReport
from fl_protocol.errors import ConfigError


class RayActors:
    """`firmware_sim.fleet.engines.Engine` on Ray.

    Args:
        scenario: path of the run's scenario file; its text goes to the actors, which may be on other machines.
        count: of shards, each an actor that takes one processor.

    Raises:
        FleetError: Ray is not installed or does not start.
    """

    def __init__(self, scenario: Path, count: int) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            ray: Any = importlib.import_module("ray")  # an extra of its own, and slow to import
        except ImportError as error:
            raise FleetError("the engine ray needs Ray: pip install 'covey[scale]'") from error
        self._ray, self._count = ray, count
        self._is_mine = not ray.is_initialized()
        local = {"num_cpus": count, "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
        try:
            if self._is_mine:
                with _own_signals():
                    ray.init(
                        logging_level="ERROR", log_to_driver=False, **({} if "RAY_ADDRESS" in os.environ else local)
                    )
        except Exception as error:
            raise FleetError(f"Ray does not start ({error}); take --engine local") from error
        actor = ray.remote(num_cpus=1)(ShardHost)
        self._actors: list[Any] = [actor.remote(scenario, number, count, owns_process=True) for number in range(count)]
        self._begun: deque[list[Any]] = deque()

    def start(self, starts_s: float, records: Sequence[DeviceRecord] | None) -> None:
        """Make the shards."""
        self._wait(
            [actor.start.remote(starts_s, dealt(records, number, self._count)) for number, actor in self._numbered()]
        )

    def begin(self, window: Window) -> None:
        """Let all simulate it."""
        self._begun.append(
            [actor.advance.remote(addressed(window, number, self._count)) for number, actor in self._numbered()]
        )

    def collect(self) -> list[WindowReport]:
        """Wait for all."""
        reports: list[WindowReport] = self._wait(self._begun.popleft())
        return reports

    def put_down(self, now_s: float) -> list[PutDown]:
        """End what runs."""
        left: list[PutDown] = self._wait([actor.put_down.remote(now_s) for actor in self._actors])
        return left

    def close(self) -> None:
        """End the actors, and Ray if it was started here."""
        for actor in self._actors:
            self._ray.kill(actor)
        if self._is_mine:
            self._ray.shutdown()

    def _numbered(self) -> Any:
        return enumerate(self._actors)

    def _wait(self, references: list[Any]) -> Any:
        """The answers of all actors. Raises FleetError, ConfigError."""
        try:
            return self._ray.get(references)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, ConfigError):
                raise error.cause from error
            raise FleetError(f"a shard failed: {error}") from error
        except self._ray.exceptions.RayError as error:
            raise FleetError(f"Ray lost a shard ({error}); the run can be resumed") from error


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Whatever is done here, SIGTERM is handled as before: Ray's own handlers would end the run in the middle of a
    window.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
