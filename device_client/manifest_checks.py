"""Which of the manifests that an aggregator signed a device listens to: its study's, not replayed, and within reason.
Pure.

Order: another study's, a replay, another model graph; then, for an open round that asks for devices like this one, its
helpers, the wearer's floors and whether it can be carried out at all.
"""

from __future__ import annotations

from device_client.feasibility import check_feasible
from device_client.session_config import SessionConfig
from fl_protocol.enrolment import Period
from fl_protocol.errors import ProtocolError
from fl_protocol.messages import RoundManifestMsg
from fl_protocol.secagg.terms import verified_helpers

_SUPERSEDES = {"open": 0, "paused": 1, "finished": 2, "aborted": 3}
"""In this order the manifests of one round may follow each other: one that is over is not opened again."""


def refuse_replay(
    manifest: RoundManifestMsg,
    config: SessionConfig,
    *,
    highest_round: int,
    newest: RoundManifestMsg | None,
    latest: tuple[int, float],
) -> None:
    """Refuse a manifest that is another study's, or a replay.

    Args:
        manifest: its signature was verified.
        config: who this device is.
        highest_round: newest round seen.
        newest: its manifest, if this process has seen it.
        latest: the newest open round, and its latest deadline in Unix seconds.

    Raises:
        ProtocolError: it is one of the two.
    """
    if (manifest.tenant, manifest.task) != (config.tenant, config.task):
        raise ProtocolError(f"the manifest is for {manifest.tenant}/{manifest.task}")
    number = manifest.round
    if number < highest_round:
        raise ProtocolError(f"round {number} is older than round {highest_round}: a replay")
    is_newest = newest is not None and newest.round == number
    if newest is not None and is_newest and _SUPERSEDES[manifest.status] < _SUPERSEDES[newest.status]:
        raise ProtocolError(f"the study was {newest.status} after round {number}: a replay")
    # A deadline is only ever extended. An earlier manifest, replayed, would have charged work given up.
    if manifest.status == "open" and number == latest[0] and manifest.deadline_s < latest[1]:
        raise ProtocolError(f"round {number} was given a later deadline than this names: a replay")


def missing_tags(manifest: RoundManifestMsg, config: SessionConfig) -> list[str]:
    """What the round asks devices to be able to do, and this one cannot."""
    return [tag for tag in manifest.required_tags if tag not in config.tags]


def check_concerns_us(manifest: RoundManifestMsg, config: SessionConfig) -> None:
    """Refuse a manifest that is for another graph, asks below the floors, or for what cannot be done.

    Raises:
        ProtocolError: it is one of these.
    """
    if manifest.graph_digest != config.graph_digest or manifest.num_parameters != config.num_parameters:
        raise ProtocolError("the manifest names another model graph than the installed bundle's")
    if manifest.status == "open" and config.role == "train" and not missing_tags(manifest, config):
        if manifest.secure is not None:
            verified_helpers(manifest, config.helpers)
            _check_name_fits(manifest, config.period)
        config.floors.check(manifest)
        check_feasible(manifest, input_shape=config.input_shape)


def _check_name_fits(manifest: RoundManifestMsg, period: Period | None) -> None:
    """Leave out a secure round whose helpers would not take this device's name, and so the whole list with it in.

    Helpers take the names of the period in which the round opened (docs/protocol.md, section 16), by the manifest and
    not by a clock: around a change a device has two valid names, and would count twice.
    """
    if period is None:
        return
    if not period.is_used_at(manifest.opened_s):
        raise ProtocolError(
            f"round {manifest.round} did not open in the time of this device's present name, {period}, and its helpers "
            "would not take it; the next round will do"
        )
    if manifest.deadline_s > period.not_after_s:
        raise ProtocolError(
            f"round {manifest.round} may last longer than the certificate of this device's present name, which is for "
            f"{period}: its helpers would not take it any more; a round after the change will do"
        )
