"""The loop of central training: Poisson batch, clipped sum, noise on a grid and step, each by the devices' own code.

A step here is a local step of `device_client.training.train_locally`: with the same entropy it gives the same numbers.
What the host adds (momentum, learning-rate schedule, averages) is computed from the noisy sums alone.

Invariant: a block of steps is charged, durably where the run has a folder, before the first of them is computed, and
nothing is refunded. Steps that are lost with the process are run again and charged again, because somebody may have
seen what came of them. The loop reads no clock but to tell how fast it was, and no file.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from device_client.adapters.system_entropy import system_entropy
from device_client.errors import TrainingError
from device_client.noise import NoisyGrid
from device_client.ports import Float32, Graph
from device_client.training import Records, clipped_gradient_sum, poisson_sample
from fl_protocol.errors import LocalMisuseError
from fl_protocol.integer_noise import Entropy
from models.central.plan import CentralPlan

Float64 = NDArray[np.float64]
Measure = Callable[[Float32], Mapping[str, float]]
"""Parameters [d] to named measurements on validation data, such as loss and accuracy."""
_LARGEST = float(np.finfo(np.float32).max)


class EpochResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The model after an epoch: how many steps, what they had cost, and what was measured."""

    step: int
    epsilon: float | None
    measured: dict[str, float]


@dataclass(frozen=True)
class State:
    """All that the next step depends on; a checkpoint holds it.

    Args:
        step: steps that went into the parameters.
        params: float64 [d].
        velocity: of the momentum, float64 [d].
        weighted_sum: of the parameters that are averaged, float64 [d].
        weight: by which `weighted_sum` is divided; 0 before the average begins.
        history: one entry an epoch.
    """

    step: int
    params: Float64
    velocity: Float64
    weighted_sum: Float64
    weight: float = 0.0
    history: tuple[EpochResult, ...] = ()

    @classmethod
    def fresh(cls, start: Float32) -> State:
        """Before the first step."""
        params = start.astype(np.float64)
        return cls(0, params, np.zeros_like(params), np.zeros_like(params))

    def model(self) -> Float32:
        """The finished model if the training ended here: the average once there is one, float32 [d].

        Raises:
            TrainingError: it holds numbers that are not finite.
        """
        final = self.weighted_sum / self.weight if self.weight else self.params
        with np.errstate(over="ignore"):
            result = final.astype(np.float32)
        if not np.isfinite(result).all():
            raise TrainingError(f"the model diverged at step {self.step}: give a lower learning rate")
        return result


class Source(Protocol):
    """Where the randomness of each step comes from."""

    def stream(self, step: int, part: int) -> Entropy:
        """Bytes for the step's batch and noise (part 0), or for the dropout of a part of its batch."""


class SystemSource:
    """The operating system's cryptographic source; the only one that gives privacy."""

    def stream(self, step: int, part: int) -> Entropy:
        """The same for all."""
        del step, part
        return system_entropy


@dataclass(frozen=True)
class SeededSource:
    """Bytes that whoever knows the seed can repeat, and so subtract: for experiments without privacy."""

    seed: int

    def stream(self, step: int, part: int) -> Entropy:
        """SHAKE-256 of seed, step, part and the number of the call, so that a resumed training repeats itself."""
        calls = 0

        def entropy(count: int) -> bytes:
            nonlocal calls
            calls += 1
            return hashlib.shake_256(f"covey central {self.seed} {step} {part} {calls}".encode()).digest(count)

        return entropy


class Run(Protocol):
    """What outlives the process: the count of noisy sums that were charged, and the newest checkpoint."""

    @property
    def charged(self) -> int:
        """Noisy sums that were ever charged to this run, those of killed processes included."""

    def reserve(self, steps: int) -> None:
        """Charge so many more, durably, before they are computed."""

    def load(self) -> State | None:
        """The newest checkpoint, None if there is none."""

    def save(self, state: State) -> None:
        """Replace the checkpoint."""


@dataclass
class MemoryRun:
    """A run that ends with its process: nothing of it can be resumed, and nothing was kept of what it computed."""

    charged: int = 0
    state: State | None = None

    def reserve(self, steps: int) -> None:
        """Count."""
        self.charged += steps

    def load(self) -> State | None:
        """What was saved."""
        return self.state

    def save(self, state: State) -> None:
        """Keep."""
        self.state = state


@dataclass(frozen=True)
class StepDone:
    """What the loop tells after each step.

    Args:
        step: how many the parameters have had.
        noisy_sums: computed so far, those included that processes before this one were charged for.
        seconds: spent on steps in this process.
        epoch: at an epoch's end, what was measured.
    """

    step: int
    noisy_sums: int
    seconds: float
    epoch: EpochResult | None


@dataclass(frozen=True)
class Trained:
    """A finished central training.

    Args:
        params: the model, float32 [d].
        steps: that went into it; fewer than planned if a budget ended it early.
        charged: noisy sums that were charged for it.
        epsilon: of those, at the plan's delta; infinite without privacy.
        history: one entry an epoch.
        seconds: spent on steps in this process, measuring and saving left out.
        steps_here: taken in this process.
    """

    params: Float32
    steps: int
    charged: int
    epsilon: float
    history: tuple[EpochResult, ...]
    seconds: float
    steps_here: int


def train_centrally(
    graphs: Sequence[Graph],
    start: Float32,
    records: Records,
    plan: CentralPlan,
    *,
    source: Source | None = None,
    run: Run | None = None,
    checkpoint_every: int = 100,
    measure: Measure | None = None,
    on_step: Callable[[StepDone], None] | None = None,
) -> Trained:
    """Train until the planned steps are done or the budget allows no more.

    Args:
        graphs: as many copies of one trainable graph as threads shall work on a batch.
        start: parameters, float32 [d]; of a resumed run the same as at first.
        records: the training data.
        plan: of `plan_training`.
        source: of batches and noise; the operating system's by default.
        run: keeps charges and checkpoints; by default nothing outlives the process.
        checkpoint_every: steps that are charged together and end in a checkpoint: as many are lost by a kill.
        measure: called after each epoch with the model as it would be if training ended there. Give it data other than
            `records`: what is measured on those is not covered by epsilon.
        on_step: called after every step.

    Raises:
        TrainingError: the model diverged.
        LocalMisuseError: there are no graphs, or `checkpoint_every` is below 1.
    """
    if not graphs or checkpoint_every < 1:
        raise LocalMisuseError("train_centrally: expected at least one graph and checkpoint_every of at least 1.")
    kept: Run = run if run is not None else MemoryRun()
    state = kept.load() or State.fresh(start)
    first, seconds = state.step, 0.0
    with ThreadPoolExecutor(len(graphs)) as threads:
        step = _Step(graphs, records, plan, source or SystemSource(), threads)
        while state.step < plan.steps:
            block = plan.affordable(min(checkpoint_every, plan.steps - state.step), charged=kept.charged)
            if block == 0:
                break
            # Security: charged before anything is computed; after a kill they stay charged.
            kept.reserve(block)
            for not_yet in reversed(range(block)):
                began = time.perf_counter()
                state = step(state)
                seconds += time.perf_counter() - began
                noisy_sums = kept.charged - not_yet
                state, epoch = _after_epoch(state, plan, noisy_sums, measure)
                if on_step is not None:
                    on_step(StepDone(state.step, noisy_sums, seconds, epoch))
            kept.save(state)
    return Trained(
        params=state.model(),
        steps=state.step,
        charged=kept.charged,
        epsilon=plan.epsilon(kept.charged),
        history=state.history,
        seconds=seconds,
        steps_here=state.step - first,
    )


@dataclass(frozen=True)
class _Step:
    """One noisy step of a plan on these records."""

    graphs: Sequence[Graph]
    records: Records
    plan: CentralPlan
    source: Source
    threads: ThreadPoolExecutor

    def __call__(self, state: State) -> State:
        """The state after it (Abadi et al. 2016, algorithm 1, arXiv 1607.00133)."""
        plan, entropy = self.plan, self.source.stream(state.step, 0)
        batch = np.flatnonzero(poisson_sample(len(self.records), plan.sampling_rate, entropy))
        clipped = self._clipped_sum(state, batch, entropy)
        noisy = NoisyGrid(plan.l2_norm_clip, plan.noise_multiplier, len(clipped)).release(clipped, entropy)
        rate = plan.learning_rate_at(state.step)
        # Everything from here on is computed from `noisy` and public numbers.
        velocity = plan.momentum * state.velocity + rate / plan.expected_batch_size * noisy
        moved = replace(state, step=state.step + 1, params=state.params - velocity, velocity=velocity)
        if not np.abs(moved.params).max() <= _LARGEST:  # so written, NaN is caught too
            raise TrainingError(f"the model diverged at step {moved.step}: give a lower learning rate")
        return averaged(moved, plan)

    def _clipped_sum(self, state: State, batch: NDArray[np.intp], entropy: Entropy) -> Float64:
        """The batch's clipped gradients, summed; each graph works on whole pieces of its own size."""
        params = state.params.astype(np.float32)
        size = self.graphs[0].batch_size
        pieces = -(-len(batch) // size)
        share = size * max(1, -(-pieces // len(self.graphs)))
        if len(batch) <= share:
            return self._sum_on(self.graphs[0], params, batch, entropy)
        parts = [batch[at : at + share] for at in range(0, len(batch), share)]
        sums = [
            self.threads.submit(self._sum_on, graph, params, part, self.source.stream(state.step, number))
            for number, (graph, part) in enumerate(zip(self.graphs, parts, strict=False), start=1)
        ]
        # Added in their order, so that the same seed gives the same bytes.
        total: Float64 = np.sum([each.result() for each in sums], axis=0)
        return total

    def _sum_on(self, graph: Graph, params: Float32, part: NDArray[np.intp], entropy: Entropy) -> Float64:
        return clipped_gradient_sum(graph, params, self.records, part, clip=self.plan.l2_norm_clip, entropy=entropy)


def averaged(state: State, plan: CentralPlan) -> State:
    """With the newest parameters in the average."""
    kind, amount = plan.averaging.kind, plan.averaging.amount
    if kind == "ema":
        # The weight grows from 1 - decay to 1, which takes the start out of the mean.
        return replace(
            state,
            weighted_sum=amount * state.weighted_sum + (1 - amount) * state.params,
            weight=amount * state.weight + (1 - amount),
        )
    if kind == "tail" and state.step > (1 - amount) * plan.steps:
        return replace(state, weighted_sum=state.weighted_sum + state.params, weight=state.weight + 1)
    return state


def _after_epoch(
    state: State, plan: CentralPlan, noisy_sums: int, measure: Measure | None
) -> tuple[State, EpochResult | None]:
    """At the end of an epoch, and of all: the state with one more entry of history, and that entry."""
    if plan.epochs_after(state.step) == plan.epochs_after(state.step - 1) and state.step != plan.steps:
        return state, None
    measured = dict(measure(state.model())) if measure is not None else {}
    epoch = EpochResult(state.step, plan.epsilon(noisy_sums) if plan.is_private else None, measured)
    return replace(state, history=(*state.history, epoch)), epoch
