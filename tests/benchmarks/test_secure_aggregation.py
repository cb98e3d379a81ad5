"""A tiny run of benchmarks/secure_aggregation.py: sums are compared for real, and a wrong one is noticed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks import secure_aggregation
from benchmarks.peers.environments import CACHE, REPOSITORY
from benchmarks.secure_aggregation import OVER, measure, report, whole_round
from benchmarks.secure_case import case_of, device_steps, update_of, whole_upload
from fl_protocol.messages import UpdateEnvelopeMsg, decode
from fl_protocol.secagg.masks import Masks, Words

HEADLINES = [
    "exact",
    "device_ms_100k",
    "device_ms_1m",
    "flower_over_covey_client_time",
    "flower15_over_covey_client_time",
    "bytes_over_flower",
    *OVER,
]
FLOWERS_PYTHON = REPOSITORY / CACHE / "flower_secagg" / "bin" / "python"


def test_a_tiny_round_is_exact_and_every_figure_is_there() -> None:
    length = 20_000  # a shorter vector is masked so many more times to time it
    found = measure([4, 6], [length], repeats=1)
    assert [(one["n"], one["d"], one["bits"]) for one in found["rounds"]] == [(4, length, 12), (6, length, 12)]
    assert all(one["exact"] and one["body_bytes"] < length * 2.1 + 6000 for one in found["rounds"])
    (device,) = found["device"]
    assert list(device) == ["n", "d", "bits", *device_steps(case_of(4, length)), "bare_ms"]
    result = report(found, [], "not asked for")
    assert list(result)[: len(HEADLINES)] == HEADLINES
    assert result["exact"] is True
    assert [result[name] for name in HEADLINES[1:6]] == [None] * 5
    assert result["headline_devices"] == 6
    assert all(result[name] == {str(length): found["rounds"][1][name]} for name in OVER)
    assert json.loads(json.dumps(result)) == result


def test_headlines_are_those_of_the_cases_that_they_name() -> None:
    ours: dict[str, Any] = {"rounds": [], "device": [], "repeats": 1}
    for count in (20, 100, 1000):
        row = {"n": count, "d": 9000, "exact": count != 20} | dict.fromkeys(OVER, count / 10)
        ours["rounds"].append(row)
    for count, length, ms in ((100, 100_000, 0.7), (100, 1_000_000, 3.6), (1000, 100_000, 1.2)):
        ours["device"].append({"n": count, "d": length, "device_ms": ms})
    shape = [(100, 100_000, 100), (50, 100_000, 15), (50, 100_000, 50), (100, 9_000, 15)]
    flower = [
        {"n": n, "d": d, "shares": shares, "flower_over_covey": index, "bytes_over_flower": index / 8}
        for index, (n, d, shares) in enumerate(shape)
    ]
    result = report(ours, flower, None)
    assert [result[name] for name in HEADLINES[:6]] == [False, 0.7, 3.6, 2, 3, 0.25]
    assert [result[name] for name in OVER] == [{"9000": 10.0}] * 4


def test_what_is_counted_as_sent_is_an_update_that_can_be_decoded() -> None:
    case = case_of(4, 300)
    integers = case.terms.fixed_point.encode(update_of(300), rotation_seed=bytes(32), entropy=bytes)
    sent = whole_upload(case, update_of(300), 0 * integers)
    assert len(decode(sent, UpdateEnvelopeMsg).sealed) > case.terms.fixed_point.bits * 300 // 8 + 3 * 1136


def test_a_mask_that_is_off_by_one_is_not_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Masks.reduced

    def off_by_one(self: Masks, residues: Words) -> Words:
        found = honest(self, residues)
        found[0] += 1
        return found

    case = case_of(4, 300)
    monkeypatch.setattr(Masks, "reduced", off_by_one)
    assert whole_round(case, 4, repeats=1)["exact"] is False


def test_an_update_that_never_arrived_is_not_in_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of six drop out: what is compared is the sum of the three that did not."""
    sums: list[int] = []
    compare = secure_aggregation._is_exact

    def remember(case: object, names: list[str], *rest: object) -> bool:
        sums.append(len(names))
        return compare(case, names, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(secure_aggregation, "_is_exact", remember)
    assert whole_round(case_of(6, 50), 6, repeats=1)["exact"] is True
    assert sums == [3, 4, 6]


@pytest.mark.skipif(not FLOWERS_PYTHON.exists(), reason="python -m benchmarks.secure_aggregation installs Flower")
def test_flowers_client_answers_every_stage_and_is_measured_beside_ours() -> None:
    (row,) = secure_aggregation.in_flowers_python(FLOWERS_PYTHON, repeats=1, cases=[(5, 300, 5)])
    assert set(row["flower_stages_ms"]) == {"keys", "share_keys", "mask", "unmask"}
    # Masked vectors are 8 bytes a number; two keys, eight shares and as many texts are some kilobytes.
    assert 300 * 8 < row["flower_bytes_up"] < 300 * 8 + 10_000
    assert row["bytes_over_flower"] == round(row["bytes_up"] / row["flower_bytes_up"], 3)
