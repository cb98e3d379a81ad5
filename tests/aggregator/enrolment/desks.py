"""A desk with its database, and devices that ask it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec import UNSET, UnsetType

from aggregator.admission import Admitter
from aggregator.enrolment import desk as desk_module
from aggregator.enrolment.register import add_tokens, set_quota
from aggregator.store.aggregator_store import AggregatorStore
from device_client.pseudonyms import Pseudonyms
from firmware_sim.seeded_entropy import SeededEntropy
from fl_protocol.enrolment import DAY_S
from fl_protocol.joining import (
    SECRET_BYTES,
    Address,
    EnrolmentAnswerMsg,
    EnrolmentRequestMsg,
    StudyPins,
    signed_request,
    token_digest,
)
from fl_protocol.renewal_proof import RenewalProofMsg, signed_proof
from fl_protocol.sealing import RoundKey
from tests.device_client.ports import MemoryStore
from tests.enrolments import AGGREGATOR, CA, NOW_S, TASK, TENANT, Office

PINS = StudyPins(publisher_key=b"\x11" * 32, helpers=(), broker=Address("broker.example", 8883))


@dataclass
class Asking:
    """A device that wants to join.

    Args:
        name: its keys follow from it.
    """

    name: str
    store: MemoryStore = field(default_factory=MemoryStore)

    def __post_init__(self) -> None:
        self.entropy = SeededEntropy(self.name)
        self.renewal = Ed25519PrivateKey.from_private_bytes(self.entropy(32))
        self.answer_key = RoundKey("x25519", self.entropy(32))
        self.names = Pseudonyms(self.store, tenant=TENANT, task=TASK)
        self.client = "c" + self.entropy(16).hex()

    def request(
        self, token: bytes | None, *, count: int = 3, anew: bool = False, **changes: Any
    ) -> EnrolmentRequestMsg:
        """What it asks, for a token or, without one, as a renewal."""
        names = self.names.prepare(count=count, entropy=self.entropy, anew=anew)
        content: dict[str, Any] = {
            "tenant": TENANT,
            "task": TASK,
            "client": self.client,
            "token": token,
            "enrolment": None if token is not None else self.enrolment,
            "renewal_key": self.renewal.public_key().public_bytes_raw(),
            "answer_to": self.answer_key.recipient(),
            "names": names,
            "proof": UNSET if token is not None else self.proof(names),
        }
        return EnrolmentRequestMsg(**(content | changes))

    @property
    def enrolment(self) -> str:
        """What its enrolment is called."""
        return desk_module.enrolment_id(self.renewal.public_key().public_bytes_raw())

    def proof(self, names: bytes, **changes: Any) -> RenewalProofMsg | UnsetType:
        """That it renews with these names, by the last that it has; none where it has none."""
        if not (installed := self.names.installed()):
            return UNSET
        one = installed[-1]
        said = {"tenant": TENANT, "task": TASK, "enrolment": self.enrolment, "names": names}
        return signed_proof(one.id, self.names.tls_key(one), **(said | changes))

    def install(self, answer: EnrolmentAnswerMsg) -> None:
        """Take what it was granted."""
        self.names.install(answer.names, aggregator_key=AGGREGATOR.public_key())


class DeskOffice:
    """A desk of one study.

    Args:
        module: with its code.
        store: the database; one in memory by default.
        key: the aggregator's.
        period_days: how long each name is for.
    """

    def __init__(
        self,
        module: ModuleType = desk_module,
        store: AggregatorStore | None = None,
        *,
        key: Ed25519PrivateKey = AGGREGATOR,
        period_days: int = 30,
    ) -> None:
        if store is None:
            store = Office().store
        self.admitter = Admitter(store, TENANT, CA, key, period_days)
        self.store, self.desk = store, module.Desk(self.admitter, {TASK: PINS})
        self._entropy = SeededEntropy("tokens")
        self.quota("ward-3", 100)

    def quota(self, owner: str, quota: int) -> None:
        """Say how many devices an owner may have."""
        with self.store.database.transaction() as connection:
            set_quota(connection, owner, quota, now_s=NOW_S)

    def token(self, *, owner: str = "ward-3", task: str = TASK, days: float = 7) -> bytes:
        """A new token's secret."""
        secret = self._entropy(SECRET_BYTES)
        with self.store.database.transaction() as connection:
            add_tokens(
                connection, [token_digest(secret)], owner=owner, task=task, now_s=NOW_S, expires_s=NOW_S + days * DAY_S
            )
        return secret

    def ask(self, device: Asking, request: EnrolmentRequestMsg, *, now_s: float = NOW_S) -> EnrolmentAnswerMsg:
        """The answer to a request."""
        digest = hashlib.sha256(signed_request(request, device.renewal)).digest()
        answer: EnrolmentAnswerMsg = self.desk.answer(request, digest, now_s=now_s)
        return answer

    def change(self, action: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Something that an operator does to the register."""
        with self.store.database.transaction() as connection:
            return action(connection, *arguments, **named)
