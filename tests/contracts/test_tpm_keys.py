"""TLS keys in a TPM (in software): they are made there and sign, and what is wrong with a TPM is said in words."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from device_client.adapters import tpm2_tls_keys
from device_client.adapters.tpm2_tls_keys import Tpm2TlsKeys, tls_public_half
from device_client.errors import KeyStoreError
from device_client.pseudonyms import Pseudonyms
from device_client.tls_keys import SoftwareTlsKeys
from fl_protocol.adapters.tpm2_command import PEM_BEGINS
from fl_protocol.enrolment import PseudonymRequest, decode_file
from tests.contracts.software_tpm import SoftwareTpm, software_tpm
from tests.device_client.ports import MemoryStore
from tests.enrolments import TASK, TENANT, broken_copy


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SoftwareTpm]:
    with software_tpm(tmp_path_factory.mktemp("tpm")) as tpm:
        yield tpm


@pytest.fixture
def tpm(running: SoftwareTpm, monkeypatch: pytest.MonkeyPatch) -> SoftwareTpm:
    """Where this process's commands look for one."""
    use(running, monkeypatch)
    return running


def use(tpm: SoftwareTpm, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in tpm.environment.items():
        monkeypatch.setenv(name, value)


def check_keys_are_the_tpms() -> None:
    made = Tpm2TlsKeys().make(os.urandom)
    assert made.stored.startswith(PEM_BEGINS)
    for load in (serialization.load_pem_private_key, serialization.load_der_private_key):
        with pytest.raises(ValueError, match=r"key|PEM|ASN|pars|serial|format"):
            load(made.stored, None)


@pytest.mark.usefixtures("tpm")
def test_keys_are_the_tpms_and_leave_it_in_no_form() -> None:
    check_keys_are_the_tpms()
    key = Tpm2TlsKeys().make(os.urandom).key
    for leak in (
        key.private_numbers,
        lambda: key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
        lambda: key.exchange(ec.ECDH(), key.public_key()),
    ):
        with pytest.raises(KeyStoreError, match="never leaves it"):
            leak()


@pytest.mark.usefixtures("tpm")
def test_keys_of_either_kind_are_loaded_again_to_sign() -> None:
    """A device that got its TPM later renews by a name whose key is in software."""
    for made in (Tpm2TlsKeys().make(os.urandom), SoftwareTlsKeys().make(os.urandom)):
        signature = Tpm2TlsKeys().load(made.stored).sign(b"names", ec.ECDSA(hashes.SHA256()))
        made.key.public_key().verify(signature, b"names", ec.ECDSA(hashes.SHA256()))


@pytest.mark.usefixtures("tpm")
def test_keys_that_are_made_in_software_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    in_software = "from device_client.tls_keys import SoftwareTlsKeys; return SoftwareTlsKeys().make(entropy)"
    broken = broken_copy(tpm2_tls_keys.__name__, ("        del entropy\n", f"        {in_software}\n"))
    monkeypatch.setattr(f"{__name__}.Tpm2TlsKeys", broken.Tpm2TlsKeys)
    with pytest.raises(AssertionError):
        check_keys_are_the_tpms()


@pytest.mark.usefixtures("tpm")
def test_a_row_of_names_is_asked_for_with_keys_of_the_tpm_alone() -> None:
    names = Pseudonyms(MemoryStore(), tenant=TENANT, task=TASK, tls_keys=Tpm2TlsKeys())
    entries = decode_file(names.prepare(count=3, entropy=os.urandom), PseudonymRequest).pseudonyms
    requests = [x509.load_pem_x509_csr(one.csr.encode()) for one in entries]
    assert all(one.is_signature_valid for one in requests)
    assert len({one.public_key().public_numbers() for one in requests}) == 3  # type: ignore[union-attr]


@pytest.mark.usefixtures("tpm")
def test_it_signs_for_others_as_a_key_in_software_does() -> None:
    key = Tpm2TlsKeys().make(os.urandom).key
    assert (key.key_size, key.curve.name) == (256, "secp256r1")
    signature = key.sign(b"said", ec.ECDSA(hashes.SHA256()))
    key.public_key().verify(signature, b"said", ec.ECDSA(hashes.SHA256()))
    with pytest.raises(KeyStoreError, match="SHA-256"):
        key.sign(b"said", ec.ECDSA(hashes.SHA384()))


def test_the_key_is_worth_nothing_at_another_tpm(
    tpm: SoftwareTpm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Tpm2TlsKeys().make(os.urandom)
    assert tls_public_half(made.stored) == made.key.public_key()
    with software_tpm(tmp_path / "other") as other:
        use(other, monkeypatch)
        with pytest.raises(KeyStoreError, match="the TPM: openssl"):
            tls_public_half(made.stored)
    use(tpm, monkeypatch)
    assert tls_public_half(made.stored) == made.key.public_key()


@pytest.mark.usefixtures("tpm")
def test_a_damaged_key_is_named() -> None:
    stored = bytearray(Tpm2TlsKeys().make(os.urandom).stored)
    stored[200] ^= 1
    with pytest.raises(KeyStoreError, match="the TPM: openssl"):
        tls_public_half(bytes(stored))


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPM2OPENSSL_TCTI", "swtpm:host=127.0.0.1,port=1")
    with pytest.raises(KeyStoreError, match="is there a TPM, and may this user open it"):
        Tpm2TlsKeys().check()
    monkeypatch.setenv("OPENSSL_MODULES", "/nowhere")
    with pytest.raises(KeyStoreError, match="install tpm2-openssl"):
        Tpm2TlsKeys().check()
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(KeyStoreError, match="install openssl and tpm2-openssl"):
        Tpm2TlsKeys().check()
