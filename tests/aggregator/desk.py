"""An aggregator on a virtual broker, its database and blobs in a folder, and updates made by hand, good and bad.

Nothing here imports the device: what an aggregator takes from the wire is made from the protocol alone. Every process
is made by `aggregator.assembly.make_service`; `built_with` has it take broken parts.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec.structs import replace as with_fields
from numpy.typing import NDArray
from sqlalchemy import event, select

from aggregator import assembly, committer
from aggregator.adapters.local_blobs import LocalBlobs
from aggregator.exact_sum import ExactSum
from aggregator.intake import Intake, IntakeLimits
from aggregator.partial_sums import open_sum, sum_place
from aggregator.rounds import Phase, RoundState
from aggregator.service import AggregatorService
from aggregator.store import schema
from aggregator.store.aggregator_store import AggregatorStore
from aggregator.store.blobs import Blobs, StoredBlob
from aggregator.store.database import Database
from aggregator.task_creation import create_task
from aggregator.task_file import TaskConfig, TrainingPlan, Updates, read_task, write_task
from aggregator.task_runner import TaskRunner
from aggregator.validation import Judge
from firmware_sim.virtual_broker import VirtualBroker, VirtualTransport
from fl_protocol.bundle import open_bundle, pack_bundle
from fl_protocol.chunking import split
from fl_protocol.errors import RefusalReason
from fl_protocol.messages import (
    NackMsg,
    ReceiptMsg,
    UpdateBodyMsg,
    UpdateEnvelopeMsg,
    UpdateHeaderMsg,
    decode,
    encode,
)
from fl_protocol.model_manifest import (
    BundleManifest,
    ClipGroup,
    InputSchema,
    LabelSchema,
    LayerInfo,
    LossSpec,
    ParameterSpec,
    TrainingDefaults,
)
from fl_protocol.sealing import RoundKey, seal_update
from fl_protocol.signing import public_key_hex, sign_header, verify
from fl_protocol.topics import upload_topic
from fl_protocol.transport import Received, Transport
from tests.enrolments import broken_copy
from tests.fl_protocol.examples import AGGREGATOR_KEY, TASK, TENANT, manifest, round_key

ROUND_KEY = round_key("x25519")
SUMS_SECRET = b"the secret of a round's sums...."
D = 300
PARAMS = np.zeros(D, np.float32)
DIGEST = hashlib.sha256(PARAMS.tobytes()).digest()
GRAPH = b"a graph that nobody runs"
GRAPH_DIGEST = hashlib.sha256(GRAPH).digest()
PUBLISHER = Ed25519PrivateKey.from_private_bytes(bytes([3]) * 32)
DEVICES = [f"watch-{index}" for index in range(5)]
ID = b"\x10" * 16
UNIT = 2.0**-32


class PowerCutError(BaseException):
    """The process ends here: nothing of ours may catch it."""


@dataclass
class VirtualClock:
    """Time that moves only when it is told to."""

    time_s: float = 1_000_000.0

    def now_s(self) -> float:
        return self.time_s


@dataclass
class MemoryJournal:
    """A journal that keeps what it is told."""

    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def write(self, event: str, /, *, at_s: float, **fields: Any) -> None:
        self.events.append((event, {"at_s": at_s, **fields}))

    def named(self, event: str) -> list[dict[str, Any]]:
        return [fields for name, fields in self.events if name == event]


class SeededEntropy:
    """Deterministic bytes, for tests only."""

    def __init__(self, seed: str) -> None:
        self._seed, self._calls = seed, 0

    def __call__(self, count: int) -> bytes:
        self._calls += 1
        return hashlib.shake_128(f"{self._seed} {self._calls}".encode()).digest(count)


class WatchedBlobs:
    """`aggregator.store.blobs.Blobs` that tells of everything before and after it is done.

    Attributes:
        watch: told ``before put``, ``after put`` and so on; what it raises happens instead, or right after.
        kinds: of everything that was put.
    """

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs
        self.watch: Callable[[str], None] = lambda _moment: None
        self.kinds: list[str] = []

    def put(self, data: bytes, *, kind: str) -> str:
        self.watch("before put")
        self.kinds.append(kind)
        name = self._blobs.put(data, kind=kind)
        self.watch("after put")
        return name

    def get(self, name: str) -> bytes:
        self.watch("before get")
        return self._blobs.get(name)

    def delete(self, names: Iterable[str]) -> None:
        self.watch("before delete")
        self._blobs.delete(names)

    def stored(self) -> Iterator[StoredBlob]:
        return self._blobs.stored()


class ObservedBroker(VirtualBroker):
    """A broker that remembers what was published, retained, and tells of each message before it delivers it."""

    def __init__(self, *, maximum_packet_bytes: int | None = 2048) -> None:
        super().__init__(maximum_packet_bytes=maximum_packet_bytes)
        self.published: list[tuple[str, bytes]] = []
        self.watch: Callable[[str], None] = lambda _topic: None

    def publish(self, topic: str, payload: bytes, *, retain: bool) -> None:
        self.watch(topic)
        if retain:
            self.published.append((topic, payload))
        super().publish(topic, payload, retain=retain)


class WatchedTransport(VirtualTransport):
    """A connection that counts the messages it holds for the broker, and tells of each acknowledgement."""

    def __init__(self, broker: VirtualBroker, *, session: str, receive_maximum: int = 1000) -> None:
        super().__init__(broker, session=session, manual_acknowledgement=True, receive_maximum=receive_maximum)
        self.acknowledged: list[Received] = []
        self.watch: Callable[[], None] = lambda: None

    def acknowledge(self, message: Received) -> None:
        self.watch()
        self.acknowledged.append(message)
        super().acknowledge(message)

    @property
    def num_held(self) -> int:
        """Messages that the broker still has to remember."""
        return len(self._unacknowledged)


def device_key(name: str) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest())


def values(number: float, length: int = D) -> bytes:
    return np.full(length, number, "<f4").tobytes()


def make_update(
    device: str = "watch-0",
    *,
    update_id: bytes = ID,
    body: bytes | None = None,
    num_parameters: int = D,
    encoding: str = "float32",
    key: Ed25519PrivateKey | None = None,
    **changes: object,
) -> bytes:
    """An encoded envelope; keyword arguments change the manifest that the device believes in."""
    given = {"round": 3, "model_digest": DIGEST, "num_parameters": D, "graph_digest": GRAPH_DIGEST, **changes}
    raw = body if body is not None else values(1.0)
    return seal_update(
        UpdateBodyMsg(num_parameters=num_parameters, values=raw, encoding=encoding),  # type: ignore[arg-type]
        manifest=manifest(**given),
        device=device,
        update_id=update_id,
        signing_key=key if key is not None else device_key(device),
    )


def with_header(envelope: bytes, key: Ed25519PrivateKey, **changes: object) -> bytes:
    """The same sealed bytes under a changed and newly signed header."""
    outer = decode(envelope, UpdateEnvelopeMsg)
    header = decode(outer.header, UpdateHeaderMsg)
    fields = {name: getattr(header, name) for name in header.__struct_fields__}
    changed = encode(UpdateHeaderMsg(**{**fields, **changes}))
    return encode(UpdateEnvelopeMsg(header=changed, signature=sign_header(changed, key), sealed=outer.sealed))


def messages(
    envelope: bytes, device: str = "watch-0", *, update_id: bytes = ID, data_bytes: int = 700
) -> list[Received]:
    """An envelope as it travels."""
    return [
        Received(upload_topic(TENANT, device, update_id, chunk.index), encode(chunk))
        for chunk in split(update_id, envelope, data_bytes=data_bytes)
    ]


def id_of(text: str) -> bytes:
    """An update id that follows from a text."""
    return hashlib.sha256(text.encode()).digest()[:16]


def pack_small_bundle(params: NDArray[np.float32] = PARAMS, *, graph: bytes = GRAPH, num_personal: int = 0) -> bytes:
    """A bundle of one layer with these parameters; its graph is never run."""
    count, num_shared = len(params), len(params) - num_personal
    shared = (ParameterSpec("dense/kernel", (num_shared,), 0),)
    facts = BundleManifest(
        format=2,
        name="tiny",
        version=1,
        description="for tests",
        data="none",
        batch_size=8,
        num_parameters=count,
        num_shared_parameters=num_shared,
        parameters=shared if not num_personal else (*shared, ParameterSpec("dense/bias", (num_personal,), num_shared)),
        layers=(LayerInfo("dense", "Dense", (3,), count, {"kernel": "gram"}),),
        input=InputSchema((10, 2), ("x", "y"), ("g", "g"), 50.0),
        label=LabelSchema("class", ("rest", "walk")),
        loss=LossSpec("softmax_cross_entropy"),
        preprocessing="none",
        defaults=TrainingDefaults(0.1, 1.0, 0.9),
        norm_clips=(ClipGroup(("dense",), 1.0),),
        dropout=(),
        train_flops=100,
        train_arena_bytes=1000,
        infer_params_offset=0,
    )
    return pack_bundle(
        facts,
        graph=graph,
        infer_template=params.tobytes(),
        params=params,
        keras_json=b"{}",
        frozen=np.zeros(0, np.float32),
        publisher_key=PUBLISHER,
    )


def task_config(**changes: Any) -> TaskConfig:
    settings: dict[str, Any] = {
        "name": TASK,
        "bundle": "unused",
        "publisher_key": public_key_hex(PUBLISHER.public_key()),
        "plan": TrainingPlan(
            sampling_rate=1.0,
            local_steps=10,
            learning_rate=0.1,
            l2_norm_clip=1.0,
            noise_multiplier=0.0,
            expected_batch_size=1.0,
        ),
        "rounds": 4,
        "goal": 100,
        "minimum_cohort": 2,
        "round_duration_s": 60.0,
        "engine": "open",
        "updates": Updates(kem="x25519"),
    }
    return TaskConfig(**{**settings, **changes})


@functools.cache
def empty_database() -> bytes:
    """A database with the present schema; making one takes longer than most tests."""
    with tempfile.TemporaryDirectory() as folder:
        Database(f"sqlite:///{folder}/empty.db").close()
        return (Path(folder) / "empty.db").read_bytes()


def create(
    store: AggregatorStore, folder: Path, task: TaskConfig, *, params: NDArray[np.float32], graph: bytes = GRAPH
) -> None:
    """What ``covey-aggregator task create`` does."""
    (folder / "model.covey").write_bytes(pack_small_bundle(params, graph=graph))
    path = folder / f"{task.name}.toml"
    path.write_text(write_task(with_fields(task, bundle="model.covey")))
    create_task(store, path, now_s=1_000_000.0)


@functools.cache
def prepared_files(specs: tuple[str, ...], params: bytes) -> dict[str, bytes]:
    """Database and blobs of some tasks and the devices, by their place in a folder; copied, that takes no time."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "aggregator.db").write_bytes(empty_database())
        blobs = LocalBlobs(folder / "blobs", entropy=SeededEntropy("prepared"))
        store = AggregatorStore(Database(f"sqlite:///{folder / 'aggregator.db'}"), blobs)
        store.devices.add_all([(one, device_key(one).public_key().public_bytes_raw()) for one in DEVICES], 0.0)
        for spec in specs:
            create(store, folder, read_task(spec, "of the test"), params=np.frombuffer(params, np.float32))
        store.close()
        paths = [folder / "aggregator.db", *(folder / "blobs").rglob("*")]
        return {str(path.relative_to(folder)): path.read_bytes() for path in paths if path.is_file()}


@contextmanager
def built_with(**parts: Any) -> Iterator[None]:
    """Processes that are started meanwhile are made of these parts of `aggregator.assembly` instead of its own."""
    before = {name: getattr(assembly, name) for name in parts}
    try:
        for name, part in parts.items():
            setattr(assembly, name, part)
        yield
    finally:
        for name, part in before.items():
            setattr(assembly, name, part)


@contextmanager
def judged_by(judge: Judge) -> Iterator[None]:
    """Tasks that are loaded meanwhile have their models judged by this."""
    with built_with(
        TaskRunner=lambda task, **fields: TaskRunner(task, **{**fields, "judge": judge}),
    ):
        yield


class Moments:
    """Everything that a process does that another could see, counted; it loses power before one of them.

    Args:
        cut: which, from 0; None for none.
    """

    def __init__(self, cut: int | None = None) -> None:
        self._cut = cut
        self.seen: list[str] = []

    def __call__(self, what: str) -> None:
        if len(self.seen) == self._cut:
            raise PowerCutError(what)
        self.seen.append(what)

    @contextmanager
    def of(self, desk: Desk, name: str = "worker") -> Iterator[None]:
        """Watch one process of a desk: its statements and commits, its blobs, and what it says to the broker."""
        engine, transport = desk.services[name].store.database.engine, desk.transport(name)

        def statement(_connection: object, _cursor: object, text: str, *_rest: object) -> None:
            word = text.split(maxsplit=1)[0]
            if word in ("INSERT", "UPDATE", "DELETE"):  # a cut before a read is one before the write that follows
                self(word)

        def published(topic: str) -> None:
            if "/model/" not in topic:  # a manifest follows
                self(topic)

        def commit(_connection: object) -> None:
            self("COMMIT")

        event.listen(engine, "before_cursor_execute", statement)
        event.listen(engine, "commit", commit)
        desk.blobs.watch, desk.broker.watch, transport.watch = self, published, lambda: self("acknowledge")
        try:
            yield
        finally:
            event.remove(engine, "before_cursor_execute", statement)
            event.remove(engine, "commit", commit)
            desk.blobs.watch, desk.broker.watch, transport.watch = _nothing, _nothing, lambda: None


def _nothing(_what: str) -> None:
    pass


_desks = itertools.count()


@dataclass
class Desk:
    """A database with tasks and devices, and the processes that serve them.

    Args:
        folder: of everything.
        tasks: that are created.
        params: that every bundle holds.
        url: of the database; an SQLite file by default.
        limits: of every process.
        maximum_packet_bytes: of the broker.
        receive_maximum: messages that the broker sends without an acknowledgement.
        is_there: whether the folder holds all of it already.
    """

    folder: Path
    tasks: tuple[TaskConfig, ...] = field(default_factory=lambda: (task_config(),))
    params: NDArray[np.float32] = field(default_factory=lambda: PARAMS)
    url: str | None = None
    limits: IntakeLimits = field(default_factory=IntakeLimits)
    maximum_packet_bytes: int | None = 2048
    receive_maximum: int = 1000
    is_there: bool = False
    clock: VirtualClock = field(default_factory=VirtualClock)
    journal: MemoryJournal = field(default_factory=MemoryJournal)

    def __post_init__(self) -> None:
        self.broker = ObservedBroker(maximum_packet_bytes=self.maximum_packet_bytes)
        is_prepared = self.url is None
        if self.url is None:
            specs = tuple(write_task(task) for task in self.tasks)
            files = {} if self.is_there else prepared_files(specs, self.params.tobytes())
            for name, data in files.items():
                (self.folder / name).parent.mkdir(exist_ok=True, mode=0o700, parents=True)
                (self.folder / name).write_bytes(data)
                (self.folder / name).chmod(0o600)
            self.url = f"sqlite:///{self.folder / 'aggregator.db'}"
        self.blobs = WatchedBlobs(LocalBlobs(self.folder / "blobs", entropy=SeededEntropy(f"blobs {next(_desks)}")))
        self.store = self.open_store()
        """The test's own view of what the processes keep."""
        if not is_prepared:
            self.register(*DEVICES)
            for task in self.tasks:
                create(self.store, self.folder, task, params=self.params)
        self.services: dict[str, AggregatorService] = {}
        self._lives = 0
        self.answers = VirtualTransport(self.broker)
        self.answers.open()
        self.answers.subscribe(f"fl/v1/{TENANT}/down/+/+")
        self.said()

    def open_store(self) -> AggregatorStore:
        """Another connection to the database."""
        return AggregatorStore(Database(str(self.url)), self.blobs)

    def register(self, *names: str) -> None:
        self.store.devices.add_all([(name, device_key(name).public_key().public_bytes_raw()) for name in names], 0.0)

    def create(self, task: TaskConfig, **changes: Any) -> None:
        """What ``covey-aggregator task create`` does."""
        create(self.store, self.folder, task, **{"params": self.params, **changes})

    def open_round(
        self, number: int = 3, *, task: str = TASK, key: RoundKey = ROUND_KEY, version: int = 0, deadline_s: float = 1e9
    ) -> None:
        """Open a round by hand, as a coordinator that is elsewhere would; one that was open is closed."""
        store = self.store
        config = next(one for one in self.tasks if one.name == task)
        length = len(self.params) if config.kind == "train" else config.plan_message().length  # type: ignore[union-attr]
        before = store.tasks.get(task).state
        with store.database.transaction() as connection:
            if before.phase is Phase.OPEN:
                self._close(connection, task, before.number, config)
            store.rounds.open(
                connection,
                task,
                number,
                opened_s=self.clock.now_s(),
                deadline_s=deadline_s,
                key=key,
                sums_secret=SUMS_SECRET,
                version=version,
                model_digest=store.models.digest(connection, task, version),
                update_length=length,
                probability=1.0,
            )
            store.tasks.save(
                connection, task, RoundState(Phase.OPEN, number=number, version=version), before=before, probability=1.0
            )

    def close_round(self, number: int = 3, *, task: str = TASK) -> None:
        """Close a round by hand."""
        config = next(one for one in self.tasks if one.name == task)
        before = self.store.tasks.get(task).state
        with self.store.database.transaction() as connection:
            self._close(connection, task, number, config)
            self.store.tasks.save(
                connection, task, RoundState(Phase.PAUSED, number=number), before=before, probability=1.0
            )

    def _close(self, connection: Any, task: str, number: int, config: TaskConfig) -> None:
        store, now_s = self.store, self.clock.now_s()
        store.rounds.close(connection, task, number, outcome="committed", reason="", metrics={}, now_s=now_s)
        store.updates.drop_partials(connection, task, number)
        store.updates.drop_kept(connection, task, number)
        store.rounds.erase_keys(connection, task, up_to=number - config.policy.maximum_staleness)

    def start(self, name: str = "worker", *, coordinates: bool = False, settles: bool = True) -> AggregatorService:
        """Start a process, or start it again after `kill`, on the same database."""
        self._lives += 1
        service = assembly.make_service(
            tenant=TENANT,
            name=name,
            coordinates=coordinates,
            signing_key=AGGREGATOR_KEY,
            store=self.open_store(),
            transport=WatchedTransport(self.broker, session=name, receive_maximum=self.receive_maximum),
            journal=self.journal,
            entropy=SeededEntropy(f"{name} {self._lives}"),
            now_s=self.clock.now_s,
            monotonic_s=self.clock.now_s,
            limits=self.limits,
        )
        self.services[name] = service
        service.start()
        if settles:
            self.settle()
        return service

    def kill(self, name: str = "worker") -> None:
        """What SIGKILL leaves: the database as the last transaction left it, and the broker's session."""
        killed = self.services.pop(name)
        self.transport_of(killed).drop("killed")
        killed.store.close()

    @staticmethod
    def transport_of(service: AggregatorService) -> WatchedTransport:
        transport: Transport = service.transport
        assert isinstance(transport, WatchedTransport)
        return transport

    def transport(self, name: str = "worker") -> WatchedTransport:
        return self.transport_of(self.services[name])

    def intake(self, name: str = "worker") -> Intake:
        return self.services[name].worker._intake

    def settle(self, steps: int = 4) -> None:
        """Step every process, a few times."""
        for _ in range(steps):
            for service in list(self.services.values()):
                service.step()

    def let_pass(self, seconds: float, *, step_s: float = 0.5) -> None:
        """Time as processes let it pass."""
        for _ in range(round(seconds / step_s)):
            self.clock.time_s += step_s
            for service in list(self.services.values()):
                service.step()

    def take(self, received: Iterable[Received]) -> int:
        """Put messages on the wire; how many updates they completed."""
        before = len(self.accepted())
        for message in received:
            self.broker.publish(message.topic, message.payload, retain=False)
        self.settle()
        return len(self.accepted()) - before

    def restart_broker(self) -> None:
        """A broker that was killed, and has forgotten all sessions."""
        self.broker.restart(keep_retained=True)
        self.answers.subscribe(f"fl/v1/{TENANT}/down/+/+")
        self.settle()

    def said(self) -> list[ReceiptMsg | NackMsg]:
        """Signed answers since the last time, verified."""
        found: list[ReceiptMsg | NackMsg] = []
        while (told := self.answers.poll(0.0)) is not None:
            if isinstance(told, Received):
                kind: type[ReceiptMsg] | type[NackMsg] = ReceiptMsg if told.topic.endswith("/receipt") else NackMsg
                found.append(verify(told.payload, kind, AGGREGATOR_KEY.public_key()))
        return found

    def receipts(self) -> list[ReceiptMsg]:
        """Answers since the last time, which are all receipts."""
        said = self.said()
        assert all(isinstance(answer, ReceiptMsg) for answer in said), said
        return said  # type: ignore[return-value]

    def nack(self) -> NackMsg:
        """The one answer since the last time, a NACK."""
        (answer,) = self.said()
        assert isinstance(answer, NackMsg), answer
        return answer

    def accepted(self, task: str = TASK) -> list[bytes]:
        """The ids of all updates that the database has of a task."""
        table = schema.updates.c
        with self.store.database.reading() as connection:
            query = select(table.update_id).where(table.task == task).order_by(table.update_id)
            return list(connection.execute(query).scalars())

    def refusals(self) -> dict[str, int]:
        """Refusals by reason, those in memory too."""
        for service in self.services.values():
            service.worker._committer.store_counts()
        return self.store.refusals("")

    def total(self, counted_in: int = 3, *, task: str = TASK) -> ExactSum:
        """The sum of all that counts in a round, read from the disk."""
        secrets = {one.number: one.sums_secret for one in self.store.rounds.live() if one.task == task}
        whole = ExactSum.zeros(len(self.params))
        for stored in self.store.updates.partials(task, counted_in):
            place = sum_place((task, counted_in, stored.round), stored.worker)
            sealed = self.store.blobs.get(stored.blob)
            whole.merge(open_sum(sealed, secrets[counted_in], place=place, count=stored.num_updates))
        return whole

    def send_good(self, device: str = "watch-1", *, number: float = 1.0, **changes: Any) -> int:
        """One good update of a device; 1 if it counts."""
        recipient = changes.pop("recipient", ROUND_KEY.recipient())
        update_id = id_of(f"{device} {sorted(changes.items())}")
        envelope = make_update(device, update_id=update_id, body=values(number), recipient=recipient, **changes)
        return self.take(messages(envelope, device, update_id=update_id))

    def everything_on_disk(self) -> dict[str, bytes]:
        """Every file of the folder, by its path in it."""
        return {
            str(path.relative_to(self.folder)): path.read_bytes() for path in self.folder.rglob("*") if path.is_file()
        }


def a_desk(folder: Path, **changes: Any) -> Desk:
    """One worker, and round 3 open."""
    folder.mkdir(parents=True, exist_ok=True)
    desk = Desk(folder, **changes)
    for task in desk.tasks:
        desk.open_round(task=task.name)
    desk.start()
    return desk


def sum_of(*updates: NDArray[np.float32] | float, length: int = D) -> NDArray[np.int64]:
    """What the sum of updates must be, in units of 2^-32, by arithmetic that has no rounding but that of each value."""
    total = [0] * length
    for update in updates:
        array = np.full(length, update, np.float32) if isinstance(update, float) else update
        scaled = np.rint(np.ldexp(array.astype(np.float64), 32))
        total = [one + int(other) for one, other in zip(total, scaled, strict=True)]
    return np.array(total, np.int64)


def broken_committer(*changes: tuple[str, str], **names: Any) -> Any:
    """The committer's class, its source changed on purpose, and these names of its module replaced."""
    copy = broken_copy("aggregator.committer", *changes)
    copy.__dict__.update({"Accepted": committer.Accepted, **names})
    return copy.Committer


def reasons(answers: Iterable[ReceiptMsg | NackMsg]) -> list[RefusalReason | None]:
    """Why each was refused; None for a receipt."""
    return [answer.reason if isinstance(answer, NackMsg) else None for answer in answers]


def bundle_of_small() -> Any:
    return open_bundle(pack_small_bundle(), publisher=PUBLISHER.public_key())
