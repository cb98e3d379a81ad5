"""Accounts and their tokens: `/v1/accounts`, `/v1/tokens`; for admins."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from aggregator.accounts.account_store import Account, AccountError, Token
from aggregator.accounts.roles import ROLE_SCOPES
from aggregator.api.answers import AccountBody, AccountPage, NewToken, TokenBody, TokenPage
from aggregator.api.guard import GuardedRoute, actor_of, identity_of, needs, services_of
from aggregator.api.problems import ProblemError
from aggregator.api.requests import AccountName, Limit, NameCursor, TokenId, answer, told
from fl_protocol.enrolment import DAY_S
from fl_protocol.errors import LocalMisuseError
from fl_protocol.topics import checked_name

router = APIRouter(route_class=GuardedRoute, tags=["accounts"])
_STATUSES = {
    "unknown_account": 404,
    "unknown_token": 404,
    "account_exists": 409,
    "account_disabled": 409,
    "token_revoked": 409,
    "bad_token": 422,
}


def problem_of(error: AccountError) -> ProblemError:
    """An error of accounts as an answer."""
    return ProblemError(_STATUSES[error.code], error.code, str(error))


@router.get("/v1/accounts", **needs("accounts:read", AccountPage))
def list_accounts(request: Request, cursor: NameCursor = None, limit: Limit = 50) -> Response:
    """List accounts by name."""
    found = services_of(request).accounts.page(after=cursor or "", limit=limit + 1)
    items = found[:limit]
    return answer(AccountPage(items=items, next=items[-1].account if len(found) > limit else None))


@router.post("/v1/accounts", **needs("accounts:write", Account, 409, success=201, body=AccountBody))
def create_account(request: Request) -> Response:
    """Add an account; it can do nothing until it has a token."""
    services, body = services_of(request), told(request, AccountBody)
    try:
        name = checked_name(body.account, "account")
    except LocalMisuseError as error:  # a line's end, which the pattern lets through
        raise ProblemError(422, "invalid", str(error)) from error
    made = services.accounts.create(name, body.role, now_s=services.now_s(), actor=actor_of(request))
    return answer(made, status=201)


@router.get("/v1/accounts/{account}", **needs("accounts:read", Account, 404))
def show_account(request: Request, account: AccountName) -> Response:
    """Show an account."""
    return answer(services_of(request).accounts.get(account))


@router.post("/v1/accounts/{account}/disable", **needs("accounts:write", Account, 404, 409))
def disable_account(request: Request, account: AccountName) -> Response:
    """Let none of an account's tokens do anything more; nobody disables the account that they use."""
    services = services_of(request)
    if account == identity_of(request).account:
        raise ProblemError(409, "own_account", "an account does not disable itself; ask another admin")
    return answer(services.accounts.disable(account, now_s=services.now_s(), actor=actor_of(request)))


@router.get("/v1/accounts/{account}/tokens", **needs("accounts:read", TokenPage, 404))
def list_tokens(request: Request, account: AccountName, cursor: NameCursor = None, limit: Limit = 50) -> Response:
    """List an account's tokens by public id."""
    found = services_of(request).accounts.tokens(account=account, after=cursor or "", limit=limit + 1)
    items = found[:limit]
    return answer(TokenPage(items=items, next=items[-1].token if len(found) > limit else None))


@router.post(
    "/v1/accounts/{account}/tokens", **needs("accounts:write", NewToken, 404, 409, success=201, body=TokenBody)
)
def create_token(request: Request, account: AccountName) -> Response:
    """Make a token; its secret is answered this once. It may do nothing that the asking token may not."""
    services, body, own = services_of(request), told(request, TokenBody), identity_of(request).scopes
    role = services.accounts.get(account).role
    wanted = ROLE_SCOPES[role] & own if body.scopes is None else frozenset(body.scopes)
    # Security: or a token for accounts alone could make itself one for everything.
    if not wanted <= own:
        raise ProblemError(403, "beyond_own", "a token gives no scopes that it does not have; ask another admin")
    now_s = services.now_s()
    token, made = services.accounts.add_token(
        account,
        scopes=wanted,
        note=body.note,
        expires_s=now_s + body.days * DAY_S,
        now_s=now_s,
        entropy=services.entropy,
        actor=actor_of(request),
    )
    return answer(NewToken(secret=made.text, token=token), status=201)


@router.delete("/v1/tokens/{token}", **needs("accounts:write", Token, 404, 409))
def revoke_token(request: Request, token: TokenId) -> Response:
    """Let a token do nothing more, from its next request on."""
    services = services_of(request)
    return answer(services.accounts.revoke(token, now_s=services.now_s(), actor=actor_of(request)))
