"""A task's file (TOML), decoded strictly; every key and its default is documented here.

``kind`` at the top says what the section ``[plan]`` holds: ``train`` (the default), ``evaluate`` or ``statistics``.
The file is checked once, when the task is created, and kept in the database; nothing reads it again.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import Meta

from aggregator.robust_rules import RobustRule
from aggregator.rounds import RoundPolicy
from aggregator.secure_sections import LONGEST_S, AtLeastOne, DevicePrivacy, Section, Secure
from aggregator.server_optimisers import ServerOptimiser
from fl_protocol.errors import ConfigError, LocalMisuseError
from fl_protocol.messages import (
    EncodingName,
    EvaluationPlanMsg,
    FeatureMsg,
    KemName,
    Name,
    StatisticsPlanMsg,
    TrainingPlanMsg,
)
from fl_protocol.plans import PlanMsg
from fl_protocol.publishers import PublisherPins, publisher_pins
from fl_protocol.secagg.messages import MOST_LISTED

Kind = Literal["train", "evaluate", "statistics"]
Seconds = Annotated[float, Meta(ge=0, le=LONGEST_S)]
Probability = Annotated[float, Meta(gt=0, le=1)]


class TrainingPlan(Section, frozen=True, kw_only=True, tag_field="kind", tag="train"):
    """``[plan]`` of training: what devices compute; see `fl_protocol.plans.TrainingPlanMsg` for each meaning.

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


class EvaluationPlan(Section, frozen=True, kw_only=True, tag_field="kind", tag="evaluate"):
    """``[plan]`` of a federated evaluation; see `fl_protocol.plans.EvaluationPlanMsg`."""

    noise_multiplier: float
    sampling_rate: float = 1.0
    loss_bound: float = 5.0

    control_variates = False

    def message(self) -> EvaluationPlanMsg:
        """As it travels in the manifest, ranges checked. Raises msgspec.ValidationError."""
        return msgspec.convert({**msgspec.to_builtins(self), **_all(self), "v": 1}, EvaluationPlanMsg)


class StatisticsPlan(Section, frozen=True, kw_only=True, tag_field="kind", tag="statistics"):
    """``[plan]`` of federated statistics; each ``[[plan.features]]`` is a `fl_protocol.plans.FeatureMsg`."""

    noise_multiplier: float
    sampling_rate: float = 1.0
    features: list[dict[str, Any]]

    control_variates = False

    def message(self) -> StatisticsPlanMsg:
        """As it travels in the manifest, ranges checked. Raises msgspec.ValidationError."""
        features = [msgspec.convert({"v": 1, **feature}, FeatureMsg) for feature in self.features]
        fields = {**_all(self), "features": msgspec.to_builtins(features), "v": 1, "kind": "statistics"}
        return msgspec.convert(fields, StatisticsPlanMsg)


Plan: TypeAlias = TrainingPlan | EvaluationPlan | StatisticsPlan
_KINDS: dict[type, Kind] = {TrainingPlan: "train", EvaluationPlan: "evaluate", StatisticsPlan: "statistics"}


class Server(ServerOptimiser, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """``[server]``: how the combined update becomes the next model; see `aggregator.server_optimisers` for the others.

    Args:
        average_last: the finished model is the mean of this many last versions (Polyak averaging; it touches released
            models only, so it costs no privacy). Default 1: the last version as it is.
    """

    average_last: AtLeastOne = 1


class Rule(RobustRule, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """``[rule]``: how updates are combined; see `aggregator.robust_rules` and docs/robust-rules.md.

    The default, ``mean``, is a streaming sum. The others hold all updates of a round in memory when it closes.

    Args:
        norm_bound: longer updates are scaled down to this L2 norm before they are combined; default none.
        memory_bytes: most that the updates of one round may take; default 1 GiB. Checked when the task is created.
    """

    norm_bound: Annotated[float, Meta(gt=0)] | None = None
    memory_bytes: AtLeastOne = 2**30


class Asynchronous(Section, frozen=True, kw_only=True):
    """``[asynchronous]``: FedBuff instead of synchronous rounds; `goal` is the buffer's size.

    Args:
        maximum_staleness: an update counts as long as no round newer by more than this is open; default 10.
        weight: ``polynomial`` is 1 / (1 + staleness) ** exponent, ``constant`` is 1; default ``polynomial``.
        exponent: default 0.5.
    """

    maximum_staleness: Annotated[int, Meta(ge=0, le=1000)] = 10
    weight: Literal["polynomial", "constant"] = "polynomial"
    exponent: Annotated[float, Meta(gt=0)] = 0.5


class Participation(Section, frozen=True, kw_only=True):
    """``[participation]``: who takes part, and how often.

    Args:
        probability: with which each device tosses its own coin in the first round; default 1.
        steer: whether later rounds' probability follows from arrivals, so that `over_selection` times the goal may be
            expected; default false.
        over_selection: default 1.3.
        least_probability: default 0.001.
        minimum_separation_s: seconds a device stays out after taking part; default 0.
        most_participations: rounds of the task that a device takes part in at most; it counts them itself. Default any.
        required_tags: what a device must be able to do (``tags`` in its configuration); default none.
    """

    probability: Annotated[float, Meta(ge=0, le=1)] = 1.0
    steer: bool = False
    over_selection: Annotated[float, Meta(ge=1, le=100)] = 1.3
    least_probability: Probability = 0.001
    minimum_separation_s: Seconds = 0.0
    most_participations: AtLeastOne | None = None
    required_tags: Annotated[tuple[Name, ...], Meta(max_length=16)] = ()


class Updates(Section, frozen=True, kw_only=True):
    """``[updates]``: what travels; see docs/compression.md.

    Args:
        kem: how updates are sealed; ``x25519`` is smaller and not post-quantum. Default ``mlkem768-x25519``.
        encodings: in order of preference; a device takes the first that it knows. Default ``["float32"]``.
        top_k_fraction: share of the values that ``top_k`` sends; default 0.1.
        delta: ``float16`` or ``int8``: models are also published as differences to the one before. Default none.
    """

    kem: KemName = "mlkem768-x25519"
    encodings: Annotated[tuple[EncodingName, ...], Meta(min_length=1, max_length=4)] = ("float32",)
    top_k_fraction: Probability = 0.1
    delta: Literal["float16", "int8"] | None = None


class Validation(Section, frozen=True, kw_only=True):
    """``[validation]``: a held-out set of the operator's own that judges each model before it is published.

    Args:
        data: path of an ``.npz`` with ``x`` float32 [n, ...] and ``y`` as the model's labels.
        margin: a round whose model has a mean loss larger by more than this share than the model before is rejected;
            default 0.1.
    """

    data: str
    margin: Annotated[float, Meta(ge=0)] = 0.1


class Release(Section, frozen=True, kw_only=True):
    """``[release]``: who has to agree before a version gets the tag `released` (`aggregator.releases`).

    Args:
        approvals: different accounts of the HTTP API; default 0, when one operator alone may release.
    """

    approvals: Annotated[int, Meta(ge=0, le=20)] = 0


class TaskConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """One task.

    Args:
        name: on the wire, unique in the database.
        bundle: path of the model bundle whose parameters it starts from.
        publisher_key: Ed25519 key of its only publisher, 64 hex digits; this or `publishers`.
        publishers: Ed25519 keys of several publishers, 64 hex digits each, at most 16.
        publisher_threshold: how many of `publishers` must have signed the bundle; must be given with them.
        rounds: committed rounds to run.
        goal: updates at which a round closes early; the buffer's size when asynchronous.
        minimum_cohort: fewest updates that are ever combined.
        round_duration_s: seconds from a round's opening to its deadline.
        engine: ``secure``: the aggregator learns sums of at least `minimum_cohort` updates alone, and needs the section
            `secure` and helpers; ``open``: it sees each update, as rules other than the mean, asynchronous rounds,
            encodings and control variates need. Default ``secure``.
        start_from: ``task``, ``task/version`` or ``task/tag``: begin with that model instead of the bundle's. Default
            none.
        most_failures: rounds in a row that cannot be combined, or make the model worse, until the task pauses itself;
            default 3.
        population: devices that may take part, needed for the plan's `control_variates` (N in `aggregator.scaffold`).
            It is not counted from the registered names, since one device has a row of pseudonyms. It need not be exact:
            a value a few times too large or too small changes how fast training gets to the optimum, not which.
        plan, server, rule, asynchronous, participation, updates, validation, secure, device_privacy, release: the
            tables of the file; `plan` must be there, and `secure` with its engine. `asynchronous`, `validation` and
            `device_privacy` are off unless they are.
    """

    name: Name
    bundle: str
    publisher_key: str | None = None
    publishers: tuple[str, ...] = ()
    publisher_threshold: int | None = None
    plan: Plan
    rounds: AtLeastOne
    goal: AtLeastOne
    minimum_cohort: AtLeastOne
    round_duration_s: Annotated[float, Meta(gt=0, le=LONGEST_S)]
    engine: Literal["secure", "open"] = "secure"
    start_from: str | None = None
    most_failures: AtLeastOne = 3
    population: AtLeastOne | None = None
    server: Server = Server()
    rule: Rule = Rule()
    asynchronous: Asynchronous | None = None
    participation: Participation = Participation()
    updates: Updates = Updates()
    validation: Validation | None = None
    secure: Secure | None = None
    device_privacy: DevicePrivacy | None = None
    release: Release = Release()

    def __post_init__(self) -> None:
        self._check_engine()
        _ = self.publisher_pins
        if self.plan.control_variates and self.population is None:
            raise ValueError("control_variates need population, the number of devices that may take part")
        if self.plan.control_variates and (self.asynchronous is not None or self.rule.name != "mean"):
            raise ValueError("control_variates need synchronous rounds and the mean: c follows from the mean update")
        if self.asynchronous is not None and self.rule.name != "mean":
            raise ValueError(
                f"rule {self.rule.name} needs synchronous rounds: stale updates have other starting points"
            )
        if self.kind != "train":
            self._check_measures_only()

    @property
    def kind(self) -> Kind:
        """What is computed."""
        return _KINDS[type(self.plan)]

    @property
    def publisher_pins(self) -> PublisherPins:
        """Whose signatures the bundle needs."""
        return publisher_pins(self.publisher_key, self.publishers, self.publisher_threshold)

    @property
    def policy(self) -> RoundPolicy:
        """How its rounds are run. Raises LocalMisuseError."""
        stale = self.asynchronous
        return RoundPolicy(
            rounds=self.rounds,
            goal=self.goal,
            minimum_cohort=self.minimum_cohort,
            duration_s=self.round_duration_s,
            mode="sync" if stale is None else "async",
            maximum_staleness=0 if stale is None else stale.maximum_staleness,
            most_failures=self.most_failures,
            makes_models=self.kind == "train",
            unmasking_s=None if self.secure is None else self.secure.unmasking_s,
        )

    def update_length(self, num_parameters: int) -> int:
        """Numbers in an update, of a model with so many shared parameters."""
        plan = self.plan_message()
        return num_parameters if isinstance(plan, TrainingPlanMsg) else plan.length

    def plan_message(self) -> PlanMsg:
        """The plan as it travels. Raises msgspec.ValidationError."""
        return self.plan.message()

    def _check_engine(self) -> None:
        """What goes with masked updates, and what does not."""
        if (self.secure is not None) != (self.engine == "secure"):
            raise ValueError(
                "the engine secure, which is the default, needs a section [secure] with at least l2_norm_clip; "
                'engine = "open" lets the aggregator see each update, and has none'
            )
        if self.device_privacy is not None and (self.secure is None or not self.secure.noise_multiplier):
            raise ValueError(
                "device_privacy needs the engine secure with a noise_multiplier above 0: covey-aggregator privacy plan "
                "finds it"
            )
        if self.secure is None:
            return
        if self.asynchronous is not None or self.rule != Rule() or self.plan.control_variates:
            raise ValueError(
                "asynchronous rounds, other rules than the mean, a norm_bound and control_variates need single "
                'updates, which the engine secure hides: leave them out, or take engine = "open"'
            )
        if self.updates.encodings != ("float32",):
            raise ValueError("the engine secure has an encoding of its own: leave out updates.encodings")
        if self.minimum_cohort < 2:
            raise ValueError(
                "a sum of one update is that update: the engine secure needs a minimum_cohort of at least 2"
            )
        if self.secure.adaptive_clipping is not None and self.secure.step is not None:
            raise ValueError(
                "secure.step fixes a grid, and with adaptive_clipping it has to follow the clip: leave it out"
            )
        self._check_most_updates(self.secure)

    def _check_most_updates(self, secure: Secure) -> None:
        """A round takes its goal at least, and no more than one request to a helper can list."""
        most = secure.most_updates or 2 * self.goal
        if most < self.goal:
            raise ValueError(f"secure.most_updates {most} is below the goal {self.goal}")
        if most > MOST_LISTED:
            raise ValueError(
                f"a helper is told of at most {MOST_LISTED} updates at once: expected secure.most_updates (by default "
                f"twice the goal) up to that, got {most}"
            )

    def _check_measures_only(self) -> None:
        """Evaluation and statistics change no model."""
        if self.rule != Rule() or self.server != Server() or self.asynchronous or self.validation:
            raise ValueError(f"kind {self.kind} makes no model: leave out rule, server, asynchronous and validation")
        if self.updates.encodings != ("float32",) or self.updates.delta:
            raise ValueError(f"kind {self.kind} sends few numbers and no model: leave out encodings and delta")


def read_task(text: str, where: str) -> TaskConfig:
    """Decode and check a task file.

    Args:
        text: its content.
        where: its path, for the error.

    Raises:
        ConfigError: not TOML, or a key is wrong, missing or unknown; the text names it.
    """
    try:
        fields = msgspec.toml.decode(text)
        kind, plan = fields.pop("kind", "train"), fields.get("plan", {})
        if isinstance(plan, dict):
            fields["plan"] = {**plan, "kind": kind}
        task = msgspec.convert(fields, TaskConfig)
        task.plan_message()
        _ = task.policy
    except (msgspec.DecodeError, LocalMisuseError, UnicodeDecodeError) as error:
        raise ConfigError(f"task file {where}: {error}") from error
    return task


def write_task(task: TaskConfig) -> str:
    """The inverse of `read_task`."""
    fields = msgspec.to_builtins(task)
    kind = fields["plan"].pop("kind")
    return msgspec.toml.encode({"kind": kind, **fields}).decode()


def _all(section: Section) -> dict[str, Any]:
    """Every field, those at their defaults too."""
    return {name: getattr(section, name) for name in section.__struct_fields__}
