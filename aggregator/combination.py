"""From a closed round's updates to what comes of them: the next model, or the result of an evaluation or statistics.

Nothing here writes to the database; what is stored are blobs, which mean nothing until a row names them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from aggregator.errors import BlobError, CombineError
from aggregator.exact_sum import UNIT, ExactSum
from aggregator.federated_results import as_metrics, result_of
from aggregator.ingest import Placed, RoundInForce, TaskInForce, Whole, open_sealed
from aggregator.partial_sums import open_sum, sum_place
from aggregator.robust_rules import combine_with_weights
from aggregator.scaffold import PlainSteps, ServerControl, next_control
from aggregator.secure_sections import Secure
from aggregator.secure_terms import NEXT_CLIP, next_clip, noise_sigma
from aggregator.server_optimisers import initial_state, state_from_bytes, state_to_bytes, step
from aggregator.staleness import StalenessWeight, combine_stale
from aggregator.store.aggregator_store import AggregatorStore
from aggregator.store.models import Float32, ModelRecord, NewModel
from aggregator.store.updates import KeptUpdate
from aggregator.task_file import TaskConfig, TrainingPlan
from fl_protocol.errors import LocalMisuseError, RefusedError
from fl_protocol.integer_noise import Entropy, discrete_gaussian
from fl_protocol.messages import TrainingPlanMsg, UpdateHeaderMsg
from fl_protocol.model_delta import make_delta
from fl_protocol.secagg.errors import MaskSumError
from fl_protocol.secagg.messages import MaskSumMsg
from fl_protocol.secagg.parties import unmask

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class ClosedRound:
    """A round that takes no more updates.

    Args:
        number: of the round.
        update_length: numbers in an update.
        live: the rounds whose updates are in it, by number.
        mask_sums: what the round's helpers answered, where updates are masked.
    """

    number: int
    update_length: int
    live: dict[int, RoundInForce]
    mask_sums: tuple[MaskSumMsg, ...] = ()


@dataclass(frozen=True)
class Combined:
    """The combined update, float64 [d], of how many, what to tell the operator, and how many were left out."""

    mean: Float64
    count: int
    metrics: dict[str, Any]
    left_out: int = 0


class _ServerState(msgspec.Struct, frozen=True):
    """What goes from one version to the next beside parameters: the optimiser's state, and what a delta left out."""

    optimiser: bytes = b""
    residual: bytes = b""


def combine(
    store: AggregatorStore, tenant: str, config: TaskConfig, closed: ClosedRound, *, entropy: Entropy
) -> Combined:
    """The round's combined update; `entropy` is for noise that the aggregator itself adds.

    Raises:
        CombineError: there are too few updates for the rule, or what is stored of them is damaged.
        DatabaseError: a sum or an update cannot be read.
    """
    revoked = store.updates.revoked(config.name, closed.number)
    if revoked and adds_up(config):
        raise CombineError(why_not_without(revoked))
    if config.secure is not None:
        return _unmasked(store, config, config.secure, closed, entropy)
    if config.rule.name == "mean":
        return _mean(store, config, closed)
    every = store.updates.kept(config.name, closed.number)
    kept = [one for one in every if one.device not in revoked]
    if revoked and len(kept) < config.minimum_cohort:
        raise CombineError(
            f"{len(kept)} updates are left without those of {len(revoked)} revoked device(s), of at least "
            f"{config.minimum_cohort}"
        )
    updates = _room_for(len(kept), config, closed)
    for row, values in enumerate(_single_updates(store, tenant, config, closed, kept)):
        updates[row] = values
    combination = combine_with_weights(config.rule, updates)
    metrics: dict[str, Any] = {"rule": config.rule.name}
    if combination.weights is not None:
        metrics["updates_without_weight"] = int((combination.weights == 0).sum())
    left_out = len(every) - len(kept)
    if left_out:
        metrics["updates_of_revoked_devices"] = left_out
    return Combined(combination.update, len(updates), metrics, left_out)


def adds_up(config: TaskConfig) -> bool:
    """Whether updates of a round are known by their sum alone, which cannot be taken apart again."""
    return config.secure is not None or config.rule.name == "mean"


def why_not_without(revoked: Sequence[str]) -> str:
    """Why a sum with revoked devices' updates in it is not used."""
    return (
        f"{len(revoked)} of its updates are of devices that were revoked meanwhile, and a sum cannot be taken apart; "
        "nothing of it is used"
    )


def _mean(store: AggregatorStore, config: TaskConfig, closed: ClosedRound) -> Combined:
    """The mean of all workers' sums, each weighted by its staleness."""
    staleness: dict[int, int] = {}

    def partials() -> Iterator[tuple[int, NDArray[np.int64], int]]:
        for made_for, one in _workers_sums(store, config, closed):
            late = closed.number - made_for
            staleness[late] = staleness.get(late, 0) + one.count
            yield late, one.total, one.count

    stale = config.asynchronous
    weight = StalenessWeight("constant") if stale is None else StalenessWeight(stale.weight, exponent=stale.exponent)
    mean, count = combine_stale(partials(), closed.update_length, weight=weight, unit=UNIT)
    metrics = {} if stale is None else {"staleness": {str(late): staleness[late] for late in sorted(staleness)}}
    return Combined(mean, count, metrics)


def _workers_sums(store: AggregatorStore, config: TaskConfig, closed: ClosedRound) -> Iterator[tuple[int, ExactSum]]:
    """Every worker's sums, with the round that their updates were made for."""
    for stored in store.updates.partials(config.name, closed.number):
        key = (config.name, closed.number, stored.round)
        sealed, place = store.blobs.get(stored.blob), sum_place(key, stored.worker)
        try:
            one = open_sum(sealed, closed.live[closed.number].sums_secret, place=place, count=stored.num_updates)
        except BlobError as error:  # read it was; it is damaged, and waiting would not mend it
            raise CombineError(str(error)) from error
        yield stored.round, one


def _unmasked(
    store: AggregatorStore, config: TaskConfig, secure: Secure, closed: ClosedRound, entropy: Entropy
) -> Combined:
    """The mean of masked updates, without their masks, and with the noise that the aggregator adds."""
    terms = closed.live[closed.number].secure
    if terms is None:
        raise CombineError("the round's manifest is gone; abort the round")
    point = terms.fixed_point
    words, count = np.zeros(point.vector_length, np.int64), 0
    for _, one in _workers_sums(store, config, closed):
        words += one.total
        count += one.count
    ids = [update.update_id for update in store.updates.kept(config.name, closed.number)]
    if len(ids) != count:
        raise CombineError(f"{count} updates were added up, and {len(ids)} are listed")
    masked = terms.masks.reduced(terms.masks.words_of(words))
    central = secure.noise_from == "aggregator"
    sigma = noise_sigma(config, secure, closed.update_length, clip=point.l2_norm_clip) if central else 0.0
    noise = discrete_gaussian(sigma, len(masked), entropy) if sigma else None
    try:
        total = unmask(terms, masked, closed.mask_sums, update_ids=ids, noise=noise)
    except MaskSumError as error:
        raise CombineError(str(error)) from error
    metrics: dict[str, Any] = {"engine": "secure", "l2_norm_clip": point.l2_norm_clip}
    if point.clip_bit:
        share, clip = next_clip(secure, point.l2_norm_clip, float(total[-1]), count=count)
        metrics |= {"share_within_clip": share, NEXT_CLIP: clip}
    return Combined(total[: closed.update_length] / count, count, metrics)


def _room_for(count: int, config: TaskConfig, closed: ClosedRound) -> NDArray[np.float32]:
    """An array for a round's single updates, float32 [count, d]. Raises CombineError for none or too many."""
    needed, allowed = 4 * count * closed.update_length, config.rule.memory_bytes
    if not count:
        raise CombineError("no updates to combine")
    if needed > allowed:
        raise CombineError(
            f"{count} updates take {needed} bytes for rule {config.rule.name}, and rule.memory_bytes is {allowed}; "
            "create the task anew with more, or with a lower goal"
        )
    return np.empty((count, closed.update_length), np.float32)


def _single_updates(
    store: AggregatorStore, tenant: str, config: TaskConfig, closed: ClosedRound, kept: Iterable[KeptUpdate]
) -> Iterator[NDArray[np.float32]]:
    """Every update of the round, opened again; each segment is read once."""
    task = TaskInForce(
        config.name,
        closed.update_length,
        encodings=config.updates.encodings,
        norm_bound=config.rule.norm_bound,
    )
    in_order = sorted(kept, key=lambda one: (one.segment, one.start))
    for segment, updates in groupby(in_order, key=lambda one: one.segment):
        data = store.blobs.get(segment)
        for update in updates:
            made_for = closed.live[update.round]
            header = UpdateHeaderMsg(
                tenant=tenant,
                task=config.name,
                round=update.round,
                model_digest=made_for.model_digest,
                device=update.device,
                update_id=update.update_id,
                kem=made_for.key.kem,
                sealed_digest=bytes(32),  # the seal does not cover it
            )
            sealed = data[update.start : update.start + update.length]
            try:
                yield open_sealed(Whole(header, sealed, 0), Placed(task, made_for, closed.number))
            except RefusedError as error:
                raise CombineError(f"the stored update of {update.device} is damaged ({error})") from error


def next_model(
    store: AggregatorStore, config: TaskConfig, before: ModelRecord, combined: Combined, *, round_number: int
) -> NewModel:
    """The model after a round of training.

    Args:
        store: where the model before is.
        config: of the task.
        before: the version that the round trained.
        combined: the round's update.
        round_number: of the round.

    Raises:
        CombineError: the result is no usable model.
    """
    params = store.models.params(before)
    state = _server_state(store.models.optimiser(before))
    optimiser = config.server
    memory = (
        state_from_bytes(state.optimiser, optimiser, length=len(params))
        if state.optimiser
        else initial_state(optimiser, len(params))
    )
    wanted, memory = step(_with_residual(params, state.residual), memory, combined.mean, optimiser)
    delta, residual, published = b"", b"", wanted
    if config.updates.delta is not None:
        try:
            delta, published = make_delta(params, wanted, config.updates.delta)
        except LocalMisuseError as error:
            raise CombineError(f"no delta leads to the next model: {error}; lower the learning rates") from error
        residual = (wanted.astype(np.float64) - published).astype("<f4").tobytes()
    control = _next_control(store, config, before, combined)
    return NewModel(
        version=before.version + 1,
        params=published,
        origin="round",
        parent=before.version,
        round=round_number,
        optimiser=msgspec.msgpack.encode(_ServerState(state_to_bytes(memory), residual)),
        control=None if control is None else control.values,
        population=0 if control is None else control.population,
        delta=delta,
    )


def measurement(config: TaskConfig, combined: Combined) -> dict[str, Any]:
    """The result of an evaluation or of statistics, as plain values."""
    plan = config.plan_message()
    if isinstance(plan, TrainingPlanMsg):
        raise CombineError("a training plan has no result but a model")
    result = result_of(combined.mean * combined.count, updates=combined.count, plan=plan)
    return as_metrics(result)


def _next_control(
    store: AggregatorStore, config: TaskConfig, before: ModelRecord, combined: Combined
) -> ServerControl | None:
    """The control variate that goes with the next version."""
    plan = config.plan
    if not isinstance(plan, TrainingPlan) or not plan.control_variates:
        return None
    return next_control(
        ServerControl(store.models.control(before, len(combined.mean)), before.population),
        combined.mean,
        count=combined.count,
        population=config.population or combined.count,
        steps=PlainSteps(plan.steps, plan.learning_rate),
    )


def average(versions: Iterable[Float32]) -> Float32:
    """The mean of several versions' parameters (B. Polyak, A. Juditsky, 1992). Raises CombineError for none."""
    total, count = None, 0
    for params in versions:
        total = params.astype(np.float64) if total is None else total + params
        count += 1
    if total is None:
        raise CombineError("no models to average")
    return (total / count).astype(np.float32)


def _server_state(raw: bytes) -> _ServerState:
    """As it was stored with the model before."""
    return msgspec.msgpack.decode(raw, type=_ServerState) if raw else _ServerState()


def _with_residual(params: Float32, residual: bytes) -> Float32:
    """What was wanted last time, of which the published parameters are what a delta could say."""
    return params if not residual else (params + np.frombuffer(residual, "<f4")).astype(np.float32)
