"""What the desk does at a broker when somebody was revoked: a command that has it reload, a connection taken over."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from aggregator.certificates import KeyPair
from aggregator.errors import AggregatorError
from fl_protocol.adapters.mqtt import MqttTransport, TlsFiles
from fl_protocol.transport import Connected, Disconnected

_RELOADS_WITHIN_S = 20.0
_CONNECTS_WITHIN_S = 10.0


class BrokerControl:
    """See the module docstring.

    Args:
        host: of the study's broker.
        port: of the study's broker.
        ca: PEM file of the CA that certified it.
        reload: command that has it read its files again, such as ``systemctl reload mosquitto``; none: a person does.
    """

    def __init__(self, *, host: str, port: int, ca: Path, reload: Sequence[str]) -> None:
        self._host, self._port, self._ca, self._reload = host, port, ca, list(reload)

    def reload(self) -> None:
        """Run the command. Raises AggregatorError."""
        if not self._reload:
            raise AggregatorError(
                "enrolment.reload names no command, so a person has to have the broker reload its list"
            )
        try:
            done = subprocess.run(
                self._reload,
                capture_output=True,
                text=True,
                timeout=_RELOADS_WITHIN_S,
                check=False,
                stdin=subprocess.DEVNULL,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise AggregatorError(f"enrolment.reload: {self._reload[0]} cannot be run ({error})") from error
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines()
            raise AggregatorError(
                f"enrolment.reload: {self._reload[0]} ended with code {done.returncode}"
                + (f" ({said[-1][:200]})" if said else "")
            )

    def end_connection(self, name: str, identity: KeyPair) -> None:
        """Connect as this client, and leave. Raises AggregatorError: the broker did not let us."""
        with tempfile.TemporaryDirectory() as folder:
            certificate, key = Path(folder) / "it.pem", Path(folder) / "it.key"
            certificate.write_bytes(identity.certificate)
            key.write_bytes(identity.key)
            transport = MqttTransport(
                host=self._host, port=self._port, client_id=name, tls=TlsFiles(self._ca, certificate, key)
            )
            transport.open()
            try:
                self._await_connection(transport, name)
            finally:
                transport.close()

    def _await_connection(self, transport: MqttTransport, name: str) -> None:
        """Wait until the broker has let us in, which ends the other connection."""
        ends_s, reason = time.monotonic() + _CONNECTS_WITHIN_S, "it did not answer"
        while time.monotonic() < ends_s:
            match transport.poll(0.1):
                case Connected():
                    return
                case Disconnected(reason=reason):
                    pass
        raise AggregatorError(f"the connection of {name} could not be ended: {reason}")
