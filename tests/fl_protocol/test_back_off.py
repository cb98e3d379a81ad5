"""How long to wait before connecting again."""

from __future__ import annotations

from fl_protocol.back_off import BackOff


def test_a_connection_that_dies_young_counts_as_a_failure() -> None:
    back_off, now_s, waits = BackOff(60), 0.0, []
    for lived_s in (None, 0.1, 59.0, 0.1, 0.1, 0.1, 0.1, 0.1, 60.0, 0.1):
        if lived_s is not None:
            back_off.connected(now_s)
            now_s += lived_s
        waits.append(back_off.ended(now_s))
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 1, 2]
