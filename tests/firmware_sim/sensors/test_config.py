"""The table ``[sensors]``: what is refused, and in which words."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from firmware_sim.errors import SettingsError
from firmware_sim.sensors.assembly import sensors_config
from tests.firmware_sim.sensors.conftest import MakeSensor

JUMP = {"form": "jump", "begins_day": 1}


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({}, "sensors: object missing required field `kind`"),
        ({"kind": "real"}, "sensors.kind: invalid enum value 'real', expected one of none, replay, synthetic"),
        ({"kind": "none", "foo": 1}, "sensors.foo: there is no such key; expected one of confusion, dirichlet_alpha, "),
        ({"label_noise": 1.5}, "sensors.label_noise: expected a number from 0 to 1, got 1.5"),
        ({"label_noise": float("nan")}, "sensors.label_noise: expected a number from 0 to 1, got nan"),
        ({"label_noise": "a"}, "sensors.label_noise: expected `float`, got `str`"),
        ({"windows_per_day": -1}, "sensors.windows_per_day: expected a number from 0 to 10000, got -1"),
        ({"windows_spread": 4}, "sensors.windows_spread: expected a number from 0 to 3, got 4"),
        ({"dirichlet_alpha": 0}, "sensors.dirichlet_alpha: expected a number from 0.001 to 10000, got 0"),
        ({"held_out": [1]}, 'sensors.held_out: expected only with kind = "replay", got [1]'),
        ({"variation": {"pac": 1}}, "sensors.variation.pac: there is no such key; expected one of bias, dropout, gain"),
        ({"variation": {"warp": 0.6}}, "sensors.variation.warp: expected a number from 0 to 0.5, got 0.6"),
        ({"drift": [{**JUMP, "amplitude": 0}]}, "sensors.drift[0].amplitude: expected a number from 0.1 to 10, got 0"),
        ({"drift": [{**JUMP, "ends_day": 2}]}, 'sensors.drift[0].ends_day: expected none with form = "jump", got 2'),
        (
            {"drift": [JUMP, {**JUMP, "form": "linear"}]},
            "sensors.drift[1].ends_day: expected a day after begins_day (1)",
        ),
        ({"drift": [{**JUMP, "days": 1}]}, "sensors.drift[0].days: there is no such key; expected one of amplitude"),
        ({"season": {"strength": 11}}, "sensors.season.strength: expected a number from 0 to 10, got 11"),
        ({"season": {"x": 1}}, "sensors.season.x: there is no such key; expected one of period_days, strength"),
        (
            {"confusion": [[1, 0], [0.5, 0.4]]},
            "sensors.confusion: expected 2 numbers from 0 to 1 that sum to 1 in row 1",
        ),
        ({"confusion": [[1]], "label_noise": 0.1}, "sensors.label_noise: expected 0 beside confusion, got 0.1"),
    ],
)
def test_an_error_names_the_key_the_value_and_what_is_allowed(table: dict[str, Any], said: str) -> None:
    if table and "kind" not in table:
        table = {"kind": "synthetic", **table}
    with pytest.raises(SettingsError) as refused:
        sensors_config(table)
    assert said in str(refused.value)


def test_a_confusion_for_another_number_of_labels_is_refused(sensor_of: MakeSensor) -> None:
    with pytest.raises(SettingsError, match=r"sensors\.confusion: expected 7 rows, one for each label, got 2"):
        sensor_of(kind="synthetic", confusion=[[1, 0], [0, 1]])


def test_the_table_in_the_docs_is_read() -> None:
    text = """
        kind = "replay"
        windows_per_day = 20
        held_out = [9, 10]
        label_noise = 0.05
        [variation]
        seat_degrees = 30
        [[drift]]
        form = "linear"
        begins_day = 30
        ends_day = 60
        turn_degrees = 20
        [season]
        period_days = 365
    """
    config = sensors_config(msgspec.toml.decode(text))
    assert config.drift[0].ends_day == 60
    assert config.variation.seat_degrees == 30
    assert config.season is not None
