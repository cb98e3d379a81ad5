"""One secure round from beginning to end, every party in its turn, in one process: the protocol to be read.

`docs/protocol.md` follows this text. Daemons call the same functions of `fl_protocol.secagg.parties`, with a network
and a store between them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from fl_protocol.sealing import RoundKey
from fl_protocol.secagg.parties import SecureRound, Sender, contribute, entry_for, masked_vector, sum_of_masks, unmask


def reference_round(
    terms: SecureRound,
    updates: Mapping[str, NDArray[np.float32]],
    noise: Mapping[str, NDArray[np.int64]],
    *,
    arrived: Sequence[str],
    device_keys: Mapping[str, Ed25519PrivateKey],
    helper_keys: Mapping[str, RoundKey],
    entropy: Callable[[int], bytes],
) -> NDArray[np.float64]:
    """The sum of the updates that arrived, float64 [d].

    Args:
        terms: what all parties know from the signed manifest.
        updates: of all devices that take part, float32 [d], by device.
        noise: of each, int64 [d] in grid steps.
        arrived: devices whose message arrived in time; of the others nothing is needed.
        device_keys: each device's signing key.
        helper_keys: each helper's private key for this round.
        entropy: cryptographic source.

    Raises:
        UnmaskRefusedError: too few arrived.
    """
    public = {device: key.public_key() for device, key in device_keys.items()}

    # Each device: one message, to the aggregator.
    update_ids = {device: entropy(16) for device in updates}
    bodies = {
        device: contribute(
            terms,
            update,
            noise[device],
            sender=Sender(device, update_ids[device], device_keys[device]),
            entropy=entropy,
        )
        for device, update in updates.items()
    }

    # The aggregator: checks and adds up what arrives, and looks into none of it.
    total = terms.masks.zeros()
    for device in arrived:
        body = bodies[device]
        masked = masked_vector(terms, body, device=device, update_id=update_ids[device], device_key=public[device])
        total += masked.astype(total.dtype, copy=False)

    # Each helper: the sum of its masks of exactly these, once.
    sums = [
        sum_of_masks(
            terms,
            [entry_for(terms, bodies[device], helper) for device in arrived],
            helper=helper,
            key=helper_keys[helper],
            device_keys=public,
        )
        for helper in terms.helpers
    ]

    # The aggregator: the masks are taken away from the sum, and nothing else is left.
    return unmask(terms, total, sums, update_ids=[update_ids[device] for device in arrived])
