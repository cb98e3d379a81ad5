"""Accounts and their access tokens in the database; who changed what is in the audit log, in the same transaction."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple, cast

import msgspec
from sqlalchemy import Connection, Row, Select, insert, select, update

from aggregator.accounts.roles import ROLE_SCOPES, Role, Scope
from aggregator.accounts.tokens import AccessToken, hash_secret, make_token
from aggregator.audit.log import AuditEvent, append
from aggregator.errors import AggregatorError
from aggregator.store import schema
from aggregator.store.database import Database

LONGEST_LIFE_S = 366 * 86_400.0
"""For how long a token may be valid at most."""
_ACCOUNTS, _TOKENS = schema.accounts.c, schema.access_tokens.c


class AccountError(AggregatorError):
    """An account or token cannot be what was asked for.

    Args:
        code: for programs: unknown_account, account_exists, account_disabled, unknown_token, token_revoked, or
            bad_token for scopes or a life that it cannot have.
        text: one sentence.
    """

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


class Actor(NamedTuple):
    """Who does something: `local:USER`, or an account and the public id of its token."""

    name: str
    token: str = ""

    def told(self, action: str, subject: str, now_s: float, **detail: str | int | float | bool) -> AuditEvent:
        """What the audit log is told of it."""
        return AuditEvent(
            now_s, self.name, action, subject, {**detail, **({"token": self.token} if self.token else {})}
        )


class Account(msgspec.Struct, frozen=True, kw_only=True):
    """An account; times are Unix seconds, `disabled_s` is null while it may be used."""

    account: str
    role: Role
    created_s: float
    disabled_s: float | None


class Token(msgspec.Struct, frozen=True, kw_only=True):
    """An access token without its secret.

    Args:
        token: its public id.
        scopes: what it may do, of what its account's role may.
        note: what it is for.
        last_used_s: to the minute; null if it never was.
        last_address: where from; empty if it never was.
    """

    token: str
    account: str
    scopes: tuple[Scope, ...]
    note: str
    created_s: float
    expires_s: float
    revoked_s: float | None
    last_used_s: float | None
    last_address: str


class Known(NamedTuple):
    """A token with what decides on it: the hash of its secret, and its account."""

    token: Token
    secret_hash: str
    role: Role
    disabled_s: float | None


_KNOWN = (  # built once, for every request asks it
    select(schema.access_tokens, _ACCOUNTS.role, _ACCOUNTS.disabled_s).select_from(
        schema.access_tokens.join(schema.accounts, _ACCOUNTS.account == _TOKENS.account)
    )
)


class Accounts:
    """All accounts and tokens. Every method is one transaction and raises DatabaseError."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, account: str, role: Role, *, now_s: float, actor: Actor) -> Account:
        """Add an account. Raises AccountError: there is one of this name."""
        with self._database.transaction() as connection:
            if _account(connection, account) is not None:
                raise AccountError("account_exists", f"there is an account {account} already; choose another name")
            connection.execute(insert(schema.accounts).values(account=account, role=role, created_s=now_s))
            append(connection, actor.told("account.created", account, now_s, role=role))
        return Account(account=account, role=role, created_s=now_s, disabled_s=None)

    def disable(self, account: str, *, now_s: float, actor: Actor) -> Account:
        """Let none of an account's tokens do anything more. Raises AccountError: there is none, or it is disabled."""
        with self._database.transaction() as connection:
            known = _usable(connection, account)
            changed = connection.execute(
                update(schema.accounts)
                .where(_ACCOUNTS.account == account, _ACCOUNTS.disabled_s.is_(None))
                .values(disabled_s=now_s)
            )
            if changed.rowcount != 1:
                raise AccountError("account_disabled", f"account {account} is disabled already")
            append(connection, actor.told("account.disabled", account, now_s))
        return msgspec.structs.replace(known, disabled_s=now_s)

    def get(self, account: str) -> Account:
        """One account. Raises AccountError: there is none."""
        with self._database.reading() as connection:
            return _existing(connection, account)

    def page(self, *, after: str = "", limit: int) -> list[Account]:
        """Accounts by name, those after a name."""
        query = select(schema.accounts).where(_ACCOUNTS.account > after).order_by(_ACCOUNTS.account).limit(limit)
        with self._database.reading() as connection:
            return [_account_of(row) for row in connection.execute(query)]

    def add_token(
        self,
        account: str,
        *,
        scopes: Collection[Scope] | None = None,
        note: str = "",
        expires_s: float,
        now_s: float,
        entropy: Callable[[int], bytes],
        actor: Actor,
    ) -> tuple[Token, AccessToken]:
        """Make a token; what its owner presents is in the second, and nowhere else.

        Args:
            account: that it is for.
            scopes: what it may do; None for all that the account's role may.
            note: what it is for.
            expires_s: Unix seconds, at most `LONGEST_LIFE_S` from now.
            now_s: Unix seconds.
            entropy: gives so many random bytes.
            actor: who makes it.

        Raises:
            AccountError: there is no such account, it is disabled, its role may not do this, or the time is wrong.
        """
        if not now_s < expires_s <= now_s + LONGEST_LIFE_S:
            raise AccountError("bad_token", "expires: expected a time to come, within 366 days; choose another")
        made = make_token(entropy)
        secret_hash = hash_secret(made.secret, entropy)
        with self._database.transaction() as connection:
            role = _usable(connection, account).role
            wanted = ROLE_SCOPES[role] if scopes is None else frozenset(scopes)
            if not wanted or not wanted <= ROLE_SCOPES[role]:
                may = ", ".join(sorted(ROLE_SCOPES[role]))
                raise AccountError("bad_token", f"scopes: expected some of what a {role} may: {may}")
            token = Token(
                token=made.token,
                account=account,
                scopes=tuple(sorted(wanted)),
                note=note,
                created_s=now_s,
                expires_s=expires_s,
                revoked_s=None,
                last_used_s=None,
                last_address="",
            )
            row = {**msgspec.structs.asdict(token), "scopes": msgspec.json.encode(token.scopes).decode()}
            connection.execute(insert(schema.access_tokens).values(**row, secret_hash=secret_hash))
            told = actor.told("token.created", account, now_s, made=made.token, scopes=" ".join(token.scopes))
            append(connection, told)
        return token, made

    def revoke(self, token: str, *, now_s: float, actor: Actor) -> Token:
        """Let a token do nothing more. Raises AccountError: there is none, or it is revoked."""
        with self._database.transaction() as connection:
            known = _known(connection, token)
            if known is None:
                raise AccountError("unknown_token", f"there is no token {token}; see covey-aggregator token list")
            changed = connection.execute(
                update(schema.access_tokens)
                .where(_TOKENS.token == token, _TOKENS.revoked_s.is_(None))
                .values(revoked_s=now_s)
            )
            if changed.rowcount != 1:
                raise AccountError("token_revoked", f"token {token} is revoked already")
            append(connection, actor.told("token.revoked", known.token.account, now_s, revoked=token))
        return msgspec.structs.replace(known.token, revoked_s=now_s)

    def find(self, token: str) -> Known | None:
        """A token by its public id."""
        with self._database.reading() as connection:
            return _known(connection, token)

    def tokens(self, *, account: str | None = None, after: str = "", limit: int) -> list[Token]:
        """Tokens by public id, those after one; only an account's if given. Raises AccountError: there is none."""
        query: Select[Any] = select(schema.access_tokens).where(_TOKENS.token > after)
        with self._database.reading() as connection:
            if account is not None:
                query = query.where(_TOKENS.account == _existing(connection, account).account)
            return [_token_of(row) for row in connection.execute(query.order_by(_TOKENS.token).limit(limit))]

    def note_use(self, token: str, *, address: str, now_s: float) -> None:
        """Note when and from where a token was used."""
        with self._database.transaction() as connection:
            used = {"last_used_s": now_s, "last_address": address[:64]}
            connection.execute(update(schema.access_tokens).where(_TOKENS.token == token).values(**used))


def _account(connection: Connection, account: str) -> Account | None:
    row = connection.execute(select(schema.accounts).where(_ACCOUNTS.account == account)).one_or_none()
    return None if row is None else _account_of(row)


def _existing(connection: Connection, account: str) -> Account:
    """An account. Raises AccountError: there is none."""
    found = _account(connection, account)
    if found is None:
        raise AccountError("unknown_account", f"there is no account {account}; see covey-aggregator account list")
    return found


def _usable(connection: Connection, account: str) -> Account:
    """An account that is not disabled. Raises AccountError."""
    found = _existing(connection, account)
    if found.disabled_s is not None:
        raise AccountError("account_disabled", f"account {account} is disabled; create another")
    return found


def _known(connection: Connection, token: str) -> Known | None:
    row = connection.execute(_KNOWN.where(_TOKENS.token == token)).one_or_none()
    return None if row is None else Known(_token_of(row), row.secret_hash, cast(Role, row.role), row.disabled_s)


def _account_of(row: Row[Any]) -> Account:
    return Account(account=row.account, role=cast(Role, row.role), created_s=row.created_s, disabled_s=row.disabled_s)


def _token_of(row: Row[Any]) -> Token:
    return Token(
        token=row.token,
        account=row.account,
        scopes=msgspec.json.decode(row.scopes, type=tuple[Scope, ...]),
        note=row.note,
        created_s=row.created_s,
        expires_s=row.expires_s,
        revoked_s=row.revoked_s,
        last_used_s=row.last_used_s,
        last_address=row.last_address,
    )
