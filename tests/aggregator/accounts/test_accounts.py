"""Accounts and access tokens: what is kept, what is told to whom, and what a token that does not hold costs."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from types import ModuleType

import pytest
from sqlalchemy import select

from aggregator.accounts import verification
from aggregator.accounts.account_store import AccountError, Accounts, Actor
from aggregator.accounts.roles import ROLE_SCOPES, ROLES, SCOPES
from aggregator.accounts.tokens import hash_secret, make_token, matches, parse_token
from aggregator.accounts.verification import NOTED_EVERY_S, REMEMBERED_S, RejectedTokenError, TokenVerifier
from aggregator.audit.log import AuditLog
from aggregator.store import schema
from aggregator.store.database import Database
from tests.enrolments import broken_copy

NOW_S, DAY_S = 1_800_000_000.0, 86_400.0
LOCAL = Actor("local:root")


@dataclass
class Gate:
    """A verifier with a clock, that counts slow hashes."""

    database: Database
    module: ModuleType = verification
    now_s: float = NOW_S
    slow: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.accounts = Accounts(self.database)
        self.verifier = self.again()

    def again(self) -> TokenVerifier:
        """Another process' verifier."""
        kind: type[TokenVerifier] = self.module.TokenVerifier
        return kind(Accounts(self.database), now_s=lambda: self.now_s, entropy=os.urandom, check=self.check)

    def check(self, stored: str, secret: str) -> bool:
        self.slow.append(stored)
        return matches(stored, secret)

    def token(self, account: str, **options: object) -> str:
        settings = {"expires_s": NOW_S + DAY_S, "now_s": NOW_S, "entropy": os.urandom, "actor": LOCAL, **options}
        return self.accounts.add_token(account, **settings)[1].text  # type: ignore[arg-type]

    def create(self, account: str, role: str = "viewer") -> str:
        self.accounts.create(account, role, now_s=NOW_S, actor=LOCAL)  # type: ignore[arg-type]
        return self.token(account)

    def why(self, text: str) -> str:
        with pytest.raises(self.module.RejectedTokenError) as caught:
            self.verifier.verify(text, address="192.0.2.7")
        return str(caught.value.code)  # type: ignore[attr-defined]

    def who(self, text: str) -> str:
        return self.verifier.verify(text, address="192.0.2.7").account


def test_a_token_is_what_its_owner_may_do_and_nothing_else_is_kept_of_it(database: Database) -> None:
    gate = Gate(database)
    text = gate.create("maria", "operator")
    assert re.fullmatch(r"covey_[0-9a-f]{16}_[A-Za-z0-9_-]{43}", text)
    found = gate.verifier.verify(text, address="192.0.2.7")
    assert (found.account, found.role, found.scopes) == ("maria", "operator", ROLE_SCOPES["operator"])
    with database.reading() as connection:
        kept = str(connection.execute(select(schema.access_tokens)).all())
        told = str(connection.execute(select(schema.audit_entries.c.entry)).all())
    assert "$argon2id$" in kept
    assert text.split("_", 2)[2] not in kept + told


def test_roles_grow_and_scopes_are_all_in_one(database: Database) -> None:
    viewer, operator, admin = (ROLE_SCOPES[role] for role in ROLES)
    assert viewer < operator < admin == set(SCOPES)
    gate = Gate(database)
    gate.create("maria", "viewer")
    for scopes in ((), ("tasks:write",), ("tasks:read", "accounts:write")):
        with pytest.raises(AccountError, match="what a viewer may"):
            gate.token("maria", scopes=scopes)
    narrow = gate.verifier.verify(gate.token("maria", scopes=("tasks:read",)), address="")
    assert narrow.scopes == {"tasks:read"}


@pytest.mark.parametrize("life_s", [0.0, -5.0, 367 * DAY_S, float("inf"), float("nan")])
def test_a_token_ends_within_a_year(database: Database, life_s: float) -> None:
    gate = Gate(database)
    gate.create("maria")
    with pytest.raises(AccountError, match="within 366 days"):
        gate.token("maria", expires_s=NOW_S + life_s)


def test_tokens_that_do_not_hold_say_why_to_their_owner_only(database: Database) -> None:
    gate = Gate(database)
    text = gate.create("maria")
    public, secret = parse_token(text) or ("", "")
    foreign = make_token(os.urandom)
    wrong = f"covey_{public}_{foreign.secret}"
    assert gate.why("") == gate.why("covey_") == gate.why(foreign.text) == gate.why(wrong) == "unknown_token"
    gate.now_s = NOW_S + DAY_S
    assert gate.why(text) == "expired_token"
    assert gate.why(wrong) == "unknown_token"
    gate.now_s = NOW_S - 1
    assert gate.why(text) == "expired_token"  # not yet valid: a clock that was set back
    gate.now_s = NOW_S
    gate.accounts.revoke(public, now_s=NOW_S, actor=LOCAL)
    assert gate.why(text) == "revoked_token"
    assert gate.why(wrong) == "unknown_token"
    other = gate.token("maria")
    gate.accounts.disable("maria", now_s=NOW_S, actor=LOCAL)
    assert gate.why(other) == "disabled_account"
    assert secret not in str(AuditLog(database).page())


def costs(gate: Gate) -> None:
    """An unknown id costs as much as a known one."""
    text = gate.create("maria")
    public = text.split("_")[1]
    wrong = make_token(os.urandom).secret
    for presented in (f"covey_{public}_{wrong}", make_token(os.urandom).text):
        gate.slow.clear()
        gate.why(presented)
        assert len(gate.slow) == 1
        assert gate.slow[0].startswith("$argon2id$v=19$m=19456,t=2,p=1$")


def test_an_unknown_id_costs_the_same_slow_hash(database: Database) -> None:
    costs(Gate(database))


def test_a_quick_answer_for_unknown_ids_is_caught(database: Database) -> None:
    broken = broken_copy(
        "aggregator.accounts.verification",
        ("if presented is None or not", "if presented is None or known is None or not"),
    )
    with pytest.raises(AssertionError):
        costs(Gate(database, broken))


def test_one_slow_hash_in_a_while_and_every_guess_costs_one(database: Database) -> None:
    gate = Gate(database)
    text = gate.create("maria")
    assert not gate.verifier.remembers(text)
    for _ in range(5):
        gate.who(text)
    assert gate.verifier.remembers(text)
    assert len(gate.slow) == 1
    gate.now_s += REMEMBERED_S
    assert not gate.verifier.remembers(text)
    gate.who(text)
    assert len(gate.slow) == 2
    guess = text[:-1] + ("A" if text[-1] != "A" else "B")
    for _ in range(3):
        gate.why(guess)
    assert len(gate.slow) == 5


def holds_at_once(gate: Gate) -> None:
    """What another process changed holds at the next request, though the token is remembered."""
    text, other = gate.create("maria"), gate.token("maria")
    gate.who(text), gate.who(other)
    Accounts(gate.database).revoke(text.split("_")[1], now_s=NOW_S, actor=LOCAL)
    assert gate.why(text) == "revoked_token"
    assert not gate.verifier.remembers(text)
    gate.now_s = NOW_S + DAY_S
    assert gate.why(other) == "expired_token"
    gate.now_s = NOW_S
    Accounts(gate.database).disable("maria", now_s=NOW_S, actor=LOCAL)
    assert gate.why(other) == "disabled_account"


def test_revocation_expiry_and_disabling_hold_at_the_next_request(database: Database) -> None:
    holds_at_once(Gate(database))


@pytest.mark.parametrize(
    "change",
    [
        ("token.revoked_s is not None", "False"),
        ("not token.created_s <= now_s < token.expires_s", "False"),
        ("known.disabled_s is not None", "False"),
    ],
)
def test_an_unchecked_revocation_expiry_or_account_is_caught(database: Database, change: tuple[str, str]) -> None:
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        holds_at_once(Gate(database, broken_copy("aggregator.accounts.verification", change)))


def test_last_use_is_noted_once_a_minute(database: Database) -> None:
    gate = Gate(database)
    text = gate.create("maria")
    public = text.split("_")[1]

    def last() -> tuple[float | None, str]:
        found = gate.accounts.find(public)
        assert found is not None
        return found.token.last_used_s, found.token.last_address

    assert last() == (None, "")
    gate.who(text)
    assert last() == (NOW_S, "192.0.2.7")
    gate.now_s += NOTED_EVERY_S - 1
    gate.who(text)
    assert last() == (NOW_S, "192.0.2.7")
    gate.now_s += 1
    gate.who(text)
    assert last() == (NOW_S + NOTED_EVERY_S, "192.0.2.7")


def test_a_role_that_shrinks_takes_scopes_with_it(database: Database) -> None:
    gate = Gate(database)
    text = gate.create("maria", "admin")
    with database.transaction() as connection:
        connection.execute(schema.accounts.update().values(role="viewer"))
    assert gate.verifier.verify(text, address="").scopes == ROLE_SCOPES["viewer"]


def test_every_change_is_told_with_who_made_it(database: Database) -> None:
    gate = Gate(database)
    text = gate.create("maria")
    gate.accounts.revoke(text.split("_")[1], now_s=NOW_S, actor=Actor("pat", "00" * 8))
    gate.accounts.disable("maria", now_s=NOW_S, actor=LOCAL)
    entries = AuditLog(database).page()
    assert [(one.actor, one.action, one.subject) for one in reversed(entries)] == [
        ("local:root", "account.created", "maria"),
        ("local:root", "token.created", "maria"),
        ("pat", "token.revoked", "maria"),
        ("local:root", "account.disabled", "maria"),
    ]
    assert entries[1].detail == {"revoked": text.split("_")[1], "token": "00" * 8}


def test_what_two_do_at_once_has_a_name(database: Database) -> None:
    gate = Gate(database)
    public = gate.create("maria").split("_")[1]
    gate.accounts.revoke(public, now_s=NOW_S, actor=LOCAL)
    for code, act in {
        "account_exists": lambda: gate.create("maria"),
        "token_revoked": lambda: gate.accounts.revoke(public, now_s=NOW_S, actor=LOCAL),
        "unknown_token": lambda: gate.accounts.revoke("0" * 16, now_s=NOW_S, actor=LOCAL),
        "unknown_account": lambda: gate.token("nobody"),
    }.items():
        with pytest.raises(AccountError) as caught:
            act()
        assert caught.value.code == code
    gate.accounts.disable("maria", now_s=NOW_S, actor=LOCAL)
    for act in (lambda: gate.token("maria"), lambda: gate.accounts.disable("maria", now_s=NOW_S, actor=LOCAL)):
        with pytest.raises(AccountError, match="disabled"):
            act()


def test_pages_of_accounts_and_tokens(database: Database) -> None:
    gate = Gate(database)
    for name in ("anna", "ben", "carl"):
        gate.create(name)
    assert [one.account for one in gate.accounts.page(limit=2)] == ["anna", "ben"]
    assert [one.account for one in gate.accounts.page(after="ben", limit=2)] == ["carl"]
    every = gate.accounts.tokens(limit=9)
    assert [one.token for one in gate.accounts.tokens(after=every[0].token, limit=9)] == [
        one.token for one in every[1:]
    ]
    assert {one.account for one in gate.accounts.tokens(account="ben", limit=9)} == {"ben"}


def test_a_damaged_hash_holds_for_nobody() -> None:
    assert matches(hash_secret("s", os.urandom), "s")
    assert not matches("", "s")
    assert not matches("$argon2id$nonsense", "s")
    assert issubclass(RejectedTokenError, Exception)
