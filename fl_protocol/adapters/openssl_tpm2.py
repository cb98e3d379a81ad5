"""TLS with a private key that only a TPM 2.0 can use, in Python's own ``ssl``.

The key is a PEM file of the kind ``TSS2 PRIVATE KEY`` (made by tpm2-openssl): what it holds is encrypted to this TPM.
``ssl`` takes keys as files that OpenSSL can read whole, so OpenSSL is given the public half and a function that signs
(EC_KEY_METHOD_new(3), deprecated since OpenSSL 3.0 and there in every 3.x), which asks the TPM
(`fl_protocol.adapters.tpm2_command`). Only that key is signed with so: certificates of the other side are verified, and
keys in files used, as in any other process, and connections do not wait for each other.
"""

from __future__ import annotations

import _ssl
import ctypes
import os
import ssl
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fl_protocol.adapters import tpm2_command
from fl_protocol.adapters.tpm2_command import PEM_BEGINS, TpmError
from fl_protocol.errors import LocalMisuseError

_POINTER, _INT, _TEXT = ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p
_LENGTH = ctypes.POINTER(ctypes.c_uint)
# int sign(int type, const unsigned char *dgst, int dlen, unsigned char *sig, unsigned int *siglen,
#          const BIGNUM *kinv, const BIGNUM *r, EC_KEY *eckey)
_SIGN = ctypes.CFUNCTYPE(_INT, _INT, _POINTER, _INT, _POINTER, _LENGTH, _POINTER, _POINTER, _POINTER)
_NID_P256, _EVP_PKEY_EC = 415, 408
_LONGEST_SIGNATURE = 72
"""Bytes of an ECDSA signature on P-256 in DER; OpenSSL has room for no more."""
_SAID = threading.local()
"""The exception for which the TPM did not sign in this thread: OpenSSL passes on only that it did not."""
_KEPT: list[Any] = []
"""Functions that OpenSSL calls; Python must not forget them."""


class TpmSocket(ssl.SSLSocket):
    """A connection whose handshake the TPM signs."""

    def do_handshake(self, block: bool = False) -> None:
        """As `ssl.SSLSocket.do_handshake`; where the TPM did not sign, the error says why."""
        if threading.current_thread() is not threading.main_thread():
            self._shake_hands(block)
            return
        # Security: Ctrl-C is raised in the main thread alone, and there between any two instructions, so before the
        # first of the function that signs: OpenSSL would be answered by chance.
        with ThreadPoolExecutor(1) as pool:
            pool.submit(self._shake_hands, block).result()

    def _shake_hands(self, block: bool) -> None:
        """In a thread that no signal interrupts."""
        _SAID.why = None
        try:
            super().do_handshake(block)
        except ssl.SSLError as error:
            why = _SAID.why
            if why is None:
                raise
            if not isinstance(why, Exception):
                raise why from error
            raise ssl.SSLError(error.errno, f"{error.strerror}; {str(why) or type(why).__name__}") from error


def is_tpm_key(path: Path) -> bool:
    """Whether a PEM file holds a key of a TPM. Raises OSError."""
    with open(path, "rb") as stream:
        return stream.read(len(PEM_BEGINS)) == PEM_BEGINS


def load_cert_chain(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    """As `ssl.SSLContext.load_cert_chain`, for keys in files and keys of a TPM.

    Raises:
        OSError: a file cannot be read; as ssl.SSLError, it holds no certificate, or the key is not the certificate's.
        LocalMisuseError: the TPM cannot use the key, or this Python's ``ssl`` cannot be given one.
    """
    if not is_tpm_key(key):
        context.load_cert_chain(certificate, key)
        return
    certificate.read_bytes()  # for the sentence that Python has where it cannot
    try:
        private = _private_key(key.read_bytes())
        native = _native(context)
        read = _function("SSL_CTX_use_certificate_chain_file", _POINTER, _TEXT)(native, os.fsencode(certificate))
        use = _function("SSL_CTX_use_PrivateKey", _POINTER, _POINTER)
        check = _function("SSL_CTX_check_private_key", _POINTER)
    except TpmError as error:
        raise LocalMisuseError(f"the TLS key: {error}") from error
    except AttributeError as error:
        raise LocalMisuseError(
            f"the TLS key is a TPM's, and {ssl.OPENSSL_VERSION} cannot be given one ({error}): expected OpenSSL 3"
        ) from error
    # OpenSSL holds the key against the certificate that it was given before; one of another kind, such as RSA, only
    # when it is asked to.
    if read != 1 or use(native, private) != 1 or check(native) != 1:
        _function("ERR_clear_error")()
        raise ssl.SSLError(f"expected a certificate of the TPM's key {key} in {certificate}")
    context.sslsocket_class = TpmSocket


@cache
def _private_key(stored: bytes) -> int:
    """An EVP_PKEY that has the public half and asks the TPM for signatures; as long as the process lives.

    Raises:
        TpmError: the TPM cannot use the key.
        AttributeError: this OpenSSL has no such keys.
    """
    point = tpm2_command.public_half(stored).public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    method = _function("EC_KEY_METHOD_new", _POINTER, result=_POINTER)(_function("EC_KEY_OpenSSL", result=_POINTER)())
    sign = _SIGN(_signer(stored))
    _KEPT.append(sign)
    _function("EC_KEY_METHOD_set_sign", _POINTER, _SIGN, _POINTER, _POINTER, result=None)(method, sign, None, None)
    key = _function("EC_KEY_new_by_curve_name", _INT, result=_POINTER)(_NID_P256)
    _function("EC_KEY_set_method", _POINTER, _POINTER)(key, method)
    _function("EC_KEY_oct2key", _POINTER, _TEXT, ctypes.c_size_t, _POINTER)(key, point, len(point), None)
    found = _function("EVP_PKEY_new", result=_POINTER)()
    if _function("EVP_PKEY_assign", _POINTER, _INT, _POINTER)(found, _EVP_PKEY_EC, key) != 1:
        raise TpmError("the TPM: expected OpenSSL to take its public half")
    return int(found)


def _signer(stored: bytes) -> Callable[..., int]:
    """What OpenSSL calls for a signature; 1 if there is one."""

    def sign(_type: int, digest: int, length: int, to: int, written: Any, *_: Any) -> int:
        try:
            written[0] = 0
            signature = tpm2_command.sign(stored, ctypes.string_at(digest, length))
            if len(signature) > _LONGEST_SIGNATURE:
                raise TpmError(
                    f"the TPM: expected {_LONGEST_SIGNATURE} bytes of signature at most, got {len(signature)}"
                )
            ctypes.memmove(to, signature, len(signature))
            written[0] = len(signature)
        # Security: of a function that raises, OpenSSL reads the answer and the length off memory that nobody has
        # written, and sends so many bytes to the broker.
        except BaseException as error:
            _SAID.why = error
            return 0
        return 1

    return sign


def _native(context: ssl.SSLContext) -> int:
    """The SSL_CTX of a context: the first member of CPython's object. Raises AttributeError."""
    found = _POINTER.from_address(id(context) + object.__basicsize__).value
    options = _function("SSL_CTX_get_options", _POINTER, result=ctypes.c_uint64)
    if found is None or options(found) & 0xFFFF_FFFF != int(context.options) & 0xFFFF_FFFF:
        raise AttributeError("the context is laid out in another way")
    return found


def _function(name: str, *arguments: Any, result: Any = _INT) -> Any:
    """A function of the OpenSSL that ``ssl`` is linked to, and of no other. Raises AttributeError."""
    found = getattr(ctypes.CDLL(_ssl.__file__), name)
    found.argtypes, found.restype = list(arguments), result
    return found
