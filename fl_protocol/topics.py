"""MQTT topic names: built from checked parts, parsed back strictly. At most seven slashes (AWS IoT's limit)."""

from __future__ import annotations

import hashlib
import re
from typing import Literal, NamedTuple

from fl_protocol.errors import LocalMisuseError, ProtocolError
from fl_protocol.limits import MAX_CHUNKS, NUM_SHARDS

_ROOT = "fl/v1"
NAME_PATTERN = r"^[a-z0-9][a-z0-9_-]{0,63}\Z"
"""What a tenant, task or device may be called: also a file name, a certificate CN and one MQTT topic level."""
_NAME = re.compile(NAME_PATTERN)
_UP = re.compile(
    r"fl/v1/(?P<tenant>[a-z0-9][a-z0-9_-]{0,63})/up/(?P<shard>[0-9]{2})/(?P<device>[a-z0-9][a-z0-9_-]{0,63})"
    r"/(?P<update>[0-9a-f]{32})/(?P<index>0|[1-9][0-9]{0,4})",
    re.ASCII,
)

_HELPER = re.compile(
    r"fl/v1/(?P<tenant>[a-z0-9][a-z0-9_-]{0,63})/helper/(?P<helper>[a-z0-9][a-z0-9_-]{0,63})"
    r"/(?P<kind>key|refusal|(?:request|answer)/[0-9a-f]{32}/(?:0|[1-9][0-9]{0,4}))",
    re.ASCII,
)

_ENROL = re.compile(
    r"fl/v1/(?P<tenant>[a-z0-9][a-z0-9_-]{0,63})/enrol/(?P<client>[a-z0-9][a-z0-9_-]{0,63})/request",
    re.ASCII,
)

_STATE = re.compile(r"fl/v1/(?P<tenant>[a-z0-9][a-z0-9_-]{0,63})/state/(?P<device>[a-z0-9][a-z0-9_-]{0,63})", re.ASCII)

DownKind = Literal["receipt", "nack", "control"]


class UploadTopic(NamedTuple):
    """The parts of an upload topic, as the broker delivered it."""

    tenant: str
    device: str
    update_id: bytes
    chunk_index: int


def checked_name(value: str, what: str) -> str:
    """`value` if it may stand in a topic, else `LocalMisuseError` naming `what`."""
    if not _NAME.fullmatch(value):
        raise LocalMisuseError(
            f"{what}: expected 1 to 64 of a-z, 0-9, - and _, not starting with - or _; got {value!r}"
        )
    return value


def round_topic(tenant: str, task: str) -> str:
    """Retained, signed round manifest of a task."""
    return f"{_ROOT}/{checked_name(tenant, 'tenant')}/round/{checked_name(task, 'task')}"


def model_topic(tenant: str, digest: bytes, index: int) -> str:
    """Retained chunk `index` of the model with this SHA-256."""
    return f"{_ROOT}/{checked_name(tenant, 'tenant')}/model/{digest.hex()}/{index}"


def model_filter(tenant: str, digest: bytes) -> str:
    """Subscription to all chunks of one model."""
    return f"{_ROOT}/{checked_name(tenant, 'tenant')}/model/{digest.hex()}/+"


def shard_of(device: str) -> int:
    """Upload shard of a device, 0..63: the first byte of SHA-256 of its id, modulo 64."""
    return hashlib.sha256(device.encode()).digest()[0] % NUM_SHARDS


def upload_topic(tenant: str, device: str, update_id: bytes, index: int) -> str:
    """Chunk `index` of a device's sealed update."""
    shard = shard_of(checked_name(device, "device"))
    return f"{_ROOT}/{checked_name(tenant, 'tenant')}/up/{shard:02d}/{device}/{update_id.hex()}/{index}"


def upload_filter(tenant: str) -> str:
    """Subscription to every device's uploads, all shards (an aggregator's)."""
    return f"{_ROOT}/{checked_name(tenant, 'tenant')}/up/+/+/+/+"


def shard_filter(tenant: str, shard: int) -> str:
    """Subscription to the uploads of one shard's devices (a worker's)."""
    return f"{_ROOT}/{checked_name(tenant, 'tenant')}/up/{shard:02d}/+/+/+"


def parse_upload_topic(topic: str) -> UploadTopic:
    """The parts of an upload topic.

    Raises:
        ProtocolError: not an upload topic, or the shard is not the device's.
    """
    match = _UP.fullmatch(topic)
    if match is None or int(match["index"]) >= MAX_CHUNKS:
        raise ProtocolError(f"expected an upload topic, got {topic[:120]!r}")
    if int(match["shard"]) != shard_of(match["device"]):
        raise ProtocolError(
            f"expected shard {shard_of(match['device']):02d} for {match['device']}, got {match['shard']}"
        )
    return UploadTopic(match["tenant"], match["device"], bytes.fromhex(match["update"]), int(match["index"]))


def down_topic(tenant: str, device: str, kind: DownKind) -> str:
    """Where the aggregator answers one device."""
    return f"{_ROOT}/{checked_name(tenant, 'tenant')}/down/{checked_name(device, 'device')}/{kind}"


def down_filter(tenant: str, device: str) -> str:
    """Subscription to everything addressed to one device."""
    return f"{_ROOT}/{checked_name(tenant, 'tenant')}/down/{checked_name(device, 'device')}/+"


HelperKind = Literal["key", "request", "answer", "refusal"]


class HelperTopic(NamedTuple):
    """The parts of a helper's topic, as the broker delivered it."""

    tenant: str
    helper: str
    kind: HelperKind


def helper_topic(tenant: str, helper: str, kind: Literal["key", "refusal"]) -> str:
    """A helper's retained, signed key; or why it does not answer."""
    return f"{_ROOT}/{checked_name(tenant, 'tenant')}/helper/{checked_name(helper, 'helper')}/{kind}"


def helper_transfer_topic(
    tenant: str, helper: str, kind: Literal["request", "answer"], transfer_id: bytes, index: int
) -> str:
    """Chunk `index` of a request to a helper, or of its answer."""
    root = f"{_ROOT}/{checked_name(tenant, 'tenant')}/helper/{checked_name(helper, 'helper')}"
    return f"{root}/{kind}/{transfer_id.hex()}/{index}"


def helper_filters(tenant: str) -> list[str]:
    """Subscriptions to everything that helpers say (an aggregator's)."""
    root = f"{_ROOT}/{checked_name(tenant, 'tenant')}/helper/+"
    return [f"{root}/key", f"{root}/refusal", f"{root}/answer/+/+"]


def helper_request_filter(tenant: str, helper: str) -> str:
    """Subscription to all requests to one helper."""
    return f"{_ROOT}/{checked_name(tenant, 'tenant')}/helper/{checked_name(helper, 'helper')}/request/+/+"


def is_helper_topic(topic: str, tenant: str) -> bool:
    """Whether a topic is one of a helper's, as far as its beginning says; cheap, for every message that comes."""
    return topic.startswith(f"{_ROOT}/{tenant}/helper/")


def parse_helper_topic(topic: str) -> HelperTopic:
    """The parts of a helper's topic. Raises ProtocolError."""
    match = _HELPER.fullmatch(topic)
    if match is None:
        raise ProtocolError(f"expected a helper's topic, got {topic[:120]!r}")
    kinds: dict[str, HelperKind] = {"key": "key", "refusal": "refusal", "request": "request", "answer": "answer"}
    return HelperTopic(match["tenant"], match["helper"], kinds[match["kind"].split("/")[0]])


def update_label(update_id: bytes) -> str:
    """What both sides' journals call an update, from its first chunk to its receipt: 12 hex digits of its id.

    Ids are drawn at random for each update, so they tie no two of a device's updates, or names, together.
    """
    return update_id[:6].hex()


def state_topic(tenant: str, device: str) -> str:
    """Retained presence of one device (its last will marks it offline)."""
    return f"{_ROOT}/{checked_name(tenant, 'tenant')}/state/{checked_name(device, 'device')}"


def state_filter(tenant: str) -> str:
    """Subscription to all devices' presence (a coordinator's)."""
    return f"{_ROOT}/{checked_name(tenant, 'tenant')}/state/+"


def is_state_topic(topic: str, tenant: str) -> bool:
    """Whether a topic is one of presence, as far as its beginning says; cheap, for every message that comes."""
    return topic.startswith(f"{_ROOT}/{tenant}/state/")


def parse_state_topic(topic: str, tenant: str) -> str:
    """The device that a presence is of. Raises ProtocolError."""
    match = _STATE.fullmatch(topic)
    if match is None or match["tenant"] != tenant:
        raise ProtocolError(f"expected a device's presence for {tenant}, got {topic[:120]!r}")
    return match["device"]


def enrolment_topic(tenant: str, client: str, kind: Literal["request", "answer"]) -> str:
    """A client's request to belong to a study, or the answer to it; each is one message."""
    return f"{_ROOT}/{checked_name(tenant, 'tenant')}/enrol/{checked_name(client, 'client')}/{kind}"


def enrolment_request_filter(tenant: str) -> str:
    """Subscription to all requests (the enrolment desk's)."""
    return f"{_ROOT}/{checked_name(tenant, 'tenant')}/enrol/+/request"


def parse_enrolment_topic(topic: str, tenant: str) -> str:
    """The client that a request is from. Raises ProtocolError."""
    match = _ENROL.fullmatch(topic)
    if match is None or match["tenant"] != tenant:
        raise ProtocolError(f"expected an enrolment request for {tenant}, got {topic[:120]!r}")
    return match["client"]
