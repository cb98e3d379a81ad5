"""A version is released by as many accounts as its task asks for, each for these very parameters, by nobody alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update

from aggregator import releases
from aggregator.accounts.account_store import Actor
from aggregator.api_client import ApiProblemError
from aggregator.releases import RELEASED
from aggregator.store import schema
from tests.aggregator.api.seeded_study import NOW_S, SeededStudy
from tests.aggregator.api.served import Desk, Served, served
from tests.enrolments import broken_copy

TASK, VERSION = "careful", 2
ANNA, BEN, EVE = Actor("anna"), Actor("ben"), Actor("eve")
ON_THE_MACHINE = Actor("local:root")
Codes = list[str]


@pytest.fixture
def study(database_url: str) -> Iterator[SeededStudy]:
    made = SeededStudy(database_url, rounds=2, masked_rounds=1)
    made.add_task(TASK, 3, more="[release]\napprovals = 2\n")
    for name in ("anna", "ben", "eve"):
        made.accounts.create(name, "operator", now_s=NOW_S, actor=ON_THE_MACHINE)
    yield made
    made.store.close()


def does(study: SeededStudy, call: Callable[..., None], *arguments: Any, who: Actor, module: Any = releases) -> str:
    """The code of what is refused, empty if it is done."""
    try:
        with study.store.database.transaction() as connection:
            call(connection, TASK, *arguments, who=who, now_s=NOW_S)
    except module.ReleaseError as error:
        return str(error.code)
    return ""


def released(study: SeededStudy) -> int:
    return study.store.models.tagged(TASK, RELEASED)


def check_two_accounts_release(study: SeededStudy, module: Any) -> None:
    """Nobody alone, not twice one, nor the machine's own commands; two together do."""
    before = released(study)

    def tag(who: Actor) -> str:
        return does(study, module.tag, RELEASED, VERSION, who=who, module=module)

    def approve(who: Actor) -> str:
        return does(study, module.approve, VERSION, who=who, module=module)

    assert tag(ANNA) == tag(ON_THE_MACHINE) == "not_approved"
    assert approve(ANNA) == ""
    assert approve(ANNA) == "already_approved"
    assert approve(ON_THE_MACHINE) == ""  # has no account: counts for nothing
    assert tag(ANNA) == "not_approved"
    assert released(study) == before
    assert approve(BEN) == ""
    assert tag(EVE) == ""
    assert released(study) == VERSION


def check_it_stands_for_these_parameters(study: SeededStudy, module: Any) -> None:
    """Of another model under this number, by an account that was disabled, or taken back: no approval."""
    for who in (ANNA, BEN):
        assert does(study, module.approve, VERSION, who=who, module=module) == ""
    models = schema.models
    here = (models.c.task == TASK) & (models.c.version == VERSION)
    with study.store.database.transaction() as connection:
        connection.execute(update(models).where(here).values(digest=b"\x09" * 32))
    assert does(study, module.tag, RELEASED, VERSION, who=ANNA, module=module) == "not_approved"
    for who in (ANNA, BEN):
        assert does(study, module.approve, VERSION, who=who, module=module) == ""
    assert does(study, module.withdraw, VERSION, who=BEN, module=module) == ""
    assert does(study, module.withdraw, VERSION, who=BEN, module=module) == "not_approved_by_you"
    assert does(study, module.tag, RELEASED, VERSION, who=ANNA, module=module) == "not_approved"
    assert does(study, module.approve, VERSION, who=EVE, module=module) == ""
    study.accounts.disable("eve", now_s=NOW_S, actor=ON_THE_MACHINE)
    assert does(study, module.tag, RELEASED, VERSION, who=ANNA, module=module) == "not_approved"


def test_as_many_accounts_as_the_task_asks_for_release_together(study: SeededStudy) -> None:
    check_two_accounts_release(study, releases)
    told = study.store.audit.page(action="model.")[:3][::-1]
    assert [(one.action, one.actor) for one in told if one.actor != "local:root"][-2:] == [
        ("model.approved", "ben"), ("model.released", "eve")
    ]  # fmt: skip
    assert told[-1].detail["approved_by"] == "anna ben"


def test_an_approval_is_of_these_parameters_by_an_account_that_may_still_decide(study: SeededStudy) -> None:
    check_it_stands_for_these_parameters(study, releases)


@pytest.mark.parametrize(
    "change",
    [
        ("if found.missing:", "if found.missing > 1:"),
        ("if name == RELEASED:\n        found", "if False:\n        found"),
        (
            ".join(schema.accounts, _APPROVALS.c.account == _ACCOUNTS.account)",
            ".outerjoin(schema.accounts, _APPROVALS.c.account == _ACCOUNTS.account)",
        ),
    ],
)
def test_a_release_with_too_few_is_caught(study: SeededStudy, change: tuple[str, str]) -> None:
    with pytest.raises(AssertionError):
        check_two_accounts_release(study, broken_copy("aggregator.releases", change))


@pytest.mark.parametrize(
    "change",
    [
        (", _APPROVALS.c.digest == _digest(connection, task, version)", ""),
        (".where(_ACCOUNTS.disabled_s.is_(None))", ""),
        ("_this(task, version), _APPROVALS.c.account == who.name))\n    append", "False))\n    append"),
    ],
)
def test_an_approval_that_is_carried_over_is_caught(study: SeededStudy, change: tuple[str, str]) -> None:
    with pytest.raises(AssertionError):
        check_it_stands_for_these_parameters(study, broken_copy("aggregator.releases", change))


def test_other_tags_and_other_tasks_need_none(study: SeededStudy) -> None:
    assert does(study, releases.tag, "candidate", VERSION, who=ON_THE_MACHINE) == ""
    with study.store.database.transaction() as connection:
        releases.tag(connection, "watch", RELEASED, 1, who=ON_THE_MACHINE, now_s=NOW_S)
        with pytest.raises(releases.ReleaseError, match="asks for no approvals"):
            releases.approve(connection, "watch", 1, who=ANNA, now_s=NOW_S)


def test_what_was_pruned_is_not_released(study: SeededStudy) -> None:
    models = schema.models
    with study.store.database.transaction() as connection:
        connection.execute(update(models).where(models.c.task == TASK).values(params=None))
    assert does(study, releases.tag, "candidate", VERSION, who=ANNA) == "pruned"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Served]:
    made = SeededStudy(f"sqlite:///{tmp_path / 'study.db'}", rounds=2, masked_rounds=1)
    made.add_task(TASK, 3, more="[release]\napprovals = 2\n")
    with served(Desk(made)) as found:
        yield found
    made.store.close()


def refused(call: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[int, str]:
    with pytest.raises(ApiProblemError) as caught:
        call(*arguments, **options)
    return caught.value.status, caught.value.problem.code


def test_over_the_api_two_people_release_and_a_stale_page_is_told_so(server: Served) -> None:
    tokens = server.desk.study.tokens
    with server.client(tokens["operator"]) as operator, server.client(tokens["admin"]) as admin:
        page = operator.model(TASK, VERSION)
        assert (page.approvals.needed, page.approvals.accounts, page.approvals.missing) == (2, [], 2)
        assert refused(operator.tag, TASK, VERSION, RELEASED) == (409, "not_approved")
        seen = admin.model(TASK, VERSION).etag
        assert operator.approve(TASK, VERSION, etag=page.etag).approvals.accounts == ["operator"]
        assert refused(operator.approve, TASK, VERSION) == (409, "already_approved")
        assert refused(admin.approve, TASK, VERSION, etag=seen) == (412, "stale")  # somebody else has pressed it
        assert admin.approve(TASK, VERSION).approvals.accounts == ["admin", "operator"]
        assert operator.withdraw_approval(TASK, VERSION).approvals.accounts == ["admin"]
        assert refused(operator.withdraw_approval, TASK, VERSION) == (409, "not_approved_by_you")
        assert refused(operator.approve, TASK, 99) == (404, "not_found")
        operator.approve(TASK, VERSION)
        assert operator.tag(TASK, VERSION, RELEASED).model.tags == (RELEASED,)
    with server.desk.study.store.database.reading() as connection:
        kept = connection.execute(select(schema.approvals.c.account).order_by(schema.approvals.c.account)).scalars()
        assert list(kept) == ["admin", "operator"]
