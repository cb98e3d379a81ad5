"""What the wearer agreed to: a study runs on this device only while it is granted, under the terms that were granted.

Runs on the device; nothing of it goes on the wire. Withdrawing never gives budget back: what was released stays so.
"""

from __future__ import annotations

import hashlib

import msgspec

from device_client.config import PrivacyConfig, StudyConfig
from device_client.device_store import study_blob
from device_client.errors import StoreError
from device_client.outbox import Outbox
from device_client.ports import Store

_WITHDRAWN = "consent was withdrawn"
_PURPOSES = {
    "train": "trains on the recordings, measures models with them, and sends noisy sums over them",
    "evaluate": "measures models, sends nothing",
}


class Consent(msgspec.Struct, frozen=True):
    """The wearer's last word on one study.

    Args:
        granted_s: when it was granted, Unix seconds.
        terms: digest of what was agreed to (`terms_digest`).
        withdrawn_s: when it was withdrawn; None while it holds.
    """

    study: str
    granted_s: float
    terms: str
    withdrawn_s: float | None = None


def terms_of(study: StudyConfig, privacy: PrivacyConfig) -> dict[str, str]:
    """What a wearer agrees to, in words; a study whose terms change has to be granted again."""
    share = f"{study.epsilon:g} of {privacy.epsilon:g}" if study.epsilon is not None else f"{privacy.epsilon:g}"
    period = f"every {privacy.period_days:g} days" if privacy.period_days is not None else "in all"
    clip = f"{privacy.maximum_l2_norm_clip:g}" if privacy.maximum_l2_norm_clip is not None else "any"
    return {
        "study": study.study,
        "what it does": _PURPOSES[study.role],
        "recordings": study.stream,
        "privacy": f"epsilon at most {share} {period}, at delta {privacy.delta:g}",
        "least noise multiplier": f"{privacy.minimum_noise_multiplier:g}",
        "never combined with fewer devices than": f"{privacy.minimum_cohort}",
        "largest clip": clip,
        "most steps a round": "any" if privacy.maximum_local_steps is None else f"{privacy.maximum_local_steps}",
        "run by (aggregator key)": study.aggregator_key,
        **_publishers(study),
        # Whoever takes part in a round that asks for a tag says by it that the device has it.
        **({"most rounds": f"{study.maximum_participations}"} if study.maximum_participations is not None else {}),
        **_helpers(study, privacy),
        **_told(study),
        **({"may be asked for by its tags": ", ".join(sorted(study.tags))} if study.tags else {}),
    }


def _publishers(study: StudyConfig) -> dict[str, str]:
    """Who vouches for the model. One publisher's key stands as it is written: older consents named it so."""
    if study.publisher_key is not None:
        return {"model from (publisher key)": study.publisher_key}
    pins = study.publisher_pins
    return {f"model signed by at least {pins.threshold} of (publisher keys)": ", ".join(pins.keys)}


def _helpers(study: StudyConfig, privacy: PrivacyConfig) -> dict[str, str]:
    """Who keeps single updates from whoever runs the study; nothing where nobody does."""
    if not study.helpers and not privacy.minimum_helpers and not privacy.minimum_sum_noise_multiplier:
        return {}
    named = [f"{pin.name} of {pin.operator} ({pin.key.strip().lower()})" for pin in study.helpers]
    return {
        "masked for (helpers)": ", ".join(named) or "none",
        "never with fewer helpers than": f"{privacy.minimum_helpers}, of {privacy.minimum_operators} operators",
        "least noise multiplier of a sum": f"{privacy.minimum_sum_noise_multiplier:g}",
    }


def _told(study: StudyConfig) -> dict[str, str]:
    """What the study and its broker learn of the wearer's days."""
    if not study.tells_why_every_minutes:
        return {}
    return {
        "tells the study and its broker": (
            "whether battery, charger, use, network, temperature or hours keep it from training, "
            f"at most every {study.tells_why_every_minutes:g} minutes"
        )
    }


def terms_digest(terms: dict[str, str]) -> str:
    """What identifies terms: SHA-256 of their JSON, hexadecimal."""
    return hashlib.sha256(msgspec.json.encode(terms)).hexdigest()


class Consents:
    """All consents of this device, in its store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._refused: set[str] = set()

    def of(self, study: str) -> Consent | None:
        """The wearer's last word, None if there never was one. Raises StoreError."""
        raw = self._store.read(study_blob("consent", study))
        if raw is None:
            return None
        try:
            return msgspec.msgpack.decode(raw, type=Consent)
        except msgspec.DecodeError as error:
            raise StoreError(f"the consent for {study} cannot be read ({error})") from error

    def grant(self, study: str, *, terms: str, now_s: float) -> None:
        """Durably agree. Raises StoreError, and nothing is agreed to."""
        self._write(Consent(study, now_s, terms))
        self._refused.discard(study)

    def withdraw(self, study: str, *, now_s: float) -> None:
        """Disagree, durably; a study that was never granted stays so.

        For this process it holds in any case. On a full disk the consent is deleted, which needs no room and means that
        there never was one.

        Raises:
            StoreError: the disk neither writes nor deletes, so the next process would find the consent again.
        """
        self._refused.add(study)
        try:
            known = self.of(study)
            if known is not None:
                self._write(msgspec.structs.replace(known, withdrawn_s=now_s))
        except StoreError:
            self._store.delete(study_blob("consent", study))

    def problem(self, study: str, *, terms: str) -> str:
        """Why the study may not run, in words; empty when it may. Raises StoreError."""
        if study in self._refused:
            return _WITHDRAWN
        known = self.of(study)
        if known is None:
            return "not granted: covey-device consent grant says what it would do"
        if known.withdrawn_s is not None:
            return _WITHDRAWN
        return "" if known.terms == terms else "its terms have changed since they were granted; grant it again"

    def _write(self, consent: Consent) -> None:
        self._store.write(study_blob("consent", consent.study), msgspec.msgpack.encode(consent))


def leave_study(consents: Consents, outbox: Outbox, study: str, *, now_s: float) -> int:
    """Withdraw consent and drop what was not delivered; how many updates and pieces of work that was.

    Raises:
        StoreError: the disk does not take one of both. In this process the study is left all the same.
    """
    try:
        # First: what a power cut leaves of it must not be sent if the study is granted again some day.
        return outbox.drop(study)
    finally:
        consents.withdraw(study, now_s=now_s)
