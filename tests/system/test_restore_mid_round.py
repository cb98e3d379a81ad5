"""The machine is lost in the middle of a round: restored onto empty ones, with the same devices, on a real mosquitto.

Kept are the backup, and what docs/backup.md says to keep apart: the signing key, the CA's folder, the desk's key. The
broker's machine lives on, as do the devices. What waits here waits for processes that it started.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest
from sqlalchemy import select

from aggregator.assembly import AggregatorFiles
from aggregator.ca_folder import issue_client, load_ca
from aggregator.restore import ROUND_GAP
from aggregator.store import schema
from firmware_sim.mosquitto_broker import find_mosquitto
from tests.aggregator.operator_desk import TRAINING
from tests.contracts.databases import new_url
from tests.system.clinic import TASK, TENANT, Clinic, Watch, desk_process, running_clinic
from tests.system.daemons import Account, Daemon, Wrist, until

pytestmark = pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")

AT = ("--config", "aggregator.toml")
KEPT_APART = ("keys/aggregator-signing.key", "keys/desk.key", "ca", "aggregator.toml")
ROUNDS = 6
FEATURES = TRAINING.replace("rounds = 3", f"rounds = {ROUNDS}")


class Machine(Daemon):
    """What ``covey-aggregator run`` does in a folder, and what its database says."""

    def __init__(self, clinic: Clinic) -> None:
        super().__init__(clinic.folder, ("aggregator.cli", "run", *AT), "aggregator")
        self.clinic = clinic

    def accepted(self) -> dict[int, set[bytes]]:
        """Ids of accepted updates by the round that they count in."""
        with (
            closing(AggregatorFiles.load(self.folder / "aggregator.toml").open_store(create=False)) as store,
            store.database.reading() as connection,
        ):
            found: dict[int, set[bytes]] = {}
            for row in connection.execute(select(schema.updates.c.counted_in, schema.updates.c.update_id)):
                found.setdefault(row.counted_in, set()).add(row.update_id)
        return found

    def outcomes(self) -> dict[int, str]:
        """Of every round."""
        with (
            closing(AggregatorFiles.load(self.folder / "aggregator.toml").open_store(create=False)) as store,
            store.database.reading() as connection,
        ):
            columns = schema.rounds.c
            return {row.number: row.outcome for row in connection.execute(select(columns.number, columns.outcome))}

    def open_round(self) -> int:
        """The number of the round that is open; 0 for none."""
        return max((number for number, outcome in self.outcomes().items() if outcome == "open"), default=0)

    def await_accepted(self, count: int, *, round_number: int) -> None:
        until(lambda: len(self.accepted().get(round_number, ())) == count, what=f"{count} in {round_number}")


def lose(machine: Machine) -> dict[str, bytes]:
    """The machine is gone, all but what was kept apart: its content by name."""
    machine.kill()
    folder, kept = machine.folder, {}
    for name in KEPT_APART:
        path = folder / name
        for file in (path,) if path.is_file() else sorted(path.iterdir()):
            kept[str(file.relative_to(folder))] = file.read_bytes()
    for path in (*folder.glob("aggregator.db*"), folder / "keys", folder / "ca"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return kept


def restored_onto(folder: Path, clinic: Clinic, kept: dict[str, bytes], backup: Path, *, url: str = "") -> Machine:
    """A new machine: files that were kept, certificates made anew, and `restore`."""
    folder.mkdir()
    for name, content in kept.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        path.chmod(0o600)
    if url:
        config = folder / "aggregator.toml"
        text = config.read_text().replace('database = "aggregator.db"', f'database = "{url}"\nblobs = "blobs"')
        config.write_text(text)
    shutil.copytree(clinic.folder / "broker", folder / "broker")
    (folder / "broker.pid").write_text((clinic.folder / "broker.pid").read_text())
    there = Clinic(folder, clinic.port, clinic.claims_port)
    for name in ("aggregator", "enrolment"):
        issue_client(load_ca(folder / "ca"), folder / "keys", name=name, now_s=time.time())
    there.command("restore", str(backup), "--crl", "broker/crl.pem", *AT)
    machine = Machine(there)
    machine.start()
    there.command("task", "resume", TASK, *AT)
    return machine


class Study:
    """Three wrists in one study, and the machine that it runs on."""

    def __init__(self, clinic: Clinic, folder: Path, stack: ExitStack) -> None:
        self.clinic, self.folder, self.stack = clinic, folder, stack
        self.machine = self.watched(Machine(clinic))
        tokens = clinic.command("enroll-token", "create", TASK, "--count", "3", "--owner", "ward-3", "--quota", "9",
                                "--claim", "claim.json", *AT).split()  # fmt: skip
        self.wrists = [Wrist(folder / f"wrist-{number}", number) for number in range(3)]
        for wrist, token in zip(self.wrists, tokens, strict=True):
            wrist.join(clinic.folder / "claim.json", token, study=f"{TENANT}/{TASK}")
            stack.callback(wrist.kill)

    def watched(self, machine: Machine) -> Machine:
        self.stack.callback(machine.kill)
        return machine

    def accounts(self) -> list[Account]:
        """Of devices that are stopped for that."""
        for wrist in self.wrists:
            wrist.kill()
        return [wrist.account() for wrist in self.wrists]

    def backup(self, name: str) -> Path:
        """While the service runs."""
        path = self.folder / name
        self.machine.clinic.command("backup", "--out", str(path), *AT)
        return path


@pytest.fixture
def study(tmp_path: Path) -> Iterator[Study]:
    folder = tmp_path / "clinic"
    folder.mkdir()
    with running_clinic(folder, task=FEATURES) as clinic, ExitStack() as stack:
        yield Study(clinic, tmp_path, stack)


@contextmanager
def frozen(machine: Machine) -> Iterator[None]:
    """The service hears nothing meanwhile; the broker keeps what is sent to it."""
    machine.send(signal.SIGSTOP)
    yield
    machine.send(signal.SIGCONT)


def receipts_are_lost(study: Study) -> int:
    """An open round with two accepted updates; the device of one was away when it was told so. The round's number.

    So it and a third were away when the round before was told.
    """
    machine, (unlucky, steady, late) = study.machine, study.wrists
    machine.start()
    steady.start()
    steady.await_told("update_delivered", round_number=1)
    with frozen(machine):
        for wrist in (unlucky, late):
            wrist.start()
        for wrist in (unlucky, late):
            wrist.await_told("update_sent", round_number=1)
            wrist.stop()  # with a goodbye: what it sent has left
    steady.await_told("update_delivered", round_number=2)
    with frozen(machine):
        unlucky.start()
        unlucky.await_told("update_sent", round_number=2)
        unlucky.stop()
    machine.await_accepted(2, round_number=2)
    assert machine.open_round() == 2
    return 2


def test_the_same_devices_go_on_with_a_machine_that_was_restored_mid_round(
    study: Study, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    number = receipts_are_lost(study)
    machine, (unlucky, steady, late) = study.machine, study.wrists
    thief = Watch(study.clinic)
    thief.join()
    backup = study.backup("monday.backup")

    # The service goes on for a round and a half, whose updates die with it; somebody is thrown out.
    study.clinic.command("device", "revoke", thief.enrolment, "--reason", "stolen", "--yes", *AT)
    late.start()
    machine.await_told("round_committed", round_number=number)
    for wrist in (steady, late):
        wrist.await_told("update_delivered", round_number=number + 1)
    until(lambda: "revocation_enforced" in (study.clinic.folder / "desk.jsonl").read_text(), what="no list")
    machine.kill()
    os.kill(study.clinic.desk_pid, signal.SIGKILL)
    unlucky.start()
    unlucky.await_told("update_sent", round_number=number + 1)
    before = study.accounts()
    assert before[0].of_round(number) is None
    assert before[0].of_round(number + 1) is None
    kept = lose(machine)

    # From SQLite into SQLite.
    for wrist in (unlucky, steady):
        wrist.start()
    machine = study.machine = study.watched(restored_onto(tmp_path / "second", study.clinic, kept, backup))
    unlucky.await_told("update_delivered", round_number=number)
    unlucky.await_told("update_refused", round_number=number + 1)
    assert unlucky.told("update_refused")[-1]["reason"] == "round_closed"
    first = number + ROUND_GAP + 1
    machine.await_accepted(2, round_number=first)
    outcomes = machine.outcomes()
    assert (outcomes[number], outcomes[first]) == ("aborted", "open")
    assert number + 1 not in outcomes
    backup = study.backup("tuesday.backup")
    late.start()
    machine.await_told("round_committed", round_number=first)
    assert machine.clinic.command("audit", "verify", *AT).startswith("holds")

    # Lost once more, and from SQLite into PostgreSQL.
    kept = lose(machine)
    url = new_url(request, tmp_path, "postgresql")
    machine = study.machine = study.watched(restored_onto(tmp_path / "third", study.clinic, kept, backup, url=url))
    until(lambda: bool(machine.told("task_finished")), what="the end of the task")
    numbers = sorted(one for one, outcome in machine.outcomes().items() if outcome == "committed")
    assert numbers == [1, *range(first + ROUND_GAP + 1, first + ROUND_GAP + ROUNDS)]
    assert "database.restored" in machine.clinic.command("audit", "list", *AT)
    assert machine.clinic.command("audit", "verify", *AT).startswith("holds")

    after = study.accounts()
    for old, new in zip(before, after, strict=True):
        new.check()
        assert new.charged[: len(old.charged)] == old.charged
    assert after[0].of_round(number) == "delivered"
    assert after[0].of_round(number + 1) == "refused"
    assert before[1].of_round(number + 1) == after[1].of_round(number + 1) == "delivered"  # lost, and charged for
    counted = {update_id.hex() for some in machine.accepted().values() for update_id in some}
    delivered = {one for account in after for one, what in account.outcomes.items() if what == "delivered"}
    assert counted <= delivered

    # Others join, with the claim that they have; one that is made anew takes the same tokens.
    machine.clinic.command("enrolment", "claim", TASK, "--out", "claim.json", *AT)
    assert machine.clinic.claim.fingerprint == study.clinic.claim.fingerprint
    shutil.copytree(study.clinic.folder / "claimant", machine.folder / "claimant")
    with desk_process(machine.folder):
        Watch(machine.clinic).join()
        thief.clinic = machine.clinic
        answer = thief.ask_with(thief.prepared(None))
        assert (answer.outcome, "list of revoked certificates" in answer.detail) == ("revoked", True)
