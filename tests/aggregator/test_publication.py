"""What an aggregator publishes: signed chunks of models and control variates, and the manifest that names them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from sqlalchemy import event

from aggregator import daemon as daemon_module
from aggregator.publisher import SignedChunks
from aggregator.rounds import Phase
from aggregator.store import AggregatorStore, little_endian
from fl_protocol.chunking import Reassembler
from fl_protocol.errors import ProtocolError
from fl_protocol.messages import ChunkMsg, ReceiptMsg, decode
from fl_protocol.signing import verify
from tests.aggregator.desk import PowerCutError
from tests.aggregator.quadratics import Algorithm1, optimum, quadratics
from tests.aggregator.small_study import PUBLIC, SmallStudy, digest_of, small_task
from tests.fl_protocol.examples import AGGREGATOR_KEY, TASK, TENANT

D = 700
ZEROS = np.zeros(D, np.float32)
ONES = np.ones(D, np.float32)


class CountingKey:
    """A signing key that counts."""

    def __init__(self) -> None:
        self.times = 0

    def sign(self, data: bytes) -> bytes:
        self.times += 1
        return AGGREGATOR_KEY.sign(data)


def study(folder: Path, *, initial: np.ndarray = ZEROS, **changes: Any) -> SmallStudy:
    return SmallStudy(folder, quadratics(5, D), initial, small_task(**changes))


def test_each_chunk_is_verified_by_itself_and_all_make_the_whole() -> None:
    whole = little_endian(np.arange(D, dtype=np.float32))
    messages = SignedChunks(TENANT, AGGREGATOR_KEY).of(whole, maximum_packet_bytes=2048)
    assert len(messages) > 2
    reassembler = Reassembler()
    wholes = [reassembler.accept(verify(message.payload, ChunkMsg, PUBLIC), 0.0) for message in messages]
    assert wholes == [*[None] * (len(messages) - 1), whole]
    for message in messages:
        with pytest.raises(ProtocolError, match="not signed"):
            verify(message.payload, ReceiptMsg, PUBLIC)
        with pytest.raises(ProtocolError):
            decode(message.payload, ChunkMsg)


def test_a_whole_is_signed_once_however_often_it_is_published() -> None:
    key = CountingKey()
    chunks = SignedChunks(TENANT, key)  # type: ignore[arg-type]
    whole, other = little_endian(ZEROS), little_endian(ONES)
    first = chunks.of(whole, maximum_packet_bytes=2048)
    assert key.times == len(first)
    assert [chunks.of(whole, maximum_packet_bytes=2048) for _ in range(5)] == [first] * 5
    assert key.times == len(first)
    anew = chunks.of(whole, maximum_packet_bytes=4096)  # a server with another limit: cut anew
    assert key.times == len(first) + len(anew)
    chunks.of(other, maximum_packet_bytes=2048)
    chunks.keep_only([digest_of(ONES)])
    signed = key.times
    chunks.of(other, maximum_packet_bytes=2048)
    assert key.times == signed
    assert chunks.of(whole, maximum_packet_bytes=2048) == first
    assert key.times == signed + len(first)


def test_an_open_round_names_its_control_variate_and_both_can_be_fetched(tmp_path: Path) -> None:
    here = study(tmp_path, initial=ONES)
    manifest = here.manifest()
    assert manifest.plan.control_variates
    assert (manifest.model_digest, manifest.control_digest) == (digest_of(ONES), digest_of(ZEROS))
    np.testing.assert_array_equal(here.fetch(manifest.model_digest), ONES)
    np.testing.assert_array_equal(here.fetch(manifest.control_digest or b""), ZEROS)


def test_without_control_variates_there_is_none(tmp_path: Path) -> None:
    task = small_task()
    here = SmallStudy(tmp_path, quadratics(5, D), ONES, replace(task, plan=replace(task.plan, control_variates=False)))
    assert here.manifest().control_digest is None
    assert here.retained_digests() == {digest_of(ONES)}


@pytest.mark.parametrize("initial", [ZEROS, ONES], ids=["a first model that equals c", "another"])
def test_only_what_a_device_may_still_want_is_retained(tmp_path: Path, initial: np.ndarray) -> None:
    here = study(tmp_path, initial=initial)
    published = []
    for number in range(4):
        manifest = here.manifest()
        assert manifest.round == number + 1
        assert manifest.control_digest is not None
        published.append({manifest.model_digest, manifest.control_digest})
        assert here.retained_digests() == set().union(*published[-2:])
        here.round([0, 1, 2])
    assert here.daemon.state.phase is Phase.FINISHED
    finished = here.manifest()
    assert (finished.status, finished.control_digest) == ("finished", None)
    assert here.retained_digests() == {finished.model_digest}


def test_control_variates_over_the_wire_are_those_of_algorithm_1(tmp_path: Path) -> None:
    here = study(tmp_path, rounds=100)
    reference = Algorithm1(here.devices, 10, 0.1)
    sampler = np.random.default_rng(3)
    for number in range(60):
        sampled = sorted(sampler.choice(5, 3, replace=False).tolist())
        here.round(sampled)
        reference.round(sampled)
        if number % 20 == 10:
            here.crash()
            here.start()
        manifest = here.manifest()
        np.testing.assert_allclose(here.fetch(manifest.model_digest), reference.x, rtol=0, atol=1e-4)
        np.testing.assert_allclose(here.fetch(manifest.control_digest or b""), reference.c, rtol=0, atol=1e-4)
    assert np.abs(here.fetch(here.manifest().model_digest) - optimum(here.devices)).max() < 0.05


def test_the_configured_population_is_n(tmp_path: Path) -> None:
    here = study(tmp_path, population=40)
    here.round([0, 1, 2])
    control = here.daemon.store.control(1, D)
    assert control.population == 40
    np.testing.assert_allclose(40 * control.values, np.sum(here.own, axis=0), rtol=1e-4, atol=1e-4)


def test_an_aborted_round_leaves_c_as_it_was(tmp_path: Path) -> None:
    here = study(tmp_path, round_duration_s=60.0)
    before = here.manifest()
    here.round([0, 1])
    here.clock.time_s += 61.0
    here.settle()
    after = here.manifest()
    assert (after.round, after.model_digest, after.control_digest) == (2, before.model_digest, before.control_digest)


def test_a_restart_publishes_the_same_signed_bytes(tmp_path: Path) -> None:
    here = study(tmp_path)
    here.round([0, 1, 2])
    retained = {topic: payload for topic, payload in here.broker.retained.items() if "/model/" in topic}
    here.crash()
    here.broker.retained.clear()
    here.start()
    again = {topic: payload for topic, payload in here.broker.retained.items() if "/model/" in topic}
    assert again == {topic: retained[topic] for topic in again}
    digests = {digest_of(here.daemon.store.model(1).model.params), digest_of(here.daemon.store.control(1, D).values)}
    assert here.retained_digests() == digests


def test_an_ordinary_task_adds_no_control_variate_to_the_database(tmp_path: Path) -> None:
    store = AggregatorStore(f"sqlite:///{tmp_path / 'aggregator.db'}", TASK)
    store.create_task(bytes(32), ONES)
    control = store.control(0, D)
    assert control.population == 0
    np.testing.assert_array_equal(control.values, ZEROS)


def cut_at(daemon: Any, statement: int) -> Callable[[], None]:
    """Lose power at this statement (0-based) of the database; what is returned undoes it."""
    executed = 0

    def before(*_arguments: object) -> None:
        nonlocal executed
        if executed == statement:
            raise PowerCutError
        executed += 1

    event.listen(daemon.store._engine, "before_cursor_execute", before)
    event.listen(daemon.store._engine, "commit", before)

    def undo() -> None:
        event.remove(daemon.store._engine, "before_cursor_execute", before)
        event.remove(daemon.store._engine, "commit", before)

    return undo


def check_model_and_control_change_together(folder: Path) -> None:
    """Cut the power at every statement of a round's end: the model and c are both of before or both of after."""
    seen = set()
    for statement in range(200):
        (folder / str(statement)).mkdir()
        here = SmallStudy(folder / str(statement), quadratics(5, 40), np.zeros(40, np.float32))
        here.round([0, 1])
        here.send(2)
        undo = cut_at(here.daemon, statement)
        try:
            here.settle()
        except PowerCutError:
            cut = True
        else:
            cut = False
        undo()
        store = AggregatorStore(f"sqlite:///{folder / str(statement) / 'aggregator.db'}", TASK)
        version, population = store.round_state().committed, store.control(1, 40).population
        assert (version == 1) == (population == 5), f"cut at statement {statement}"
        seen.add(version)
        store.close()
        if not cut:
            break
        # The round's end comes all the same, and c is that of the updates that were counted.
        here.crash()
        here.start()
        if version == 0:
            for index in (3, 4):
                here.send(index)
            here.settle()
        assert here.daemon.store.round_state().committed == 1
        assert here.daemon.store.control(1, 40).population == 5
    assert seen == {0, 1}


def test_the_model_and_its_control_variate_are_committed_together(tmp_path: Path) -> None:
    check_model_and_control_change_together(tmp_path)


def test_a_daemon_that_commits_them_one_after_the_other_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_a_transaction_of_its_own(self: Any, _connection: object, before: Any, mean: Any, count: int) -> None:
        self.later = (before, mean, count)

    whole = daemon_module.AggregatorDaemon._carry_out
    half = daemon_module.AggregatorDaemon._commit_control

    def and_then(self: Any, *arguments: Any) -> Any:
        notes = whole(self, *arguments)
        if getattr(self, "later", None) is not None:
            with self.store.transaction() as connection:
                half(self, connection, *self.later)
            self.later = None
        return notes

    monkeypatch.setattr(daemon_module.AggregatorDaemon, "_commit_control", in_a_transaction_of_its_own)
    monkeypatch.setattr(daemon_module.AggregatorDaemon, "_carry_out", and_then)
    with pytest.raises(AssertionError, match="cut at statement"):
        check_model_and_control_change_together(tmp_path)
