"""What is said in secure aggregation beside manifest, update and receipt, and what each part is bound to.

    device      -> aggregator   `SecureBodyMsg`, sealed as every update is: the masked vector, a sealed seed for each
                                helper, and a signed `ContributionMsg` about both
    aggregator  -> helper       `UnmaskRequestMsg`, signed: the manifest, and of every update that is to be added up its
                                contribution and this helper's sealed seed
    helper      -> aggregator   `MaskSumMsg`, signed: the sum of these masks

A contribution names the exact manifest that its device acted on. So a helper sees whether all devices, and the
aggregator that asks it, speak of one and the same round.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from fl_protocol.limits import MAX_TRANSFER_BYTES
from fl_protocol.message_base import Count, Digest, Msg, Name, RoundNumber, Signature, UpdateId

MOST_HELPERS = 8
SealedSeed = Annotated[bytes, Meta(min_length=16, max_length=2048)]


class ContributionMsg(Msg, frozen=True):
    """What a device says of its update to those who will see nothing of it but a seed.

    Args:
        manifest_digest: SHA-256 of the signed manifest's payload.
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


class SecureBodyMsg(Msg, frozen=True):
    """Inside an update's seal.

    Args:
        seeds: one for each helper, in the order of the manifest's.
        masked: residues, packed as `fl_protocol.secagg.packing` does.
    """

    contribution: SignedContributionMsg
    seeds: Annotated[tuple[SealedSeed, ...], Meta(min_length=1, max_length=MOST_HELPERS)]
    masked: Annotated[bytes, Meta(max_length=MAX_TRANSFER_BYTES)]


class UnmaskEntryMsg(Msg, frozen=True):
    """One update that is to be added up, as one helper is told of it."""

    contribution: SignedContributionMsg
    seed: SealedSeed


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
