"""The privacy ledger, in the order that a charge passes through.

`times` decides when it is, `spending` adds up periods and shares with the `filters` that admit or refuse, `lines` is
how a charge is written down, `chain` makes it durable and vouches for it, `ledger` is the whole.
"""

from __future__ import annotations

from device_client.ledger.chain import LOG_NAME, Counter, LogStore
from device_client.ledger.filters import Budget
from device_client.ledger.ledger import PrivacyLedger, cost_of, cost_of_count
from device_client.ledger.lines import Acceptance, Release, Reservation

__all__ = [
    "LOG_NAME",
    "Acceptance",
    "Budget",
    "Counter",
    "LogStore",
    "PrivacyLedger",
    "Release",
    "Reservation",
    "cost_of",
    "cost_of_count",
]
