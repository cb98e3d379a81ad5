"""TLS keys that the store holds whole: made, loaded again, and what is none is a sentence."""

from __future__ import annotations

import os

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from device_client.errors import KeyStoreError
from device_client.tls_keys import SoftwareTlsKeys

_ECDSA = ec.ECDSA(hashes.SHA256())


def test_a_key_that_was_made_signs_when_it_is_loaded_again() -> None:
    made = SoftwareTlsKeys().make(os.urandom)
    signature = SoftwareTlsKeys().load(made.stored).sign(b"names", _ECDSA)
    made.key.public_key().verify(signature, b"names", _ECDSA)


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        (b"-----BEGIN TSS2 PRIVATE KEY-----\nMHcCAQEE\n-----END TSS2 PRIVATE KEY-----\n", 'set tls_keys = "tpm2"'),
        (b"", "expected one that the store holds whole"),
        (
            Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
            "expected one on P-256",
        ),
    ],
    ids=["a TPM's", "nothing", "another kind"],
)
def test_what_is_no_key_of_the_store_is_told(stored: bytes, words: str) -> None:
    with pytest.raises(KeyStoreError) as caught:
        SoftwareTlsKeys().load(stored)
    assert words in str(caught.value)
