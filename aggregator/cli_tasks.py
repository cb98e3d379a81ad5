"""``covey-aggregator task``: what is to be computed, where it stands, and orders about it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from aggregator.audit.log import local_actor
from aggregator.cli_options import AsJson, Config, Task, opened
from aggregator.cli_orders import order
from aggregator.command_line import examples, make_group, moment, say_json, say_table
from aggregator.federated_results import table_rows
from aggregator.overview import TaskOverview, task_overview
from aggregator.task_creation import create_task
from aggregator.task_report import RoundReport, TaskReport, flat, task_report

task_app = make_group("Tasks: trainings, evaluations and statistics; each has a file (docs/tasks.md).")
_SETTLED = "validation_loss", "validation_accuracy"


@task_app.command("create", epilog=examples("task create exercises.toml --config aggregator.toml"))
def task_create(
    file: Annotated[Path, typer.Argument(help="The task's file; paths in it start at its folder.")],
    config: Config,
    as_json: AsJson = False,
) -> None:
    """Check a task's file and what it names, and store all of it; a running coordinator opens the first round."""
    with opened(config) as (files, store):
        key = files.signing_key().public_key()
        created = create_task(store, file, now_s=time.time(), actor=local_actor(), aggregator_key=key)
        found = task_overview(store.tasks.get(created.config.name))
    if as_json:
        say_json(found)
    elif created.is_new:
        typer.echo(f"task {found.name} ({found.kind}) is created; rounds open while covey-aggregator run is running")
    else:
        typer.echo(
            f"task {found.name}, from before tasks had files, has its file now and goes on after round {found.round}"
        )


@task_app.command("list", epilog=examples("task list --config aggregator.toml"))
def task_list(config: Config, as_json: AsJson = False) -> None:
    """List all tasks."""
    with opened(config) as (_, store):
        tasks = store.tasks.all()
    found = [task_overview(task) for task in tasks]
    if as_json:
        say_json(found)
        return
    rows = [
        (one.name, one.kind, one.phase, f"{one.committed} of {one.rounds}", one.version, moment(task.created_s))
        for one, task in zip(found, tasks, strict=True)
    ]
    say_table("Tasks", ("task", "kind", "phase", "committed", "model version", "created"), rows)


@task_app.command(
    "show",
    epilog=examples(
        "task show exercises --config aggregator.toml --last 50", "task show scales --config aggregator.toml --json"
    ),
)
def task_show(
    task: Task,
    config: Config,
    last: Annotated[int, typer.Option(min=1, help="How many of the newest rounds.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Show a task's settings, state, rounds, results and orders."""
    with opened(config) as (_, store):
        found = task_report(store, task, last=last)
    if as_json:
        say_json(found)
    else:
        _show(found)


@task_app.command(
    "pause",
    epilog=examples(
        "task pause exercises --config aggregator.toml", "task pause exercises --config aggregator.toml --now"
    ),
)
def task_pause(
    task: Task,
    config: Config,
    now: Annotated[
        bool, typer.Option("--now", help="At once: the open round is given up, though devices were charged for it.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Open no more rounds until `task resume`; the open round is finished first."""
    if now:
        order(config, task, "pause_now", done=f"{task} is paused", as_json=as_json)
    else:
        order(config, task, "pause", done=f"{task} pauses when its open round has closed", as_json=as_json)


@task_app.command("resume", epilog=examples("task resume exercises --config aggregator.toml"))
def task_resume(task: Task, config: Config, as_json: AsJson = False) -> None:
    """Go on after a pause, the operator's or the task's own."""
    order(config, task, "resume", done=f"{task} goes on", as_json=as_json)


@task_app.command(
    "abort", epilog=examples("task abort exercises --config aggregator.toml --reason 'the strap was redesigned'")
)
def task_abort(
    task: Task,
    config: Config,
    reason: Annotated[str, typer.Option(help="Why, for the record.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Give a task up for good; the open round's updates are dropped, the models stay."""
    if not yes:
        typer.confirm(f"Give {task} up for good?", abort=True, err=True)
    order(config, task, "abort", argument=reason, done=f"{task} is aborted", as_json=as_json)


def _show(found: TaskReport) -> None:
    """Print a task for people."""
    rows = [*_state_rows(found.state), ("privacy", found.privacy), *flat(found.settings)]
    say_table(f"Task {found.state.name}", ("what", "value"), rows)
    columns = ("round", "outcome", "model", "arrived", "late", "p", "closed", "seconds", "validation")
    say_table("Rounds", columns, [_round_row(one) for one in found.rounds])
    for one in found.rounds:
        if one.reason:
            typer.echo(f"round {one.number}: {one.reason}")
    for one in found.rounds:
        if one.result is not None:
            say_table(f"Result of round {one.number}", ("what", "found"), table_rows(one.result))
    orders = [(moment(one.asked_s), one.name, one.argument, one.outcome or "waits") for one in found.orders]
    if orders:
        say_table("Orders", ("asked", "order", "argument", "outcome"), orders)


def _state_rows(state: TaskOverview) -> list[tuple[str, object]]:
    """Where a task stands."""
    rows: list[tuple[str, object]] = [
        ("kind", state.kind),
        ("phase", f"{state.phase}, pausing when the round closes" if state.pausing else state.phase),
        ("committed rounds", f"{state.committed} of {state.rounds}"),
        ("model version", str(state.version)),
        ("next round's probability", f"{state.probability:.4g}"),
    ]
    if state.deadline_s is not None:
        rows.append((f"round {state.round}", f"{state.arrived} of {state.goal}, until {moment(state.deadline_s)}"))
    return rows + ([("reason", state.reason)] if state.reason else [])


def _round_row(one: RoundReport) -> tuple[object, ...]:
    """A round's line."""
    loss, accuracy = (one.metrics.get(name) for name in _SETTLED)
    validation = f"loss {loss:.4g}, accuracy {accuracy:.1%}" if loss is not None and accuracy is not None else ""
    return (
        one.number,
        one.outcome,
        one.version,
        one.arrived,
        one.late,
        one.probability,
        moment(one.closed_s),
        one.seconds,
        validation,
    )
