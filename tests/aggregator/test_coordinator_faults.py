"""What a coordinator owes when something is gone: keys leave the disk, other tasks go on, receipted updates count."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregator.adapters.fsspec_blobs import FsspecBlobs
from aggregator.adapters.local_blobs import LocalBlobs
from aggregator.assembly import bundle_of
from aggregator.errors import BlobError, DatabaseError, MissingBlobError
from aggregator.rounds import Phase
from aggregator.task_file import Asynchronous, Participation, Rule, Server
from aggregator.task_runner import TaskRunner
from tests.aggregator.desk import built_with
from tests.aggregator.small_study import SmallStudy, plain_study, small_task
from tests.enrolments import broken_copy
from tests.fl_protocol.examples import TASK


def two_tasks(folder: Path, **changes: Any) -> SmallStudy:
    """The first one's model is going to be lost."""
    return plain_study(
        folder, *(small_task(controls=False, population=None, name=name, **changes) for name in (TASK, "other"))
    )


def model_file(study: SmallStudy, version: int = 0) -> Path:
    return study.folder / "blobs" / str(study.store.models.record(TASK, version).params)


def outcomes(study: SmallStudy) -> list[str]:
    return [one.outcome for one in study.store.rounds.history(TASK)]


# Keys of rounds that an order, or a start, closes.


def check_no_key_outlives(folder: Path, order: str) -> None:
    study = plain_study(folder)
    study.settle(seconds=3.0)
    (live,) = study.store.rounds.live()
    study.plain_round([1.0, 1.0])
    assert any(live.key.secret in content for content in study.desk.everything_on_disk().values())
    assert study.order(order) == "done"
    study.settle(seconds=1.0)
    files = study.desk.everything_on_disk()
    assert {"aggregator.db", "aggregator.db-wal"} <= set(files)
    assert [path for path, content in files.items() if live.key.secret in content] == []


@pytest.mark.parametrize("order", ["abort", "pause_now", "rollback"])
def test_the_key_of_a_round_that_an_order_closes_leaves_the_disk(tmp_path: Path, order: str) -> None:
    if order != "rollback":
        check_no_key_outlives(tmp_path, order)
        return
    study = plain_study(tmp_path)
    study.plain_round([1.0, 1.0, 1.0])
    study.settle(seconds=3.0)
    (live,) = study.store.rounds.live()
    assert study.order("rollback", "0") == "done"
    study.settle(seconds=1.0)
    assert not any(live.key.secret in content for content in study.desk.everything_on_disk().values())


@pytest.mark.parametrize("order", ["abort", "pause_now"])
def test_a_coordinator_that_leaves_keys_in_the_log_is_caught(tmp_path: Path, order: str) -> None:
    copy = broken_copy("aggregator.coordinator", ("self._unerased |= before != _what_keys_depend_on(runner)", "pass"))
    with built_with(Coordinator=copy.Coordinator), pytest.raises(AssertionError):
        check_no_key_outlives(tmp_path, order)


def check_no_key_outlives_an_outage(folder: Path) -> None:
    study = plain_study(folder)
    study.desk.start("ingest")
    study.desk.let_pass(25.0)
    (live,) = study.store.rounds.live()
    transport = study.desk.transport("aggregator")
    transport.drop("the broker is away")
    for index in range(3):
        study.send_change(index, 1.0, study.manifest())
    study.desk.let_pass(10.0)
    transport.open()
    study.desk.let_pass(40.0)
    assert outcomes(study)[0] == "committed"
    assert not any(live.key.secret in content for content in study.desk.everything_on_disk().values())


def test_the_key_of_a_round_that_closes_when_devices_can_reach_us_again_leaves_the_disk(tmp_path: Path) -> None:
    check_no_key_outlives_an_outage(tmp_path)


def test_a_coordinator_that_looks_after_the_log_in_its_usual_round_only_is_caught(tmp_path: Path) -> None:
    copy = broken_copy("aggregator.coordinator", ("self._advance(runner, Reachable())", "runner.advance(Reachable())"))
    with built_with(Coordinator=copy.Coordinator), pytest.raises(AssertionError):
        check_no_key_outlives_an_outage(tmp_path)


# Pace steering.


def steered(**changes: Any) -> Any:
    given = {"participation": Participation(probability=0.01, steer=True), "rounds": 20, **changes}
    return small_task(controls=False, population=None, **given)


def probabilities(study: SmallStudy) -> list[float]:
    return [one.probability for one in study.store.rounds.history(TASK)]


def test_a_probability_at_which_too_few_come_recovers(tmp_path: Path) -> None:
    study = plain_study(tmp_path, steered())
    for _ in range(9):
        study.plain_round([1.0])
        study.let_the_round_end()
    assert set(outcomes(study)[:-1]) == {"aborted"}
    found = probabilities(study)
    assert found == sorted(found)
    assert found[0] == 0.01
    assert found[-1] == study.manifest().participation_probability > 0.5


def test_a_buffer_that_does_not_fill_raises_the_probability_too(tmp_path: Path) -> None:
    buffered = Asynchronous(maximum_staleness=2)
    study = plain_study(tmp_path, steered(goal=2, minimum_cohort=2, asynchronous=buffered))
    before = study.manifest()
    study.let_the_round_end()
    assert study.manifest().round == before.round
    assert study.manifest().participation_probability == 2 * before.participation_probability
    study.crash()
    study.start()
    assert study.manifest().participation_probability == 2 * before.participation_probability


def test_rounds_that_an_order_or_a_failure_ends_steer_nothing(tmp_path: Path) -> None:
    study = plain_study(tmp_path, steered(goal=4))
    assert study.order("pause_now") == "done"
    assert study.order("resume") == "done"
    study.plain_round([1.0, 1.0, 1.0])
    for path in (tmp_path / "blobs" / "sum").iterdir():
        path.write_bytes(bytes(len(path.read_bytes())))
    study.let_the_round_end()
    reasons = [one.reason for one in study.store.rounds.history(TASK)]
    assert "paused by the operator" in reasons[0]
    assert "could not be combined" in reasons[1]
    assert probabilities(study) == [0.01] * 3


def test_a_task_that_is_not_steered_keeps_its_probability(tmp_path: Path) -> None:
    study = plain_study(tmp_path, steered(participation=Participation(probability=0.01, steer=False)))
    study.let_the_round_end()
    assert probabilities(study) == [0.01, 0.01]


# Blobs that are gone.


@pytest.mark.parametrize(("order", "phase"), [("abort", Phase.ABORTED), ("pause_now", Phase.PAUSED)])
@pytest.mark.parametrize("restarts", [True, False])
def test_a_task_whose_model_is_gone_can_be_given_up_and_others_go_on(
    tmp_path: Path, order: str, phase: Phase, *, restarts: bool
) -> None:
    study = two_tasks(tmp_path)
    if restarts:
        study.crash()
    model_file(study).unlink()
    if restarts:
        study.start()
    assert study.order(order) == "done"
    study.settle(seconds=3.0)
    assert study.store.tasks.get(TASK).state.phase is phase
    assert study.store.rounds.live() == [one for one in study.store.rounds.live() if one.task == "other"]
    assert "was the folder moved" in study.noted("publish_failed")[0]["reason"]
    assert [one["order"] for one in study.noted("order_done")] == [order]
    study.plain_round([1.0, 1.0, 1.0], task="other")
    study.settle(seconds=3.0)
    assert study.runner("other").state.committed == 1


def test_what_could_not_be_published_is_published_when_the_model_is_there_again(tmp_path: Path) -> None:
    study = two_tasks(tmp_path)
    path = model_file(study)
    hidden = path.rename(path.with_suffix(".away"))
    assert study.order("pause_now") == "done"
    assert study.manifest().status == "open"
    hidden.rename(path)
    study.settle(seconds=3.0)
    assert study.manifest().status == "paused"
    assert len(study.noted("recovered")) == len(study.noted("degraded")) == 1


def test_an_order_that_needs_a_model_that_is_gone_is_refused_and_others_go_on(tmp_path: Path) -> None:
    study = two_tasks(tmp_path)
    assert study.order("pause_now") == "done"
    model_file(study).unlink()
    assert "was the folder moved" in study.order("resume")
    assert study.store.tasks.get(TASK).state.phase is Phase.PAUSED
    assert study.order("pause_now", task="other") == "done"


def test_a_task_whose_newest_model_is_gone_goes_on_from_an_earlier_one(tmp_path: Path) -> None:
    study = two_tasks(tmp_path)
    study.plain_round([1.0, 1.0, 1.0])
    study.crash()
    model_file(study, 1).unlink()
    study.start()
    assert study.order("rollback", "0") == "done"
    study.plain_round([0.5, 0.5, 0.5])
    np.testing.assert_array_equal(study.params(3), np.full(40, 0.5, np.float32))


def test_a_clock_that_is_set_reaches_all_tasks_though_ones_model_is_gone(tmp_path: Path) -> None:
    study = two_tasks(tmp_path)
    coordinator = study.service.coordinator
    assert coordinator is not None
    study.crash()
    model_file(study).unlink()
    study.start()
    coordinator = study.service.coordinator
    assert coordinator is not None
    offset = [0.0]
    coordinator._monotonic_s = lambda: study.desk.clock.time_s - offset[0]
    offset[0] = 3600.0
    study.desk.clock.time_s += 3600.0
    study.settle(seconds=3.0)
    assert len(study.noted("clock_jumped")) == 1
    for task in (TASK, "other"):
        state = study.store.tasks.get(task).state
        assert (state.number, state.phase) == (1, Phase.OPEN)
        assert state.deadline_s > study.desk.clock.time_s


def remove(path: Path) -> None:
    path.unlink()


def damage(path: Path) -> None:
    path.write_bytes(bytes(len(path.read_bytes())))


@pytest.mark.parametrize("rule", ["mean", "median"])
@pytest.mark.parametrize("harm", [remove, damage])
def test_a_round_whose_updates_are_gone_from_the_disk_is_given_up(
    tmp_path: Path, rule: Any, harm: Callable[[Path], None]
) -> None:
    one = small_task(controls=False, population=None, rule=Rule(name=rule, mix_neighbours=False), goal=4)
    study = plain_study(tmp_path, one)
    study.plain_round([0.25, 0.5, 0.75])
    for path in (tmp_path / "blobs" / ("sum" if rule == "mean" else "segment")).iterdir():
        harm(path)
    study.let_the_round_end()
    assert outcomes(study) == ["aborted", "open"]
    assert "could not be combined" in study.store.rounds.history(TASK)[0].reason
    assert study.noted("degraded") == []


def test_updates_whose_store_cannot_be_reached_are_waited_for(tmp_path: Path) -> None:
    study = plain_study(tmp_path)
    study.plain_round([1.0, 1.0])
    folder = tmp_path / "blobs"
    study.send_change(2, 1.0, study.manifest())
    runner = study.runner()
    outcome = runner._maker.outcome

    def unmounted(number: int, **given: Any) -> Any:
        away = folder.rename(tmp_path / "away")
        folder.mkdir()
        try:
            return outcome(number, **given)
        finally:
            folder.rmdir()
            away.rename(folder)
            runner._maker.outcome = outcome  # type: ignore[method-assign]

    runner._maker.outcome = unmounted  # type: ignore[method-assign]
    study.settle(seconds=3.0)
    assert len(study.noted("degraded")) == 1
    assert outcomes(study) == ["committed", "open"]


@pytest.mark.parametrize("harm", [remove, damage])
def test_the_finished_models_average_ends_at_a_version_that_is_lost(
    tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    study = plain_study(tmp_path, rounds=3, server=Server(average_last=5))
    study.plain_round([1.0] * 3)
    study.plain_round([1.0] * 3)
    harm(model_file(study, 1))
    study.plain_round([1.0] * 3)
    assert study.store.tasks.get(TASK).state.phase is Phase.FINISHED
    np.testing.assert_allclose(study.params(4), (3.0 + 2.0) / 2)


@pytest.mark.parametrize("kind", ["folder", "object store"])
def test_a_blob_that_is_missing_is_told_from_a_store_that_is(tmp_path: Path, kind: str) -> None:
    blobs = LocalBlobs(tmp_path) if kind == "folder" else FsspecBlobs(f"memory://missing-{tmp_path.name}")
    name = blobs.put(b"whole", kind="sum")
    blobs.put(b"another", kind="sum")
    blobs.delete([name])
    with pytest.raises(MissingBlobError):
        blobs.get(name)
    elsewhere = LocalBlobs(tmp_path / "empty") if kind == "folder" else FsspecBlobs("memory://nothing-is-here")
    with pytest.raises(BlobError) as caught:
        elsewhere.get(name)
    assert not isinstance(caught.value, MissingBlobError)


# Two of one name.


def check_no_receipted_update_is_left_out(folder: Path) -> None:
    """A second coordinator of the same name opens the round that the first one combines, and an update comes."""
    study = plain_study(folder, goal=3, minimum_cohort=2)
    study.desk.start("ingest")
    study.desk.let_pass(25.0)
    runner = study.runner()
    outcome = runner._maker.outcome

    def meanwhile(number: int, **given: Any) -> Any:
        runner._maker.outcome = outcome  # type: ignore[method-assign]
        found = outcome(number, **given)
        stored = study.store.tasks.get(TASK)
        TaskRunner(stored, bundle=bundle_of(study.store, stored), judge=None, ports=runner._ports).refresh()
        for index in (3, 4):
            study.send_change(index, 0.5, study.manifest())
        for _ in range(4):
            study.desk.services["ingest"].step()
        return found

    runner._maker.outcome = meanwhile  # type: ignore[method-assign]
    for index in range(3):
        study.send_change(index, 0.5, study.manifest())
    study.desk.let_pass(4.0)
    first = study.store.rounds.history(TASK)[0]
    assert first.outcome == "committed"
    assert first.arrived > 3
    assert first.metrics["arrived"] == first.arrived, "a receipted update was left out"
    assert "another coordinator runs under the name aggregator" in study.noted("degraded")[0]["reason"]
    assert len(study.store.models.records(TASK)) == 2


def test_an_update_that_is_receipted_while_its_round_is_combined_twice_is_not_left_out(tmp_path: Path) -> None:
    check_no_receipted_update_is_left_out(tmp_path)


def test_a_runner_that_commits_without_counting_again_is_caught(tmp_path: Path) -> None:
    copy = broken_copy(
        "aggregator.task_runner", ('if outcome != "closing" or counted != combined + left_out:', "if False:")
    )
    with built_with(TaskRunner=copy.TaskRunner), pytest.raises(AssertionError, match="a receipted update was left out"):
        check_no_receipted_update_is_left_out(tmp_path)


# Orders on a state that is not up to date.


def check_an_order_that_does_nothing_is_refused(folder: Path) -> None:
    study = plain_study(folder)
    runner = study.runner()
    commit = runner._commit

    def lost(*arguments: Any, **fields: Any) -> None:
        commit(*arguments, **fields)
        runner._commit = commit  # type: ignore[method-assign]
        # What the transaction did is durable, and nobody here knows: as it is before `_commit` ends.
        runner._state = before
        raise DatabaseError("the connection was lost after the commit")

    before = study.state
    runner._commit = lost  # type: ignore[method-assign]
    assert study.store.tasks.ask(TASK, "pause_now", now_s=study.desk.clock.now_s())
    assert study.store.tasks.ask(TASK, "pause", now_s=study.desk.clock.now_s())
    study.settle(seconds=5.0)
    assert [one.outcome for one in study.store.tasks.orders(TASK)] == [
        "done",
        "the task is paused already: paused by the operator",
    ]


def test_an_order_that_finds_the_task_elsewhere_is_judged_by_where_it_is(tmp_path: Path) -> None:
    check_an_order_that_does_nothing_is_refused(tmp_path)


def test_a_coordinator_that_judges_by_what_it_remembers_is_caught(tmp_path: Path) -> None:
    copy = broken_copy("aggregator.coordinator", ("runner.look()", "pass"))
    with built_with(Coordinator=copy.Coordinator), pytest.raises(AssertionError):
        check_an_order_that_does_nothing_is_refused(tmp_path)
