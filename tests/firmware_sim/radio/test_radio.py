"""A radio: which link there is, and when what is sent arrives."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from firmware_sim.radio.links import IDEAL, DutyCycle, Interval, LinkModel
from fl_protocol.errors import LocalMisuseError
from tests.enrolments import broken_copy
from tests.firmware_sim.radio.links import CELLULAR, WIFI, radio


def test_transfers_queue_behind_each_other() -> None:
    device = radio({"home": WIFI})
    first, second = device.send(1000, 0.0), device.send(500, 0.0)
    assert (first.arrives_s, first.free_s, first.joules) == (1.05, 1.0, 1.0)
    assert (second.arrives_s, second.free_s) == (1.55, 1.5)
    down = device.send(1000, 10.0, up=False)
    assert (down.arrives_s, down.joules) == (10.55, 2.0)


def test_without_a_link_nothing_is_sent_and_nothing_spent() -> None:
    transfer = radio({"home": None}).send(1000, 5.0)
    assert transfer == (None, 5.0, 0.0, None)


def test_what_is_under_way_when_the_link_goes_down_is_lost_and_cost_what_had_left() -> None:
    device = radio({"home": WIFI}, [(0.0, "home"), (0.5, "train")])
    lost = device.send(1000, 0.0)
    assert lost.arrives_s is None
    assert lost.free_s == 0.5
    assert lost.joules == pytest.approx(0.5)


def test_a_transfer_that_has_left_but_not_arrived_is_lost_too() -> None:
    assert radio({"home": WIFI}, [(0.0, "home"), (1.02, "train")]).send(1000, 0.0).arrives_s is None
    assert radio({"home": WIFI}, [(0.0, "home"), (1.06, "train")]).send(1000, 0.0).arrives_s == 1.05


def test_the_link_follows_places_outages_and_duty_cycles() -> None:
    tether = replace(WIFI, kind="ble_tether", duty=DutyCycle(period_s=100, on_s=60))
    device = radio(
        {"home": WIFI, "town": tether},
        [(0.0, "home"), (1_000.0, "town"), (2_000.0, "sea")],
        outages=[Interval(300, 400), Interval(350, 500)],
    )
    assert device.link_at(299.0) == WIFI
    assert device.link_at(300.0) is None
    assert device.next_change_s(0.0) == 300.0
    assert device.next_change_s(300.0) == 500.0
    near = sum(device.link_at(1_000 + second + 0.5) is not None for second in range(1000))
    assert near == 600
    assert device.next_change_s(2_000.0) == math.inf


@given(
    period=st.floats(1, 1e5), share=st.floats(0.01, 1), seed=st.integers(0, 1000), start=st.floats(0, 2e9),
    outages=st.lists(st.tuples(st.floats(0, 5e5), st.floats(1, 1e5)), max_size=3),
)  # fmt: skip
def test_the_next_change_is_never_late(
    period: float, share: float, seed: int, start: float, outages: list[tuple[float, float]]
) -> None:
    device = radio(
        {"home": WIFI},
        duty_cycle=DutyCycle(period_s=period, on_s=period * share),
        outages=[Interval(start + at, start + at + length) for at, length in outages],
        seed=seed,
    )
    now_s = start
    for _ in range(20):
        then_s = device.next_change_s(now_s)
        assert then_s > now_s
        until_s = min(then_s, now_s + 3 * period)
        link = device.link_at(now_s)
        for part in range(1, 8):
            at_s = now_s + (until_s - now_s) * part / 8
            assert at_s >= then_s or device.link_at(at_s) == link
        if then_s == math.inf:
            break
        now_s = then_s


def test_devices_wake_at_moments_of_their_own() -> None:
    cycle = DutyCycle(period_s=100, on_s=1)
    wakes = {radio({"home": WIFI}, duty_cycle=cycle, device=f"watch-{n}").next_change_s(0.0) for n in range(20)}
    assert len(wakes) == 20


def test_the_tail_is_paid_once_by_transfers_that_share_it() -> None:
    apart, together = radio({"home": CELLULAR}), radio({"home": CELLULAR})
    assert apart.send(500, 0.0).joules + apart.send(500, 100.0).joules == 20
    assert together.send(500, 0.0).joules + together.send(500, 3.0).joules == pytest.approx(10 + 10 * 2 / 10)


def test_loss_costs_round_trips_and_energy_and_loses_nothing() -> None:
    lossy = replace(WIFI, loss=0.5)
    device = radio({"home": lossy})
    sent = [device.send(100, 100.0 * number) for number in range(2000)]
    late = [one.free_s - 100.0 * number - 0.1 for number, one in enumerate(sent)]
    once_more = [wait for wait in late if wait > 0.15]
    assert all(one.arrives_s is not None for one in sent)
    # Binomial(2000, 1/2): more than 135 away has a probability of 1.6e-9.
    assert 865 < len(once_more) < 1135
    assert min(once_more) == pytest.approx(0.1 + 0.1, abs=1e-6)  # a round trip, and the bytes again
    again = max(sent, key=lambda one: one.joules)
    assert again.joules >= 0.3


def test_jitter_reorders_nothing() -> None:
    device = radio({"home": replace(IDEAL, jitter_s=5.0)})
    arrivals = [device.send(100, float(number)).arrives_s for number in range(200)]
    assert all(a is not None and b is not None and a <= b for a, b in pairwise(arrivals))
    assert any(a == b for a, b in pairwise(arrivals))


def test_chance_follows_the_message_and_not_who_else_draws() -> None:
    link = replace(WIFI, loss=0.3, jitter_s=1.0)
    alone, slept = radio({"home": link}), radio({"home": link})
    for number in range(5):
        alone.send(10, 10.0 * number)
    for number in range(5):
        slept.send(10, 10.0 * number)
        state = slept.state()
        slept = radio({"home": link})
        slept.restore(state)
    assert len(slept.state()) <= 100
    assert slept.send(10, 60.0) == alone.send(10, 60.0)
    assert alone.send(10, 90.0) != radio({"home": link}, device="watch-2").send(10, 90.0)


def test_a_radio_that_forgets_that_links_go_down_is_caught() -> None:
    copy = broken_copy("firmware_sim.radio.radio", ("if arrives_s > down_s:", "if False:"))
    broken = copy.Radio(
        {"home": WIFI}, place=lambda _: "home", next_place_change_s=lambda t: 0.5 if t < 0.5 else math.inf,
        outages=[Interval(0.5, 9.0)], seed=7, device="watch-1",
    )  # fmt: skip
    assert broken.send(1000, 0.0).arrives_s is not None


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"up_bytes_per_s": 0.0}, "up_bytes_per_s: expected above 0, got 0.0"),
        ({"loss": 1.0}, "loss: expected below 1, got 1.0"),
        ({"latency_s": -1.0}, "latency_s: expected a number of at least 0, got -1.0"),
        ({"jitter_s": math.nan}, "jitter_s"),
    ],
)
def test_an_impossible_link_is_refused(wrong: dict[str, float], told: str) -> None:
    with pytest.raises(LocalMisuseError, match=told):
        LinkModel(**{"kind": "wifi", "up_bytes_per_s": 1.0, "down_bytes_per_s": 1.0, **wrong})  # type: ignore[arg-type]


def test_an_impossible_duty_cycle_or_interval_is_refused() -> None:
    with pytest.raises(LocalMisuseError, match="on_s: expected above 0, at most period_s"):
        DutyCycle(period_s=10, on_s=11)
    with pytest.raises(LocalMisuseError, match="ends_s: expected later"):
        Interval(5, 5)
