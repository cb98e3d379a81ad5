"""A device's side of ``wire = "off"``: in its store and on the wire stand names, and beside them the vectors in memory.

A vector is held as long as the device's outbox has an entry that names it, over all lives of its daemon and with the
run's checkpoints; so what is resent is the same, whoever was killed meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from numpy.typing import NDArray

from device_client.downloads import Download
from device_client.errors import StoreError
from device_client.outbox import Outbox
from device_client.ports import Float32
from device_client.work_vectors import IN_ENTRY
from firmware_sim.shared_models import SharedDownload, SharedModels
from firmware_sim.unsealed_wire import unsealed_update
from fl_protocol.errors import LocalMisuseError
from fl_protocol.messages import RoundManifestMsg, UpdateBodyMsg
from fl_protocol.secagg.messages import SecureBodyMsg

_HERE, _BY_DIGEST = b"\0", b"\1"


class HandOver:
    """`device_client.sealer.Sealer`, `device_client.work_vectors.WorkVectors` and `device_client.downloads.Downloads`.

    Args:
        vectors: of this device: values of updates by update id (16 bytes), models by digest (32 bytes).
        models: of its process.
    """

    def __init__(self, vectors: dict[bytes, NDArray[Any]], models: SharedModels) -> None:
        self._vectors, self._models = vectors, models

    def seal(
        self,
        body: UpdateBodyMsg | SecureBodyMsg,
        *,
        manifest: RoundManifestMsg,
        device: str,
        update_id: bytes,
        signing_key: Ed25519PrivateKey,
    ) -> bytes:
        """The envelope of an update whose values stay here. Raises ProtocolError, and LocalMisuseError if masked."""
        del signing_key
        if isinstance(body, SecureBodyMsg):
            raise LocalMisuseError("masked updates need their seals; run the scenario with wire on")
        envelope, values = unsealed_update(body, manifest=manifest, device=device, update_id=update_id)
        self._vectors[update_id] = values
        return envelope

    def pack(self, values: Float32) -> bytes:
        """The digest of a model that devices share; of any other vector all of it."""
        digest = self._models.digest_of(values)
        if digest is None:
            return _HERE + IN_ENTRY.pack(values)
        self._vectors[digest] = values
        return _BY_DIGEST + digest

    def unpack(self, packed: bytes) -> Float32:
        """The vector, float32 [d]. Raises StoreError."""
        if packed[:1] == _HERE:
            return IN_ENTRY.unpack(packed[1:])
        if packed[1:] not in self._vectors:
            raise StoreError("the model that the work in the outbox names is not in memory any more")
        return self._vectors[packed[1:]]

    def download(
        self, *, tenant: str, digest: bytes, total_bytes: int, key: Ed25519PublicKey, kept: Iterable[bytes] = ()
    ) -> Download:
        """One that takes what this process has."""
        return SharedDownload(self._models, tenant=tenant, digest=digest, total_bytes=total_bytes, key=key, kept=kept)

    def forget_all_but(self, outbox: Outbox) -> None:
        """Hold only what the entries of an outbox name."""
        if self._vectors:
            has_work = outbox.has_work
            for name in [name for name in self._vectors if name not in outbox and not (len(name) > 16 and has_work)]:
                del self._vectors[name]
