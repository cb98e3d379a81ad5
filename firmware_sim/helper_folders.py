"""The helpers of a run: each one's configuration, identity, store, and the devices whose contributions it believes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from aggregator.helper.assembly import HelperFiles
from aggregator.helper.config import HelperConfig, HelperSection, StudySection
from fl_protocol.adapters.files import write_atomic
from fl_protocol.broker_config import BrokerConfig
from fl_protocol.helper_config import HelperPin
from fl_protocol.signing import public_key_hex


def write_helper(
    path: Path, *, operator: str, minimum_cohort: int, tenant: str, aggregator_key: str, broker: BrokerConfig
) -> HelperPin:
    """Write a ``helper.toml``, the first time with identity and store; how devices and aggregator pin the helper.

    Args:
        path: of the file; its folder has the helper's name.
        operator: who runs it.
        minimum_cohort: fewest updates it adds up.
        tenant: name of the study.
        aggregator_key: that signs its requests, 64 hex digits.
        broker: where it is asked.
    """
    name, is_new = path.parent.name, not path.exists()
    config = HelperConfig(
        helper=HelperSection(
            name=name, operator=operator, identity="identity.key", store="helper.db", minimum_cohort=minimum_cohort
        ),
        studies=(StudySection(tenant=tenant, aggregator_key=aggregator_key, broker=broker),),
    )
    path.parent.mkdir(exist_ok=True, mode=0o700)
    write_atomic(path, msgspec.toml.encode(config))
    files = HelperFiles.load(path)
    # A store that got lost must not come back as one that has answered nothing.
    helper = files.create() if is_new else files.helper()
    return HelperPin(name=name, operator=operator, key=public_key_hex(helper.identity.public_key()))


def register_devices(path: Path, tenant: str, devices: Sequence[tuple[str, bytes]]) -> None:
    """Tell a helper whose contributions to believe.

    Args:
        path: of its ``helper.toml``.
        tenant: name of the study.
        devices: names and public keys (32 bytes).
    """
    with HelperFiles.load(path).store() as store:
        store.devices.add_all(tenant, devices)
