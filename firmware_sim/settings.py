"""What a demo run is: who trains, who is measured, and the task. Stored as ``run.json`` in the run folder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import msgspec

from aggregator.secure_sections import Secure
from aggregator.task_file import Server, TrainingPlan
from device_client.accounting import noise_multiplier_for
from firmware_sim.errors import SettingsError
from firmware_sim.watch_data import PEOPLE, Wrist, all_wrists
from fl_protocol.errors import LocalMisuseError
from fl_protocol.secagg.messages import MOST_HELPERS

TENANT, TASK, AGGREGATOR = "demo", "watch-exercises", "aggregator"
STUDY = f"{TENANT}/{TASK}"

BrokerChoice = Literal["auto", "mosquitto", "iotcore"]
Engine = Literal["secure", "open"]

_OPERATORS = ("patients", *(f"hospital-{letter}" for letter in "bcdefgh"))
"""Who runs the helpers, one each: helpers of one operator count as one."""
_NOISE_TAIL = 5.0
"""How many standard deviations of one number the norm of a whole noise vector may exceed its typical length by."""
_MOST_RECORDS = 1.5
"""Records of a wrist, in public divisors, for which `DemoSettings.update_norm_bound` leaves room."""


class DemoSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Settings of a run; the defaults are the ones the README's numbers were measured with.

    Args:
        held_out: people whose wrists never train; accuracy is measured on them.
        model: name of a bundle that comes with covey.
        epsilon: record-level budget of each wrist for the whole run; None trains without noise and claims nothing.
        delta: of the same budget.
        rounds: committed rounds.
        l2_norm_clip: bound on each window's gradient norm.
        learning_rate: on the device.
        expected_batch_size: public divisor of the clipped sum (about the windows of one wrist).
        server_momentum: at the aggregator.
        average_last: versions averaged into the finished model; None for the second half of the rounds.
        round_duration_s: deadline of a round.
        engine: ``secure``: the aggregator gets sums of masked updates only; ``open``: it sees each update.
        helpers: how many organisations' helpers unmask these sums, with the engine secure.
        unmasking_s: how long a closed round waits for its helpers. A helper that dies is back within seconds, and a
            round that is given up has cost its wrists privacy, so it is long.
    """

    held_out: tuple[int, ...] = (9, 10)
    model: str = "watch_features"
    epsilon: float | None = 3.0
    delta: float = 1e-5
    rounds: int = 60
    l2_norm_clip: float = 0.5
    learning_rate: float = 1.5
    expected_batch_size: float = 100.0
    server_momentum: float = 0.9
    average_last: int | None = None
    round_duration_s: float = 20.0
    engine: Engine = "secure"
    helpers: int = 2
    unmasking_s: float = 60.0

    def __post_init__(self) -> None:
        unknown = sorted(set(self.held_out) - set(PEOPLE))
        if unknown or not self.held_out or len(set(self.held_out)) == len(PEOPLE):
            raise SettingsError(
                f"held-out people: expected some but not all of {PEOPLE[0]} to {PEOPLE[-1]}, got {self.held_out}"
            )
        if self.rounds < 1:
            raise SettingsError(f"rounds: expected at least 1, got {self.rounds}")
        if self.epsilon is not None and not 0 < self.epsilon < math.inf:
            raise SettingsError(f"epsilon: expected a finite number above 0, got {self.epsilon}")
        if not 1 <= self.helpers <= MOST_HELPERS:
            raise SettingsError(f"helpers: expected 1 to {MOST_HELPERS}, got {self.helpers}")

    @property
    def training_wrists(self) -> list[Wrist]:
        """Wrists that take part in rounds."""
        return [wrist for wrist in all_wrists() if wrist.person not in self.held_out]

    @property
    def held_out_wrists(self) -> list[Wrist]:
        """Wrists that only measure."""
        return [wrist for wrist in all_wrists() if wrist.person in self.held_out]

    @property
    def minimum_cohort(self) -> int:
        """Fewest updates that are combined: half of the wrists that train. A masked sum of one would hide nothing."""
        return max(2 if self.engine == "secure" else 1, len(self.training_wrists) // 2)

    @property
    def operators(self) -> dict[str, str]:
        """Who runs each helper, by the helper's name; nobody with the engine open."""
        number = self.helpers if self.engine == "secure" else 0
        return {f"helper-{letter}": operator for letter, operator in zip("abcdefgh", _OPERATORS[:number], strict=False)}

    @property
    def noise_multiplier(self) -> float:
        """The least noise with which a wrist's own ledger admits every round; no other wrist's noise is counted on.

        Raises:
            SettingsError: no noise keeps so many rounds within so small a budget.
        """
        if self.epsilon is None:
            return 0.0
        try:
            return noise_multiplier_for(epsilon=self.epsilon, delta=self.delta, sampling_rate=1.0, steps=self.rounds)
        except LocalMisuseError as error:
            raise SettingsError(f"epsilon {self.epsilon:g} is too small for {self.rounds} rounds: {error}") from error

    def plan(self) -> TrainingPlan:
        """One full-batch step a round."""
        return TrainingPlan(
            sampling_rate=1.0,
            local_steps=1,
            learning_rate=self.learning_rate,
            l2_norm_clip=self.l2_norm_clip,
            noise_multiplier=self.noise_multiplier,
            expected_batch_size=self.expected_batch_size,
        )

    def server(self) -> Server:
        """The server optimiser."""
        average_last = max(1, self.rounds // 2) if self.average_last is None else self.average_last
        return Server(name="fedavgm", learning_rate=1.0, momentum=self.server_momentum, average_last=average_last)

    def update_norm_bound(self, num_parameters: int) -> float:
        """A bound on the L2 norm of a wrist's update, so that masking, which clips whole updates, changes none.

        An update is learning rate over public divisor times (clipped gradients + noise). Each gradient is at most the
        clip long, and there is room for 1.5 times the divisor of them (wrists have 53 to 119 windows). The norm of d
        independent normal numbers of standard deviation 1 is above sqrt(d) + t with a chance below exp(-t^2 / 2), 4e-6
        for t = 5 (Boucheron, Lugosi & Massart, Concentration Inequalities, 2013, theorem 5.6).

        Measured with the defaults, 60 rounds of all twenty wrists: 1.69 at the mean, 1.91 at most, nearly all of it
        noise (0.26 at most without), against a bound of 3.25. A bound that is too large costs bits and nothing else as
        long as nobody adds noise in proportion to it: the demo's claim is at record level, by each wrist's own noise.

        Args:
            num_parameters: numbers in an update.
        """
        records = _MOST_RECORDS * self.expected_batch_size
        noise = self.noise_multiplier * (math.sqrt(num_parameters) + _NOISE_TAIL)
        return self.learning_rate / self.expected_batch_size * self.l2_norm_clip * (records + noise)

    def secure(self, num_parameters: int) -> Secure | None:
        """How updates are masked; None with the engine open.

        Args:
            num_parameters: numbers in an update.
        """
        if self.engine == "open":
            return None
        return Secure(l2_norm_clip=self.update_norm_bound(num_parameters), unmasking_s=self.unmasking_s)


def named_helpers(operators: Mapping[str, str]) -> str:
    """Helpers and who runs them, in words.

    Args:
        operators: by the helper's name.
    """
    *others, last = [f"{name} ({operator})" for name, operator in operators.items()]
    return f"{', '.join(others)} and {last}" if others else last
