"""What each party of a secure round computes: device, helper, aggregator. Pure; `reference` runs them in order.

The device sends y = x + m_1 + ... + m_k modulo 2^b, where x is its update in grid steps with its share of the noise,
and m_j follows from a fresh seed that only helper j can open. Helper j returns the sum of its masks over the updates
that are listed, and the aggregator takes all helpers' sums from the sum of all y. What is left is the sum of x. As long
as one helper is honest nobody else learns more than that: without its seeds every y is uniform, and it answers once.

One message from each device, and none of a device that went away is missing: a mask that is not asked for does not
matter. (K. Bonawitz et al., "Practical Secure Aggregation", CCS 2017, need four messages of every device, and trust a
share of the devices; here the trust is in one of few helpers, as in one of the servers of H. Corrigan-Gibbs and D.
Boneh, "Prio", NSDI 2017.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import msgspec
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from numpy.typing import NDArray

from fl_protocol import PROTOCOL_VERSION
from fl_protocol.errors import LocalMisuseError, ProtocolError
from fl_protocol.integer_noise import Entropy
from fl_protocol.messages import RecipientKeyMsg, decode, encode
from fl_protocol.sealing import RoundKey, open_sealed, seal_to, sealed_bytes
from fl_protocol.secagg.errors import MaskSumError, UnmaskRefusal, UnmaskRefusedError
from fl_protocol.secagg.fixed_point import FixedPoint
from fl_protocol.secagg.masks import SEED_BYTES, Masks, PrgName, Words
from fl_protocol.secagg.messages import (
    ContributionMsg,
    DeviceCredentialMsg,
    MaskSumMsg,
    SecureBodyMsg,
    SignedContributionMsg,
    UnmaskEntryMsg,
)
from fl_protocol.secagg.packing import pack, unpack
from fl_protocol.signing import contribution_signature_is_valid, sign_contribution


@dataclass(frozen=True)
class SecureRound:
    """What all parties know of a round, from its signed manifest.

    Args:
        manifest_digest: SHA-256 of the manifest's signed payload.
        rotation_seed: public; of the round.
        minimum_cohort: fewest updates that are ever added up.
        helpers: their keys for this round, by name, in the order of the manifest.
    """

    tenant: str
    task: str
    number: int
    manifest_digest: bytes
    fixed_point: FixedPoint
    prg: PrgName
    rotation_seed: bytes
    minimum_cohort: int
    helpers: Mapping[str, RecipientKeyMsg]

    @cached_property
    def masks(self) -> Masks:
        """Of this round."""
        return Masks(length=self.fixed_point.vector_length, bits=self.fixed_point.bits, prg=self.prg)

    def seed_info(self, helper: str, *, device: str, update_id: bytes) -> bytes:
        """What a seed is bound to, when it is sealed and when it becomes a mask."""
        fields = [
            PROTOCOL_VERSION,
            self.tenant,
            self.task,
            self.number,
            self.manifest_digest,
            device,
            update_id,
            helper,
        ]
        return b"covey v1 seed\0" + msgspec.msgpack.encode(fields)


@dataclass(frozen=True)
class Sender:
    """Who contributes.

    Args:
        device: its name, as in the update's header.
        update_id: 16 bytes, as in the update's header.
        signing_key: the device's Ed25519 key.
        credential: where its name is a pseudonym.
    """

    device: str
    update_id: bytes
    signing_key: Ed25519PrivateKey
    credential: DeviceCredentialMsg | None = None


def contribute(
    terms: SecureRound,
    update: NDArray[np.float32],
    noise: NDArray[np.int64],
    *,
    sender: Sender,
    entropy: Entropy,
) -> SecureBodyMsg:
    """One device's message; runs at the device, once: what is sent again are the same bytes.

    Args:
        terms: of the round.
        update: float32 [d], finite; clipped here.
        noise: the device's share, int64 [vector_length] in grid steps.
        sender: the device.
        entropy: cryptographic source, for rounding and seeds.

    Raises:
        LocalMisuseError: lengths or values are out of range.
        ProtocolError: a helper's key is not usable.
    """
    if noise.shape != (terms.fixed_point.vector_length,):
        raise LocalMisuseError(f"noise: expected {terms.fixed_point.vector_length} numbers, got shape {noise.shape}")
    integers = terms.fixed_point.encode(update, rotation_seed=terms.rotation_seed, entropy=entropy)
    integers += noise
    return protect(terms, integers, sender=sender, entropy=entropy)


def protect(terms: SecureRound, integers: NDArray[np.int64], *, sender: Sender, entropy: Entropy) -> SecureBodyMsg:
    """Masks and seals what is in grid steps, int64 [d], noise included; see `contribute`."""
    masked = terms.masks.words_of(integers)
    seeds = []
    for helper, key in terms.helpers.items():
        # Security: fresh for every update, or the difference of two updates would be plain to see.
        seed, info = entropy(SEED_BYTES), terms.seed_info(helper, device=sender.device, update_id=sender.update_id)
        terms.masks.add(seed, info, masked)
        seeds.append(seal_to(key, seed, info=info))
    packed = pack(terms.masks.reduced(masked), terms.fixed_point.bits)
    contribution = encode(
        ContributionMsg(
            tenant=terms.tenant,
            task=terms.task,
            round=terms.number,
            manifest_digest=terms.manifest_digest,
            device=sender.device,
            update_id=sender.update_id,
            masked_digest=hashlib.sha256(packed).digest(),
            seed_digests=tuple(hashlib.sha256(seed).digest() for seed in seeds),
        )
    )
    signature = sign_contribution(contribution, sender.signing_key)
    signed = SignedContributionMsg(contribution=contribution, signature=signature)
    return SecureBodyMsg(contribution=signed, seeds=tuple(seeds), masked=packed, credential=sender.credential)


def masked_vector(
    terms: SecureRound, body: SecureBodyMsg, *, device: str, update_id: bytes, device_key: Ed25519PublicKey
) -> Words:
    """The masked vector of an opened update, [d], to be added up; runs at the aggregator, before it is counted.

    What is masked cannot be looked at: whether seeds open, and whether the vector is what it should be, nobody can see.

    Raises:
        ProtocolError: it is not this device's for this round, or does not fit together.
    """
    found = _verified(terms, body.contribution, {device: device_key})
    if found is None or found.update_id != update_id:
        raise ProtocolError("the contribution is not this device's for this update and round")
    if len(body.seeds) != len(terms.helpers):
        raise ProtocolError(f"expected {len(terms.helpers)} sealed seeds, got {len(body.seeds)}")
    for seed, recipient in zip(body.seeds, terms.helpers.values(), strict=True):
        if len(seed) != sealed_bytes(recipient.kem, SEED_BYTES):  # or the list would not fit a request
            raise ProtocolError(f"a sealed seed of {len(seed)} bytes is none that {recipient.kem} seals")
    if found.seed_digests != tuple(hashlib.sha256(seed).digest() for seed in body.seeds):
        raise ProtocolError("the sealed seeds do not match the signed digests")
    if found.masked_digest != hashlib.sha256(body.masked).digest():
        raise ProtocolError("the masked vector does not match the signed digest")
    # The certificate is the helpers' to check: which CA they trust is not the aggregator's to say.
    if body.credential is not None and body.credential.signing_key != device_key.public_bytes_raw():
        raise ProtocolError(f"the credential is for another key than {device}'s registered one")
    return unpack(body.masked, terms.fixed_point.vector_length, terms.fixed_point.bits)


def entry_for(terms: SecureRound, body: SecureBodyMsg, helper: str) -> UnmaskEntryMsg:
    """What a helper is told of an update; runs at the aggregator."""
    return entry_at(body, list(terms.helpers).index(helper))


def entry_at(body: SecureBodyMsg, index: int) -> UnmaskEntryMsg:
    """As `entry_for`, of the helper with this number in the manifest."""
    return UnmaskEntryMsg(contribution=body.contribution, seed=body.seeds[index], credential=body.credential)


def included_digest(update_ids: Iterable[bytes]) -> bytes:
    """SHA-256 of the update ids of a list in ascending order."""
    return hashlib.sha256(b"covey v1 included\0" + b"".join(sorted(update_ids))).digest()


def sum_of_masks(
    terms: SecureRound,
    entries: Sequence[UnmaskEntryMsg],
    *,
    helper: str,
    key: RoundKey,
    device_keys: Mapping[str, Ed25519PublicKey],
    minimum_cohort: int = 1,
    noise: NDArray[np.int64] | None = None,
) -> MaskSumMsg:
    """The sum of the masks of a list of updates; runs at a helper, which has to see to it that it answers a round once.

    Noise is added to it, and so taken from the sum of the updates: its law is symmetric.

    Args:
        terms: of the round, from a manifest that the helper has verified.
        entries: the list.
        helper: its name.
        key: its private key for the round.
        device_keys: of the devices that it knows, by name.
        minimum_cohort: its own floor, if the manifest's is below it.
        noise: its own share, int64 [d] in grid steps; drawn once for a round, or asking again would average it away.

    Raises:
        UnmaskRefusedError: with the reason; nothing was revealed.
        LocalMisuseError: the noise is of another length.
    """
    if noise is not None and noise.shape != (terms.fixed_point.vector_length,):
        raise LocalMisuseError(f"noise: expected {terms.fixed_point.vector_length} numbers, got shape {noise.shape}")
    fewest, most = max(terms.minimum_cohort, minimum_cohort), terms.fixed_point.most_updates
    if len(entries) < fewest:
        raise UnmaskRefusedError(UnmaskRefusal.TOO_FEW, f"expected at least {fewest} updates, got {len(entries)}")
    if len(entries) > most:
        raise UnmaskRefusedError(UnmaskRefusal.TOO_MANY, f"expected at most {most} updates, got {len(entries)}")
    found = [_checked(terms, entry, helper, device_keys) for entry in entries]
    for name in ("device", "update_id"):
        if len({getattr(one, name) for one in found}) < len(found):
            raise UnmaskRefusedError(UnmaskRefusal.DUPLICATE, f"a {name} is listed twice")
    total = terms.masks.zeros()
    for one, entry in zip(found, entries, strict=True):
        info = terms.seed_info(helper, device=one.device, update_id=one.update_id)
        terms.masks.add(_opened_seed(entry.seed, key, info, one.device), info, total)
    if noise is not None:
        total += terms.masks.words_of(noise)
    return MaskSumMsg(
        helper=helper,
        tenant=terms.tenant,
        task=terms.task,
        round=terms.number,
        manifest_digest=terms.manifest_digest,
        included_digest=included_digest(one.update_id for one in found),
        count=len(found),
        total=pack(terms.masks.reduced(total), terms.fixed_point.bits),
    )


def unmask(
    terms: SecureRound,
    masked: Words,
    sums: Sequence[MaskSumMsg],
    *,
    update_ids: Sequence[bytes],
    noise: NDArray[np.int64] | None = None,
) -> NDArray[np.float64]:
    """The sum of the listed updates, float64 [vector_length] as `FixedPoint.decode` has it; runs at the aggregator.

    Args:
        terms: of the round.
        masked: the sum of the masked vectors, in words.
        sums: one of each helper, its signature verified.
        update_ids: of the updates in `masked`.
        noise: of the aggregator's own, int64 [d] in grid steps, for those who see only what is released.

    Raises:
        MaskSumError: a helper's sum is missing or of another list, or the result is none that updates add up to.
    """
    expected = included_digest(update_ids)
    if sorted(one.helper for one in sums) != sorted(terms.helpers):
        raise MaskSumError(f"expected a sum of each of {', '.join(terms.helpers)}, got {[one.helper for one in sums]}")
    total = masked.copy()
    for one in sums:
        if not _is_of(terms, one):
            raise MaskSumError(f"{one.helper} answered for another round")
        if (one.included_digest, one.count) != (expected, len(update_ids)):
            raise MaskSumError(f"{one.helper} added up the masks of another list")
        total -= _residues_in(terms, one).astype(total.dtype, copy=False)
    residues = terms.masks.reduced(total)
    try:
        return terms.fixed_point.decode(residues, count=len(update_ids), rotation_seed=terms.rotation_seed, noise=noise)
    except ProtocolError as error:
        raise MaskSumError(f"a helper's sum is wrong, or a device's vector is: {error}") from error


def _residues_in(terms: SecureRound, answer: MaskSumMsg) -> NDArray[np.unsignedinteger[Any]]:
    """A helper's sum of masks, [d]. Raises MaskSumError."""
    try:
        return unpack(answer.total, terms.fixed_point.vector_length, terms.fixed_point.bits)
    except ProtocolError as error:
        raise MaskSumError(f"the sum of {answer.helper} is malformed: {error}") from error


def _checked(
    terms: SecureRound, entry: UnmaskEntryMsg, helper: str, device_keys: Mapping[str, Ed25519PublicKey]
) -> ContributionMsg:
    """An entry's contribution. Raises UnmaskRefusedError."""
    try:
        found = _verified(terms, entry.contribution, device_keys)
    except ProtocolError as error:
        raise UnmaskRefusedError(UnmaskRefusal.UNSIGNED, str(error)) from error
    if found is None:
        raise UnmaskRefusedError(UnmaskRefusal.OTHER_ROUND, "a device acted on another manifest than this one")
    index = list(terms.helpers).index(helper)
    if len(found.seed_digests) != len(terms.helpers):
        raise UnmaskRefusedError(UnmaskRefusal.WRONG_SEED, f"{found.device} has seeds for other helpers")
    if hashlib.sha256(entry.seed).digest() != found.seed_digests[index]:
        raise UnmaskRefusedError(
            UnmaskRefusal.WRONG_SEED, f"the seed listed for {found.device} is not the one it signed"
        )
    return found


def _verified(
    terms: SecureRound, signed: SignedContributionMsg, device_keys: Mapping[str, Ed25519PublicKey]
) -> ContributionMsg | None:
    """A contribution that a known device signed; None if it is for another round. Raises ProtocolError."""
    found = decode(signed.contribution, ContributionMsg)
    key = device_keys.get(found.device)
    if key is None or not contribution_signature_is_valid(signed.contribution, signed.signature, key):
        raise ProtocolError(f"the contribution is not signed by a known device {found.device}")
    return found if _is_of(terms, found) else None


def _is_of(terms: SecureRound, message: ContributionMsg | MaskSumMsg) -> bool:
    """Whether a message is about this round, and about the same manifest."""
    named = (message.tenant, message.task, message.round, message.manifest_digest)
    return named == (terms.tenant, terms.task, terms.number, terms.manifest_digest)


def _opened_seed(sealed: bytes, key: RoundKey, info: bytes, device: str) -> bytes:
    """A device's seed. Raises UnmaskRefusedError."""
    try:
        seed = open_sealed(sealed, key, info=info)
    except ProtocolError as error:
        raise UnmaskRefusedError(UnmaskRefusal.WRONG_SEED, f"the seed of {device}: {error}") from error
    if len(seed) != SEED_BYTES:
        raise UnmaskRefusedError(UnmaskRefusal.WRONG_SEED, f"the seed of {device}: expected {SEED_BYTES} bytes")
    return seed
