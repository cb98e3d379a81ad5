"""Checkpoints against the published example of C2SP's pages, and against forgers."""

from __future__ import annotations

import base64
from collections.abc import Callable
from types import ModuleType

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st

from aggregator.audit import checkpoints
from aggregator.audit.checkpoints import (
    Checkpoint,
    CheckpointError,
    Note,
    cosign,
    cosigned_s,
    cosigner_name,
    origin_of,
    parse_note,
    sign_checkpoint,
    verify_cosignature,
    verify_note,
    with_cosignatures,
)
from fl_protocol.errors import LocalMisuseError
from fl_protocol.signing import _CONTEXTS
from tests.enrolments import broken_copy

KEY, HELPER, STRANGER = (Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32) for number in (1, 2, 3))
TREE = Checkpoint(origin_of("clinic"), 20852163, bytes(range(32)))
NAME = cosigner_name("patients-union", "helper-a")
NOW_S = 1_800_000_000.9

# From c2sp.org/tlog-cosignature.
EXAMPLE = (
    "example.com/behind-the-sofa\n20852163\nCsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=\n\n"
    "— example.com/behind-the-sofa Az3grlgtzPICa5OS8npVmf1Myq/5IZniMp+ZJurmRDeOoRDe4URYN7u5/Zhcyv2q1gGzGku9nTo+zyWE+xe"
    "McTOAYQ8=\n"
    "— witness.example.com/w1 jWbPPwAAAABkGFDLEZMHwSRaJNiIDoe9DYn/zXcrtPHeolMI5OWXEhZCB9dlrDJsX3b2oyin1nPZqhf5nNo0xUe"
    "+mbIUBkBIfZ+qnA==\n"
)


def cosigned() -> Note:
    return with_cosignatures(sign_checkpoint(TREE, KEY), [cosign(TREE, NAME, HELPER, at_s=NOW_S)])


def test_the_published_example_is_read_and_written_back() -> None:
    note = parse_note(EXAMPLE)
    assert note.checkpoint[:2] == ("example.com/behind-the-sofa", 20852163)
    assert [one.name for one in note.signatures] == ["example.com/behind-the-sofa", "witness.example.com/w1"]
    assert int.from_bytes(note.signatures[1].signature[:8], "big") == 1679315147  # as that page says
    assert note.text == EXAMPLE


def test_the_published_key_id_is_ours() -> None:
    # The verifier key of sum.golang.org, as Go ships it: its name, key id, and kind with key.
    name, key_id, encoded = "sum.golang.org", "033de0ae", "Ac4zctda0e5eza+HJyk9SxEdh+s3Ux18htTTAD8OuAn8"
    raw = base64.b64decode(encoded)
    assert raw[:1] == b"\x01"
    assert checkpoints._key_id(name, b"\x01", Ed25519PublicKey.from_public_bytes(raw[1:])).hex() == key_id


def test_a_checkpoint_is_signed_co_signed_and_read_back() -> None:
    note = parse_note(cosigned().text)
    assert note == cosigned()
    assert verify_note(note, KEY.public_key()) == TREE
    assert cosigned_s(note, HELPER.public_key()) == 1_800_000_000
    assert cosigned_s(note, HELPER.public_key(), name=NAME) == 1_800_000_000
    assert cosigned_s(note, HELPER.public_key(), name="another/helper-a") is None
    assert cosigned_s(note, STRANGER.public_key()) is None
    assert [one.name for one in note.signatures] == ["covey/clinic", NAME]


def test_a_signer_is_in_a_note_once() -> None:
    again = cosign(TREE, NAME, HELPER, at_s=NOW_S + 60)
    assert with_cosignatures(cosigned(), [again]) == cosigned()


def test_the_log_is_named_after_the_study() -> None:
    assert origin_of("clinic") == "covey/clinic"
    with pytest.raises(LocalMisuseError):
        origin_of("clinic\n7")


def test_no_signed_message_of_the_protocol_begins_like_a_checkpoint() -> None:
    for context in _CONTEXTS.values():
        assert not TREE.text.startswith(context[:8])
        assert not checkpoints._stamped(TREE, 1).startswith(context[:8])


@pytest.mark.parametrize("changed", [TREE._replace(size=7), TREE._replace(root=bytes(32)), TREE._replace(origin="x")])
def test_another_checkpoint_has_no_signature(changed: Checkpoint) -> None:
    note = cosigned()._replace(checkpoint=changed)
    with pytest.raises(CheckpointError):
        verify_note(note, KEY.public_key())
    with pytest.raises(CheckpointError, match="is wrong"):
        cosigned_s(note, HELPER.public_key())


def test_a_stranger_signs_nothing() -> None:
    with pytest.raises(CheckpointError, match="not signed by this aggregator"):
        verify_note(sign_checkpoint(TREE, STRANGER), KEY.public_key())
    with pytest.raises(CheckpointError, match="not of this helper"):
        verify_cosignature(TREE, cosign(TREE, NAME, STRANGER, at_s=NOW_S), HELPER.public_key())


def test_an_aggregators_signature_is_no_co_signature() -> None:
    """One key for both: what it signs as the log says nothing about consistency."""
    note = sign_checkpoint(TREE, HELPER)
    assert cosigned_s(note, HELPER.public_key()) is None
    alone = Note(TREE, (cosign(TREE, TREE.origin, KEY, at_s=NOW_S),))
    with pytest.raises(CheckpointError, match="not signed"):
        verify_note(alone, KEY.public_key())


def test_the_time_of_a_co_signature_is_signed() -> None:
    (one,) = [one for one in cosigned().signatures if one.name == NAME]
    later = one._replace(signature=(1_900_000_000).to_bytes(8, "big") + one.signature[8:])
    with pytest.raises(CheckpointError, match="is wrong"):
        verify_cosignature(TREE, later, HELPER.public_key())
    far = one._replace(signature=b"\xff" * 8 + one.signature[8:])
    with pytest.raises(CheckpointError):
        verify_cosignature(TREE, far, HELPER.public_key())


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[:-1],
        lambda text: text + "\n",
        lambda text: text + "— someone\n",
        lambda text: text.replace("—", "-"),
        lambda text: text.replace("\n\n", "\n"),
        lambda text: text.replace("20852163", "020852163"),
        lambda text: text.replace("20852163", "-1"),
        lambda text: text.replace("20852163", "٣"),
        lambda text: text.replace("20852163", "9" * 30),
        lambda text: text.replace("covey/clinic\n20852163", "\n20852163"),
        lambda text: text.replace("20852163\n", "20852163\nmore\n"),
        lambda text: text.replace("covey/clinic\n", "covey/clinic\r\n", 1),
        lambda text: text.replace("Hh8=", "Hh9="),  # other spelling of the same bytes
        lambda text: text.replace("Hh8=", "Hh8"),
        lambda text: text.replace("Hh8=", "Hh8=AAAA"),
        lambda text: text.replace("AAECAwQF", ""),
        lambda text: text + 65 * "— a AAAAAAAA\n",
        lambda text: text + 2000 * "— a AAAAAAAA\n",
        lambda text: text + "— a AAA=\n",
        lambda text: text + "— a+b AAAAAAAA\n",
        lambda text: text.split("\n\n")[0] + "\n\n",
        lambda text: "",
        lambda text: "\n\n— a AAAAAAAA\n",
    ],
)
def test_what_is_no_checkpoint_is_refused(change: Callable[[str], str]) -> None:
    text = cosigned().text
    assert change(text) != text
    with pytest.raises(CheckpointError):
        parse_note(change(text))


@given(st.one_of(st.binary(max_size=300), st.text(max_size=300)))
def test_rubbish_is_no_checkpoint(data: bytes | str) -> None:
    with pytest.raises(CheckpointError):
        parse_note(data)


@given(st.integers(0, 2**62), st.binary(min_size=32, max_size=32))
def test_every_checkpoint_is_read_back(size: int, root: bytes) -> None:
    tree = Checkpoint("covey/clinic", size, root)
    assert parse_note(sign_checkpoint(tree, KEY).text).checkpoint == tree


def _forgeries_fail(module: ModuleType) -> None:
    note = cosigned()
    forged = note._replace(checkpoint=TREE._replace(root=bytes(32)))
    bare = sign_checkpoint(TREE, STRANGER)
    believed = []
    for what, ask in (
        ("a note of a stranger", lambda: module.verify_note(bare, KEY.public_key())),
        ("another root", lambda: module.verify_note(forged, KEY.public_key())),
        ("another root, co-signed", lambda: module.cosigned_s(forged, HELPER.public_key())),
        ("an unsigned time", lambda: _later(module, note)),
    ):
        try:
            ask()
        except CheckpointError:
            continue
        except module.CheckpointError:
            continue
        believed.append(what)
    assert not believed, f"believed: {believed}"


def _later(module: ModuleType, note: Note) -> None:
    one = note.signatures[1]
    later = one._replace(signature=(1_900_000_000).to_bytes(8, "big") + one.signature[8:])
    module.verify_cosignature(TREE, later, HELPER.public_key())


@pytest.mark.parametrize(
    "change",
    [
        ("        key.verify(signature, signed)", "        pass"),
        ("    if not found:\n", "    if False:\n"),
        ("_stamped(checkpoint, stamp), one.name", "_stamped(checkpoint, 1_800_000_000), one.name"),
    ],
)
def test_a_reader_that_believes_forgeries_is_caught(change: tuple[str, str]) -> None:
    _forgeries_fail(checkpoints)
    _forgeries_fail(broken_copy("aggregator.audit.checkpoints"))
    with pytest.raises(AssertionError, match="believed"):
        _forgeries_fail(broken_copy("aggregator.audit.checkpoints", change))
