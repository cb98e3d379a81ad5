"""``covey-aggregator audit``: from what was done to a proof that somebody else checks without the database."""

from __future__ import annotations

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import update

from aggregator.assembly import AggregatorFiles
from aggregator.audit.checkpoint_rows import Checkpoints
from aggregator.audit.checkpoints import cosign, parse_note
from aggregator.store import schema
from fl_protocol.signing import public_key_hex
from tests.aggregator.operator_desk import CONFIG, Operator, one_sentence, operator

__all__ = ["operator"]
HELPER = Ed25519PrivateKey.from_private_bytes(b"\x02" * 32)
HELPER_HEX = public_key_hex(HELPER.public_key())


@pytest.fixture
def study(operator: Operator, monkeypatch: pytest.MonkeyPatch) -> Operator:
    """A task and two devices, signed, and co-signed by a helper; and one entry more."""
    monkeypatch.setenv("LOGNAME", "anna")
    helpers = f'helpers = [{{ name = "helper-a", operator = "operator-a", key = "{HELPER_HEX}" }}]\n'
    operator.config.write_text(helpers + CONFIG)
    operator.run("init", "CONFIG")
    operator.says("task", "create", "./watch.toml", "CONFIG")
    operator.says("device", "add", "CONFIG", "watch-1", "ab" * 32)
    operator.says("device", "add", "CONFIG", "watch-2", "cd" * 32)
    note = parse_note(operator.says("audit", "checkpoint", "CONFIG"))
    assert note.checkpoint[:2] == ("covey/clinic", 3)
    store = operator.store()
    signature = cosign(note.checkpoint, "operator-a/helper-a", HELPER, at_s=1_800_000_000)
    Checkpoints(store.database, "covey/clinic").add_cosignature(3, "helper-a", signature)
    store.close()
    operator.says("device", "remove", "CONFIG", "watch-2")
    return operator


def key_of(study: Operator) -> str:
    return public_key_hex(AggregatorFiles.load(study.config).signing_key().public_key())


def damage(study: Operator, number: int) -> None:
    store = study.store()
    table = schema.audit_entries
    with store.database.transaction() as connection:
        connection.execute(update(table).where(table.c.number == number).values(entry=b"{}"))
    store.close()


def test_entries_are_listed_newest_first(study: Operator) -> None:
    found = study.json("audit", "list", "CONFIG")
    assert [one["action"] for one in found] == ["device.removed", "device.added", "device.added", "task.created"]
    assert {one["actor"] for one in found} == {"local:anna"}
    told = study.says("audit", "list", "CONFIG", "--action", "device.", "--limit", "2")
    assert "watch-2" in told
    assert "watch-1" not in told
    assert "older ones: --before 2" in told
    assert [one["number"] for one in study.json("audit", "list", "CONFIG", "--before", "2")] == [1, 0]
    assert [one["number"] for one in study.json("audit", "list", "CONFIG", "--subject", "watch-2")] == [3, 2]
    assert study.json("audit", "list", "CONFIG", "--actor", "nobody") == []


def test_a_log_that_holds_is_told_with_who_co_signed_it(study: Operator) -> None:
    told = study.says("audit", "verify", "CONFIG")
    assert "holds: 4 entries, 1 checkpoints" in told
    assert "helper helper-a has co-signed the first 3" in told
    assert "the last 1 are under no checkpoint yet" in told
    found = study.json("audit", "verify", "CONFIG")
    assert (found["fault"], found["cosigned"], found["covered"]) == (None, {"helper-a": 3}, 3)


def test_a_log_that_does_not_hold_is_exit_code_one(study: Operator) -> None:
    damage(study, 2)
    code, out, _ = study.run("audit", "verify", "CONFIG")
    assert code == 1
    assert "DOES NOT HOLD: edited: entry 2" in out
    code, out, _ = study.run("audit", "verify", "CONFIG", "--json")
    assert (code, msgspec.json.decode(out)["fault"]["outcome"]) == (1, "edited")


def test_an_export_is_verified_anywhere_with_keys_alone(study: Operator) -> None:
    assert "4 entries" in study.says("audit", "export", "CONFIG", "--out", "./log.jsonl")
    keys = ("--tenant", "clinic", "--aggregator-key", key_of(study))
    told = study.says("audit", "verify", "./log.jsonl", *keys, "--helper-key", HELPER_HEX)
    assert f"helper {HELPER_HEX} has co-signed the first 3" in told
    stranger = public_key_hex(Ed25519PrivateKey.generate().public_key())
    assert f"helper {stranger} has co-signed none" in study.says(
        "audit", "verify", "./log.jsonl", *keys, "--helper-key", stranger
    )
    study.edit("log.jsonl", "watch-1", "watch-9")
    assert study.run("audit", "verify", "./log.jsonl", *keys)[0] == 1
    one_sentence(study.run("audit", "export", "CONFIG", "--out", "./log.jsonl"), 2, "File exists")


def test_a_checkpoint_kept_elsewhere_has_to_fit(study: Operator) -> None:
    study.says("audit", "checkpoint", "CONFIG", "--out", "./kept.note")
    assert study.json("audit", "verify", "CONFIG", "--checkpoint", "./kept.note")["checkpoints"] == 3
    store = study.store()
    with store.database.transaction() as connection:
        connection.execute(schema.audit_entries.delete().where(schema.audit_entries.c.number == 3))
        connection.execute(schema.audit_checkpoints.delete().where(schema.audit_checkpoints.c.size == 4))
    store.close()
    assert study.run("audit", "verify", "CONFIG")[0] == 0
    code, out, _ = study.run("audit", "verify", "CONFIG", "--checkpoint", "./kept.note", "--json")
    assert (code, msgspec.json.decode(out)["fault"]["outcome"]) == (1, "truncated")


def test_one_entry_is_proved_to_somebody_without_the_database(study: Operator) -> None:
    study.says("audit", "prove", "1", "CONFIG", "--out", "./entry.json")
    told = study.says("audit", "check", "./entry.json", "--helper-key", HELPER_HEX)
    assert "proved: it is in the first 3 entries of covey/clinic" in told
    assert "watch-1" in told
    found = study.json("audit", "check", "./entry.json", "--helper-key", HELPER_HEX, "--aggregator-key", key_of(study))
    assert (found["outcome"], found["entry"]["subject"]) == ("proved", "watch-1")
    assert msgspec.json.decode(study.says("audit", "prove", "1", "CONFIG"))["covey_audit_proof"] == 1
    study.edit("entry.json", "watch-1", "watch-9")
    code, out, _ = study.run("audit", "check", "./entry.json", "--helper-key", HELPER_HEX)
    assert code == 1
    assert "DOES NOT HOLD: edited" in out
    code, out, _ = study.run("audit", "check", "./entry.json", "--helper-key", HELPER_HEX, "--json")
    assert (code, msgspec.json.decode(out)["outcome"]) == (1, "edited")


def test_what_cannot_be_proved_or_checked_is_one_sentence(study: Operator) -> None:
    one_sentence(study.run("audit", "prove", "3", "CONFIG"), 1, "no checkpoint covers entry 3 yet")
    one_sentence(study.run("audit", "prove", "99", "CONFIG"), 1, "no entry 99")
    study.says("audit", "prove", "1", "CONFIG", "--out", "./entry.json")
    one_sentence(study.run("audit", "check", "./entry.json"), 2, "expected --helper-key")
    one_sentence(study.run("audit", "check", "./entry.json", "--helper-key", "x"), 1, "64 hex digits")
    one_sentence(study.run("audit", "check", "./nowhere.json", "--helper-key", HELPER_HEX), 2, "nowhere.json")
    one_sentence(study.run("audit", "verify"), 2, "expected --config, or both")
    one_sentence(study.run("audit", "verify", "./watch.toml", "CONFIG"), 1, "expected an export")
    one_sentence(study.run("audit", "verify", "CONFIG", "--checkpoint", "./watch.toml"), 1, "of a checkpoint")
    one_sentence(
        study.run("audit", "verify", "--tenant", "clinic", "--aggregator-key", key_of(study)),
        2,
        "expected --config, or",
    )


def test_the_newest_checkpoint_is_shown_when_there_is_nothing_new(study: Operator) -> None:
    first = study.says("audit", "checkpoint", "CONFIG")
    assert parse_note(first).checkpoint.size == 4
    assert study.says("audit", "checkpoint", "CONFIG") == first


def test_an_empty_log_has_nothing_to_sign(operator: Operator) -> None:
    operator.run("init", "CONFIG")
    assert "nothing to sign" in operator.says("audit", "checkpoint", "CONFIG")
    assert "holds: 0 entries" in operator.says("audit", "verify", "CONFIG")
    assert operator.json("audit", "list", "CONFIG") == []
