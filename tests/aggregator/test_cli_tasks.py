"""``covey-aggregator task`` and ``status``: tasks are created once, shown whole, and ordered about; broken copies are
caught.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from aggregator.operator_orders import PATIENCE_S, Answer, give_order
from aggregator.overview import overview
from aggregator.shards import LEASE_S
from aggregator.store.aggregator_store import AggregatorStore
from aggregator.store.models import NewModel
from firmware_sim.virtual_broker import VirtualTransport
from fl_protocol.bundle import open_bundle
from fl_protocol.record_sums import SUM_DIVISOR
from fl_protocol.signing import public_key_from_hex
from tests.aggregator.operator_desk import PUBLISHER, TRAINING, Operator, Running, one_sentence, operator
from tests.contracts.blob_stores import s3_bucket, s3_server
from tests.contracts.databases import PostgresqlServer
from tests.enrolments import broken_copy

__all__ = ["operator", "s3_bucket", "s3_server"]


def set_up(operator: Operator, *files: str) -> None:
    operator.says("init", "CONFIG")
    for name in files or ("watch.toml",):
        operator.says("task", "create", f"./{name}", "CONFIG")


def serving(operator: Operator, *files: str) -> Running:
    """The service runs, and takes a step whenever a command waits for it."""
    set_up(operator, *files)
    running = Running(operator)
    operator.patch.setattr("time.sleep", lambda _seconds: running.steps(1))
    return running


# Creating.


def test_a_task_is_created_listed_and_shown(operator: Operator) -> None:
    operator.says("init", "CONFIG")
    out = operator.says("task", "create", "./watch.toml", "CONFIG")
    assert out == "task watch (train) is created; rounds open while covey-aggregator run is running\n"
    assert operator.json("task", "create", "./scales.toml", "CONFIG")["kind"] == "statistics"
    assert [(one["name"], one["phase"]) for one in operator.json("task", "list", "CONFIG")] == [
        ("scales", "idle"),
        ("watch", "idle"),
    ]
    for words in ("watch", "train", "0 of 3"):
        assert words in operator.says("task", "list", "CONFIG")
    out = operator.says("task", "show", "scales", "CONFIG")
    for words in ("statistics", "plan.features.0.name", "acceleration x", "0 of 3", "minimum_cohort"):
        assert words in out
    shown = operator.json("task", "show", "watch", "CONFIG")
    assert shown["settings"]["plan"]["noise_multiplier"] == 8.0
    assert (shown["rounds"], shown["orders"]) == ([], [])


@pytest.mark.parametrize(
    ("old", "new", "word"),
    [
        ("rounds = 3", "rounds = 0", "rounds"),
        ("rounds = 3", "roundz = 3", "roundz"),
        ("goal = 3", "goal = 1", "minimum_cohort"),
        ("noise_multiplier = 8.0", "noise_multiplier = -1.0", "noise_multiplier"),
        ("noise_multiplier = 8.0", "", "noise_multiplier"),
        ("sampling_rate = 1.0", "sampling_rate = 1.5", "sampling_rate"),
        ("l2_norm_clip = 0.5", "l2_norm_clip = inf", "l2_norm_clip"),
        ("round_duration_s = 60.0", "round_duration_s = inf", "round_duration_s"),
        ('name = "watch"', 'name = "Watch 1"', "name"),
        ('name = "watch"', 'name = "watch"\nkind = "dance"', "dance"),
        ("[plan]", "[plan", "watch.toml"),
        ("[plan]", '[validation]\ndata = "none.npz"\n[plan]', "validation.data"),
        ("model.covey", "nothing.covey", "nothing.covey"),
        (
            "[plan]",
            '[rule]\nname = "median"\nbyzantine_fraction = 0.0\nmemory_bytes = 1000\n[plan]',
            "rule.memory_bytes is 1000",
        ),
        ("[plan]", '[rule]\nname = "krum"\n[plan]', "minimum_cohort of at least"),
    ],
)
def test_a_wrong_key_in_a_task_file_is_named_and_nothing_is_created(
    operator: Operator, old: str, new: str, word: str
) -> None:
    operator.says("init", "CONFIG")
    operator.edit("watch.toml", old, new)
    one_sentence(operator.run("task", "create", "./watch.toml", "CONFIG"), 2, word)
    assert operator.json("task", "list", "CONFIG") == []


def test_a_task_file_or_bundle_that_cannot_be_used_is_one_sentence(operator: Operator) -> None:
    set_up(operator, "watch.toml")
    one_sentence(operator.run("task", "create", "./none.toml", "CONFIG"), 2, "none.toml")
    one_sentence(operator.run("task", "create", "./watch.toml", "CONFIG"), 3, "there is a task watch already")
    operator.write("more.toml", TRAINING.replace('"watch"', '"more"\nstart_from = "nothing"'))
    one_sentence(operator.run("task", "create", "./more.toml", "CONFIG"), 3, "there is no task nothing")
    raw = bytearray((operator.folder / "model.covey").read_bytes())
    raw[3000] ^= 0xFF
    (operator.folder / "model.covey").write_bytes(bytes(raw))
    operator.write("more.toml", TRAINING.replace('"watch"', '"more"'))
    one_sentence(operator.run("task", "create", "./more.toml", "CONFIG"), 4, "bundle")


@pytest.mark.parametrize("command", ["show", "pause", "resume"])
def test_a_task_that_there_is_not_is_one_sentence(operator: Operator, command: str) -> None:
    set_up(operator)
    one_sentence(operator.run("task", command, "watsh", "CONFIG"), 3, "there is no task watsh", "task list")


# Orders.


def test_an_order_is_left_at_once_when_nobody_coordinates(operator: Operator) -> None:
    set_up(operator)

    def no_waiting(_seconds: float) -> None:
        raise AssertionError("nobody will answer")

    operator.patch.setattr("time.sleep", no_waiting)
    out = operator.says("task", "pause", "watch", "CONFIG")
    assert out.startswith("watch: left for the coordinator, which is not running")
    assert operator.json("task", "resume", "watch", "CONFIG")["state"] == "left"
    assert [one["name"] for one in operator.json("task", "show", "watch", "CONFIG")["orders"]] == ["pause", "resume"]
    assert "waits" in operator.says("task", "show", "watch", "CONFIG")


def test_a_running_coordinator_carries_orders_out(operator: Operator) -> None:
    running = serving(operator)
    assert operator.says("task", "pause", "watch", "CONFIG") == "watch pauses when its open round has closed\n"
    one_sentence(operator.run("task", "pause", "watch", "CONFIG"), 1, "watch: the task pauses already")
    running.round("watch")
    shown = operator.json("task", "show", "watch", "CONFIG")
    assert (shown["state"]["phase"], shown["state"]["committed"]) == ("paused", 1)
    assert [(one["outcome"], one["arrived"]) for one in shown["rounds"]] == [("committed", 3)]
    assert operator.says("task", "resume", "watch", "CONFIG") == "watch goes on\n"
    assert operator.says("task", "pause", "watch", "CONFIG", "--now") == "watch is paused\n"
    shown = operator.json("task", "show", "watch", "CONFIG")
    assert [one["outcome"] for one in shown["rounds"]] == ["committed", "aborted"]
    assert "paused by the operator before its deadline" in shown["rounds"][1]["reason"]
    assert "round 2: paused by the operator" in operator.says("task", "show", "watch", "CONFIG")
    assert len(operator.json("task", "show", "watch", "CONFIG", "--last", "1")["rounds"]) == 1
    out = operator.says("task", "abort", "watch", "CONFIG", "--reason", "the strap was redesigned", "--yes")
    assert out == "watch is aborted\n"
    code, out, err = operator.run("task", "resume", "watch", "CONFIG", "--json")
    assert (code, msgspec.json.decode(out)["state"]) == (1, "refused")
    assert "the strap was redesigned" in err


@pytest.mark.parametrize(("answer", "phase"), [("n", "open"), ("", "open"), ("y", "aborted")])
def test_abort_asks_first(operator: Operator, answer: str, phase: str) -> None:
    serving(operator)
    operator.patch.setattr(sys, "stdin", io.StringIO(f"{answer}\n"))
    code, _, err = operator.run("task", "abort", "watch", "CONFIG", "--reason", "over")
    assert "Give watch up for good?" in err
    assert code == (0 if phase == "aborted" else 1)
    assert operator.json("task", "show", "watch", "CONFIG")["state"]["phase"] == phase


class Waiting:
    """A command's view of time; what happens while it sleeps is up to the test."""

    def __init__(self, store: AggregatorStore, meanwhile: Callable[[], None] = lambda: None) -> None:
        self.store, self.meanwhile, self.now_s, self.slept_s = store, meanwhile, 1000.0, 0.0
        store.leases.take({"coordinator"}, "aggregator", until_s=2000.0, now_s=1000.0)

    def sleep(self, seconds: float) -> None:
        self.slept_s += seconds
        self.meanwhile()

    def ask(self, give: Callable[..., Answer] = give_order) -> Answer:
        return give(
            self.store,
            "watch",
            "pause",
            actor="local:anna",
            now_s=lambda: self.now_s,
            monotonic_s=lambda: self.slept_s,
            sleep=self.sleep,
        )


def check_answers(operator: Operator, give: Callable[..., Answer]) -> None:
    store = operator.store()
    silent = Waiting(store)
    answer = silent.ask(give)
    assert answer.state == "left"
    assert "aggregator, which has not answered yet" in answer.reason
    assert silent.slept_s == pytest.approx(PATIENCE_S, abs=0.2)
    for outcome, state in (("done", "done"), ("the task is finished", "refused")):

        def carry_out(outcome: str = outcome) -> None:
            order = store.tasks.pending_orders()[-1]
            with store.database.transaction() as connection:
                store.tasks.order_done(connection, order.id, outcome=outcome, now_s=1001.0)

        answer = Waiting(store, carry_out).ask(give)
        assert (answer.state, answer.reason) == (state, "" if state == "done" else outcome)
    store.leases.release({"coordinator"}, "aggregator")
    late = Waiting(store)
    late.now_s = 3000.0  # the lease has run out
    assert "not running" in late.ask(give).reason
    assert late.slept_s == 0
    store.close()


def test_answers_are_told_as_they_are(operator: Operator) -> None:
    set_up(operator)
    check_answers(operator, give_order)


@pytest.mark.parametrize(
    "change",
    [
        ("is_done = found.outcome == DONE", "is_done = True"),
        ("if monotonic_s() >= ends_s:", "if True:"),
        ("if one.id == order)", ")"),
        ("if coordinator is None:", "if False:"),
    ],
)
def test_a_broken_copy_of_the_waiting_is_caught(operator: Operator, change: tuple[str, str]) -> None:
    set_up(operator)
    check_answers(operator, broken_copy("aggregator.operator_orders").give_order)
    broken = broken_copy("aggregator.operator_orders", change)
    with pytest.raises(AssertionError):
        check_answers(operator, broken.give_order)


# Results and status.


def test_statistics_are_shown_with_their_errors_and_scaling_constants(operator: Operator) -> None:
    running = serving(operator, "scales.toml")
    # 6,000 records in all; u is 0.25 everywhere and u squared 0.3125.
    values = np.array([2000.0, 500.0, 625.0], np.float32) / SUM_DIVISOR
    running.round("scales", values)
    (found,) = [one["result"] for one in operator.json("task", "show", "scales", "CONFIG")["rounds"] if one["result"]]
    assert found["updates"] == 3
    assert found["features"][0]["mean"]["value"] == pytest.approx(0.5)
    out = operator.says("task", "show", "scales", "CONFIG")
    for words in ("Result of round 1", "acceleration x (channel 0): mean", "0.5000 ± 0.0041", "Rescaling(scale="):
        assert words in out
    assert "in all 1 committed rounds" in out


def test_status_tells_tasks_processes_and_refusals(operator: Operator) -> None:
    running = serving(operator)
    running.round("watch", np.full(378, np.nan, np.float32))
    found = operator.json("status", "CONFIG")
    (task,) = found["tasks"]
    assert (task["phase"], task["round"], task["arrived"], task["goal"]) == ("open", 1, 0, 3)
    (process,) = found["workers"]
    assert (process["name"], process["coordinates"], process["shards"], process["state"]) == (
        "aggregator",
        True,
        64,
        "alive",
    )
    assert found["devices"] == 3
    assert found["degraded"] == []
    running.steps(6)  # counts are stored now and then
    assert operator.json("status", "CONFIG")["refused"] == {"not_finite": 3}
    out = operator.says("status", "CONFIG")
    for words in ("Tasks of clinic", "0 of 3", "coordinates", "registered names: 3", "refused: not finite: 3"):
        assert words in out


def test_status_names_what_does_not_work(operator: Operator) -> None:
    set_up(operator)
    store = operator.store()

    def degraded(now_s: float) -> list[str]:
        return overview(store, tenant="clinic", now_s=now_s).degraded

    nobody = degraded(1000.0)
    assert len(nobody) == 2
    assert "nobody coordinates" in nobody[0]
    assert "the uploads of 64 of 64 shards are taken by nobody" in nobody[1]
    running = Running(operator)
    assert degraded(running.now_s) == []
    transport = running.service.transport
    assert isinstance(transport, VirtualTransport)
    transport.drop("the broker went away")
    running.steps(1)
    assert degraded(running.now_s) == ["aggregator is not connected to the broker"]
    dead_s = running.now_s + LEASE_S + 60
    late = degraded(dead_s + 60)
    assert any("aggregator was last heard of" in one for one in late)
    assert any("round 1 of watch should have closed" in one for one in late)
    assert all("round 1 of watch" not in one for one in degraded(dead_s - 20))
    assert overview(store, tenant="clinic", now_s=dead_s + 2 * 86_400).workers == []
    running.service.stop()
    (stopped,) = overview(store, tenant="clinic", now_s=running.now_s).workers
    assert stopped.state == "stopped"
    assert not any("heard of" in one for one in degraded(running.now_s))
    store.close()


def test_status_misses_nobody_once_every_task_is_over(operator: Operator) -> None:
    running = serving(operator)
    operator.says("task", "abort", "watch", "CONFIG", "--reason", "over", "--yes")
    running.steps(6)
    running.service.stop()
    found = operator.json("status", "CONFIG")
    assert (found["tasks"][0]["phase"], found["degraded"]) == ("aborted", [])


def test_status_names_a_task_that_does_not_begin(operator: Operator) -> None:
    set_up(operator)
    store = operator.store()
    created_s = store.tasks.get("watch").created_s
    store.leases.take({"coordinator"}, "aggregator", until_s=created_s + 1000, now_s=created_s)

    def not_begun(now_s: float) -> bool:
        return any("has not begun" in one for one in overview(store, tenant="clinic", now_s=now_s).degraded)

    assert not not_begun(created_s + 5)
    assert not_begun(created_s + 60)
    store.leases.release({"coordinator"}, "aggregator")
    assert not not_begun(created_s + 60)  # nobody coordinates, which is told instead
    store.close()


def test_a_task_from_before_there_were_files_goes_on_once_it_has_one(operator: Operator) -> None:
    operator.says("init", "CONFIG")
    store = operator.store()
    origin = (operator.folder / "model.covey").read_bytes()
    bundle = open_bundle(origin, publisher=public_key_from_hex(PUBLISHER))
    about: dict[str, Any] = {"spec": "", "bundle": "", "validation": None, "probability": 1.0}
    first = store.models.prepare(NewModel(version=0, params=bundle.shared_params, origin="initial"))
    with store.database.transaction() as connection:
        store.tasks.create(connection, "watch", **about, graph_digest=bundle.graph_digest, now_s=0.0)
        store.models.add(connection, "watch", first, now_s=0.0)
    store.close()
    running = Running(operator)
    assert "task_unusable" in running.journal.names
    assert any("is from before tasks had files" in one for one in operator.json("status", "CONFIG")["degraded"])
    assert operator.json("model", "list", "watch", "CONFIG")[0]["record_epsilon"] == 0
    assert "from before tasks had files, has its file now" in operator.says("task", "create", "./watch.toml", "CONFIG")
    running.steps(2)
    assert operator.json("task", "show", "watch", "CONFIG")["state"]["phase"] == "open"
    assert running.journal.names.count("task_unusable") == 1


def test_a_reason_is_shown_as_it_is(operator: Operator) -> None:
    """Nothing in it is taken for markup."""
    set_up(operator)
    reason = "[bold]see /notes[/]"
    operator.says("task", "abort", "watch", "CONFIG", "--reason", reason, "--yes")
    running = Running(operator)
    assert reason in operator.says("task", "show", "watch", "CONFIG")
    assert f"watch is aborted: the operator aborted the task: {reason}" in operator.says("status", "CONFIG")
    running.service.stop()


def test_a_database_that_fails_is_one_sentence_wherever_it_is_read(operator: Operator) -> None:
    set_up(operator)
    (operator.folder / "aggregator.db").write_bytes(b"this is no database" * 100)
    commands: list[list[str]] = [["status"], ["task", "list"], ["task", "show", "watch"], ["model", "list", "watch"]]
    for command in commands:
        one_sentence(operator.run(*command, "CONFIG"), 3, "database")


def test_an_operators_day_on_postgresql_and_s3(
    operator: Operator, postgresql_server: PostgresqlServer, s3_bucket: str
) -> None:
    elsewhere = f'database = "{postgresql_server.new_database()}"\nblobs = "{s3_bucket}/covey"'
    operator.edit("aggregator.toml", 'database = "aggregator.db"', elsewhere)
    running = serving(operator)
    running.round("watch")
    assert operator.says("task", "pause", "watch", "CONFIG") == "watch pauses when its open round has closed\n"
    running.round("watch")
    operator.says("model", "tag", "watch", "1", "released", "CONFIG")
    assert operator.says("model", "rollback", "watch", "released", "CONFIG") == "watch goes on from version 1\n"
    versions = operator.json("model", "list", "watch", "CONFIG")
    assert [(one["version"], one["parent"], one["kept"]) for one in versions] == [
        (0, None, True),
        (1, 0, True),
        (2, 1, True),
        (3, 1, True),
    ]
    assert operator.run("model", "export", "watch", "CONFIG", "--out", "./out")[0] == 0
    assert (operator.folder / "out" / "model.tflite").stat().st_size > 0
    found = operator.json("status", "CONFIG")
    assert (found["degraded"], found["tasks"][0]["phase"]) == ([], "paused")
    assert not list(operator.folder.glob("*.db*"))
    running.service.stop()
