"""``covey-aggregator account`` and ``token``: who may use the HTTP API, and with what."""

from __future__ import annotations

import os
import time
from typing import Annotated, cast

import typer

from aggregator.accounts.account_store import Accounts, Actor
from aggregator.accounts.roles import SCOPES, Role, Scope
from aggregator.audit.log import local_actor
from aggregator.cli_options import AsJson, Config, opened
from aggregator.command_line import examples, make_group, moment, say_json, say_table
from fl_protocol.enrolment import DAY_S
from fl_protocol.errors import ConfigError
from fl_protocol.topics import checked_name

account_app = make_group("Accounts of the HTTP API; each has one role: viewer, operator or admin.")
token_app = make_group("Access tokens of accounts, shown once and kept as a hash.")
_ALL = 1_000_000_000
AccountName = Annotated[str, typer.Argument(help="Name of the account.", show_default=False)]


@account_app.command("create", epilog=examples("account create maria --role operator --config aggregator.toml"))
def account_create(
    account: AccountName,
    config: Config,
    role: Annotated[Role, typer.Option(help="What it may do: read, run the study, or manage accounts too.")],
    as_json: AsJson = False,
) -> None:
    """Add an account; it can do nothing until it has a token."""
    checked_name(account, "account")
    with opened(config) as (_, store):
        made = Accounts(store.database).create(account, role, now_s=time.time(), actor=Actor(local_actor()))
    if as_json:
        say_json(made)
    else:
        typer.echo(f"{account} has the role {role}; give it a token with covey-aggregator token create {account}")


@account_app.command("list", epilog=examples("account list --config aggregator.toml --json"))
def account_list(config: Config, as_json: AsJson = False) -> None:
    """List all accounts."""
    with opened(config) as (_, store):
        found = Accounts(store.database).page(limit=_ALL)
    if as_json:
        say_json(found)
        return
    rows = [(one.account, one.role, moment(one.created_s), moment(one.disabled_s)) for one in found]
    say_table("Accounts", ("account", "role", "created", "disabled"), rows)


@account_app.command("disable", epilog=examples("account disable maria --config aggregator.toml"))
def account_disable(account: AccountName, config: Config, as_json: AsJson = False) -> None:
    """Let none of an account's tokens do anything more, from their next request on."""
    checked_name(account, "account")
    with opened(config) as (_, store):
        found = Accounts(store.database).disable(account, now_s=time.time(), actor=Actor(local_actor()))
    if as_json:
        say_json(found)
    else:
        typer.echo(f"{account} is disabled")


@token_app.command(
    "create",
    epilog=examples(
        "token create maria --days 90 --config aggregator.toml",
        "token create grafana --scope tasks:read --note dashboard --config aggregator.toml",
    ),
)
def token_create(
    account: AccountName,
    config: Config,
    scope: Annotated[
        list[str] | None,
        typer.Option(help=f"What it may do; repeatable. Default: all of the role. {', '.join(SCOPES)}"),
    ] = None,
    days: Annotated[float, typer.Option(min=0.001, max=366, help="For how long it is valid.")] = 90,
    note: Annotated[str, typer.Option(help="What it is for.")] = "",
    as_json: AsJson = False,
) -> None:
    """Make a token and show it, this once."""
    checked_name(account, "account")
    wrong = sorted(set(scope or []) - set(SCOPES))
    if wrong or len(note) > 200:
        expected = f"--scope: expected some of {', '.join(SCOPES)}, got {wrong[0]}" if wrong else "--note: too long"
        raise ConfigError(expected)
    now_s = time.time()
    with opened(config) as (_, store):
        token, made = Accounts(store.database).add_token(
            account,
            scopes=None if scope is None else cast(list[Scope], scope),
            note=note,
            expires_s=now_s + days * DAY_S,
            now_s=now_s,
            entropy=os.urandom,
            actor=Actor(local_actor()),
        )
    if as_json:
        say_json({"secret": made.text, "token": token})
    else:
        typer.echo(made.text)


@token_app.command("list", epilog=examples("token list --account maria --config aggregator.toml"))
def token_list(
    config: Config,
    account: Annotated[str | None, typer.Option(help="Only of this account.")] = None,
    as_json: AsJson = False,
) -> None:
    """List tokens by their public ids; secrets are kept nowhere."""
    with opened(config) as (_, store):
        found = Accounts(store.database).tokens(account=account, limit=_ALL)
    if as_json:
        say_json(found)
        return
    rows = [
        (one.token, one.account, " ".join(one.scopes), moment(one.expires_s), moment(one.revoked_s),
         moment(one.last_used_s), one.last_address, one.note)
        for one in found
    ]  # fmt: skip
    columns = ("token", "account", "scopes", "expires", "revoked", "last used", "from", "note")
    say_table("Tokens", columns, rows)


@token_app.command("revoke", epilog=examples("token revoke 0123456789abcdef --config aggregator.toml"))
def token_revoke(
    token: Annotated[str, typer.Argument(help="Its public id: the 16 digits after covey_.", show_default=False)],
    config: Config,
    as_json: AsJson = False,
) -> None:
    """Let a token do nothing more, from its next request on."""
    with opened(config) as (_, store):
        found = Accounts(store.database).revoke(token, now_s=time.time(), actor=Actor(local_actor()))
    if as_json:
        say_json(found)
    else:
        typer.echo(f"token {token} of {found.account} is revoked")
