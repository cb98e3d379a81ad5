"""A closed round of masked updates: what its helpers are asked, and how far that is."""

from __future__ import annotations

from aggregator.errors import CombineError, MissingBlobError
from aggregator.helper_calls import HelperCalls, RoundAsked
from aggregator.round_events import CombineFailed, StillMasked, Unmasked
from aggregator.store.aggregator_store import AggregatorStore
from aggregator.store.rounds import LiveRound
from fl_protocol.errors import ProtocolError
from fl_protocol.messages import RoundManifestMsg, decode
from fl_protocol.secagg.messages import MaskSumMsg, SecureBodyMsg, UnmaskRequestMsg
from fl_protocol.secagg.parties import entry_at
from fl_protocol.secagg.terms import helper_keys, manifest_digest


class Unmasking:
    """The rounds of one task.

    Args:
        task: name on the wire.
        store: the database.
        calls: to the helpers.
    """

    def __init__(self, task: str, store: AggregatorStore, calls: HelperCalls) -> None:
        self._task, self._store, self._calls = task, store, calls
        self._failure = ""

    @property
    def sums(self) -> tuple[MaskSumMsg, ...]:
        """What all helpers answered; nothing as long as one has not."""
        return self._calls.answers(self._task) or ()

    def ask(self, number: int) -> None:
        """Ask for a closed round's masks, unless that is done already. Raises DatabaseError: try again."""
        try:
            self._ask(number)
        except (CombineError, MissingBlobError, ProtocolError) as error:  # waiting would not mend it
            self._failure = f"its helpers could not be asked: {error}"

    def _ask(self, number: int) -> None:
        """As `ask`; CombineError, MissingBlobError, ProtocolError: what is stored of the round cannot be used."""
        self._failure = ""
        live = self._live(number)
        if live is None or live.manifest is None:
            raise CombineError("the round's manifest is gone; abort the round")
        manifest = decode(live.manifest, RoundManifestMsg)
        about = RoundAsked(self._task, number, manifest_digest(manifest))
        if not self._calls.is_asked(about):
            self._calls.ask(about, self._requests(number, manifest))

    def done(self) -> None:
        """The round is over."""
        self._calls.forget(self._task)
        self._failure = ""

    def event(self) -> Unmasked | StillMasked | CombineFailed:
        """How far it is, for the round table."""
        if self._failure:
            return CombineFailed(self._failure)
        if self._calls.answers(self._task) is not None:
            return Unmasked()
        refusal = self._calls.refusal(self._task)
        return CombineFailed(refusal) if refusal else StillMasked(self._calls.missing(self._task))

    def _live(self, number: int) -> LiveRound | None:
        """The round's row."""
        rounds = self._store.rounds.live()
        return next((one for one in rounds if (one.task, one.number) == (self._task, number)), None)

    def _requests(self, number: int, manifest: RoundManifestMsg) -> dict[str, UnmaskRequestMsg]:
        """What each helper is asked: the same list, with its own seeds."""
        if manifest.secure is None:
            raise CombineError("the round's manifest is of no secure round; abort the round")
        signed = self._calls.signed(manifest)
        bodies = self._entries(number)
        return {
            helper: UnmaskRequestMsg(
                manifest=signed,
                helper=helper,
                entries=tuple(entry_at(body, index) for body in bodies),
            )
            for index, helper in enumerate(helper_keys(manifest.secure))
        }

    def _entries(self, number: int) -> list[SecureBodyMsg]:
        """What is kept of each update, in the order of their ids; each segment is read once."""
        kept = self._store.updates.kept(self._task, number)
        segments = {name: self._store.blobs.get(name) for name in {one.segment for one in kept}}
        return [decode(segments[one.segment][one.start : one.start + one.length], SecureBodyMsg) for one in kept]
