"""The report: every number on it is one of the metrics, what went wrong is told, and no text becomes markup."""

from __future__ import annotations

import functools
import html
import re

import pytest
from msgspec.structs import replace

from firmware_sim.metrics import FinalMetrics, RoundMetrics, RunMetrics
from firmware_sim.report import report_html
from firmware_sim.settings import DemoSettings
from tests.firmware_sim.pages import HOSTILE, check_loads_nothing, check_nothing_becomes_markup, words_of

SETTINGS = DemoSettings(
    held_out=(4, 6),
    rounds=37,
    epsilon=2.71,
    delta=3.5e-6,
    l2_norm_clip=0.731,
    learning_rate=1.943,
    expected_batch_size=83.25,
    server_momentum=0.617,
    average_last=11,
)


def round_metrics(number: int, **changes: object) -> RoundMetrics:
    return replace(
        RoundMetrics(
            round=number,
            outcome="committed",
            reason="",
            version=number,
            arrived=16,
            goal=16,
            bytes_up=48_000,
            bytes_down=24_192,
            seconds=0.5,
            unmasking_s=0.125,
            mean_update_norm=0.25,
            epsilon_max=0.1 * number,
            accuracy=0.4 + 0.01 * number,
            loss=1.0 / number,
        ),
        **changes,
    )


METRICS = RunMetrics(
    covey="7.6.54",
    broker="a broker of its own kind",
    settings=SETTINGS,
    helpers={"helper-a": "patients", "helper-b": "clinic-x"},
    noise_multiplier=12.3457,
    rounds=[round_metrics(1), round_metrics(2)],
    final=FinalMetrics(
        version=3,
        accuracy=0.8137,
        loss=0.3,
        windows=4321,
        by_person={"4": 0.7913, "6": 0.8361},
        by_wrist={"wrist-04-left": 0.8},
    ),
    epsilon_spent={"wrist-01-left": 2.512, "wrist-01-right": 2.6378},
    refusals={},
    complaints=[],
    peak_rss_mb={"aggregator": 63.5, "wrist-01-left": 71.25},
    seconds=46.8,
)


@functools.cache
def page_of_the_run() -> str:
    return report_html(METRICS)


def text_of(metrics: RunMetrics) -> str:
    return words_of(report_html(metrics))


def test_the_result_is_told_in_the_runs_own_numbers() -> None:
    text = text_of(METRICS)
    assert "classifies 81.4 % of 4321 windows of people 4, 6 correctly" in text
    assert "at most ε = 2.638 of 2.71 at δ = 3.5e-06, at record level" in text
    for value in (
        "covey 7.6.54",
        "a broker of its own kind",
        "37",
        "0.731, 12.3457",
        "1.943, 83.25",
        "0.617, 11",
        "46.8",
        "79.1",  # by person
        "83.6",
        "aggregator",
        "wrist-01-left",
        "3000, masked and sealed",
    ):
        assert value in text, value
    assert "no update was refused, no round aborted, nobody complained" in text


@pytest.mark.parametrize(
    "changed",
    [
        replace(METRICS, rounds=[round_metrics(1), round_metrics(2, accuracy=0.9)]),
        replace(METRICS, rounds=[round_metrics(1), round_metrics(2, loss=0.9)]),
        replace(METRICS, rounds=[round_metrics(1), round_metrics(2, epsilon_max=0.9)]),
        replace(METRICS, rounds=[round_metrics(1), round_metrics(2, bytes_up=70_000)]),
        replace(METRICS, rounds=[round_metrics(1), round_metrics(2, bytes_down=70_000)]),
        replace(METRICS, peak_rss_mb={"aggregator": 63.5, "wrist-01-left": 171.25}),
        replace(METRICS, rounds=[round_metrics(1), round_metrics(2, seconds=0.75)]),
        replace(METRICS, rounds=[round_metrics(1), round_metrics(2, unmasking_s=0.25)]),
    ],
    ids=["accuracy", "loss", "epsilon", "bytes up", "bytes down", "memory", "seconds", "unmasking"],
)
def test_the_plots_are_drawn_from_the_metrics(changed: RunMetrics) -> None:
    """Labels of axes may stay; the drawn lines must not."""
    drawn = [re.findall(r'<path d="([^"]+)"', page) for page in (page_of_the_run(), report_html(changed))]
    assert drawn[0] != drawn[1]


def test_the_same_metrics_give_the_same_bytes() -> None:
    assert page_of_the_run() == report_html(replace(METRICS))


def test_a_stopped_run_says_so_and_names_no_result() -> None:
    text = text_of(replace(METRICS, final=None))
    assert "The run ended before its last round" in text
    assert "classifies" not in text
    assert "finished model" not in text


def test_a_run_that_was_stopped_before_its_first_round_is_drawn() -> None:
    text = text_of(replace(METRICS, rounds=[], final=None, epsilon_spent={}, peak_rss_mb={}))
    assert "at most ε = 0.000 of 2.71" in text


def test_a_run_without_noise_claims_no_privacy() -> None:
    settings = replace(SETTINGS, epsilon=None)
    rounds = [round_metrics(1, epsilon_max=None)]
    text = text_of(replace(METRICS, settings=settings, noise_multiplier=0.0, rounds=rounds, epsilon_spent={}))
    assert "no privacy is claimed" in text
    assert "no noise, so no ε" in text
    assert "ε =" not in text


def test_who_unmasked_sums_of_how_many_is_told_and_no_more_is_claimed() -> None:
    text = text_of(replace(METRICS, rounds=[round_metrics(1), round_metrics(2, unmasking_s=0.375)]))
    assert "saw sums of at least 8 of them, unmasked by helper-a (patients) and helper-b (clinic-x)" in text
    assert "as long as one helper is honest; here all ran on one machine. No device-level privacy is claimed" in text
    assert "helpers helper-a (patients) and helper-b (clinic-x)" in text
    assert "unmasking, median and longest 0.250 s, 0.375 s" in text


def test_a_run_with_the_engine_open_says_that_the_aggregator_saw_each_update() -> None:
    rounds = [round_metrics(1, unmasking_s=None)]
    text = text_of(replace(METRICS, settings=replace(SETTINGS, engine="open"), helpers={}, rounds=rounds))
    assert "The engine was open: the aggregator saw each update." in text
    assert "3000, sealed" in text
    for word in ("helper", "masked", "median"):
        assert word not in text, word


def test_aborted_rounds_refusals_and_complaints_are_shown() -> None:
    text = text_of(
        replace(
            METRICS,
            rounds=[round_metrics(1), round_metrics(2, outcome="aborted", reason="3 of at least 8", version=None)],
            refusals={"round_closed": 17, "bad_signature": 5},
            complaints=["wrist-02-left: the disk is full"],
        )
    )
    assert "round 2 aborted 3 of at least 8" in text
    assert "updates refused: bad_signature 5 updates refused: round_closed 17" in text
    assert "complaint wrist-02-left: the disk is full" in text
    assert "nobody complained" not in text


def hostile_metrics() -> RunMetrics:
    """Every text of the metrics that could come from elsewhere."""
    return replace(
        METRICS,
        covey=HOSTILE,
        broker=HOSTILE,
        settings=replace(SETTINGS, model=HOSTILE),
        rounds=[round_metrics(1), round_metrics(2, outcome="aborted", reason=HOSTILE)],
        final=replace(METRICS.final, by_person={HOSTILE: 0.5}) if METRICS.final is not None else None,
        helpers={HOSTILE: HOSTILE},
        refusals={HOSTILE: 1},
        complaints=[HOSTILE],
        peak_rss_mb={HOSTILE: 1.0},
    )


def test_hostile_text_stays_text() -> None:
    page = report_html(hostile_metrics())
    check_nothing_becomes_markup(page, least=11)
    with pytest.raises(AssertionError):
        check_nothing_becomes_markup(html.unescape(page), least=11)


def test_mathematical_signs_in_a_name_are_drawn_as_they_are() -> None:
    name = r"$\frac$"
    assert html.escape(name, quote=False) in report_html(replace(METRICS, peak_rss_mb={name: 1.0}))


def test_the_page_loads_nothing() -> None:
    check_loads_nothing(page_of_the_run())
