"""The claims are the accountant's, the noise is in the sum, settings come from training people, the report is whole."""

from __future__ import annotations

import io
import math
from pathlib import Path
from random import Random
from types import ModuleType

import msgspec
import numpy as np
import pytest

from aggregator.privacy.accounting import device_epsilon
from aggregator.privacy.events import SecureSum, SkellamShares
from aggregator.privacy.record_level import record_level_noise
from benchmarks import utility_mechanisms, utility_tuning
from benchmarks.feature_head import shortcut_error
from benchmarks.privacy_utility import KeptRuns, measure
from benchmarks.synthetic_persons import WINDOWS, sources, synthetic_person
from benchmarks.utility_mechanisms import (
    AGGREGATOR,
    Budget,
    Central,
    Local,
    Secure,
    device_level,
    noise_over,
    record_level,
)
from benchmarks.utility_report import ARMS, as_text, paired_difference, plot
from benchmarks.utility_training import SAMPLES, Job, Outcome, Settings, mechanism_of, run_job, training_data
from benchmarks.utility_tuning import FOLDS, candidates, chosen, tuning_jobs
from device_client.accounting import noise_multiplier_for
from firmware_sim.watch_data import PEOPLE, Wrist, all_wrists, default_cache, load_recordings, windows_of
from fl_protocol.errors import LocalMisuseError
from fl_protocol.integer_noise import Entropy
from fl_protocol.plans import TrainingPlanMsg
from fl_protocol.renyi import INTEGER_ORDERS, rdp_to_epsilon
from tests.enrolments import broken_copy

BUDGET = Budget(3.0, 1e-5, 20)
PLAN = TrainingPlanMsg(
    sampling_rate=1.0,
    local_steps=1,
    learning_rate=1.5,
    l2_norm_clip=0.5,
    noise_multiplier=0.0,
    expected_batch_size=100.0,
)
D = 378


def seeded(name: str) -> Entropy:
    return Random(name).randbytes  # noqa: S311 - so that the test is the same every time


def test_the_head_on_kept_features_is_the_committed_graph() -> None:
    recordings, random = load_recordings(default_cache()), np.random.default_rng(1)
    for wrist in (Wrist(1, "left"), Wrist(8, "right")):
        for clip in (0.1, 100.0):
            windows = windows_of(recordings, wrist, samples=SAMPLES)
            assert shortcut_error(windows, clip=clip, random=random) < 1e-5


def test_a_synthetic_person_is_the_same_every_time_and_of_one_wrist_alone() -> None:
    recordings = load_recordings(default_cache())
    one = synthetic_person(recordings, 3, 5, samples=SAMPLES)
    own = [recording for recording in recordings if recording.wrist == Wrist(3, "right")]
    again = synthetic_person(own, 3, 5, samples=SAMPLES)
    assert np.array_equal(one.x, again.x)
    assert np.array_equal(one.y, again.y)
    assert one.x.shape == (WINDOWS, SAMPLES, 6)
    assert not np.array_equal(one.x, synthetic_person(own, 3, 7, samples=SAMPLES).x)
    assert len(np.unique(one.y)) > 3


def test_synthetic_persons_come_from_everybody_who_trains_and_from_nobody_else() -> None:
    made = sources((1, 2, 3, 6, 7, 8, 9, 10), 1000)
    assert len(set(made)) == 1000
    assert {person for person, _ in made} == {1, 2, 3, 6, 7, 8, 9, 10}
    assert max(number for _, number in made) == 124


def test_nobody_who_is_measured_trains() -> None:
    everybody = {
        wrist: len(records.y) for wrist, records in zip(all_wrists(), training_data("record", ()), strict=True)
    }
    for fold in FOLDS:
        expected = [count for wrist, count in everybody.items() if wrist.person not in fold]
        assert [len(records.y) for records in training_data("device_ten", fold)] == expected


def counted_anew(secure: Secure, budget: Budget, devices: int) -> list[SecureSum]:
    """The rounds as the mechanism makes them, for the accountant."""
    return [
        SecureSum(
            round=number,
            opened_s=number,
            closed_s=number,
            l2_sensitivity=secure.fixed_point.norm_bound,
            dimension=D,
            shares=SkellamShares(secure.device_variance, devices),
        )
        for number in range(1, budget.rounds + 1)
    ]


def check_shared_noise_holds_against_the_aggregator(module: ModuleType) -> None:
    """The shares of the others alone give the claim: all of it, and no more."""
    for budget in (Budget(1.0, 1e-5, 60), BUDGET, Budget(8.0, 1e-5, 1)):
        for devices in (16, 1000):
            secure = module.device_level("secure", budget, l2_norm_clip=1.0, devices=devices, parameters=D)
            rounds = counted_anew(secure, budget, devices)
            reached = device_epsilon(rounds, delta=budget.delta, adversary=AGGREGATOR)
            assert 0.99 * budget.epsilon < reached <= budget.epsilon
            assert reached == pytest.approx(secure.epsilon)
        secure = module.record_level("secure", budget, plan=PLAN, devices=16, parameters=D)
        worth = record_level_noise(
            PLAN,
            counted_anew(secure, budget, 16)[0],
            fixed_point=secure.fixed_point,
            personal_parameters=0,
            adversary=AGGREGATOR,
        )
        rdp = budget.rounds * np.array(INTEGER_ORDERS) / (2 * worth**2)
        reached = rdp_to_epsilon(rdp, budget.delta, INTEGER_ORDERS)
        assert 0.99 * budget.epsilon < reached <= budget.epsilon
        assert reached == pytest.approx(secure.epsilon)


def test_shared_noise_holds_against_the_aggregator_who_is_one_share_short() -> None:
    check_shared_noise_holds_against_the_aggregator(utility_mechanisms)
    for right, wrong in (
        ("fixed_point, plan.device_variance)", "fixed_point, plan.device_variance * (devices - 1) / devices)"),
        ("fixed_point, variance)", "fixed_point, variance * (devices - 1) / devices)"),
    ):
        broken = broken_copy(utility_mechanisms.__name__, (right, wrong))
        with pytest.raises(AssertionError):
            check_shared_noise_holds_against_the_aggregator(broken)


def test_the_curator_and_the_lone_device_use_up_their_budgets_and_no_more() -> None:
    for budget in (Budget(1.0, 1e-5, 60), BUDGET, Budget(8.0, 1e-5, 1)):
        own = noise_multiplier_for(epsilon=budget.epsilon, delta=budget.delta, sampling_rate=1.0, steps=budget.rounds)
        noisy = msgspec.structs.replace(PLAN, noise_multiplier=own)
        for one in (
            device_level("local", budget, l2_norm_clip=2.0, devices=16, parameters=D),
            device_level("central", budget, l2_norm_clip=2.0, devices=16, parameters=D),
            record_level("central", budget, plan=PLAN, devices=16, parameters=D),
            record_level("local", budget, plan=noisy, devices=16, parameters=D),
        ):
            assert 0.99 * budget.epsilon < one.epsilon <= budget.epsilon


def test_shared_noise_is_refused_for_records_after_several_local_steps() -> None:
    settings = Settings(10, 0.5, 1.5, local_steps=2)
    for epsilon in (1.0, 8.0):
        with pytest.raises(
            LocalMisuseError, match="local_steps: expected 1 for a record-level claim from shared noise"
        ):
            mechanism_of(Job("record", "secure", epsilon, settings, FOLDS[0], ""), devices=16)
    # Each device's own noise carries it; and whole devices may take as many steps as they like.
    assert mechanism_of(Job("record", "local", 3.0, settings, FOLDS[0], ""), devices=16) is not None
    assert mechanism_of(Job("device_ten", "secure", 3.0, settings, FOLDS[0], ""), devices=16) is not None


def test_the_noise_in_the_mean_is_what_was_accounted() -> None:
    # Sums of 40 * 378 squares: a false alarm once in 10^5 (4.5 standard deviations of 1.15 %), and the seed is fixed.
    updates = np.zeros((16, D), np.float32)
    local, secure, central = (device_level(arm, BUDGET, l2_norm_clip=1.0, devices=16, parameters=D) for arm in ARMS)
    assert isinstance(local, Local)
    assert isinstance(secure, Secure)
    assert isinstance(central, Central)
    assert local.grid is not None
    expected = {
        "local": math.sqrt(16) * local.grid.sigma * local.grid.step / 16,
        "secure": math.sqrt(16 * secure.device_variance) * secure.fixed_point.step / 16,
        "central": central.grid.sigma * central.grid.step / 16,
    }
    for arm, mechanism in zip(ARMS, (local, secure, central), strict=True):
        drawn = np.concatenate([mechanism.mean(updates, seeded(f"{arm} {index}")) for index in range(40)])
        assert np.sqrt(np.mean(drawn**2)) == pytest.approx(expected[arm], rel=0.026)
    # 15 shares of 16 count, and each rounding may lengthen an update by 1 %: that is all that sharing costs here.
    assert 1.0 < expected["secure"] / expected["central"] < noise_over(secure, central, devices=16) < 1.05
    assert expected["local"] == pytest.approx(4 * expected["central"])


def test_the_mean_keeps_the_updates_and_clips_the_long_ones() -> None:
    direction = np.ones(D, np.float32) / np.float32(math.sqrt(D))
    updates = np.stack([direction * np.float32(length) for length in (0.5, 1.0, 50.0, 1.0)])
    wide = Budget(1e6, 1e-5, 1)
    for arm in ARMS:
        mean = device_level(arm, wide, l2_norm_clip=1.0, devices=4, parameters=D).mean(updates, seeded(arm))
        assert mean @ direction == pytest.approx(3.5 / 4, abs=0.02), arm
    record = record_level("secure", BUDGET, plan=PLAN, devices=4, parameters=D)
    shorter = updates[[0, 1, 1, 3]]  # what 119 records of a wrist can give at most is 0.9
    means = [record.mean(shorter, seeded(f"{index}")) @ direction for index in range(20)]
    assert np.mean(means) == pytest.approx(3.5 / 4, abs=0.02)


def check_settings_come_from_training_people(module: ModuleType) -> None:
    """Candidates that do well on a fold's own people alone are not chosen for it."""
    poor, good = Settings(1, 1.0, 1.0), Settings(2, 1.0, 1.0)
    for level in ("record", "device_thousand"):
        jobs = module.tuning_jobs(level, 1.0, lambda *_: [poor, good])
        for fold in FOLDS:
            outcomes = {
                job: Outcome(
                    {
                        person: ((job.settings == (poor if person in fold else good)) * 100, 100)
                        for person in job.held_out
                    },
                    1.0,
                )
                for job in jobs
            }
            for arm in ARMS:
                assert module.chosen(outcomes, (level, 1.0, arm), fold, lambda *_: [poor, good]) == good
            assert all(set(job.held_out) < set(PEOPLE) for job in jobs)


def test_settings_for_a_fold_are_not_chosen_on_its_own_people() -> None:
    check_settings_come_from_training_people(utility_tuning)
    broken = broken_copy(utility_tuning.__name__, ("outcomes[job].accuracy(other)", "outcomes[job].accuracy(fold)"))
    with pytest.raises(AssertionError):
        check_settings_come_from_training_people(broken)


def test_secure_takes_the_settings_that_were_chosen_for_central() -> None:
    jobs = tuning_jobs("device_ten", 3.0, candidates)
    assert {job.arm for job in jobs} == {"local", "central"}
    outcomes = {job: Outcome({one: (hash(job) % 100, 100) for one in job.held_out}, 3.0) for job in jobs}
    for fold in FOLDS:
        of_central = chosen(outcomes, ("device_ten", 3.0, "central"), fold, candidates)
        assert chosen(outcomes, ("device_ten", 3.0, "secure"), fold, candidates) == of_central


def test_a_difference_is_paired_within_folds_and_has_the_error_of_its_repetitions() -> None:
    found = paired_difference([[90.0, 92.0], [50.0, 50.0]], [[89.0, 89.0], [50.0, 51.0]])
    # Differences 1, 3 and 0, -1: variances 2 and 0.5, halved, added, and the root over two folds.
    assert found == {"points": 0.75, "standard_error": round(math.sqrt(1.25) / 2, 2)}


def test_a_small_run_reports_every_arm_is_kept_and_drawn(tmp_path: Path) -> None:
    def tried(level: str, epsilon: float, arm: str) -> list[Settings]:
        return [Settings(2, 0.5, 3.0, local_steps=1, momentum=0.0)]

    def refuse(jobs: list[Job]) -> list[Outcome]:
        assert not jobs
        return []

    kept = io.StringIO()
    about = {"levels": ("record", "device_ten"), "epsilons": (8.0,), "tried": tried}
    about["repetitions"] = {"record": 2, "device_ten": 1, "device_thousand": 1}
    report = measure(**about, run=KeptRuns(lambda jobs: map(run_job, jobs), kept))  # type: ignore[arg-type]
    gaps = report["central_minus_secure_points_by_row"]
    assert list(gaps) == ["record", "device_ten"]
    assert report["central_minus_secure_points"] == max(row["8"]["points"] for row in gaps.values())
    row = report["accuracy_percent"]["record"]["8"]
    assert row["central_minus_secure"]["points"] == pytest.approx(
        row["central"]["mean"] - row["secure"]["mean"], abs=0.02
    )
    assert 1.03 < row["noise_of_secure_over_central"] < 1.05
    # Two rounds already tell more than chance; noise at every device less than the same at one place.
    assert row["central"]["mean"] > 40 > report["chance_percent"]
    assert report["accuracy_percent"]["device_ten"]["8"]["local"]["mean"] < row["central"]["mean"]
    for by_epsilon in report["accuracy_percent"].values():
        for arm in ARMS:
            assert by_epsilon["8"][arm]["epsilon"] <= 8.0
            assert list(by_epsilon["8"][arm]["folds"]) == ["1,2", "3,4", "5,6", "7,8", "9,10"]
    assert as_text(report).count("\n| record level") + as_text(report).count("\n| device level") == 2
    # What was kept need not be trained again, and gives the same report; a torn line is dropped.
    whole = kept.getvalue()
    kept.write('[{"level"')
    assert measure(**about, run=KeptRuns(refuse, kept)) == report  # type: ignore[arg-type]
    assert kept.getvalue() == whole
    plot(report, tmp_path / "utility.png")
    assert (tmp_path / "utility.png").read_bytes().startswith(b"\x89PNG")
