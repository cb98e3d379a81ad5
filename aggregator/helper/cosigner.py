"""Answers requests to co-sign checkpoints of audit logs: what it co-signs is in its store before anybody can see it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from aggregator.audit.checkpoints import Note, cosign, cosigner_name, with_cosignatures
from aggregator.helper.answering import Study
from aggregator.helper.cosigned_logs import CosignedLogs
from aggregator.helper.cosigning import CosignRefusedError, LastCosigned, checked_note, read_cosign_request
from aggregator.helper.key_ring import Helper
from fl_protocol.adapters.journal import Journal
from fl_protocol.log_messages import CosignatureMsg, CosignRefusal, CosignRefusalMsg, CosignRequestMsg
from fl_protocol.signing import sign


class Cosigner:
    """Answers requests to co-sign; one at a time, which whoever calls sees to.

    Args:
        helper: who co-signs.
        logs: where it is made durable.
        journal: where events are told.
        now_s: Unix seconds.
    """

    def __init__(self, helper: Helper, *, logs: CosignedLogs, journal: Journal, now_s: Callable[[], float]) -> None:
        self._helper, self._logs, self._journal, self._now_s = helper, logs, journal, now_s

    def answer(self, study: Study, data: bytes) -> tuple[bool, bytes]:
        """A request's answer: whether it is a co-signature, and a signed `CosignatureMsg` or `CosignRefusalMsg`.

        Args:
            study: the one that it came for.
            data: untrusted.

        Raises:
            IgnoredError: it deserves none.
            DatabaseError: the store fails; nothing may be said.
        """
        request = read_cosign_request(data, study, helper=self._helper.name)
        last = self._logs.last(study.tenant)
        try:
            note = checked_note(request, study, last)
        except CosignRefusedError as error:
            return False, self._refusal(request, data, last, error)
        return True, self._cosigned(study.tenant, note, last)

    def _cosigned(self, tenant: str, note: Note, last: LastCosigned) -> bytes:
        """Co-sign; durable before anybody can see it."""
        helper, now_s, tree = self._helper, self._now_s(), note.checkpoint
        one = cosign(tree, cosigner_name(helper.operator, helper.name), helper.identity, at_s=now_s)
        self._logs.advance(tenant, with_cosignatures(note, [one]), before=last, now_s=now_s)
        if tree.size != last.size:
            self._note("checkpoint_cosigned", tenant=tenant, size=tree.size, root=tree.root.hex())
        answer = CosignatureMsg(
            tenant=tenant, helper=helper.name, size=tree.size, root=tree.root, cosignature=one.signature
        )
        return sign(answer, helper.identity)

    def _refusal(self, request: CosignRequestMsg, data: bytes, last: LastCosigned, error: CosignRefusedError) -> bytes:
        """Say why not. A proof from another size is an honest question, and nothing to tell the operator of."""
        if error.reason is not CosignRefusal.OTHER_START:
            told = {"reason": error.reason.value, "detail": error.detail, "note": request.note.decode(errors="replace")}
            self._note("checkpoint_refused", tenant=request.tenant, last_size=last.size, **told)
        refusal = CosignRefusalMsg(
            tenant=request.tenant,
            helper=self._helper.name,
            request_digest=hashlib.sha256(data).digest(),
            last_size=last.size,
            reason=error.reason,
            detail=error.detail[:400],
        )
        return sign(refusal, self._helper.identity)

    def _note(self, event: str, **fields: object) -> None:
        """Write to the journal."""
        self._journal.write(event, at_s=self._now_s(), **fields)
