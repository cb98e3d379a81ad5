"""Checkpoints of the audit log: its size and root, signed by the aggregator and co-signed by helpers. Pure.

The text form is that of C2SP's tlog-checkpoint, a signed note: origin, size and root in base64, a line each; an empty
line; a line for each signature. So any tool that knows signed notes reads them, and so does a person.

    covey/clinic
    20852163
    CsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=

    — covey/clinic Az3grlgtzPICa5OS8npVmf1Myq/5IZniMp+ZJurmRDeOoRDe4URYN7u5/Zhcyv2q1gGzGku9nTo+zyWE+xeMcTOAYQ8=

The aggregator signs as signed-note says (type 0x01), under the log's origin as its name. Helpers sign as
tlog-cosignature says (type 0x04), which binds the time too, under the name `OPERATOR/HELPER`: the statement that this
is the largest tree that they have seen of this log, and that it continues all that they had seen. Neither text can pass
for another message of the protocol: those are signed behind `covey v1 `.

Sources: c2sp.org/signed-note, c2sp.org/tlog-checkpoint, c2sp.org/tlog-cosignature.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Iterable
from typing import NamedTuple

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from aggregator.audit.entries import AuditError
from fl_protocol.topics import checked_name

LONGEST_NOTE_BYTES = 16 * 1024
MOST_SIGNATURES = 64
_ED25519, _COSIGNATURE = b"\x01", b"\x04"
_SIZE = re.compile(r"0|[1-9][0-9]{0,18}", re.ASCII)
_LINE = re.compile(r"— (?P<name>[^\s+]+) (?P<signature>[A-Za-z0-9+/]+={0,2})")
_LARGEST_TIME = 2**63 - 1


class CheckpointError(AuditError):
    """What should be a checkpoint or its signature is none."""


class Checkpoint(NamedTuple):
    """The state of a log.

    Args:
        origin: the log's name.
        size: entries.
        root: of the tree, 32 bytes.
    """

    origin: str
    size: int
    root: bytes

    @property
    def text(self) -> bytes:
        """What is signed."""
        return f"{self.origin}\n{self.size}\n{base64.b64encode(self.root).decode()}\n".encode()


class NoteSignature(NamedTuple):
    """A signature as it stands in a note, not verified.

    Args:
        name: of the signer.
        key_id: 4 bytes, which tell its key and the kind of signature.
        signature: what they are about.
    """

    name: str
    key_id: bytes
    signature: bytes

    @property
    def line(self) -> str:
        """As it stands in the note, with the end of its line."""
        return f"— {self.name} {base64.b64encode(self.key_id + self.signature).decode()}\n"


class Note(NamedTuple):
    """A checkpoint with its signatures, none of them verified."""

    checkpoint: Checkpoint
    signatures: tuple[NoteSignature, ...]

    @property
    def text(self) -> str:
        """The whole note."""
        return self.checkpoint.text.decode() + "\n" + "".join(one.line for one in self.signatures)


def origin_of(tenant: str) -> str:
    """The name of a study's log. Raises LocalMisuseError: it is no tenant."""
    return f"covey/{checked_name(tenant, 'tenant')}"


def cosigner_name(operator: str, helper: str) -> str:
    """The name that a helper co-signs under."""
    return f"{operator}/{helper}"


def sign_checkpoint(checkpoint: Checkpoint, key: Ed25519PrivateKey) -> Note:
    """A checkpoint with the aggregator's signature."""
    key_id = _key_id(checkpoint.origin, _ED25519, key.public_key())
    return Note(checkpoint, (NoteSignature(checkpoint.origin, key_id, key.sign(checkpoint.text)),))


def cosign(checkpoint: Checkpoint, name: str, key: Ed25519PrivateKey, *, at_s: float) -> NoteSignature:
    """A helper's signature, once it knows that the checkpoint continues all that it has co-signed.

    Args:
        checkpoint: verified.
        name: from `cosigner_name`.
        key: the helper's identity.
        at_s: Unix seconds.
    """
    stamp = int(at_s)
    signature = stamp.to_bytes(8, "big") + key.sign(_stamped(checkpoint, stamp))
    return NoteSignature(name, cosigner_key_id(name, key.public_key()), signature)


def cosigner_key_id(name: str, key: Ed25519PublicKey) -> bytes:
    """By which a note tells a helper's co-signatures, 4 bytes."""
    return _key_id(name, _COSIGNATURE, key)


def with_cosignatures(note: Note, cosignatures: Iterable[NoteSignature]) -> Note:
    """The same checkpoint with more signatures, each signer once."""
    known = {(one.name, one.key_id) for one in note.signatures}
    more = [one for one in cosignatures if (one.name, one.key_id) not in known]
    return note._replace(signatures=(*note.signatures, *more))


def parse_note(text: str | bytes) -> Note:
    """Read a checkpoint, untrusted; no signature is verified.

    Raises:
        CheckpointError: it is none.
    """
    try:
        raw = text.encode() if isinstance(text, str) else text
        decoded = raw.decode()
    except UnicodeError as error:
        raise CheckpointError(f"expected a checkpoint in UTF-8; {error}") from error
    if len(raw) > LONGEST_NOTE_BYTES:
        raise CheckpointError(f"expected a checkpoint of at most {LONGEST_NOTE_BYTES} bytes, got {len(raw)}")
    body, _, rest = decoded.rpartition("\n\n")
    lines = rest.split("\n")
    if not body or lines.pop() != "" or not lines:
        raise CheckpointError("expected a checkpoint: its text, an empty line, and signatures that end with a newline")
    if len(lines) > MOST_SIGNATURES:
        raise CheckpointError(f"expected at most {MOST_SIGNATURES} signatures, got {len(lines)}")
    note = Note(_checkpoint(body), tuple(_signature(line) for line in lines))
    if note.text != decoded:  # base64 has more than one spelling
        raise CheckpointError("expected base64 in its canonical spelling")
    return note


def verify_note(note: Note, key: Ed25519PublicKey) -> Checkpoint:
    """The checkpoint of a note that the aggregator has signed.

    Args:
        note: untrusted.
        key: the aggregator's, pinned.

    Raises:
        CheckpointError: it has not, or a signature that says that it is the aggregator's is none.
    """
    origin = note.checkpoint.origin
    key_id = _key_id(origin, _ED25519, key)
    found = [one.signature for one in note.signatures if (one.name, one.key_id) == (origin, key_id)]
    if not found:
        raise CheckpointError(
            f"the checkpoint of {note.checkpoint.size} entries is not signed by this aggregator's key"
        )
    for signature in found:
        _verify(key, signature, note.checkpoint.text, origin, note.checkpoint.size)
    return note.checkpoint


def cosigned_s(note: Note, key: Ed25519PublicKey, *, name: str | None = None) -> int | None:
    """When a helper co-signed a note, Unix seconds; None if it has not.

    Args:
        note: untrusted.
        key: the helper's, pinned.
        name: that it must have signed under; None for whatever name stands there.

    Raises:
        CheckpointError: a signature that says that it is this key's is none.
    """
    when = None
    for one in note.signatures:
        if name is not None and one.name != name:
            continue
        if one.key_id == cosigner_key_id(one.name, key):
            when = verify_cosignature(note.checkpoint, one, key)
    return when


def verify_cosignature(checkpoint: Checkpoint, one: NoteSignature, key: Ed25519PublicKey) -> int:
    """When a checkpoint was co-signed, Unix seconds.

    Args:
        checkpoint: what is co-signed.
        one: untrusted.
        key: the helper's, pinned.

    Raises:
        CheckpointError: this key has not co-signed it.
    """
    stamp = int.from_bytes(one.signature[:8], "big")
    if one.key_id != cosigner_key_id(one.name, key) or stamp > _LARGEST_TIME:
        raise CheckpointError(f"the signature under the name {one.name} is not of this helper's key")
    _verify(key, one.signature[8:], _stamped(checkpoint, stamp), one.name, checkpoint.size)
    return stamp


def _stamped(checkpoint: Checkpoint, stamp: int) -> bytes:
    """What a helper signs."""
    return f"cosignature/v1\ntime {stamp}\n".encode() + checkpoint.text


def _key_id(name: str, kind: bytes, key: Ed25519PublicKey) -> bytes:
    """By which a signature tells its key."""
    return hashlib.sha256(name.encode() + b"\n" + kind + key.public_bytes_raw()).digest()[:4]


def _verify(key: Ed25519PublicKey, signature: bytes, signed: bytes, name: str, size: int) -> None:
    """Raise CheckpointError unless it is this key's signature."""
    try:
        key.verify(signature, signed)
    except InvalidSignature:
        raise CheckpointError(f"the signature of {name} under the checkpoint of {size} entries is wrong") from None


def _checkpoint(body: str) -> Checkpoint:
    """Origin, size and root; Covey's logs have no other lines."""
    lines = body.split("\n")
    if len(lines) != 3 or not lines[0] or not _SIZE.fullmatch(lines[1]) or not all(map(str.isprintable, lines)):
        raise CheckpointError(f"expected origin, size and root of a checkpoint, a line each; got {body[:200]!r}")
    root = _base64(lines[2])
    if len(root) != 32:
        raise CheckpointError(f"expected a root of 32 bytes, got {len(root)}")
    return Checkpoint(lines[0], int(lines[1]), root)


def _signature(line: str) -> NoteSignature:
    """A signature's line."""
    match = _LINE.fullmatch(line)
    raw = _base64(match["signature"]) if match is not None else b""
    if match is None or len(raw) <= 4 or not match["name"].isprintable():
        raise CheckpointError(f"expected a dash, a name and a signature in base64, got {line[:200]!r}")
    return NoteSignature(match["name"], raw[:4], raw[4:])


def _base64(text: str) -> bytes:
    """Bytes of their canonical spelling."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise CheckpointError(f"expected base64, got {text[:80]!r}") from error
