"""A study with its desk on a virtual broker, and devices that join it, in virtual time."""

from __future__ import annotations

import base64
from collections.abc import Callable
from types import ModuleType
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aggregator.certificates import KeyPair, issue
from aggregator.enrolment import service as service_module
from aggregator.enrolment.service import DeskKeys, Pacing
from device_client.events import Tick
from device_client.joining import joiner as joiner_module
from device_client.joining import session as session_module
from device_client.joining.joiner import Joiner
from device_client.joining.session import Offline, Online
from device_client.pseudonyms import Pseudonyms
from firmware_sim.faults.packets import FaultyTransport, PacketRates
from firmware_sim.labelled_chance import key_of
from firmware_sim.seeded_entropy import SeededEntropy
from firmware_sim.virtual_broker import VirtualBroker, VirtualTransport
from firmware_sim.virtual_device import VirtualClock
from fl_protocol.enrolment import DAY_S
from fl_protocol.joining import Address, Claim, StudyPins, Token, parse_token, token_text
from fl_protocol.sealing import RoundKey
from fl_protocol.transport import Connected, Disconnected, Received, Transport
from tests.aggregator.enrolment.desks import DeskOffice
from tests.device_client.ports import MemoryStore
from tests.enrolments import AGGREGATOR, CA, NOW_S, TASK, TENANT, broken_copy
from tests.virtual_fleet import MemoryJournal

STUDY = f"{TENANT}/{TASK}"
DESK_KEY = RoundKey("x25519", b"\x0d" * 32)
_CLAIM_PAIR = issue(CA, "claim", now_s=NOW_S)


def claim_of(*, ca: KeyPair = CA, key: Ed25519PrivateKey = AGGREGATOR, **changes: Any) -> Claim:
    """The study's claim."""
    content: dict[str, Any] = {
        "format": "covey-claim-1",
        "tenant": TENANT,
        "task": TASK,
        "aggregator_key": key.public_key().public_bytes_raw().hex(),
        "kem": "x25519",
        "enrolment_key": base64.b64encode(DESK_KEY.recipient().public_key).decode(),
        "ca": ca.certificate.decode(),
        "broker": Address("claims.example", 8884),
        "certificate": _CLAIM_PAIR.certificate.decode(),
        "key": _CLAIM_PAIR.key.decode(),
    }
    return Claim(**(content | changes))


def broken_joiner(change: tuple[str, str]) -> ModuleType:
    """The joiner over a session that was broken on purpose."""
    session = broken_copy("device_client.joining.session", change)
    for name in ("Install", "Installed", "Keep", "NotInstalled", "Offline", "Online", "Prepare", "Prepared"):
        setattr(session, name, getattr(session_module, name))
    joiner = broken_copy("device_client.joining.joiner")
    joiner.JoiningSession = session.JoiningSession  # type: ignore[attr-defined]
    return joiner


class DeskRig:
    """The desk's office and its process, on a virtual broker for claims and renewals alike.

    Args:
        office: decides.
        a_minute: how many requests are taken.
        faults: of every device's connection.
        clock: of the desk.
        broker: where devices join.
        others: brokers of the study itself.
        signs: the aggregator's key.
        pacing: of the desk, made for so many requests a minute.
        service: module with the desk's process.
        pins: what devices of each task pin; None: it stays as the office has it.
    """

    def __init__(
        self,
        office: DeskOffice | None = None,
        *,
        a_minute: int = 6000,
        faults: PacketRates | None = None,
        clock: VirtualClock | None = None,
        broker: VirtualBroker | None = None,
        others: tuple[VirtualBroker, ...] = (),
        signs: Ed25519PrivateKey = AGGREGATOR,
        pacing: Callable[[int], Pacing] = Pacing,
        service: ModuleType = service_module,
        pins: Callable[[], dict[str, StudyPins]] | None = None,
    ) -> None:
        self.office = office if office is not None else DeskOffice()
        self.clock = clock if clock is not None else VirtualClock(NOW_S)
        self.broker = broker if broker is not None else VirtualBroker()
        self.faults = faults if faults is not None else PacketRates()
        self.journal, self.claim = MemoryJournal(), claim_of()
        self.service = service.DeskService(
            self.office.desk,
            tenant=TENANT,
            keys=DeskKeys(DESK_KEY, signs),
            transports=[VirtualTransport(one) for one in (self.broker, *others)],
            journal=self.journal,
            now_s=self.clock.now_s,
            pacing=pacing(a_minute),
            wait=lambda _s: None,
            pins=pins,
        )
        self.service.start()
        self.service.step()

    def token(self, **named: Any) -> Token:
        """A new token, as a wearer gets it."""
        return parse_token(token_text(self.office.token(**named), self.claim))

    def transport(self, label: str) -> Transport:
        """A device's connection, with the network's faults both ways."""
        inner = VirtualTransport(self.broker)
        return FaultyTransport(inner, down=lambda: self.faults, up=lambda: self.faults, key=key_of(label))

    def outcomes(self) -> list[str]:
        """What the desk answered."""
        return [
            fields["outcome"]
            for name, fields in self.journal.events
            if name in {"enrolment_request_granted", "enrolment_request_refused"}
        ]


class JoiningDevice:
    """One device that joins, killed and started again as often as a test likes.

    Args:
        rig: the study.
        name: its randomness follows from it.
    """

    def __init__(
        self,
        rig: DeskRig,
        name: str = "a",
        *,
        store: MemoryStore | None = None,
        module: ModuleType = joiner_module,
        ahead_s: float = 0.0,
    ) -> None:
        self.rig, self.name, self.module = rig, name, module
        self.store = store if store is not None else MemoryStore()
        self.clock = VirtualClock(rig.clock.time_s + ahead_s)
        self.ahead_s, self.lives, self.journal = ahead_s, 0, MemoryJournal()
        self.start()

    def start(self) -> None:
        """A process on what is in the store."""
        self.lives += 1
        life = f"{self.name} {self.lives}"
        self.names = Pseudonyms(self.store, tenant=TENANT, task=TASK)
        self.joiner: Joiner = self.module.Joiner(
            self.store,
            self.names,
            study=STUDY,
            entropy=SeededEntropy(life),
            jitter=SeededEntropy(f"{life} jitter"),
            clock=self.clock,
            journal=self.journal,
            count=3,
        )
        request = self.joiner.state.request if self.joiner.state is not None else None
        drawn = "c" + SeededEntropy(f"{life} client")(16).hex()
        self.client = request.client if request is not None and request.client else drawn
        self.way = self.rig.transport(f"network of {life}")
        self.way.open()

    def restart(self) -> None:
        """What a kill leaves is what is in the store."""
        self.way.close()
        self.store = self.store.after_restart()
        self.start()

    def step(self) -> None:
        """Act on what has come, and on the time."""
        self.clock.time_s = self.rig.clock.time_s + self.ahead_s
        while (event := self.way.poll(0.0)) is not None:
            match event:
                case Connected():
                    self.joiner.tell(Online(self.client), self.way)
                case Disconnected():
                    self.joiner.tell(Offline(), self.way)
                case Received():
                    self.joiner.tell(event, self.way)
        session = self.joiner.session
        if session is not None and session.is_asking and not session.client:
            self.joiner.tell(Online(self.client), self.way)
        self.joiner.tell(Tick(), self.way)

    @property
    def outcome(self) -> str:
        """Why it was refused; empty if it was not."""
        state = self.joiner.state
        return state.refusal.outcome if state is not None and state.refusal is not None else ""


def run(rig: DeskRig, *devices: JoiningDevice, until: Callable[[], bool], most_s: float = DAY_S) -> None:
    """Let virtual time pass, a second a step."""
    ends_s = rig.clock.time_s + most_s
    while not until():
        if rig.clock.time_s >= ends_s:
            raise AssertionError(f"not done after {most_s} virtual seconds")
        for _ in range(2):
            for device in devices:
                device.step()
            rig.service.step()
        rig.clock.time_s += 1.0


def join(rig: DeskRig, device: JoiningDevice, token: Token | None = None, **named: Any) -> Token:
    """Have a device ask with a token until something comes of it."""
    used = token if token is not None else rig.token()
    device.joiner.open_claim(rig.claim, used, **named)
    run(rig, device, until=lambda: not device.joiner.is_asking)
    return used
