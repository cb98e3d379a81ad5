"""What comes of a task's rounds: the next model if it is good enough, a measurement, an average, an earlier model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from aggregator.combination import ClosedRound, average, combine, measurement, next_model
from aggregator.errors import CombineError, LostModelError, MissingBlobError, RejectedModelError
from aggregator.in_force import round_in_force
from aggregator.store.aggregator_store import AggregatorStore
from aggregator.store.models import ModelRecord, NewModel
from aggregator.task_file import TaskConfig
from aggregator.validation import Judge, Judgement, why_worse
from fl_protocol.errors import GraphError
from fl_protocol.integer_noise import Entropy
from fl_protocol.secagg.messages import MaskSumMsg


@dataclass(frozen=True)
class RoundOutcome:
    """What came of a closed round.

    Args:
        count: updates that went into it.
        metrics: what to tell the operator.
        model: the next model, in training.
        left_out: updates that did not, since their devices were revoked.
    """

    count: int
    metrics: dict[str, Any]
    model: NewModel | None = None
    left_out: int = 0


class RoundOutcomes:
    """Makes models and results of one task; writes nothing to the database.

    Args:
        store: the database.
        tenant: name on the wire.
        config: of the task.
        update_length: numbers in an update.
        judge: of the operator's validation set, if there is one.
        entropy: cryptographic source, for noise that is added here.
    """

    def __init__(
        self,
        store: AggregatorStore,
        tenant: str,
        config: TaskConfig,
        *,
        update_length: int,
        judge: Judge | None,
        entropy: Entropy,
    ) -> None:
        self._store, self._tenant, self._config, self._entropy = store, tenant, config, entropy
        self._update_length, self._judge = update_length, judge
        self._judged: tuple[bytes, Judgement] | None = None

    def outcome(self, number: int, *, version: int, mask_sums: tuple[MaskSumMsg, ...] = ()) -> RoundOutcome:
        """Combine a closed round's updates.

        Args:
            number: of the round.
            version: of the model that it trained.
            mask_sums: what its helpers answered, where updates are masked.

        Raises:
            CombineError: they cannot be combined, or what is stored of them is gone or damaged.
            RejectedModelError: the model that they make is worse on the validation set.
        """
        try:
            return self._outcome(number, version, mask_sums)
        except (MissingBlobError, LostModelError) as error:  # waiting would not mend it, as it does a store's outage
            raise CombineError(str(error)) from error

    def _outcome(self, number: int, version: int, mask_sums: tuple[MaskSumMsg, ...]) -> RoundOutcome:
        """Combine a closed round's updates; MissingBlobError, LostModelError: what they need is not in the store."""
        closed = self._closed(number, mask_sums)
        combined = combine(self._store, self._tenant, self._config, closed, entropy=self._entropy)
        if self._config.kind != "train":
            result = {"result": measurement(self._config, combined)}
            return RoundOutcome(combined.count, {**result, **combined.metrics}, left_out=combined.left_out)
        before = self._store.models.record(self._config.name, version)
        model = next_model(self._store, self._config, before, combined, round_number=number)
        metrics = {"mean_update_norm": float(np.linalg.norm(combined.mean)), **combined.metrics}
        metrics |= self._judgement(before, model)
        return RoundOutcome(combined.count, metrics, replace(model, metrics=metrics), combined.left_out)

    def finished(self, version: int, *, after: list[NewModel]) -> NewModel:
        """The finished model, a version of its own: the mean of the last versions of its line.

        Args:
            version: of the finished model.
            after: the last round's model, if it is no row yet.
        """
        models, wanted = self._store.models, self._config.server.average_last
        records = {record.version: record for record in models.records(self._config.name)}
        line = [model.params for model in after]
        at = after[-1].parent if after else version - 1
        # Along parents, so that versions which were rolled back stay out; to the first that was pruned or is lost.
        while at is not None and len(line) < wanted and records[at].params is not None:
            try:
                line.append(models.params(records[at]))
            except (MissingBlobError, LostModelError):
                if not line:
                    raise
                break  # as if it were pruned: a last round that could never be committed would help nobody
            at = records[at].parent
        return NewModel(
            version=version,
            params=average(reversed(line)),
            origin="average",
            parent=version - 1,
            metrics={"averaged": len(line)},
        )

    def rolled_back(self, version: int, *, newest: int) -> NewModel:
        """The next version, from the parameters and the server's memory of an earlier one.

        Args:
            version: the earlier one.
            newest: the present one.
        """
        models = self._store.models
        record = models.record(self._config.name, version)
        control = models.control(record, self._update_length) if record.control is not None else None
        return NewModel(
            version=newest + 1,
            params=models.params(record),
            origin="rollback",
            parent=version,
            optimiser=models.optimiser(record),
            control=control,
            population=record.population,
            metrics={"instead_of": newest},
        )

    def _closed(self, number: int, mask_sums: tuple[MaskSumMsg, ...]) -> ClosedRound:
        """A round that takes no more updates, with the keys of all whose updates are in it."""
        rounds = [one for one in self._store.rounds.live() if one.task == self._config.name]
        live = {one.number: round_in_force(one) for one in rounds}
        return ClosedRound(number, self._update_length, live, mask_sums)

    def _judgement(self, before: ModelRecord, model: NewModel) -> dict[str, Any]:
        """How the new model does on the operator's validation set. Raises RejectedModelError if it is worse."""
        if self._judge is None or self._config.validation is None:
            return {}
        try:
            if self._judged is None or self._judged[0] != before.digest:
                self._judged = (before.digest, self._judge.judge(self._store.models.params(before)))
            after = self._judge.judge(model.params)
        except GraphError as error:
            raise CombineError(f"the model cannot be measured on the validation set: {error}") from error
        worse = why_worse(self._judged[1], after, self._config.validation.margin)
        if worse:
            raise RejectedModelError(worse)
        return {"validation_loss": after.loss, "validation_accuracy": after.correct / after.count}
