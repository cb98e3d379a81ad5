"""A tiny run of benchmarks/known_devices.py: every figure is there, and what is timed is a list that is believed."""

from __future__ import annotations

import json

import pytest

from aggregator.helper.answering import Study
from aggregator.helper.known_devices import KnownDevices
from benchmarks.known_devices import NOW_S, NUMBERS, measure, question_of
from benchmarks.secure_case import case_of
from fl_protocol.secagg.errors import UnmaskRefusedError
from tests.fl_protocol.examples import AGGREGATOR_KEY


def test_every_figure_is_there() -> None:
    found = measure(4, repeats=1)
    times = [name for name in found if name.endswith("_us")]
    assert times == ["cold_us", "remembered_us", "bare_certificate_us", "bare_contribution_us", "bare_opening_us"]
    assert all(found[name] > 0 for name in times)
    assert (found["devices"], json.loads(json.dumps(found))) == (4, found)


def test_each_device_of_the_list_has_a_name_and_a_certificate_of_its_own() -> None:
    question = question_of(case_of(4, NUMBERS), 4)
    assert len(set(question.devices)) == len({entry.credential for entry in question.entries}) == 4
    nobody = KnownDevices(Study(question.terms.tenant, AGGREGATOR_KEY.public_key()))
    with pytest.raises(UnmaskRefusedError):
        nobody.keys(question, listed={}, now_s=NOW_S)
