"""A device in rounds of the engine secure: whom it trusts, what it refuses, and what leaves it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec.structs import replace
from numpy.typing import NDArray

from device_client import manifest_checks
from device_client.config import PrivacyConfig, StudyConfig
from device_client.consent import terms_of
from device_client.errors import StoreError
from device_client.events import PendingUpdate, SessionState
from device_client.feasibility import InfeasibleError, check_feasible
from device_client.floors import Floors, FloorsError
from device_client.participation import Participant
from device_client.secure_update import protected_update
from device_client.session import DeviceSession
from device_client.session_config import SessionConfig
from fl_protocol.enrolment import DAY_S, Period
from fl_protocol.errors import ProtocolError
from fl_protocol.messages import (
    RecipientKeyMsg,
    RoundManifestMsg,
    UpdateEnvelopeMsg,
    UpdateHeaderMsg,
    decode,
)
from fl_protocol.sealing import RoundKey, open_masked_update
from fl_protocol.secagg.messages import DeviceCredentialMsg, SecureBodyMsg, SecureTermsMsg
from fl_protocol.secagg.parties import Sender, entry_for, masked_vector, sum_of_masks, unmask
from fl_protocol.secagg.terms import secure_round
from fl_protocol.signing import public_key_hex, sign
from tests.device_client.ports import DEVICE, ROUND_KEY, MemoryStore, make_manifest
from tests.device_client.session_driver import Driver, asked_for, notes
from tests.device_client.test_participation import KEY, PARAMS, manifest_of, participant
from tests.enrolments import broken_copy
from tests.fl_protocol.examples import HELPERS, helper_key, round_key, secure_terms
from tests.fl_protocol.secagg.test_terms import PINNED
from tests.ids import short_id
from tests.virtual_fleet import SeededEntropy

OPENED_IN_DRIVER = 1000
HELPER_KEYS = {name: RoundKey("x25519", round_key("x25519", seed=ord(name[-1])).secret) for name in HELPERS}
QUIET = {"device_noise_variance": 0.0, "helper_noise_sigma": 0.0}


def secure(**changes: Any) -> RoundManifestMsg:
    """A secure round of the device tests' study; `terms` changes what is said about masking."""
    terms = secure_terms(**{"l2_norm_clip": 4.0, **QUIET, **changes.pop("terms", {})})
    return make_manifest(engine="secure", secure=terms, **changes)


def body_in(pending: PendingUpdate) -> tuple[UpdateHeaderMsg, SecureBodyMsg]:
    """What is inside an update's seal."""
    envelope = decode(pending.envelope, UpdateEnvelopeMsg)
    header = decode(envelope.header, UpdateHeaderMsg)
    return header, open_masked_update(header, envelope.sealed, ROUND_KEY)


def unmasked(manifest: RoundManifestMsg, pending: PendingUpdate) -> NDArray[np.float64]:
    """What helpers and aggregator find when this is the only update."""
    terms, (header, body) = secure_round(manifest), body_in(pending)
    public = {header.device: KEY.public_key()}
    masked = masked_vector(
        terms, body, device=header.device, update_id=header.update_id, device_key=public[header.device]
    )
    alone = [
        sum_of_masks(
            _for_one(terms), [entry_for(terms, body, name)], helper=name, key=HELPER_KEYS[name], device_keys=public
        )
        for name in HELPERS
    ]
    return unmask(terms, masked, alone, update_ids=[header.update_id])


def _for_one(terms: Any) -> Any:
    """As a helper without any floor would take the round: to look at one update, as only a test may."""
    return type(terms)(**{**{name: getattr(terms, name) for name in terms.__dataclass_fields__}, "minimum_cohort": 1})


def take_part(manifest: RoundManifestMsg, *, seed: str = "participant") -> PendingUpdate:
    """One participation."""
    work = participant(MemoryStore(), seed=seed).begin(manifest, PARAMS, None, now_s=1000.0)
    while not work.done:
        work.advance()
    return work.finish(1000.0)


def change_of(manifest: RoundManifestMsg) -> NDArray[np.float64]:
    """The change that the same participation sends in an open round."""
    work = participant(MemoryStore()).begin(manifest, PARAMS, None, now_s=1000.0)
    while not work.done:
        work.advance()
    return np.asarray(work._computation.change(), np.float64)[:8]


def test_helpers_and_aggregator_find_the_update_to_within_one_step_of_the_grid() -> None:
    manifest = manifest_of(engine="secure", secure=secure(terms={"l2_norm_clip": 8.0, "bits": 24}).secure)
    found = unmasked(manifest, take_part(manifest))
    assert manifest.secure is not None
    # Rotated and rounded: the length of what rounding changes is at most one step in each number.
    assert float(np.linalg.norm(found - change_of(manifest))) <= manifest.secure.step * np.sqrt(len(found))


def test_a_longer_update_is_cut_to_the_clip() -> None:
    manifest = manifest_of(engine="secure", secure=secure(terms={"l2_norm_clip": 0.25}).secure)
    assert float(np.linalg.norm(change_of(manifest))) > 0.4
    assert float(np.linalg.norm(unmasked(manifest, take_part(manifest)))) <= 0.25 * 1.05


def test_nothing_but_the_sum_of_all_parts_tells_of_the_update() -> None:
    manifest = manifest_of(engine="secure", secure=secure().secure)
    one, again = (body_in(take_part(manifest, seed=seed))[1] for seed in ("one", "other"))
    assert one.masked != again.masked
    assert not set(one.seeds) & set(again.seeds)


def test_trying_again_after_a_full_disk_sends_the_same_bytes() -> None:
    store = MemoryStore()
    work = participant(store).begin(manifest_of(engine="secure", secure=secure().secure), PARAMS, None, now_s=1000.0)
    while not work.done:
        work.advance()
    store.full = True
    with pytest.raises(StoreError):
        work.finish(1000.0)
    sealed_first = work._update
    store.full = False
    assert sealed_first is not None
    assert work.finish(1000.0).envelope == sealed_first.pending.envelope


VARIANCE = 10_000.0
LENGTH = 20_000
FALSE_ALARM_RATE = 1e-6


def noise_looks_right(protect: Callable[..., SecureBodyMsg]) -> bool:
    """Whether a zero update carries noise of the variance that its manifest says.

    The sum of the squares of n numbers of variance v and kurtosis 3 + 1/v has a standard deviation of about
    v sqrt(2 n); 4.9 of them are left with probability 1e-6.
    """
    manifest = secure(num_parameters=LENGTH, terms={"bits": 32, "device_noise_variance": VARIANCE, "step": 2.0**-4})
    assert manifest.secure is not None
    sender = Sender(DEVICE, bytes(16), KEY)
    body = protect(
        manifest.secure, manifest, np.zeros(LENGTH, np.float32), sender=sender, entropy=SeededEntropy("noise")
    )
    terms = secure_round(manifest)
    entries = [entry_for(terms, body, name) for name in HELPERS]
    total = masked_vector(terms, body, device=DEVICE, update_id=bytes(16), device_key=KEY.public_key()).astype(np.int64)
    for name, entry in zip(HELPERS, entries, strict=True):
        one = sum_of_masks(
            _for_one(terms), [entry], helper=name, key=HELPER_KEYS[name], device_keys={DEVICE: KEY.public_key()}
        )
        total -= np.frombuffer(one.total, "<u4").astype(np.int64)
    noise = (total + (1 << 31)) % (1 << 32) - (1 << 31)
    return abs(float(np.mean(noise.astype(np.float64) ** 2)) / VARIANCE - 1) < 4.9 * np.sqrt(2 / LENGTH)


def test_an_update_carries_its_share_of_the_noise() -> None:
    assert noise_looks_right(protected_update)


@pytest.mark.parametrize(
    "change",
    [
        ("skellam(variance, length, entropy) if variance else", "np.zeros(length, np.int64) if True else"),
        ("skellam(variance, length, entropy)", "skellam(variance / 2, length, entropy)"),
    ],
    ids=["none", "half of it"],
)
def test_a_device_that_saves_on_noise_is_caught(change: tuple[str, str]) -> None:
    assert not noise_looks_right(broken_copy("device_client.secure_update", change).protected_update)


FLOORS = Floors(minimum_helpers=2, minimum_operators=2, minimum_sum_noise_multiplier=0.05)
NOISY = {"device_noise_variance": 4096.0, "bits": 24}
ONE = sign(helper_key("helper-a"), HELPERS["helper-a"])
SAME_OPERATOR = sign(replace(helper_key("helper-b"), operator="operator-a"), HELPERS["helper-b"])
BELOW: list[tuple[RoundManifestMsg, str, dict[str, float]]] = [
    (make_manifest(), "0 helpers are below the wearer's floor 2", {"minimum_helpers": 0, "minimum_operators": 0}),
    (
        secure(terms={**NOISY, "helpers": (ONE,)}),
        "1 helpers are below the wearer's floor 2",
        {"minimum_helpers": 1, "minimum_operators": 1},
    ),
    (
        secure(terms={**NOISY, "helpers": (ONE, SAME_OPERATOR)}),
        "1 operators of helpers are below the wearer's floor 2",
        {"minimum_operators": 1},
    ),
    (
        secure(terms={"device_noise_variance": 256.0}),
        "noise multiplier 0.01\\d+ is below the wearer's floor 0.05",
        {"minimum_sum_noise_multiplier": 0.0},
    ),
]


def test_what_is_at_least_as_private_as_the_floors_is_accepted() -> None:
    FLOORS.check(secure(terms=NOISY))
    FLOORS.check(secure(terms={"helper_noise_sigma": 64.0, "bits": 24}))


@pytest.mark.parametrize(("manifest", "words"), [(manifest, words) for manifest, words, _ in BELOW])
def test_what_is_less_private_is_refused_by_name(manifest: RoundManifestMsg, words: str) -> None:
    quiet_open = manifest.secure is None
    floors = Floors(minimum_helpers=2, minimum_operators=2) if quiet_open else FLOORS
    with pytest.raises(FloorsError, match=words):
        floors.check(manifest)


@pytest.mark.parametrize(("manifest", "blind_to"), [(manifest, blind) for manifest, _, blind in BELOW])
def test_without_that_one_floor_it_is_accepted(manifest: RoundManifestMsg, blind_to: dict[str, float]) -> None:
    if manifest.secure is None:
        blind_to = {**blind_to, "minimum_sum_noise_multiplier": 0.0}
    Floors(**{**vars(FLOORS), **blind_to}).check(manifest)


def refused_by_session(terms: SecureTermsMsg, **settings: Any) -> str:
    """Why a session does not take part; empty if it asks for the model."""
    driver = Driver(**settings)
    actions = driver.open_round(engine="secure", secure=terms)
    if asked_for(actions):
        return ""
    assert notes(actions)[0] == "message_refused"
    return driver.session.view().refused


def test_a_session_takes_part_with_its_pinned_helpers_only() -> None:
    assert refused_by_session(secure_terms(), helpers=PINNED) == ""
    assert "not among the pinned ones" in refused_by_session(secure_terms())
    stranger = Ed25519PrivateKey.from_private_bytes(bytes(32))
    forged = secure_terms(helpers=tuple(sign(helper_key(name), stranger) for name in HELPERS))
    assert "not signed by the pinned key" in refused_by_session(forged, helpers=PINNED)


OPENED_S = 1_000_000.0
NAMES: list[tuple[Period, str, tuple[str, str]]] = [
    (
        Period(1_000_001, 2_000_000),
        "did not open in the time of this device's present name",
        ("if not period.is_used_at(manifest.opened_s):", "if False:"),
    ),
    (
        Period(500_000, 1_000_000),
        "did not open in the time of this device's present name",
        ("if not period.is_used_at(manifest.opened_s):", "if False:"),
    ),
    (
        Period(500_000, 1_000_001),
        "may last longer than the certificate",
        ("if manifest.deadline_s > period.not_after_s:", "if False:"),
    ),
]


def checks_a_name(module: Any, period: Period | None, *, lasts_s: float = 60.0, **changes: Any) -> None:
    """What a device whose name is for this period says of a round."""
    manifest = secure(opened_s=OPENED_S, deadline_s=OPENED_S + lasts_s, **changes)
    config = Driver(helpers=PINNED, period=period).session._config
    module.check_concerns_us(manifest, config_of(config, num_parameters=manifest.num_parameters))


def config_of(config: SessionConfig, **changes: Any) -> SessionConfig:
    return SessionConfig(**{**vars(config), **changes})


@pytest.mark.parametrize(("period", "words", "change"), NAMES, ids=["opened before", "opened after", "lasts longer"])
def test_a_round_whose_helpers_would_not_take_the_present_name_is_left_out(
    period: Period, words: str, change: tuple[str, str]
) -> None:
    lasts_s = 86_402.0 if "longer" in words else 60.0
    with pytest.raises(ProtocolError, match=words):
        checks_a_name(manifest_checks, period, lasts_s=lasts_s)
    # Without that check the device would spend its budget on a round that its helpers refuse.
    checks_a_name(broken_copy("device_client.manifest_checks", change), period, lasts_s=lasts_s)


@pytest.mark.parametrize("period", [None, Period(1_000_000, 2_000_000), Period(500_000, 1_000_001)])
def test_a_round_that_opened_in_the_time_of_the_present_name_is_taken_part_in(period: Period | None) -> None:
    checks_a_name(manifest_checks, period)


def test_a_session_left_out_a_round_of_another_name_before_it_asks_for_the_model() -> None:
    later = Period(OPENED_IN_DRIVER + 1, OPENED_IN_DRIVER + 10 * DAY_S)
    assert "did not open in the time" in refused_by_session(secure_terms(), helpers=PINNED, period=later)
    now = Period(OPENED_IN_DRIVER, OPENED_IN_DRIVER + 10 * DAY_S)
    assert refused_by_session(secure_terms(), helpers=PINNED, period=now) == ""


def test_who_goes_by_a_pseudonym_brings_its_certificate_and_who_has_a_fixed_id_brings_none() -> None:
    manifest = manifest_of(engine="secure", secure=secure().secure)
    credential = DeviceCredentialMsg(signing_key=KEY.public_key().public_bytes_raw(), certificate=b"a certificate")
    for brought in (None, credential):
        one = fields_of(participant(MemoryStore()), credential=brought)
        work = one.begin(manifest, PARAMS, None, now_s=1000.0)
        while not work.done:
            work.advance()
        assert body_in(work.finish(1000.0))[1].credential == brought


def fields_of(one: Participant, **changes: Any) -> Participant:
    return Participant(**{**vars(one), **changes})


def test_a_helpers_key_that_cannot_be_sealed_to_costs_nothing() -> None:
    bad = replace(helper_key("helper-b"), recipient=RecipientKeyMsg(kem="x25519", public_key=bytes(32)))
    manifest = secure(terms={"helpers": (ONE, sign(bad, HELPERS["helper-b"]))})
    with pytest.raises(InfeasibleError, match="cannot be sealed to"):
        check_feasible(manifest)


def test_a_modulus_that_could_overflow_costs_nothing() -> None:
    with pytest.raises(InfeasibleError, match="take a larger step"):
        check_feasible(secure(terms={"bits": 12, "device_noise_variance": 4096.0}))


def pin(name: str, /, **changes: str) -> dict[str, str]:
    return {"name": name, "operator": f"operator-{name[-1]}", "key": public_key_hex(PINNED[name].key), **changes}


def study(*helpers: dict[str, str]) -> StudyConfig:
    fields = {
        "tenant": "clinic",
        "task": "watch",
        "broker": {"host": "127.0.0.1", "port": 1883},
        "bundle": "watch.covey",
        "publisher_key": "11" * 32,
        "aggregator_key": "11" * 32,
        "helpers": list(helpers),
    }
    return msgspec.convert(fields, StudyConfig)


@pytest.mark.parametrize(
    ("helpers", "words"),
    [
        ((pin("helper-a"), pin("helper-a")), "expected each name and each key once"),
        ((pin("helper-a"), pin("helper-a", name="helper-b")), "expected each name and each key once"),
        ((pin("helper-a", key="xyz"),), "expected an Ed25519 public key as 64 hex digits"),
    ],
    ids=["a name twice", "one helper under two names", "no key"],
)
def test_pins_that_make_no_sense_are_refused(helpers: tuple[dict[str, str], ...], words: str) -> None:
    with pytest.raises(Exception, match=words):
        study(*helpers)


def test_the_wearer_agrees_to_named_helpers() -> None:
    privacy = PrivacyConfig(epsilon=1.0, delta=1e-5)
    assert "masked for (helpers)" not in terms_of(study(), privacy)
    with_one, with_two = (
        terms_of(study(*map(pin, names)), privacy) for names in (["helper-a"], ["helper-a", "helper-b"])
    )
    assert "helper-a of operator-a" in with_one["masked for (helpers)"]
    assert with_one != with_two


@pytest.mark.parametrize(("participations", "fetches"), [(0, True), (1, True), (2, False), (3, False)])
def test_a_device_takes_part_as_often_as_the_study_asks_any_device_to(participations: int, fetches: bool) -> None:
    driver = Driver(state=SessionState(participations=participations))
    actions = driver.open_round(most_participations=2)
    assert bool(asked_for(actions)) == fetches
    if not fetches:
        assert "as often as the study asks any device to" in driver.session.view().doing


def test_every_participation_is_counted_durably() -> None:
    driver = Driver()
    driver.open_round(most_participations=1)
    driver.send_model()
    assert driver.disk.state is not None
    assert driver.disk.state.participations == 1
    again = driver.restarted()
    assert not asked_for(again.open_round(round=2, most_participations=1))


def keeps_to_limits_of_before(subject: type[DeviceSession]) -> bool:
    """Whether a cap and a separation that a manifest named hold under later ones that name none, or weaker ones."""
    driver = Driver(state=SessionState(participations=2), subject=subject)
    driver.open_round(round=1, most_participations=2)
    again = driver.restarted()
    joined = bool(asked_for(again.open_round(round=2)))  # whose manifest names no cap
    joined |= bool(asked_for(again.open_round(round=3, most_participations=9)))
    rested = Driver(state=SessionState(participated_s=1090.0), subject=subject)
    rested.open_round(round=1, minimum_separation_s=50.0)
    return not joined and not asked_for(rested.restarted().open_round(round=2))


def test_a_limit_that_was_asked_for_once_holds() -> None:
    assert keeps_to_limits_of_before(DeviceSession)


@pytest.mark.parametrize(
    "change",
    [
        ("least_of(manifest.most_participations, self._state.most_participations)", "manifest.most_participations"),
        ("max(manifest.minimum_separation_s, self._state.separation_s)", "manifest.minimum_separation_s"),
    ],
    ids=["cap", "separation"],
)
def test_a_device_that_forgets_a_limit_is_caught(change: tuple[str, str]) -> None:
    assert not keeps_to_limits_of_before(broken_copy("device_client.session", change).DeviceSession)


def test_a_wearer_may_let_a_device_take_part_less_often() -> None:
    driver = Driver(state=SessionState(participations=2), maximum_participations=2)
    assert not asked_for(driver.open_round(round=1, most_participations=9))
    assert asked_for(Driver(state=SessionState(participations=1), maximum_participations=2).open_round(round=1))


@pytest.mark.parametrize(
    "changes",
    [
        {"l2_norm_clip": 1e308, "step": 1e-10},
        {"l2_norm_clip": 1e300, "step": 1e-300},
        {"l2_norm_clip": 1.0, "step": 1e-300},
    ],
    ids=short_id,
)
def test_terms_that_no_number_can_hold_are_refused_like_any_others(changes: dict[str, float]) -> None:
    manifest = secure(terms=changes)
    for check in (FLOORS.check, check_feasible, secure_round):
        with pytest.raises(ProtocolError):
            check(manifest)
    assert "steps of" in refused_by_session(secure_terms(**changes), helpers=PINNED, floors=FLOORS)
