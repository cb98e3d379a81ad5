"""One task's rounds on the service: what commits, what aborts and why, and which model is in force after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace as with_fields

from aggregator import task_runner
from aggregator.rounds import Phase
from aggregator.store.rounds import LiveRound
from aggregator.store.sweep import named_blobs
from aggregator.task_file import Asynchronous, Participation, Rule, Server, Validation
from aggregator.task_runner import KEEP_VERSIONS
from aggregator.validation import Judgement
from fl_protocol.errors import GraphError, RefusalReason
from fl_protocol.messages import NackMsg
from tests.aggregator.desk import judged_by
from tests.aggregator.small_study import AGGREGATOR, SmallStudy, digest_of, plain_study, small_task
from tests.aggregator.tagging import tag
from tests.enrolments import broken_copy
from tests.fl_protocol.examples import TASK


def number(study: SmallStudy, version: int) -> float:
    """What all of a version's parameters are."""
    params = study.params(version)
    assert (params == params[0]).all()
    return float(params[0])


def outcomes(study: SmallStudy) -> list[str]:
    return [one.outcome for one in study.store.rounds.history(TASK)]


def test_a_round_is_the_mean_of_its_updates_and_the_next_one_starts_from_it(tmp_path: Path) -> None:
    study = plain_study(tmp_path)
    assert (study.manifest().round, study.manifest().status) == (1, "open")
    study.plain_round([0.5, 0.25, 0.75])
    study.plain_round([1.0, 1.0, -0.5])
    assert [number(study, version) for version in range(3)] == [0.0, 0.5, 1.0]
    assert study.manifest().round == 3
    assert study.manifest().model_digest == digest_of(study.params(2))
    first, second, third = study.store.rounds.history(TASK)
    assert (first.outcome, first.arrived, first.metrics["arrived"]) == ("committed", 3, 3)
    assert (second.version, third.outcome) == (1, "open")
    lineage = [(one.version, one.parent, one.round, one.origin) for one in study.store.models.records(TASK)]
    assert lineage == [(0, None, None, "initial"), (1, 0, 1, "round"), (2, 1, 2, "round")]


def test_the_last_round_finishes_the_task_and_its_model_stays_announced(tmp_path: Path) -> None:
    study = plain_study(tmp_path, rounds=2)
    study.plain_round([0.5, 0.5, 0.5])
    study.plain_round([0.5, 0.5, 0.5])
    assert study.state.phase is Phase.FINISHED
    finished = study.manifest()
    assert (finished.status, finished.recipient, finished.round) == ("finished", None, 2)
    assert number(study, study.state.version) == 1.0
    np.testing.assert_array_equal(study.fetch(finished.model_digest), np.ones(40))
    # An update that comes now has nowhere to count.
    study.crash()
    study.start()
    assert study.manifest() == finished


def test_the_finished_model_is_the_mean_of_the_last_versions(tmp_path: Path) -> None:
    study = plain_study(tmp_path, rounds=4, server=Server(average_last=3))
    for _ in range(4):
        study.plain_round([1.0, 1.0, 1.0])
    last = study.store.models.records(TASK)[-1]
    assert (last.origin, last.version, last.metrics) == ("average", 5, {"averaged": 3})
    assert number(study, 5) == (2.0 + 3.0 + 4.0) / 3
    assert study.manifest().model_digest == last.digest


def test_the_average_goes_along_parents_and_leaves_out_what_was_rolled_back(tmp_path: Path) -> None:
    study = plain_study(tmp_path, rounds=3, server=Server(average_last=3))
    study.plain_round([1.0, 1.0, 1.0])  # version 1
    study.plain_round([8.0, 8.0, 8.0])  # version 2, a mistake
    assert study.order("rollback", "1") == "done"  # version 3 = 1
    study.plain_round([1.0, 1.0, 1.0])  # version 4
    assert study.state.phase is Phase.FINISHED
    assert number(study, 5) == pytest.approx((2.0 + 1.0 + 1.0) / 3)


def test_too_few_updates_are_never_combined(tmp_path: Path) -> None:
    check_the_cohort_floor(tmp_path)


def check_the_cohort_floor(folder: Path) -> None:
    study = plain_study(folder)
    study.plain_round([1.0, 1.0])
    study.let_the_round_end()
    assert outcomes(study) == ["aborted", "open"]
    (record, _) = study.store.rounds.history(TASK)
    assert record.reason.startswith("2 of at least 3 updates had arrived by the deadline")
    assert (study.manifest().round, study.manifest().model_digest) == (2, digest_of(study.params(0)))
    assert len(study.store.models.records(TASK)) == 1


def test_a_runner_that_commits_whatever_came_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = broken_copy("aggregator.rounds", ("if state.arrived >= policy.minimum_cohort:", "if state.arrived:"))
    monkeypatch.setattr("aggregator.rounds._check_open.__code__", rounds._check_open.__code__)
    with pytest.raises(AssertionError):
        check_the_cohort_floor(tmp_path)


def test_a_round_that_was_interrupted_leaves_time_for_the_outboxes(tmp_path: Path) -> None:
    study = plain_study(tmp_path)
    manifest = study.manifest()
    study.crash()
    study.desk.clock.time_s += 10_000.0
    study.start()
    again = study.manifest()
    assert again.round == 1
    assert again.deadline_s == pytest.approx(study.desk.clock.time_s + 30.0, abs=2.0)
    for index in range(3):
        study.send_change(index, 1.0, manifest)  # sealed before the outage
    study.settle()
    assert outcomes(study) == ["committed", "open"]


# After a round nothing can be opened any more.


def test_a_closed_rounds_key_and_sums_are_gone(tmp_path: Path) -> None:
    study = plain_study(tmp_path)
    (live,) = study.store.rounds.live()
    assert live.sums_secret is not None
    raw = np.full(40, 0.0123, "<f4").tobytes()
    for index in range(2):
        study.send_change(index, 0.0123, study.manifest())
    study.settle()
    for secret in (live.key.secret, live.sums_secret):
        assert any(secret in content for content in study.desk.everything_on_disk().values())
    study.send_change(2, 0.0123, study.manifest())
    study.settle()
    assert outcomes(study)[0] == "committed"
    study.settle(seconds=1.0)
    check_nothing_is_left(study, live, raw)


def check_nothing_is_left(study: SmallStudy, live: LiveRound, raw: bytes) -> None:
    """Byte by byte: the database, its log, and every blob."""
    assert study.store.updates.partials(TASK, 1) == []
    files = study.desk.everything_on_disk()
    assert {"aggregator.db", "aggregator.db-wal"} <= set(files)
    for path, content in files.items():
        assert live.key.secret not in content, path
        assert live.sums_secret is not None
        assert live.sums_secret not in content, path
        if not path.startswith(("blobs/params", "aggregator.db-")):
            assert raw[:16] not in content, path


def test_a_round_that_is_given_up_leaves_nothing_either(tmp_path: Path) -> None:
    study = plain_study(tmp_path, rule=Rule(name="median", mix_neighbours=False))
    (live,) = study.store.rounds.live()
    raw = np.full(40, 0.0123, "<f4").tobytes()
    study.plain_round([0.0123, 0.0123])
    assert any("segment" in path for path in study.desk.everything_on_disk())
    study.let_the_round_end()
    study.settle(seconds=1.0)
    check_nothing_is_left(study, live, raw)


def check_the_sums_of_a_closed_asynchronous_round_are_gone(folder: Path) -> None:
    study = plain_study(folder, asynchronous=Asynchronous(maximum_staleness=3))
    (live,) = study.store.rounds.live()
    study.plain_round([1.0, 1.0, 1.0])
    assert study.order("pause_now") == "done"
    study.settle(seconds=1.0)
    files = study.desk.everything_on_disk()
    assert any(live.key.secret in content for content in files.values())  # late updates will still count
    assert live.sums_secret is not None
    assert [path for path, content in files.items() if live.sums_secret in content] == []
    assert all(one.sums_secret is None for one in study.store.rounds.live())


def test_the_sums_of_an_asynchronous_task_are_gone_though_its_keys_live_on(tmp_path: Path) -> None:
    check_the_sums_of_a_closed_asynchronous_round_are_gone(tmp_path)


def test_a_store_that_keeps_the_secret_of_sums_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = broken_copy("aggregator.store.rounds", (".values(**closed, sums_secret=None)", ".values(**closed)"))
    monkeypatch.setattr("aggregator.store.rounds.Rounds.close", copy.Rounds.close)
    with pytest.raises(AssertionError):
        check_the_sums_of_a_closed_asynchronous_round_are_gone(tmp_path)


# Robust rules.


def test_a_robust_rule_gets_every_single_update_and_the_outlier_counts_for_nothing(tmp_path: Path) -> None:
    study = plain_study(tmp_path, rule=Rule(name="median", mix_neighbours=False))
    study.plain_round([0.25, 0.5, -100.0])
    assert "sum" not in study.desk.blobs.kinds
    assert number(study, 1) == 0.25
    (first, _) = study.store.rounds.history(TASK)
    assert (first.metrics["rule"], first.metrics["arrived"]) == ("median", 3)


def test_kept_updates_survive_a_crash_before_they_are_combined(tmp_path: Path) -> None:
    study = plain_study(tmp_path, rule=Rule(name="median", mix_neighbours=False))
    manifest = study.manifest()
    study.plain_round([0.25, 0.5])
    study.crash()
    study.start()
    study.send_change(2, 0.75, manifest)
    study.settle()
    assert number(study, 1) == 0.5


@pytest.mark.parametrize("rule", ["median", "mean"])
def test_damage_on_the_disk_gives_the_round_up_and_stops_nobody(tmp_path: Path, rule: Any) -> None:
    one = small_task(controls=False, population=None, rule=Rule(name=rule, mix_neighbours=False), goal=4)
    study = plain_study(tmp_path, one, small_task(controls=False, population=None, name="other"))
    study.plain_round([0.25, 0.5, 0.75])
    for path in (tmp_path / "blobs" / ("sum" if rule == "mean" else "segment")).iterdir():
        path.write_bytes(bytes(len(path.read_bytes())))
    study.plain_round([0.5, 0.5, 0.5], task="other")
    study.let_the_round_end()
    assert outcomes(study) == ["aborted", "open"]
    assert "damaged" in study.store.rounds.history(TASK)[0].reason
    study.plain_round([0.5, 0.5, 0.5], task="other")
    assert study.runner("other").state.committed == 2
    assert study.noted("degraded") == []
    study.plain_round([0.5, 0.5, 0.5, 0.5])
    assert number(study, 1) == 0.5


# Asynchronous rounds.


def buffered(**changes: Any) -> Any:
    settings: dict[str, Any] = {
        "rounds": 10,
        "goal": 2,
        "minimum_cohort": 2,
        "asynchronous": Asynchronous(maximum_staleness=2),
    }
    return small_task(controls=False, population=None, **{**settings, **changes})


def test_a_late_update_counts_less_in_the_round_that_is_open(tmp_path: Path) -> None:
    study = plain_study(tmp_path, buffered())
    first = study.manifest()
    assert first.maximum_staleness == 2
    study.plain_round([1.0, 1.0])
    study.send_change(2, 0.5, first)
    study.send_change(3, 0.25, study.manifest())
    study.settle()
    assert outcomes(study) == ["committed", "committed", "open"]
    weight = (1 + 1) ** -0.5
    np.testing.assert_allclose(study.params(2), 1.0 + (0.25 + weight * 0.5) / 2, rtol=1e-6)
    (_, second, _) = study.store.rounds.history(TASK)
    assert second.metrics["staleness"] == {"0": 1, "1": 1}


def test_an_update_too_stale_is_refused_and_the_key_is_gone(tmp_path: Path) -> None:
    study = plain_study(tmp_path, buffered())
    first = study.manifest()
    for _ in range(3):
        assert first.round >= study.manifest().round - 2
        study.plain_round([1.0, 1.0])
    assert study.manifest().round == 4
    assert {one.number for one in study.store.rounds.live()} == {2, 3, 4}
    study.send_change(4, 1.0, first)
    study.settle()
    refused = [one for one in study.desk.said() if isinstance(one, NackMsg)]
    assert [(one.device, one.reason) for one in refused] == [("watch-4", RefusalReason.ROUND_CLOSED)]


def test_a_buffer_that_does_not_fill_waits_instead_of_giving_up(tmp_path: Path) -> None:
    study = plain_study(tmp_path, buffered())
    study.plain_round([1.0])
    before = study.manifest()
    study.let_the_round_end()
    after = study.manifest()
    assert after.round == before.round == 1
    assert after.deadline_s > before.deadline_s
    assert after.recipient == before.recipient
    study.send_change(1, 1.0, before)
    study.settle()
    assert outcomes(study) == ["committed", "open"]


# Going back.


def test_a_rollback_makes_a_new_version_of_an_old_one_and_gives_the_open_round_up(tmp_path: Path) -> None:
    study = plain_study(tmp_path)
    study.plain_round([1.0, 1.0, 1.0])
    study.plain_round([2.0, 2.0, 2.0])
    study.send_change(0, 5.0, study.manifest())
    study.settle()
    assert study.order("rollback", "1") == "done"
    assert number(study, 3) == number(study, 1) == 1.0
    record = study.store.models.record(TASK, 3)
    assert (record.origin, record.parent, record.metrics) == ("rollback", 1, {"instead_of": 2})
    assert outcomes(study) == ["committed", "committed", "aborted", "open"]
    assert study.manifest().model_digest == record.digest
    study.plain_round([1.0, 1.0, 1.0])
    assert number(study, 4) == 2.0


def check_no_update_from_before_a_rollback_counts(folder: Path) -> None:
    study = plain_study(folder, buffered())
    before = study.manifest()
    study.plain_round([1.0, 1.0])
    second = study.manifest()
    assert study.order("rollback", "0") == "done"
    for index, manifest in ((2, before), (3, second)):
        study.send_change(index, 7.0, manifest)
    study.settle()
    refused = [one.reason for one in study.desk.said() if isinstance(one, NackMsg)]
    assert refused == [RefusalReason.ROUND_CLOSED] * 2
    study.plain_round([0.5, 0.5])
    assert number(study, study.state.version) == 0.5


def test_after_a_rollback_no_stale_update_from_before_it_counts(tmp_path: Path) -> None:
    check_no_update_from_before_a_rollback_counts(tmp_path)


def test_a_runner_that_keeps_keys_over_a_rollback_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = broken_copy("aggregator.round_rows", ("0 if is_over or rolled_back else", "0 if is_over else"))
    monkeypatch.setattr(task_runner, "RoundRows", rows.RoundRows)
    with pytest.raises(AssertionError):
        check_no_update_from_before_a_rollback_counts(tmp_path)


def test_a_rollback_while_paused_is_announced(tmp_path: Path) -> None:
    study = plain_study(tmp_path)
    study.plain_round([1.0, 1.0, 1.0])
    assert study.order("pause_now") == "done"
    assert study.manifest().status == "paused"
    assert study.order("rollback", "0") == "done"
    assert (study.manifest().status, study.manifest().model_digest) == ("paused", digest_of(study.params(0)))
    assert study.order("resume") == "done"
    assert study.manifest().status == "open"
    assert study.manifest().model_digest == digest_of(study.params(0))


# Validation.


class Likes:
    """A judge whose loss is the distance of the first parameter from a number."""

    def __init__(self, best: float) -> None:
        self.best, self.judged = best, 0

    def judge(self, shared_params: np.ndarray) -> Judgement:
        self.judged += 1
        return Judgement(abs(float(shared_params[0]) - self.best) + 0.1, 5, 10)


class Fails:
    def judge(self, shared_params: np.ndarray) -> Judgement:
        raise GraphError("the runtime failed")


def validated(folder: Path, judge: Any, **changes: Any) -> SmallStudy:
    """A study whose models are judged; the set itself is the judge's business."""
    with judged_by(judge):
        study = plain_study(folder, **changes)
    runner = study.runner()
    runner._maker._config = with_fields(runner.config, validation=Validation(data="unused", margin=0.1))
    return study


def test_a_model_that_is_worse_is_rejected_and_three_in_a_row_pause_the_task(tmp_path: Path) -> None:
    study = validated(tmp_path, Likes(1.0))
    study.plain_round([1.0, 1.0, 1.0])
    assert outcomes(study) == ["committed", "open"]
    assert study.store.models.record(TASK, 1).metrics["validation_loss"] == pytest.approx(0.1)
    for _ in range(3):
        study.plain_round([5.0, 5.0, 5.0])
    assert outcomes(study) == ["committed", "rejected", "rejected", "rejected"]
    assert study.state.phase is Phase.PAUSED
    assert "3 rounds in a row came to nothing" in study.state.reason
    assert (study.state.version, number(study, 1)) == (1, 1.0)
    manifest = study.manifest()
    assert (manifest.status, manifest.model_digest) == ("paused", digest_of(study.params(1)))
    assert len(study.store.models.records(TASK)) == 2
    reason = study.store.rounds.history(TASK)[-1].reason
    assert "would rise from 0.1 to 5.1" in reason


def test_a_good_round_between_bad_ones_begins_the_count_anew(tmp_path: Path) -> None:
    study = validated(tmp_path, Likes(2.0), rounds=20)
    for change in (-1.0, -1.0, 1.0, -1.0, -1.0):
        study.plain_round([change] * 3)
    assert outcomes(study) == ["rejected", "rejected", "committed", "rejected", "rejected", "open"]


def test_a_model_that_cannot_be_measured_is_a_failed_round(tmp_path: Path) -> None:
    study = validated(tmp_path, Fails())
    study.plain_round([1.0, 1.0, 1.0])
    assert outcomes(study) == ["aborted", "open"]
    assert "cannot be measured on the validation set: the runtime failed" in study.store.rounds.history(TASK)[0].reason


def test_the_model_before_is_measured_once(tmp_path: Path) -> None:
    judge = Likes(9.0)
    study = validated(tmp_path, judge)
    for _ in range(2):
        study.plain_round([1.0, 1.0, 1.0])
    assert judge.judged <= 4


# How much is kept.


def test_old_versions_are_pruned_but_for_tagged_ones_and_the_first(tmp_path: Path) -> None:
    study = plain_study(tmp_path, rounds=KEEP_VERSIONS + 20, goal=1, minimum_cohort=1)
    for version in range(1, KEEP_VERSIONS + 6):
        study.send_change(0, 0.25, study.manifest())
        study.settle(seconds=0.3)
        assert study.state.version == version
        if version == 2:
            tag(study.store, TASK, "released", 2)
    kept = [one.version for one in study.store.models.records(TASK) if one.params is not None]
    newest = KEEP_VERSIONS + 5
    assert kept == [0, 2, *range(newest - KEEP_VERSIONS + 1, newest + 1)]
    assert number(study, 2) == 0.5
    # Sums go when the sweep comes by; their key is gone already.
    stored = {blob.name for blob in study.desk.blobs.stored() if not blob.name.startswith("sum/")}
    assert stored == {name for name in named_blobs(study.store.database) if not name.startswith("sum/")}
    # One that was pruned cannot be gone back to, and says so; the task goes on.
    outcome = study.order("rollback", "1")
    assert "pruned" in outcome
    assert study.state.phase is Phase.OPEN
    assert study.noted("degraded") == []
    assert study.order("rollback", "2") == "done"
    assert number(study, study.state.version) == 0.5


# Steering.


def test_the_probability_follows_arrivals_and_is_stored(tmp_path: Path) -> None:
    study = plain_study(tmp_path, participation=Participation(probability=0.25, steer=True, over_selection=1.5))
    assert study.manifest().participation_probability == 0.25
    for index in range(3):
        study.send_change(index, 1.0, study.manifest())
    study.desk.clock.time_s += 50.0
    study.settle()
    second = study.manifest()
    assert second.round == 2
    assert second.participation_probability > 0.25
    study.crash()
    study.start()
    assert study.manifest().participation_probability == second.participation_probability


def test_two_runners_of_one_task_cannot_both_move_it_on(tmp_path: Path) -> None:
    """A coordinator that was out for longer than its lease does nothing with what it remembers."""
    study = plain_study(tmp_path)
    old = study.runner()
    study.desk.services["old"] = study.desk.services.pop(AGGREGATOR)
    study.desk.transport("old").drop("out of reach")
    old_service = study.desk.services.pop("old")
    study.desk.clock.time_s += 20.0
    study.desk.start("second", coordinates=True)
    study.desk.settle()
    second = study.desk.services["second"].coordinator
    assert second is not None
    assert second.tasks[TASK].state.number == 1
    for index in range(3):
        study.send_change(index, 1.0, study.manifest())
    study.desk.let_pass(0.6, step_s=0.3)
    assert second.tasks[TASK].state.number == 2
    published = len(study.broker.published)
    for _ in range(3):
        study.desk.clock.time_s += 2.0
        old_service.step()
    assert old_service.coordinator is not None
    assert old.state.number == 1
    assert study.store.tasks.get(TASK).state.number == 2
    assert outcomes(study) == ["committed", "open"]
    assert len(study.broker.published) == published
    old_service.store.close()
