"""What the coordinator believes of helpers: what their pinned identities signed, about what it has asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec.structs import replace

from aggregator.config import HelperSection
from aggregator.helper_calls import ASK_EVERY_S, HelperCalls, RoundAsked
from firmware_sim.virtual_broker import VirtualBroker, VirtualTransport
from fl_protocol.chunking import split
from fl_protocol.messages import encode
from fl_protocol.secagg.messages import HelperKeyMsg, MaskSumMsg
from fl_protocol.secagg.terms import HelperIdentity
from fl_protocol.signing import sign
from fl_protocol.topics import helper_topic, helper_transfer_topic
from fl_protocol.transport import Connected, Received, TransportEvent
from tests.enrolments import broken_copy
from tests.fl_protocol.examples import (
    AGGREGATOR_KEY,
    HELPERS,
    MASK_SUM,
    MODEL_DIGEST,
    TASK,
    TENANT,
    UNMASK_REFUSAL,
    UNMASK_REQUEST,
    helper_key,
)
from tests.ids import short_id

NOW_S = 1_000_000.0
PINNED = {
    name: HelperIdentity(name, f"operator-{name[-1]}", identity.public_key()) for name, identity in HELPERS.items()
}
ABOUT = RoundAsked(TASK, 5, MODEL_DIGEST)
STRANGER = Ed25519PrivateKey.from_private_bytes(bytes(32))
A = "helper-a"


@dataclass
class Link:
    """A helper's own link that brings what it is told to."""

    problem: str = ""
    asked: list[bytes] = field(default_factory=list)
    brings: list[bytes] = field(default_factory=list)

    def ask(self, request: bytes) -> None:
        self.asked.append(request)

    def cosign(self, request: bytes) -> None:
        self.asked.append(request)

    def poll(self) -> list[bytes]:
        found, self.brings = self.brings, []
        return found


class Bench:
    """Calls to two helpers on a virtual broker, of which a test plays the helpers."""

    def __init__(self, kind: Callable[..., HelperCalls] = HelperCalls, links: dict[str, Link] | None = None) -> None:
        self.now_s, self.notes = NOW_S, list[dict[str, Any]]()
        broker = VirtualBroker()
        transport, self.other = VirtualTransport(broker), VirtualTransport(broker)
        self.calls = kind(
            tenant=TENANT,
            helpers=PINNED,
            signing_key=AGGREGATOR_KEY,
            transport=transport,
            note=lambda event, **fields: self.notes.append({"event": event, **fields}),
            now_s=lambda: self.now_s,
            links=links,
        )
        transport.open()
        self.other.open()
        self.other.subscribe(f"fl/v1/{TENANT}/helper/+/request/+/+")
        self.calls.connected(None)

    def say(self, topic: str, payload: bytes) -> None:
        """A message as the broker brings it."""
        assert self.calls.take([Received(topic, payload)]) == []

    def say_key(self, key: HelperKeyMsg, identity: Ed25519PrivateKey | None = None, *, name: str = A) -> None:
        self.say(helper_topic(TENANT, name, "key"), sign(key, identity or HELPERS[name]))

    def answer(self, answer: MaskSumMsg, identity: Ed25519PrivateKey | None = None, *, name: str = A) -> None:
        signed = sign(answer, identity or HELPERS[name])
        for chunk in split(bytes(16), signed, data_bytes=256):
            self.say(helper_transfer_topic(TENANT, name, "answer", bytes(16), chunk.index), encode(chunk))

    def ask(self) -> None:
        self.calls.ask(ABOUT, {name: replace(UNMASK_REQUEST, helper=name) for name in HELPERS})

    def requests(self) -> int:
        """How many chunks of requests have gone out since."""
        count = 0
        while (event := self.other.poll(0.0)) is not None:
            count += isinstance(event, Received)
        return count

    @property
    def refused(self) -> list[str]:
        return [one["reason"] for one in self.notes if one["event"] == "helper_message_refused"]


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_keys_come_in_the_order_that_is_asked_for(bench: Bench) -> None:
    assert "helper helper-a has published no key" in bench.calls.keys((), until_s=NOW_S)[1]
    for name in HELPERS:
        bench.say_key(helper_key(name), name=name)
    signed, why = bench.calls.keys(("helper-b", "helper-a"), until_s=NOW_S)
    assert (len(signed), why) == (2, "")
    assert signed == tuple(reversed(bench.calls.keys((), until_s=NOW_S)[0]))
    assert "does not name helper helper-c" in bench.calls.keys(("helper-c",), until_s=NOW_S)[1]
    assert "ends before the round would" in bench.calls.keys((), until_s=2_000_001.0)[1]


def test_a_newer_key_takes_the_place_of_an_older_one_and_never_the_other_way_round(bench: Bench) -> None:
    newer = replace(helper_key(A), not_after_s=2_500_000.0)
    for key in (helper_key(A), newer, helper_key(A)):
        bench.say_key(key)
    assert bench.calls.keys((A,), until_s=2_400_000.0) == ((sign(newer, HELPERS[A]),), "")


FORGERIES: dict[str, tuple[HelperKeyMsg, Ed25519PrivateKey]] = {
    "signed by somebody else": (helper_key(A), STRANGER),
    "another helper's": (helper_key("helper-b"), HELPERS[A]),
    "of another operator": (replace(helper_key(A), operator="operator-b"), HELPERS[A]),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_key_is_not_taken(forgery: str, bench: Bench) -> None:
    bench.say_key(*FORGERIES[forgery])
    assert bench.calls.keys((A,), until_s=NOW_S)[0] == ()
    assert len(bench.refused) == 1


def test_all_helpers_have_to_answer(bench: Bench) -> None:
    bench.ask()
    assert bench.calls.answers(TASK) is None
    bench.answer(MASK_SUM)
    assert bench.calls.answers(TASK) is None
    assert "no answer of helper-b in time" in bench.calls.missing(TASK)
    bench.answer(replace(MASK_SUM, helper="helper-b"), name="helper-b")
    answers = bench.calls.answers(TASK)
    assert answers is not None
    assert [one.helper for one in answers] == ["helper-a", "helper-b"]
    bench.calls.forget(TASK)
    assert bench.calls.answers(TASK) is None


WRONG: dict[str, tuple[MaskSumMsg, Ed25519PrivateKey]] = {
    "signed by somebody else": (MASK_SUM, STRANGER),
    "signed by the other helper": (MASK_SUM, HELPERS["helper-b"]),
    "the other helper's": (replace(MASK_SUM, helper="helper-b"), HELPERS[A]),
    "about another round": (replace(MASK_SUM, round=4), HELPERS[A]),
    "about another manifest": (replace(MASK_SUM, manifest_digest=bytes(32)), HELPERS[A]),
    "of another study": (replace(MASK_SUM, tenant="other"), HELPERS[A]),
    "about another task": (replace(MASK_SUM, task="other"), HELPERS[A]),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_an_answer_counts_only_if_it_is_this_helpers_about_what_was_asked(wrong: str, bench: Bench) -> None:
    bench.ask()
    bench.answer(*WRONG[wrong])
    bench.answer(replace(MASK_SUM, helper="helper-b"), name="helper-b")
    assert bench.calls.answers(TASK) is None
    assert len(bench.refused) == 1


@pytest.mark.parametrize("wrong", ["about another round", "about another manifest", "the other helper's"])
def test_an_aggregator_that_takes_any_answer_is_caught(wrong: str) -> None:
    copy = broken_copy(
        "aggregator.helper_calls",
        ("            call is None\n", "            call is None and False\n"),
        ("            or call.about != about\n", "            or False\n"),
        ("            or (message.helper, message.tenant) != (helper.identity.name, self._tenant)\n", ""),
    )
    bench = Bench(copy.HelperCalls)
    bench.calls.ask(
        copy.RoundAsked(TASK, 5, MODEL_DIGEST), {name: replace(UNMASK_REQUEST, helper=name) for name in HELPERS}
    )
    bench.answer(*WRONG[wrong])
    bench.answer(replace(MASK_SUM, helper="helper-b"), name="helper-b")
    assert bench.calls.answers(TASK) is not None


def test_a_refusal_says_why(bench: Bench) -> None:
    bench.ask()
    bench.say(helper_topic(TENANT, A, "refusal"), sign(UNMASK_REFUSAL, STRANGER))
    assert bench.calls.refusal(TASK) == ""
    bench.say(helper_topic(TENANT, A, "refusal"), sign(UNMASK_REFUSAL, HELPERS[A]))
    assert bench.calls.refusal(TASK) == "helper helper-a refuses: too_few: expected at least 5 updates, got 2"


def test_who_does_not_answer_is_asked_again_and_who_has_answered_is_not(bench: Bench) -> None:
    bench.ask()
    assert bench.requests() == 2
    bench.calls.look_after()
    assert bench.requests() == 0
    bench.answer(MASK_SUM)
    bench.now_s += ASK_EVERY_S + 1
    bench.calls.look_after()
    assert bench.requests() == 1
    bench.calls.connected(None)  # the broker has forgotten everything
    bench.calls.look_after()
    assert bench.requests() == 1


def test_messages_of_others_are_left_alone(bench: Bench) -> None:
    others: list[TransportEvent] = [Connected(), Received("fl/v1/clinic/up/00/a/b/0", b"x")]
    assert bench.calls.take(others) == others


@pytest.mark.parametrize("topic", ["key", "refusal", "answer/" + "0" * 32 + "/0", "request/" + "0" * 32 + "/0"])
@pytest.mark.parametrize("helper", [A, "helper-z"])
def test_rubbish_is_noted_and_changes_nothing(topic: str, helper: str, bench: Bench) -> None:
    bench.ask()
    for payload in (b"", b"\x80", bytes(1000), sign(MASK_SUM, HELPERS[A])[:-1]):
        bench.say(f"fl/v1/{TENANT}/helper/{helper}/{topic}", payload)
    assert len(bench.refused) == 4
    assert bench.calls.answers(TASK) is None


def test_a_helper_with_a_link_of_its_own_is_asked_over_that() -> None:
    link = Link(problem="the helper at 127.0.0.1:1 does not answer")
    bench = Bench(links={A: link})
    assert "does not answer" in bench.calls.keys((A,), until_s=NOW_S)[1]
    link.brings.append(sign(helper_key(A), HELPERS[A]))
    bench.calls.look_after()
    assert bench.calls.keys((A,), until_s=NOW_S)[1] == ""
    bench.ask()
    assert (len(link.asked), bench.requests()) == (1, 1)
    assert "127.0.0.1:1 does not answer" in bench.calls.missing(TASK)
    link.brings += [b"rubbish", sign(MASK_SUM, STRANGER), sign(UNMASK_REFUSAL, HELPERS[A])]
    bench.calls.look_after()
    assert bench.calls.refusal(TASK)
    assert len(bench.refused) == 2


PIN = {"name": A, "operator": "patients", "key": "11" * 32}
FILES = {"ca": "ca.pem", "certificate": "own.pem", "certificate_key": "own.key"}


@pytest.mark.parametrize("changes", [{}, {"url": "https://helper.example:8443", **FILES}], ids=short_id)
def test_a_helper_is_asked_over_the_broker_or_over_https(changes: dict[str, str]) -> None:
    assert msgspec.convert({**PIN, **changes}, HelperSection).url == changes.get("url")


@pytest.mark.parametrize(
    "changes",
    [
        {"url": "https://helper.example:8443"},
        FILES,
        {"url": "http://helper.example:80", **FILES},
        {"url": "https://helper.example", **FILES},
        {"url": "https://user@helper.example:1", **FILES},
        {"key": "no key"},
    ],
    ids=short_id,
)
def test_a_helper_that_is_half_configured_is_refused(changes: dict[str, str]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({**PIN, **changes}, HelperSection)
