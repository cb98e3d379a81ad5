"""The aggregator's side of a helper that is asked over HTTPS; on http.client, TLS 1.3 with both sides authenticated."""

from __future__ import annotations

import http.client
import ssl
import time
from dataclasses import dataclass
from pathlib import Path

from aggregator.errors import AggregatorError
from fl_protocol.adapters.mqtt import TlsFiles, tls_context
from fl_protocol.errors import LocalMisuseError
from fl_protocol.limits import MAX_TRANSFER_BYTES
from fl_protocol.topics import checked_name

_TIMEOUT_S = 60.0
"""For connecting, for each read, and for the whole answer from its first byte: a helper opens the seeds of thousands of
updates before it answers.
"""
_PART_BYTES = 1 << 16


class HelperUnreachableError(AggregatorError):
    """A helper did not answer: try again later."""


class HelperRefusedRequestError(AggregatorError):
    """A helper does not take the request for one of its study's aggregator; trying again brings nothing.

    Args:
        status: of HTTP.
        detail: what the helper says, for people.
    """

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(f"the helper answered {status}: {detail}")
        self.status = status


@dataclass(frozen=True)
class HelperReply:
    """What a helper answered, not verified.

    Args:
        is_answer: a signed `MaskSumMsg`, `CosignatureMsg` or `RevocationsKeptMsg`; otherwise a signed refusal.
        data: its bytes.
    """

    is_answer: bool
    data: bytes


class HttpsHelper:
    """Asks one helper; every call is one connection.

    Args:
        host: of the helper, as its certificate names it.
        port: of the helper.
        ca: PEM file of the CA that certified it.
        certificate: PEM file of the aggregator's own certificate.
        key: PEM file of its key.
        timeout_s: for connecting, for each read, and for the whole answer from its first byte.

    Raises:
        LocalMisuseError: the files cannot be used.
    """

    def __init__(
        self, host: str, port: int, *, ca: Path, certificate: Path, key: Path, timeout_s: float = _TIMEOUT_S
    ) -> None:
        self._address, self._timeout_s = (host, port), timeout_s
        self._context = tls_context(TlsFiles(ca, certificate, key))

    def unmask(self, request: bytes) -> HelperReply:
        """Ask for a sum of masks.

        Args:
            request: a signed `UnmaskRequestMsg`.

        Raises:
            HelperUnreachableError: no answer came; ask again.
            HelperRefusedRequestError: the helper does not know this aggregator or study, or cannot read the request.
        """
        return self._post("/v1/unmask", request)

    def cosign(self, request: bytes) -> HelperReply:
        """Ask for a co-signature, by a signed `CosignRequestMsg`. Raises as `unmask`."""
        return self._post("/v1/cosign", request)

    def revoke(self, request: bytes) -> HelperReply:
        """Tell of devices that were thrown out, by a signed `RevokedDevicesMsg`. Raises as `unmask`."""
        return self._post("/v1/revocations", request)

    def _post(self, path: str, request: bytes) -> HelperReply:
        """Ask with a request."""
        if len(request) > MAX_TRANSFER_BYTES:
            raise LocalMisuseError(f"request: expected at most {MAX_TRANSFER_BYTES} bytes, got {len(request)}")
        status, data = self._ask("POST", path, request)
        if status not in {200, 409}:
            raise HelperRefusedRequestError(status, data[:400].decode(errors="replace"))
        return HelperReply(status == 200, data)

    def key(self, tenant: str) -> bytes:
        """The helper's signed `HelperKeyMsg`, not verified. Raises as `unmask`."""
        status, data = self._ask("GET", f"/v1/key/{checked_name(tenant, 'tenant')}")
        if status != 200:
            raise HelperRefusedRequestError(status, data[:400].decode(errors="replace"))
        return data

    def _ask(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """Status and body of an answer. Raises HelperUnreachableError."""
        host, port = self._address
        connection = http.client.HTTPSConnection(host, port, timeout=self._timeout_s, context=self._context)
        try:
            connection.request(method, path, body)
            response = connection.getresponse()
            data = self._read(response)
        except (OSError, ssl.SSLError, http.client.HTTPException) as error:
            raise HelperUnreachableError(f"the helper at {host}:{port} does not answer: {error}") from error
        finally:
            connection.close()
        # Its store fails, or it has much to do: what comes later may be answered.
        if response.status >= 500:
            raise HelperUnreachableError(f"the helper at {host}:{port} answers {response.status} for now")
        return response.status, data

    def _read(self, response: http.client.HTTPResponse) -> bytes:
        """A body within bounds of size and time. Raises OSError."""
        ends_s, data = time.monotonic() + self._timeout_s, bytearray()
        while part := response.read1(_PART_BYTES):
            data += part
            if len(data) > MAX_TRANSFER_BYTES:
                raise OSError(f"it sends more than {MAX_TRANSFER_BYTES} bytes")
            if time.monotonic() > ends_s:
                raise OSError(f"its answer takes longer than {self._timeout_s:g} s")
        return bytes(data)
