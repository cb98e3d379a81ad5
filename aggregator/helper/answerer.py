"""Answers requests, from whichever way they come: the checks, the ledger, and the order of committing and sending.

What it returns may be sent: it is in the store. A process that is killed before it sends is asked again, and finds the
same bytes.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from aggregator.helper.answer_chain import AnswerRecord
from aggregator.helper.answering import (
    IgnoredError,
    PastAnswer,
    Question,
    Study,
    given_before,
    read_question,
    refusal_of,
    signed_sum,
)
from aggregator.helper.cosigner import Cosigner
from aggregator.helper.cosigning import named_cosign_request
from aggregator.helper.helper_store import HelperStore, Refused
from aggregator.helper.key_ring import Helper, KeyRing
from aggregator.helper.known_devices import KnownDevices
from aggregator.helper.revocations import Revocations, named_revocations
from fl_protocol.adapters.journal import Journal
from fl_protocol.integer_noise import Entropy
from fl_protocol.secagg.errors import UnmaskRefusedError
from fl_protocol.signing import sign


@dataclass(frozen=True)
class Reply:
    """What may be sent to who asked.

    Args:
        is_answer: a signed `MaskSumMsg`, `CosignatureMsg` or `RevocationsKeptMsg`; otherwise a signed refusal.
        data: its bytes.
    """

    is_answer: bool
    data: bytes


class Answerer:
    """See the module docstring. Safe to call from several threads.

    Args:
        helper: who answers.
        studies: that it helps.
        minimum_cohort: fewest updates it ever adds up.
        keys: its private keys.
        store: where answers are made durable.
        journal: where events are told.
        entropy: cryptographic source, for noise.
        now_s: Unix seconds.
    """

    def __init__(
        self,
        helper: Helper,
        *,
        studies: Mapping[str, Study],
        minimum_cohort: int,
        keys: KeyRing,
        store: HelperStore,
        journal: Journal,
        entropy: Entropy,
        now_s: Callable[[], float],
    ) -> None:
        self._helper, self._studies, self._minimum_cohort = helper, studies, minimum_cohort
        self._keys, self._store, self._journal = keys, store, journal
        self._entropy, self._now_s = entropy, now_s
        self._known = {tenant: KnownDevices(study) for tenant, study in studies.items()}
        self._cosigner = Cosigner(helper, logs=store.logs, journal=journal, now_s=now_s)
        self._revocations = Revocations(helper, kept=store.revoked, journal=journal, now_s=now_s)
        self._one_at_a_time = threading.Lock()

    def answer(self, tenant: str, data: bytes) -> Reply:
        """A request's answer, or why there is none.

        Args:
            tenant: study that the request came for.
            data: the signed request, untrusted.

        Raises:
            IgnoredError: it deserves none.
            DatabaseError: the store fails; nothing may be said, and whoever asks again may be luckier.
        """
        study = self._studies.get(tenant)
        if study is None:
            raise IgnoredError(f"the request is for {tenant}, a study that is not configured")
        with self._one_at_a_time:
            if named_cosign_request(data) is not None:
                return Reply(*self._cosigner.answer(study, data))
            if named_revocations(data) is not None:
                return Reply(True, self._revocations.answer(study, data))
            try:
                return Reply(True, self._answer(study, data))
            except UnmaskRefusedError as error:
                return self._refusal(tenant, data, error)

    def _answer(self, study: Study, data: bytes) -> bytes:
        """The signed answer. Raises UnmaskRefusedError."""
        question = read_question(data, study, helper=self._helper.name, identity=self._helper.identity.public_key())
        given = given_before(question, self._past(question))
        if given is None:
            return self._answer_first(question)
        self._note("unmask_repeated", question)
        return given

    def _answer_first(self, question: Question) -> bytes:
        """The answer to a round that had none."""
        self._revocations.check(question.terms.tenant, question.devices)
        answer = signed_sum(
            question,
            self._keys.find(question.recipient),
            helper=self._helper.name,
            identity=self._helper.identity,
            device_keys=self._device_keys(question),
            minimum_cohort=self._minimum_cohort,
            entropy=self._entropy,
        )
        record = AnswerRecord(
            tenant=question.terms.tenant,
            task=question.terms.task,
            round=question.terms.number,
            manifest_digest=question.terms.manifest_digest,
            included_digest=question.included_digest,
            count=len(question.entries),
            answered_s=self._now_s(),
            answer_digest=hashlib.sha256(answer).digest(),
        )
        # Security: durable before anybody can see it.
        chain = self._store.answers.add(record, answer, self._helper.identity)
        self._note("unmask_answered", question, manifest=record.manifest_digest.hex(), chain=chain.hex())
        return answer

    def _device_keys(self, question: Question) -> dict[str, Ed25519PublicKey]:
        """Of all devices of a list. Raises UnmaskRefusedError: one of them is not known."""
        tenant = question.terms.tenant
        listed = self._store.devices.find(tenant, question.devices) if self._studies[tenant].allow_listed else {}
        return self._known[tenant].keys(question, listed=listed, now_s=self._now_s())

    def _past(self, question: Question) -> PastAnswer | None:
        """The round's answer, if it has one."""
        return self._store.answers.find(question.terms.tenant, question.terms.task, question.terms.number)

    def _refusal(self, tenant: str, data: bytes, error: UnmaskRefusedError) -> Reply:
        """A refusal, noted and signed. Raises IgnoredError: the request names no round."""
        message = refusal_of(data, error, helper=self._helper.name)
        task, number = (message.task, message.round) if message is not None else ("", 0)
        told = {"tenant": tenant, "task": task, "round": number, "reason": error.reason.value, "detail": error.detail}
        self._journal.write("unmask_refused", at_s=self._now_s(), **told)
        self._store.refusals.add(Refused(self._now_s(), tenant, task, number, error.reason.value, error.detail))
        if message is None:
            raise IgnoredError("the request names no round that a refusal could be about")
        return Reply(False, sign(message, self._helper.identity))

    def _note(self, event: str, question: Question, **fields: object) -> None:
        """Write to the journal."""
        terms = question.terms
        named = {"tenant": terms.tenant, "task": terms.task, "round": terms.number, "updates": len(question.entries)}
        listed = question.included_digest.hex()
        self._journal.write(event, at_s=self._now_s(), **named, included=listed, **fields)
