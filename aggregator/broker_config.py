"""Configuration files for mosquitto: mutual TLS 1.3, the certificate's name as identity, an ACL per topic."""

from __future__ import annotations

from fl_protocol.errors import LocalMisuseError
from fl_protocol.limits import MAX_PACKET_BYTES, PACKET_RESERVE_BYTES
from fl_protocol.topics import checked_name

MAX_INFLIGHT_MESSAGES = 1000
"""Messages that mosquitto sends to one client before the first is acknowledged. An ingest worker acknowledges what
it has committed, hundreds at a time: with fewer under way it would wait for the broker, and the broker for it.
"""
MAX_QUEUED_MESSAGES = 100_000
"""Messages held for one client beyond those: a fleet's burst while a worker is away. The bytes bound the memory."""
MAX_QUEUED_BYTES = 2**30
"""Bytes held for one client. 5,000 devices with 36 kB each are 180 MB; with 4 MB each they are 20 GB, which no broker
should hold: what does not fit is dropped in silence, and devices send again what nobody has receipted.
"""


CLAIM_CONNECTIONS = 1000
"""Devices that may be asking to be enrolled at a time; others come again."""
CLAIM_QUEUED_MESSAGES = 5000
"""Requests held for a desk that is away; each device sends its own again."""


def mosquitto_config(*, host: str, port: int, folder: str, user: str, revocation: bool = False) -> str:
    """``mosquitto.conf`` for one TLS listener.

    Args:
        host: address to listen on.
        port: port to listen on.
        folder: holds ``ca.pem``, ``broker.pem``, ``broker.key`` and ``acl``.
        user: account that mosquitto, when started as root, switches to; it must be able to read the folder.
        revocation: whether certificates that ``crl.pem`` in the folder lists are refused; mosquitto does not start
            without that file, and reads it again at SIGHUP.

    Raises:
        LocalMisuseError: a setting holds a line break, which would begin another setting.
    """
    common = _listener(host=host, port=port, folder=folder, user=user, revocation=revocation)
    return f"""{common}use_username_as_clientid true
acl_file {folder}/acl
max_queued_messages {MAX_QUEUED_MESSAGES}
max_queued_bytes {MAX_QUEUED_BYTES}
max_inflight_messages {MAX_INFLIGHT_MESSAGES}
"""


def claims_config(*, host: str, port: int, folder: str, user: str) -> str:
    """``claims.conf`` for the claim broker, a process of its own (ADR 15); arguments and errors as above.

    All its clients but the desk have one certificate, so their client ids are what tells them apart. On a second
    listener of the study's broker whoever has that certificate could take the client id of the aggregator, whose
    connection would then be ended: mosquitto's client ids are those of the process.
    """
    common = _listener(host=host, port=port, folder=folder, user=user, revocation=False)
    return f"""{common}acl_file {folder}/claims.acl
max_connections {CLAIM_CONNECTIONS}
max_queued_messages {CLAIM_QUEUED_MESSAGES}
max_inflight_messages 100
"""


def _listener(*, host: str, port: int, folder: str, user: str, revocation: bool) -> str:
    """What both brokers have."""
    for name, value in (("host", host), ("folder", folder), ("user", user)):
        if not value.isprintable():
            raise LocalMisuseError(f"{name}: expected one line for mosquitto.conf, got {value!r}")
    crl = f"crlfile {folder}/crl.pem\n" if revocation else ""
    return f"""# written by covey; changes are overwritten
listener {port} {host}
cafile {folder}/ca.pem
certfile {folder}/broker.pem
keyfile {folder}/broker.key
{crl}tls_version tlsv1.3
require_certificate true
use_identity_as_username true
allow_anonymous false
user {user}
set_tcp_nodelay true
max_packet_size {MAX_PACKET_BYTES + PACKET_RESERVE_BYTES}
# Sessions and what is queued for them live in memory: a receipt is the proof of delivery, not this broker's word.
persistence false
log_dest stdout
log_type error
log_type warning
log_type notice
connection_messages false
"""


def claims_acl(*, tenant: str, desk: str) -> str:
    """The claim broker's ACL: a client asks under its own id and reads the answers to it; the desk does the rest.

    Args:
        tenant: name on the wire.
        desk: the desk's client id.
    """
    root = f"fl/v1/{checked_name(tenant, 'tenant')}"
    return f"""# written by covey; %c is the client id, which a device draws at random
user {checked_name(desk, "desk")}
topic read {root}/enrol/+/request
topic write {root}/enrol/+/answer

pattern write {root}/enrol/%c/request
pattern read {root}/enrol/%c/answer
"""


def mosquitto_acl(
    *,
    tenant: str,
    aggregator: str,
    standbys: tuple[str, ...] = (),
    workers: tuple[str, ...] = (),
    desk: str | None = None,
) -> str:
    """The ACL: a device writes its own uploads and presence, reads its own answers, manifests and models; no more.

    A helper of secure rounds reads requests to it, and writes its key and its answers. An ingest worker reads uploads
    and answers them, and has a device's rights under its own name, as everybody has. What the study publishes
    (manifests, models) is the aggregator's alone.

    Args:
        tenant: name on the wire.
        aggregator: the aggregator's client id.
        standbys: client ids of aggregators that stand by, with the same rights.
        workers: client ids of the ingest workers that run beside it.
        desk: client id of the enrolment desk, where devices renew their names.

    Raises:
        LocalMisuseError: a name that is none, or one that is given twice.
    """
    root = f"fl/v1/{checked_name(tenant, 'tenant')}"
    leaders = [checked_name(aggregator, "aggregator"), *(checked_name(one, "standby") for one in standbys)]
    names = [*leaders, *(checked_name(worker, "worker") for worker in workers)]
    if desk is not None:
        names.append(checked_name(desk, "desk"))
    if len(set(names)) < len(names):
        raise LocalMisuseError(
            f"workers and standbys: expected a name of its own for each, beside the aggregator, got {names}"
        )
    leads = "".join(_leads(root, name) for name in leaders)
    ingest = "".join(f"user {name}\ntopic read {root}/up/#\ntopic write {root}/down/#\n\n" for name in workers)
    asks = answers = ""
    if desk is not None:
        answers = f"user {desk}\ntopic read {root}/enrol/+/request\ntopic write {root}/enrol/+/answer\n\n"
        asks = f"pattern write {root}/enrol/%u/request\npattern read {root}/enrol/%u/answer\n"
    return f"""# written by covey; %u is the name in the client's certificate
{leads}{ingest}{answers}pattern write {root}/up/+/%u/+/+
pattern write {root}/state/%u
pattern read {root}/down/%u/+
pattern read {root}/round/+
pattern read {root}/model/+/+
pattern read {root}/helper/%u/request/+/+
pattern write {root}/helper/%u/key
pattern write {root}/helper/%u/refusal
pattern write {root}/helper/%u/answer/+/+
{asks}"""


def _leads(root: str, name: str) -> str:
    """What coordinates, or may have to."""
    return f"""user {name}
topic read {root}/up/#
topic read {root}/state/+
topic write {root}/round/#
topic write {root}/model/#
topic write {root}/down/#
topic read {root}/helper/#
topic write {root}/helper/+/request/#

"""
