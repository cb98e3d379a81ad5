"""``covey-aggregator model``: a task's versions, their tags, and a version as files."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aggregator import releases
from aggregator.accounts.account_store import Actor
from aggregator.assembly import AggregatorFiles, bundle_of
from aggregator.audit.log import AuditEvent, append, local_actor
from aggregator.cli_options import AsJson, Config, Out, Task, opened, write_files
from aggregator.cli_orders import order
from aggregator.command_line import examples, make_group, moment, say_json, say_table
from aggregator.errors import AggregatorError
from aggregator.export import export_model
from aggregator.lineage_privacy import lineage_of
from aggregator.model_report import checked_tag, model_report, model_reports, version_of
from aggregator.store.aggregator_store import AggregatorStore
from aggregator.task_report import flat
from fl_protocol.adapters.key_files import load_key
from fl_protocol.errors import ConfigError
from fl_protocol.signing import public_key_hex

model_app = make_group("A task's models: every version with where it came from, how it did, and its tags.")
_SIGN_NEXT = "no device takes it before its publishers have, with covey-aggregator publisher sign"
Version = Annotated[str, typer.Argument(help="A version's number, or a tag.", show_default=False)]


@model_app.command("list", epilog=examples("model list exercises --config aggregator.toml"))
def model_list(task: Task, config: Config, as_json: AsJson = False) -> None:
    """List all versions of a task's model, oldest first."""
    with opened(config) as (_, store):
        found = model_reports(store, task)
    if as_json:
        say_json(found)
        return
    rows = [
        (
            one.version,
            one.parent,
            one.round,
            one.origin,
            one.digest[:16],
            moment(one.created_s),
            "?" if one.record_epsilon is None else f"{one.record_epsilon:.3g}",
            ", ".join(one.tags) + ("" if one.kept else " (pruned)"),
        )
        for one in found
    ]
    columns = ("version", "from", "round", "origin", "digest", "created", "ε at most", "tags")
    say_table(f"Models of {task}", columns, rows)


@model_app.command(
    "show",
    epilog=examples(
        "model show exercises 12 --config aggregator.toml",
        "model show exercises released --config aggregator.toml --json",
    ),
)
def model_show(task: Task, version: Version, config: Config, as_json: AsJson = False) -> None:
    """Show one version: its lineage, how it did, and what was spent on it."""
    with opened(config) as (_, store):
        found = model_report(store, task, version_of(store, task, version))
        line = lineage_of(store, task).line(found.version)
    if as_json:
        say_json({"model": found, "lineage": line})
        return
    rows: list[tuple[str, object]] = [
        ("version", str(found.version)),
        ("origin", found.origin + (f", round {found.round}" if found.round is not None else "")),
        ("lineage", " < ".join(map(str, line[:12])) + (" < ..." if len(line) > 12 else "")),
        ("digest", found.digest),
        ("created", moment(found.created_s)),
        ("tags", ", ".join(found.tags)),
        ("parameters", "kept" if found.kept else "pruned"),
        ("privacy", found.privacy),
        *flat(found.metrics),
    ]
    say_table(f"Model of {task}", ("what", "value"), rows)


@model_app.command("tag", epilog=examples("model tag exercises 12 released --config aggregator.toml"))
def model_tag(
    task: Task,
    version: Version,
    tag: Annotated[str, typer.Argument(help="Such as candidate or released.")],
    config: Config,
) -> None:
    """Put a tag on a version, and take it from any other; tagged versions are never pruned.

    The tag released may need approvals (`[release]` of the task), which are given over the HTTP API.
    """
    with opened(config) as (_, store):
        number = version_of(store, task, version)
        with store.database.transaction() as connection:
            who = Actor(local_actor())
            releases.tag(connection, task, checked_tag(tag), number, who=who, now_s=time.time())
    typer.echo(f"version {number} of {task} has the tag {tag}")


@model_app.command("rollback", epilog=examples("model rollback exercises 11 --config aggregator.toml"))
def model_rollback(task: Task, version: Version, config: Config, as_json: AsJson = False) -> None:
    """Go on from an earlier version; the open round is given up, since its updates belong to the model that is left."""
    with opened(config) as (_, store):
        number = version_of(store, task, version)
        if store.models.record(task, number).params is None:
            raise AggregatorError(f"the parameters of version {number} of {task} were pruned; choose another version")
    done = f"{task} goes on from version {number}"
    order(config, task, "rollback", argument=str(number), done=done, as_json=as_json)


@model_app.command(
    "export",
    epilog=examples(
        "model export exercises --config aggregator.toml --out model",
        "model export exercises --config aggregator.toml --tag released --out model",
        "model export exercises --config aggregator.toml --tag released --out model --publisher-key publisher.key",
    ),
)
def model_export(
    task: Task,
    config: Config,
    out: Out,
    version: Annotated[int | None, typer.Option(min=0, help="Default: the model in force.")] = None,
    tag: Annotated[str | None, typer.Option(help="In place of --version.")] = None,
    publisher_key: Annotated[
        Path | None, typer.Option(help="A publisher's key file, to sign with at once. Default: not signed.")
    ] = None,
) -> None:
    """Write a version as a bundle, and as an inference-only .tflite.

    No device takes the bundle before its publishers have signed it, best on machines of their own: `publisher sign`.
    """
    if version is not None and tag is not None:
        raise ConfigError("expected --version or --tag, got both")
    with opened(config) as (files, store):
        number = _chosen(store, task, version=version, tag=tag)
        record, stored = store.models.record(task, number), store.tasks.get(task)
        key = None if publisher_key is None else _publishers_key(publisher_key, files)
        exported = export_model(bundle_of(store, stored), record, store.models.params(record), publisher_key=key)
        detail: dict[str, str | int | float] = {"version": number, "model": record.digest.hex()}
        if key is not None:
            detail["publisher"] = public_key_hex(key.public_key())
        told = AuditEvent(time.time(), local_actor(), "model.exported", task, detail)
        with store.database.transaction() as connection:
            append(connection, told)
    written = {"model.covey": exported.bundle, "model.tflite": exported.inference}
    write_files(out, written)
    for name in written:
        typer.echo(str(out / name))
    if key is None:
        typer.echo(f"{out / 'model.covey'} is not signed: {_SIGN_NEXT}", err=True)


def _publishers_key(path: Path, files: AggregatorFiles) -> Ed25519PrivateKey:
    """A key to sign models with. Raises ConfigError, LocalMisuseError."""
    key = load_key(path)
    # Security: devices that pin the aggregator's key run whatever model somebody with this machine makes up.
    if key.public_key() == files.signing_key().public_key():
        raise ConfigError(
            f"--publisher-key {path} is the aggregator's own key: pinned as a publisher's, it would let whoever has "
            "this machine have devices run any model; make another, best elsewhere (covey-aggregator publisher keygen)"
        )
    return key


def _chosen(store: AggregatorStore, task: str, *, version: int | None, tag: str | None) -> int:
    """The version that the options name."""
    if tag is not None:
        return store.models.tagged(task, tag)
    return store.tasks.get(task).state.version if version is None else version
