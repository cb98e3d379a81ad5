"""Bytes that a device's connection costs: set-up over TLS 1.3 with mutual P-256 certificates, a publish, a ping.

The repository's own mosquitto (generated configuration, certificates and ACL) and `MqttTransport`, with a counting
proxy between them. What is counted is TCP's payload, TLS records and all; TCP and IP headers come on top
(`firmware_sim.radio.wire`).

    python -m benchmarks.connection_bytes --json
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from benchmarks.command import parser
from benchmarks.counting_proxy import HOST, CountingProxy, Traffic
from benchmarks.footprint_covey import broker_port, settings_for
from device_client.config import DeviceConfig
from firmware_sim.brokers import start_broker
from firmware_sim.demo_folder import create_run
from firmware_sim.watch_data import default_cache, load_recordings
from fl_protocol.adapters.mqtt import LastWill, MqttTransport, TlsFiles
from fl_protocol.topics import state_topic, upload_topic
from fl_protocol.transport import Connected

PAYLOADS = (0, 1_000, 20_000, 96 * 1024)
QUIET_S = 0.5
CONNECTIONS = 20


def _settled(proxy: CountingProxy) -> Traffic:
    """What was counted, once nothing has been for a while."""
    before = None
    while (now := proxy.traffic()) != before:
        before = now
        time.sleep(QUIET_S)
    return now


def _cost(proxy: CountingProxy, act: Callable[[], object]) -> Traffic:
    before = _settled(proxy)
    act()
    return _settled(proxy) - before


def _open(transport: MqttTransport) -> None:
    transport.open()
    ends_s = time.monotonic() + 20
    while not isinstance(transport.poll(0.1), Connected):
        if time.monotonic() > ends_s:
            raise TimeoutError("no connection within 20 s")


def _as_row(traffic: Traffic) -> dict[str, int]:
    return {"up": traffic.up_bytes, "down": traffic.down_bytes}


def measure(folder: Path) -> dict[str, object]:
    """All figures, in bytes of TCP payload."""
    settings = settings_for("watch_features", 1)
    run = create_run(folder, settings, load_recordings(default_cache()))
    broker = start_broker("mosquitto", run, settings)
    try:
        wrist = settings.training_wrists[0]
        toml = run.device_toml(wrist.device_id)
        config = msgspec.toml.decode(toml.read_bytes(), type=DeviceConfig)
        study, at = config.studies[0], toml.parent
        tls = TlsFiles(*(at / str(name) for name in (study.broker.ca, study.broker.certificate, study.broker.key)))
        device = str(study.id)
        with CountingProxy(broker_port(toml)) as proxy:

            def client(keepalive_s: int = 60) -> MqttTransport:
                will = LastWill(state_topic(study.tenant, device), b"\0" * 100)
                return MqttTransport(
                    host=HOST, port=proxy.port, client_id=device, tls=tls, will=will, keepalive_s=keepalive_s
                )

            set_ups = []
            for _ in range(CONNECTIONS):
                transport = client()
                set_ups.append(_cost(proxy, lambda one=transport: _open(one)))
                transport.close()
            transport = client()
            _open(transport)
            topic = upload_topic(study.tenant, device, bytes(16), 0)
            publishes = {
                size: _cost(proxy, lambda one=size: transport.publish(topic, bytes(one), expires_s=60))
                for size in PAYLOADS
            }
            transport.close()
            transport = client(keepalive_s=5)
            _open(transport)
            before = _settled(proxy)
            ends_s = time.monotonic() + 20
            while proxy.traffic() == before and time.monotonic() < ends_s:
                time.sleep(0.05)
            ping = _settled(proxy) - before
            transport.close()
        return {
            "set_up_up": statistics.median(one.up_bytes for one in set_ups),
            "set_up_down": statistics.median(one.down_bytes for one in set_ups),
            "set_up_range": [
                min(sum(_as_row(one).values()) for one in set_ups),
                max(sum(_as_row(one).values()) for one in set_ups),
            ],
            "device_name_bytes": len(device),
            "topic_bytes": len(topic),
            "publish": {str(size): _as_row(cost) for size, cost in publishes.items()},
            "ping": _as_row(ping),
        }
    finally:
        broker.stop()


def main() -> None:
    options = parser("connection_bytes", __doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder) / "run")
    print(json.dumps(figures) if options.json else json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
