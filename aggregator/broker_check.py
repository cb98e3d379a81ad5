"""Holds a running broker against what its configuration should forbid, by trying it as two made-up devices.

Each check says what was tried, what came of it, and whether it holds. The devices' names are pseudonyms that nobody
has; their certificates last minutes. No other client is disturbed: an aggregator that is running gets one chunk from a
device that it does not know, and drops it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from aggregator.adapters.broker_probe import Probe
from aggregator.certificates import KeyPair, issue, make_ca
from fl_protocol.adapters.mqtt import TlsFiles
from fl_protocol.integer_noise import Entropy
from fl_protocol.limits import MAX_PACKET_BYTES, PACKET_RESERVE_BYTES
from fl_protocol.topics import (
    down_topic,
    enrolment_topic,
    helper_topic,
    model_topic,
    round_topic,
    state_topic,
    upload_topic,
)

_LASTS_S = 900.0
_NOT_AUTHORISED = 0x80
"""Reason codes from here on are refusals (MQTT 5, section 2.4)."""
_QUIET_S = 0.6
"""How long is waited for what must not come."""


class Finding(NamedTuple):
    """What one check found; `holds` None: it could not be tried."""

    check: str
    holds: bool | None
    detail: str


@dataclass(frozen=True)
class Yard:
    """Where is tried, and with what.

    Args:
        host: of the broker.
        port: of the broker.
        ca: that certifies its clients.
        tenant: of the study.
        task: any of the study.
        server: the broker's own certificate and key, if they are at hand.
        entropy: for names.
        now_s: Unix seconds.
        folder: for certificates; a temporary one.
    """

    host: str
    port: int
    ca: KeyPair
    tenant: str
    task: str
    entropy: Entropy
    now_s: float
    folder: Path
    server: TlsFiles | None = None

    def identity(self, name: str, *, ca: KeyPair | None = None, now_s: float | None = None) -> TlsFiles:
        """A client certificate of this name, in files."""
        pair = issue(ca or self.ca, name, now_s=self.now_s if now_s is None else now_s, valid_s=_LASTS_S)
        place = self.folder / self.entropy(8).hex()
        place.mkdir(mode=0o700)
        (place / "it.pem").write_bytes(pair.certificate)
        (place / "it.key").write_bytes(pair.key)
        return TlsFiles(self.ca_file, place / "it.pem", place / "it.key")

    @property
    def ca_file(self) -> Path:
        """The CA's certificate."""
        path = self.folder / "ca.pem"
        path.write_bytes(self.ca.certificate)
        return path

    def name(self) -> str:
        """A pseudonym that nobody has."""
        return "p" + self.entropy(16).hex()

    def probe(self, name: str, identity: TlsFiles | None, *, tls_1_2: bool = False) -> Probe:
        """A client, not connected."""
        return Probe(self.host, self.port, name, self.ca_file, identity, tls_1_2)

    @contextmanager
    def device(self, name: str | None = None) -> Iterator[tuple[str, Probe]]:
        """A connected device. Raises ConnectionError."""
        name = name or self.name()
        with self.probe(name, self.identity(name)) as probe:
            if not probe.connect():
                raise ConnectionError(probe.refusal)
            yield name, probe


def check_broker(yard: Yard) -> list[Finding]:
    """All checks, one after the other.

    Args:
        yard: its `folder` is made here.
    """
    found = []
    with tempfile.TemporaryDirectory() as folder:
        there = replace(yard, folder=Path(folder))
        for name, check in _CHECKS.items():
            try:
                holds, detail = check(there)
            except ConnectionError as error:
                holds, detail = None, f"a device with a good certificate was not let in: {error}"
            found.append(Finding(name, holds, detail))
    return found


Outcome = tuple[bool | None, str]


def _is_kept_out(probe: Probe) -> Outcome:
    """Whether a client is not let in, or put out before it could do anything."""
    with probe:
        if not probe.connect():
            return True, f"refused: {probe.refusal}"
        probe.wait(_QUIET_S)
        return (True, f"put out: {probe.refusal}") if not probe.is_connected else (False, "it was let in")


def _without_certificate(yard: Yard) -> Outcome:
    return _is_kept_out(yard.probe(yard.name(), None))


def _with_another_ca(yard: Yard) -> Outcome:
    name, other = yard.name(), make_ca("another", now_s=yard.now_s)
    return _is_kept_out(yard.probe(name, yard.identity(name, ca=other)))


def _with_an_expired_certificate(yard: Yard) -> Outcome:
    name = yard.name()
    return _is_kept_out(yard.probe(name, yard.identity(name, now_s=yard.now_s - 86_400)))


def _with_a_later_certificate(yard: Yard) -> Outcome:
    name = yard.name()
    return _is_kept_out(yard.probe(name, yard.identity(name, now_s=yard.now_s + 86_400)))


def _with_a_servers_certificate(yard: Yard) -> Outcome:
    if yard.server is None:
        return None, "not tried: name the folder of broker.pem and broker.key with --broker"
    return _is_kept_out(yard.probe("broker", yard.server))


def _over_tls_1_2(yard: Yard) -> Outcome:
    name = yard.name()
    return _is_kept_out(yard.probe(name, yard.identity(name), tls_1_2=True))


def _under_anothers_client_id(yard: Yard) -> Outcome:
    with yard.device() as (victim, line), yard.probe(victim, yard.identity(yard.name())) as thief:
        thief.connect()
        line.wait(_QUIET_S)
        return line.is_connected, "the other stayed connected" if line.is_connected else "the other's connection ended"


def _foreign_topics(yard: Yard, victim: str) -> dict[str, str]:
    """What a device must not publish to."""
    update = yard.entropy(16)
    return {
        "another's uploads": upload_topic(yard.tenant, victim, update, 0),
        "another's presence": state_topic(yard.tenant, victim),
        "receipts": down_topic(yard.tenant, victim, "receipt"),
        "manifests": round_topic(yard.tenant, f"{yard.task}-check"[:64]),
        "models": model_topic(yard.tenant, yard.entropy(32), 0),
        "a helper's key": helper_topic(yard.tenant, victim, "key"),
        "another's enrolment": enrolment_topic(yard.tenant, victim, "request"),
        "another tenant": upload_topic(f"{yard.tenant}-x"[:64], victim, update, 0),
        "the broker's own": "$SYS/check",
    }


def _publishing_elsewhere(yard: Yard) -> Outcome:
    victim, taken = yard.name(), []
    for what, topic in _foreign_topics(yard, victim).items():
        with yard.device() as (_, line):
            code = line.publish(topic, b"")
            if code is not None and code < _NOT_AUTHORISED:
                taken.append(what)
    return not taken, f"taken: {', '.join(taken)}" if taken else "each was refused"


def _publishing_under_ones_own_name(yard: Yard) -> Outcome:
    with yard.device() as (name, line):
        code = line.publish(upload_topic(yard.tenant, name, yard.entropy(16), 0), b"covey broker check")
    is_taken = code is not None and code < _NOT_AUTHORISED
    return is_taken, "it was taken" if is_taken else f"it was refused ({code}), so no device can send an update"


def _reading_others(yard: Yard) -> Outcome:
    root = f"fl/v1/{yard.tenant}"
    with ExitStack() as stack:
        (name, victim), (_, reader) = (stack.enter_context(yard.device()) for _ in range(2))
        for topic_filter in (
            "#",
            "+/#",
            f"{root}/#",
            f"{root}/state/+",
            f"{root}/up/#",
            state_topic(yard.tenant, name),
        ):
            reader.subscribe(topic_filter)
        marker = yard.entropy(16)
        victim.publish(state_topic(yard.tenant, name), marker)
        victim.publish(upload_topic(yard.tenant, name, marker, 0), marker)
        reader.wait(_QUIET_S)
        came = sorted({one.topic for one in reader.arrived if one.payload == marker})
    return not came, f"it read {', '.join(came)}" if came else "nothing came"


def _a_packet_too_large(yard: Yard) -> Outcome:
    with yard.device() as (name, line):
        size = MAX_PACKET_BYTES + 2 * PACKET_RESERVE_BYTES
        code = line.publish(upload_topic(yard.tenant, name, yard.entropy(16), 0), bytes(size))
    is_taken = code is not None and code < _NOT_AUTHORISED
    return not is_taken, f"{size} bytes were taken" if is_taken else f"{size} bytes were refused"


_CHECKS: dict[str, Callable[[Yard], Outcome]] = {
    "a device with its certificate may send its updates": _publishing_under_ones_own_name,
    "nobody without a certificate": _without_certificate,
    "nobody with another CA's": _with_another_ca,
    "nobody with one that has ended": _with_an_expired_certificate,
    "nobody with one that has not begun": _with_a_later_certificate,
    "nobody with a server's": _with_a_servers_certificate,
    "nothing below TLS 1.3": _over_tls_1_2,
    "nobody under another's client id": _under_anothers_client_id,
    "no publishing to others' topics": _publishing_elsewhere,
    "no reading of what others send": _reading_others,
    "no packet larger than agreed": _a_packet_too_large,
}
