"""The aggregator's configuration file (TOML), decoded strictly; every key is documented here."""

from __future__ import annotations

import math
from typing import Annotated

import msgspec
from msgspec import Meta

from fl_protocol.broker_config import BrokerConfig
from fl_protocol.messages import KemName, Name, TrainingPlanMsg

Fraction = Annotated[float, Meta(ge=0, le=1)]
LONGEST_S = 1e9
"""Thirty years; a deadline without end could not be sent."""


class PlanConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What devices compute in a round; see `fl_protocol.messages.TrainingPlanMsg` for each meaning.

    Args:
        local_steps: steps per round; exactly one of this and `local_epochs`.
        local_epochs: passes over a device's records, in expectation: ``local_epochs / sampling_rate`` steps, rounded
            up, since each Poisson step takes a record with probability `sampling_rate`.
    """

    sampling_rate: float
    local_steps: int | None = None
    local_epochs: Annotated[float, Meta(gt=0, le=100_000)] | None = None
    learning_rate: float
    l2_norm_clip: float
    noise_multiplier: float
    expected_batch_size: float
    momentum: float = 0.0
    proximal_mu: float = 0.0
    control_variates: bool = False

    def __post_init__(self) -> None:
        if (self.local_steps is None) == (self.local_epochs is None):
            raise ValueError("expected exactly one of local_steps and local_epochs")

    @property
    def steps(self) -> int:
        """Steps per round, whichever way they were given."""
        if self.local_epochs is None:
            return self.local_steps or 0
        if not 0 < self.sampling_rate <= 1:
            return 1  # the range is refused in `message`
        # The tolerance keeps a quotient such as 1.1 / 0.1 = 11.000000000000002 from taking one step more.
        return max(1, math.ceil(self.local_epochs / self.sampling_rate - 1e-9))

    def message(self) -> TrainingPlanMsg:
        """As it travels in the manifest, ranges checked. Raises msgspec.ValidationError."""
        fields = msgspec.to_builtins(self)
        fields.pop("local_epochs", None)
        return msgspec.convert({**fields, "v": 1, "local_steps": self.steps}, TrainingPlanMsg)


class ServerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The server optimiser.

    Args:
        learning_rate: on the mean update.
        momentum: in [0, 1).
        average_last: the finished model is the mean of this many last versions (Polyak averaging; it touches released
            models only, so it costs no privacy). 1 releases the last version as it is.
    """

    learning_rate: Annotated[float, Meta(gt=0)] = 1.0
    momentum: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    average_last: Annotated[int, Meta(ge=1)] = 1


class TaskConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One training task.

    Args:
        name: on the wire.
        bundle: path of the model bundle whose parameters training starts from.
        publisher_key: Ed25519 key of its publisher, 64 hex digits.
        rounds: committed rounds to run.
        goal: updates at which a round closes early.
        minimum_cohort: fewest updates that are ever combined.
        round_duration_s: seconds from a round's opening to its deadline.
        participation_probability: with which each device tosses its own coin.
        minimum_separation_s: seconds a device stays out after taking part.
        kem: how updates are sealed; ``x25519`` is smaller and not post-quantum.
        population: devices that may take part, needed for the plan's `control_variates` (N in `aggregator.scaffold`).
            It is not counted from the registered names, since one device has a row of pseudonyms. It need not be exact:
            a value a few times too large or too small changes how fast training gets to the optimum, not which.
    """

    name: Name
    bundle: str
    publisher_key: str
    plan: PlanConfig
    rounds: Annotated[int, Meta(ge=1)]
    goal: Annotated[int, Meta(ge=1)]
    minimum_cohort: Annotated[int, Meta(ge=1)]
    round_duration_s: Annotated[float, Meta(gt=0, le=LONGEST_S)]
    server: ServerConfig = ServerConfig()
    participation_probability: Fraction = 1.0
    minimum_separation_s: Annotated[float, Meta(ge=0, le=LONGEST_S)] = 0.0
    kem: KemName = "mlkem768-x25519"
    population: Annotated[int, Meta(ge=1)] | None = None

    def __post_init__(self) -> None:
        if self.plan.control_variates and self.population is None:
            raise ValueError("control_variates need population, the number of devices that may take part")


class AggregatorSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The aggregator itself.

    Args:
        tenant: name on the wire.
        client_id: MQTT client id, also the certificate's common name.
        database: SQLAlchemy URL, or the path of an SQLite file.
        signing_key: file with its Ed25519 key (32 raw bytes), readable by its owner only.
    """

    tenant: Name
    database: str
    signing_key: str
    client_id: Name = "aggregator"


class AggregatorConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A whole ``aggregator.toml``."""

    aggregator: AggregatorSection
    broker: BrokerConfig
    task: TaskConfig
