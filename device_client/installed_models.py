"""The newest version of each study's model that this device has accepted: an older bundle never takes its place.

Whoever can put a file beside the configuration, or restores an old one, would otherwise have the device train and run a
model that its publisher has replaced. Rounds have the same of their own: a manifest older than the newest round seen is
a replay (`device_client.manifest_checks`).
"""

from __future__ import annotations

from contextlib import suppress

import msgspec

from device_client.device_store import study_blob
from device_client.errors import StoreError
from device_client.ports import Store
from fl_protocol.bundle import ModelBundle
from fl_protocol.errors import BundleError


class _Newest(msgspec.Struct, frozen=True):
    """What is stored: the newest version of each model by its name."""

    versions: dict[str, int]


class InstalledModels:
    """See the module docstring.

    Args:
        store: the device's.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def accepted(self, study: str, bundle: ModelBundle) -> ModelBundle:
        """The same bundle, its version remembered before it is used.

        Args:
            study: ``tenant/task``.
            bundle: whose publisher's signature was verified.

        Raises:
            BundleError: a newer version of this model was accepted before.
            StoreError: what is stored cannot be read.
        """
        name, version = bundle.manifest.name, bundle.manifest.version
        known = self._known(study)
        newest = known.versions.get(name, -1)
        if version < newest:
            raise BundleError(
                f"{study}: the bundle {name} is version {version}, and version {newest} was accepted before: an older "
                "model never takes the place of a newer one. Install the newer one again, or ask its publisher for one."
            )
        if version > newest:
            # On a full disk the device goes on with what it has; an older one is accepted in no case meanwhile, since
            # whatever is known stays.
            with suppress(StoreError):
                updated = _Newest({**known.versions, name: version})
                self._store.write(study_blob("bundle", study), msgspec.msgpack.encode(updated))
        return bundle

    def _known(self, study: str) -> _Newest:
        """What is stored. Raises StoreError."""
        raw = self._store.read(study_blob("bundle", study))
        if raw is None:
            return _Newest({})
        try:
            return msgspec.msgpack.decode(raw, type=_Newest)
        except msgspec.DecodeError as error:
            raise StoreError(f"the versions of models accepted for {study} cannot be read ({error})") from error
