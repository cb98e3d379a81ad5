"""The embedded broker for demos: iotcore 0.4 (rumqttd 0.20 in a child process), MQTT 5, on 127.0.0.1 only.

It has no TLS here, no authentication and no ACL: whoever can open a socket on this machine may read and write every
topic. Nothing is stored: a restart forgets retained messages. Use mosquitto for anything that leaves the machine.

Measured limits that matter to us:

- Only a TOML file with a ``[v5.N]`` section makes it speak MQTT 5; the keyword arguments start MQTT 3.1.1, and a
  client that speaks the other version is cut off without an answer.
- A packet over ``max_payload_size`` ends its sender's connection; no MaximumPacketSize is announced.
- Subscribing again to a filter that is already subscribed does not bring its retained messages again; `MqttTransport`
  therefore unsubscribes first.
- A subscription gets at most 100 retained messages, whatever the settings; the rest never come. So a model may have
  100 chunks, about 2.4 million parameters.
- Every subscribed filter has a log of ``max_segment_size`` times ``max_segment_count`` bytes in memory; a subscriber
  that falls further behind than that loses messages without being told.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from iotcore import Broker

from firmware_sim.errors import FleetError
from fl_protocol.limits import MAX_PACKET_BYTES

_CONFIG = """
id = 0

[router]
id = 0
max_connections = {max_connections}
max_outgoing_packet_count = 200
max_segment_size = 33554432
max_segment_count = 8

[v5.1]
name = "covey"
listen = "127.0.0.1:{port}"
next_connection_delay_ms = 1

[v5.1.connections]
connection_timeout_ms = 60000
max_payload_size = {max_packet_bytes}
max_inflight_count = 100
dynamic_filters = true
"""


@dataclass
class IotcoreBroker:
    """A running broker; it also ends when this process does.

    Args:
        port: where it listens on 127.0.0.1.
    """

    port: int
    _broker: Broker

    @property
    def description(self) -> str:
        """What it is and what it lacks."""
        return "iotcore on loopback: no TLS, no ACL; for demos on one machine only"

    def watch(self) -> str | None:
        """Start it again if it died; what happened, if anything. Raises FleetError when it does not start."""
        if self._broker.is_running:
            return None
        self._broker = start(self.port)._broker
        return "iotcore ended; it was started again, without its retained messages"

    def stop(self) -> None:
        """End it and release the port; last wills and retained messages are gone. May be called twice."""
        self._broker.stop()


def start(port: int, *, max_connections: int = 10_000) -> IotcoreBroker:
    """Start a broker on a free port of 127.0.0.1; returns when it accepts connections.

    Raises:
        FleetError: the port is taken, or it did not come up within ten seconds.
    """
    with tempfile.TemporaryDirectory(prefix="covey-iotcore-") as folder:
        path = Path(folder) / "rumqttd.toml"
        path.write_text(
            _CONFIG.format(port=port, max_connections=max_connections, max_packet_bytes=2 * MAX_PACKET_BYTES)
        )
        try:
            # The file may go afterwards: start() waits until the listener is up.
            return IotcoreBroker(port, Broker(config_path=str(path)).start())
        except (OSError, RuntimeError) as error:
            raise FleetError(f"iotcore did not start on 127.0.0.1:{port}: {error}") from error
