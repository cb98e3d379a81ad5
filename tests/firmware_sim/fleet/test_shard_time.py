"""A shard's time: the same to the last bit whatever its devices did last."""

from __future__ import annotations

import math

from hypothesis import example, given
from hypothesis import strategies as st

from firmware_sim.fleet.shard import ShardTime

SECONDS = st.floats(0.0, 1e7)


@given(SECONDS, SECONDS)
@example(0.05, 1000.1)
def test_it_is_the_time_that_it_was_told_whatever_happened_last(last_s: float, time_s: float) -> None:
    time = ShardTime()
    done: list[float] = []
    time.timeout(min(last_s, time_s)).callbacks.append(lambda _event: done.append(time.now))
    time.timeout(time_s).callbacks.append(lambda _event: done.append(-1.0))
    time.pass_until(time_s)
    assert time.now == time_s
    assert done == ([last_s] if last_s < time_s else [])  # what is due then is still to be done
    assert time.peek() == time_s


def test_a_sum_of_differences_would_be_another_time() -> None:
    last_s, time_s = math.ldexp(1, -44), 1000 + math.ldexp(1, -43)  # half a bit of a time whose last bit is set
    rounded_s = last_s + (time_s - last_s)
    assert rounded_s != time_s
    time = ShardTime()
    time.timeout(last_s)
    time.step()
    time.pass_until(time_s)
    assert time.now == time_s
