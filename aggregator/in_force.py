"""What ingest needs of tasks and rounds, as the database has it: read by every worker, anew at each attempt."""

from __future__ import annotations

from functools import lru_cache

from aggregator.ingest import RoundInForce, TaskInForce
from aggregator.store.aggregator_store import AggregatorStore
from aggregator.store.rounds import LiveRound
from aggregator.task_file import TaskConfig, read_task
from fl_protocol.errors import ConfigError
from fl_protocol.messages import RoundManifestMsg, decode
from fl_protocol.sealing import RoundKey
from fl_protocol.secagg.parties import SecureRound
from fl_protocol.secagg.terms import secure_round


def tasks_in_force(store: AggregatorStore) -> list[TaskInForce]:
    """Every task by its name, with the rounds whose updates may count. Raises DatabaseError."""
    specs = store.tasks.specs()
    by_task: dict[str, list[LiveRound]] = {}
    for live in store.rounds.live():
        by_task.setdefault(live.task, []).append(live)
    return [_task(name, spec, by_task.get(name, [])) for name, spec in specs.items()]


@lru_cache(maxsize=256)
def config_of(spec: str, name: str) -> TaskConfig:
    """A task's configuration from its stored file, parsed once."""
    return read_task(spec, f"of {name} in the database")


def _task(name: str, spec: str, live: list[LiveRound]) -> TaskInForce:
    """One task; only its name where its file cannot be read, or there is none (the coordinator: `task_unusable`)."""
    try:
        config = config_of(spec, name) if spec else None
    except ConfigError:
        config = None
    if config is None:
        return TaskInForce(name, 0, is_readable=False)
    open_rounds = [one for one in live if one.outcome == "open"]
    newest = max(open_rounds, key=lambda one: one.number) if open_rounds else None
    return TaskInForce(
        name=name,
        update_length=newest.update_length if newest is not None else 0,
        open_round=newest.number if newest is not None else None,
        rounds={one.number: round_in_force(one) for one in live},
        takes_stale=config.asynchronous is not None,
        encodings=config.updates.encodings,
        norm_bound=config.rule.norm_bound,
        keeps_updates=config.rule.name != "mean",
        is_masked=config.secure is not None,
    )


def round_in_force(live: LiveRound) -> RoundInForce:
    """One round."""
    secure = None if live.manifest is None else _secure(live.manifest)
    is_closing = live.outcome == "closing"
    return RoundInForce(live.number, live.model_digest, _key(live.key), live.sums_secret, is_closing, secure)


@lru_cache(maxsize=64)
def _secure(manifest: bytes) -> SecureRound:
    """What a stored manifest says about masking, decoded once."""
    return secure_round(decode(manifest, RoundManifestMsg))


@lru_cache(maxsize=256)
def _key(key: RoundKey) -> RoundKey:
    """One object for each key, so that it is expanded once."""
    return key
