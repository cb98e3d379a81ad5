"""What a device sends in a round of the engine secure: its update with its share of the noise, masked for each helper.

Pure. A device calls it once in a round: what it sends again are the same bytes, since two of them with different seeds
would let helpers and aggregator see the difference of the noise.
"""

from __future__ import annotations

import numpy as np

from device_client.ports import Float32
from fl_protocol.integer_noise import Entropy, skellam
from fl_protocol.messages import RoundManifestMsg
from fl_protocol.secagg.messages import SecureBodyMsg, SecureTermsMsg
from fl_protocol.secagg.parties import Sender, contribute
from fl_protocol.secagg.terms import secure_round


def protected_update(
    terms: SecureTermsMsg, manifest: RoundManifestMsg, change: Float32, *, sender: Sender, entropy: Entropy
) -> SecureBodyMsg:
    """Clip, put on the grid, add the device's share of noise, mask.

    Args:
        terms: the manifest's.
        manifest: of an open round, its helpers verified.
        change: float32 [update_length], finite.
        sender: this device, and the update's id.
        entropy: cryptographic source, for rounding, noise and seeds.

    Raises:
        ProtocolError: the terms do not fit together, or a helper's key is not usable.
    """
    here, variance = secure_round(manifest), terms.device_noise_variance
    length = here.fixed_point.vector_length
    noise = skellam(variance, length, entropy) if variance else np.zeros(length, np.int64)
    return contribute(here, change, noise, sender=sender, entropy=entropy)
