"""What three simulated runs might have measured: inputs of reports and comparisons, made up but plausible."""

from __future__ import annotations

import math

from firmware_sim.fleet_metrics import Crash, Epsilons, FaultSpan, FleetHour, FleetMetrics, FleetRound, ProfileUse

BEGAN_S = 1_767_571_200.0
"""2026-01-05, a Monday, 00:00 UTC."""

EMPTY = FleetMetrics(
    covey="7.6.54",
    scenario="nobody",
    text="",
    seed=0,
    fidelity="noop",
    devices=0,
    days=1.0,
    began_s=BEGAN_S,
    virtual_s=0.0,
    rounds=(),
    hours=(),
    profiles=(),
    blocked={},
    refused={},
    declined={},
    deliveries={},
    faults=(),
    crashes=(),
    epsilons=None,
    wall_s=0.0,
    peak_rss_bytes=0,
)
"""A run that was stopped before anything happened."""

SMALL = FleetMetrics(
    covey="7.6.54",
    scenario="first-round",
    text='name = "first-round"\nseed = 4\n\n[fleet]\ndevices = 20\n\n[[faults]]\nkind = "none"\n',
    seed=4,
    fidelity="real",
    devices=20,
    days=0.25,
    began_s=BEGAN_S,
    virtual_s=21_600.0,
    rounds=tuple(
        FleetRound(
            task="exercises",
            round=number,
            outcome="committed",
            reason="",
            opened_s=3600.0 * (number - 1) + 60,
            closed_s=3600.0 * number,
            arrived=10 + number,
            goal=12,
            bytes_up=38_000 * (10 + number),
            accuracy=0.3 + 0.08 * number,
            loss=2.0 / number,
        )
        for number in range(1, 6)
    ),
    hours=tuple(FleetHour(hour=hour, awake=20, eligible=15 + hour % 3, began=13, delivered=12) for hour in range(6)),
    profiles=(
        ProfileUse(
            profile="raspberry-pi-zero-2w",
            devices=20,
            updates=65,
            battery_percent_median=None,
            energy_compute_mwh=3.25,
            energy_radio_mwh=0.5,
            energy_base_mwh=12.0,
            energy_p95_mwh=18.5,
            bytes_up=123_456.0,
            bytes_down=98_765.0,
            bytes_metered=0.0,
        ),
    ),
    blocked={},
    refused={},
    declined={},
    deliveries={"delivered": 65},
    faults=(),
    crashes=(),
    epsilons=Epsilons(budget=3.0, delta=1e-5, edges=(0.0, 0.5, 1.0, 1.5), counts=(2, 13, 5)),
    wall_s=40.0,
    peak_rss_bytes=612_000_000,
)
"""Twenty devices, a few hours, every update trained."""


def _awake(hour: int) -> int:
    """Of 100,000: fewer by night, a herd at eight in the evening."""
    return int(62_000 + 24_000 * math.sin((hour % 24 - 9) * math.pi / 12) + (9000 if hour % 24 == 20 else 0))


def _eligible(hour: int) -> int:
    """Those that charge, mostly by night."""
    return int(14_000 + 11_000 * math.cos((hour % 24 - 3) * math.pi / 12))


def _week_round(number: int) -> FleetRound:
    """A round of four hours; three of them fall into an outage, one has too few."""
    aborted = number in {14, 15, 16, 29}
    arrived = 180 + 37 * number % 400 if aborted else 1000 + 53 * number % 90
    return FleetRound(
        task="exercises",
        round=number,
        outcome="aborted" if aborted else "committed",
        reason=f"{arrived} of at least 800" if aborted else "",
        opened_s=14_400.0 * (number - 1) + 30,
        closed_s=14_400.0 * number - (0 if aborted else 900),
        arrived=arrived,
        goal=1000,
        bytes_up=arrived * 37_500,
        accuracy=None if aborted else 0.93 - 0.7 * math.exp(-number / 11),
    )


def _use(profile: str, devices: int, percent: float, scale: float, metered: float) -> ProfileUse:
    """A profile's use."""
    return ProfileUse(
        profile=profile,
        devices=devices,
        updates=int(0.42 * devices),
        battery_percent_median=percent,
        energy_compute_mwh=4.1 * scale,
        energy_radio_mwh=2.2 * scale,
        energy_base_mwh=1.4 * scale,
        energy_p95_mwh=15.9 * scale,
        bytes_up=131_000.0,
        bytes_down=890_000.0 + 1000 * scale,
        bytes_metered=metered,
    )


WEEK = FleetMetrics(
    covey="7.6.54",
    scenario="mass-rollout",
    text='name = "mass-rollout"\nseed = 11\ndays = 7.0\n\n[fleet]\ndevices = 100000\ndropout = 0.3\n\n'
    '[[faults]]\nkind = "broker-restart"\nat_h = 53.5\n',
    seed=11,
    fidelity="surrogate",
    devices=100_000,
    days=7.0,
    began_s=BEGAN_S,
    virtual_s=604_800.0,
    rounds=tuple(_week_round(number) for number in range(1, 43)),
    hours=tuple(
        FleetHour(
            hour=hour,
            awake=_awake(hour),
            eligible=_eligible(hour),
            began=_eligible(hour) // 60,
            delivered=0 if 53 <= hour < 62 else _eligible(hour) // 66,
        )
        for hour in range(168)
    ),
    profiles=(
        _use("smartwatch", 38_000, 1.31, 0.6, 0.0),
        _use("phone-mid-range", 41_000, 0.21, 3.1, 310_000.0),
        _use("phone-fast", 17_000, 0.12, 2.4, 290_000.0),
        _use("esp32-gateway", 4_000, 0.74, 0.3, 0.0),
    ),
    blocked={
        "battery": 812_345,
        "charging": 2_401_876,
        "network": 503_112,
        "temperature": 1204,
        "use": 90_877,
        "storage": 3,
    },
    refused={"round_closed": 1840, "bad_signature": 73, "not_a_member": 12},
    declined={"coin": 53_210, "budget": 1202, "floors": 88},
    deliveries={"delivered": 42_113, "expired": 961, "refused": 1925, "pending": 14},
    faults=(
        FaultSpan(kind="broker-restart", starts_s=192_600.0, ends_s=192_630.0, target="broker"),
        FaultSpan(kind="partition", starts_s=192_630.0, ends_s=223_200.0, target="broker", detail="no route"),
        FaultSpan(kind="sign-flip", starts_s=0.0, ends_s=604_800.0, target="fleet", detail="2 % of the devices"),
        *(
            FaultSpan(kind="crash", starts_s=9000.0 * k, ends_s=9000.0 * k + 60, target=f"device-{k:06}")
            for k in range(64)
        ),
    ),
    crashes=(
        Crash(
            device="device-004711",
            time_s=291_845.25,
            error="ValueError: expected 32 bytes, got 31",
            trace="Traceback (most recent call last):\n  File ...\nValueError: expected 32 bytes, got 31",
        ),
    ),
    epsilons=Epsilons(
        budget=3.0,
        delta=1e-6,
        edges=tuple(0.1 * k for k in range(31)),
        counts=tuple(int(9000 * math.exp(-(((k - 11) / 6) ** 2))) for k in range(30)),
    ),
    wall_s=512.0,
    peak_rss_bytes=4_900_000_000,
)
"""A hundred thousand devices for a week, with an outage, attackers and a crash."""
