"""Two simulated runs side by side: both values, difference and ratio, and exactly the settings that differ."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from firmware_sim.errors import FleetError
from firmware_sim.fleet_comparison import Comparison, Quantity, Setting, compare, table_rows
from firmware_sim.fleet_comparison_page import comparison_html
from firmware_sim.fleet_metrics import FleetMetrics, FleetRound
from tests.firmware_sim.fleet_runs import EMPTY, SMALL, WEEK
from tests.firmware_sim.pages import HOSTILE, check_loads_nothing, check_nothing_becomes_markup, words_of
from tests.firmware_sim.test_fleet_cli import complaint_of, fleet


def value_of(comparison: Comparison, part: str, name: str) -> tuple[float | None, float | None]:
    (quantity,) = [quantity for quantity in comparison.quantities if (quantity.part, quantity.name) == (part, name)]
    return quantity.a, quantity.b


def test_both_values_difference_and_ratio_are_told() -> None:
    quantity = Quantity("rounds", "committed", 40.0, 30.0)
    assert (quantity.difference, quantity.ratio) == (-10.0, 0.75)
    assert Quantity("refused", "late", 0.0, 7.0).ratio is None
    assert Quantity("days to accuracy", "90 %", 3.0, None).difference is None


def test_rounds_use_refusals_and_crashes_are_compared() -> None:
    found = compare(SMALL, WEEK)
    assert value_of(found, "rounds", "committed") == (5, 38)
    assert value_of(found, "rounds", "last commit, days") == (18_000 / 86_400, (14_400 * 42 - 900) / 86_400)
    assert value_of(found, "profile smartwatch", "up, kB a day") == (None, 131.0)
    assert value_of(found, "profile raspberry-pi-zero-2w", "energy, mWh a day") == (15.75, None)
    assert value_of(found, "profile raspberry-pi-zero-2w", "battery of the median device, % a day") == (None, None)
    assert value_of(found, "refused", "bad_signature") == (0, 73)
    assert value_of(found, "updates", "delivered") == (65, 42_113)
    assert value_of(found, "faults", "daemons crashed") == (0, 1)


def reaching(*accuracies: float | None) -> FleetMetrics:
    """A run with a round a day."""
    rounds = tuple(
        FleetRound(
            task="walk", round=day, outcome="committed", reason="", opened_s=0.0, closed_s=86_400.0 * day, arrived=1,
            goal=1, bytes_up=1, accuracy=accuracy,
        )
        for day, accuracy in enumerate(accuracies, start=1)
    )  # fmt: skip
    return replace(EMPTY, rounds=rounds, virtual_s=86_400.0)


def times_of(a: FleetMetrics, b: FleetMetrics) -> dict[str, tuple[float | None, float | None]]:
    return {q.name: (q.a, q.b) for q in compare(a, b).quantities if q.part == "days to accuracy"}


def test_time_to_accuracy_is_the_first_round_that_was_as_good() -> None:
    assert times_of(reaching(0.52, None, 0.49, 0.67, 0.6), reaching(0.4, 0.66, 0.5)) == {
        "walk: 40 %": (1, 1),  # the best that both first models had; less is not told
        "walk: 45 %": (1, 2),
        "walk: 50 %": (1, 2),
        "walk: 55 %": (4, 2),
        "walk: 60 %": (4, 2),
        "walk: 65 %": (4, 2),
    }


def test_an_accuracy_that_one_run_never_had_is_told_of_the_other() -> None:
    assert times_of(reaching(0.3, 0.41), reaching(0.31)) == {
        "walk: 30 %": (1, 1),
        "walk: 35 %": (2, None),
        "walk: 40 %": (2, None),
    }
    assert times_of(reaching(0.33), reaching(None)) == {"walk: 30 %": (1, None)}
    assert times_of(reaching(None), reaching(None)) == {}


SCENARIO = 'name = "x"\nempty = []\n[fleet]\ndevices = 20\nshare = {phone = 0.5}\n[[faults]]\nkind = "hang"\nat_h = 2\n'


def test_exactly_the_settings_that_differ_are_told() -> None:
    other = SCENARIO.replace("0.5", "0.25").replace('kind = "hang"', 'kind = "crash"').replace("empty", "days")
    other += '[[faults]]\nkind = "hang"\n'
    found = compare(replace(SMALL, text=SCENARIO), replace(SMALL, text=other, seed=9))
    assert found.settings == (
        Setting("days", None, "[]"),
        Setting("empty", "[]", None),
        Setting("faults[0].kind", '"hang"', '"crash"'),
        Setting("faults[1].kind", None, '"hang"'),
        Setting("fleet.share.phone", "0.5", "0.25"),
        Setting("seed", "4", "9"),
    )


def test_the_order_and_the_layout_of_a_scenario_are_no_difference() -> None:
    other = 'empty=[]\nname="x" # a note\nfleet={share.phone=0.5,devices=20}\nfaults=[{at_h=2,kind="hang"}]\n'
    assert compare(replace(SMALL, text=SCENARIO), replace(SMALL, text=other)).settings == ()


def test_a_scenario_that_is_no_toml_is_told() -> None:
    with pytest.raises(FleetError, match="scenario first-round: expected the run to hold it as TOML"):
        compare(SMALL, replace(SMALL, text="[["))


def test_a_run_against_itself_differs_in_nothing() -> None:
    found = compare(WEEK, WEEK)
    assert found.names == ("a: mass-rollout", "b: mass-rollout")
    assert found.settings == ()
    assert {quantity.difference for quantity in found.quantities} == {0}
    assert {quantity.ratio for quantity in found.quantities} == {1, None}


def test_what_may_not_be_compared_is_said() -> None:
    stopped = replace(WEEK, virtual_s=86_400.0 * 2, covey="7.7")
    assert compare(SMALL, stopped).cautions == (
        "first-round: Every update was trained: LiteRT ran every step.",
        "mass-rollout: No model was trained: accuracy comes from a calibrated curve.",
        "The fidelities differ (real, surrogate), so times to an accuracy do not compare.",
        "mass-rollout ended after 2 days of 7 days.",
        "The runs are of different versions of covey (7.6.54, 7.7).",
    )
    assert compare(WEEK, WEEK).cautions == ("No model was trained: accuracy comes from a calibrated curve.",)


def test_the_page_shows_every_number_and_setting() -> None:
    found = compare(SMALL, WEEK)
    text = words_of(comparison_html(found))
    for row in table_rows(found, none="–"):
        assert " ".join(row[1:]) in text, row
    for entry in found.settings:
        assert f"{entry.key} {entry.a or 'not set'} {entry.b or 'not set'}" in text
    assert "Differences are mass-rollout less first-round" in text
    assert comparison_html(found) == comparison_html(compare(SMALL, WEEK))
    assert "Nothing: the runs have the same scenario and the same seed." in comparison_html(compare(SMALL, SMALL))
    check_loads_nothing(comparison_html(found))


def test_two_empty_runs_are_compared() -> None:
    assert not re.search(r"\bnan\b|\binf\b|None", words_of(comparison_html(compare(EMPTY, EMPTY))))


def test_hostile_text_stays_text() -> None:
    hostile = replace(
        SMALL,
        scenario=HOSTILE,
        covey=HOSTILE,
        text=f"{json.dumps(HOSTILE)} = {json.dumps(HOSTILE)}",  # TOML quotes these letters as JSON does
        profiles=(replace(SMALL.profiles[0], profile=HOSTILE),),
        refused={HOSTILE: 1},
        rounds=(replace(SMALL.rounds[0], task=HOSTILE),),
    )
    page = comparison_html(compare(hostile, SMALL))
    check_nothing_becomes_markup(page, least=14)
    with pytest.raises(AssertionError):
        check_nothing_becomes_markup(html.unescape(page), least=14)


def run_folder(path: Path, metrics: FleetMetrics) -> str:
    path.mkdir()
    (path / "fleet.json").write_bytes(msgspec.json.encode(metrics))
    return str(path)


def test_the_command_prints_and_writes_the_comparison(tmp_path: Path) -> None:
    a, b = run_folder(tmp_path / "first", SMALL), run_folder(tmp_path / "week", WEEK)
    result = fleet("compare", a, b, "--out", str(tmp_path / "page.html"))
    assert (result.returncode, result.stderr) == (0, "")
    words = " ".join(result.stdout.split())
    assert "first: Every update was trained" in words
    assert "fleet.devices 20 100000" in words
    assert "rounds committed 5 38 +33 7.6" in words
    assert "fidelities differ (real, surrogate)" in words
    assert result.stdout.splitlines()[-1] == str(tmp_path / "page.html")
    assert "Simulations: first and week" in words_of((tmp_path / "page.html").read_text(encoding="utf-8"))


def test_the_command_says_when_nothing_was_set_differently(tmp_path: Path) -> None:
    a = run_folder(tmp_path / "first", SMALL)
    result = fleet("compare", a, a)
    assert "Nothing was set differently: the runs have the same scenario and the same seed." in result.stdout
    assert "a: first-round" in result.stdout


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda path: None, "holds no run that can be reported: No such file or directory (fleet.json)"),
        (lambda path: path.touch(), "Not a directory (fleet.json)"),
        (lambda path: (path.mkdir(), (path / "fleet.json").write_bytes(b"{}")), "missing required field `covey`"),
        (lambda path: (path.mkdir(), (path / "fleet.json").write_bytes(b'{"covey": "\xff"}')), "cannot be read"),
    ],
    ids=["missing", "file", "other JSON", "no text"],
)
def test_a_folder_that_holds_no_simulated_run_is_one_sentence(tmp_path: Path, make: object, complaint: str) -> None:
    make(tmp_path / "other")  # type: ignore[operator]
    result = fleet("compare", run_folder(tmp_path / "first", SMALL), str(tmp_path / "other"))
    assert result.returncode == 1
    assert complaint in complaint_of(result)
    assert result.stdout == ""


def test_a_simulated_runs_report_is_drawn_from_its_fleet_json(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "first", replace(EMPTY, scenario="nobody-came"))
    result = fleet("report", folder)
    assert (result.returncode, result.stdout.strip()) == (0, str(tmp_path / "first" / "report.html"))
    assert "Simulation: nobody-came" in (tmp_path / "first" / "report.html").read_text(encoding="utf-8")
