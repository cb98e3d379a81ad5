"""What computes on a simulated device: LiteRT itself, or something that only takes its time.

Only ``real`` learns from recordings. A trainer that computes nothing changes no byte of what is promised about
privacy on a device, where there is no other trainer than `device_client.training.LocalTraining`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np

from device_client.errors import TrainingError
from device_client.local_optimiser import Control, LocalProgress
from device_client.ports import Float32, Graph, Labels
from device_client.training import Records
from fl_protocol.errors import LocalMisuseError
from fl_protocol.integer_noise import Entropy
from fl_protocol.messages import TrainingPlanMsg
from fl_protocol.model_manifest import DropoutMask


class TimedGraph:
    """A graph whose calls take the device's time.

    Args:
        graph: what really computes.
        flop: floating-point operations of one call of ``train`` on B rows, for which the bundle's manifest has them.
        took: told of the operations of every call.
    """

    def __init__(self, graph: Graph, flop: float, took: Callable[[float], float]) -> None:
        self._graph, self._flop, self._took = graph, flop, took

    @property
    def batch_size(self) -> int:
        """B."""
        return self._graph.batch_size

    @property
    def train_sizes(self) -> tuple[int, ...]:
        """Of the graph."""
        return self._graph.train_sizes

    @property
    def dropout(self) -> tuple[DropoutMask, ...]:
        """Of the graph."""
        return self._graph.dropout

    def train(
        self,
        params: Float32,
        x: Float32,
        y: Labels,
        mask: Float32,
        *,
        clip: float,
        dropout: Float32 | None = None,
    ) -> Float32:
        """As the graph does; every row takes its time, whether there is a record in it or not."""
        self._took(self._flop * len(mask) / self.batch_size)
        return self._graph.train(params, x, y, mask, clip=clip, dropout=dropout)

    def evaluate(self, params: Float32, x: Float32, y: Labels, mask: Float32) -> tuple[float, float]:
        """As the graph does; forward only is a third of a training step."""
        self._took(self._flop / 3)
        return self._graph.evaluate(params, x, y, mask)


LONGEST_TURN_S = 1.0
"""How long a turn of steps that compute nothing takes at most, unless a single step takes longer: a device that trains
reads its board every 15 s, so it finds what it would have found after each of them."""


class EmptyTraining:
    """`device_client.training.Training` whose result is no change at all, and whose steps only take time.

    Args:
        length: d.
        steps: how many.
        take_step: told of every step; how long it took, seconds.
        done: steps of an earlier one that this one goes on from.
    """

    def __init__(self, length: int, steps: int, take_step: Callable[[], float], *, done: int) -> None:
        self._length, self.steps, self._take_step, self.step = length, steps, take_step, done

    @property
    def done(self) -> bool:
        """Whether all steps are done."""
        return self.step >= self.steps

    def advance(self) -> None:
        """Take the time of as many steps as fit into `LONGEST_TURN_S`, and of one at least."""
        if self.done:
            raise LocalMisuseError(f"advance: all {self.steps} steps are done")
        left_s = LONGEST_TURN_S
        while not self.done and left_s > 0:
            left_s -= self._take_step()
            self.step += 1

    def progress(self) -> LocalProgress:
        """How many steps are done."""
        return LocalProgress(self.step, b"", b"")

    def change(self) -> Float32:
        """Zeros, float32 [d], read-only."""
        return _no_change(self._length)

    def next_control(self) -> Float32:
        """Raises TrainingError: nothing is learned, so there is no control variate."""
        raise TrainingError("a surrogate has no control variates; run the scenario with fidelity real")


@functools.lru_cache(maxsize=4)
def _no_change(length: int) -> Float32:
    """Zeros, float32 [length]: the same ones for all, since nobody writes to them."""
    zeros = np.zeros(length, np.float32)
    zeros.flags.writeable = False
    return zeros


class EmptyTrainer:
    """`device_client.training.Trainer` of a fleet that trains no model.

    Args:
        flop: floating-point operations of one call of the graph that would train.
        took: told of the operations of every step; how long they took, seconds.
    """

    def __init__(self, flop: float, took: Callable[[float], float]) -> None:
        self._flop, self._took = flop, took

    def __call__(
        self,
        graph: Graph,
        start: Float32,
        records: Records,
        *,
        plan: TrainingPlanMsg,
        entropy: Entropy,
        control: Control | None = None,
        progress: LocalProgress | None = None,
    ) -> EmptyTraining:
        """A training that computes nothing."""
        del records, entropy, control
        flop = self._flop * math.ceil(plan.expected_batch_size / graph.batch_size)
        done = progress.step if progress is not None else 0
        return EmptyTraining(len(start), plan.local_steps, lambda: self._took(flop), done=done)


class NoGraph:
    """`device_client.ports.Graph` of a fleet that trains no model and measures none.

    Args:
        batch_size: B of the graph in whose place it is.
    """

    dropout: tuple[DropoutMask, ...] = ()

    def __init__(self, batch_size: int) -> None:
        self.batch_size, self.train_sizes = batch_size, (batch_size,)

    def train(
        self,
        params: Float32,
        x: Float32,
        y: Labels,
        mask: Float32,
        *,
        clip: float,
        dropout: Float32 | None = None,
    ) -> Float32:
        """Raises LocalMisuseError."""
        raise LocalMisuseError("this fleet trains no model; run the scenario with fidelity real")

    def evaluate(self, params: Float32, x: Float32, y: Labels, mask: Float32) -> tuple[float, float]:
        """Raises LocalMisuseError."""
        raise LocalMisuseError("this fleet measures no model; run the scenario with fidelity real")
