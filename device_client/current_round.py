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
from device_client.events import Action, DropChunks
from fl_protocol.errors import ProtocolError
from fl_protocol.messages import RoundManifestMsg

CLOCK_MARGIN_S = 600.0
"""How far this device's clock may be behind the aggregator's."""

Phase = Literal["undecided", "waiting", "counting", "fetching", "training", "idle"]


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

    @property
    def clock_is_plausible_from_s(self) -> float:
        """Until then, by this device's clock, the round was opened in the future: the clock is wrong."""
        return self.manifest.opened_s - CLOCK_MARGIN_S

    @property
    def is_before_training(self) -> bool:
        """Whether it is on its way to training, or to measuring."""
        return self.phase in {"waiting", "counting", "fetching"}

    @property
    def gives_up_at_s(self) -> float:
        """When what has not begun to train is given up; a model can be measured at any time."""
        return self.manifest.deadline_s if self.trains and self.is_before_training else math.inf

    @property
    def is_fetched(self) -> bool:
        """Whether all it needs is here."""
        return self.phase == "fetching" and all(download.is_whole for download in self.downloads)

    def is_same_as(self, manifest: RoundManifestMsg) -> bool:
        """Whether a manifest announces this very round again, with another deadline perhaps."""
        here = self.manifest
        return (here.round, here.status, here.model_digest, here.control_digest) == (
            manifest.round,
            manifest.status,
            manifest.model_digest,
            manifest.control_digest,
        )

    def next_wake_s(self) -> float:
        """When time alone changes something."""
        begins_s = self.clock_is_plausible_from_s if self.phase == "undecided" else math.inf
        return min(begins_s, self.gives_up_at_s)

    def why_not(self, now_s: float, *, participated_s: float, separation_s: float) -> str:
        """Why no coin is tossed for this round, in words; empty if it is.

        Args:
            now_s: Unix seconds.
            participated_s: when this device last took part, 0 if never.
            separation_s: least time since then.
        """
        if now_s >= self.manifest.deadline_s:
            return "its deadline has passed"
        # A participation that lies ahead was noted under a clock that has been set back since.
        if participated_s and abs(now_s - participated_s) < separation_s:
            return "took part too recently"
        return ""

    def fetch(self, download: Callable[[bytes], Download]) -> None:
        """Begin to download the model, and the control variate if the plan wants one."""
        wanted = [self.manifest.model_digest]
        if self.manifest.control_digest is not None and self.trains:
            wanted.append(self.manifest.control_digest)
        # The first control variate and a first model of zeros are one and the same vector.
        self.phase, self.downloads = "fetching", [download(digest) for digest in dict.fromkeys(wanted)]

    def start_downloads(self, now_s: float) -> list[Action]:
        """Ask for what is missing."""
        return [action for download in self.downloads for action in download.start(now_s)]

    def stop_downloads(self) -> list[Action]:
        """Ask for nothing until they are started again."""
        return [action for download in self.downloads for action in download.stop()]

    def end_downloads(self) -> list[Action]:
        """Ask for nothing any more, and keep nothing."""
        actions, digests = self.stop_downloads(), tuple(download.digest for download in self.downloads)
        self.downloads = []
        return [*actions, DropChunks(digests)] if digests else []

    def vectors(self) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """What was fetched, each float32 [d]: the model, and the control variate if the plan wants one.

        Raises:
            WrongModelError: one is not what the manifest names; its download begins anew.
        """
        vectors = [_whole(download) for download in self.downloads]
        return vectors[0], vectors[-1] if self.manifest.control_digest is not None and self.trains else None

    def idle(self, reason: str) -> None:
        """Nothing is left to do in this round."""
        self.phase, self.why_idle = "idle", reason

    def in_words(self, blocked: Iterable[str]) -> str:
        """What the device is about, for its wearer."""
        number, reasons = self.manifest.round, "; ".join(blocked)
        have = sum(download.progress[0] for download in self.downloads)
        count = sum(download.progress[1] or 1 for download in self.downloads)
        paused = f" (paused: {reasons})" if reasons else ""
        words = {
            "undecided": f"this device's clock is behind the study's: round {number} was opened in its future",
            "waiting": f"waiting to train for round {number}: {reasons or 'ready'}",
            "counting": f"counting the new records for round {number}",
            "fetching": f"fetching the model of round {number}: {have} of {count} pieces{paused}",
            "training": f"training for round {number}{paused}",
            "idle": f"not in round {number}: {self.why_idle}",
        }
        if self.phase == "idle" and self.manifest.status == "finished":
            return f"the study is finished, after round {number}"
        return words[self.phase]


def _whole(download: Download) -> NDArray[np.float32]:
    try:
        return download.whole()
    except ProtocolError as error:
        raise WrongModelError(download.digest, str(error)) from error
