"""One task as devices see it: its manifest, its model, and how to get to the model with less than all its bytes."""

from __future__ import annotations

import hashlib
from typing import Literal

from msgspec.structs import replace

from aggregator.announcer import Announcer, Whole
from aggregator.audit.task_entries import record_manifest
from aggregator.errors import CombineError
from aggregator.helper_calls import HelperCalls
from aggregator.rounds import Phase, RoundState
from aggregator.secure_sections import Secure
from aggregator.secure_terms import NEXT_CLIP, terms_of
from aggregator.store.aggregator_store import AggregatorStore
from aggregator.store.models import ModelRecord, little_endian
from aggregator.store.rounds import LiveRound
from aggregator.task_file import TaskConfig
from fl_protocol.errors import LocalMisuseError
from fl_protocol.messages import DeltaMsg, RoundManifestMsg, SecureTermsMsg, decode, encode

_STATUS: dict[Phase, Literal["open", "paused", "finished", "aborted"]] = {
    Phase.OPEN: "open",
    Phase.UNMASKING: "paused",  # a device that began now would come too late
    Phase.PAUSED: "paused",
    Phase.FINISHED: "finished",
    Phase.ABORTED: "aborted",
}


class TaskPublisher:
    """Publishes one task as the database has it.

    Args:
        store: the database.
        announcer: publishes.
        tenant: name on the wire.
        config: of the task.
        graph_digest: SHA-256 of the bundle's trainable graph.
        num_parameters: d, shared ones.
        update_length: numbers in an update.
        calls: to the helpers, for their keys; None without any.
    """

    def __init__(
        self,
        store: AggregatorStore,
        announcer: Announcer,
        tenant: str,
        config: TaskConfig,
        *,
        graph_digest: bytes,
        num_parameters: int,
        update_length: int,
        calls: HelperCalls | None,
    ) -> None:
        self._store, self._announcer, self._tenant, self._config = store, announcer, tenant, config
        self._graph_digest, self._num_parameters = graph_digest, num_parameters
        self._update_length, self._calls = update_length, calls
        self._plan = config.plan_message()

    def publish(self, state: RoundState, *, probability: float) -> str:
        """Publish what devices fetch, then the manifest; withdraw what is too old. Raises DatabaseError.

        Raises:
            CombineError: no secure round of this task can be described.

        Returns:
            Why nothing was published: helpers of a secure round have to be waited for. Empty if it was.
        """
        models = self._store.models
        record = models.record(self._config.name, state.version)
        open_round = self._open_round(state)
        wholes = [] if self._config.kind == "statistics" else [little_endian(models.params(record))]
        control_digest = delta = None
        if open_round is not None and self._config.plan.control_variates:
            wholes.append(little_endian(models.control(record, self._num_parameters)))
            control_digest = _digest(wholes[-1])
        if open_round is not None and record.delta_digest is not None and record.parent is not None:
            wholes.append(models.delta(record))
            parent = models.record(self._config.name, record.parent)
            delta = DeltaMsg(from_digest=parent.digest, digest=record.delta_digest, total_bytes=len(wholes[-1]))
        manifest = self._manifest(state, record, open_round, probability, control_digest=control_digest, delta=delta)
        if open_round is not None and self._config.secure is not None:
            with_terms, why = self._with_terms(manifest, open_round)
            if with_terms is None:
                return why
            manifest = with_terms
        elif open_round is not None:
            with self._store.database.transaction() as connection:
                record_manifest(connection, manifest)
        self._announcer.publish(
            manifest,
            wholes,
            # A device may be in the middle of downloading the version before.
            kept=self._digests(state.version - 1),
            # Two versions, since a task that finishes makes two at once.
            stale=[
                Whole(digest, 4 * self._num_parameters)
                for version in (state.version - 2, state.version - 3)
                for digest in self._digests(version)
            ],
        )
        return ""

    def can_be_seen_at_last(self, state: RoundState, *, deadline_s: float) -> bool:
        """Whether a secure round that was never published can be now, with this deadline. Raises DatabaseError."""
        if self._config.secure is None:
            return False
        open_round = self._open_round(state)
        return open_round is not None and open_round.manifest is None and self._terms(deadline_s)[0] is not None

    def _with_terms(self, manifest: RoundManifestMsg, open_round: LiveRound) -> tuple[RoundManifestMsg | None, str]:
        """A secure round's manifest, the same as when it was first published but for the times; or why not yet."""
        if open_round.manifest is not None:
            stored = decode(open_round.manifest, RoundManifestMsg)
            return replace(stored, opened_s=manifest.opened_s, deadline_s=manifest.deadline_s), ""
        terms, why = self._terms(manifest.deadline_s)
        if terms is None:
            return None, why
        with_terms = replace(manifest, engine="secure", secure=terms)
        # Security: durable before any device can act on it, so that there is one such manifest for a round.
        with self._store.database.transaction() as connection:
            self._store.rounds.set_manifest(connection, open_round.task, open_round.number, encode(with_terms))
            record_manifest(connection, with_terms)
        return with_terms, ""

    def _terms(self, deadline_s: float) -> tuple[SecureTermsMsg | None, str]:
        """How a round that is to be published masks updates; or why that cannot be said yet. Raises CombineError."""
        secure = self._config.secure
        if secure is None or self._calls is None:
            return None, "this process knows no helpers"
        keys, why = self._calls.keys(secure.helpers, until_s=deadline_s + secure.unmasking_s)
        if not keys:
            return None, why
        try:
            return terms_of(self._config, secure, self._update_length, helpers=keys, clip=self._clip(secure)), ""
        except LocalMisuseError as error:  # waiting would not mend it
            raise CombineError(f"its updates cannot be masked: {error}") from error

    def _clip(self, secure: Secure) -> float | None:
        """What the last committed round says that the clip is from now on; None for what the task's file says."""
        if secure.adaptive_clipping is None:
            return None
        return self._store.rounds.last_metric(self._config.name, NEXT_CLIP)

    def _open_round(self, state: RoundState) -> LiveRound | None:
        """The open round's row."""
        if state.phase is not Phase.OPEN:
            return None
        rounds = self._store.rounds.live()
        return next(one for one in rounds if (one.task, one.number) == (self._config.name, state.number))

    def _manifest(
        self,
        state: RoundState,
        record: ModelRecord,
        open_round: LiveRound | None,
        probability: float,
        *,
        control_digest: bytes | None,
        delta: DeltaMsg | None,
    ) -> RoundManifestMsg:
        """The manifest of the task as it stands."""
        config = self._config
        return RoundManifestMsg(
            tenant=self._tenant,
            task=config.name,
            round=state.number,
            status=_STATUS[state.phase],
            # What belongs to the engine secure comes with an open round's terms.
            engine="open" if open_round is not None else config.engine,
            model_digest=record.digest,
            graph_digest=self._graph_digest,
            num_parameters=self._num_parameters,
            recipient=open_round.key.recipient() if open_round is not None else None,
            plan=self._plan,
            opened_s=state.opened_s,
            deadline_s=state.deadline_s,
            goal=config.goal,
            minimum_cohort=config.minimum_cohort,
            participation_probability=probability,
            minimum_separation_s=config.participation.minimum_separation_s,
            most_participations=config.participation.most_participations,
            maximum_staleness=config.policy.maximum_staleness,
            required_tags=config.participation.required_tags,
            encodings=config.updates.encodings,
            top_k_fraction=config.updates.top_k_fraction,
            delta=delta,
            control_digest=control_digest,
        )

    def _digests(self, version: int) -> list[bytes]:
        """What was published with a version; nothing for one before the first."""
        if version < 0:
            return []
        models = self._store.models
        record = models.record(self._config.name, version)
        digests = [record.digest] + ([record.delta_digest] if record.delta_digest is not None else [])
        if self._config.plan.control_variates and record.params is not None:
            digests.append(_digest(little_endian(models.control(record, self._num_parameters))))
        return digests


def _digest(whole: bytes) -> bytes:
    """How it is named on the wire."""
    return hashlib.sha256(whole).digest()
