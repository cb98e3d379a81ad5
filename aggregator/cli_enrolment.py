"""``covey-aggregator enrolment`` and ``enroll-token``: devices that join by themselves."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from aggregator.audit.log import AuditEvent, append, local_actor
from aggregator.ca_folder import write_new
from aggregator.cli_options import AsJson, Config, Task, opened
from aggregator.command_line import examples, make_group, moment, say_json, say_table
from aggregator.enrolment.assembly import DeskFiles, assemble_desk
from aggregator.enrolment.register import TokenCounts, add_tokens, set_quota, token_counts, withdraw_tokens
from fl_protocol.adapters.config_files import read_file
from fl_protocol.adapters.journal import JsonLines
from fl_protocol.enrolment import DAY_S
from fl_protocol.errors import ConfigError
from fl_protocol.joining import SECRET_BYTES, decode_claim, token_digest, token_text
from fl_protocol.topics import checked_name

enrolment_app = make_group("The desk where devices join a study by themselves, with a token (docs/operations.md).")
token_app = make_group("Tokens: each lets one device join one study.")
_UNITS_S = {"h": 3600.0, "d": DAY_S, "w": 7 * DAY_S}


@enrolment_app.command("init", epilog=examples("enrolment init --config aggregator.toml"))
def enrolment_init(config: Config) -> None:
    """Make the key that devices seal their requests to, where there is none."""
    DeskFiles.load(config).key(create=True)
    typer.echo("the desk has its key; next: covey-aggregator enrolment claim")


@enrolment_app.command("claim", epilog=examples("enrolment claim exercises --config aggregator.toml --out claim.json"))
def enrolment_claim(
    task: Task,
    config: Config,
    out: Annotated[Path, typer.Option(help="File for all devices of the study; it holds no secret of anybody's.")],
    days: Annotated[int, typer.Option(min=1, max=3650, help="How long devices can use it.")] = 730,
) -> None:
    """Write what a study's devices need to ask, the same for all of them: ship it with the device's software."""
    files = DeskFiles.load(config)
    with opened(config) as (_, store):
        claim = files.claim(store, task, now_s=time.time(), valid_s=days * DAY_S)
    write_new(out.parent, {out.name: msgspec.json.format(msgspec.json.encode(claim), indent=2) + b"\n"}, option="--out")
    typer.echo(f"{out}: for every device of {claim.tenant}/{task}; next: covey-aggregator enroll-token create")


@enrolment_app.command("run", epilog=examples("enrolment run --config aggregator.toml"))
def enrolment_run(config: Config) -> None:
    """Answer devices that want to join, until stopped; one JSON line per event on standard output.

    This process alone needs the CA's key. It may be killed at any moment: devices ask again, and get the same answer.
    """
    stop: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda signum, _frame: stop.append(signum))
    files = DeskFiles.load(config)
    with opened(config) as (_, store):
        assemble_desk(files, store, journal=JsonLines()).run(lambda: bool(stop))


@token_app.command(
    "create",
    epilog=examples(
        "enroll-token create exercises --owner ward-3 --claim claim.json --config aggregator.toml",
        "enroll-token create exercises --owner ward-3 --count 20 --quota 25 --expires 14d --claim claim.json "
        "--config aggregator.toml --out tokens.txt",
    ),
)
def token_create(
    task: Task,
    config: Config,
    claim: Annotated[Path, typer.Option(help="The study's claim, which the tokens are for.")],
    owner: Annotated[str, typer.Option(help="Who the devices belong to: a ward, a household, a customer.")],
    count: Annotated[int, typer.Option(min=1, max=100_000, help="How many; each is for one device.")] = 1,
    expires: Annotated[str, typer.Option(help="How long they are good: a number and h, d or w.")] = "7d",
    quota: Annotated[
        int | None, typer.Option(min=0, help="How many devices the owner may have at a time; kept until said anew.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File for them, a line each. Default: standard output.")] = None,
) -> None:
    """Make tokens. Each is shown this once: of its secret only a digest is kept."""
    now_s, lasts_s = time.time(), _span_s(expires)
    checked_name(owner, "--owner")
    study = decode_claim(read_file(claim, "--claim"))
    secrets = [os.urandom(SECRET_BYTES) for _ in range(count)]
    lines = "".join(f"{token_text(secret, study)}\n" for secret in secrets)
    with opened(config) as (files, store):
        if (study.tenant, study.task) != (files.config.aggregator.tenant, task):
            raise ConfigError(f"--claim: expected the claim of {task}, got that of {study.tenant}/{study.task}")
        store.tasks.get(task)
        with store.database.transaction() as connection:
            if quota is not None:
                set_quota(connection, owner, quota, now_s=now_s)
            digests = [token_digest(secret) for secret in secrets]
            add_tokens(connection, digests, owner=owner, task=task, now_s=now_s, expires_s=now_s + lasts_s)
            detail: dict[str, str | int | float] = {
                "task": task,
                "count": count,
                "expires_s": now_s + lasts_s,
                "quota": -1 if quota is None else quota,
            }
            append(connection, AuditEvent(now_s, local_actor(), "token.created", owner, {**detail}))
            if out is not None:  # before the commit: a token that nobody has is of no use to anybody
                write_new(out.parent, {out.name: lines.encode()}, option="--out")
    typer.echo(lines if out is None else f"{out}: {count} token(s) until {moment(now_s + lasts_s)}", nl=out is not None)


@token_app.command(
    "list",
    epilog=examples("enroll-token list --config aggregator.toml", "enroll-token list --config aggregator.toml --json"),
)
def token_list(config: Config, as_json: AsJson = False) -> None:
    """Show, for each owner and study, how many tokens are open, used, expired and withdrawn."""
    with opened(config) as (_, store), store.database.reading() as connection:
        found = token_counts(connection, now_s=time.time())
    if as_json:
        say_json([one._asdict() for one in found])
    else:
        say_table("Tokens", TokenCounts._fields, found)


@token_app.command("withdraw", epilog=examples("enroll-token withdraw --owner ward-3 --config aggregator.toml"))
def token_withdraw(
    config: Config, owner: Annotated[str, typer.Option(help="Whose tokens; devices that have joined stay.")]
) -> None:
    """Make all unused tokens of an owner worthless."""
    now_s = time.time()
    with opened(config) as (_, store), store.database.transaction() as connection:
        count = withdraw_tokens(connection, owner=owner, now_s=now_s)
        append(connection, AuditEvent(now_s, local_actor(), "token.withdrawn", owner, {"count": count}))
    typer.echo(f"{count} unused token(s) of {owner} are worth nothing any more")


def _span_s(text: str) -> float:
    """A span such as 7d, in seconds. Raises ConfigError."""
    match = re.fullmatch(r"([1-9][0-9]{0,4})([hdw])", text)
    if match is None:
        raise ConfigError(f"--expires: expected a number and h, d or w, such as 36h or 14d, got {text[:40]!r}")
    return int(match[1]) * _UNITS_S[match[2]]
