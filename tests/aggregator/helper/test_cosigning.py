"""A helper co-signs a study's log only as it grows: no fork, no smaller tree, nothing without a proof."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import event

from aggregator.audit.checkpoints import (
    Checkpoint,
    NoteSignature,
    cosigned_s,
    origin_of,
    parse_note,
    sign_checkpoint,
    verify_cosignature,
)
from aggregator.audit.merkle import CompactRange, NodeSource, consistency_proof, leaf_hash, root_of
from aggregator.errors import ConflictError
from aggregator.helper import cosigner, cosigning
from aggregator.helper.answering import IgnoredError, Study
from aggregator.helper.cosigning import CosignRefusedError, LastCosigned
from fl_protocol.errors import ProtocolError
from fl_protocol.log_messages import CosignatureMsg, CosignRefusal, CosignRefusalMsg, CosignRequestMsg
from fl_protocol.signing import sign, verify
from tests.aggregator.helper.helper_desk import DEVICES, HELPER, IDENTITY, STUDY, TENANT, Desk, request_for
from tests.enrolments import broken_copy
from tests.fl_protocol.examples import AGGREGATOR_KEY

STRANGER = Ed25519PrivateKey.from_private_bytes(bytes(32))
Leaves = Sequence[bytes]
HONEST = [leaf_hash(b"entry %d" % number) for number in range(40)]
FORK = [*HONEST[:20], *(leaf_hash(b"rewritten %d" % number) for number in range(20, 40))]


def nodes_of(leaves: Leaves) -> NodeSource:
    def node(level: int, index: int) -> bytes:
        grown = CompactRange()
        for leaf in leaves[index << level : (index + 1) << level]:
            grown.append(leaf)
        return grown.root()

    return node


def tree(size: int, leaves: Leaves = HONEST) -> Checkpoint:
    return Checkpoint(origin_of(TENANT), size, root_of(size, nodes_of(leaves)))


def request(
    size: int,
    start: int = 0,
    *,
    leaves: Leaves = HONEST,
    key: Ed25519PrivateKey = AGGREGATOR_KEY,
    note_key: Ed25519PrivateKey = AGGREGATOR_KEY,
    checkpoint: Checkpoint | None = None,
    **changes: Any,
) -> bytes:
    """What an aggregator asks that has these leaves."""
    note = sign_checkpoint(checkpoint or tree(size, leaves), note_key).text.encode()
    proof = tuple(consistency_proof(start, size, nodes_of(leaves))) if start <= size else ()
    fields = {"tenant": TENANT, "helper": HELPER, "note": note, "start": start, "proof": proof}
    return sign(CosignRequestMsg(**{**fields, **changes}), key)


def read(found: list[bytes]) -> CosignatureMsg | CosignRefusalMsg:
    """The only reply, its signature verified."""
    (data,) = found
    try:
        return verify(data, CosignatureMsg, IDENTITY.public_key())
    except ProtocolError:
        return verify(data, CosignRefusalMsg, IDENTITY.public_key())


def is_cosigned(found: list[bytes], checkpoint: Checkpoint, at_s: float) -> None:
    answer = read(found)
    assert isinstance(answer, CosignatureMsg), answer
    assert (answer.size, answer.root) == (checkpoint.size, checkpoint.root)
    name = f"operator-a/{HELPER}"
    key_id = cosigning_key_id(name)
    one = NoteSignature(name, key_id, answer.cosignature)
    assert verify_cosignature(checkpoint, one, IDENTITY.public_key()) == int(at_s)


def cosigning_key_id(name: str) -> bytes:
    from aggregator.audit.checkpoints import cosign  # noqa: PLC0415 - the only use

    return cosign(tree(1), name, IDENTITY, at_s=0).key_id


def refused(found: list[bytes]) -> tuple[CosignRefusal, int]:
    answer = read(found)
    assert isinstance(answer, CosignRefusalMsg), answer
    return answer.reason, answer.last_size


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def test_a_log_that_grows_is_co_signed_again_and_again(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    last = 0
    for size in (1, 7, 8, 8, 23, 40):
        is_cosigned(desk.ask(request(size, last)), tree(size), desk.now_s)
        last = size
        desk.now_s += 100
        desk.close()
        desk = Desk(tmp_path, now_s=desk.now_s)  # and killed in between
    (kept,) = desk.store.logs.all()
    assert (kept.tenant, kept.size, kept.root) == (TENANT, 40, tree(40).root)
    assert cosigned_s(parse_note(kept.note), IDENTITY.public_key()) == int(kept.cosigned_s)


def test_the_journal_tells_of_each_new_checkpoint_once(desk: Desk) -> None:
    desk.ask(request(7))
    desk.ask(request(7, 7))
    (told,) = desk.journal.named("checkpoint_cosigned")
    assert (told["tenant"], told["size"], told["root"]) == (TENANT, 7, tree(7).root.hex())


def test_a_smaller_log_is_refused(desk: Desk) -> None:
    desk.ask(request(30))
    assert refused(desk.ask(request(29, 0))) == (CosignRefusal.SMALLER, 30)
    assert refused(desk.ask(request(29, 30))) == (CosignRefusal.SMALLER, 30)
    (told, _) = desk.journal.named("checkpoint_refused")
    assert told["reason"] == "smaller"
    is_cosigned(desk.ask(request(31, 30)), tree(31), desk.now_s)


@pytest.mark.parametrize("size", [30, 31, 40])
def test_a_fork_is_refused_and_kept_as_evidence(desk: Desk, size: int) -> None:
    desk.ask(request(30))
    assert refused(desk.ask(request(size, 30, leaves=FORK))) == (CosignRefusal.FORKED, 30)
    (told,) = desk.journal.named("checkpoint_refused")
    assert parse_note(told["note"]).checkpoint == tree(size, FORK)
    is_cosigned(desk.ask(request(40, 30)), tree(40), desk.now_s)


def test_a_fork_of_before_anything_was_co_signed_is_no_fork(desk: Desk) -> None:
    desk.ask(request(20))
    is_cosigned(desk.ask(request(40, 20, leaves=FORK)), tree(40, FORK), desk.now_s)
    assert refused(desk.ask(request(40, 40))) == (CosignRefusal.FORKED, 40)


def test_without_the_proof_from_its_own_last_one_nothing_is_co_signed(desk: Desk) -> None:
    desk.ask(request(30))
    assert refused(desk.ask(request(40, 0))) == (CosignRefusal.OTHER_START, 30)
    assert refused(desk.ask(request(40, 29))) == (CosignRefusal.OTHER_START, 30)
    assert not desk.journal.named("checkpoint_refused")  # an honest question
    assert refused(desk.ask(request(40, 30, proof=()))) == (CosignRefusal.FORKED, 30)
    assert refused(desk.ask(request(40, 30, proof=(bytes(32),) * 5))) == (CosignRefusal.FORKED, 30)


@pytest.mark.parametrize(
    "changes",
    [
        {"note_key": STRANGER},
        {"note": b"rubbish"},
        {"checkpoint": tree(7)._replace(origin="covey/another")},
    ],
)
def test_what_is_no_checkpoint_of_this_log_is_refused(desk: Desk, changes: dict[str, Any]) -> None:
    assert refused(desk.ask(request(7, **changes))) == (CosignRefusal.BAD_CHECKPOINT, 0)
    assert desk.store.logs.all() == []


@pytest.mark.parametrize("changes", [{"key": STRANGER}, {"helper": "helper-b"}, {"tenant": "another"}])
def test_what_the_aggregator_does_not_ask_of_this_helper_is_not_answered(desk: Desk, changes: dict[str, Any]) -> None:
    assert desk.ask(request(7, **changes)) == []
    assert desk.store.logs.all() == []


def test_rounds_are_still_answered(desk: Desk) -> None:
    desk.ask(request(7))
    assert len(desk.ask(request_for(desk.manifest(), DEVICES[:4]))) == 1
    is_cosigned(desk.ask(request(9, 7)), tree(9), desk.now_s)


def test_a_log_may_begin_anew_when_the_helpers_operator_says_so(desk: Desk) -> None:
    desk.ask(request(30))
    assert not desk.store.logs.give_up("another", now_s=1.0)
    assert desk.store.logs.give_up(TENANT, now_s=desk.now_s)
    is_cosigned(desk.ask(request(25, leaves=FORK)), tree(25, FORK), desk.now_s)
    given_up, now = desk.store.logs.all()
    assert (given_up.size, given_up.given_up_s, now.size, now.given_up_s) == (30, desk.now_s, 25, None)


def test_two_processes_on_one_store_co_sign_once(desk: Desk) -> None:
    desk.ask(request(30))
    note = sign_checkpoint(tree(40), AGGREGATOR_KEY)
    with pytest.raises(ConflictError):
        desk.store.logs.advance(TENANT, note, before=LastCosigned(20, tree(20).root), now_s=1.0)


def test_nothing_is_said_that_is_not_in_the_store(desk: Desk) -> None:
    def full(*_ignored: object) -> None:
        raise OSError(28, "No space left on device")

    event.listen(desk.store.database.engine, "commit", full)
    assert desk.ask(request(30)) == []
    event.remove(desk.store.database.engine, "commit", full)
    assert desk.store.logs.all() == []
    is_cosigned(desk.ask(request(20, leaves=FORK)), tree(20, FORK), desk.now_s)


# Broken helpers are caught.


def _misleads(module: Any) -> list[str]:
    """What a helper lets pass that it must not."""
    last = LastCosigned(30, tree(30).root)
    cases: dict[str, Callable[[], object]] = {
        "a fork": lambda: _ask(module, request(40, 30, leaves=FORK), last),
        "a fork of the same size": lambda: _ask(module, request(30, 30, leaves=FORK), last),
        "a smaller log": lambda: _ask(module, request(20, 30, leaves=HONEST), last),
        "no proof": lambda: _ask(module, request(40, 0, leaves=FORK), last),
        "a stranger's checkpoint": lambda: _ask(module, request(40, 30, note_key=STRANGER), last),
        "another log": lambda: _ask(module, request(30, 30, checkpoint=tree(30)._replace(origin="covey/x")), last),
        "a stranger's request": lambda: module.read_cosign_request(request(40, 30, key=STRANGER), STUDY, helper=HELPER),
        "another helper's request": lambda: module.read_cosign_request(
            request(40, 30, helper="helper-b"), STUDY, helper=HELPER
        ),
    }
    passed = []
    for what, ask in cases.items():
        try:
            ask()
        except (CosignRefusedError, IgnoredError, module.CosignRefusedError):
            continue
        passed.append(what)
    return passed


def _ask(module: Any, data: bytes, last: LastCosigned) -> object:
    study: Study = STUDY
    return module.checked_note(module.read_cosign_request(data, study, helper=HELPER), study, last)


@pytest.mark.parametrize(
    ("change", "passes"),
    [
        (("verify_consistency(last.size, tree.size, request.proof, (last.root, tree.root))", "pass"), "a fork"),
        (
            (
                "(last.root, tree.root))",
                "(tree.root, tree.root) if last.size == tree.size else (last.root, tree.root))",
            ),
            "a fork of the same size",
        ),
        (("if request.start != last.size:", "if False:"), ""),  # the proof itself does not fit then
        (("verify_consistency(last.size,", "verify_consistency(request.start,"), ""),
        (("verify_note(note, study.aggregator)", "pass"), "a stranger's checkpoint"),
        (("if note.checkpoint.origin != origin_of(study.tenant):", "if False:"), "another log"),
        (("if (request.tenant, request.helper) != (study.tenant, helper):", "if False:"), "another helper's request"),
    ],
)
def test_a_helper_that_co_signs_what_it_must_not_is_caught(change: tuple[str, str], passes: str) -> None:
    assert _misleads(cosigning) == []
    assert _misleads(broken_copy("aggregator.helper.cosigning")) == []
    found = _misleads(broken_copy("aggregator.helper.cosigning", change))
    assert (passes in found) if passes else found == []


def test_a_helper_that_takes_the_proofs_own_start_is_caught() -> None:
    """Both checks gone: whoever asks could begin at the empty tree."""
    copy = broken_copy(
        "aggregator.helper.cosigning",
        ("if request.start != last.size:", "if False:"),
        (
            "verify_consistency(last.size, tree.size, request.proof, (last.root, tree.root))",
            "request.start and verify_consistency(last.size, tree.size, request.proof, (last.root, tree.root))",
        ),
        ("if tree.size < last.size:", "if False:"),
    )
    assert "no proof" in _misleads(copy)


def test_a_helper_that_co_signs_before_it_keeps_it_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in between, it would not know what it has said."""
    copy = broken_copy(
        "aggregator.helper.cosigner", ("        self._logs.advance(", "        (lambda *_a, **_b: None)(")
    )
    monkeypatch.setattr(cosigner.Cosigner, "_cosigned", copy.Cosigner._cosigned)
    desk = Desk(tmp_path)
    is_cosigned(desk.ask(request(30)), tree(30), desk.now_s)
    desk.close()
    desk = Desk(tmp_path)
    with pytest.raises(AssertionError):
        assert refused(desk.ask(request(30, leaves=FORK))) == (CosignRefusal.OTHER_START, 30)
