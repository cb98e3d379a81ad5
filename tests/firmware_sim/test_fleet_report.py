"""A simulation's report: it answers in the run's own numbers, tells what was not trained, and reads well when empty."""

from __future__ import annotations

import functools
import html
import re
from collections.abc import Callable
from types import ModuleType

import pytest
from msgspec.structs import replace

from firmware_sim import fleet_report
from firmware_sim.errors import FleetError
from firmware_sim.fleet_lead import lead_sentences
from firmware_sim.fleet_metrics import (
    Crash,
    Epsilons,
    FaultSpan,
    Fidelity,
    FleetHour,
    FleetMetrics,
    FleetRound,
)
from firmware_sim.fleet_plots import (
    accuracy_svg,
    bytes_svg,
    counts_svg,
    energy_svg,
    epsilon_svg,
    faults_svg,
    hour_of_day_svg,
    participation_svg,
    rounds_svg,
)
from firmware_sim.fleet_report import fleet_report_html
from tests.enrolments import broken_copy
from tests.firmware_sim.fleet_runs import EMPTY, SMALL, WEEK
from tests.firmware_sim.pages import HOSTILE, check_loads_nothing, check_nothing_becomes_markup, words_of


@functools.cache
def page_of_the_week() -> str:
    return fleet_report_html(WEEK)


@functools.cache
def page_of_a_few_hours() -> str:
    return fleet_report_html(SMALL)


def test_the_lead_answers_what_an_operator_asks() -> None:
    text = words_of(page_of_the_week())
    for answer in (
        "No model was trained: accuracy comes from a calibrated curve. 100,000 devices were simulated for 7 days.",
        "the study took 7 days: 38 of 42 rounds were committed.",
        "Accuracy was 91.5 % after 7 days.",
        "42,113 updates came; others: 961 expired, 14 pending, 1,925 refused.",
        "A day cost the median wearer between 0.12 % (phone-fast) and 1.31 % (smartwatch) of the battery.",
        "The worst 5 % of phone-mid-range devices used more than 49.3 mWh a day.",
        "Devices sent and received 1.02 MB a day on average.",
        "What went wrong: 4 rounds came to nothing, 1,925 updates refused (most as round_closed), 1 daemon crashed; 67 "
        "faults were injected.",
    ):
        assert answer in text, answer


def test_a_small_run_is_told_in_hours() -> None:
    text = words_of(page_of_a_few_hours())
    for answer in (
        "Every update was trained: LiteRT ran every step. 20 devices were simulated for 6 hours.",
        "5 rounds were committed. Accuracy was 70.0 % after 5 hours. 65 updates came.",
        "Nothing went wrong.",
        "virtual hours",
        "none of them more than 1.5",
        "No fault was injected, and nobody attacked.",
        "No rule kept a device from training, no device left out a round, and no update was refused.",
        "No daemon raised what it should not have.",
    ):
        assert answer in text, answer
    assert "of the battery" not in text.split("Participation", maxsplit=1)[0]  # all of them are on the mains


def check_fidelity_is_told(page: str, fidelity: Fidelity) -> None:
    """In the lead, and below what is drawn of accuracy."""
    text = words_of(page)
    told = "No model was trained" in text.split("Participation", maxsplit=1)[0]
    assert told == (fidelity != "real")
    assert ("Every update was trained" in text) == (fidelity == "real")
    caption = text[text.index("Accuracy against virtual time.") :]
    assert caption[:90].count("No model was trained") == int(told)


@pytest.mark.parametrize("fidelity", ["real", "recorded", "surrogate", "noop"])
def test_the_fidelity_is_always_told(fidelity: Fidelity) -> None:
    rounds_alone = replace(SMALL, fidelity=fidelity, hours=(), profiles=(), epsilons=None)
    check_fidelity_is_told(fleet_report_html(rounds_alone), fidelity)


def test_a_report_that_calls_every_run_trained_is_caught() -> None:
    broken = broken_copy("firmware_sim.fleet_lead", ("FIDELITY[metrics.fidelity]", 'FIDELITY["real"]'))
    lead = " ".join(broken.lead_sentences(replace(SMALL, fidelity="surrogate")))
    with pytest.raises(AssertionError):
        check_fidelity_is_told(lead + " Participation Accuracy against virtual time.", "surrogate")


def with_round(**changes: object) -> FleetMetrics:
    return replace(SMALL, rounds=(*SMALL.rounds[:-1], replace(SMALL.rounds[-1], **changes)))


def with_hour(**changes: object) -> FleetMetrics:
    return replace(SMALL, hours=(*SMALL.hours[:-1], replace(SMALL.hours[-1], **changes)))


def with_use(**changes: object) -> FleetMetrics:
    return replace(SMALL, profiles=(replace(SMALL.profiles[0], **changes),))


def with_epsilons(**changes: object) -> FleetMetrics:
    return replace(SMALL, epsilons=replace(SMALL.epsilons, **changes))


HANG = FaultSpan(kind="hang", starts_s=4000.0, ends_s=9000.0, target="device-1")


def energy(metrics: FleetMetrics) -> str | None:
    return energy_svg(metrics.profiles)


def traffic(metrics: FleetMetrics) -> str | None:
    return bytes_svg(metrics.profiles)


def spent(metrics: FleetMetrics) -> str | None:
    return epsilon_svg(metrics.epsilons)


@pytest.mark.parametrize(
    ("plot", "changed"),
    [
        (rounds_svg, with_round(arrived=3)),
        (rounds_svg, with_round(goal=3)),
        (rounds_svg, with_round(outcome="aborted")),
        (accuracy_svg, with_round(accuracy=0.9)),
        (accuracy_svg, with_round(closed_s=20_000.0)),
        (participation_svg, with_hour(awake=3)),
        (participation_svg, with_hour(eligible=3)),
        (participation_svg, with_hour(began=3)),
        (participation_svg, with_hour(delivered=3)),
        (energy, with_use(energy_compute_mwh=9.0)),
        (energy, with_use(energy_radio_mwh=9.0)),
        (energy, with_use(energy_base_mwh=9.0)),
        (energy, with_use(energy_p95_mwh=9.0)),
        (traffic, with_use(bytes_up=500_000.0)),
        (traffic, with_use(bytes_down=500_000.0)),
        (traffic, with_use(bytes_metered=50_000.0)),
        (faults_svg, replace(SMALL, faults=(HANG,))),
        (spent, with_epsilons(counts=(2, 14, 5))),
        (spent, with_epsilons(budget=2.0)),
    ],
)
def test_the_plots_are_drawn_from_the_metrics(
    plot: Callable[[FleetMetrics], str | None], changed: FleetMetrics
) -> None:
    """Labels of axes may stay; the drawn lines must not."""
    assert lines_of(plot(SMALL)) != lines_of(plot(changed))


def lines_of(drawn: str | None) -> list[tuple[str, str]]:
    """What a plot shows, its letters aside."""
    return re.findall(r'<path d="([^"]+)"|<use [^>]*(x="[^"]+" y="[^"]+")', drawn or "")


def test_reasons_are_drawn_by_their_counts() -> None:
    drawn = counts_svg({"battery": 4, "network": 1}, "times")
    assert lines_of(drawn) != lines_of(counts_svg({"battery": 4, "network": 2}, "times"))
    assert drawn is not None
    assert drawn.index("network") < drawn.index("battery")  # from below
    alone = replace(EMPTY, virtual_s=60.0, refused={"round_closed": 1234})
    assert "1,234" in words_of(fleet_report_html(alone))


def test_the_same_metrics_give_the_same_text() -> None:
    assert page_of_a_few_hours() == fleet_report_html(replace(SMALL))


def test_an_empty_run_is_told_in_sentences_and_draws_nothing() -> None:
    page = fleet_report_html(EMPTY)
    text = words_of(page)
    assert "<svg" not in page
    for answer in (
        "The run ended before any virtual time had passed.",
        "The run ended before its first hour was counted.",
        "No round was opened.",
        "No device's use was measured.",
        "No device was charged an ε, so no privacy is claimed.",
    ):
        assert answer in text, answer
    assert not re.search(r"\bnan\b|\binf\b|None", text)


BARE = replace(EMPTY, devices=20, virtual_s=86_400.0)
"""A day of which nothing was measured."""
NOTHING_USED = replace(
    SMALL.profiles[0], energy_compute_mwh=0.0, energy_radio_mwh=0.0, energy_base_mwh=0.0, energy_p95_mwh=0.0,
    bytes_up=0.0, bytes_down=0.0,
)  # fmt: skip


@pytest.mark.parametrize(
    "changed",
    [
        replace(BARE, rounds=SMALL.rounds[:1]),
        replace(BARE, rounds=tuple(replace(record, accuracy=None) for record in SMALL.rounds)),
        replace(BARE, rounds=tuple(replace(record, outcome="aborted", arrived=0) for record in SMALL.rounds)),
        replace(BARE, hours=SMALL.hours[:1], virtual_s=3000.0),
        replace(BARE, hours=SMALL.hours[-1:]),
        replace(BARE, faults=WEEK.faults),
        replace(BARE, profiles=(NOTHING_USED,)),
        replace(BARE, blocked={"battery": 0}),
        replace(BARE, epsilons=Epsilons(budget=None, delta=1e-5, edges=(0.0, 1.0), counts=(0,))),
        replace(BARE, epsilons=Epsilons(budget=None, delta=1e-5, edges=(0.0, 1.0), counts=(7,))),
        replace(BARE, devices=1, deliveries={"delivered": 1}),
    ],
    ids=[
        *("one round", "no accuracy", "all aborted", "one hour", "a late hour", "faults without hours"),
        *("nothing used", "counts of none", "no spending", "no budget", "one of each"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_a_part_that_is_empty_reads_well(changed: FleetMetrics) -> None:
    assert not re.search(r"\bnan\b|\binf\b|None|\b1 \w+s |\b1 \w+ were\b", words_of(fleet_report_html(changed)))


def test_a_run_that_was_stopped_says_so() -> None:
    text = " ".join(lead_sentences(replace(SMALL, virtual_s=7200.0)))
    assert "20 devices were simulated for 2 hours, of 0.25 days planned." in text


def test_a_day_that_was_extrapolated_and_energy_that_was_none_are_told() -> None:
    hours = " ".join(lead_sentences(SMALL))
    assert "used more than 18.5 mWh a day. " in hours
    assert "These costs of a day are extrapolated from 6 hours." in hours
    assert "extrapolated" not in " ".join(lead_sentences(WEEK))
    assert "worst 5 %" not in " ".join(lead_sentences(replace(SMALL, profiles=(NOTHING_USED,))))


def test_hours_that_are_not_told_count_as_none() -> None:
    nobody = {"awake": 0, "eligible": 0, "began": 0, "delivered": 0}
    whole = tuple(replace(hour, **nobody) if hour.hour == 2 else hour for hour in SMALL.hours)
    told = tuple(hour for hour in SMALL.hours if hour.hour != 2)
    lines = [lines_of(participation_svg(replace(SMALL, hours=hours))) for hours in (whole, told, SMALL.hours)]
    assert lines[0] == lines[1]
    assert lines[0] != lines[2]


def test_hours_of_the_day_are_the_worlds_not_the_runs() -> None:
    hours = tuple(FleetHour(hour=hour, awake=hour % 24, eligible=0, began=0, delivered=0) for hour in range(48))
    at_midnight = replace(EMPTY, hours=hours, virtual_s=172_800.0)
    at_six = replace(at_midnight, began_s=at_midnight.began_s + 6 * 3600)
    later = tuple(replace(hour, awake=(hour.awake + 6) % 24) for hour in hours)
    assert lines_of(hour_of_day_svg(at_midnight)) != lines_of(hour_of_day_svg(at_six))
    assert lines_of(hour_of_day_svg(at_midnight)) == lines_of(hour_of_day_svg(replace(at_six, hours=later)))


def test_a_year_is_drawn_by_days_and_stays_small() -> None:
    hours = tuple(FleetHour(hour=hour, awake=9, eligible=5, began=2, delivered=1) for hour in range(24 * 365))
    rounds = tuple(replace(SMALL.rounds[0], round=number, closed_s=3600.0 * number) for number in range(24 * 365))
    year = replace(SMALL, days=365.0, virtual_s=365 * 86_400.0, hours=hours, rounds=rounds)
    drawn = [plot(year) or "" for plot in (participation_svg, rounds_svg)]
    assert all(0 < len(text) < 700_000 for text in drawn), [len(text) for text in drawn]


def check_bound_of_epsilon(module: ModuleType) -> None:
    """What the page says that no device exceeded is no less than what devices may have spent."""
    epsilons = Epsilons(budget=8.0, delta=1e-5, edges=(0.0, 1.5, 2.6434, 4.0), counts=(1, 9, 0))
    told = re.search(
        r"10 devices, none of them more than (\S+)\.", module.fleet_report_html(replace(BARE, epsilons=epsilons))
    )
    assert told is not None
    assert 2.6434 <= float(told[1]) <= 2.645


def test_the_bound_of_epsilon_is_not_rounded_down() -> None:
    check_bound_of_epsilon(fleet_report)
    with pytest.raises(AssertionError):
        check_bound_of_epsilon(
            broken_copy("firmware_sim.fleet_report", ("math.ceil(1000 * most)", "round(1000 * most)"))
        )


def test_bins_of_epsilon_that_do_not_fit_are_told() -> None:
    epsilons = Epsilons(budget=8.0, delta=1e-5, edges=(0.0, 1.5), counts=(1, 9))
    with pytest.raises(FleetError, match="epsilons of 2 bins: expected 3 edges, got 2"):
        fleet_report_html(replace(BARE, epsilons=epsilons))


def test_a_crash_is_told_with_the_command_that_runs_it_again() -> None:
    text = words_of(page_of_the_week())
    assert "device-004711 day 4, 09:04:05 ValueError: expected 32 bytes, got 31" in text
    assert "covey-fleet replay 11 device-004711 --scenario mass-rollout.toml" in text


def test_many_crashes_and_failed_rounds_are_cut_and_counted() -> None:
    crash, record = WEEK.crashes[0], replace(SMALL.rounds[0], outcome="aborted")
    text = words_of(fleet_report_html(replace(BARE, crashes=(crash,) * 73, rounds=(record,) * 54)))
    assert text.count("covey-fleet replay") == 50
    assert "23 more crashes are in fleet.json." in text
    assert "4 more rounds are in fleet.json." in text


def test_faults_of_a_kind_share_a_line_where_they_are_many() -> None:
    text = words_of(page_of_the_week())
    assert "crash 64 of them day 1, 00:00:00 to day 7, 13:30:00 64 minutes in all 64 times" in text
    assert "broker-restart broker day 3, 05:30:00 30 seconds" in text


def hostile_metrics() -> FleetMetrics:
    """Every text of the metrics that could come from elsewhere."""
    return replace(
        SMALL,
        covey=HOSTILE,
        scenario=HOSTILE,
        text=HOSTILE,
        rounds=(
            FleetRound(
                task=HOSTILE, round=1, outcome=HOSTILE, reason=HOSTILE, opened_s=0.0, closed_s=60.0, arrived=1, goal=2,
                bytes_up=3, accuracy=0.5,
            ),
        ),
        profiles=(replace(SMALL.profiles[0], profile=HOSTILE),),
        blocked={HOSTILE: 1},
        refused={HOSTILE: 1},
        declined={HOSTILE: 1},
        deliveries={HOSTILE: 1},
        faults=(FaultSpan(kind=HOSTILE, starts_s=0.0, ends_s=9.0, target=HOSTILE, detail=HOSTILE),),
        crashes=(Crash(device=HOSTILE, time_s=1.0, error=HOSTILE, trace=HOSTILE),),
    )  # fmt: skip


def test_hostile_text_stays_text() -> None:
    page = fleet_report_html(hostile_metrics())
    check_nothing_becomes_markup(page, least=17)
    with pytest.raises(AssertionError):
        check_nothing_becomes_markup(html.unescape(page), least=17)


def test_the_page_loads_nothing() -> None:
    check_loads_nothing(page_of_the_week())


def test_profiles_are_told_one_by_one() -> None:
    text = words_of(page_of_the_week())
    assert "phone-mid-range 41,000 17,220 0.21 % 23.9 49.3 mWh 131 kB 893 kB 310 kB" in text
    mains = replace(WEEK.profiles[0], battery_percent_median=None)
    assert "smartwatch 38,000 15,960 mains" in words_of(fleet_report_html(replace(BARE, profiles=(mains,))))
