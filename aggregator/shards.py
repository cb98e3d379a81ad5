"""Which upload shards a worker should have: a fair share of those there are. Pure.

Every worker looks at the same leases and decides for itself: it renews what it has, gives back what is over its share,
and takes what is free. The lease of a worker that died runs out, and the others take its shards over.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from fl_protocol.limits import NUM_SHARDS

LEASE_S = 15.0
"""How long a lease holds without being renewed."""
RENEW_EVERY_S = 5.0
LONGEST_S = 120.0
"""Nobody takes a lease for this long: one that ends later was taken under a clock that has been set back since."""


class LeaseTerms(NamedTuple):
    """How long this process takes leases for, and how often it renews them.

    Args:
        lease_s: below `LONGEST_S`. Others take over only so long after this process died.
        renew_every_s: well below `lease_s`.
    """

    lease_s: float = LEASE_S
    renew_every_s: float = RENEW_EVERY_S


ALL_SHARDS = tuple(f"shard-{number:02d}" for number in range(NUM_SHARDS))


class Lease(NamedTuple):
    """Who has something, and until when (Unix seconds)."""

    name: str
    worker: str
    until_s: float

    def holds_at(self, now_s: float) -> bool:
        """Whether nobody else may take it."""
        return now_s < self.until_s <= now_s + LONGEST_S


class ShardPlan(NamedTuple):
    """What a worker should do about its shards: names of leases."""

    keep: frozenset[str]
    give_back: frozenset[str]
    take: frozenset[str]


def plan_shards(leases: Iterable[Lease], worker: str, *, workers: Iterable[str], now_s: float) -> ShardPlan:
    """A worker's next step towards a fair share.

    Args:
        leases: as they are.
        worker: who asks.
        workers: everybody who was heard of lately.
        now_s: Unix seconds.
    """
    shards = [lease for lease in leases if lease.name in ALL_SHARDS]
    mine = sorted(lease.name for lease in shards if lease.worker == worker)
    taken = {lease.name for lease in shards if lease.holds_at(now_s) and lease.worker != worker}
    everybody = sorted({worker, *workers})
    share, left_over = divmod(NUM_SHARDS, len(everybody))
    share += everybody.index(worker) < left_over
    free = [name for name in ALL_SHARDS if name not in taken and name not in mine]
    return ShardPlan(
        keep=frozenset(mine[:share]),
        give_back=frozenset(mine[share:]),
        take=frozenset(free[: max(0, share - len(mine))]),
    )
