"""One valid message of every kind, with fixed keys and digests, and changes that keep or break validity."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec.structs import replace

from fl_protocol import messages
from fl_protocol.errors import RefusalReason
from fl_protocol.helper_config import HelperPin
from fl_protocol.joining import Address, EnrolmentAnswerMsg, EnrolmentRequestMsg, StudyPins
from fl_protocol.log_messages import CosignatureMsg, CosignRefusal, CosignRefusalMsg, CosignRequestMsg
from fl_protocol.message_base import Msg
from fl_protocol.messages import (
    ChunkMsg,
    DeltaMsg,
    EvaluationPlanMsg,
    FeatureMsg,
    KemName,
    NackMsg,
    PresenceMsg,
    ReceiptMsg,
    RecipientKeyMsg,
    RoundManifestMsg,
    SignedMsg,
    StatisticsPlanMsg,
    TrainingPlanMsg,
    UpdateBodyMsg,
    UpdateEnvelopeMsg,
    UpdateHeaderMsg,
)
from fl_protocol.renewal_proof import RenewalProofMsg
from fl_protocol.revocation_messages import RevocationsKeptMsg, RevokedDevicesMsg
from fl_protocol.sealing import RoundKey, round_key_bytes
from fl_protocol.secagg.errors import UnmaskRefusal
from fl_protocol.secagg.messages import (
    ContributionMsg,
    DeviceCredentialMsg,
    HelperKeyMsg,
    MaskSumMsg,
    SecureBodyMsg,
    SecureTermsMsg,
    SignedContributionMsg,
    UnmaskEntryMsg,
    UnmaskRefusalMsg,
    UnmaskRequestMsg,
)
from fl_protocol.signing import sign

TENANT, TASK, DEVICE = "clinic", "watch", "watch-1"
AGGREGATOR_KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
DEVICE_KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32, 64)))
UPDATE_ID = bytes(range(16))
MODEL_DIGEST = hashlib.sha256(b"model").digest()
CONTROL_DIGEST = hashlib.sha256(b"control variate").digest()
GRAPH_DIGEST = hashlib.sha256(b"graph").digest()
SEALED_DIGEST = hashlib.sha256(b"sealed").digest()
KEMS: tuple[KemName, ...] = ("x25519", "mlkem768-x25519")
VALUES = np.array([0.5, -1.25, 0.0], "<f4").tobytes()
BODY = UpdateBodyMsg(num_parameters=3, values=VALUES)

PLAN = TrainingPlanMsg(
    sampling_rate=0.25,
    local_steps=4,
    learning_rate=0.5,
    l2_norm_clip=1.0,
    noise_multiplier=1.5,
    expected_batch_size=16.0,
    momentum=0.9,
    proximal_mu=0.01,
)
EVALUATION_PLAN = EvaluationPlanMsg(sampling_rate=0.5, noise_multiplier=2.0, loss_bound=4.0)
MOMENTS = FeatureMsg(name="acceleration x", statistic="moments", channel=0, low=-20.0, high=20.0)
HISTOGRAM = FeatureMsg(name="heart rate", statistic="histogram", channel=6, low=30.0, high=220.0, bins=19)
STATISTICS_PLAN = StatisticsPlanMsg(sampling_rate=1.0, noise_multiplier=1.5, features=(MOMENTS, HISTOGRAM))
DELTA = DeltaMsg(
    from_digest=hashlib.sha256(b"model before").digest(), digest=hashlib.sha256(b"delta").digest(), total_bytes=9
)
SCAFFOLD_PLAN = msgspec.structs.replace(PLAN, momentum=0.0, proximal_mu=0.0, control_variates=True)


def round_key(kem: KemName, seed: int = 7) -> RoundKey:
    """A fixed round key."""
    return RoundKey(kem, hashlib.shake_128(bytes([seed])).digest(round_key_bytes(kem)))


HELPERS = {
    f"helper-{letter}": Ed25519PrivateKey.from_private_bytes(hashlib.sha256(f"helper-{letter}".encode()).digest())
    for letter in "ab"
}


def helper_key(name: str, kem: KemName = "x25519") -> HelperKeyMsg:
    """A fixed helper's key; each is run by an operator of its own."""
    recipient = round_key(kem, seed=ord(name[-1])).recipient()
    return HelperKeyMsg(helper=name, operator=f"operator-{name[-1]}", recipient=recipient, not_after_s=2_000_000.0)


def secure_terms(**changes: Any) -> SecureTermsMsg:
    """Valid terms of a secure round with two helpers."""
    fields: dict[str, Any] = {
        "l2_norm_clip": 1.0,
        "step": 2.0**-8,
        "bits": 20,
        "most_updates": 20,
        "device_noise_variance": 64.0,
        "helper_noise_sigma": 16.0,
        "clip_bit": 0,
        "rotates": True,
        "prg": "chacha20",
        "helpers": tuple(sign(helper_key(name), identity) for name, identity in HELPERS.items()),
    }
    return SecureTermsMsg(**{**fields, **changes})


def secure_manifest(**changes: Any) -> RoundManifestMsg:
    """A valid open round of the engine secure."""
    return manifest(**{"engine": "secure", "secure": secure_terms(), **changes})


def manifest(kem: KemName = "x25519", **changes: Any) -> RoundManifestMsg:
    """A valid open round."""
    fields: dict[str, Any] = {
        "tenant": TENANT,
        "task": TASK,
        "round": 5,
        "status": "open",
        "engine": "open",
        "model_digest": MODEL_DIGEST,
        "graph_digest": GRAPH_DIGEST,
        "num_parameters": 3,
        "recipient": round_key(kem).recipient(),
        "plan": PLAN,
        "opened_s": 1_000_000.0,
        "deadline_s": 1_000_060.0,
        "goal": 10,
        "minimum_cohort": 5,
        "participation_probability": 0.5,
        "minimum_separation_s": 3600.0,
    }
    return RoundManifestMsg(**{**fields, **changes})


RECEIPT = ReceiptMsg(
    tenant=TENANT,
    task=TASK,
    round=5,
    device=DEVICE,
    update_id=UPDATE_ID,
    sealed_digest=SEALED_DIGEST,
    accepted_s=1_000_030.0,
)
NACK = NackMsg(
    tenant=TENANT,
    device=DEVICE,
    update_id=UPDATE_ID,
    reason=RefusalReason.TRUNCATED,
    missing=b"\x05",
    detail="chunks 0 and 2 are missing",
)
HEADER = UpdateHeaderMsg(
    tenant=TENANT,
    task=TASK,
    round=5,
    model_digest=MODEL_DIGEST,
    device=DEVICE,
    update_id=UPDATE_ID,
    kem="x25519",
    sealed_digest=SEALED_DIGEST,
)
CHUNK = ChunkMsg(transfer_id=UPDATE_ID, index=1, count=2, total_bytes=300, digest=SEALED_DIGEST, data=bytes(range(44)))

CONTRIBUTION = ContributionMsg(
    tenant=TENANT,
    task=TASK,
    round=5,
    manifest_digest=MODEL_DIGEST,
    device=DEVICE,
    update_id=UPDATE_ID,
    masked_digest=SEALED_DIGEST,
    seed_digests=(SEALED_DIGEST,),
)
SIGNED_CONTRIBUTION = SignedContributionMsg(contribution=messages.encode(CONTRIBUTION), signature=bytes(range(64)))
CREDENTIAL = DeviceCredentialMsg(signing_key=bytes(range(32)), certificate=b"a certificate in DER")
UNMASK_ENTRY = UnmaskEntryMsg(contribution=SIGNED_CONTRIBUTION, seed=bytes(range(64)))
UNMASK_REQUEST = UnmaskRequestMsg(manifest=b"a signed manifest", helper="helper-a", entries=(UNMASK_ENTRY,))
MASK_SUM = MaskSumMsg(
    helper="helper-a",
    tenant=TENANT,
    task=TASK,
    round=5,
    manifest_digest=MODEL_DIGEST,
    included_digest=SEALED_DIGEST,
    count=20,
    total=b"total",
)
UNMASK_REFUSAL = UnmaskRefusalMsg(
    helper="helper-a",
    tenant=TENANT,
    task=TASK,
    round=5,
    manifest_digest=MODEL_DIGEST,
    reason=UnmaskRefusal.TOO_FEW,
    detail="expected at least 5 updates, got 2",
)
PINS = StudyPins(
    publisher_key=SEALED_DIGEST,
    helpers=(
        HelperPin(name="helper-a", operator="patients", key=AGGREGATOR_KEY.public_key().public_bytes_raw().hex()),
    ),
    broker=Address("broker.example", 8883),
)
ENROLMENT_REQUEST = EnrolmentRequestMsg(
    tenant=TENANT,
    task=TASK,
    client="c" + "0" * 32,
    token=UPDATE_ID,
    enrolment=None,
    renewal_key=DEVICE_KEY.public_key().public_bytes_raw(),
    answer_to=RecipientKeyMsg(kem="x25519", public_key=SEALED_DIGEST),
    names=b"{}",
)
RENEWAL_PROOF = RenewalProofMsg(name="p" + "0" * 32, signature=bytes(range(70)))
RENEWAL_REQUEST = replace(ENROLMENT_REQUEST, token=None, enrolment="e" + "0" * 32, proof=RENEWAL_PROOF)


COSIGN_REQUEST = CosignRequestMsg(
    tenant=TENANT, helper="helper-a", note=b"a checkpoint", start=5, proof=(MODEL_DIGEST, SEALED_DIGEST)
)
COSIGNATURE = CosignatureMsg(tenant=TENANT, helper="helper-a", size=20, root=MODEL_DIGEST, cosignature=bytes(range(72)))
COSIGN_REFUSAL = CosignRefusalMsg(
    tenant=TENANT,
    helper="helper-a",
    request_digest=SEALED_DIGEST,
    last_size=30,
    reason=CosignRefusal.SMALLER,
    detail="the log has 20 entries, and had 30",
)
REVOKED_DEVICES = RevokedDevicesMsg(tenant=TENANT, helper="helper-a", devices=(DEVICE, "watch-2"))
REVOCATIONS_KEPT = RevocationsKeptMsg(tenant=TENANT, helper="helper-a", request_digest=SEALED_DIGEST)
EXAMPLES: tuple[Msg, ...] = (
    PLAN,
    EVALUATION_PLAN,
    MOMENTS,
    HISTOGRAM,
    STATISTICS_PLAN,
    DELTA,
    RecipientKeyMsg(kem="x25519", public_key=round_key("x25519").recipient().public_key),
    manifest(),
    manifest(status="finished", recipient=None),
    manifest(plan=SCAFFOLD_PLAN, control_digest=CONTROL_DIGEST),
    manifest(plan=SCAFFOLD_PLAN, status="finished", recipient=None),
    manifest(status="paused", recipient=None),
    manifest(status="aborted", recipient=None),
    manifest(
        most_participations=20,
        maximum_staleness=4,
        required_tags=("imu", "npu"),
        encodings=("top_k", "int8", "float32"),
        top_k_fraction=0.125,
        delta=DELTA,
    ),
    helper_key("helper-a"),
    secure_terms(clip_bit=3),
    secure_manifest(),
    secure_manifest(status="paused", recipient=None, secure=None),
    manifest(plan=EVALUATION_PLAN),
    manifest(plan=STATISTICS_PLAN),
    CHUNK,
    HEADER,
    UpdateEnvelopeMsg(header=messages.encode(HEADER), signature=bytes(range(64)), sealed=b"sealed"),
    BODY,
    UpdateBodyMsg(num_parameters=3, values=b"\x00\x38\x00\xbd\x00\x00", encoding="float16"),
    RECEIPT,
    NACK,
    CONTRIBUTION,
    SIGNED_CONTRIBUTION,
    CREDENTIAL,
    SecureBodyMsg(contribution=SIGNED_CONTRIBUTION, seeds=(bytes(range(64)),), masked=b"masked"),
    SecureBodyMsg(contribution=SIGNED_CONTRIBUTION, seeds=(bytes(range(64)),), masked=b"masked", credential=CREDENTIAL),
    UNMASK_ENTRY,
    msgspec.structs.replace(UNMASK_ENTRY, credential=CREDENTIAL),
    UNMASK_REQUEST,
    MASK_SUM,
    UNMASK_REFUSAL,
    COSIGN_REQUEST,
    COSIGNATURE,
    COSIGN_REFUSAL,
    REVOKED_DEVICES,
    REVOCATIONS_KEPT,
    PresenceMsg(state="online", software="covey 0.1.0", reason="charger"),
    SignedMsg(payload=messages.encode(RECEIPT), signature=bytes(range(64))),
    PINS,
    ENROLMENT_REQUEST,
    RENEWAL_REQUEST,
    RENEWAL_PROOF,
    EnrolmentAnswerMsg(
        request_digest=SEALED_DIGEST, outcome="enrolled", enrolment="e" + "0" * 32, names=b"{}", pins=PINS
    ),
    EnrolmentAnswerMsg(request_digest=SEALED_DIGEST, outcome="busy", detail="later", retry_after_s=30.0),
)


def as_map(message: Msg) -> dict[str, Any]:
    """The message as a plain map, as another implementation would build it."""
    loaded = msgspec.msgpack.decode(messages.encode(message))
    assert isinstance(loaded, dict)
    return loaded


def packed(fields: dict[str, Any]) -> bytes:
    """A plain map as MessagePack."""
    return msgspec.msgpack.encode(fields)
