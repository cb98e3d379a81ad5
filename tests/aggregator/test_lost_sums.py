"""Sums that helpers were asked for between a backup and its restore stay in the account of a task with a budget."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from sqlalchemy import delete, insert, select, update

from aggregator import lost_sums
from aggregator import restore as restoring
from aggregator.adapters.local_blobs import LocalBlobs
from aggregator.api.privacy_book import PrivacyBook
from aggregator.audit.log import AuditLog
from aggregator.backup import backup
from aggregator.device_budget import TaskBudget
from aggregator.errors import DatabaseError
from aggregator.lost_sums import UNSAID, LostSums
from aggregator.restore import ROUND_GAP
from aggregator.round_state import Phase
from aggregator.store import schema
from aggregator.store.aggregator_store import AggregatorStore
from aggregator.store.database import Database
from aggregator.task_file import Participation
from fl_protocol.errors import LocalMisuseError
from tests.contracts.databases import new_url
from tests.enrolments import broken_copy
from tests.system.test_secure_studies import BUDGET, NOISY, secure_fleet
from tests.virtual_fleet import TASK, VirtualFleet


class LostDisk:
    """A study that was backed up after its first round and went on until its budget was spent."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        fleet = secure_fleet(folder, rounds=40, secure=NOISY, device_privacy=BUDGET)
        fleet.run(until=lambda: fleet.state.committed == 1)
        store = fleet.store
        self.at_backup, self.is_open = fleet.state.number, fleet.state.phase is Phase.OPEN
        backup(store.database, store.blobs, folder / "monday.backup", now_s=fleet.clock.now_s())
        fleet.run(until=lambda: fleet.state.phase is Phase.PAUSED)
        assert "device-level budget is spent" in fleet.state.reason
        self.fleet, self.newest, self.sums = fleet, fleet.state.number, len(account(fleet, fleet.store).events())
        assert self.sums > 1

    def restored(
        self,
        database: Database,
        *,
        lost: LostSums = UNSAID,
        after_round: int | None = None,
        way: ModuleType = restoring,
    ) -> AggregatorStore:
        blobs = LocalBlobs(self.folder / "restored")
        path, now_s = self.folder / "monday.backup", self.fleet.clock.now_s()
        way.restore(path, database, blobs, now_s=now_s, after_round=after_round, sums_lost=lost)
        return AggregatorStore(database, blobs)


def account(fleet: VirtualFleet, store: AggregatorStore) -> TaskBudget:
    return TaskBudget(store, fleet.task, update_length=len(fleet.params(0)))


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> LostDisk:
    return LostDisk(tmp_path_factory.mktemp("study"))


def check_the_account_is_no_smaller(disk: LostDisk, database: Database, way: ModuleType = restoring) -> None:
    store = disk.restored(database, lost=LostSums(of={TASK: disk.sums - 1}), way=way)
    before, after = account(disk.fleet, disk.fleet.store), account(disk.fleet, store)
    for who in ("aggregator", "model_release"):
        assert after.epsilon(who, delta=1e-5) >= before.epsilon(who, delta=1e-5)
    number = store.tasks.get(TASK).state.number
    assert "device-level budget is spent" in after.why_not_another(number + 1, opens_s=disk.fleet.clock.now_s())


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_restored_task_has_spent_no_less_than_it_had(
    disk: LostDisk, kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    database = Database(new_url(request, tmp_path, kind))
    check_the_account_is_no_smaller(disk, database)
    store = AggregatorStore(database, LocalBlobs(disk.folder / "restored"))
    history = store.rounds.history(TASK)
    lost = [one for one in history if one.reason.startswith("lost since the backup of")]
    assert [one.number for one in lost] == list(range(disk.at_backup + 1, disk.at_backup + disk.sums))
    assert {one.outcome for one in lost} == {"aborted"}
    assert store.tasks.get(TASK).state.number == disk.at_backup + disk.sums - 1 + ROUND_GAP
    book = PrivacyBook(store).spent(TASK)
    assert (book.sums, book.device_aggregator) == (
        disk.sums,
        account(disk.fleet, store).epsilon("aggregator", delta=1e-5),
    )
    (told,) = AuditLog(database).page(action="database.restored")
    assert told.detail["sums_lost"] == disk.sums - 1
    database.close()


@pytest.mark.parametrize(
    "change",
    [
        ("            settled.insert_lost_sums(connection, blobs)\n", ""),
        (
            "count, now_s = self.sums_lost[name], self._now_s",
            "count, now_s = self.sums_lost[name] - 1, self._now_s",
        ),
    ],
    ids=["none is counted", "one is forgotten"],
)
def test_a_restore_that_forgets_sums_is_caught(disk: LostDisk, change: tuple[str, str], tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'a.db'}")
    with pytest.raises(AssertionError):
        check_the_account_is_no_smaller(disk, database, broken_copy(restoring.__name__, change))
    database.close()


def test_nothing_is_restored_until_somebody_says_how_many(disk: LostDisk, tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'a.db'}")
    with pytest.raises(DatabaseError, match=rf"task {TASK} has a budget at device level, .*--sums-lost {TASK}=NUMBER"):
        disk.restored(database)
    with database.reading() as connection:
        assert connection.execute(select(schema.tasks)).first() is None
    store = disk.restored(database, lost=LostSums(0))
    assert len(account(disk.fleet, store).events()) == 1
    database.close()


def test_every_round_that_may_have_been_is_taken_for_a_sum(disk: LostDisk, tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'a.db'}")
    store = disk.restored(database, after_round=disk.newest + 4)
    # Four more than there were, and the one that was open at the backup.
    asked = disk.newest + 4 - disk.at_backup + disk.is_open
    assert len(account(disk.fleet, store).events()) == 1 + asked
    assert store.tasks.get(TASK).state.number == disk.at_backup + asked
    database.close()


def test_without_a_budget_it_is_restored_and_said_that_the_account_is_too_small(tmp_path: Path) -> None:
    fleet = secure_fleet(tmp_path, rounds=2, secure=NOISY)
    fleet.run(until=lambda: fleet.state.committed == 1)
    backup(fleet.store.database, fleet.store.blobs, tmp_path / "monday.backup", now_s=fleet.clock.now_s())
    for number, (said, unsaid, sums) in enumerate([(UNSAID, [TASK], 1), (LostSums(3), [], 4)]):
        database, blobs = Database(f"sqlite:///{tmp_path / f'{number}.db'}"), LocalBlobs(tmp_path / f"{number}")
        now_s = fleet.clock.now_s()
        done = restoring.restore(
            tmp_path / "monday.backup", database, blobs, now_s=now_s, after_round=70, sums_lost=said
        )
        assert done.sums_unsaid == unsaid
        assert len(account(fleet, AggregatorStore(database, blobs)).events()) == sums
        database.close()


def test_a_number_for_no_task_is_refused(disk: LostDisk, tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'a.db'}")
    for wrong in ({"watchx": 12}, {"watchx": 0}):
        with pytest.raises(DatabaseError, match=r"--sums-lost watchx=\d+: expected a task of the backup"):
            disk.restored(database, lost=LostSums(0, wrong))
    with database.reading() as connection:
        assert connection.execute(select(schema.tasks)).first() is None
    database.close()


def test_a_round_that_the_backup_itself_is_beyond_is_refused(disk: LostDisk, tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'a.db'}")
    for lost in (UNSAID, LostSums(1)):
        with pytest.raises(DatabaseError, match=f"had had round {disk.at_backup} already"):
            disk.restored(database, after_round=disk.at_backup - 1, lost=lost)
    with pytest.raises(DatabaseError, match="up to 10000 of them"):
        disk.restored(database, after_round=disk.at_backup + lost_sums.MOST_INFERRED + 1)
    database.close()


def restored_in_the_middle_of_a_round(folder: Path, way: ModuleType) -> tuple[float, float]:
    """What two rounds cost before the disk was lost, and after; the first was open at the backup.

    A device could be in both: they opened further apart than devices keep apart.
    """
    apart = Participation(minimum_separation_s=57.0)
    fleet = secure_fleet(folder, rounds=2, secure=NOISY, device_privacy=BUDGET, participation=apart)
    fleet.run(until=lambda: fleet.state.phase is Phase.OPEN)
    opened_s = fleet.state.opened_s
    fleet.run(until=lambda: fleet.state.committed == 2)
    lost = fleet.store
    first, second = lost.rounds.asked(TASK)
    # The rows as they were 55 seconds after the first had opened.
    path = folder / "monday.backup"
    with lost.database.transaction() as connection:
        rounds = schema.rounds
        connection.execute(delete(rounds).where(rounds.c.number == second.number))
        connection.execute(delete(schema.models).where(schema.models.c.version > 0))
        connection.execute(update(rounds).values(outcome="open", asked_s=None, closed_s=None, opened_s=opened_s))
        connection.execute(
            update(schema.tasks).values(phase="open", number=first.number, committed=0, version=0, reason="")
        )
    backup(lost.database, lost.blobs, path, now_s=opened_s + 55.0)
    database, blobs = Database(f"sqlite:///{folder / 'restored.db'}"), LocalBlobs(folder / "restored")
    now_s = opened_s + 60.5
    way.restore(path, database, blobs, now_s=now_s, sums_lost=LostSums(1))
    store = AggregatorStore(database, blobs)
    with database.transaction() as connection:  # and the second, as it really was
        values = {"opened_s": opened_s + 60.0, "asked_s": opened_s + 60.5, "closed_s": opened_s + 60.5}
        number = store.tasks.get(TASK).state.number + 1
        like = dict(connection.execute(select(rounds).where(rounds.c.asked_s.is_not(None))).mappings().one())
        connection.execute(insert(rounds).values({**like, **values, "number": number}))
    after = account(fleet, store).epsilon("aggregator", delta=1e-5)
    with database.transaction() as connection:
        connection.execute(
            update(rounds)
            .where(rounds.c.asked_s.is_not(None), rounds.c.number < number)
            .values(opened_s=opened_s, asked_s=opened_s + 60.0)
        )
    before = account(fleet, store).epsilon("aggregator", delta=1e-5)
    database.close()
    return before, after


def test_a_round_that_was_open_at_the_backup_counts_from_when_it_opened(tmp_path: Path) -> None:
    before, after = restored_in_the_middle_of_a_round(tmp_path, restoring)
    assert after >= before


def test_a_restore_that_takes_it_to_have_opened_at_the_backup_is_caught(tmp_path: Path) -> None:
    change = ("min(self._created_s, self._opened_s.get(name, self._created_s))", "self._created_s")
    before, after = restored_in_the_middle_of_a_round(tmp_path, broken_copy(restoring.__name__, change))
    assert after < 0.9 * before


def row(**values: object) -> dict[str, object]:
    text = 'name = "gait"\n[plan]\nkind = "training"\n'
    return {"task": "gait", "spec": text, "phase": "open", "number": 7, **values}


def test_tasks_that_are_over_or_have_no_file_lose_none() -> None:
    for one in (row(phase="finished"), row(phase="aborted"), row(spec="")):
        assert LostSums().of_task(one, after_round=None) == 0


def test_how_many_were_lost_is_said_of_one_task_or_of_all() -> None:
    assert LostSums.parse([]) == LostSums()
    assert LostSums.parse(["gait=3", "4"]) == LostSums(4, {"gait": 3})
    for wrong in (
        ["-1"],
        ["gait"],
        ["1.5"],
        [""],
        ["=3", "4"],
        ["٣"],
        ["gait=1", "gait=2"],
        [str(lost_sums.MOST + 1)],
        ["9" * 5000],
        ["=3"],
    ):
        with pytest.raises(LocalMisuseError, match="expected a number up to 100000, or TASK=NUMBER"):
            LostSums.parse(wrong)
