"""Where a session's models come from: downloads, what is kept of them, and the last model for the sake of deltas. Pure.

The last model is kept only where the study offers deltas, so that others cost no flash for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from device_client.current_round import CurrentRound
from device_client.downloads import Download, Downloads
from device_client.events import Action, DropChunks, KeepModel
from device_client.model_route import route_to
from device_client.session_config import SessionConfig

DELTA_SILENCES = 3
"""After asking for a delta in vain so often in a row, the model is fetched whole."""


class ModelSupply:
    """See the module docstring.

    Args:
        config: who this device is.
        kept_chunks: by digest, what was kept of downloads.
        kept_model: digest of the model that was kept; empty if none.
        downloads: begins a download.
    """

    def __init__(
        self,
        config: SessionConfig,
        *,
        kept_chunks: Mapping[bytes, Iterable[bytes]] | None,
        kept_model: bytes,
        downloads: Downloads = Download,
    ) -> None:
        self._config, self._downloads = config, downloads
        self._chunks = dict(kept_chunks) if kept_chunks is not None else {}
        self._model = kept_model

    def begin(self, here: CurrentRound) -> list[Action]:
        """Have a round begin to fetch what it needs, by the way that takes the fewest bytes."""
        here.fetch(self._download, route_to(here.manifest, kept_model=self._model, begun=self._chunks))
        left_over = tuple(self._chunks)  # of a model nobody wants now
        self._chunks.clear()
        return [DropChunks(left_over)] if left_over else []

    def without_kept(self, here: CurrentRound, reason: str, now_s: float, *, asks: bool) -> list[Action]:
        """What was kept does not lead to the model: have the round fetch it whole.

        Args:
            here: the round.
            reason: in words.
            now_s: Unix seconds.
            asks: whether there is a connection, and fetching is allowed.
        """
        actions = here.fetch_whole(self._download, reason)
        return actions + (here.downloads[0].start(now_s) if asks else [])

    def delta_fails_to_come(self, here: CurrentRound) -> bool:
        """Whether a delta was asked for in vain for too long."""
        is_on_its_way = here.phase == "fetching" and here.route.delta is not None
        return is_on_its_way and here.downloads[0].silences >= DELTA_SILENCES

    def keep(self, here: CurrentRound, params: NDArray[np.float32]) -> list[Action]:
        """Keep a round's verified model, float32 [d], if it may be of use.

        The last thing to do for a round: a full disk must not be in training's way.
        """
        digest = here.manifest.model_digest
        if here.manifest.delta is None or not params.size or digest == self._model:
            return []
        self._model = digest
        return [KeepModel(digest, params)]

    def _download(self, digest: bytes, total_bytes: int) -> Download:
        """A vector or a delta, going on from what was kept of it."""
        config = self._config
        return self._downloads(
            tenant=config.tenant,
            digest=digest,
            total_bytes=total_bytes,
            key=config.aggregator_key,
            kept=self._chunks.pop(digest, ()),
        )
