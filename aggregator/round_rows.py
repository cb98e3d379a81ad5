"""The rows of a task's rounds: opened with fresh keys, closed without what they held, keys erased. In transactions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from sqlalchemy import Connection

from aggregator.pacing import next_probability
from aggregator.partial_sums import SECRET_BYTES
from aggregator.round_events import OpenRound, RollBack, RoundAction
from aggregator.round_state import Phase, RoundState
from aggregator.store.aggregator_store import AggregatorStore
from aggregator.store.rounds import Outcome
from aggregator.task_file import TaskConfig
from fl_protocol.sealing import RoundKey, round_key_bytes


class RoundRows:
    """See the module docstring; all methods are part of the transaction that a connection has.

    Args:
        store: the database.
        config: of the task.
        update_length: numbers in an update.
        entropy: cryptographic source, for keys and secrets.
    """

    def __init__(
        self, store: AggregatorStore, config: TaskConfig, *, update_length: int, entropy: Callable[[int], bytes]
    ) -> None:
        self._store, self._config, self._update_length, self._entropy = store, config, update_length, entropy

    def open(self, connection: Connection, action: OpenRound, *, version: int, probability: float) -> dict[str, Any]:
        """Open a round with a fresh recipient key; what to tell of it.

        Args:
            connection: with the transaction.
            action: which round.
            version: of the model that it trains.
            probability: of participation.
        """
        store, name, kem = self._store, self._config.name, self._config.updates.kem
        digest = store.models.digest(connection, name, version)
        store.rounds.open(
            connection,
            name,
            action.number,
            opened_s=action.opened_s,
            deadline_s=action.deadline_s,
            key=RoundKey(kem, self._entropy(round_key_bytes(kem))),
            sums_secret=self._entropy(SECRET_BYTES),
            version=version,
            model_digest=digest,
            update_length=self._update_length,
            probability=probability,
        )
        return {
            "round": action.number,
            "goal": self._config.goal,
            "deadline_s": action.deadline_s,
            "version": version,
            "model_digest": digest.hex(),
        }

    def close(
        self,
        connection: Connection,
        number: int,
        *,
        outcome: Outcome,
        reason: str,
        metrics: dict[str, Any],
        now_s: float,
    ) -> None:
        """Close a round; its sums and single updates are not needed any more."""
        store, name = self._store, self._config.name
        store.rounds.close(connection, name, number, outcome=outcome, reason=reason, metrics=metrics, now_s=now_s)
        store.updates.drop_partials(connection, name, number)
        store.updates.drop_kept(connection, name, number)

    def steered(
        self, connection: Connection, number: int, probability: float, *, arrived: int, goal_after_s: float | None
    ) -> float:
        """The participation probability after a round, where it is steered by arrivals.

        Args:
            connection: with the transaction.
            number: of the round.
            probability: of the round.
            arrived: updates counted in it.
            goal_after_s: seconds from its opening to its goal; None: fewer came by the deadline.
        """
        wanted, policy = self._config.participation, self._config.policy
        if not wanted.steer:
            return probability
        return next_probability(
            probability,
            arrived=arrived,
            late=self._store.rounds.late(connection, self._config.name, number),
            closed_early_after=None if goal_after_s is None else goal_after_s / policy.duration_s,
            goal=policy.goal,
            over_selection=wanted.over_selection,
            least=wanted.least_probability,
        )

    def erase_keys(self, connection: Connection, state: RoundState, actions: Iterable[RoundAction]) -> None:
        """Erase keys of rounds whose updates cannot count any more; after a rollback none that came before can.

        Args:
            connection: with the transaction.
            state: of the task after these actions.
            actions: that are carried out.
        """
        newest_closed = state.number - (state.phase in {Phase.OPEN, Phase.UNMASKING})
        is_over = state.phase in {Phase.FINISHED, Phase.ABORTED}
        rolled_back = any(isinstance(action, RollBack) for action in actions)
        lasting = 0 if is_over or rolled_back else self._config.policy.maximum_staleness
        # Once round n + 1 is open, updates of round n + 1 - staleness still count.
        self._store.rounds.erase_keys(connection, self._config.name, up_to=newest_closed - lasting)
