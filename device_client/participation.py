"""One participation in a round, in the only order that is safe: note, charge, compute, seal; then it may be sent.

What is noted first holds only what everybody may know (manifest and model). The charge is durable before the first
record is looked at. Training goes step by step and can be put aside at each; evaluation and statistics are one step of
the same kind (`device_client.record_sums`), so all that is said here of training holds for them. Sealing replaces the
work in one atomic write, and the ledger's release line follows before anything is sent, so an old copy of the store
that still holds the work is noticed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec.structs import replace

from device_client.control_variate import ControlVariate
from device_client.error_feedback import ErrorFeedback
from device_client.errors import BudgetSpentError, StoreError
from device_client.events import PendingUpdate
from device_client.feasibility import InfeasibleError
from device_client.kept_vector import KeptVector
from device_client.ledger import PrivacyLedger
from device_client.outbox import Outbox, Work
from device_client.ports import Float32, Graph
from device_client.record_sums import RecordSums, channels_problem
from device_client.sealer import Sealer
from device_client.secure_update import protected_update
from device_client.training import Evaluation, LocalTraining, Records, Trainer, Training, evaluate
from device_client.work_vectors import IN_ENTRY, WorkVectors
from fl_protocol.errors import ProtocolError
from fl_protocol.integer_noise import Entropy
from fl_protocol.messages import (
    EncodingName,
    RoundManifestMsg,
    UpdateBodyMsg,
    UpdateBodyView,
    UpdateEnvelopeMsg,
    UpdateHeaderMsg,
    decode,
    encode,
)
from fl_protocol.plans import EvaluationPlanMsg, TrainingPlanMsg
from fl_protocol.sealing import seal_update
from fl_protocol.secagg.messages import DeviceCredentialMsg, SecureBodyMsg
from fl_protocol.secagg.parties import Sender
from fl_protocol.topics import update_label
from fl_protocol.update_encoding import (
    decode_values,
    encode_values,
    float32_view,
    rotation_seed,
    usable_encoding,
)


@dataclass(frozen=True)
class Participant:
    """What participations in one study need, bound together once per device.

    Args:
        study: ``tenant/task``.
        device: the name on the wire.
        signing_key: of that name.
        credential: where that name is a pseudonym; goes with masked updates.
        input_shape: of one window, channels last.
        training_records, held_out_records: read anew for each use, since records come in all the time.
        personal: the personal layers (M. G. Arivazhagan et al. 2019, arXiv 1912.00818), which end the parameter vector
            and are never sent. Their noise is that of the shared ones: later steps of an update depend on them, so
            leaving it out would make the shared part less private than it is accounted.
        control: SCAFFOLD's own control variate c_i.
        feedback: what ``top_k`` has left out so far.
        trainer: does the local steps.
        sealer: closes up the update.
        vectors: how work in the outbox holds its vectors.
    """

    study: str
    device: str
    signing_key: Ed25519PrivateKey
    ledger: PrivacyLedger
    graph: Graph
    input_shape: tuple[int, ...]
    training_records: Callable[[], Records]
    held_out_records: Callable[[], Records]
    personal: KeptVector
    control: ControlVariate
    feedback: ErrorFeedback
    outbox: Outbox
    entropy: Entropy
    credential: DeviceCredentialMsg | None = None
    trainer: Trainer = LocalTraining
    sealer: Sealer = seal_update
    vectors: WorkVectors = IN_ENTRY

    def begin(self, manifest: RoundManifestMsg, params: Float32, control: Float32 | None, *, now_s: float) -> LocalWork:
        """Note, charge, and begin to compute.

        Args:
            manifest: of an open round.
            params: the global model's, float32 [num_parameters]; empty for statistics, which need none.
            control: SCAFFOLD's server control variate, if the plan wants it.
            now_s: Unix seconds.

        Raises:
            OutboxFullError, BudgetSpentError: nothing was charged or computed.
            InfeasibleError: the plan names a channel that the windows have not; nothing was charged or computed.
            ProtocolError: the manifest names no encoding that can be used; nothing was charged or computed.
            StoreError: the disk did not take the note or the charge; nothing may be sent.
            TrainingError: the control variates do not fit; the charge stands.
        """
        self._drop_work()
        # Security: what came of that charge is on its way, was given up or is lost; a second result would cost another.
        if self.ledger.was_charged(self.study, manifest.round):
            raise BudgetSpentError(f"round {manifest.round} of {self.study} was charged before and is not begun again")
        _encoding_of(manifest)
        self._check_channels(manifest)
        work = Work(
            update_id=self.entropy(16),
            study=self.study,
            device=self.device,
            manifest=encode(manifest),
            start=self.vectors.pack(self._start(manifest, params)),
            server_control=self.vectors.pack(control) if control is not None else b"",
            own_control=self.vectors.pack(self.control.at(manifest)) if control is not None else b"",
        )
        self.outbox.begin(work)
        return self.go_on(work, now_s=now_s)

    def _start(self, manifest: RoundManifestMsg, params: Float32) -> Float32:
        """The parameters that the round's plan is about."""
        match manifest.plan:
            case TrainingPlanMsg():
                # All layers are trained with noise on all of them, so what is shared is as private as if all were. The
                # personal ones are those from before the round, however often it is begun again.
                return _joined(params, self.personal.values)
            case EvaluationPlanMsg():  # the global model as everybody has it, as `measure` does
                return _joined(params, self.personal.initial)
            case _:
                return np.zeros(0, np.float32)

    def _check_channels(self, manifest: RoundManifestMsg) -> None:
        """Leave out a round that asks for channels that there are none of."""
        if problem := channels_problem(manifest.plan, self.input_shape):
            raise InfeasibleError(f"the plan cannot be carried out: {problem}")

    def check_budget(self, manifest: RoundManifestMsg, *, now_s: float) -> None:
        """Whether the ledger would admit this round now; charges nothing. Raises BudgetSpentError."""
        self.ledger.check(
            task=self.study,
            round_number=manifest.round,
            plan=manifest.plan,
            now_s=now_s,
            latest_s=manifest.deadline_s,
            earliest_s=manifest.opened_s,
        )

    def go_on(self, work: Work, *, now_s: float) -> LocalWork:
        """Charge for a work unless it was, and compute from where it stopped. Raises as `begin` does."""
        manifest = work.decoded_manifest()
        try:
            # Security: the charge is durable before the first record is looked at.
            if not self.ledger.was_charged(self.study, manifest.round):
                self.ledger.reserve(
                    task=self.study,
                    round_number=manifest.round,
                    plan=manifest.plan,
                    now_s=now_s,
                    latest_s=manifest.deadline_s,
                    earliest_s=manifest.opened_s,
                )
            return LocalWork(self, work, manifest)
        except Exception:
            with suppress(StoreError):  # what failed says more; the outbox tries again
                self.outbox.give_up(work.update_id)
            raise

    def _drop_work(self) -> None:
        """Drop work that nothing came of."""
        while (stale := self.outbox.work(self.study)) is not None:
            self.outbox.give_up(stale.update_id)

    def measure(self, params: Float32) -> dict[str, Evaluation]:
        """How a global model does on records that it is never trained on here; the result stays on the device.

        Returns:
            ``global``, and for a model with personal layers also ``personal``, with this device's own; nothing without
            records, or without a model (a round of statistics brings none).

        Raises:
            GraphError: the runtime failed.
        """
        records, personal = self.held_out_records(), self.personal
        models = {"global": personal.initial, **({"personal": personal.values} if personal.initial.size else {})}
        return {
            name: evaluate(self.graph, _joined(params, own), records)
            for name, own in models.items()
            if len(records) and params.size
        }


class LocalWork:
    """What one participation computes, step by step.

    Raises:
        TrainingError: what was stored does not fit; the round has to be given up.
    """

    def __init__(self, participant: Participant, work: Work, manifest: RoundManifestMsg) -> None:
        self._participant, self._work, self.manifest = participant, work, manifest
        self._computation = _computation(participant, work, manifest)
        self._update: _SealedUpdate | None = None

    @property
    def update(self) -> str:
        """What both journals call the update that comes of it."""
        return update_label(self._work.update_id)

    @property
    def steps(self) -> tuple[int, int]:
        """Steps done, and to do in all."""
        return self._computation.step, self._computation.steps

    @property
    def done(self) -> bool:
        """Whether only sealing is left."""
        return self._computation.done

    def advance(self) -> None:
        """One noisy step. Raises TrainingError: the round has to be given up."""
        self._computation.advance()

    def put_aside(self) -> None:
        """Durably keep the progress. Raises StoreError; the work may go on nevertheless."""
        self._work = replace(self._work, progress=self._computation.progress())
        self._participant.outbox.put(self._work)

    def abandon(self) -> None:
        """Forget the work; the charge stands. Raises StoreError, and it is not gone on with all the same."""
        self._participant.outbox.give_up(self._work.update_id)

    def finish(self, now_s: float) -> PendingUpdate:
        """Seal the update; on return it is durably in the outbox and in the ledger, and may be sent.

        Raises:
            TrainingError: the model diverged. ProtocolError: the recipient key cannot be sealed to. In both cases the
                round has to be given up, and the charge stands.
            StoreError: the disk did not take it; nothing may be sent, and `finish` may be called again.
        """
        one, change = self._participant, self._computation.change()
        own_control = self._next_control()
        # Sealed once, so that trying again after a full disk sends no second ciphertext of the same round.
        update = self._update = self._update or self._sealed(change[: self.manifest.update_length])
        pending = update.pending
        if update.residual is not None:  # before the update, which it names: it holds only once that is released
            one.feedback.propose(update.residual, device=pending.device, sealed_digest=pending.sealed_digest)
        one.outbox.put(pending)
        one.ledger.record_release(pending, now_s=now_s)
        # Only now: a round that is trained again must start from the same personal layers and control variate.
        if isinstance(self.manifest.plan, TrainingPlanMsg):
            shared = self.manifest.num_parameters
            one.personal.keep(self._work.start_params(one.vectors)[shared:] + change[shared:])
        if own_control is not None:
            one.control.propose(self.manifest, own_control)
        return pending

    def _next_control(self) -> Float32 | None:
        """SCAFFOLD's next c_i, if the plan has one."""
        computed = self._computation
        if isinstance(computed, RecordSums) or not self.manifest.plan.control_variates:
            return None
        return computed.next_control()

    def _sealed(self, change: Float32) -> _SealedUpdate:
        """The update as it will be sent, and resent, and what it leaves out."""
        work, recipient = self._work, self.manifest.recipient
        if recipient is None:
            raise ProtocolError("the manifest names no recipient key: the study is finished")
        body, residual = self._encoded(change)
        envelope = self._participant.sealer(
            body,
            manifest=self.manifest,
            device=work.device,
            update_id=work.update_id,
            signing_key=self._participant.signing_key,
        )
        pending = PendingUpdate(
            update_id=work.update_id,
            study=work.study,
            device=work.device,
            round=self.manifest.round,
            envelope=envelope,
            sealed_digest=sealed_digest_of(envelope),
            deadline_s=self.manifest.deadline_s,
            recipient_key=hashlib.sha256(recipient.public_key).hexdigest()[:32],
        )
        return _SealedUpdate(pending, residual)

    def _encoded(self, change: Float32) -> tuple[UpdateBodyMsg | SecureBodyMsg, Float32 | None]:
        """What goes inside the seal, and for ``top_k`` what it leaves out."""
        one, manifest, name = self._participant, self.manifest, _encoding_of(self.manifest)
        if manifest.secure is not None:
            sender = Sender(self._work.device, self._work.update_id, one.signing_key, one.credential)
            return protected_update(manifest.secure, manifest, change, sender=sender, entropy=one.entropy), None
        seed = rotation_seed(manifest.model_digest, manifest.round)
        if name == "float32":
            return UpdateBodyView(num_parameters=len(change), values=float32_view(change), encoding=name), None
        wanted = one.feedback.compensate(change, device=self._work.device) if name == "top_k" else change
        values = encode_values(wanted, name, seed=seed, entropy=one.entropy, fraction=manifest.top_k_fraction)
        body = UpdateBodyMsg(num_parameters=len(change), values=values, encoding=name)
        if name != "top_k":
            return body, None
        return body, wanted - decode_values(values, name, num_parameters=len(change), seed=seed)


@dataclass(frozen=True)
class _SealedUpdate:
    """An update, and what it leaves out for later ones, float32 [num_parameters], if its encoding does that."""

    pending: PendingUpdate
    residual: Float32 | None


def _computation(participant: Participant, work: Work, manifest: RoundManifestMsg) -> Training | RecordSums:
    """What the plan asks for, from where it stopped."""
    one, plan = participant, manifest.plan
    if isinstance(plan, TrainingPlanMsg):
        return one.trainer(
            one.graph,
            work.start_params(one.vectors),
            one.training_records(),
            plan=plan,
            entropy=one.entropy,
            control=work.control(one.vectors),
            progress=work.progress,
        )
    records = one.held_out_records() if isinstance(plan, EvaluationPlanMsg) else one.training_records()
    start = work.start_params(one.vectors)
    return RecordSums(one.graph, start, records, plan=plan, entropy=one.entropy, progress=work.progress)


def _encoding_of(manifest: RoundManifestMsg) -> EncodingName:
    """What the round's update is encoded with. Raises ProtocolError."""
    name = usable_encoding(manifest)
    if name is None:
        raise ProtocolError(
            f"round {manifest.round} takes updates as {', '.join(manifest.encodings)} only, and its plan "
            "does not go with that; the study's encodings need another one"
        )
    return name


def sealed_digest_of(envelope: bytes) -> bytes:
    """The digest that a receipt for this envelope must name."""
    outer = decode(envelope, UpdateEnvelopeMsg)
    digest = decode(outer.header, UpdateHeaderMsg).sealed_digest
    if hashlib.sha256(outer.sealed).digest() != digest:
        raise ProtocolError("the envelope's header names other sealed bytes than it carries")
    return digest


def _joined(shared: Float32, own: Float32) -> Float32:
    """Shared and personal parameters in one vector, float32 [d]; no copy where there are no personal ones."""
    return np.concatenate([shared, own]) if own.size else shared
