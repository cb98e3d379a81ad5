"""The helper's daemon on a broker that does as it likes: answers once, the same bytes again, and whatever comes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fl_protocol.secagg.messages import MaskSumMsg
from fl_protocol.secagg.packing import unpack
from fl_protocol.secagg.terms import secure_round
from tests.aggregator.helper.helper_desk import DEVICES, LENGTH, Desk, bodies_of, request_for, rounds_reply


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def test_what_comes_back_are_the_masks_of_the_list_and_of_nobody_else(desk: Desk) -> None:
    manifest = desk.manifest()
    terms = secure_round(manifest)
    answer = rounds_reply(desk.ask(request_for(manifest, DEVICES[:4])))
    assert isinstance(answer, MaskSumMsg)
    total = unpack(answer.total, LENGTH, terms.fixed_point.bits)
    assert total.any()
    assert answer.count == 4
    assert (answer.tenant, answer.task, answer.round) == (terms.tenant, terms.task, terms.number)
    assert answer.manifest_digest == terms.manifest_digest
    assert np.unique(total).size > LENGTH // 2
    assert bodies_of(terms, DEVICES[:1])
