"""What can go wrong on a device."""

from __future__ import annotations

from fl_protocol.errors import CoveyError


class DeviceError(CoveyError):
    """Base of the device's own errors."""


class BudgetSpentError(DeviceError):
    """The ledger refuses: this participation would exceed the wearer's privacy budget."""


class LedgerError(DeviceError):
    """The ledger's file is damaged or was edited; nothing is trained until a person has looked."""


class StoreError(DeviceError):
    """The encrypted store cannot be read or written (wrong key, tampering, full disk)."""


class KeyStoreError(StoreError):
    """What holds the TLS keys (a TPM) cannot be used, or not with this key."""


class TrainingError(DeviceError):
    """Local training gave no usable update."""
