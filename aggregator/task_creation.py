"""Creating a task: its file, bundle and validation set are checked, stored, and never read from their paths again."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from aggregator.adapters.graph_judge import GraphJudge
from aggregator.audit.log import AuditEvent, append
from aggregator.errors import AggregatorError
from aggregator.robust_rules import smallest_cohort
from aggregator.secure_terms import terms_of
from aggregator.store.aggregator_store import AggregatorStore
from aggregator.store.models import Float32, NewModel
from aggregator.task_file import TaskConfig, read_task
from aggregator.validation import load_validation
from fl_protocol.adapters.config_files import pinned_publishers, read_file, relative_to_config
from fl_protocol.bundle import ModelBundle, open_bundle
from fl_protocol.errors import ConfigError, LocalMisuseError
from fl_protocol.messages import StatisticsPlanMsg
from fl_protocol.publishers import Publishers
from fl_protocol.secagg.messages import MOST_HELPERS


@dataclass(frozen=True)
class CreatedTask:
    """What was created; `is_new` is False when a task from before there were files was given its file."""

    config: TaskConfig
    is_new: bool


def create_task(
    store: AggregatorStore,
    path: Path,
    *,
    now_s: float,
    actor: str = "aggregator",
    aggregator_key: Ed25519PublicKey | None = None,
) -> CreatedTask:
    """Create the task that a file describes.

    Args:
        store: the database.
        path: of the task file; paths in it start at its folder.
        now_s: Unix seconds.
        actor: who creates it, as the audit log names them.
        aggregator_key: what the aggregator signs with; it may be nobody's who publishes models.

    Raises:
        ConfigError: the file, or what it names, cannot be used.
        BundleError: the bundle is damaged or another publisher's.
        DatabaseError: there is a task of this name, or the database fails.
    """
    text = read_file(path, "the task file").decode(errors="replace")
    config = read_task(text, str(path))
    raw_bundle = read_file(relative_to_config(path, config.bundle), "bundle")
    publishers = pinned_publishers(path, config.publisher_pins)
    _check_publishers(path, publishers, aggregator_key)
    bundle = open_bundle(raw_bundle, publisher=publishers)
    _check_rule(path, config, len(bundle.shared_params))
    _check_features(path, config, bundle)
    _check_secure(path, config, bundle)
    raw_validation = None
    if config.validation is not None:
        raw_validation = read_file(relative_to_config(path, config.validation.data), "validation.data")
        GraphJudge(bundle, load_validation(raw_validation, bundle.manifest))  # which needs a runtime
    params = _start(store, config, bundle)
    blobs, models = store.blobs, store.models
    stored_bundle = blobs.put(raw_bundle, kind="bundle")
    validation = None if raw_validation is None else blobs.put(raw_validation, kind="validation")
    first = models.prepare(NewModel(version=0, params=params, origin="initial"))
    with store.database.transaction() as connection:
        is_new = store.tasks.create(
            connection,
            config.name,
            spec=text,
            bundle=stored_bundle,
            validation=validation,
            graph_digest=bundle.graph_digest,
            probability=config.participation.probability,
            now_s=now_s,
        )
        if is_new:
            models.add(connection, config.name, first, now_s=now_s)
        detail = {
            "file_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "bundle_sha256": hashlib.sha256(raw_bundle).hexdigest(),
            "model": first.digest.hex(),
        }
        append(connection, AuditEvent(now_s, actor, "task.created", config.name, detail))
    return CreatedTask(config, is_new)


def _check_publishers(path: Path, publishers: Publishers, aggregator_key: Ed25519PublicKey | None) -> None:
    """Security: whoever has the aggregator's machine could have devices run any model. Raises ConfigError."""
    if aggregator_key is not None and aggregator_key in publishers.keys:
        raise ConfigError(
            f"task file {path}: expected publishers' keys, got the aggregator's own among them: who has this machine "
            "could have devices run any model; sign the bundle with another key (covey-aggregator publisher keygen and "
            "sign) and pin that"
        )


def _check_rule(path: Path, config: TaskConfig, num_parameters: int) -> None:
    """A rule that needs single updates needs enough of them, and memory for all. Raises ConfigError."""
    rule = config.rule
    if rule.name == "mean":
        return
    enough = smallest_cohort(rule)
    if config.minimum_cohort < enough:
        raise ConfigError(
            f"task file {path}: rule {rule.name} with byzantine_fraction {rule.byzantine_fraction:g} needs a "
            f"minimum_cohort of at least {enough}, got {config.minimum_cohort}"
        )
    # What arrives between the goal and the round's closing comes on top.
    needed = 4 * num_parameters * 2 * config.goal
    if needed > rule.memory_bytes:
        raise ConfigError(
            f"task file {path}: rule {rule.name} holds all updates at once, {needed} bytes for twice the goal of "
            f"{config.goal}, and rule.memory_bytes is {rule.memory_bytes}; lower the goal, or raise it"
        )


def _check_features(path: Path, config: TaskConfig, bundle: ModelBundle) -> None:
    """Statistics are about channels that the recordings have. Raises ConfigError."""
    plan = config.plan_message()
    if not isinstance(plan, StatisticsPlanMsg):
        return
    channels = bundle.manifest.input.shape[-1]
    for feature in plan.features:
        if feature.channel >= channels:
            raise ConfigError(
                f"task file {path}: feature {feature.name}: the bundle's recordings have channels 0 to "
                f"{channels - 1}, got {feature.channel}"
            )


def _check_secure(path: Path, config: TaskConfig, bundle: ModelBundle) -> None:
    """Masked updates need a modulus that holds every sum, and noise that can be drawn. Raises ConfigError."""
    if config.secure is None:
        return
    try:
        terms_of(config, config.secure, config.update_length(len(bundle.shared_params)), helpers=[b""] * MOST_HELPERS)
    except LocalMisuseError as error:
        raise ConfigError(f"task file {path}: {error}") from error


def _start(store: AggregatorStore, config: TaskConfig, bundle: ModelBundle) -> Float32:
    """The parameters that the task begins with, float32 [shared parameters]."""
    if config.start_from is None:
        return bundle.shared_params
    name, _, version = config.start_from.partition("/")
    other = store.tasks.get(name)
    if other.graph_digest != bundle.graph_digest:
        raise AggregatorError(f"start_from: task {name} has another model graph than the bundle")
    if version and not version.isdigit():
        number = store.models.tagged(name, version)
    else:
        number = int(version) if version else other.state.version
    return store.models.params(store.models.record(name, number))
