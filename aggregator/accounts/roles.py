"""Roles, and the scopes that say what each of them may do. Pure.

A token has scopes of its own, of those that its account's role has: a script that only reads gets a token that can
only read, whoever made it.
"""

from __future__ import annotations

from typing import Literal, get_args

Role = Literal["viewer", "operator", "admin"]
Scope = Literal[
    "tasks:read",
    "tasks:write",
    "devices:read",
    "devices:write",
    "models:read",
    "models:write",
    "privacy:read",
    "audit:read",
    "accounts:read",
    "accounts:write",
]
ROLES: tuple[Role, ...] = get_args(Role)
SCOPES: tuple[Scope, ...] = get_args(Scope)
_VIEWER: frozenset[Scope] = frozenset({"tasks:read", "devices:read", "models:read", "privacy:read", "audit:read"})
_OPERATOR: frozenset[Scope] = _VIEWER | {"tasks:write", "devices:write", "models:write"}
ROLE_SCOPES: dict[Role, frozenset[Scope]] = {"viewer": _VIEWER, "operator": _OPERATOR, "admin": frozenset(SCOPES)}
"""What each role may do at most."""
