"""One study's enrolment on a device: carries out what its session asks for, over the store and one connection.

The order is the session's. When the disk refuses, the rest of a batch is dropped and the session begins again from what
is durable, as after a power cut.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from msgspec.structs import replace

from device_client.device_store import study_blob
from device_client.errors import KeyStoreError, StoreError
from device_client.events import Note, Publish, Subscribe, Unsubscribe
from device_client.joining.records import (
    JoiningState,
    decode_state,
    encode_state,
    with_claim,
    with_renewal,
)
from device_client.joining.session import (
    Event,
    Install,
    Installed,
    JoiningSession,
    Keep,
    NotInstalled,
    Prepare,
    Prepared,
)
from device_client.ports import Clock, Store, Transport
from device_client.pseudonyms import DEFAULT_COUNT, Pseudonyms
from fl_protocol.adapters.journal import Journal
from fl_protocol.enrolment import PseudonymAnswer, decode_file
from fl_protocol.errors import ConfigError, LocalMisuseError, ProtocolError
from fl_protocol.integer_noise import Entropy
from fl_protocol.joining import Claim, Token
from fl_protocol.recency import happened_within
from fl_protocol.renewal_proof import RenewalProofMsg, signed_proof
from fl_protocol.signing import public_key_from_hex

KEYS_AGAIN_S = 600.0
"""How long a TPM that failed is left alone: a row of names takes a dozen keys, and each of them a process."""


class Joiner:
    """See the module docstring.

    Args:
        store: of the device.
        names: of the study.
        study: ``tenant/task``.
        entropy: source of keys and names.
        jitter: source of client ids, and spreads what is sent again.
        count: how many names are asked for, 1 to 64.

    Raises:
        StoreError: what is kept cannot be read.
    """

    def __init__(
        self,
        store: Store,
        names: Pseudonyms,
        *,
        study: str,
        entropy: Entropy,
        jitter: Entropy,
        clock: Clock,
        journal: Journal,
        count: int = DEFAULT_COUNT,
    ) -> None:
        self._store, self.names, self.study, self._blob = store, names, study, study_blob("enrolment", study)
        self._entropy, self._jitter, self._clock, self._journal = entropy, jitter, clock, journal
        self._count = count
        self._keys_failed_s: float | None = None
        self.session: JoiningSession | None = None
        self._handlers: dict[type, Callable[[Any, Transport | None], None]] = {
            Keep: lambda action, _way: self._write(action.state),
            Prepare: lambda _action, way: self._prepare(way),
            Install: self._install,
            Subscribe: lambda action, way: way.subscribe(action.topic_filter) if way is not None else None,
            Unsubscribe: lambda action, way: way.unsubscribe(action.topic_filter) if way is not None else None,
            Publish: lambda action, way: (
                way.publish(action.topic, action.payload, expires_s=action.expires_s) if way is not None else None
            ),
            Note: lambda action, _way: self._note(action.event, **action.fields),
        }
        self._begin()

    @property
    def state(self) -> JoiningState | None:
        """What is kept; None for a study that was never asked to join."""
        return None if self.session is None else self.session.state

    @property
    def is_enrolled(self) -> bool:
        """Whether this device got its names of a desk, which also renews them."""
        return self.state is not None and self.state.membership is not None

    @property
    def is_asking(self) -> bool:
        """Whether a request is open that was not refused."""
        return self.session is not None and self.session.is_asking

    @property
    def client(self) -> str:
        """The client id that the desk is asked under; empty while there is no connection."""
        return "" if self.session is None else self.session.client

    def takes(self, topic: str) -> bool:
        """Whether a message of this topic is the desk's answer."""
        return self.session is not None and self.session.takes(topic)

    def open_claim(self, claim: Claim, token: Token, *, anew: bool = False) -> None:
        """Ask to join, or go on asking.

        Args:
            claim: that was held against the token.
            token: of the study.
            anew: forget a request that was not answered, whether it went to the desk or is in a file.

        Raises:
            ConfigError: a request for names by file is open.
            StoreError: the disk does not take it.
        """
        if not anew and self.names.waiting and (self.state is None or self.state.request is None):
            raise ConfigError(
                f"{self.study}: a request for names that covey-device pseudonyms wrote is open; install its answer, or "
                "forget it with --anew"
            )
        self._write(with_claim(self.state, claim, token, entropy=self._entropy, anew=anew))
        self._begin()

    def open_renewal(self) -> None:
        """Ask for further names. Raises StoreError; LocalMisuseError: it is not enrolled, or a request is open."""
        if self.state is None:
            raise LocalMisuseError(f"{self.study}: expected an enrolment to renew")
        self._write(with_renewal(self.state, entropy=self._entropy))
        self._begin()

    def ask_again(self) -> None:
        """Forget that the last request was refused: its cause may be gone. Raises StoreError."""
        state = self.state
        if state is not None and state.refusal is not None:
            request = state.request
            if request is not None and request.enrolment is not None and request.proof is None:
                # Made by software that knew of no proofs: it is prepared anew.
                request = replace(request, names=b"", client="", signed=b"")
            self._write(JoiningState(claim=state.claim, membership=state.membership, request=request))
            self._begin()

    def tell(self, event: Event, way: Transport | None) -> None:
        """Hand one event to the session and do what it asks for.

        Args:
            event: what happened.
            way: the connection to the desk; None where there is none.
        """
        now_s = self._clock.now_s()
        if self.session is None or happened_within(KEYS_AGAIN_S, self._keys_failed_s, now_s):
            return
        try:
            for action in self.session.handle(event, now_s):
                self._handlers[type(action)](action, way)
        except StoreError as error:
            self._keys_failed_s = now_s if isinstance(error, KeyStoreError) else None
            self._note("store_failed", reason=str(error))
            self._begin()

    def _prepare(self, way: Transport | None) -> None:
        """Always names that nobody has seen: a request that was handed on by file must not come this way too."""
        names = self.names.prepare(count=self._count, entropy=self._entropy, anew=True)
        self.tell(Prepared(names, self._proof(names)), way)

    def _proof(self, names: bytes) -> RenewalProofMsg | None:
        """For a renewal: signed by the last of the names that the desk knows, and that are not forgotten."""
        member = self.state.membership if self.state is not None else None
        request = self.state.request if self.state is not None else None
        if member is None or request is None or request.enrolment is None:
            return None
        known = [one for one in self.names.installed() if one.id in member.names or not member.names]
        if not known:
            return None
        study, key = self._claim, self.names.tls_key(known[-1])
        asked = {"tenant": study.tenant, "task": study.task, "enrolment": request.enrolment}
        return signed_proof(known[-1].id, key, names=names, **asked)

    def _install(self, action: Install, way: Transport | None) -> None:
        """Take what was granted, unless a process that was killed has taken it already."""
        try:
            key = public_key_from_hex(self._claim.aggregator_key)
            granted = {one.id for one in decode_file(action.answer, PseudonymAnswer).certificates}
            if not granted <= {one.id for one in self.names.installed()}:
                self.names.install(action.answer, aggregator_key=key, replaces=action.replaces)
        except (ProtocolError, LocalMisuseError) as error:
            self.tell(NotInstalled(str(error)), way)
        else:
            self.tell(Installed(), way)

    @property
    def _claim(self) -> Claim:
        """Whom the device asks. Raises LocalMisuseError."""
        if self.state is None:
            raise LocalMisuseError(f"{self.study}: expected a request to join")
        return self.state.claim

    def _begin(self) -> None:
        """A session from what is durable."""
        raw = self._store.read(self._blob)
        self.session = None if raw is None else JoiningSession(decode_state(raw, study=self.study), jitter=self._jitter)

    def _write(self, state: JoiningState) -> None:
        """Durably replace what is kept."""
        self._store.write(self._blob, encode_state(state))

    def _note(self, event: str, **fields: object) -> None:
        """Write to the journal."""
        self._journal.write(event, at_s=self._clock.now_s(), study=self.study, **fields)


def kept_state(store: Store, study: str) -> JoiningState | None:
    """What is kept of the enrolment in a study (``tenant/task``); None where there is nothing. Raises StoreError."""
    raw = store.read(study_blob("enrolment", study))
    return None if raw is None else decode_state(raw, study=study)
