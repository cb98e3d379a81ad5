"""What kinds of device, study and wearer there are, and what a device of each is set up with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from aggregator.certificates import certify, make_ca
from aggregator.store.devices import RegisteredKey
from device_client.config import (
    DeviceConfig,
    DeviceSection,
    EligibilityConfig,
    PrivacyConfig,
    RecordsConfig,
    StudyConfig,
)
from device_client.pseudonyms import Pseudonyms
from fl_protocol.broker_config import BrokerConfig
from fl_protocol.bundle import ModelBundle
from fl_protocol.enrolment import (
    IssuedCertificate,
    PseudonymRequest,
    decode_file,
    encode_file,
    periods_from,
    signed_answer,
)
from fl_protocol.messages import TrainingPlanMsg
from fl_protocol.model_manifest import (
    BundleManifest,
    ClipGroup,
    InputSchema,
    LabelSchema,
    LossSpec,
    ParameterSpec,
    TrainingDefaults,
)
from tests.device_client.ports import LogisticGraph
from tests.virtual_fleet import AGGREGATOR_KEY, TASK, TENANT, SeededEntropy

_DAY_S = 86_400.0
# A midnight UTC in which a period of two days, of pseudonyms, begins.
MIDNIGHT_S = 2 * _DAY_S * 10_000
_SAMPLES, _CHANNELS, _CLASSES = 40, 2, 4
_PERSONAL = 20


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What kind of device, study and wearer.

    Args:
        plan: changes of the rounds' plan.
        has_personal_layers: whether the last parameters stay on the device.
        rotates: whether names on the wire change, every two days.
        withdraws: whether the wearer withdraws consent, and grants it again, every other day.
        erases: whether the wearer erases the data, once.
        counts_records: whether there must be new records.
        requires_charging: whether it trains on its charger only.
        is_away: whether there is no network for three days and a half.
        card_fills: whether there is no room left on the flash for some hours, again and again.
        maximum_packet_bytes: of the broker.
        probability: with which a device takes part in a round.
        epsilon: budget.
        maximum_count, maximum_age_days: of records.
        days: how long it lasts.
    """

    plan: dict[str, Any] = field(default_factory=dict)
    has_personal_layers: bool = False
    rotates: bool = False
    withdraws: bool = False
    erases: bool = False
    counts_records: bool = False
    requires_charging: bool = False
    is_away: bool = False
    card_fills: bool = False
    maximum_packet_bytes: int = 1600
    probability: float = 1.0
    epsilon: float = 200.0
    maximum_count: int = 60
    maximum_age_days: float = 30.0
    days: float = 7.0


VARIANTS = {
    "a fixed name": Variant(),
    "momentum and personal layers, trained on the charger": Variant(
        plan={"momentum": 0.8, "local_steps": 6}, has_personal_layers=True, requires_charging=True
    ),
    "control variates, personal layers": Variant(plan={"control_variates": True}, has_personal_layers=True),
    "pseudonyms and a coin": Variant(rotates=True, probability=0.7),
    "pseudonyms, and away from any network for days": Variant(rotates=True, is_away=True),
    "consent withdrawn and granted again": Variant(withdraws=True, maximum_age_days=2.0),
    "data erased": Variant(erases=True, has_personal_layers=True, plan={"control_variates": True}),
    "new records are counted, little budget": Variant(counts_records=True, probability=0.8, epsilon=14.0),
    "everything": Variant(
        plan={"control_variates": True, "local_steps": 6},
        has_personal_layers=True,
        rotates=True,
        withdraws=True,
        erases=True,
        counts_records=True,
        maximum_packet_bytes=4096,
    ),
}


def plan_of(variant: Variant, *, steps: int) -> TrainingPlanMsg:
    """Every round's."""
    settings: dict[str, Any] = {
        "sampling_rate": 0.9,
        "local_steps": steps,
        "learning_rate": 0.2,
        "l2_norm_clip": 0.5,
        "noise_multiplier": 2.0,
        "expected_batch_size": 20.0,
    }
    return TrainingPlanMsg(**{**settings, **variant.plan})


def config_of(variant: Variant) -> DeviceConfig:
    """The device's ``device.toml``."""
    study = StudyConfig(
        tenant=TENANT,
        task=TASK,
        broker=BrokerConfig("virtual", 1),
        bundle="unused",
        publisher_key="unused",
        aggregator_key="unused",
        id=None if variant.rotates else "watch-0",
        tells_why_every_minutes=0.0,  # or every week has 336 readings that write nothing
    )
    return DeviceConfig(
        studies=(study,),
        device=DeviceSection(store="unused", store_key="unused"),
        privacy=PrivacyConfig(epsilon=variant.epsilon, delta=1e-5),
        eligibility=EligibilityConfig(
            require_charging=variant.requires_charging,
            require_idle=False,
            require_unmetered=False,
            minimum_new_records=1 if variant.counts_records else 0,
            new_records_noise=3.0,
        ),
        records=RecordsConfig(
            maximum_count=variant.maximum_count, maximum_age_days=variant.maximum_age_days, held_out_fraction=0.2
        ),
    )


def logistic_graph() -> LogisticGraph:
    """Softmax regression."""
    return LogisticGraph(8, _SAMPLES * _CHANNELS, _CLASSES)


def logistic_bundle(variant: Variant) -> ModelBundle:
    """The bundle of `_graph`; only its manifest and parameters are used."""
    count = _SAMPLES * _CHANNELS * _CLASSES
    shared = count - _PERSONAL if variant.has_personal_layers else count
    specs = (ParameterSpec("shared/kernel", (shared,), 0), ParameterSpec("own/kernel", (count - shared,), shared))
    manifest = BundleManifest(
        format=2,
        name="logistic",
        version=1,
        description="",
        data="",
        batch_size=8,
        num_parameters=count,
        num_shared_parameters=shared,
        parameters=specs[: 1 + variant.has_personal_layers],
        layers=(),
        input=InputSchema((_SAMPLES, _CHANNELS), ("x", "y"), ("1", "1"), 20.0),
        label=LabelSchema("class", tuple("abcd")),
        loss=LossSpec("softmax_cross_entropy"),
        preprocessing="",
        defaults=TrainingDefaults(0.1, 1.0, 0.0),
        norm_clips=(ClipGroup(("shared",), 1.0),),
        dropout=(),
        train_flops=1,
        train_arena_bytes=1,
        infer_params_offset=0,
    )
    params = np.linspace(-0.1, 0.1, count).astype(np.float32)
    return ModelBundle(manifest, b"no graph", b"", params, b"", np.zeros(0, np.float32))


def certified_names(pseudonyms: Pseudonyms, entropy: SeededEntropy) -> dict[str, RegisteredKey]:
    """Names for the week with their public signing keys, as the study's operator admits them."""
    request = decode_file(pseudonyms.prepare(count=7, entropy=entropy), PseudonymRequest)
    ca, issued = make_ca("clinic", now_s=MIDNIGHT_S - _DAY_S), []
    periods = periods_from(MIDNIGHT_S, period_days=2, count=len(request.pseudonyms))
    for one, period in zip(request.pseudonyms, periods, strict=True):
        key = x509.load_pem_x509_csr(one.csr.encode()).public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        certificate = certify(ca, one.id, key, not_before_s=period.not_before_s, not_after_s=period.not_after_s)
        issued.append(IssuedCertificate(id=one.id, certificate=certificate.decode()))
    answer = signed_answer(
        tenant=TENANT, task=TASK, ca=ca.certificate.decode(), certificates=issued, key=AGGREGATOR_KEY
    )
    pseudonyms.install(encode_file(answer), aggregator_key=AGGREGATOR_KEY.public_key())
    return {
        one.id: RegisteredKey(bytes.fromhex(one.signing_key), period.not_before_s, period.not_after_s)
        for one, period in zip(request.pseudonyms, periods, strict=True)
    }
