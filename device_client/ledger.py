"""The privacy ledger: a Rényi filter over everything this device ever released, across all tasks.

A reservation is durable before anything is trained for it, and is never refunded: a crash between the two spends budget
that nothing was released for, which is the safe side. The log is one JSON object a line, each naming the SHA-256 of
the line before it, and the encrypted store keeps the newest line's number and hash, so that no line can be changed or
taken away. A line torn by a power cut was never acted on and is cut off; anything else that does not fit stops the
device until a person has looked.

The filter: sums of RDP at one order, fixed by the budget and the first reservation before anything was released, which
stays valid when later steps depend on earlier releases (V. Feldman, T. Zrnic, arXiv 2008.11193).
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import msgspec

from device_client.accounting import (
    ORDERS,
    Vector,
    epsilon_by_order,
    filter_order_index,
    poisson_gaussian_rdp,
    rdp_to_epsilon,
)
from device_client.errors import BudgetSpentError, LedgerError
from device_client.ports import Store
from fl_protocol.errors import LocalMisuseError
from fl_protocol.messages import TrainingPlanMsg

LOG_NAME, HEAD_NAME = "ledger.jsonl", "ledger-head"
_GENESIS = "0" * 64


@dataclass(frozen=True)
class Budget:
    """What the wearer allows in all: (epsilon, delta) at record level, add-or-remove-one. Infinity claims nothing."""

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        if not self.epsilon > 0:
            raise LocalMisuseError(f"epsilon: expected more than 0, got {self.epsilon}")
        if not 0 < self.delta < 1:
            raise LocalMisuseError(f"delta: expected 0 < delta < 1, got {self.delta}")


class Reservation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of the log: what was charged, for which round, and the hash of the line before."""

    at_s: float
    task: str
    round: int
    sampling_rate: float
    noise_multiplier: float
    steps: int
    previous: str

    def rdp(self) -> Vector:
        """What it costs at each of `ORDERS`."""
        return poisson_gaussian_rdp(
            sampling_rate=self.sampling_rate, noise_multiplier=self.noise_multiplier, steps=self.steps
        )


class _Head(msgspec.Struct, frozen=True):
    """How many lines the log had at least, and the hash of the last of those."""

    lines: int
    digest: str


class PrivacyLedger:
    """The device's ledger, kept in its store.

    Raises:
        LedgerError: on opening, when the log does not hold together.
    """

    def __init__(self, store: Store, budget: Budget) -> None:
        self._store = store
        self.budget = budget
        self._order: int | None = None  # index into ORDERS, fixed by the first reservation
        self._rdp = poisson_gaussian_rdp(sampling_rate=1, noise_multiplier=1, steps=0)
        self._head = _GENESIS
        self.reservations: list[Reservation] = []
        self._load()

    @property
    def spent_epsilon(self) -> float:
        """Epsilon at the budget's delta for all reservations so far, as an accountant would state it."""
        return rdp_to_epsilon(self._rdp, self.budget.delta)

    def last_round(self, task: str) -> int:
        """The newest round of a task that was charged, 0 if none."""
        return max((entry.round for entry in self.reservations if entry.task == task), default=0)

    def reserve(self, *, task: str, round_number: int, plan: TrainingPlanMsg, now_s: float) -> float:
        """Charge one participation, durably, and return the epsilon spent in all. Call before training.

        Raises:
            BudgetSpentError: the budget does not allow it, or this round was charged before (a crash came between);
                nothing is recorded.
            StoreError: the disk did not take it; nothing may be released, whether or not the charge stands.
        """
        if round_number <= self.last_round(task):
            raise BudgetSpentError(f"round {round_number} of {task} was charged before and is not trained twice")
        entry = Reservation(
            at_s=now_s,
            task=task,
            round=round_number,
            sampling_rate=plan.sampling_rate,
            noise_multiplier=plan.noise_multiplier,
            steps=plan.local_steps,
            previous=self._head,
        )
        cost = entry.rdp()
        total = self._rdp + cost
        epsilon = float(epsilon_by_order(total, self.budget.delta)[self._order_index(cost)])
        if not epsilon <= self.budget.epsilon:
            raise BudgetSpentError(
                f"the privacy budget is spent: round {round_number} of {task} would bring epsilon to {epsilon:.3f} "
                f"of {self.budget.epsilon:g} (delta {self.budget.delta:g}); nothing more is trained"
            )
        line = msgspec.json.encode(entry)
        self._store.append_log(LOG_NAME, line)
        self._take(entry, line, total)
        self._save_head()
        return self.spent_epsilon

    def remaining_participations(self, cost: Vector) -> float:
        """How many more participations that cost this much RDP (at each of `ORDERS`) the budget allows."""
        if math.isinf(self.budget.epsilon):
            return math.inf
        order = self._order_index(cost)
        used = epsilon_by_order(self._rdp, self.budget.delta)[order]
        return float(max(0.0, (self.budget.epsilon - used) // cost[order]))

    @property
    def order(self) -> float | None:
        """The Rényi order at which the budget is enforced; None before the first reservation."""
        return None if self._order is None else ORDERS[self._order]

    def _order_index(self, cost: Vector) -> int:
        """Index of the enforced order; before the first reservation, of the order that one of this cost would fix."""
        if self._order is not None:
            return self._order
        return filter_order_index(epsilon=self.budget.epsilon, delta=self.budget.delta, cost=cost)

    def _take(self, entry: Reservation, line: bytes, total: Vector) -> None:
        """Count an entry whose line is in the log; the first one fixes the order."""
        self._order = self._order_index(total)
        self._rdp = total
        self._head = hashlib.sha256(line).hexdigest()
        self.reservations.append(entry)

    def _save_head(self) -> None:
        """Keep under the store's key where the log ends; called after the line, so the log is never the shorter one."""
        head = _Head(lines=len(self.reservations), digest=self._head)
        self._store.write(HEAD_NAME, msgspec.msgpack.encode(head))

    def _check_head(self, digests: list[str]) -> None:
        """Refuse a log that is shorter than it was, or another one; `digests` start with the empty log's."""
        stored = self._store.read(HEAD_NAME)
        if stored is None and len(digests) == 1:
            self._save_head()
            return
        head = msgspec.msgpack.decode(stored, type=_Head) if stored is not None else None
        if head is None or head.lines >= len(digests) or digests[head.lines] != head.digest:
            raise LedgerError("the ledger was cut or exchanged since it was last written; nothing is trained")

    def _load(self) -> None:
        """Replay the log."""
        raw = self._store.read_log(LOG_NAME)
        whole = raw[: raw.rfind(b"\n") + 1]
        if len(whole) < len(raw):
            # Torn by a power cut before its fsync returned, so nothing was trained for it.
            self._store.truncate_log(LOG_NAME, len(whole))
        digests = [self._head]
        for number, line in enumerate(whole.split(b"\n")[:-1], start=1):
            try:
                entry = msgspec.json.decode(line, type=Reservation)
                cost = entry.rdp()
            except (msgspec.DecodeError, UnicodeDecodeError, LocalMisuseError, OverflowError) as error:
                raise LedgerError(f"the ledger's line {number} cannot be read ({error}); nothing is trained") from error
            if entry.previous != self._head:
                raise LedgerError(f"the ledger's line {number} does not follow from the one before; nothing is trained")
            self._take(entry, line, self._rdp + cost)
            digests.append(self._head)
        self._check_head(digests)
