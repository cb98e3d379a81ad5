"""Posts a webhook over HTTPS, or over plain HTTP on loopback; on the standard library.

Security: a redirect is not followed (it would send the body, and where it goes is the receiver's to say), an answer's
body is not read, and no proxy of the environment is used.
"""

from __future__ import annotations

import http.client
import ssl
from pathlib import Path
from urllib.parse import urlsplit

from fl_protocol.errors import ConfigError

LOOPBACK = {"127.0.0.1", "::1", "localhost"}


class WebhookPost:
    """One receiver.

    Args:
        url: ``https://host/path``, or ``http://`` on loopback.
        ca: PEM file of the CA that certified it; None for those that the system trusts.
        timeout_s: longest wait for connecting and for the answer.

    Raises:
        ConfigError: the URL or the file cannot be used.
    """

    def __init__(self, url: str, *, ca: Path | None, timeout_s: float) -> None:
        parsed = urlsplit(url)
        if parsed.scheme not in {"http", "https"} or parsed.hostname is None or parsed.username is not None:
            raise ConfigError(f"webhook url: expected https://host/path, got {url!r}")
        if parsed.scheme == "http" and parsed.hostname not in LOOPBACK:
            raise ConfigError(f"webhook url: expected https:// for {parsed.hostname}; http:// is for loopback alone")
        self._host, self._timeout_s = parsed.hostname, timeout_s
        try:
            self._port = parsed.port
            self._context = None if parsed.scheme == "http" else ssl.create_default_context(cafile=ca and str(ca))
        except (OSError, ValueError) as error:
            raise ConfigError(f"webhook {url}: expected a port, and a CA's PEM file at {ca}; {error}") from error
        self._path = (parsed.path or "/") + (f"?{parsed.query}" if parsed.query else "")

    def __call__(self, body: bytes, headers: dict[str, str]) -> str:
        """Post; why it was not taken, empty if it was (a status of 200 to 299).

        Args:
            body: JSON.
            headers: further ones.
        """
        connection = self._connection()
        try:
            connection.request("POST", self._path, body, {"Content-Type": "application/json", **headers})
            status = connection.getresponse().status
        except (OSError, http.client.HTTPException) as error:
            return f"no answer: {error}" if str(error) else f"no answer: {type(error).__name__}"
        finally:
            connection.close()
        if 200 <= status < 300:
            return ""
        return f"it answers {status}" + (", a redirect, which is not followed" if 300 <= status < 400 else "")

    def _connection(self) -> http.client.HTTPConnection:
        if self._context is None:
            return http.client.HTTPConnection(self._host, self._port, timeout=self._timeout_s)
        return http.client.HTTPSConnection(self._host, self._port, timeout=self._timeout_s, context=self._context)
