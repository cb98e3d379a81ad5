"""Acknowledgements leave in the order of arrival, each once, none for another message."""

from __future__ import annotations

from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fl_protocol import acknowledgement_order
from tests.enrolments import broken_copy


def check_the_order(module: ModuleType, order: list[int], again: list[int]) -> None:
    """Messages 1 to 8 came, and are done with in this order; some are said to be so again."""
    acknowledgements, sent = module.AcknowledgementOrder(), list[int]()
    came = {packet_id: acknowledgements.arrived(packet_id) for packet_id in range(1, 9)}
    for done, packet_id in enumerate(order):
        acknowledgements.settle(came[packet_id])
        for index in again:
            if index <= done:
                acknowledgements.settle(came[order[index]])
        sent += acknowledgements.take_due()
        until = next((one for one in range(1, 9) if one not in order[: done + 1]), 9)
        assert sent == list(range(1, until))
    assert len(acknowledgements) == 0


@given(order=st.permutations(range(1, 9)), again=st.lists(st.integers(0, 7), max_size=4))
def test_whatever_is_done_first_acknowledgements_leave_in_the_order_of_arrival(
    order: list[int], again: list[int]
) -> None:
    check_the_order(acknowledgement_order, order, again)


def test_acknowledgements_in_the_order_of_commits_are_caught() -> None:
    hasty = broken_copy(
        "fl_protocol.acknowledgement_order",
        (
            "while self._waiting and (first := next(iter(self._waiting))) in self._settled:",
            "for first in list(self._settled):",
        ),
    )
    with pytest.raises(AssertionError):
        check_the_order(hasty, [2, 1, 3, 4, 5, 6, 7, 8], [])


def test_of_an_id_that_was_not_free_the_older_message_is_never_acknowledged() -> None:
    acknowledgements = acknowledgement_order.AcknowledgementOrder()
    older, other, newer = (acknowledgements.arrived(packet_id) for packet_id in (1, 2, 1))
    assert not acknowledgements.settle(older)
    assert acknowledgements.settle(other)
    assert acknowledgements.take_due() == [2]
    acknowledgements.settle(newer)
    assert acknowledgements.take_due() == [1]
