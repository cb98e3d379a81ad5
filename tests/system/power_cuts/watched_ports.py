"""A device's ports in a week of power cuts: real code or the simulator's, watched, and taking its time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from device_client.adapters.encrypted_files import EncryptedFiles
from device_client.ports import Float32, Graph, Labels
from firmware_sim.virtual_device import VirtualClock
from fl_protocol.model_manifest import (
    DropoutMask,
)
from tests.virtual_fleet import MemoryJournal

_DAY_S = 86_400.0


class WatchedGraph:
    """`device_client.ports.Graph` that takes its time, and is watched."""

    def __init__(self, graph: Graph, begins: Callable[[Float32], None]) -> None:
        self._graph, self._begins = graph, begins

    @property
    def batch_size(self) -> int:
        return self._graph.batch_size

    @property
    def train_sizes(self) -> tuple[int, ...]:
        return self._graph.train_sizes

    @property
    def dropout(self) -> tuple[DropoutMask, ...]:
        return self._graph.dropout

    def train(
        self, params: Float32, x: Float32, y: Labels, mask: Float32, *, clip: float, dropout: Float32 | None = None
    ) -> Float32:
        self._begins(params)
        return self._graph.train(params, x, y, mask, clip=clip, dropout=dropout)

    def evaluate(self, params: Float32, x: Float32, y: Labels, mask: Float32) -> tuple[float, float]:
        return self._graph.evaluate(params, x, y, mask)


class WakefulBell:
    """`device_client.ports.Bell` that notes for how long the device means to sleep."""

    def __init__(self) -> None:
        self.sleeps_s: float | None = None

    def ring(self) -> None:
        self.sleeps_s = 0.0

    def wait(self, timeout_s: float) -> None:
        self.sleeps_s = timeout_s


class DeviceClock(VirtualClock):
    """The device's own clock, which may be wrong."""

    error_s = 0.0

    def now_s(self) -> float:
        return max(0.0, self.time_s + self.error_s)

    def local_time_s(self) -> float:
        return self.now_s() % _DAY_S


@dataclass
class HeardJournal(MemoryJournal):
    """The journal; a device whose disk refuses nothing has no trouble with its store to tell of."""

    heard: Callable[[str], None] = print

    def write(self, event: str, /, *, at_s: float, **fields: Any) -> None:
        super().write(event, at_s=at_s, **fields)
        reason = str(fields.get("reason", ""))
        known = {
            "study_stopped": (
                "consent was withdrawn",
                "its name on the wire",
                "the daemon is stopped",
                "the next pseudo",
            ),
            "work_given_up": ("the name on the wire has changed", "clinic/watch: the next pseudonym"),
            "participation_ended": ("the round's deadline", "the round was closed", "the privacy budget is spent"),
        }
        is_trouble = event in ("store_failed", "message_refused", "update_garbled", "model_refused")
        if is_trouble or (event in known and not any(one in reason for one in known[event])):
            self.heard(f"{event}: {reason}")


class WatchedFiles(EncryptedFiles):
    """The store; the witness hears of each blob before it is written."""

    def __init__(self, *arguments: Any, keeps: Callable[[str, bytes], None], **named: Any) -> None:
        self._keeps = keeps
        super().__init__(*arguments, **named)

    def write(self, name: str, data: bytes) -> None:
        self._keeps(name, data)
        super().write(name, data)


def watched_files(files: type[EncryptedFiles]) -> Callable[..., EncryptedFiles]:
    """The same over a store that may be broken."""
    return WatchedFiles if files is EncryptedFiles else type("_WatchedBrokenFiles", (WatchedFiles, files), {})
