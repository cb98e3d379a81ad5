"""The section of a configuration file that says where the broker is. No I/O."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta


class BrokerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Where the MQTT broker is, and the PEM files for mutual TLS (all three, or none on loopback).

    Args:
        host, port: address of the broker.
        ca: certificate of the CA that signed the broker's certificate.
        certificate, key: this client's own P-256 certificate and private key.
    """

    host: Annotated[str, Meta(min_length=1)]
    port: Annotated[int, Meta(ge=1, le=65_535)]
    ca: str | None = None
    certificate: str | None = None
    key: str | None = None
