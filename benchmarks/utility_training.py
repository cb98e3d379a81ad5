"""One federated training under one of the three mechanisms, on wrists or on synthetic persons; and how it measures.

Devices run their own training code (`device_client.training`) on the linear head of the committed model, the mechanism
makes the mean of their updates, the aggregator's own optimiser takes the step (server momentum); the second half of the
versions is averaged. Accuracy is measured on people who never trained, nor were the source of anybody who did.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from random import Random
from typing import Literal

import numpy as np

from aggregator.server_optimisers import ServerOptimiser, initial_state, step
from benchmarks.feature_head import NUM_PARAMETERS, FeatureHead, FeatureReader, committed_bundle
from benchmarks.synthetic_persons import WINDOWS, sources, synthetic_person
from benchmarks.utility_mechanisms import Arm, Budget, Mechanism, device_level, record_level
from device_client.accounting import noise_multiplier_for
from device_client.ports import Float32
from device_client.training import Records, evaluate, train_locally
from firmware_sim.watch_data import PEOPLE, Recording, Wrist, all_wrists, default_cache, load_recordings, windows_of
from fl_protocol.integer_noise import Entropy
from fl_protocol.plans import TrainingPlanMsg

LevelName = Literal["record", "device_ten", "device_thousand"]
LEVELS: tuple[LevelName, ...] = ("record", "device_ten", "device_thousand")
DELTA: dict[LevelName, float] = {"record": 1e-5, "device_ten": 1e-5, "device_thousand": 1e-6}
THOUSAND = 1000
SAMPLES = 128
"""Of a window: 2.56 s."""
NO_CLIP = 1e6
DEVICE_RATE = 5.0
"""Local learning rate at device level, that of the training without DP (docs/watch-models.md)."""


@dataclass(frozen=True)
class Settings:
    """What is tuned.

    Args:
        rounds: R, everybody in each.
        clip: of each window's gradient at record level, of each whole update at device level.
        learning_rate: of the device at record level, of the server at device level.
        local_steps: on the device; 1 at record level.
        momentum: of the server.
    """

    rounds: int
    clip: float
    learning_rate: float
    local_steps: int = 1
    momentum: float = 0.9


@dataclass(frozen=True)
class Job:
    """One training.

    Args:
        level: what is protected, and of whom.
        arm: where the noise goes in; None for no noise.
        epsilon: of the budget.
        held_out: people who are not trained on.
        seed: names the draws.
    """

    level: LevelName
    arm: Arm | None
    epsilon: float
    settings: Settings
    held_out: tuple[int, ...]
    seed: str


@dataclass(frozen=True)
class Outcome:
    """What came of a training.

    Args:
        correct: of each person who was held out, the windows told right, and how many there are.
        epsilon: as accounted; None without noise.
    """

    correct: dict[int, tuple[int, int]]
    epsilon: float | None

    def accuracy(self, people: tuple[int, ...]) -> float:
        """On all windows of some of them."""
        return sum(self.correct[one][0] for one in people) / sum(self.correct[one][1] for one in people)


def run_job(job: Job) -> Outcome:
    """Train, and measure on the people held out."""
    entropy: Entropy = Random(f"{job}").randbytes  # noqa: S311 - so that a run can be repeated; nobody is protected
    data = training_data(job.level, job.held_out)
    plan, mechanism = plan_of(job), mechanism_of(job, devices=len(data))
    head = FeatureHead(max(len(records) for records in data))
    server = ServerOptimiser("fedavgm", _server_rate(job), job.settings.momentum)
    params, averaged = np.zeros(NUM_PARAMETERS, np.float32), np.zeros(NUM_PARAMETERS)
    state, first = initial_state(server, NUM_PARAMETERS), job.settings.rounds // 2
    for number in range(job.settings.rounds):
        updates = np.stack([train_locally(head, params, records, plan=plan, entropy=entropy) for records in data])
        mean = updates.mean(axis=0, dtype=np.float64) if mechanism is None else mechanism.mean(updates, entropy)
        params, state = step(params, state, mean, server)
        if number >= first:
            averaged += params / (job.settings.rounds - first)
    found = {person: measured(averaged.astype(np.float32), person) for person in job.held_out}
    return Outcome(found, mechanism.epsilon if mechanism else None)


def plan_of(job: Job) -> TrainingPlanMsg:
    """What devices compute: at record level one clipped sum, noisy where the noise is each device's own."""
    settings = job.settings
    windows = WINDOWS if job.level == "device_thousand" else 100
    if job.level != "record":
        return _plan(DEVICE_RATE, NO_CLIP, 0.0, settings.local_steps, windows)
    own = job.arm == "local"
    noise = own_noise(job.epsilon, settings.rounds) if own else 0.0
    return _plan(settings.learning_rate, settings.clip, noise, settings.local_steps, windows)


def mechanism_of(job: Job, *, devices: int) -> Mechanism | None:
    """With the noise that the budget asks for. Raises LocalMisuseError where the claim would not be sound."""
    if job.arm is None:
        return None
    budget = Budget(job.epsilon, DELTA[job.level], job.settings.rounds)
    if job.level == "record":
        return record_level(job.arm, budget, plan=plan_of(job), devices=devices, parameters=NUM_PARAMETERS)
    return device_level(job.arm, budget, l2_norm_clip=job.settings.clip, devices=devices, parameters=NUM_PARAMETERS)


@functools.lru_cache(maxsize=64)
def own_noise(epsilon: float, rounds: int) -> float:
    """What a device's own ledger asks for, as in the demo."""
    return noise_multiplier_for(epsilon=epsilon, delta=DELTA["record"], sampling_rate=1.0, steps=rounds)


def training_data(level: LevelName, held_out: tuple[int, ...]) -> list[Records]:
    """Each training device's features: of the wrists of people who are not held out, or of persons made from them."""
    people = tuple(person for person in PEOPLE if person not in held_out)
    if level == "device_thousand":
        return [_synthetic(*source) for source in sources(people, THOUSAND)]
    return [_real(wrist) for wrist in all_wrists() if wrist.person in people]


def measured(params: Float32, person: int) -> tuple[int, int]:
    """Windows of both wrists that a model tells right, and how many there are."""
    records = [_windows(wrist) for wrist in all_wrists() if wrist.person == person]
    results = [evaluate(FeatureHead(len(one)), params, one) for one in records]
    return sum(result.correct for result in results), sum(result.count for result in results)


@functools.lru_cache(maxsize=1)
def _recordings() -> list[Recording]:
    return load_recordings(default_cache())


@functools.lru_cache(maxsize=1)
def _reader() -> FeatureReader:
    return FeatureReader(committed_bundle())


@functools.cache
def _real(wrist: Wrist) -> Records:
    """What a real wrist trains on."""
    return _reader().versions(windows_of(_recordings(), wrist, samples=SAMPLES))


@functools.cache
def _windows(wrist: Wrist) -> Records:
    """What a real wrist is measured on."""
    return _reader().plain(windows_of(_recordings(), wrist, samples=SAMPLES))


@functools.cache
def _synthetic(person: int, number: int) -> Records:
    """What a synthetic person trains on."""
    return _reader().versions(synthetic_person(_recordings(), person, number, samples=SAMPLES))


def _server_rate(job: Job) -> float:
    return 1.0 if job.level == "record" else job.settings.learning_rate


def _plan(rate: float, clip: float, noise: float, local_steps: int, windows: int) -> TrainingPlanMsg:
    return TrainingPlanMsg(
        sampling_rate=1.0,
        local_steps=local_steps,
        learning_rate=rate,
        l2_norm_clip=clip,
        noise_multiplier=noise,
        expected_batch_size=float(windows),
    )
