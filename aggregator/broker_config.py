"""Configuration files for mosquitto: mutual TLS 1.3, the certificate's name as identity, an ACL per topic."""

from __future__ import annotations

from fl_protocol.errors import LocalMisuseError
from fl_protocol.limits import MAX_PACKET_BYTES, PACKET_RESERVE_BYTES
from fl_protocol.topics import checked_name


def mosquitto_config(*, host: str, port: int, folder: str, user: str) -> str:
    """``mosquitto.conf`` for one TLS listener.

    Args:
        host: address to listen on.
        port: port to listen on.
        folder: holds ``ca.pem``, ``broker.pem``, ``broker.key`` and ``acl``.
        user: account that mosquitto, when started as root, switches to; it must be able to read the folder.

    Raises:
        LocalMisuseError: a setting holds a line break, which would begin another setting.
    """
    for name, value in (("host", host), ("folder", folder), ("user", user)):
        if not value.isprintable():
            raise LocalMisuseError(f"{name}: expected one line for mosquitto.conf, got {value!r}")
    return f"""# written by covey; changes are overwritten
listener {port} {host}
cafile {folder}/ca.pem
certfile {folder}/broker.pem
keyfile {folder}/broker.key
tls_version tlsv1.3
require_certificate true
use_identity_as_username true
use_username_as_clientid true
allow_anonymous false
acl_file {folder}/acl
user {user}
set_tcp_nodelay true
max_packet_size {MAX_PACKET_BYTES + PACKET_RESERVE_BYTES}
max_queued_messages 10000
max_inflight_messages 200
persistence false
log_dest stdout
log_type error
log_type warning
log_type notice
connection_messages false
"""


def mosquitto_acl(*, tenant: str, aggregator: str) -> str:
    """The ACL: a device writes its own uploads and presence, reads its own answers, manifests and models; no more.

    Args:
        tenant: name on the wire.
        aggregator: the aggregator's client id.
    """
    root = f"fl/v1/{checked_name(tenant, 'tenant')}"
    return f"""# written by covey; %u is the name in the client's certificate
user {checked_name(aggregator, "aggregator")}
topic read {root}/up/#
topic read {root}/state/#
topic write {root}/round/#
topic write {root}/model/#
topic write {root}/down/#

pattern write {root}/up/+/%u/+/+
pattern write {root}/state/%u
pattern read {root}/down/%u/+
pattern read {root}/round/+
pattern read {root}/model/+/+
"""
