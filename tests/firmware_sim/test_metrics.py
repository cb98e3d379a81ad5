"""``metrics.json``: what was observed, nothing else, and readable again."""

from __future__ import annotations

import msgspec
import pytest

from firmware_sim.metrics import RunMetrics, gather
from firmware_sim.observation import Observation
from firmware_sim.settings import AGGREGATOR, DemoSettings
from tests.firmware_sim.runs import SETTINGS, TRAINING, Event, aborted, feed, opened, whole_run


def metrics_of(*events: tuple[str, Event], settings: DemoSettings = SETTINGS) -> RunMetrics:
    observation = feed(Observation(settings), *events)
    return gather(observation, covey="9.8.7", broker="a broker", peak_rss_mb={"b": 71.5, "a": 70.25})


def test_metrics_are_those_of_the_run() -> None:
    metrics = metrics_of(*whole_run())
    assert [record.round for record in metrics.rounds] == [1, 2]
    first, last = metrics.rounds
    assert (first.outcome, first.version, first.arrived, first.goal) == ("committed", 1, 16, 16)
    assert (first.bytes_up, first.bytes_down, first.seconds) == (48_000, 24_192, 1.25)
    assert (first.mean_update_norm, first.epsilon_max) == (0.625, 1.15)
    assert (first.accuracy, first.loss) == (206 / 400, 0.5)
    assert (last.accuracy, last.loss) == (298 / 400, 0.3)
    assert metrics.final is not None
    assert (metrics.final.version, metrics.final.windows, metrics.final.accuracy) == (3, 400, 298 / 400)
    assert metrics.final.by_person == {"9": 143 / 200, "10": 155 / 200}
    assert list(metrics.final.by_wrist.values()) == [0.70, 0.73, 0.76, 0.79]
    assert metrics.epsilon_spent == {name: 2 + index / 100 for index, name in enumerate(TRAINING)}
    assert (first.unmasking_s, last.unmasking_s) == (0.4, 0.3)
    assert metrics.unmasking_times_s == [0.3, 0.4]
    assert metrics.helpers == {"helper-a": "patients", "helper-b": "hospital-b"}
    assert metrics.bytes_up_per_update == 3000.0
    assert metrics.noise_multiplier == SETTINGS.noise_multiplier
    assert metrics.peak_rss_mb == {"a": 70.25, "b": 71.5}
    assert metrics.seconds == 10.0  # from the first event to the last


@pytest.mark.parametrize("settings", [SETTINGS, DemoSettings(rounds=2, epsilon=None)], ids=["dp", "no dp"])
@pytest.mark.parametrize("keep", [0, 1, 40, None], ids=["nothing yet", "begun", "half", "whole"])
def test_metrics_survive_being_written_and_read(settings: DemoSettings, keep: int | None) -> None:
    metrics = metrics_of(*whole_run(settings)[:keep], settings=settings)
    text = msgspec.json.format(msgspec.json.encode(metrics), indent=1)
    assert msgspec.json.decode(text, type=RunMetrics) == metrics


def test_with_the_engine_open_there_are_no_helpers_and_nothing_is_unmasked() -> None:
    settings = DemoSettings(held_out=(9, 10), rounds=2, engine="open")
    metrics = metrics_of(*whole_run(settings), settings=settings)
    assert (metrics.helpers, metrics.unmasking_times_s, metrics.bytes_up_per_update) == ({}, [], 3000.0)


def test_before_the_first_round_there_is_no_mean_and_helpers_are_those_of_the_settings() -> None:
    metrics = metrics_of((AGGREGATOR, opened(1, digest="d0", version=0)))
    assert metrics.bytes_up_per_update is None
    assert metrics.helpers == SETTINGS.operators


def test_a_run_that_was_stopped_has_no_final_numbers() -> None:
    metrics = metrics_of(*whole_run()[:-1])
    assert metrics.final is None
    assert metrics.rounds[-1].accuracy is None
    assert metrics.rounds[0].accuracy == 206 / 400


def test_an_aborted_round_is_a_round_without_a_model() -> None:
    metrics = metrics_of((AGGREGATOR, opened(1, digest="d0", version=0)), (AGGREGATOR, aborted(1, "too few")))
    (record,) = metrics.rounds
    assert (record.outcome, record.reason, record.version, record.accuracy) == ("aborted", "too few", None, None)


def test_of_many_complaints_the_newest_are_kept() -> None:
    events = [
        (TRAINING[0], {"event": "store_failed", "at_s": 1.0, "reason": f"complaint {number}"}) for number in range(250)
    ]
    complaints = metrics_of(*events).complaints
    assert len(complaints) == 100
    assert complaints[-1].endswith("complaint 249")
