"""What is in the log of what happens: each action has its entry in its own transaction, without names or secrets."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from aggregator.audit.entries import AuditEntry
from aggregator.errors import DatabaseError
from aggregator.store import schema
from aggregator.store.tasks import Tasks
from fl_protocol.secagg.parties import included_digest
from fl_protocol.secagg.terms import manifest_digest
from tests.aggregator.desk import TASK
from tests.aggregator.operator_desk import Operator, operator
from tests.aggregator.small_study import SmallStudy, plain_study, small_task

__all__ = ["operator"]


def entries(study: Any, action: str | None = None) -> list[AuditEntry]:
    """Oldest first."""
    found: list[AuditEntry] = study.store.audit.page(action=action, limit=1000)[::-1]
    return found


def actions(study: Any) -> list[tuple[str, str]]:
    return [(one.action, one.subject) for one in entries(study) if not one.action.startswith("device.")]


def test_a_round_is_opened_published_and_closed_in_the_log(tmp_path: Path) -> None:
    study = plain_study(tmp_path)
    manifest = study.manifest()
    study.plain_round([1.0, 1.0, 1.0])
    assert actions(study)[:5] == [
        ("task.created", TASK),
        ("round.opened", f"{TASK}/1"),
        ("round.published", f"{TASK}/1"),
        ("round.closed", f"{TASK}/1"),
        ("round.opened", f"{TASK}/2"),
    ]
    (published, *_) = entries(study, "round.published")
    assert published.detail == {"engine": "open", "manifest": manifest_digest(manifest).hex()}
    (closed,) = entries(study, "round.closed")
    with study.store.database.reading() as connection:
        ids = connection.execute(select(schema.updates.c.update_id)).scalars().all()
    assert closed.detail == {
        "outcome": "committed",
        "count": 3,
        "included": included_digest(ids).hex(),
        "version": 1,
        "model": study.manifest().model_digest.hex(),
    }
    assert {one.actor for one in entries(study)} == {"aggregator"}
    assert "watch-0" not in "".join(str(one) for one in entries(study, "round."))


def test_a_manifest_is_told_once_however_often_it_is_published(tmp_path: Path) -> None:
    study = plain_study(tmp_path)
    for _ in range(3):
        study.crash()
        study.start()
        study.settle()
    assert len(entries(study, "round.published")) == 1


def test_a_round_that_came_to_nothing_says_why(tmp_path: Path) -> None:
    study = plain_study(tmp_path)
    study.send_change(0, 1.0, study.manifest())
    study.let_the_round_end()
    (closed,) = entries(study, "round.closed")
    assert (closed.detail["outcome"], closed.detail["count"]) == ("aborted", 1)
    assert "updates had arrived" in str(closed.detail["reason"])


def test_orders_and_what_came_of_them(tmp_path: Path) -> None:
    study = plain_study(tmp_path)
    study.plain_round([1.0, 1.0, 1.0])
    for name, argument in (("pause_now", ""), ("resume", ""), ("rollback", "0"), ("abort", "a reason")):
        assert study.order(name, argument) == "done"
    told = [one for one in entries(study) if one.subject == TASK]
    assert [one.action for one in told] == [
        "task.created",
        "order.pause_now",
        "task.paused",
        "order.resume",
        "task.resumed",
        "order.rollback",
        "model.rolled_back",
        "order.abort",
        "task.aborted",
    ]
    assert [one.detail["order"] for one in told[1:]] == [1, 1, 2, 2, 3, 3, 4, 4]
    rolled_back = told[6].detail
    assert (rolled_back["to"], rolled_back["version"]) == (0, 2)
    assert "a reason" in str(told[-1].detail["reason"])


def test_a_finished_task_is_told(tmp_path: Path) -> None:
    study = plain_study(tmp_path, small_task(controls=False, population=None, rounds=1))
    study.plain_round([1.0, 1.0, 1.0])
    (finished,) = entries(study, "task.finished")
    assert finished.subject == TASK


def test_what_does_not_become_durable_is_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study: SmallStudy = plain_study(tmp_path)
    before = actions(study)

    def fails(*_: object, **__: object) -> None:
        raise DatabaseError("the disk is full")

    monkeypatch.setattr(Tasks, "order_done", fails)
    monkeypatch.setattr(Tasks, "save", fails)
    study.plain_round([1.0, 1.0, 1.0])
    assert actions(study) == before


def test_commands_act_as_their_user(operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "anna")
    operator.run("init", "CONFIG")
    operator.says("task", "create", "./watch.toml", "CONFIG")
    operator.says("device", "add", "CONFIG", "watch-7", "ab" * 32)
    many = "".join(f"watch-{number},{2**200 + number:064x}\n" for number in range(20))
    operator.write("devices.csv", many)
    operator.says("device", "import", "./devices.csv", "CONFIG")
    operator.says("device", "remove", "CONFIG", "watch-7")
    operator.says("model", "tag", "watch", "0", "candidate", "CONFIG")
    assert operator.run("model", "export", "watch", "CONFIG", "--out", "./out")[0] == 0
    operator.says("task", "pause", "watch", "CONFIG")
    assert operator.run("backup", "CONFIG", "--out", "./b.backup")[0] == 0
    store = operator.store()
    found = store.audit.page(limit=100)[::-1]
    store.close()
    assert [(one.action, one.subject) for one in found] == [
        ("task.created", "watch"),
        ("device.added", "watch-7"),
        ("device.imported", ""),
        ("device.removed", "watch-7"),
        ("model.tagged", "watch"),
        ("model.exported", "watch"),
        ("order.pause", "watch"),
        ("database.backed_up", ""),
    ]
    assert {one.actor for one in found} == {"local:anna"}
    listed = "".join(sorted(many.splitlines(keepends=True)))
    assert found[2].detail == {"count": 20, "list_sha256": hashlib.sha256(listed.encode()).hexdigest()}
    assert found[0].detail["file_sha256"] == hashlib.sha256((operator.folder / "watch.toml").read_bytes()).hexdigest()
    assert found[4].detail["tag"] == "candidate"
