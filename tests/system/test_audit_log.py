"""A study's audit log, with real devices, aggregator and helpers on a bad network, killed in between: it holds."""

from __future__ import annotations

from pathlib import Path

import msgspec

from aggregator.audit.checkpoint_rows import Checkpoints
from aggregator.audit.checkpoints import origin_of
from aggregator.audit.entry_proofs import check_entry, prove_entry
from aggregator.audit.export import verify_database
from aggregator.audit.verification import LogKeys
from aggregator.rounds import Phase
from firmware_sim.faults.packets import PacketRates
from tests.system.test_secure_studies import BUDGET, HELPERS, NOISY, secure_fleet
from tests.virtual_fleet import AGGREGATOR_KEY, TASK, TENANT, VirtualFleet, helper_identity

KEYS = LogKeys(
    origin_of(TENANT),
    AGGREGATOR_KEY.public_key(),
    {name: helper_identity(name).public_key() for name in HELPERS},
)


def co_signed_by_all(fleet: VirtualFleet) -> bool:
    """Whether every helper has co-signed the newest checkpoint."""
    newest = Checkpoints(fleet.store.database, KEYS.origin).newest()
    return newest is not None and len(newest.signatures) == 1 + len(HELPERS)


def test_a_studys_log_holds_and_every_helper_has_co_signed_it(tmp_path: Path) -> None:
    fleet = secure_fleet(tmp_path, faults=PacketRates(drop=0.1, repeat=0.1))
    fleet.run()
    fleet.kill_helper(HELPERS[0])
    fleet.kill_aggregator()
    fleet.start_helper(HELPERS[0])
    fleet.store.tasks.ask(TASK, "pause", now_s=fleet.clock.time_s, actor="local:anna")
    fleet.start_aggregator()
    fleet.run(until=lambda: co_signed_by_all(fleet))
    found = verify_database(fleet.store.database, KEYS)
    assert found.fault is None
    assert found.checkpoints >= 3
    closed = fleet.store.audit.page(action="round.closed", limit=1000)
    assert [one.detail["outcome"] for one in closed].count("committed") == 3
    assert min(found.cosigned.values()) > closed[0].number
    proof = msgspec.json.encode(prove_entry(fleet.store.database, closed[0].number))
    checked = check_entry(proof, aggregator=None, helpers=list(KEYS.helpers.values()))
    assert checked.entry == closed[0]
    for name in HELPERS:
        (kept,) = fleet.helpers[name].store.logs.all()
        assert kept.size == found.cosigned[name]


def test_a_budget_that_halts_a_task_is_in_the_log_each_time(tmp_path: Path) -> None:
    fleet = secure_fleet(tmp_path, rounds=40, secure=NOISY, device_privacy=BUDGET)
    fleet.run(until=lambda: fleet.state.phase is Phase.PAUSED)
    (halted,) = fleet.store.audit.page(action="privacy.halted")
    assert (halted.subject, halted.detail) == (TASK, {"reason": fleet.state.reason})
    order = fleet.store.tasks.ask(TASK, "resume", now_s=fleet.clock.now_s(), actor="local:anna")
    fleet.run(until=lambda: not fleet.store.tasks.pending_orders())
    assert [one.action for one in fleet.store.audit.page(limit=2)] == ["privacy.halted", "order.resume"]
    assert fleet.store.audit.page(limit=1)[0].detail["order"] == order
