"""TLS with a private key that only a TPM 2.0 can use, in Python's own ``ssl``: OpenSSL's provider ``tpm2``.

The key is a PEM file of the kind ``TSS2 PRIVATE KEY`` (made by tpm2-openssl): what it holds is encrypted to this TPM.
``ssl`` has no call that loads a provider, so it is loaded into the very libcrypto that ``ssl`` is linked to, and only
where such a key is used. Two providers then both know ECDSA, and which one signs is a property of the whole process
(EVP_set_default_properties(3)). It is set for the handshakes of TPM keys alone, one at a time, and taken back: with it,
a key in a file could sign nothing, and without it, OpenSSL 3.0 hands the public half of a TPM's key to software, which
finds no private one.
"""

from __future__ import annotations

import _ssl
import ctypes
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from fl_protocol.errors import LocalMisuseError

PEM_BEGINS = b"-----BEGIN TSS2 PRIVATE KEY-----"
PREFER_TPM = "?provider=tpm2,tpm2.digest!=yes,tpm2.cipher!=yes"
"""Signatures by the TPM; digests and ciphers, which every record needs, by software."""
_ONE_AT_A_TIME = threading.RLock()
_LOADED: list[int] = []


class TpmSocket(ssl.SSLSocket):
    """A connection whose handshake the TPM signs."""

    def do_handshake(self, block: bool = False) -> None:
        """As `ssl.SSLSocket.do_handshake`."""
        with _preferred():
            super().do_handshake(block)


class SoftwareSocket(ssl.SSLSocket):
    """A connection with a key in a file, in a process that has others whose keys are a TPM's."""

    def do_handshake(self, block: bool = False) -> None:
        """As `ssl.SSLSocket.do_handshake`."""
        with _ONE_AT_A_TIME if _LOADED else nullcontext():
            super().do_handshake(block)


def is_tpm_key(path: Path) -> bool:
    """Whether a PEM file holds a key of a TPM. Raises OSError."""
    with open(path, "rb") as stream:
        return stream.read(len(PEM_BEGINS)) == PEM_BEGINS


def load_cert_chain(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    """As `ssl.SSLContext.load_cert_chain`, for keys in files and keys of a TPM.

    Raises:
        OSError: a file cannot be read; as ssl.SSLError, it holds no key, or none that this TPM can use.
        LocalMisuseError: there is no provider for TPM keys.
    """
    if not is_tpm_key(key):
        context.load_cert_chain(certificate, key)
        context.sslsocket_class = SoftwareSocket
        return
    _load_provider()
    with _preferred():
        context.load_cert_chain(certificate, key)
    context.sslsocket_class = TpmSocket


def _load_provider() -> None:
    """Load the provider, once. Raises LocalMisuseError."""
    with _ONE_AT_A_TIME:
        if _LOADED:
            return
        try:
            # The libraries that ssl is linked to, and no others: a second libcrypto would know nothing of this one.
            load = _function("OSSL_PROVIDER_load", ctypes.c_void_p)
            # An explicit one takes the default's place, unless that is explicit too (OSSL_PROVIDER(3)).
            default, tpm = load(None, b"default"), load(None, b"tpm2")
        except (OSError, AttributeError):
            default = tpm = None
        if not default or not tpm:
            raise LocalMisuseError(
                f"the TLS key is a TPM's, and {ssl.OPENSSL_VERSION} has no provider tpm2: expected OpenSSL 3 with the "
                "package tpm2-openssl"
            )
        _LOADED.append(tpm)


@contextmanager
def _preferred() -> Iterator[None]:
    """Meanwhile the TPM is preferred, and nobody else begins a handshake of ours."""
    with _ONE_AT_A_TIME:
        _set_properties(PREFER_TPM)
        try:
            yield
        finally:
            _set_properties("")


def _set_properties(query: str) -> None:
    """Which implementations are fetched from now on."""
    _function("EVP_set_default_properties", ctypes.c_int)(None, query.encode())


def _function(name: str, result: Any) -> Any:
    """A function of libcrypto that takes a library context and a text."""
    found = getattr(ctypes.CDLL(_ssl.__file__), name)
    found.argtypes, found.restype = [ctypes.c_void_p, ctypes.c_char_p], result
    return found
