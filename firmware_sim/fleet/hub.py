"""The middle of a fleet: a broker in memory, the real aggregator with its database, and helpers, in virtual time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aggregator.assembly import make_service
from aggregator.coordinator import Pace
from aggregator.helper.answering import Study
from aggregator.helper.helper_store import HelperDatabase, HelperStore
from aggregator.helper.key_ring import Helper, KeyTerms
from aggregator.helper.service import HelperLimits, HelperService
from aggregator.ingest import OPENER
from aggregator.intake import IntakeLimits
from aggregator.rounds import Phase, RoundState
from aggregator.service import AggregatorService
from aggregator.shards import LeaseTerms
from aggregator.store.aggregator_store import AggregatorStore
from aggregator.store.blobs import Blobs
from aggregator.store.database import Database
from aggregator.task_creation import create_task
from firmware_sim.errors import FleetError
from firmware_sim.fleet.services import RUNNING, Services
from firmware_sim.fleet.windows import Download, Registration, Upload
from firmware_sim.seeded_entropy import SeededEntropy
from firmware_sim.trusted_disk import trust_the_disk
from firmware_sim.unsealed_wire import NoSigner, Values, unsealed
from firmware_sim.virtual_broker import VirtualBroker, VirtualTransport
from firmware_sim.virtual_device import VirtualClock
from fl_protocol.adapters.journal import Journal
from fl_protocol.secagg.terms import HelperIdentity
from fl_protocol.topics import down_filter, parse_upload_topic, round_topic

BUSY_FOR_S = 30.0
"""How long after something happened the aggregator looks around often: transfers may be incomplete, helpers asked."""
BUSY_EVERY_S, IDLE_EVERY_S = 10.0, 7_200.0
"""How often it looks around by itself: renewing its leases takes longer than a hundred devices do. Deadlines it meets
exactly."""
_MOST_STEPS = 100_000


@dataclass(frozen=True)
class HubSettings:
    """What the hub of a fleet is.

    Args:
        seed: of the fleet.
        tenant: name on the wire.
        began_s: Unix seconds of the virtual beginning.
        helpers: names of helpers, each of an operator of its own.
        minimum_cohort: that helpers insist on.
        is_sealed: whether updates are sealed, and anything is signed.
    """

    seed: str
    tenant: str
    began_s: float
    helpers: tuple[str, ...] = ()
    minimum_cohort: int = 2
    is_sealed: bool = True

    def key_of(self, who: str) -> Ed25519PrivateKey:
        """The signing key of the aggregator or a helper."""
        return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(f"{self.seed} identity of {who}".encode()).digest())

    def pinned_helpers(self) -> dict[str, HelperIdentity]:
        """As devices and aggregator are told of them."""
        return {
            name: HelperIdentity(name, f"operator-of-{name}", self.key_of(name).public_key()) for name in self.helpers
        }


class HubState(NamedTuple):
    """What a hub is beside its databases, picklable.

    Args:
        lives: how often each process was started.
        broker: what it keeps.
        services: which are away.
        handed: values that were handed over and are not decided about.
    """

    lives: dict[str, int]
    broker: bytes
    services: Services
    handed: dict[bytes, Values]


class _RunningHelper(NamedTuple):
    """A helper at work, and its connection."""

    service: HelperService
    transport: VirtualTransport

    def kill(self) -> None:
        """What SIGKILL leaves: its store as the last transaction left it, and the broker's session."""
        self.transport.close()
        self.service.store.close()


@dataclass
class Hub:
    """See the module docstring.

    Args:
        folder: for databases.
        settings: see there.
        blobs: large values.
        journal: of the aggregator.
        clock: which it sets.
    """

    folder: Path
    settings: HubSettings
    blobs: Blobs
    journal: Journal
    clock: VirtualClock
    _down: list[Download] = field(default_factory=list, init=False)
    _busy_until_s: float = field(default=0.0, init=False)
    _helpers: dict[str, _RunningHelper] = field(default_factory=dict, init=False)
    _lives: dict[str, int] = field(default_factory=dict, init=False)
    _service: AggregatorService | None = field(default=None, init=False)
    _handed: dict[bytes, Values] = field(default_factory=dict, init=False)
    services: Services = field(default=RUNNING, init=False)

    def __post_init__(self) -> None:
        self.broker = HubBroker(self.settings.tenant, self._down.append)
        self.store = self._open_store()

    def create_task(self, path: Path) -> None:
        """What ``covey-aggregator task create`` does. Raises ConfigError, BundleError."""
        create_task(self.store, path, now_s=self.clock.now_s())

    def start(self) -> None:
        """Start aggregator and helpers, anew or as after `put_down`; not what is away."""
        for name in self.settings.helpers:
            self._start_helper(name)
        if not self.services.aggregator_away:
            self._start_aggregator()

    def kill(self) -> None:
        """What SIGKILL of the aggregator leaves: its database, and the broker's session."""
        if self._service is not None:
            self._service.transport.close()
            self._service.store.close()
            self._service = None

    def put_down(self) -> HubState:
        """End aggregator and helpers, and say what is to be kept beside the databases; `start` goes on."""
        self.kill()
        for helper in self._helpers.values():
            helper.kill()
        self._helpers.clear()
        return HubState(dict(self._lives), self.broker.kept_state(), self.services, dict(self._handed))

    def take_up(self, state: HubState, now_s: float) -> None:
        """Go on from what was put down, before `start`; the same whether this hub put it down or another one.

        Args:
            state: that `put_down` gave.
            now_s: seconds since the virtual beginning.
        """
        self.clock.time_s, self._busy_until_s = self.settings.began_s + now_s, 0.0
        self._lives, self.services = dict(state.lives), state.services
        self.broker.restore(state.broker)
        self._handed.update(state.handed)
        self.broker.is_down = state.services.broker_away

    def retained(self) -> tuple[Download, ...]:
        """What a device that connects finds at the broker."""
        return tuple(Download("", topic, payload) for topic, payload in self.broker.for_devices())

    def register(self, registrations: Sequence[Registration]) -> None:
        """Enrol devices with the aggregator and with every helper."""
        if registrations:
            self.store.devices.add_all(registrations, self.clock.now_s())
            for helper in self._helpers.values():
                helper.service.store.devices.add_all(self.settings.tenant, registrations)

    def work(self, uploads: Iterable[Upload], now_s: float, services: Services | None = None) -> tuple[Download, ...]:
        """Take what arrived, do what is due, and say what goes down.

        Args:
            uploads: in the order in which they arrived.
            now_s: seconds since the virtual beginning.
            services: what is away from now on; None: nothing changes.
        """
        self.clock.time_s = self.settings.began_s + now_s
        before, self.services = self.services, self.services if services is None else services
        self._come_back(before)
        count = 0
        for upload in uploads:
            if upload.values is not None:
                self._handed[parse_upload_topic(upload.topic).update_id] = upload.values
            self.broker.publish(upload.topic, upload.payload, retain=False)
            count += 1
        if self.services.aggregator_away and not before.aggregator_away:
            self._strike_aggregator()
        self._step_until_quiet()
        if self._service is not None:  # all is decided; what was not taken is sent again, its values with it
            self._handed.clear()
        if self.services.broker_away and not before.broker_away:
            self._strike_broker()
        down = tuple(self._down)
        self._down.clear()
        if count or down or self.services != before:
            self._busy_until_s = now_s + BUSY_FOR_S
        return down

    def _come_back(self, before: Services) -> None:
        """Start what is not away any more."""
        if before.broker_away and not self.services.broker_away:
            self.broker.come_up()
            self._note("broker_up", "broker")
        if before.aggregator_away and not self.services.aggregator_away:
            self._start_aggregator()
            self._note("aggregator_started", "aggregator")

    def _strike_aggregator(self) -> None:
        """Kill the aggregator in the middle of what it does."""
        for _ in range(self.services.steps if self._service is not None else 0):
            self._step()
        self.kill()
        self._note("aggregator_killed", "aggregator")

    def _strike_broker(self) -> None:
        """The broker dies, and with it what it has not handed on."""
        services = self.services
        self.broker.go_down(keep_retained=services.keeps_retained, keep_sessions=services.keeps_sessions)
        self._down[:] = [one for one in self._down if services.lets_through(one.device)]
        self._note("broker_down", "broker")

    def _note(self, event: str, service: str) -> None:
        """Tell the run what happened to a service."""
        self.journal.write(event, at_s=self.clock.now_s(), device=service)

    def next_wake_s(self, now_s: float) -> float:
        """When it has to look around again by itself, seconds since the virtual beginning."""
        every_s = BUSY_EVERY_S if now_s < self._busy_until_s else IDLE_EVERY_S
        deadlines_s = [state.deadline_s - self.settings.began_s for state in self._states() if state.deadline_s]
        return min([now_s + every_s, *(deadline_s for deadline_s in deadlines_s if deadline_s > now_s)])

    @property
    def is_finished(self) -> bool:
        """Whether every task has come to its end, or was paused or aborted for a reason of its own."""
        final = {Phase.FINISHED, Phase.ABORTED, Phase.PAUSED}
        states = self._states()
        return bool(states) and all(state.phase in final for state in states)

    def close(self) -> None:
        """End everything."""
        self.kill()
        for helper in self._helpers.values():
            helper.kill()
        self.store.close()

    def _states(self) -> list[RoundState]:
        """Where the tasks stand."""
        coordinator = self._service.coordinator if self._service is not None else None
        return [runner.state for runner in coordinator.tasks.values()] if coordinator is not None else []

    def _step_until_quiet(self) -> None:
        """Let everybody work until nothing is left to do at this moment."""
        for _ in range(_MOST_STEPS):
            self._step()
            if not self._is_busy:
                return
        raise FleetError(f"the aggregator did not come to rest after {_MOST_STEPS} steps at one moment")

    def _step(self) -> None:
        """Let everybody work once."""
        for helper in self._helpers.values():
            helper.service.step()
        if self._service is not None:
            self._service.step()

    @property
    def _is_busy(self) -> bool:
        """Whether somebody has something to do now."""
        worker = self._service.worker if self._service is not None else None
        return self.broker.has_events or (worker is not None and (worker.wants_to_commit or worker.waits_for_commit))

    def _start_aggregator(self) -> None:
        life = self._life("aggregator")
        settings = self.settings
        self._service = make_service(
            tenant=settings.tenant,
            name="aggregator",
            coordinates=True,
            signing_key=settings.key_of("aggregator") if settings.is_sealed else NoSigner(),
            opener=OPENER if settings.is_sealed else unsealed(self._handed),
            store=self._open_store(),
            transport=VirtualTransport(self.broker, session="aggregator", manual_acknowledgement=True),
            journal=self.journal,
            entropy=SeededEntropy(life),
            now_s=self.clock.now_s,
            monotonic_s=self.clock.now_s,
            limits=IntakeLimits(),
            helpers=settings.pinned_helpers(),
            # Nobody would take over a lease that has run out, nor gives an order: each look costs as much as a commit.
            leases=LeaseTerms(lease_s=110.0, renew_every_s=IDLE_EVERY_S),
            pace=Pace(orders_every_s=IDLE_EVERY_S, sweep_every_s=IDLE_EVERY_S),
        )
        self._service.start()

    def _start_helper(self, name: str) -> None:
        settings, life = self.settings, self._life(name)
        database = HelperDatabase(self.folder / f"{name}.db")
        trust_the_disk(database.engine)
        transport = VirtualTransport(self.broker, session=name, manual_acknowledgement=True)
        service = HelperService(
            Helper(name, f"operator-of-{name}", settings.key_of(name)),
            studies=[Study(settings.tenant, settings.key_of("aggregator").public_key())],
            transports={settings.tenant: transport},
            store=HelperStore(database),
            journal=self.journal,
            entropy=SeededEntropy(life),
            now_s=self.clock.now_s,
            limits=HelperLimits(minimum_cohort=settings.minimum_cohort),
            key_terms=KeyTerms("x25519"),
            wait=lambda _longest_s: None,
        )
        service.start()
        self._helpers[name] = _RunningHelper(service, transport)

    def _open_store(self) -> AggregatorStore:
        """A connection to the database."""
        database = Database(f"sqlite:///{self.folder / 'aggregator.db'}")
        database.engine.dispose()
        trust_the_disk(database.engine)
        return AggregatorStore(database, self.blobs)

    def _life(self, name: str) -> str:
        """A seed for one life of a process: no two lives draw the same random numbers."""
        self._lives[name] = self._lives.get(name, 0) + 1
        return f"{self.settings.seed} {name} {self._lives[name]}"


class HubBroker(VirtualBroker):
    """A broker that also hands on what is meant for devices.

    Args:
        tenant: name on the wire.
        hand_on: takes it.
    """

    def __init__(self, tenant: str, hand_on: Callable[[Download], None]) -> None:
        super().__init__()
        self._hand_on = hand_on
        rounds = round_topic(tenant, "x").removesuffix("x")
        self._retained_for = rounds, rounds.removesuffix("round/") + "model/"
        self._down = down_filter(tenant, "x").removesuffix("x/+")

    @property
    def has_events(self) -> bool:
        """Whether somebody has messages that were not taken."""
        return any(client.has_events for client in (*self._clients, *self._waiting))

    def for_devices(self) -> list[tuple[str, bytes]]:
        """What is retained for devices, by topic."""
        return [(topic, payload) for topic, payload in self.retained.items() if topic.startswith(self._retained_for)]

    def publish(self, topic: str, payload: bytes, *, retain: bool) -> None:
        """Deliver, keep, and hand on."""
        if topic.startswith(self._down):
            self._hand_on(Download(topic.removeprefix(self._down).split("/")[0], topic, payload))
            return
        super().publish(topic, payload, retain=retain)
        if retain and topic.startswith(self._retained_for):
            self._hand_on(Download("", topic, payload))
