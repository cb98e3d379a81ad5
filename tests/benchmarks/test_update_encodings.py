"""The comparison of encodings: every arm trains for real, on the same draws, and its bytes are those that travel."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.update_encodings import ARMS, Arm, Outcome, Study, as_text, plan, sealed, studies, times, train
from firmware_sim.watch_data import all_wrists
from fl_protocol.messages import UpdateBodyMsg

TWO_ROUNDS = Study("watch_features", "watch_features", 1, 2, plan(3.0))
FOLD = (9, 10)


def outcome(arm: Arm) -> Outcome:
    return train(TWO_ROUNDS, arm, FOLD)


def test_the_same_arm_gives_the_same_result_and_an_exact_one_the_same_as_float32() -> None:
    exact = outcome(Arm())
    assert exact == outcome(Arm())
    everything = outcome(Arm("top_k", 1.0))
    assert (everything.correct, everything.count) == (exact.correct, exact.count)
    assert exact.count > 100


def test_the_bytes_are_those_of_sealed_updates_and_of_deltas() -> None:
    plain = outcome(Arm())
    body = UpdateBodyMsg(num_parameters=378, values=np.zeros(378, "<f4").tobytes())
    name = next(wrist.device_id for wrist in all_wrists())  # all names are of about one length
    assert plain.bytes_up == pytest.approx(len(sealed(body, TWO_ROUNDS.plan, name)), abs=2)
    assert plain.bytes_up - outcome(Arm("float16")).bytes_up == pytest.approx(2 * 378, abs=12)
    assert plain.bytes_up - outcome(Arm("int8")).bytes_up == pytest.approx(3 * 378, abs=16)
    assert outcome(Arm("top_k", 0.1)).bytes_up < plain.bytes_up - 1200
    assert plain.bytes_down == 4 * 378
    assert outcome(Arm(down="float16")).bytes_down == 2 + 2 * 378
    assert outcome(Arm(down="int8")).bytes_down == 1 + 6 + 378


def test_error_feedback_makes_a_difference_from_the_second_round_on() -> None:
    one_round = Study("watch_features", "watch_features", 1, 1, plan(0.0))
    three_rounds = Study("watch_features", "watch_features", 1, 3, plan(0.0))
    kept, dropped = Arm("top_k", 0.02), Arm("top_k", 0.02, feedback=False)
    assert train(one_round, kept, FOLD) == train(one_round, dropped, FOLD)
    assert train(three_rounds, kept, FOLD) != train(three_rounds, dropped, FOLD)


def test_every_study_and_arm_has_a_name_of_its_own_and_a_line_in_the_table() -> None:
    names = [arm.name for arm in ARMS]
    labels = [study.name for study in studies(1, 60)]
    assert len(set(names)) == len(names)
    assert len(set(labels)) == len(labels)
    figures = {"accuracy": 0.5, "bytes_up": 1000, "bytes_down": 2000}
    report = {
        "accuracy_and_bytes": {label: dict.fromkeys(names, figures) for label in labels},
        "milliseconds": {"9k": {"int8 encode": 1.25}},
        "cpu": "a processor",
    }
    text = as_text(report)
    assert text.count("| 1,000 | 2,000 | 50.0 | +0.0 |") == len(names) * len(labels)
    assert "| int8 encode | 1.25 |" in text


def test_every_encoding_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    # A shorter vector is encoded so many more times to time it.
    monkeypatch.setattr("benchmarks.update_encodings.SIZES", {"20k": 20_000})
    (timed,) = times().values()
    assert set(timed) == {
        f"{name} {way}" for name in ("float32", "float16", "int8", "top_k") for way in ("encode", "decode")
    }
