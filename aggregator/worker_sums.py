"""One worker's sums: in memory while updates are added up, and as blobs since the last commit.

There is one for each round that updates were made for and each that they count in, so memory does not grow with the
number of updates. Of a round whose rule needs single updates only their number is kept here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from aggregator.exact_sum import ExactSum
from aggregator.ingest import Placed
from aggregator.partial_sums import SumKey, open_sum, seal_sum, sum_place
from aggregator.store.aggregator_store import AggregatorStore
from aggregator.store.updates import StoredPartial


@dataclass
class WorkerSum:
    """A sum; and as of the last commit, the blob that holds it and how many updates are in that."""

    sum: ExactSum
    blob: str | None = None
    num_stored: int = 0


class WorkerSums:
    """See the module docstring.

    Args:
        worker: whose, unique among those that share the database.
        store: the database and its blobs.
        entropy: cryptographic source of bytes.
    """

    def __init__(self, worker: str, store: AggregatorStore, entropy: Callable[[int], bytes]) -> None:
        self._worker, self._store, self._entropy = worker, store, entropy
        self._known: dict[SumKey, WorkerSum] = {}

    def forget(self) -> None:
        """Forget all: what is durable is in the database."""
        self._known.clear()

    def keep_only(self, open_rounds: set[tuple[str, int]]) -> None:
        """Forget those of rounds, (task, number), that are closed."""
        self._known = {key: kept for key, kept in self._known.items() if key[:2] in open_rounds}

    def of(self, key: SumKey, placed: Placed) -> WorkerSum:
        """A round's, as of the last commit. Raises BlobError: it is lost or damaged."""
        if key not in self._known:
            self._known[key] = self._as_stored(key, placed)
        return self._known[key]

    def put(self, key: SumKey, mine: WorkerSum, secret: bytes | None) -> str | None:
        """Store a sum under its round's secret; the blob that it replaces. Raises BlobError."""
        place, replaced = sum_place(key, self._worker), mine.blob
        sealed = seal_sum(mine.sum, secret, place=place, entropy=self._entropy)
        mine.blob = self._store.blobs.put(sealed, kind="sum")
        return replaced

    def _as_stored(self, key: SumKey, placed: Placed) -> WorkerSum:
        """What the database has of a sum; the sum of nothing, if nothing."""
        task, counted_in, made_for = key
        for stored in self._store.updates.partials(task, counted_in):
            if (stored.round, stored.worker) == (made_for, self._worker):
                return self._opened(key, stored, placed)
        return WorkerSum(ExactSum.zeros(_length(placed)))

    def _opened(self, key: SumKey, stored: StoredPartial, placed: Placed) -> WorkerSum:
        """A sum as it is in the database."""
        if not stored.blob:
            return WorkerSum(ExactSum(np.zeros(0, np.int64), stored.num_updates), None, stored.num_updates)
        secret, place = placed.task.rounds[placed.counted_in].sums_secret, sum_place(key, self._worker)
        opened = open_sum(self._store.blobs.get(stored.blob), secret, place=place, count=stored.num_updates)
        return WorkerSum(opened, stored.blob, stored.num_updates)


def _length(placed: Placed) -> int:
    """Numbers in a round's sums."""
    if placed.round.secure is not None:
        return placed.round.secure.fixed_point.vector_length
    return 0 if placed.task.keeps_updates else placed.task.update_length
