"""A whole device: consent, studies side by side, conditions, restarts, erasure; and that it sleeps when it can."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from device_client.adapters.counter_file import CounterFile
from device_client.adapters.encrypted_files import EncryptedFiles
from device_client.config import EligibilityConfig, RecordsConfig
from device_client.control import answer
from device_client.daemon import DeviceDaemon
from device_client.device import Device, budget_of
from device_client.device_store import study_blob
from device_client.eligibility import Conditions
from device_client.errors import LedgerError, StoreError
from device_client.events import PendingUpdate
from device_client.ledger import LOG_NAME, PrivacyLedger
from device_client.outbox import PREFIX, Outbox
from device_client.readiness import READ_EVERY_S
from device_client.studies import LOOK_EVERY_S
from firmware_sim.board.board_state import BoardState
from firmware_sim.board.virtual_board import VirtualBoard
from firmware_sim.profiles.catalogue import load_profile
from firmware_sim.virtual_device import SteadyBoard
from firmware_sim.virtual_flash import VirtualFlash
from firmware_sim.wearer.traces import TracedWearer, parse_traces
from fl_protocol.bundle import ModelBundle
from fl_protocol.errors import ConfigError, CoveyError
from tests.device_client.one_device import BUNDLE, START_S, OneDevice
from tests.device_client.ports import make_plan
from tests.virtual_fleet import SeededEntropy

LONG = {"local_steps": 5}


# Consent.


class Hasty(Device):
    """Broken: it does not ask whether the wearer agreed."""

    def __init__(self, config: Any, ports: Any) -> None:
        super().__init__(config, ports)
        self.consents.problem = lambda _study, *, terms: ""  # type: ignore[method-assign, assignment]


def check_nothing_happens_before_consent(kind: type[Device]) -> None:
    one = OneDevice(kind=kind)
    one.start(grant=False)
    one.scripts["watch"].open_round()
    one.steps(30)
    assert one.connections == {}
    assert one.scripts["watch"].updates() == {}
    assert not any(topic.startswith("fl/v1/clinic/state") for topic, _ in one.scripts["watch"].published)
    assert not one.device.ledger.reservations
    assert not one.device.outbox.size_bytes
    assert "not granted" in one.device.status().studies[0].doing


def test_nothing_connects_trains_or_is_sent_before_consent() -> None:
    check_nothing_happens_before_consent(Device)


def test_a_device_that_does_not_ask_is_noticed() -> None:
    with pytest.raises(AssertionError):
        check_nothing_happens_before_consent(Hasty)


@pytest.mark.parametrize("name", ["watch", "clinic/watch"])
def test_withdrawing_stops_at_once_and_drops_work_and_updates_while_charges_stand(name: str) -> None:
    one = OneDevice()
    device = one.start()
    one.scripts["watch"].open_round(plan=LONG)
    one.until("charged")
    one.steps(2)
    device.withdraw(name)
    assert not device.studies.running
    assert device.outbox.size_bytes == 0
    sent = len(one.scripts["watch"].published)
    one.steps(40)
    assert not device.studies.running
    assert [topic for topic, _ in one.scripts["watch"].published[sent:]] == []
    assert len(device.ledger.reservations) == 1
    assert device.status().studies[0].doing == "consent was withdrawn"
    again = one.restart()
    one.steps(20)
    assert not again.studies.running
    assert len(again.ledger.reservations) == 1


def test_what_was_not_delivered_is_not_sent_after_a_later_consent() -> None:
    one = OneDevice()
    device = one.start()
    one.scripts["watch"].open_round()
    one.until("update_sent")
    assert device.withdraw("watch") == 1
    before = len(one.scripts["watch"].updates())
    one.scripts["watch"].published.clear()
    device.grant("watch")
    one.steps(60)
    assert before == 1
    assert one.scripts["watch"].updates() == {}
    one.scripts["watch"].open_round(2)
    one.until("update_sent")
    assert [header.round for header in one.scripts["watch"].updates().values()] == [2]


@pytest.mark.parametrize(
    ("study", "privacy"),
    [
        ({"aggregator_key": "22"}, {}),
        ({"publisher_key": "22"}, {}),
        ({"role": "evaluate"}, {}),
        ({"epsilon": 1.0}, {}),
        ({}, {"epsilon": 20.0}),
        ({}, {"period_days": 7.0}),
        ({}, {"minimum_noise_multiplier": 0.5}),
        ({}, {"minimum_cohort": 2}),
        ({}, {"maximum_l2_norm_clip": 2.0}),
    ],
)
def test_changed_terms_have_to_be_granted_again(study: dict[str, Any], privacy: dict[str, Any]) -> None:
    one = OneDevice()
    one.start()
    one.study_settings, one.privacy = {"watch": study}, privacy
    device = one.restart()
    one.scripts["watch"].open_round()
    one.steps(20)
    assert not device.studies.running
    assert "its terms have changed" in device.status().studies[0].doing
    device.grant("watch")
    one.steps(2)
    assert device.studies.running


def test_a_study_that_is_not_configured_cannot_be_granted_or_left() -> None:
    device = OneDevice().start()
    for act in (device.grant, device.withdraw, device.terms, device.consent_problem):
        with pytest.raises(ConfigError, match="expected one of clinic/watch"):
            act("dance")


# Several studies.


def test_two_studies_share_records_and_budget_and_have_each_their_own_name() -> None:
    one = OneDevice(tasks=("watch", "steps"), privacy={"epsilon": 3.0}, study_settings={"steps": {"epsilon": 1.2}})
    device = one.start()
    for number in range(1, 9):
        for script in one.scripts.values():
            script.open_round(number, lasts_s=600.0)
        one.steps(40)
        for script in one.scripts.values():
            script.receipt_all()
        one.steps(3)
        one.clock.time_s += 600.0
    ledger = device.ledger
    assert 0 < ledger.spent_on("clinic/steps") <= 1.2
    assert 1.2 < ledger.spent_epsilon <= 3.0
    rounds = {task: {header.round for header in script.updates().values()} for task, script in one.scripts.items()}
    assert rounds["steps"] < rounds["watch"] < set(range(1, 9))
    for task, script in one.scripts.items():
        assert {header.device for header in script.updates().values()} == {f"{task}-7"}
        other = "steps" if task == "watch" else "watch"
        assert not any(f"{other}-7".encode() in payload for _, payload in script.published)
        assert {line.round for line in ledger.releases if line.task == script.study} == rounds[task]
    reasons = [note["reason"] for note in one.journal.named("round_skipped")]
    assert any("the share of clinic/steps" in reason for reason in reasons)
    assert any("of this device" in reason for reason in reasons)


def test_a_study_whose_broker_is_away_does_not_disturb_the_other() -> None:
    one = OneDevice(tasks=("watch", "steps"))
    one.scripts["steps"].is_down = True
    device = one.start()
    one.scripts["watch"].open_round()
    one.until("update_sent")
    doing = {study.study: study for study in device.status().studies}
    assert not doing["clinic/steps"].connected
    assert "no connection" in doing["clinic/steps"].doing
    one.scripts["watch"].receipt_all()
    one.until("update_delivered")


def test_a_study_that_cannot_start_says_why_and_does_not_disturb_the_other() -> None:
    one = OneDevice(tasks=("watch", "steps"), study_settings={"steps": {"id": None}})
    device = one.start()
    one.scripts["watch"].open_round()
    one.until("update_sent")
    status = {study.study: study for study in device.status().studies}
    assert not status["clinic/steps"].running
    assert "pseudonyms request" in status["clinic/steps"].doing
    assert one.connections == {"watch": ["watch-7"]}


def test_a_download_of_one_study_goes_on_after_a_restart_whatever_the_other_downloads() -> None:
    one = OneDevice(tasks=("watch", "steps"))
    one.start()
    for index, script in enumerate(one.scripts.values()):
        script.open_round(factor=1.0 + index, cut_bytes=400, chunks=slice(0, 2))
    one.steps(10)
    kept = {name for name in one.flash.names() if name.startswith("download/")}
    assert len(kept) == 4
    one.restart()
    one.steps(10)
    assert {name for name in one.flash.names() if name.startswith("download/")} == kept
    for index, script in enumerate(one.scripts.values()):
        script.open_round(factor=1.0 + index, cut_bytes=400, chunks=slice(2, None))
    one.until("update_sent")
    one.steps(20)
    assert all(len(script.updates()) == 1 for script in one.scripts.values())
    assert not [name for name in one.flash.names() if name.startswith("download/")]


# Conditions.


def test_training_pauses_keeps_its_progress_and_goes_on() -> None:
    board = SteadyBoard(Conditions(charging=True, battery_percent=80.0))
    one = OneDevice(board=board, eligibility=EligibilityConfig(require_idle=False, require_charging=True))
    device = one.start()
    one.scripts["watch"].open_round(plan=LONG)
    one.until("charged")
    one.steps(2)
    done = one.runner().work
    assert done is not None
    before = done.steps[0]
    assert 0 < before < 5
    board.conditions = replace(board.conditions, charging=False)
    one.clock.time_s += READ_EVERY_S
    paused = one.until("training_paused")
    assert before <= paused["step"] < 5
    one.steps(20)
    assert len(one.journal.named("training_paused")) == 1
    assert one.runner().work is not None
    assert one.runner().work.steps[0] == paused["step"]  # type: ignore[union-attr]
    status = device.status()
    assert not status.may_train
    assert "charg" in status.blocked[0]
    assert f"training for round 1 (paused: {status.blocked[0]})" in status.studies[0].doing
    again = one.restart()
    one.steps(3)
    assert one.runner().work.steps[0] == paused["step"]  # type: ignore[union-attr]
    board.conditions = replace(board.conditions, charging=True)
    one.until("update_sent")
    assert len(again.ledger.reservations) == 1
    assert one.journal.named("trained")[-1]["steps"] == 5


_THIRD_HOUR = ("device,time,event", f"phone,{START_S + 10_800},wifi_begins")


def test_a_day_of_conditions_decides_when_it_trains() -> None:
    """Hot until the second hour, metered until the third; then it takes part."""
    phone, wearer = load_profile("phone_fast"), TracedWearer(parse_traces(_THIRD_HOUR, where="the test")["phone"])
    cools = msgspec.structs.replace(phone, thermal=msgspec.structs.replace(phone.thermal, time_constant_s=8_000.0))
    state = BoardState(START_S, charge_mwh=12_000.0, celsius=60.0)
    one = OneDevice(eligibility=EligibilityConfig(require_idle=False))
    one.board = VirtualBoard(cools, wearer, clock=one.clock, state=state)
    # 60 to 42 °C on the way to 29 °C takes 8,000 s · ln(31 / 13) = 1.93 hours.
    cool_s = one.board.next_change_s(celsius=(42.0,))
    assert START_S + 6_900 < cool_s < START_S + 7_200
    one.start()
    one.scripts["watch"].open_round()
    one.until("trained", most=3000)
    trained_s = one.journal.named("trained")[0]["at_s"]
    assert START_S + 10_800 <= trained_s <= START_S + 10_800 + 120
    told = [tuple(note["blocked"]) for note in one.journal.named("eligibility")]
    assert len(told) >= 3
    assert told[-1] == ()


def test_a_status_that_is_asked_for_hides_no_change_from_the_journal() -> None:
    board = SteadyBoard(Conditions(charging=False))
    one = OneDevice(board=board, eligibility=EligibilityConfig(require_idle=False, require_charging=True))
    device = one.start()
    one.scripts["watch"].open_round()
    one.steps(5)
    told = len(one.journal.named("eligibility"))
    assert told == 1
    board.conditions = Conditions(charging=True)
    one.clock.time_s += 2 * READ_EVERY_S
    device.status()
    one.clock.time_s += 100.0
    device.status()
    one.steps(5)
    assert len(one.journal.named("eligibility")) == 2


def test_too_few_new_records_are_told_in_words() -> None:
    one = OneDevice(
        eligibility=EligibilityConfig(
            require_idle=False, require_unmetered=False, minimum_new_records=1000, new_records_noise=10.0
        )
    )
    device = one.start()
    one.scripts["watch"].open_round()
    reason = one.until("round_skipped")["reason"]
    assert "new records (counted with noise), 1000 are wanted" in reason
    assert reason in device.status().studies[0].doing
    (line,) = device.ledger.reservations
    assert line.purpose == "count"
    assert not device.outbox.size_bytes


# Restarts, and stores that were put back.


def test_an_old_copy_of_the_work_cannot_be_trained_again() -> None:
    one = OneDevice()
    one.start()
    one.scripts["watch"].open_round(plan=LONG)
    one.until("charged")
    (name,) = [name for name in one.flash.names() if name.startswith(PREFIX)]
    old = one.flash.read(name)
    assert old is not None
    one.until("update_sent")
    one.kill()
    one.flash.write(name, old)
    device = one.start()
    one.steps(40)
    assert device.outbox.size_bytes == 0
    assert len(one.scripts["watch"].updates()) == 1
    assert len(device.ledger.releases) == 1


def test_a_device_that_does_not_look_whether_work_was_released_is_noticed() -> None:
    class Careless(Device):
        """Broken: old work is gone on with."""

        def _settle_outbox(self) -> None:
            return

    one = OneDevice(kind=Careless)
    one.start()
    one.scripts["watch"].open_round(plan=LONG)
    one.until("charged")
    (name,) = [name for name in one.flash.names() if name.startswith(PREFIX)]
    old = one.flash.read(name)
    assert old is not None
    one.until("update_sent")
    one.kill()
    one.flash.write(name, old)
    one.start()
    one.steps(3)
    assert one.runner().work is not None


def test_an_old_copy_of_the_whole_store_is_noticed_by_the_counter() -> None:
    one = OneDevice()
    one.start()
    copy = {name: one.flash.read(name) for name in one.flash.names()}
    one.scripts["watch"].open_round()
    one.until("update_sent")
    one.kill()
    for name in one.flash.names():
        one.flash.remove(name)
    for name, data in copy.items():
        assert data is not None
        one.flash.write(name, data)
    with pytest.raises(LedgerError):
        one.start()


class Trusting(Device):
    """Broken: work is gone on with unless the ledger knows of its release, although lines of it may be missing."""

    def _settle_outbox(self) -> None:
        for study in self.config.studies:
            work = self.outbox.work(study.study)
            if work is not None and self.ledger.was_released(work.study, work.decoded_manifest().round):
                self._give_up(work, "released")


def check_an_accepted_old_copy_sends_no_second_update(kind: type[Device]) -> None:
    one = OneDevice(kind=kind)
    one.start()
    one.scripts["watch"].open_round(plan=LONG)
    one.until("charged")
    one.steps(2)
    one.runner().put_aside()
    old = deepcopy(one.flash).after_kill()
    one.until("update_sent")
    one.kill()
    one.flash = old
    with pytest.raises(LedgerError):
        one.start()
    accept(one)
    device = one.start()
    one.steps(60)
    assert len(one.scripts["watch"].updates()) == 1
    assert device.outbox.size_bytes == 0
    assert "before the ledger was accepted" in one.journal.named("work_given_up")[0]["reason"]


def accept(one: OneDevice) -> None:
    """A person accepts the ledger as it stands, as `covey-device ledger accept-counter` does."""
    key = one.hardware().store_key
    store = EncryptedFiles(one.flash, key, entropy=SeededEntropy("accepted store"))
    counter = CounterFile(one.counter_flash, "counter", key, entropy=SeededEntropy("accepted counter"))
    PrivacyLedger.reanchor(store, counter, budget_of(one.config()), now_s=one.clock.time_s)


def test_an_old_copy_that_a_person_accepted_sends_no_second_update() -> None:
    check_an_accepted_old_copy_sends_no_second_update(Device)


def test_a_device_that_trusts_an_accepted_ledger_is_noticed() -> None:
    with pytest.raises(AssertionError):
        check_an_accepted_old_copy_sends_no_second_update(Trusting)


@pytest.mark.parametrize("steps", range(1, 14))
def test_killed_anywhere_it_goes_on_with_one_charge_and_one_update(steps: int) -> None:
    one = OneDevice()
    one.start()
    one.scripts["watch"].open_round(plan=LONG)
    one.steps(steps)
    device = one.restart()
    one.steps(60)
    assert len(device.ledger.reservations) == 1
    assert len(one.scripts["watch"].updates()) == 1
    one.scripts["watch"].receipt_all()
    one.steps(3)
    assert device.outbox.size_bytes == 0


def pending_of(device: Device, number: int, *, name: str = "watch-7") -> PendingUpdate:
    """An update that was charged for and sealed, and is in the outbox; the power went before it was written down."""
    device.ledger.reserve(task="clinic/watch", round_number=number, plan=make_plan(), now_s=START_S)
    pending = PendingUpdate(
        update_id=bytes([number]) * 16,
        study="clinic/watch",
        device=name,
        round=number,
        envelope=b"sealed",
        sealed_digest=bytes(32),
        deadline_s=START_S + 9000.0,
        recipient_key="ab" * 16,
    )
    device.outbox.put(pending)
    return pending


def test_an_update_that_was_sealed_and_not_written_down_is_before_it_is_sent() -> None:
    one = OneDevice()
    pending = pending_of(one.start(), 1)
    device = one.restart()
    assert [line.update_id for line in device.ledger.releases] == [pending.update_id.hex()]


def test_an_update_with_other_bytes_than_were_released_is_not_sent() -> None:
    one = OneDevice()
    device = one.start()
    pending = pending_of(device, 1)
    device.ledger.record_release(pending, now_s=START_S)
    device.outbox.put(msgspec.structs.replace(pending, sealed_digest=b"\x01" * 32))
    device = one.restart()
    one.steps(10)
    assert "other bytes" in one.journal.named("update_given_up")[0]["reason"]
    assert device.outbox.size_bytes == 0
    assert one.scripts["watch"].updates() == {}


def test_a_ledger_that_was_lost_and_accepted_does_not_stop_the_device_whatever_waits() -> None:
    one = OneDevice(privacy={"period_days": 30.0})
    one.start()
    one.scripts["watch"].open_round()
    one.until("update_sent")
    one.kill()
    one.flash.remove(LOG_NAME)
    with pytest.raises(LedgerError):
        one.start()
    accept(one)
    one.scripts["watch"].published.clear()
    device = one.start()
    one.steps(10)
    assert "never charged" in one.journal.named("update_given_up")[0]["reason"]
    assert device.outbox.size_bytes == 0
    assert one.scripts["watch"].updates() == {}
    one.clock.time_s += 60 * 86_400.0
    one.scripts["watch"].open_round(2)
    one.until("update_sent")


def test_work_of_a_name_that_is_not_used_any_more_is_given_up() -> None:
    one = OneDevice()
    one.start()
    one.scripts["watch"].open_round(plan=LONG)
    one.until("charged")
    one.steps(1)
    one.study_settings = {"watch": {"id": "watch-8"}}
    device = one.restart()
    one.steps(60)
    assert "name on the wire has changed" in one.journal.named("work_given_up")[0]["reason"]
    assert device.outbox.size_bytes == 0
    assert one.scripts["watch"].updates() == {}
    assert len(device.ledger.reservations) == 1


def other_graph(bundle: ModelBundle) -> ModelBundle:
    return msgspec.structs.replace(bundle, graph=bundle.graph + b"another")


def fewer_shared(bundle: ModelBundle) -> ModelBundle:
    shared = bundle.manifest.parameters[-1].offset
    manifest = msgspec.structs.replace(bundle.manifest, num_shared_parameters=shared)
    return msgspec.structs.replace(bundle, manifest=manifest)


class Indifferent(Device):
    """Broken: it goes on whatever model it has by now."""

    def _interrupted(self, participant: Any, bundle: Any) -> Any:
        work = self.outbox.work("clinic/watch")
        manifest = work.decoded_manifest() if work is not None else None
        own = SimpleNamespace(
            graph_digest=getattr(manifest, "graph_digest", b""),
            manifest=SimpleNamespace(num_shared_parameters=getattr(manifest, "num_parameters", 0)),
        )
        return super()._interrupted(participant, own)  # type: ignore[arg-type]


def check_work_of_another_model_is_given_up(change: Callable[[ModelBundle], ModelBundle], kind: type[Device]) -> None:
    one = OneDevice(kind=kind)
    one.start()
    one.scripts["watch"].open_round(plan=LONG)
    one.until("charged")
    one.runner().put_aside()
    one.bundle = change(BUNDLE)
    device = one.restart()
    one.steps(60)
    assert "another model" in one.journal.named("work_given_up")[0]["reason"]
    assert device.outbox.size_bytes == 0
    assert one.scripts["watch"].updates() == {}
    assert len(device.ledger.reservations) == 1


@pytest.mark.parametrize("change", [other_graph, fewer_shared])
def test_work_that_was_begun_with_another_model_is_given_up(change: Callable[[ModelBundle], ModelBundle]) -> None:
    check_work_of_another_model_is_given_up(change, Device)


@pytest.mark.parametrize("change", [other_graph, fewer_shared])
def test_a_device_that_does_not_compare_models_is_noticed(change: Callable[[ModelBundle], ModelBundle]) -> None:
    with pytest.raises((AssertionError, IndexError)):
        check_work_of_another_model_is_given_up(change, Indifferent)


def test_an_update_under_a_name_that_nobody_may_use_any_more_does_not_stay_for_ever() -> None:
    one = OneDevice()
    device = one.start()
    pending_of(device, 1, name="watch-6")
    pending_of(device, 2)
    device = one.restart()
    one.steps(5)
    one.clock.time_s += 2 * LOOK_EVERY_S
    one.steps(5)
    assert [pending.round for pending in device.outbox] == [2]
    assert one.journal.named("update_expired")[0]["round"] == 1
    outcomes = json.loads(answer(device, b'{"ask": "sent"}'))["value"]
    assert [sent["outcome"] for sent in outcomes] == ["expired", "waiting"]


def test_without_a_connection_nothing_is_taken_for_undeliverable() -> None:
    """The clock may be wrong; only a broker that accepts the present name says that it is not."""
    one = OneDevice()
    pending_of(one.start(), 1, name="watch-6")
    one.scripts["watch"].is_down = True
    device = one.restart()
    one.clock.time_s += 10 * 365 * 86_400.0
    one.steps(5)
    assert len(list(device.outbox)) == 1


@pytest.mark.parametrize("event", ["charged", "update_sent"])
@pytest.mark.parametrize(
    ("study", "privacy"), [({"role": "evaluate"}, {}), ({}, {"minimum_cohort": 5}), ({}, {"maximum_l2_norm_clip": 0.1})]
)
def test_what_was_begun_under_other_terms_is_not_sent(
    event: str, study: dict[str, Any], privacy: dict[str, Any]
) -> None:
    one = OneDevice()
    one.start()
    one.scripts["watch"].open_round(plan=LONG)
    one.until(event)
    one.kill()
    one.scripts["watch"].published.clear()
    one.study_settings, one.privacy = {"watch": study}, privacy
    device = one.start()
    one.steps(5)
    assert not device.studies.running  # its terms changed
    device.grant("watch")
    one.steps(60)
    assert device.studies.running
    assert one.scripts["watch"].updates() == {}
    assert device.outbox.size_bytes == 0
    assert len(device.ledger.reservations) == 1


def test_granting_the_same_terms_again_disturbs_nothing() -> None:
    one = OneDevice()
    device = one.start()
    one.scripts["watch"].open_round(plan=LONG)
    one.until("charged")
    device.grant("watch")
    one.until("update_sent")
    device.grant("watch")
    assert len(list(device.outbox)) == 1
    assert len(one.connections["watch"]) == 1


class Optimistic(Device):
    """Broken: a study that was left stays so only if the disk takes it."""

    def withdraw(self, study: str) -> int:
        name = self.study_config(study).study
        self.studies.stop(name, "consent was withdrawn")
        dropped = self.outbox.drop(name)
        consent = self.consents.of(name)
        assert consent is not None
        self.store.write(
            study_blob("consent", name), msgspec.msgpack.encode(msgspec.structs.replace(consent, withdrawn_s=1.0))
        )
        return dropped


def check_a_study_is_left_although_the_disk_refuses(kind: type[Device], *, read_only: bool) -> None:
    one = OneDevice(kind=kind)
    device = one.start()
    one.scripts["watch"].open_round(plan=LONG)
    one.until("charged")
    if read_only:
        one.flash.read_only = True
        with pytest.raises(StoreError):
            device.withdraw("watch")
    else:
        one.flash.capacity_bytes = 1
        with suppress(StoreError):
            device.withdraw("watch")
    for _ in range(5):
        one.clock.time_s += 2 * LOOK_EVERY_S
        one.steps(3)
    assert not device.studies.running
    assert device.consent_problem("watch") == "consent was withdrawn"
    assert one.scripts["watch"].updates() == {}
    one.flash.read_only, one.flash.capacity_bytes = False, None
    device.grant("watch")  # what waited when it was left is not sent now
    one.steps(60)
    assert device.studies.running
    assert one.scripts["watch"].updates() == {}
    assert device.outbox.size_bytes == 0


@pytest.mark.parametrize("read_only", [False, True])
def test_a_study_is_left_although_the_disk_refuses(*, read_only: bool) -> None:
    check_a_study_is_left_although_the_disk_refuses(Device, read_only=read_only)


@pytest.mark.parametrize("read_only", [False, True])
def test_a_device_that_asks_the_disk_first_is_noticed(*, read_only: bool) -> None:
    with pytest.raises(AssertionError):
        check_a_study_is_left_although_the_disk_refuses(Optimistic, read_only=read_only)


# Erasure.


def test_erasing_leaves_no_plaintext_and_no_key_that_opens_what_is_left_and_the_device_goes_on() -> None:
    one = OneDevice()
    device = one.start()
    one.scripts["watch"].open_round(plan=LONG)
    one.until("charged")
    one.steps(2)
    old = {name: one.flash.read(name) or b"" for name in one.flash.names() if name.startswith(("rec", PREFIX))}
    assert len(old) >= 2
    old_key = one.flash.read(".data-key")
    device.erase_data()
    assert [name for name in one.flash.names() if name.startswith(("recordings/", PREFIX, "personal/"))] == []
    assert old_key not in one.flash.durable().values()
    assert len(device.streams["default"]) == 0
    assert device.outbox.size_bytes == 0
    device.add(np.zeros(BUNDLE.manifest.input.shape, np.float32), 0)
    # The remaining key opens nothing of the files that were there before.
    for name, data in old.items():
        one.flash.write(name, data)
    with pytest.raises(StoreError):
        Outbox(device.store)
    for name in old:
        one.flash.remove(name)
    again = one.restart()
    one.scripts["watch"].open_round(2)
    one.until("update_sent")
    assert [line.round for line in again.ledger.reservations] == [1, 2]
    assert [header.round for header in one.scripts["watch"].updates().values()] == [2]


class StuckFlash(VirtualFlash):
    """A disk that does not remove recordings, nor what waits to be sent, nor even the data key."""

    keeps: tuple[str, ...] = ()

    def remove(self, name: str) -> None:
        self._refuse(name)
        super().remove(name)

    def rename(self, old: str, new: str) -> None:
        self._refuse(old)
        super().rename(old, new)

    def _refuse(self, name: str) -> None:
        if name in self.keeps or name.startswith(tuple(one for one in self.keeps if one.endswith("/"))):
            raise OSError(5, "Input/output error")


class Remembering(Device):
    """Broken: what could not be erased is still in memory."""

    def erase_data(self) -> None:
        self.studies.stop_all()
        self.store.shred("data")


def check_what_is_to_be_erased_is_not_sent(kind: type[Device], keeps: tuple[str, ...]) -> None:
    one = OneDevice(kind=kind)
    device = one.start()
    script = one.scripts["watch"]
    script.open_round()
    one.until("update_sent")  # no receipt comes
    one.flash.__class__, one.flash.keeps = StuckFlash, keeps  # type: ignore[attr-defined]
    with pytest.raises(StoreError):
        device.erase_data()
    script.published.clear()
    for _ in range(10):
        one.clock.time_s += 2 * LOOK_EVERY_S
        one.steps(3)
    assert script.updates() == {}
    assert not device.studies.running
    status = device.status()
    assert "the wearer's data is to be erased" in status.studies[0].doing
    assert not status.streams
    with pytest.raises(StoreError, match="is to be erased"):
        device.add(np.zeros(BUNDLE.manifest.input.shape, np.float32), 0)
    windows = np.zeros((1, *BUNDLE.manifest.input.shape), np.float32)
    with pytest.raises(StoreError, match="is to be erased"):  # as what comes through the socket is stored
        device.targets()["default"].append(windows, np.zeros(1, np.int32), at_s=one.clock.time_s)
    one.flash.keeps = ()  # type: ignore[attr-defined]
    one.clock.time_s += LOOK_EVERY_S
    one.steps(3)
    assert device.studies.running
    assert not [name for name in one.flash.names() if name.startswith(("recordings/", PREFIX))]
    assert len(device.streams["default"]) == 0
    assert script.updates() == {}


@pytest.mark.parametrize("keeps", [("recordings/",), (PREFIX,), (".data-key",)])
def test_what_is_to_be_erased_is_not_sent_although_the_disk_keeps_it(keeps: tuple[str, ...]) -> None:
    check_what_is_to_be_erased_is_not_sent(Device, keeps)


@pytest.mark.parametrize("keeps", [("recordings/",), (PREFIX,), (".data-key",)])
def test_a_device_that_goes_on_with_what_it_could_not_erase_is_noticed(keeps: tuple[str, ...]) -> None:
    with pytest.raises(AssertionError):
        check_what_is_to_be_erased_is_not_sent(Remembering, keeps)


def test_erasing_starts_the_count_of_new_records_anew() -> None:
    eligibility = EligibilityConfig(
        require_idle=False, require_unmetered=False, minimum_new_records=10, new_records_noise=1.0
    )
    one = OneDevice(eligibility=eligibility, privacy={"epsilon": 50.0})
    device = one.start(records=60)
    one.scripts["watch"].open_round()
    one.until("update_sent")
    device.erase_data()
    windows = np.zeros((40, *BUNDLE.manifest.input.shape), np.float32)
    device.add(windows, np.zeros(40, np.int32))
    one.scripts["watch"].receipt_all()
    one.scripts["watch"].open_round(2)
    one.until("update_sent")
    assert 2 in {header.round for header in one.scripts["watch"].updates().values()}


# It sleeps when there is nothing to do.


class Restless(DeviceDaemon):
    """Broken: it never waits for long."""

    def _idle_for_s(self, runners: Any) -> float:
        return min(1.0, super()._idle_for_s(runners))


def turns_an_hour(one: OneDevice) -> int:
    one.steps(10)
    begun_s, before = one.clock.time_s, len(one.bell.waits)
    while one.clock.time_s < begun_s + 3600.0:
        one.device.step()
        assert len(one.bell.waits) - before < 5000, "it spins"
    return len(one.bell.waits) - before


def check_it_sleeps(one: OneDevice, turns: float) -> None:
    assert turns_an_hour(one) <= turns + 2


def test_with_nothing_to_do_it_looks_once_a_minute_and_reads_no_board() -> None:
    for grant in (False, True):
        one = OneDevice()
        one.start(grant=grant)
        check_it_sleeps(one, 3600 / LOOK_EVERY_S)


def test_a_daemon_that_wakes_more_often_than_it_says_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("device_client.device.DeviceDaemon", Restless)
    one = OneDevice()
    one.start()
    with pytest.raises(AssertionError):
        check_it_sleeps(one, 3600 / LOOK_EVERY_S)


def test_after_taking_part_it_sleeps_until_the_next_round() -> None:
    one = OneDevice()
    one.start()
    one.scripts["watch"].open_round()
    one.until("update_sent")
    one.scripts["watch"].receipt_all()
    check_it_sleeps(one, 3600 / LOOK_EVERY_S)


@pytest.mark.parametrize("role", ["train", "evaluate"])
def test_while_it_waits_for_its_conditions_it_reads_them_every_quarter_minute(role: str) -> None:
    one = OneDevice(
        board=SteadyBoard(Conditions(charging=False)),
        eligibility=EligibilityConfig(require_idle=False, require_charging=True),
        study_settings={"watch": {"role": role}},
    )
    one.start()
    one.scripts["watch"].open_round(lasts_s=7200.0)
    check_it_sleeps(one, 3600 / READ_EVERY_S)
    assert max(one.bell.waits[-20:]) <= READ_EVERY_S  # no later than that it notices the charger
    one.clock.time_s += 7200.0  # the deadline passes
    check_it_sleeps(one, 3600 / READ_EVERY_S)


@pytest.mark.parametrize("role", ["train", "evaluate"])
def test_without_a_connection_it_does_not_spin(role: str) -> None:
    one = OneDevice(study_settings={"watch": {"role": role}})
    one.start()
    one.scripts["watch"].open_round(lasts_s=600.0)
    one.steps(1)
    for transport in one.transports:
        transport.drop("the broker went away")
    check_it_sleeps(one, 3600 / READ_EVERY_S)


def test_an_update_that_gets_no_receipt_is_sent_again_ever_more_rarely() -> None:
    one = OneDevice()
    one.start()
    one.scripts["watch"].open_round()
    one.until("update_sent")
    check_it_sleeps(one, 3600 / LOOK_EVERY_S + 12)


# What an embedding program may do wrong.


def test_windows_that_do_not_fit_are_refused_in_one_sentence() -> None:
    device = OneDevice().start(records=0)
    shape = BUNDLE.manifest.input.shape
    good = np.zeros(shape, np.float32)
    assert device.add(good, 0) == 1
    assert device.add(np.stack([good, good]), [0, 1]) == 2
    wrong: list[tuple[Any, Any]] = [
        (np.zeros((3, 2)), 0),
        (good, 99),
        (good, 0.5),
        (good, "walking"),
        (good, None),
        (np.full(shape, np.nan), 0),
        (np.stack([good, good]), [0]),
        ([[1.0], [1.0, 2.0]], 0),
        ("abc", 0),
    ]
    for x, label in wrong:
        with pytest.raises(CoveyError) as caught:
            device.add(x, label)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="stream naps: expected one of default"):
        device.add(good, 0, stream="naps")
    assert len(device.streams["default"]) == 3


def test_records_grow_old_once_an_hour() -> None:
    one = OneDevice(records=RecordsConfig(maximum_age_days=1.0, held_out_fraction=0.0))
    device = one.start()
    one.steps(2)
    for _ in range(30):
        one.clock.time_s += 3600.0
        one.steps(2)
    assert len(device.streams["default"]) == 0
    assert "count" not in one.journal.named("records_pruned")[-1]  # the journal says nothing about the records


def test_stopping_ends_the_run_and_leaves_a_goodbye() -> None:
    one = OneDevice()
    device = one.start()
    one.steps(2)
    device.stop()
    device.run()
    device.close()
    assert b"offline" in one.scripts["watch"].broker.retained["fl/v1/clinic/state/watch-7"]
    assert one.bell.rung == 1
