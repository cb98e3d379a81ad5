"""Which broker carries a run: mosquitto with mutual TLS where it is installed, otherwise the embedded iotcore."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from firmware_sim.demo_folder import write_configs
from firmware_sim.mosquitto_broker import MosquittoBroker, find_mosquitto, free_port, write_mosquitto_files
from firmware_sim.run_folder import HOST, RunFolder
from firmware_sim.settings import AGGREGATOR, TENANT, BrokerChoice, DemoSettings


class RunningBroker(Protocol):
    """A broker that carries a run."""

    @property
    def description(self) -> str:
        """What it is and what it lacks, for people."""

    def watch(self) -> str | None:
        """Start it again if it died; what happened, if anything."""

    def stop(self) -> None:
        """End it."""


def start_broker(choice: BrokerChoice, folder: RunFolder, settings: DemoSettings) -> RunningBroker:
    """Start a broker on a free loopback port and write every process's configuration for it.

    Raises:
        FleetError: it is not installed or does not start.
    """
    return start_configured(
        choice, folder, tenant=TENANT, configure=lambda port, tls: write_configs(folder, settings, port=port, tls=tls)
    )


def start_configured(
    choice: BrokerChoice, folder: RunFolder, *, tenant: str, configure: Callable[[int, bool], None]
) -> RunningBroker:
    """As `start_broker`, for a run of any kind.

    Args:
        choice: which broker.
        folder: of the run, with its certificates.
        tenant: name on the wire.
        configure: writes every process's configuration, given the broker's port and whether it speaks TLS.

    Raises:
        FleetError: it is not installed or does not start.
    """
    port = free_port()
    use_mosquitto = choice == "mosquitto" or (choice == "auto" and find_mosquitto() is not None)
    configure(port, use_mosquitto)
    if not use_mosquitto:
        from firmware_sim import iotcore_broker  # noqa: PLC0415 - not needed where mosquitto is

        return iotcore_broker.start(port)
    config = write_mosquitto_files(folder.broker, host=HOST, port=port, tenant=tenant, aggregator=AGGREGATOR)
    return MosquittoBroker(config, host=HOST, port=port, log=folder.path / "logs" / "broker.log")
