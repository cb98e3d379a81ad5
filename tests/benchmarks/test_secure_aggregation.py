"""A tiny run of benchmarks/secure_aggregation.py: sums are compared for real, and a wrong one is noticed."""

from __future__ import annotations

import pytest

from benchmarks import secure_aggregation
from benchmarks.secure_aggregation import case_of, measure, whole_round
from fl_protocol.secagg.masks import Masks, Words


def test_a_tiny_round_is_exact_and_every_figure_is_there() -> None:
    length = 20_000  # a shorter vector is masked so many more times to time it
    found = measure([4, 6], [length], repeats=1)
    assert found["exact"] is True
    assert [(one["n"], one["d"], one["bits"]) for one in found["rounds"]] == [(4, length, 12), (6, length, 12)]
    assert all(one["bytes_up"] < length * 2.1 + 6000 for one in found["rounds"])
    assert set(found["device"][str(length)]) == {"device_ms", "device_whole_ms", "bare_ms"}


def test_a_mask_that_is_off_by_one_is_not_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Masks.reduced

    def off_by_one(self: Masks, residues: Words) -> Words:
        found = honest(self, residues)
        found[0] += 1
        return found

    case = case_of(4, 300)
    monkeypatch.setattr(Masks, "reduced", off_by_one)
    assert whole_round(case, 4)["exact"] is False


def test_an_update_that_never_arrived_is_not_in_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of six drop out: what is compared is the sum of the three that did not."""
    sums: list[int] = []
    compare = secure_aggregation._is_exact

    def remember(case: object, names: list[str], *rest: object) -> bool:
        sums.append(len(names))
        return compare(case, names, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(secure_aggregation, "_is_exact", remember)
    assert whole_round(case_of(6, 50), 6)["exact"] is True
    assert sums == [3, 4, 6]
