"""What the HTTP API is told and answers, as msgspec structs: of them are the OpenAPI's schemas and the client's types.

Times are Unix seconds. Lists come in pages: `next` is the `cursor` of the next page, null on the last one.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from aggregator.accounts.account_store import Account, Token
from aggregator.accounts.roles import Role, Scope
from aggregator.audit.entries import AuditEntry
from aggregator.model_report import ModelReport
from aggregator.overview import TaskOverview
from aggregator.task_report import OrderReport, RoundReport

MOST_LISTED = 200
"""Items on a page."""
MOST_INTEGER = 2**31 - 1
"""What a database's integer holds."""
Words = Annotated[str, Meta(min_length=1, max_length=500, pattern=r"^[^\x00-\x1f\x7f]*$")]
Name = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
Number = Annotated[int, Meta(ge=0, le=MOST_INTEGER)]


class _Answer(msgspec.Struct, frozen=True, kw_only=True):
    """Base of what is answered."""


class _Body(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of what is told."""


class Fault(_Answer, frozen=True):
    """What is wrong in a request: where, and what was expected."""

    where: str
    what: str


class Problem(_Answer, frozen=True):
    """Why a request was not carried out; `code` is for programs, `detail` one sentence for people."""

    code: str
    detail: str
    faults: tuple[Fault, ...] = ()


class Health(_Answer, frozen=True):
    """The process is alive, or ready."""

    status: Literal["alive", "ready"]


class WhoAmI(_Answer, frozen=True):
    """Whose token this is, and what it may do."""

    account: str
    role: Role
    token: str
    scopes: list[Scope]
    expires_s: float


class TaskPage(_Answer, frozen=True):
    """Tasks by name."""

    items: list[TaskOverview]
    next: str | None


class TaskDetail(_Answer, frozen=True):
    """A task.

    Args:
        settings: those of its file, defaults left out.
        privacy: what its committed rounds have cost a wearer who took part in each, in words.
        etag: for `If-Match` of an order: changes with every order, and when the task pauses, goes on or ends.
        orders: the newest, at most 20, newest first.
    """

    state: TaskOverview
    settings: dict[str, Any]
    privacy: str
    etag: str
    orders: list[OrderReport]


class RoundPage(_Answer, frozen=True):
    """Rounds, newest first."""

    items: list[RoundReport]
    next: int | None


class OrderPage(_Answer, frozen=True):
    """Orders, newest first."""

    items: list[OrderReport]
    next: int | None


class OrderAnswer(_Answer, frozen=True):
    """What came of an order: done, or left for the coordinator, and why (see GET .../orders/{order} later)."""

    order: int
    task: str
    name: str
    state: Literal["done", "left"]
    reason: str


class PauseBody(_Body, frozen=True):
    """How to pause: `now` gives the open round up, though devices were charged for it."""

    now: bool = False


class AbortBody(_Body, frozen=True):
    """Why a task is given up for good."""

    reason: Words


class StateBody(_Body, frozen=True):
    """Why a device is put aside, taken back or thrown out; it is told."""

    reason: Words


class RollbackBody(_Body, frozen=True):
    """The version to go on from."""

    version: Number


class Device(_Answer, frozen=True):
    """A registered name; a device with pseudonyms has several.

    Args:
        state: active, quarantined or revoked.
        owner: of its enrolment; null for one that was registered by hand.
        enrolment: that the name belongs to.
        not_before_s, not_after_s: the name's time; null for always.
    """

    device: str
    public_key: str
    added_s: float
    state: str
    owner: str | None
    enrolment: str | None
    not_before_s: float | None
    not_after_s: float | None


class DevicePage(_Answer, frozen=True):
    """Registered names in order."""

    items: list[Device]
    next: str | None


class Counted(_Answer, frozen=True):
    """An update that counts in a round."""

    task: str
    round: int
    accepted_s: float
    bytes_up: int


class DeviceDetail(_Answer, frozen=True):
    """A registered name, and where it counted: in the last 50 rounds of each task, newest first.

    Args:
        etag: for `If-Match` of quarantine, restore and revoke.
    """

    device: Device
    counted: list[Counted]
    etag: str


class ModelPage(_Answer, frozen=True):
    """Versions, newest first; rounds train the one `in_force`, `etag` is for `If-Match` of a rollback or tag."""

    items: list[ModelReport]
    in_force: int
    etag: str
    next: int | None


class ModelDetail(_Answer, frozen=True):
    """A version; `lineage` is itself, the one it came from, and so on, at most 200; `etag` as in the list."""

    model: ModelReport
    lineage: list[int]
    etag: str


class Spent(_Answer, frozen=True):
    """What a task's rounds have cost so far; null where there is no bound, or none can be told.

    Args:
        committed: rounds.
        record: epsilon of one record of a device that took part in all of them, at `record_delta`.
        record_words: the same in words, or why it cannot be told.
        sums: that helpers were asked for, 0 without the engine secure.
        device_aggregator, device_release: epsilon of all that one device gave, at `device_delta`, against the
            aggregator and against those who see released models only.
        budget: the task's budget line at device level, if it has one, and whom it is against.
    """

    task: str
    committed: int
    record: float | None
    record_delta: float
    record_words: str
    sums: int
    device_aggregator: float | None
    device_release: float | None
    device_delta: float
    budget: float | None
    budget_against: str | None


class SpentPage(_Answer, frozen=True):
    """What each task has cost, by name."""

    items: list[Spent]
    next: str | None


class AuditPage(_Answer, frozen=True):
    """Entries of the audit log, newest first; not verified, see covey-aggregator audit verify."""

    items: list[AuditEntry]
    next: int | None


class Cosigned(_Answer, frozen=True):
    """Which helper has co-signed a checkpoint, and when."""

    helper: str
    at_s: float


class LogVerified(_Answer, frozen=True):
    """What a verification of the whole log found.

    Args:
        ended_s: Unix seconds.
        entries: how many were looked at.
        covered: entries under the newest checkpoint that fits; those after it are held by the chain alone.
        outcome: empty if everything holds; else the name of the first thing that does not, such as `edited`.
        detail: the same in words.
    """

    ended_s: float
    entries: int
    covered: int
    outcome: str
    detail: str


class AuditState(_Answer, frozen=True):
    """How far the audit log is proved.

    Args:
        entries: in the log.
        checkpoint: entries under the newest signed checkpoint; null for none.
        cosigned: by whom, verified with the keys that are pinned.
        helpers: those that are pinned.
        can_verify: whether the API knows the aggregator's key.
        verifying: entries that the running verification has looked at; null while none runs.
        verified: what the last one since this process began has found; null for none.
    """

    entries: int
    checkpoint: int | None
    cosigned: list[Cosigned]
    helpers: list[str]
    can_verify: bool
    verifying: int | None
    verified: LogVerified | None


class AccountPage(_Answer, frozen=True):
    """Accounts by name."""

    items: list[Account]
    next: str | None


class AccountBody(_Body, frozen=True):
    """A new account."""

    account: Name
    role: Role


class TokenPage(_Answer, frozen=True):
    """An account's tokens by public id."""

    items: list[Token]
    next: str | None


class TokenBody(_Body, frozen=True):
    """A new token: `scopes` null for all that both the role and the asking token may."""

    scopes: list[Scope] | None = None
    days: Annotated[float, Meta(gt=0, le=366)] = 90.0
    note: Annotated[str, Meta(max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$")] = ""


class NewToken(_Answer, frozen=True):
    """A token as its owner presents it, this once."""

    secret: str
    token: Token
