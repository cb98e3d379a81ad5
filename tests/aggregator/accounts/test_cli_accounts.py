"""``covey-aggregator account`` and ``token``."""

from __future__ import annotations

import os
import time

from aggregator.accounts.account_store import Accounts
from aggregator.accounts.verification import TokenVerifier
from aggregator.assembly import AggregatorFiles
from tests.aggregator.operator_desk import Operator, one_sentence, operator

__all__ = ["operator"]


def test_an_account_gets_a_token_that_holds_until_it_is_revoked(operator: Operator) -> None:
    operator.says("init", "CONFIG")
    assert "maria has the role operator" in operator.says("account", "create", "maria", "--role", "operator", "CONFIG")
    text = operator.says("token", "create", "maria", "--scope", "tasks:read", "CONFIG").strip()
    store = AggregatorFiles.load(operator.config).open_store()
    verifier = TokenVerifier(Accounts(store.database), now_s=time.time, entropy=os.urandom)
    assert verifier.verify(text, address="192.0.2.7").scopes == {"tasks:read"}
    store.close()
    (listed,) = operator.json("token", "list", "CONFIG")
    assert (listed["account"], listed["last_address"], listed["scopes"]) == ("maria", "192.0.2.7", ["tasks:read"])
    assert text.split("_", 2)[2] not in str(listed)
    assert "192.0.2.7" in operator.says("token", "list", "--account", "maria", "CONFIG")
    assert operator.json("token", "revoke", listed["token"], "CONFIG")["revoked_s"] is not None
    assert operator.json("account", "disable", "maria", "CONFIG")["disabled_s"] is not None
    assert operator.json("account", "list", "CONFIG")[0]["role"] == "operator"


def test_what_cannot_be_is_one_sentence(operator: Operator) -> None:
    operator.says("init", "CONFIG")
    operator.says("account", "create", "maria", "--role", "viewer", "CONFIG")
    for code, arguments in (
        (1, ["account", "create", "maria", "--role", "admin"]),
        (1, ["account", "disable", "nobody"]),
        (1, ["token", "create", "maria", "--scope", "tasks:write"]),
        (2, ["token", "create", "maria", "--scope", "everything"]),
        (1, ["token", "create", "nobody"]),
        (1, ["token", "revoke", "0123456789abcdef"]),
    ):
        one_sentence(operator.run(*arguments, "CONFIG"), code)
