"""``covey-helper log``: what was co-signed of studies' audit logs, and how one begins anew."""

from __future__ import annotations

import msgspec

from aggregator.audit.checkpoints import parse_note
from aggregator.helper.assembly import HelperFiles
from aggregator.helper.cosigning import LastCosigned
from tests.aggregator.helper.helper_desk import TENANT
from tests.aggregator.helper.test_cosigning import AGGREGATOR_KEY, sign_checkpoint, tree
from tests.aggregator.helper.test_helper_cli import Office, office

__all__ = ["office"]


def cosigned(office: Office, size: int, before: LastCosigned = LastCosigned()) -> LastCosigned:  # noqa: B008 - frozen
    checkpoint = tree(size)
    with HelperFiles.load(office.config).store() as store:
        store.logs.advance(TENANT, sign_checkpoint(checkpoint, AGGREGATOR_KEY), before=before, now_s=1_800_000_000.0)
    return LastCosigned(size, checkpoint.root)


def test_what_was_co_signed_is_shown_and_given_to_whoever_verifies(office: Office) -> None:
    office.run("init", "CONFIG")
    assert msgspec.json.decode(office.says("log", "list", "CONFIG", "--json")) == []
    assert "co-signed yet" in office.fails(1, "log", "checkpoint", "CONFIG", "--tenant", TENANT)
    cosigned(office, 9, cosigned(office, 7))
    (found,) = msgspec.json.decode(office.says("log", "list", "CONFIG", "--json"))
    assert (found["tenant"], found["size"], found["given_up_s"]) == (TENANT, 9, None)
    told = office.says("log", "list", "CONFIG")
    assert tree(9).root.hex()[:16] in told
    note = office.says("log", "checkpoint", "CONFIG", "--tenant", TENANT)
    assert parse_note(note).checkpoint == tree(9)
    path = office.folder / "kept.note"
    office.says("log", "checkpoint", "CONFIG", "--tenant", TENANT, "--out", str(path))
    assert path.read_text() == note


def test_a_log_begins_anew_only_by_the_helpers_operator(office: Office) -> None:
    office.run("init", "CONFIG")
    assert "nothing is given up" in office.fails(1, "log", "begin-anew", "CONFIG", "--tenant", TENANT)
    cosigned(office, 9)
    assert "without a proof" in office.says("log", "begin-anew", "CONFIG", "--tenant", TENANT)
    (found,) = msgspec.json.decode(office.says("log", "list", "CONFIG", "--json"))
    assert found["given_up_s"] is not None
    assert "co-signed yet" in office.fails(1, "log", "checkpoint", "CONFIG", "--tenant", TENANT)
    cosigned(office, 3)
    assert "expected one of clinic" in office.fails(2, "log", "begin-anew", "CONFIG", "--tenant", "another")
