"""A live run's report says that it is one, what was left out, and claims nothing that nobody measured."""

from __future__ import annotations

from msgspec.structs import replace

from firmware_sim.fleet_lead import lead_sentences
from firmware_sim.fleet_metrics import Crash, LiveTerms
from firmware_sim.fleet_report import fleet_report_html
from tests.firmware_sim.fleet_runs import SMALL

CRASH = Crash(device="device-0000003", time_s=9.0, error="device-0000003 ended (code -9)", trace="")
LIVE = replace(
    SMALL, live=LiveTerms(broker="a broker on loopback", left_out=("radios", "3 planned faults")), crashes=(CRASH,)
)


def test_the_first_sentences_say_that_it_was_live_and_what_was_left_out() -> None:
    lead = " ".join(lead_sentences(LIVE))
    assert "This run was live: each device was a process of its own, in real time, over a broker on loopback." in lead
    assert "Left out of the scenario: radios, 3 planned faults." in lead
    assert "20 devices ran for 6 hours." in lead
    assert "simulated" not in lead


def test_a_simulated_run_says_nothing_of_it() -> None:
    assert "live" not in " ".join(lead_sentences(SMALL))
    assert "20 devices were simulated for 6 hours." in " ".join(lead_sentences(SMALL))


def test_the_page_has_no_virtual_time_no_energy_and_no_replay() -> None:
    page, simulated = fleet_report_html(LIVE), fleet_report_html(SMALL)
    assert "<h1>Live run: first-round</h1>" in page
    assert "<h1>Simulation: first-round</h1>" in simulated
    assert "not measured" in page
    assert "not measured" not in simulated
    assert "logs/device-0000003.err" in page
    for never in ("virtual beginning", "the simulation took", "covey-fleet replay"):
        assert never not in page
