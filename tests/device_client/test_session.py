"""The session: every check on a manifest, the coin, what is fetched for a round, and what it remembers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from device_client import session
from device_client.events import (
    ConditionsRead,
    Evaluate,
    Participate,
    ParticipationEnded,
    Publish,
    Remember,
    SessionState,
    Subscribe,
    Tick,
    Unsubscribe,
    UpdateReady,
)
from device_client.floors import Floors
from device_client.session import MODELS_A_ROUND, DeviceSession
from fl_protocol.messages import PresenceMsg, decode, encode
from fl_protocol.signing import sign
from fl_protocol.topics import down_topic, model_topic, round_topic, state_topic
from fl_protocol.transport import Connected, Disconnected, Received
from tests.device_client.noise_checks import FALSE_ALARM_RATE
from tests.device_client.ports import DEVICE, TASK, TENANT, make_plan
from tests.device_client.session_driver import (
    AGGREGATOR,
    CONTROL,
    CONTROL_DIGEST,
    DIGEST,
    NUM_PARAMETERS,
    PARAMS,
    STRANGER,
    STUDY,
    Driver,
    asked_for,
    chunk_message,
    manifest,
    manifest_message,
    model_chunks,
    notes,
    participations,
    reasons,
    receipt_for,
    seeded,
    some_update,
    uploads,
)
from tests.enrolments import broken_copy

CHUNKS = list(range(4))
"""Indices of the model's chunks: all fit the window."""


def test_a_round_is_joined_with_the_verified_model() -> None:
    driver = Driver()
    assert asked_for(driver.open_round()) == [0]  # it says how the model was cut
    assert asked_for(driver.send(0)) == CHUNKS[1:]
    actions = driver.send(*CHUNKS[1:])
    (joined,) = [action for action in actions if isinstance(action, Participate)]
    np.testing.assert_array_equal(joined.params, PARAMS)
    assert joined.control is None
    left = [action.topic_filter for action in driver.actions if isinstance(action, Unsubscribe)]
    assert left == [model_topic(TENANT, DIGEST, index) for index in CHUNKS]
    assert driver.disk.chunks == {}
    # What would let a crash repeat the round is stored before it begins.
    remembered = [action.state for action in actions if isinstance(action, Remember)]
    after = SessionState(STUDY, highest_round=1, decided_round=1, participated_s=driver.now_s, participations=1)
    assert remembered == [after]
    assert actions.index(Remember(remembered[0])) < actions.index(joined)


def test_it_subscribes_and_announces_itself_on_every_connection() -> None:
    driver = Driver()
    for _ in range(2):
        actions = driver.tell(Connected())
        filters = [action.topic_filter for action in actions if isinstance(action, Subscribe)]
        assert filters == [f"fl/v1/{TENANT}/down/{DEVICE}/+", round_topic(TENANT, TASK)]
        (presence,) = [action for action in actions if isinstance(action, Publish)]
        assert (presence.topic, presence.retain) == (state_topic(TENANT, DEVICE), True)
        assert decode(presence.payload, PresenceMsg).state == "online"
        driver.tell(Disconnected("gone"))
    assert decode(driver.session.offline_presence().payload, PresenceMsg).state == "offline"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tenant": "elsewhere"}, "the manifest is for elsewhere/watch"),
        ({"task": "other"}, "the manifest is for clinic/other"),
        ({"round": 4}, "a replay"),
        ({"graph_digest": b"\x09" * 32}, "another model graph"),
        ({"num_parameters": NUM_PARAMETERS + 1}, "another model graph"),
        ({"plan": make_plan(noise_multiplier=1.9)}, "noise_multiplier 1.9 is below the wearer's floor 2"),
        ({"plan": make_plan(noise_multiplier=0.0)}, "below the wearer's floor"),
        ({"minimum_cohort": 2}, "minimum_cohort 2 is below the wearer's floor 3"),
        ({"plan": make_plan(l2_norm_clip=1.6)}, "l2_norm_clip 1.6 is above the wearer's limit 1.5"),
    ],
)
def test_a_manifest_that_fails_a_check_changes_nothing(changes: dict[str, object], reason: str) -> None:
    driver = Driver(floors=Floors(2.0, 3, 1.5), state=SessionState(highest_round=5, decided_round=5))
    good: dict[str, object] = {"round": 6, "minimum_cohort": 3}
    actions = driver.open_round(**{**good, **changes})
    assert notes(actions) == ["message_refused"]
    assert reason in reasons(actions)
    assert driver.send_model() == []
    is_the_studys_newest = not {"tenant", "task", "round"} & changes.keys()
    assert driver.session.view().refused == (f"round 6: {reasons(actions)}" if is_the_studys_newest else "")
    # The good one is still welcome.
    assert asked_for(driver.open_round(**good)) == [0]
    assert driver.session.view().refused == ""
    assert participations(driver.send_model()) == [6]


@pytest.mark.parametrize("damage", ["stranger", "flipped", "cut", "empty", "unsigned", "receipt"])
def test_a_manifest_without_the_pinned_signature_is_refused(damage: str) -> None:
    driver, message = Driver(), manifest()
    payload = sign(message, AGGREGATOR)
    match damage:
        case "stranger":
            payload = sign(message, STRANGER)
        case "flipped":
            payload = payload[:100] + bytes([payload[100] ^ 1]) + payload[101:]
        case "cut":
            payload = payload[:-1]
        case "empty":
            payload = b""
        case "unsigned":
            payload = encode(message)
        case "receipt":
            payload = sign(receipt_for(some_update()), AGGREGATOR)
    actions = driver.tell(Received(round_topic(TENANT, TASK), payload))
    assert notes(actions) == ["message_refused"]
    assert driver.state is None
    assert driver.session.view().refused == ""


def test_an_evaluating_device_ignores_floors_and_never_trains() -> None:
    driver = Driver(role="evaluate", floors=Floors(100.0, 100))
    assert asked_for(driver.open_round()) == [0]
    actions = driver.send_model()
    (measured,) = [action for action in actions if isinstance(action, Evaluate)]
    np.testing.assert_array_equal(measured.params, PARAMS)
    assert participations(driver.actions) == []
    # Also the finished model, which has the same round number.
    driver.tell(manifest_message(manifest(status="finished")))
    assert any(isinstance(action, Evaluate) for action in driver.send_model())


def test_a_training_device_does_not_fetch_the_finished_model() -> None:
    driver = Driver()
    assert asked_for(driver.open_round(status="finished")) == []
    assert driver.session.view().doing == "the study is finished, after round 1"
    assert driver.send_model() == []


def test_the_coin_is_tossed_once_per_round_even_across_restarts() -> None:
    tosses = []

    def entropy(count: int) -> bytes:
        tosses.append(count)
        return b"\xff" * count  # the coin says no

    driver = Driver(entropy=entropy)
    assert reasons(driver.open_round(participation_probability=0.5)) == "the coin said no"
    for again in range(5):
        driver.open_round(participation_probability=0.5, deadline_s=2000.0 + again)
    assert len(tosses) == 1
    restarted = driver.restarted(entropy=entropy)
    restarted.open_round(participation_probability=1.0)
    assert len(tosses) == 1
    assert restarted.session.view().doing == "not in round 1: it was decided before the last start"
    assert restarted.send_model() == []


def test_the_toss_is_remembered_before_the_model_is_asked_for() -> None:
    actions = Driver().open_round()
    remembered = [index for index, action in enumerate(actions) if isinstance(action, Remember)]
    assert actions[remembered[-1]] == Remember(SessionState(STUDY, highest_round=1, decided_round=1, willing_round=1))
    assert max(remembered) < actions.index(Subscribe(model_topic(TENANT, DIGEST, 0)))


def test_a_round_that_is_left_out_is_written_to_flash_once() -> None:
    driver = Driver()
    assert not driver.session.has_heard
    actions = driver.open_round(participation_probability=0.0)
    assert driver.session.has_heard
    states = [action.state for action in actions if isinstance(action, Remember)]
    assert states == [SessionState(STUDY, highest_round=1, decided_round=1)]


@pytest.mark.parametrize("probability", [0.0, 0.03, 0.5, 1.0])
def test_participation_has_the_wanted_probability(probability: float) -> None:
    # False-alarm rate: FALSE_ALARM_RATE.
    rounds = 1500
    driver = Driver(entropy=seeded(f"coin {probability}"))
    joined = sum(
        asked_for(driver.open_round(round=number, participation_probability=probability)) == [0]
        for number in range(1, rounds + 1)
    )
    if probability in {0.0, 1.0}:
        assert joined == probability * rounds
    else:
        assert stats.binomtest(joined, rounds, probability).pvalue > FALSE_ALARM_RATE


def check_a_device_stays_out_for_the_minimum_separation(subject: type[DeviceSession]) -> None:
    driver = Driver(subject=subject)
    driver.open_round(round=1)
    assert participations(driver.send_model()) == [1]
    driver.tell(ParticipationEnded(1, "spent"))
    driver.now_s += 99.0
    assert reasons(driver.open_round(round=2, minimum_separation_s=100.0)) == "took part too recently"
    restarted = driver.restarted()
    assert reasons(restarted.open_round(round=3, minimum_separation_s=100.0)) == "took part too recently"
    restarted.now_s += 1.0
    restarted.open_round(round=4, minimum_separation_s=100.0)
    assert participations(restarted.send_model()) == [4]


def check_the_wearers_minimum_separation_holds_where_the_study_asks_for_less(subject: type[DeviceSession]) -> None:
    driver = Driver(minimum_separation_s=200.0, subject=subject)
    driver.open_round(round=1)
    driver.send_model()
    driver.tell(ParticipationEnded(1, "spent"))
    driver.now_s += 199.0
    assert reasons(driver.open_round(round=2, minimum_separation_s=100.0)) == "took part too recently"
    driver.now_s += 1.0
    driver.open_round(round=3, minimum_separation_s=100.0)
    assert participations(driver.send_model()) == [3]


SEPARATIONS = [
    check_a_device_stays_out_for_the_minimum_separation,
    check_the_wearers_minimum_separation_holds_where_the_study_asks_for_less,
]


@pytest.mark.parametrize("check", SEPARATIONS)
def test_participations_are_far_enough_apart(check: Callable[[type[DeviceSession]], None]) -> None:
    check(DeviceSession)


@pytest.mark.parametrize(
    ("wrong", "caught_by"),
    [
        ("asked_s", SEPARATIONS[1]),
        ("self._config.minimum_separation_s", SEPARATIONS[0]),
        ("0.0", SEPARATIONS[0]),
    ],
)
def test_a_device_that_takes_part_too_soon_is_caught(
    wrong: str, caught_by: Callable[[type[DeviceSession]], None]
) -> None:
    right = "separation_s=max(asked_s, self._config.minimum_separation_s)"
    copy = broken_copy("device_client.session", (right, f"separation_s={wrong}"))
    with pytest.raises(AssertionError):
        caught_by(copy.DeviceSession)


def test_a_round_whose_deadline_has_passed_is_skipped() -> None:
    driver = Driver(now_s=2000.0)
    assert reasons(driver.open_round()) == "its deadline has passed"
    assert driver.send_model() == []


def test_a_model_that_comes_after_the_deadline_is_not_trained() -> None:
    driver = Driver(now_s=1999.0)
    driver.open_round()
    driver.send(0, 1, 2)
    driver.now_s = 2000.0
    assert "its deadline passed while waiting: the model did not come" in reasons(driver.send(3))
    assert participations(driver.actions) == []
    assert driver.disk.chunks == {}


def test_rounds_of_another_study_do_not_count_but_separation_does() -> None:
    state = SessionState("clinic/older", highest_round=50, decided_round=50, willing_round=1, participated_s=1000.0)
    driver = Driver(state=state)
    assert reasons(driver.open_round(round=1, minimum_separation_s=500.0)) == "took part too recently"
    driver.now_s = 1500.0
    assert asked_for(driver.open_round(round=2)) == [0]
    assert driver.state == SessionState(
        STUDY, highest_round=2, decided_round=2, willing_round=2, participated_s=1000.0, separation_s=500.0
    )


@pytest.mark.parametrize("kind", ["other digest", "other bytes", "not finite", "other length", "garbage", "stranger"])
def test_a_wrong_chunk_is_refused_and_the_model_still_taken(kind: str) -> None:
    driver = Driver()
    driver.open_round()
    driver.send(0, 1)
    wrong = {
        "other digest": [chunk_message(chunk) for chunk in model_chunks((PARAMS + 1).tobytes())],
        "other bytes": [
            Received(good.topic, good.payload.replace(chunk.data, bytes(len(chunk.data))))
            for chunk in model_chunks()
            for good in [chunk_message(chunk)]
        ],
        "not finite": [chunk_message(c) for c in model_chunks(np.full(NUM_PARAMETERS, np.nan, "<f4").tobytes())],
        "other length": [chunk_message(chunk) for chunk in model_chunks(PARAMS.tobytes() + bytes(700))],
        "garbage": [Received(model_topic(TENANT, DIGEST, 2), b"garbage")],
        "stranger": [chunk_message(chunk, key=STRANGER) for chunk in model_chunks()],
    }
    for message in wrong[kind]:
        assert notes(driver.tell(message)) == ["message_refused"]
    # What had come is still there: nothing is fetched twice.
    assert participations(driver.send(2, 3)) == [1]


@pytest.mark.parametrize("values", [np.nan, np.inf])
def test_a_signed_model_that_is_not_finite_is_refused(values: float) -> None:
    params = np.full(NUM_PARAMETERS, values, "<f4").tobytes()
    digest = hashlib.sha256(params).digest()
    driver = Driver()
    driver.open_round(model_digest=digest)
    actions = [action for chunk in model_chunks(params) for action in driver.tell(chunk_message(chunk, digest))]
    assert "not finite" in reasons(actions)
    assert participations(actions) == []
    assert driver.disk.chunks == {}


def test_the_control_variate_is_fetched_with_the_model() -> None:
    driver = Driver()
    plan = make_plan(control_variates=True)
    actions = driver.open_round(plan=plan, control_digest=CONTROL_DIGEST)
    assert asked_for(actions) == [0]
    assert asked_for(actions, CONTROL_DIGEST) == [0]
    assert participations(driver.send_model()) == []
    controls = [chunk_message(chunk, CONTROL_DIGEST) for chunk in model_chunks(CONTROL.tobytes())]
    (joined,) = [a for message in controls for a in driver.tell(message) if isinstance(a, Participate)]
    np.testing.assert_array_equal(joined.params, PARAMS)
    assert joined.control is not None
    np.testing.assert_array_equal(joined.control, CONTROL)


def test_a_model_that_is_its_own_control_variate_is_fetched_once() -> None:
    driver = Driver()  # as before the first commit, when both are zeros
    driver.open_round(plan=make_plan(control_variates=True), control_digest=DIGEST)
    (joined,) = [action for action in driver.send_model() if isinstance(action, Participate)]
    assert joined.control is not None
    np.testing.assert_array_equal(joined.control, PARAMS)


def test_an_evaluating_device_fetches_no_control_variate() -> None:
    driver = Driver(role="evaluate")
    actions = driver.open_round(plan=make_plan(control_variates=True), control_digest=CONTROL_DIGEST)
    assert asked_for(actions, CONTROL_DIGEST) == []
    assert any(isinstance(action, Evaluate) for action in driver.send_model())


def test_a_download_cut_by_a_reconnection_goes_on() -> None:
    driver = Driver()
    driver.open_round()
    driver.send(0, 2)
    driver.tell(Disconnected("gone"))
    assert asked_for(driver.tell(Connected())) == [1, 3]
    assert driver.open_round() == []  # the retained manifest comes again
    assert participations(driver.send(1, 3)) == [1]


def test_a_newer_manifest_ends_an_older_download() -> None:
    driver, other = Driver(), hashlib.sha256(b"newer").digest()
    driver.open_round()
    driver.send(0)
    actions = driver.open_round(round=2, model_digest=other)
    left = [action.topic_filter for action in actions if isinstance(action, Unsubscribe)]
    assert left == [model_topic(TENANT, DIGEST, index) for index in CHUNKS[1:]]
    assert driver.disk.chunks == {}
    assert asked_for(actions, other) == [0]
    driver.send_model()
    assert participations(driver.actions) == []


def test_the_same_manifest_again_changes_nothing() -> None:
    driver = Driver()
    driver.open_round()
    assert driver.open_round() == []
    driver.send_model()
    assert driver.open_round() == []
    assert driver.send_model() == []


def test_a_round_that_was_trained_is_not_trained_again_for_a_changed_manifest() -> None:
    driver = Driver()
    driver.open_round()
    driver.send_model()
    driver.open_round(deadline_s=3000.0)
    assert participations(driver.send_model()) == []


@pytest.mark.parametrize("different", [2, 20])
def test_a_round_whose_model_changes_again_and_again_is_left(different: int) -> None:
    """Whether they are ever new ones, or two in turn."""
    driver, fetched = Driver(), 0
    for number in range(20):
        params = (PARAMS + number % different).astype("<f4").tobytes()
        digest = hashlib.sha256(params).digest()
        fetched += bool(asked_for(driver.open_round(model_digest=digest), digest))
        driver.tell(chunk_message(model_chunks(params)[0], digest))
    assert fetched == MODELS_A_ROUND
    assert driver.disk.chunks == {}
    assert driver.session.view().doing == "not in round 1: the study named a model for it more than 4 times"
    assert asked_for(driver.open_round(round=2)) == [0]


def test_a_session_that_follows_every_change_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "MODELS_A_ROUND", 1000)
    with pytest.raises(AssertionError):
        test_a_round_whose_model_changes_again_and_again_is_left(2)


@pytest.mark.parametrize("maximum", [0, 1, 1024, 1535])
def test_a_server_without_room_for_a_chunk_is_noted_and_nothing_else(maximum: int) -> None:
    driver = Driver(outbox=(some_update(),))
    driver.tell(Disconnected("gone"))
    assert notes(driver.tell(Connected(maximum))) == ["broker_unusable"]
    assert driver.tell(Tick()) == []
    assert driver.session.view().connected is False


def test_a_server_that_lowers_its_limit_to_nothing_is_sent_nothing_more() -> None:
    driver = Driver(outbox=(some_update(),))
    assert notes(driver.tell(Connected(100))) == ["broker_unusable"]  # without a word of the connection before
    driver.now_s += 1000.0
    assert driver.tell(Tick()) == []


def test_only_a_signed_receipt_delivers() -> None:
    update = some_update()
    driver = Driver()
    assert len(uploads(driver.tell(UpdateReady(update)))) == 1
    topic = down_topic(TENANT, DEVICE, "receipt")
    assert notes(driver.tell(Received(topic, sign(receipt_for(update), STRANGER)))) == ["message_refused"]
    assert notes(driver.tell(Received(topic, encode(receipt_for(update))))) == ["message_refused"]
    # A NACK cannot pass for a receipt, nor a receipt come in by the NACK's topic.
    nack_topic = down_topic(TENANT, DEVICE, "nack")
    assert notes(driver.tell(Received(nack_topic, sign(receipt_for(update), AGGREGATOR)))) == ["message_refused"]
    assert notes(driver.tell(Received(topic, sign(receipt_for(update), AGGREGATOR)))) == ["update_delivered"]


def test_a_participation_that_ended_is_told_and_the_next_round_joined() -> None:
    driver = Driver()
    driver.open_round()
    driver.send_model()
    assert notes(driver.tell(ParticipationEnded(1, "spent"))) == ["participation_ended"]
    driver.open_round(round=2)
    assert participations(driver.send_model()) == [2]


def test_messages_on_other_topics_are_ignored() -> None:
    driver = Driver()
    for topic in ("", "fl/v1", f"fl/v1/{TENANT}/down/watch-1/receipt", f"fl/v1/{TENANT}/round/other", "x" * 10_000):
        assert driver.tell(Received(topic, sign(manifest(), AGGREGATOR))) == []


def test_what_waits_in_the_outbox_is_sent_after_a_restart() -> None:
    driver = Driver(outbox=(some_update(),))
    assert len(uploads(driver.actions)) == 1
    assert driver.session.view().pending == 1


def test_an_update_that_was_let_go_is_never_sent_again() -> None:
    driver = Driver(outbox=(some_update(),))
    topic = down_topic(TENANT, DEVICE, "receipt")
    driver.tell(Received(topic, sign(receipt_for(some_update()), AGGREGATOR)))
    driver.actions.clear()
    for _ in range(20):
        driver.now_s += 100.0
        driver.tell(Disconnected("gone"))
        driver.tell(Connected())
        driver.tell(ConditionsRead(()))
    assert uploads(driver.actions) == []
    assert uploads(driver.restarted().actions) == []


def test_its_name_may_change_only_when_nothing_is_pending_under_it() -> None:
    driver = Driver()
    assert driver.session.is_settled
    driver.open_round()
    driver.send_model()
    assert not driver.session.is_settled  # it trains
    update = some_update()
    driver.tell(UpdateReady(update))
    assert not driver.session.is_settled
    driver.tell(Received(down_topic(TENANT, DEVICE, "receipt"), sign(receipt_for(update), AGGREGATOR)))
    assert driver.session.is_settled


def test_a_large_update_is_sent_only_once_the_conditions_were_read_and_allow_it() -> None:
    update = some_update(size=300_000)
    driver = Driver(outbox=(update,), blocked=None)
    assert driver.session.has_large_updates
    sent = uploads(driver.actions)
    for reading in (ConditionsRead(("the network is metered",), holds_uploads=True), Disconnected("gone"), Connected()):
        sent += uploads(driver.tell(reading))
    assert sent == []
    # What only speaks against training does not hold it.
    assert uploads(driver.tell(ConditionsRead(("in use",)))) != []


def test_a_small_update_is_sent_whatever_the_conditions() -> None:
    driver = Driver(outbox=(some_update(),), blocked=None)
    assert not driver.session.has_large_updates
    assert len(uploads(driver.actions)) == 1
