"""What is said in secure aggregation beside manifest, update and receipt, and what each part is bound to.

    device      -> aggregator   `SecureBodyMsg`, sealed as every update is: the masked vector, a sealed seed for each
                                helper, and a signed `ContributionMsg` about both
    aggregator  -> helper       `UnmaskRequestMsg`, signed: the manifest, and of every update that is to be added up its
                                contribution and this helper's sealed seed
    helper      -> aggregator   `MaskSumMsg`, signed: the sum of these masks; or `UnmaskRefusalMsg`, signed: why not
    helper      -> everybody    `HelperKeyMsg`, signed: what seeds are sealed to for some time; manifests carry it

A contribution names the exact manifest that its device acted on. So a helper sees whether all devices, and the
aggregator that asks it, speak of one and the same round. A device that goes by a pseudonym adds a
`DeviceCredentialMsg`: what its name follows from, and the certificate by which a helper knows that it is a device.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from fl_protocol.integer_noise import LEAST_SKELLAM
from fl_protocol.limits import MAX_TRANSFER_BYTES
from fl_protocol.message_base import (
    Count,
    Digest,
    Msg,
    Name,
    Positive,
    RecipientKeyMsg,
    RoundNumber,
    Seconds,
    Signature,
    UpdateId,
    require_finite,
)
from fl_protocol.secagg.errors import UnmaskRefusal
from fl_protocol.secagg.fixed_point import LEAST_BITS, MOST_BITS
from fl_protocol.secagg.masks import PrgName

MOST_HELPERS = 8
MOST_LISTED = 5500
"""Updates in one request, which is one transfer: one takes up to 2.95 kB, with a hybrid key, the longest names and the
largest certificate."""
MOST_VARIANCE, MOST_SIGMA = 2.0**26, 2.0**40
SealedSeed = Annotated[bytes, Meta(min_length=16, max_length=2048)]


class HelperKeyMsg(Msg, frozen=True):
    """A helper's public key for some time; its identity, which devices pin, has signed it.

    Args:
        operator: who runs the helper.
        recipient: what seeds are sealed to.
        not_after_s: Unix seconds; only rounds whose deadline is not later may use it.
    """

    helper: Name
    operator: Name
    recipient: RecipientKeyMsg
    not_after_s: Seconds


class SecureTermsMsg(Msg, frozen=True):
    """How the updates of a round become integers, are masked and added up; part of its manifest.

    Args:
        l2_norm_clip: C; a whole update that is longer is scaled down to it.
        step: of the grid, in the update's unit.
        bits: b, of the modulus 2^b.
        most_updates: n, that are ever added up.
        device_noise_variance: of the Skellam noise that each device adds to each number, in grid steps squared; 0 for
            none.
        helper_noise_sigma: of the discrete Gaussian noise that each helper adds to each number, in grid steps, at least
            1; 0 for none.
        clip_bit: grid steps of the coordinate that tells whether an update was no longer than the clip; 0 for none.
        rotates: whether updates are rotated.
        prg: the keystream of masks.
        helpers: each one's signed `HelperKeyMsg`, an encoded `SignedMsg`.
    """

    l2_norm_clip: Positive
    step: Positive
    bits: Annotated[int, Meta(ge=LEAST_BITS, le=MOST_BITS)]
    most_updates: Count
    device_noise_variance: Annotated[float, Meta(ge=0, le=MOST_VARIANCE)]
    helper_noise_sigma: Annotated[float, Meta(ge=0, le=MOST_SIGMA)]
    clip_bit: Annotated[int, Meta(ge=0, le=2**30)]
    rotates: bool
    prg: PrgName
    helpers: Annotated[tuple[Annotated[bytes, Meta(max_length=4096)], ...], Meta(min_length=1, max_length=MOST_HELPERS)]

    def __post_init__(self) -> None:
        require_finite(l2_norm_clip=self.l2_norm_clip, step=self.step)
        if 0 < self.device_noise_variance < LEAST_SKELLAM:
            raise ValueError(f"device_noise_variance {self.device_noise_variance} is neither 0 nor at least 2^-20")
        if 0 < self.helper_noise_sigma < 1:
            raise ValueError(f"helper_noise_sigma {self.helper_noise_sigma} is neither 0 nor at least 1")


class ContributionMsg(Msg, frozen=True):
    """What a device says of its update to those who will see nothing of it but a seed.

    Args:
        manifest_digest: `fl_protocol.secagg.terms.manifest_digest` of the manifest that the device acted on.
        masked_digest: SHA-256 of the packed masked vector.
        seed_digests: SHA-256 of the sealed seeds, in the order of the manifest's helpers.
    """

    tenant: Name
    task: Name
    round: RoundNumber
    manifest_digest: Digest
    device: Name
    update_id: UpdateId
    masked_digest: Digest
    seed_digests: Annotated[tuple[Digest, ...], Meta(min_length=1, max_length=MOST_HELPERS)]


class SignedContributionMsg(Msg, frozen=True):
    """An encoded `ContributionMsg` and its device's signature."""

    contribution: bytes
    signature: Signature


class DeviceCredentialMsg(Msg, frozen=True):
    """Who a pseudonym is: its name is a hash of both keys (`fl_protocol.enrolment`), which a CA has certified.

    Args:
        signing_key: Ed25519 public key that its contributions are signed with.
        certificate: of the pseudonym, with its TLS key; X.509 in DER.
    """

    signing_key: Annotated[bytes, Meta(min_length=32, max_length=32)]
    certificate: Annotated[bytes, Meta(min_length=1, max_length=1024)]


class SecureBodyMsg(Msg, frozen=True):
    """Inside an update's seal.

    Args:
        seeds: one for each helper, in the order of the manifest's.
        masked: residues, packed as `fl_protocol.secagg.packing` does.
        credential: of a device that goes by a pseudonym.
    """

    contribution: SignedContributionMsg
    seeds: Annotated[tuple[SealedSeed, ...], Meta(min_length=1, max_length=MOST_HELPERS)]
    masked: Annotated[bytes, Meta(max_length=MAX_TRANSFER_BYTES)]
    credential: DeviceCredentialMsg | None = None


class UnmaskEntryMsg(Msg, frozen=True):
    """One update that is to be added up, as one helper is told of it.

    Args:
        credential: as its device sent it.
    """

    contribution: SignedContributionMsg
    seed: SealedSeed
    credential: DeviceCredentialMsg | None = None


class UnmaskRequestMsg(Msg, frozen=True):
    """Which updates are added up in a round; there is one such list.

    Args:
        manifest: the signed manifest, as devices got it.
        helper: who is asked.
    """

    manifest: bytes
    helper: Name
    entries: tuple[UnmaskEntryMsg, ...]


class MaskSumMsg(Msg, frozen=True):
    """The sum of all masks that a helper was asked for.

    Args:
        manifest_digest: of the round.
        included_digest: of the list, see `fl_protocol.secagg.parties.included_digest`.
        count: how many masks.
        total: residues, packed.
    """

    helper: Name
    tenant: Name
    task: Name
    round: RoundNumber
    manifest_digest: Digest
    included_digest: Digest
    count: Count
    total: Annotated[bytes, Meta(max_length=MAX_TRANSFER_BYTES)]


class UnmaskRefusalMsg(Msg, frozen=True):
    """Why a helper does not add up masks.

    Args:
        manifest_digest: of the round, as in `MaskSumMsg`.
        detail: for people.
    """

    helper: Name
    tenant: Name
    task: Name
    round: RoundNumber
    manifest_digest: Digest
    reason: UnmaskRefusal
    detail: Annotated[str, Meta(max_length=400)]
