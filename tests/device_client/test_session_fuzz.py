"""Whatever a broker sends, in whatever order: nothing is raised, little is kept, and only what was signed is done.

``python -m tests.device_client.test_session_fuzz --cases 200000`` runs as many cases as wanted; pytest runs
``COVEY_FUZZ_CASES`` (default 1,500), the same every time. A case is one script of up to about a hundred events.
"""

from __future__ import annotations

import argparse
import collections
import os
import time
from random import Random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from device_client import current_round
from device_client import session as session_module
from device_client.current_round import CurrentRound
from device_client.delivery import Deliveries
from device_client.downloads import Download
from device_client.events import (
    Action,
    ConditionsRead,
    PendingUpdate,
)
from device_client.floors import Floors
from device_client.model_route import ModelRoute
from device_client.session import DeviceSession
from fl_protocol.errors import ProtocolError
from fl_protocol.messages import RoundManifestMsg, SignedMsg, decode
from fl_protocol.model_delta import apply_delta
from fl_protocol.transport import Connected, Disconnected, Received
from tests.device_client.hostile_broker import FLOORS, Script, good
from tests.device_client.ports import DEVICE, TENANT
from tests.device_client.session_driver import (
    Driver,
    chunk_message,
    model_chunks,
    some_update,
)
from tests.device_client.session_watch import Watch, held_bytes

CASES = int(os.environ.get("COVEY_FUZZ_CASES", "1500"))
SCRIPTS = st.binary(min_size=80, max_size=320)


def check_script(data: bytes, reached: collections.Counter[str], subject: type[DeviceSession] = DeviceSession) -> None:
    """One case."""
    reached["cases"] += 1
    Watch(Script(data), reached, subject=subject).live()


def fuzz(cases: int, *, seed_number: int | None) -> collections.Counter[str]:
    """As many cases as wanted, the same ones for the same seed; how often the interesting was reached."""
    reached: collections.Counter[str] = collections.Counter()

    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        derandomize=seed_number is None,
        suppress_health_check=list(HealthCheck),
    )
    @given(data=SCRIPTS)
    def run(data: bytes) -> None:
        check_script(data, reached)

    (run if seed_number is None else seed(seed_number)(run))()
    return reached


def test_no_hostile_broker_breaks_a_rule() -> None:
    reached = fuzz(CASES, seed_number=None)
    assert reached["cases"] >= CASES
    for interesting in ("Participate", "Evaluate", "CountRecords", "KeepChunk", "Discard", "Abandon", "UpdateReady"):
        assert reached[interesting] >= CASES / 100, f"{interesting} is hardly reached: {reached}"
    for rarer in ("KeepModel", "ReadModel", "delta_refused", "EvaluationPlanMsg", "StatisticsPlanMsg", "late work"):
        assert reached[rarer] >= CASES / 300, f"{rarer} is hardly reached: {reached}"


def is_caught(cases: int, subject: type[DeviceSession] = DeviceSession, *, number: int = 7) -> bool:
    """Whether a device that was broken on purpose breaks a rule within so many cases, of the variety of that number."""
    chance, reached = Random(number), collections.Counter[str]()  # noqa: S311 - a test's variety
    try:
        for _ in range(cases):
            check_script(chance.randbytes(300), reached, subject)
    except AssertionError:
        return True
    return False


def test_the_same_cases_without_a_fault_break_no_rule() -> None:
    assert not is_caught(300)


def test_a_device_that_checks_no_signature_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(data: bytes, kind: type[RoundManifestMsg], _key: object) -> RoundManifestMsg:
        return decode(decode(data, SignedMsg).payload, kind)

    monkeypatch.setattr(session_module, "verify", careless)
    assert is_caught(2000)


def test_a_device_that_ignores_its_floors_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Floors, "check", lambda _self, _manifest: None)
    assert is_caught(2000)


def test_a_device_that_takes_any_whole_for_the_model_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(self: Download) -> NDArray[np.float32]:
        data = b"".join(self._parts[index] for index in range(len(self._parts)))
        return np.frombuffer(data, "<f4").astype(np.float32)

    monkeypatch.setattr(Download, "whole", careless)
    assert is_caught(3000)


def test_a_device_that_trusts_a_delta_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(
        route: ModelRoute, _manifest: RoundManifestMsg, *, base: NDArray[np.float32], delta: bytes
    ) -> NDArray[np.float32]:
        return apply_delta(base, delta) if route.delta is not None else base

    monkeypatch.setattr(current_round, "arrive", careless)
    assert is_caught(3000)


def test_a_device_that_forgets_what_is_over_is_caught() -> None:
    class Forgetful(DeviceSession):
        def _remember_round(self, manifest: RoundManifestMsg) -> list[Action]:
            highest = max(self._state.highest_round, manifest.round)
            return [self._remember(highest_round=highest)] if highest > self._state.highest_round else []

    # Of six varieties each had it within 1,500 cases, this one within 200.
    assert is_caught(6000, Forgetful, number=1)


def test_a_device_that_does_not_look_at_tags_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "missing_tags", lambda _manifest, _config: [])
    assert is_caught(2000)


def test_a_device_that_begins_one_round_during_another_is_caught() -> None:
    class Restless(DeviceSession):
        def _decide(self, here: CurrentRound, now_s: float) -> list[Action]:
            work, self._working_on = self._working_on, None
            try:
                return super()._decide(here, now_s)
            finally:
                self._working_on = work

    # Of six varieties each had it within 600 cases, this one within 40.
    assert is_caught(3000, Restless, number=3)


def test_a_device_that_forgets_its_decisions_is_caught() -> None:
    class Forgetful(DeviceSession):
        def _toss(self, here: CurrentRound, now_s: float) -> list[Action]:
            return [*super()._toss(here, now_s), self._remember(decided_round=0)]

    assert is_caught(3000, Forgetful)


def test_a_device_that_accepts_old_rounds_is_caught() -> None:
    class Credulous(DeviceSession):
        def _check_is_ours_and_new(self, manifest: RoundManifestMsg) -> None:
            if manifest.round < self._state.highest_round:
                self._remember(highest_round=0)

    assert is_caught(2000, Credulous)


def test_a_device_that_trains_while_blocked_is_caught() -> None:
    class Eager(DeviceSession):
        def _go_on(self, now_s: float) -> list[Action]:
            self._blocked = ()
            return super()._go_on(now_s)

    assert is_caught(2000, Eager)


def test_a_device_that_sends_what_it_let_go_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    close = Deliveries._close

    def hoarding(self: Deliveries, update_id: bytes, *args: object, **fields: object) -> list[Action]:
        kept = self._open[update_id]
        actions = close(self, update_id, *args, **fields)  # type: ignore[arg-type]
        self._open[update_id] = kept
        return actions

    monkeypatch.setattr(Deliveries, "_close", hoarding)
    assert is_caught(3000)


def test_a_device_that_lets_errors_escape_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeviceSession, "_received", DeviceSession._verified)
    with pytest.raises(ProtocolError):
        is_caught(50)


def held_after_flood(subject: DeviceSession, driver: Driver, *, times: int) -> int:
    """Bytes more than before after so many different messages."""
    before = held_bytes(subject)
    chance = Random(3)  # noqa: S311 - a test's variety
    for number in range(times):
        messages = [
            *good()["unwelcome"][:4],
            *good()["nack"][:3],
            chunk_message(model_chunks(data_bytes=300 + number % 1000)[0]),
            Received(f"fl/v1/{TENANT}/model/{chance.randbytes(32).hex()}/0", chance.randbytes(500)),
            Received(f"fl/v1/{TENANT}/down/{DEVICE}/{chance.random()}", chance.randbytes(500)),
        ]
        for message in messages:
            driver.tell(message)
        driver.actions.clear()
    return held_bytes(subject) - before


def test_a_long_flood_leaves_nothing_behind() -> None:
    driver = Driver(floors=FLOORS, outbox=(some_update(1), some_update(2, 6000)))
    driver.open_round()
    assert held_after_flood(driver.session, driver, times=300) < 15_000
    driver.now_s += 1.0
    driver.session.handle(Disconnected("gone"), driver.now_s)
    driver.tell(Connected())
    driver.now_s += 400.0
    driver.send_model()
    driver.tell(ConditionsRead(()))
    assert driver.session.view().doing.startswith(("fetching", "training"))


def test_a_session_that_remembers_refusals_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    refused: list[bytes] = []
    is_for = Download.is_for

    def hoarding(self: Download, topic: str) -> bool:
        self.__dict__.setdefault("refused", refused).append(topic.encode())
        return is_for(self, topic)

    monkeypatch.setattr(Download, "is_for", hoarding)
    driver = Driver(floors=FLOORS)
    driver.open_round()
    assert held_after_flood(driver.session, driver, times=300) > 15_000


def test_the_measure_of_memory_sees_what_a_session_keeps() -> None:
    large = some_update(1, 10**6)
    assert isinstance(large, PendingUpdate)
    assert held_bytes(Driver(outbox=(large,)).session) > held_bytes(Driver().session) + 10**6


def main() -> None:
    """Run many cases and say what was reached."""
    parser = argparse.ArgumentParser(description="Fuzz the device's session with a hostile broker.")
    parser.add_argument("--cases", type=int, default=200_000, help="how many scripts (default: 200000)")
    parser.add_argument("--seed", type=int, default=1, help="the same seed gives the same scripts (default: 1)")
    options = parser.parse_args()
    began_s = time.monotonic()
    reached = fuzz(options.cases, seed_number=options.seed)
    print(f"{time.monotonic() - began_s:.0f} s, seed {options.seed}: {dict(reached)}")  # noqa: T201 - a command


if __name__ == "__main__":
    main()
