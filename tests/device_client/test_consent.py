"""Consent: the last word holds, across restarts, and only for the terms it was given to."""

from __future__ import annotations

import msgspec
import pytest

from device_client.config import PrivacyConfig, StudyConfig
from device_client.consent import Consents, terms_digest, terms_of
from device_client.errors import StoreError
from fl_protocol.broker_config import BrokerConfig
from tests.device_client.ports import MemoryStore

STUDY = "clinic/watch"
CONFIG = StudyConfig(
    tenant="clinic",
    task="watch",
    broker=BrokerConfig("localhost", 1883),
    bundle="model.covey",
    publisher_key="aa",
    aggregator_key="bb",
)
PRIVACY = PrivacyConfig(epsilon=3.0, delta=1e-5)


def test_nothing_is_granted_at_first_and_the_last_word_outlives_a_restart() -> None:
    store = MemoryStore()
    consents = Consents(store)
    assert consents.of(STUDY) is None
    assert consents.problem(STUDY, terms="t").startswith("not granted")
    consents.grant(STUDY, terms="t", now_s=5.0)
    assert Consents(store.after_restart()).problem(STUDY, terms="t") == ""
    assert consents.problem("clinic/steps", terms="t").startswith("not granted")
    consents.withdraw(STUDY, now_s=9.0)
    again = Consents(store.after_restart())
    assert again.problem(STUDY, terms="t") == "consent was withdrawn"
    found = again.of(STUDY)
    assert found is not None
    assert (found.granted_s, found.withdrawn_s) == (5.0, 9.0)
    again.grant(STUDY, terms="t", now_s=11.0)
    assert again.problem(STUDY, terms="t") == ""


def test_a_study_that_was_never_granted_can_be_left_without_a_trace() -> None:
    store = MemoryStore()
    Consents(store).withdraw(STUDY, now_s=1.0)
    assert store.operations == []


def test_other_terms_are_not_granted() -> None:
    consents = Consents(MemoryStore())
    consents.grant(STUDY, terms="old", now_s=1.0)
    assert "terms have changed" in consents.problem(STUDY, terms="new")


def test_who_vouches_for_the_model_is_in_the_terms() -> None:
    """Their order is not; and what was granted to a study with one publisher stays granted."""
    assert terms_of(CONFIG, PRIVACY)["model from (publisher key)"] == "aa"

    def terms(threshold: int, *keys: str) -> dict[str, str]:
        changes = {"publisher_key": None, "publishers": keys, "publisher_threshold": threshold}
        return terms_of(msgspec.structs.replace(CONFIG, **changes), PRIVACY)

    assert terms(2, "cc", "aa", "dd")["model signed by at least 2 of (publisher keys)"] == "aa, cc, dd"
    others = [terms(2, "aa", "cc"), terms(1, "aa", "cc"), terms(2, "aa", "dd"), terms_of(CONFIG, PRIVACY)]
    digests = {terms_digest(found) for found in (terms(2, "aa", "cc", "dd"), *others)}
    assert len(digests) == 5
    assert terms_digest(terms(2, "dd", "AA", "cc")) in digests


def test_the_terms_of_a_study_with_one_publisher_are_what_they_were_before_there_could_be_several() -> None:
    before = "a6f23ac953f9f497ae3a2fba1e56205be38f6b8ff80a19e11f4f82c989c95b6b"
    assert terms_digest(terms_of(CONFIG, PRIVACY)) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"aggregator_key": "cc"},
        {"publisher_key": "cc"},
        {"role": "evaluate"},
        {"stream": "sleep"},
        {"epsilon": 1.0},
        {"tenant": "other"},
        {"tags": ("imu",)},
    ],
)
def test_every_change_of_a_study_that_matters_to_the_wearer_changes_its_terms(changes: dict[str, object]) -> None:
    before = terms_digest(terms_of(CONFIG, PRIVACY))
    assert terms_digest(terms_of(msgspec.structs.replace(CONFIG, **changes), PRIVACY)) != before


@pytest.mark.parametrize(
    "changes",
    [
        {"epsilon": 4.0},
        {"delta": 1e-4},
        {"period_days": 30.0},
        {"minimum_noise_multiplier": 1.0},
        {"minimum_cohort": 2},
        {"maximum_l2_norm_clip": 1.0},
    ],
)
def test_every_change_of_the_wearers_limits_changes_the_terms(changes: dict[str, object]) -> None:
    before = terms_digest(terms_of(CONFIG, PRIVACY))
    assert terms_digest(terms_of(CONFIG, msgspec.structs.replace(PRIVACY, **changes))) != before


def test_where_a_bundle_or_broker_is_does_not_change_the_terms() -> None:
    moved = msgspec.structs.replace(CONFIG, bundle="elsewhere", broker=BrokerConfig("localhost", 8883))
    assert terms_of(moved, PRIVACY) == terms_of(CONFIG, PRIVACY)


def test_terms_say_in_words_what_is_agreed_to() -> None:
    limits = msgspec.structs.replace(PRIVACY, period_days=30.0, minimum_cohort=8)
    terms = terms_of(msgspec.structs.replace(CONFIG, epsilon=1.5), limits)
    assert terms["privacy"] == "epsilon at most 1.5 of 3 every 30 days, at delta 1e-05"
    assert terms["never combined with fewer devices than"] == "8"
    assert terms["run by (aggregator key)"] == "bb"


def test_what_a_device_does_besides_training_and_what_it_shows_of_itself_is_agreed_to() -> None:
    tagged = terms_of(msgspec.structs.replace(CONFIG, tags=("npu", "imu")), PRIVACY)
    assert "noisy sums" in tagged["what it does"]
    assert tagged["may be asked for by its tags"] == "imu, npu"
    assert "may be asked for by its tags" not in terms_of(CONFIG, PRIVACY)


def test_a_full_disk_grants_nothing() -> None:
    store = MemoryStore()
    consents = Consents(store)
    consents.withdraw(STUDY, now_s=0.0)
    store.full = True
    with pytest.raises(StoreError):
        consents.grant(STUDY, terms="t", now_s=1.0)
    assert consents.of(STUDY) is None
    assert consents.problem(STUDY, terms="t")


class NoRoom(MemoryStore):
    """A full disk as real ones are: it still deletes."""

    def write(self, name: str, data: bytes) -> None:
        raise StoreError(f"{name} cannot be written ({len(data)} bytes; No space left on device)")


def test_a_full_disk_is_no_reason_to_stay_in_a_study() -> None:
    store = MemoryStore()
    consents = Consents(store)
    consents.grant(STUDY, terms="t", now_s=1.0)
    store.__class__ = NoRoom
    consents.withdraw(STUDY, now_s=2.0)
    assert consents.problem(STUDY, terms="t") == "consent was withdrawn"
    assert Consents(store).problem(STUDY, terms="t").startswith("not granted")


def test_a_disk_that_takes_nothing_says_so_and_the_study_is_left_for_this_process() -> None:
    store = MemoryStore()
    consents = Consents(store)
    consents.grant(STUDY, terms="t", now_s=1.0)
    store.full = True  # it does not delete either
    with pytest.raises(StoreError):
        consents.withdraw(STUDY, now_s=2.0)
    assert consents.problem(STUDY, terms="t") == "consent was withdrawn"
    store.full = False
    consents.grant(STUDY, terms="t", now_s=3.0)
    assert consents.problem(STUDY, terms="t") == ""


def test_a_consent_that_cannot_be_read_can_be_withdrawn() -> None:
    store = MemoryStore()
    consents = Consents(store)
    consents.grant(STUDY, terms="t", now_s=1.0)
    (name,) = store.blobs
    store.blobs[name] = b"\xc1"
    consents.withdraw(STUDY, now_s=2.0)
    assert Consents(store).problem(STUDY, terms="t").startswith("not granted")


def test_a_consent_that_cannot_be_read_is_none() -> None:
    store = MemoryStore()
    consents = Consents(store)
    consents.grant(STUDY, terms="t", now_s=1.0)
    (name,) = store.blobs
    store.blobs[name] = b"\xc1"
    with pytest.raises(StoreError, match="consent for clinic/watch"):
        consents.problem(STUDY, terms="t")
