"""What must hold of a secure study whatever happened: each sum is that of what was counted, each helper told one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fl_protocol.chunking import Reassembler
from fl_protocol.errors import ProtocolError
from fl_protocol.log_messages import CosignatureMsg
from fl_protocol.messages import ChunkMsg, decode
from fl_protocol.secagg import parties
from fl_protocol.secagg.messages import MaskSumMsg
from fl_protocol.secagg.parties import SecureRound, included_digest
from fl_protocol.signing import verify
from fl_protocol.topics import parse_helper_topic
from tests.system.study import check_counted_once, rows_of
from tests.virtual_fleet import VirtualFleet, helper_identity

Sent = dict[bytes, tuple[NDArray[np.int64], float]]
"""What is in each update, int64 [d] in grid steps, noise included, and the step; by update id."""


def listen_to_integers(monkeypatch: pytest.MonkeyPatch) -> Sent:
    """Everything that devices mask from now on, as it was before."""
    sent: Sent = {}
    really = parties.protect

    def protect(terms: SecureRound, integers: NDArray[np.int64], **how: Any) -> Any:
        sent[how["sender"].update_id] = integers.copy(), terms.fixed_point.step
        return really(terms, integers, **how)

    monkeypatch.setattr(parties, "protect", protect)
    return sent


def check_sums(fleet: VirtualFleet, sent: Sent) -> int:
    """Each model moved by the plain mean of what its round counted, to far less than a grid step; how many rounds.

    The task's server optimiser has to be fedavg with a learning rate of 1.
    """
    check_counted_once(fleet)
    models = fleet.store.models
    made = {one.round: one for one in models.records(fleet.task.name) if one.origin == "round"}
    for number, record in made.items():
        ids = [row.update_id for row in rows_of(fleet) if row.counted_in == number]
        assert record.parent is not None
        before = models.params(models.record(fleet.task.name, record.parent))
        total = np.sum([sent[one][0] for one in ids], axis=0, dtype=np.int64)
        mean = total * (sent[ids[0]][1] / len(ids))
        # Half of what one grid step in one update is worth.
        assert np.abs(models.params(record) - before - mean).max() < sent[ids[0]][1] / len(ids) / 2
    return len(made)


def check_one_list_per_round(fleet: VirtualFleet) -> None:
    """On the wire no helper ever answered a round twice otherwise, and for committed rounds it was what is counted."""
    told: dict[tuple[str, int], set[bytes]] = {}
    for helper, answer in answers_on_the_wire(fleet):
        told.setdefault((helper, answer.round), set()).add(answer.included_digest + answer.total)
    assert all(len(different) == 1 for different in told.values())
    for record in fleet.store.rounds.history(fleet.task.name):
        if record.outcome == "committed":
            counted = included_digest(row.update_id for row in rows_of(fleet) if row.counted_in == record.number)
            for helper in fleet.helper_names:
                (one,) = told[helper, record.number]
                assert one[:32] == counted


def answers_on_the_wire(fleet: VirtualFleet) -> Iterable[tuple[str, MaskSumMsg]]:
    """Every sum of masks that helpers ever sent as an answer, with the helper's name; co-signatures go there too."""
    parts = Reassembler()
    for topic, payload in fleet.broker.published:
        if "/answer/" not in topic:
            continue
        helper = parse_helper_topic(topic).helper
        whole = parts.accept(decode(payload, ChunkMsg), fleet.clock.time_s)
        if whole is not None and not is_cosignature(whole, helper):
            yield helper, verify(whole, MaskSumMsg, helper_identity(helper).public_key())


def is_cosignature(whole: bytes, helper: str) -> bool:
    """Whether a helper's answer is about the audit log."""
    try:
        verify(whole, CosignatureMsg, helper_identity(helper).public_key())
    except ProtocolError:
        return False
    return True
