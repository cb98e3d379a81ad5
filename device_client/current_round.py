"""The round that the newest good manifest names: how far a device is in it, its downloads, and both in words. Pure.

What is decided about a round is the session's business; here is what follows from where it stands.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from device_client.downloads import Download
from device_client.events import Action, DropChunks, Note
from device_client.model_route import WHOLE, ModelRoute, arrive
from fl_protocol.errors import ProtocolError
from fl_protocol.messages import RoundManifestMsg, StatisticsPlanMsg, TrainingPlanMsg

CLOCK_MARGIN_S = 600.0
"""How far this device's clock may be behind the aggregator's."""

LATE_S = 3600.0
"""How long past its deadline an asynchronous round is still waited for, if nothing is heard: such a deadline is moved,
or a newer round opens."""

Phase = Literal["undecided", "busy", "waiting", "counting", "fetching", "reading", "training", "idle"]
"""``busy``: not decided while work on an earlier round goes on; ``reading``: the kept model."""


def waiting_ends_s(manifest: RoundManifestMsg) -> float:
    """When an open round is not begun any more if nothing newer is heard, Unix seconds."""
    return manifest.deadline_s + (LATE_S if manifest.maximum_staleness else 0.0)


def work_ends_s(manifest: RoundManifestMsg) -> float:
    """When work that was begun, and charged, is given up by the clock, Unix seconds.

    Never for an asynchronous round: only a newer manifest tells that its update would count no more.
    """
    return math.inf if manifest.maximum_staleness else manifest.deadline_s


def counts_still(earlier: RoundManifestMsg, newest: RoundManifestMsg) -> bool:
    """Whether an update of a round counts in the newest one, or in the one after a pause."""
    if newest.status not in {"open", "paused"}:
        return False
    number = newest.round + (newest.status == "paused")
    return number - earlier.round <= earlier.maximum_staleness


class WrongModelError(ProtocolError):
    """Chunks that the aggregator signed do not make up what the manifest names."""

    def __init__(self, digest: bytes, reason: str) -> None:
        super().__init__(reason)
        self.digest = digest


@dataclass
class CurrentRound:
    """See the module docstring.

    Args:
        manifest: verified, of this study, within the wearer's floors.
        trains: whether this device would train for it, or only measure its model.
        why_idle: in words, once nothing is left to do.
    """

    manifest: RoundManifestMsg
    trains: bool
    phase: Phase = "undecided"
    why_idle: str = ""
    downloads: list[Download] = field(default_factory=list)
    route: ModelRoute = WHOLE
    model: NDArray[np.float32] | None = None  # from the kept one

    @property
    def clock_is_plausible_from_s(self) -> float:
        """Until then, by this device's clock, the round was opened in the future: the clock is wrong."""
        return self.manifest.opened_s - CLOCK_MARGIN_S

    @property
    def is_before_training(self) -> bool:
        """Whether it is on its way to training, or to measuring."""
        return self.phase in {"waiting", "counting", "fetching", "reading"}

    @property
    def gives_up_at_s(self) -> float:
        """When what has not begun to train is given up; a model can be measured at any time."""
        return waiting_ends_s(self.manifest) if self.trains and self.is_before_training else math.inf

    @property
    def is_fetched(self) -> bool:
        """Whether all it needs is here."""
        return self.phase == "fetching" and all(download.is_whole for download in self.downloads)

    def is_same_as(self, manifest: RoundManifestMsg) -> bool:
        """Whether a manifest announces this very round again, with another deadline perhaps."""
        here, same = self.manifest, ("round", "status", "model_digest", "control_digest", "required_tags")
        is_same_kind = type(here.plan) is type(manifest.plan)
        return is_same_kind and all(getattr(here, name) == getattr(manifest, name) for name in same)

    def next_wake_s(self) -> float:
        """When time alone changes something."""
        begins_s = self.clock_is_plausible_from_s if self.phase == "undecided" else math.inf
        return min(begins_s, self.gives_up_at_s)

    def why_not(
        self, now_s: float, *, participated_s: float, separation_s: float, participations: int, most: int | None
    ) -> str:
        """Why no coin is tossed for this round, in words; empty if it is.

        Args:
            now_s: Unix seconds.
            participated_s: when this device last took part, 0 if never.
            separation_s: least time since then.
            participations: how often it took part.
            most: how often it takes part at most; None for any number.
        """
        if now_s >= waiting_ends_s(self.manifest):
            return "its deadline has passed"
        # A participation that lies ahead was noted under a clock that has been set back since.
        if participated_s and abs(now_s - participated_s) < separation_s:
            return "took part too recently"
        if most is not None and participations >= most:
            return f"took part {participations} times, as often as the study asks any device to"
        return ""

    def fetch(self, download: Callable[[bytes, int], Download], route: ModelRoute = WHOLE) -> None:
        """Begin to download the model (or what leads to it), and the control variate if the plan wants one.

        Args:
            download: by digest and length in bytes.
            route: by what the model comes.
        """
        manifest, self.route, self.model = self.manifest, route, None
        vector_bytes, wanted = 4 * manifest.num_parameters, dict[bytes, int]()
        if route.delta is not None:
            wanted[route.delta.digest] = route.delta.total_bytes
        elif not route.base and not isinstance(manifest.plan, StatisticsPlanMsg):  # statistics need no model
            wanted[manifest.model_digest] = vector_bytes
        # The first control variate and a first model of zeros are one and the same vector.
        if manifest.control_digest is not None and self.trains:
            wanted[manifest.control_digest] = vector_bytes
        self.phase, self.downloads = "fetching", [download(*one) for one in wanted.items()]

    def take_kept(self, base: NDArray[np.float32] | None) -> None:
        """Go on from the kept model, float32 [d], that the route starts from; None if it is gone.

        Raises:
            WrongModelError: it does not lead to the manifest's model, which has to be fetched whole.
        """
        try:
            delta = self.downloads[0].raw() if self.route.delta is not None else b""
            self.model = arrive(self.route, self.manifest, base=base, delta=delta)
        except ProtocolError as error:
            raise WrongModelError(self.route.base, str(error)) from error
        self.phase = "fetching"

    def fetch_whole(self, download: Callable[[bytes, int], Download], reason: str) -> list[Action]:
        """Leave the route that does not lead to the model; the control variate's download goes on."""
        given_up, others = [], self.downloads
        if self.route.delta is not None:
            given_up, others = self.downloads[:1], self.downloads[1:]
        actions: list[Action] = [action for one in given_up for action in one.stop()]
        actions += [DropChunks((one.digest,)) for one in given_up]
        whole = download(self.manifest.model_digest, 4 * self.manifest.num_parameters)
        self.phase, self.route, self.downloads = "fetching", WHOLE, [whole, *others]
        return [*actions, Note("delta_refused", {"round": self.manifest.round, "reason": reason})]

    def start_downloads(self, now_s: float) -> list[Action]:
        """Ask for what is missing."""
        return [action for download in self.downloads for action in download.start(now_s)]

    def stop_downloads(self) -> list[Action]:
        """Ask for nothing until they are started again."""
        return [action for download in self.downloads for action in download.stop()]

    def end_downloads(self) -> list[Action]:
        """Ask for nothing any more, and keep nothing."""
        actions, digests = self.stop_downloads(), tuple(download.digest for download in self.downloads)
        self.downloads, self.route, self.model = [], WHOLE, None
        return [*actions, DropChunks(digests)] if digests else []

    def vectors(self) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """What was fetched, each float32 [d]: the model (empty for statistics), and the control variate if wanted.

        Raises:
            WrongModelError: one is not what the manifest names; its download begins anew.
        """
        control = None
        if self.manifest.control_digest is not None and self.trains:
            control = _whole(self.downloads[-1])
        if self.model is not None:
            return self.model, control
        if isinstance(self.manifest.plan, StatisticsPlanMsg):
            return np.zeros(0, np.float32), control
        return _whole(self.downloads[0]), control

    def idle(self, reason: str) -> None:
        """Nothing is left to do in this round."""
        self.phase, self.why_idle = "idle", reason

    def in_words(self, blocked: Iterable[str]) -> str:
        """What the device is about, for its wearer."""
        number, reasons = self.manifest.round, "; ".join(blocked)
        paused = f" (paused: {reasons})" if reasons else ""
        infinitive, present = self._work_in_words()
        match self.phase:  # asked at every turn of the daemon's loop
            case "undecided":
                words = f"this device's clock is behind the study's: round {number} was opened in its future"
            case "busy":
                words = f"round {number} waits until the work on an earlier one is done"
            case "waiting":
                words = f"waiting to {infinitive} for round {number}: {reasons or 'ready'}"
            case "counting":
                words = f"counting the new records for round {number}"
            case "fetching":
                have = sum(download.progress[0] for download in self.downloads)
                count = sum(download.progress[1] or 1 for download in self.downloads)
                words = f"fetching the model of round {number}: {have} of {count} pieces{paused}"
            case "reading":
                words = f"putting the model of round {number} together"
            case "training":
                words = f"{present} for round {number}{paused}"
            case _:
                words = self._idle_in_words()
        return words

    def _idle_in_words(self) -> str:
        """Why there is nothing to do."""
        number = self.manifest.round
        match self.manifest.status:
            case "paused":
                return f"the study is paused, after round {number}"
            case "finished":
                return f"the study is finished, after round {number}"
            case "aborted":
                return f"the study was ended in round {number}, and its model is not to be used"
        return f"not in round {number}: {self.why_idle}"

    def _work_in_words(self) -> tuple[str, str]:
        """What the round's plan has a device do."""
        if not self.trains:
            return "measure the model", "measuring the model"
        if isinstance(self.manifest.plan, TrainingPlanMsg):
            return "train", "training"
        if isinstance(self.manifest.plan, StatisticsPlanMsg):
            return "make statistics", "making statistics"
        return "measure the model", "measuring the model"


def _whole(download: Download) -> NDArray[np.float32]:
    try:
        return download.whole()
    except ProtocolError as error:
        raise WrongModelError(download.digest, str(error)) from error
