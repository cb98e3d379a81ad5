"""One update can be followed by its label through both journals, whatever becomes of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aggregator.task_file import TrainingPlan
from tests.enrolments import broken_copy
from tests.virtual_fleet import AGGREGATOR, TASK, TENANT, VirtualFleet, task_config

ONE = "watch-0"


class Lossy:
    """Loses the first message that it is to lose."""

    def __init__(self, wanted: Callable[[str], bool]) -> None:
        self._wanted, self.lost = wanted, ""

    def __call__(self, topic: str) -> bool:
        if self.lost or not self._wanted(topic):
            return False
        self.lost = topic
        return True


def lone_device(folder: Path, **changes: Any) -> VirtualFleet:
    """A device that makes up every round's cohort; its updates travel in pieces."""
    settings = {"rounds": 1, "goal": 1, "minimum_cohort": 1, **changes}
    return VirtualFleet(folder, devices=1, task=task_config(**settings), maximum_packet_bytes=2048)


def story(fleet: VirtualFleet, update: str) -> list[tuple[str, str]]:
    """What both journals have of an update, each in its order: what ``grep`` finds."""
    told = [(name, journal.events) for name, journal in sorted(fleet.journals.items(), reverse=True)]
    return [(name, event) for name, events in told for event, fields in events if fields.get("update") == update]


def charged(fleet: VirtualFleet, name: str = ONE) -> list[str]:
    """The ids of what a device has begun."""
    return [fields["update"] for fields in fleet.journals[name].named("charged")]


def check_an_ordinary_one(folder: Path) -> None:
    fleet = lone_device(folder)
    fleet.run()
    (update,) = charged(fleet)
    of_device = [(ONE, event) for event in ("charged", "trained", "update_sent", "update_delivered")]
    assert story(fleet, update) == [*of_device, (AGGREGATOR, "update_accepted")]
    assert any(f"/{update}" in topic for topic, _ in fleet.broker.published)


def check_one_whose_piece_and_receipt_are_lost(folder: Path) -> None:
    fleet = lone_device(folder, rounds=2)
    receipt, journal = Lossy(lambda topic: topic.endswith("/receipt")), fleet.journals[AGGREGATOR]

    def loses(topic: str) -> bool:
        is_first_piece = "/up/" in topic and topic.endswith("/0")
        return receipt(topic) or (is_first_piece and not journal.named("update_incomplete"))

    fleet.broker.loses = loses
    fleet.run(until=lambda: len(fleet.journals[ONE].named("update_delivered")) == 2)
    first, second = charged(fleet)
    found = story(fleet, first)
    of_device, of_aggregator = ([event for name, event in found if name == one] for one in (ONE, AGGREGATOR))
    assert of_device[:3] == ["charged", "trained", "update_sent"]
    assert set(of_device[3:-1]) == {"update_sent", "update_incomplete"}
    assert of_device[-1] == "update_delivered"
    assert of_aggregator == ["update_incomplete", "update_accepted", "receipt_repeated"]
    assert (AGGREGATOR, "update_accepted") in story(fleet, second)
    assert first != second


def check_one_that_is_aborted(folder: Path) -> None:
    plan = TrainingPlan(
        sampling_rate=1.0,
        local_steps=60,
        learning_rate=1.0,
        l2_norm_clip=0.5,
        noise_multiplier=60.0,
        expected_batch_size=40.0,
    )
    fleet = lone_device(folder, plan=plan)
    fleet.run(until=lambda: bool(charged(fleet)))
    fleet.store.tasks.ask(TASK, "abort", argument="the strap was redesigned", now_s=fleet.clock.time_s)
    fleet.run(until=lambda: bool(fleet.journals[ONE].named("participation_ended")))
    (update,) = charged(fleet)
    assert story(fleet, update) == [(ONE, "charged"), (ONE, "participation_ended")]


def check_an_id_is_of_one_name_and_one_round(folder: Path) -> None:
    """One device in two studies, under a name in each: no id is said under both, or for two rounds."""
    fleet = VirtualFleet(folder, devices=0, task=task_config(rounds=2, goal=1, minimum_cohort=1))
    fleet.create_task(task_config(name="second", rounds=2, goal=1, minimum_cohort=1))
    fleet.start_device(ONE, studies=(fleet.study(ONE), fleet.study(ONE, task="second")))
    fleet.run(until=lambda: all(fleet.state_of(task).committed == 2 for task in (TASK, "second")))
    said = defaultdict(set)
    for fields in fleet.journals[AGGREGATOR].named("update_accepted"):
        said[fields["update"]].add((fields["device"], fields["task"], fields["round"]))
    assert len(said) == 4
    assert all(len(places) == 1 for places in said.values())
    assert len({device for places in said.values() for device, *_ in places}) == 2
    assert all(len(bytes.fromhex(update)) == 6 for update in said)
    assert all(fields["study"].startswith(f"{TENANT}/") for fields in fleet.journals[ONE].named("charged"))


def test_an_ordinary_update_is_followed_from_the_charge_to_the_receipt(tmp_path: Path) -> None:
    check_an_ordinary_one(tmp_path)


def test_an_update_that_is_sent_again_keeps_its_label(tmp_path: Path) -> None:
    check_one_whose_piece_and_receipt_are_lost(tmp_path)


def test_an_aborted_one_ends_in_its_devices_journal_and_is_in_no_other(tmp_path: Path) -> None:
    check_one_that_is_aborted(tmp_path)


def test_an_id_ties_no_two_names_of_a_device_together(tmp_path: Path) -> None:
    check_an_id_is_of_one_name_and_one_round(tmp_path)


def test_a_device_that_leaves_the_id_out_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = broken_copy(
        "device_client.delivery", ('told = {"update": update_label(update_id), **fields}', "told = {**fields}")
    )
    monkeypatch.setattr("device_client.session.Deliveries", broken.Deliveries)
    with pytest.raises(AssertionError):
        check_an_ordinary_one(tmp_path)


def test_an_aggregator_that_names_another_id_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change = (
        "update=update_label(update_id),\n                    bytes",
        "update=update_label(update_id[::-1]),\n                    bytes",
    )
    monkeypatch.setattr("aggregator.assembly.Intake", broken_copy("aggregator.intake", change).Intake)
    with pytest.raises(AssertionError):
        check_an_ordinary_one(tmp_path)


def test_an_id_that_follows_from_the_device_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = broken_copy(
        "device_client.participation", ("update_id=self.entropy(16)", 'update_id=b"of one device.."[:16]+b"!"')
    )
    monkeypatch.setattr("device_client.device.Participant", broken.Participant)
    with pytest.raises(AssertionError):
        check_an_id_is_of_one_name_and_one_round(tmp_path)
