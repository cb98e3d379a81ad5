"""A pseudonym's certificate and key as the files that Python's ``ssl`` wants, without the key ever being on a disk.

``SSLContext.load_cert_chain`` takes paths only. On Linux the paths lead to anonymous memory (memfd_create(2)), which
has no name that others could open and is gone with the descriptor. Like all memory it can be written to swap: encrypt
swap, or have none. Where there is no such call or no /proc, the files are made in memory-backed /dev/shm if there is
one, else in the temporary folder, readable by their owner only, and removed at once.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from device_client.errors import StoreError
from device_client.pseudonyms import Pseudonym
from fl_protocol.adapters.mqtt import TlsFiles
from fl_protocol.joining import Claim

_Place = Callable[[ExitStack, str, bytes], Path]


@contextmanager
def tls_files(pseudonym: Pseudonym) -> Iterator[TlsFiles]:
    """Paths for `fl_protocol.adapters.mqtt.MqttTransport`, which reads them while it is constructed.

    Args:
        pseudonym: whose certificate, key and CA.

    Raises:
        StoreError: there is no place for them.
    """
    contents = {"ca": pseudonym.ca, "certificate": pseudonym.certificate, "key": pseudonym.tls_key}
    with _placed(contents, pseudonym.id) as files:
        yield files


@contextmanager
def claim_tls_files(claim: Claim) -> Iterator[TlsFiles]:
    """The same for the identity that everybody asks to join under. Raises StoreError."""
    contents = {"ca": claim.ca.encode(), "certificate": claim.certificate.encode(), "key": claim.key.encode()}
    with _placed(contents, "the claim") as files:
        yield files


@contextmanager
def _placed(contents: dict[str, bytes], whose: str) -> Iterator[TlsFiles]:
    """PEM as files that are gone afterwards. Raises StoreError."""
    with ExitStack() as stack:
        try:
            place = _in_memory if _memory_files_work() else _in_folder(stack)
            paths = {name: place(stack, name, data) for name, data in contents.items()}
        except OSError as error:
            raise StoreError(f"the TLS key of {whose} cannot be handed to ssl ({error.strerror})") from error
        yield TlsFiles(**paths)


def _memory_files_work() -> bool:
    """Whether a file in memory can be made and opened by a path."""
    if not hasattr(os, "memfd_create"):
        return False
    try:
        descriptor = os.memfd_create("covey")
    except OSError:
        return False
    try:
        return Path(f"/proc/self/fd/{descriptor}").exists()
    finally:
        os.close(descriptor)


def _in_memory(stack: ExitStack, name: str, data: bytes) -> Path:
    """A file in memory; its descriptor is closed with the stack."""
    descriptor = os.memfd_create(f"covey-{name}")
    stack.callback(os.close, descriptor)
    with os.fdopen(descriptor, "wb", closefd=False) as stream:
        stream.write(data)
    return Path(f"/proc/self/fd/{descriptor}")


def _in_folder(stack: ExitStack) -> _Place:
    """Files in a folder of their own, removed with the stack."""
    shared_memory = Path("/dev/shm")  # noqa: S108 - the folder inside is made for its owner only
    folder = Path(tempfile.mkdtemp(prefix="covey-", dir=shared_memory if os.access(shared_memory, os.W_OK) else None))
    stack.callback(shutil.rmtree, folder)

    def place(_stack: ExitStack, name: str, data: bytes) -> Path:
        path = folder / name
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
            stream.write(data)
        return path

    return place
