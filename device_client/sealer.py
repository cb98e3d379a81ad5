"""The port behind which an update is closed up for its journey. A device has one way, `seal_update`, and no setting and
no message names another: whoever builds a program of the same parts may pass one, as the simulator does.
"""

from __future__ import annotations

from typing import Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fl_protocol.messages import RoundManifestMsg, UpdateBodyMsg
from fl_protocol.secagg.messages import SecureBodyMsg


class Sealer(Protocol):
    """Closes up one update; `fl_protocol.sealing.seal_update` seals it with HPKE and signs it."""

    def __call__(
        self,
        body: UpdateBodyMsg | SecureBodyMsg,
        *,
        manifest: RoundManifestMsg,
        device: str,
        update_id: bytes,
        signing_key: Ed25519PrivateKey,
    ) -> bytes:
        """Encoded `fl_protocol.messages.UpdateEnvelopeMsg`. Raises ProtocolError."""
