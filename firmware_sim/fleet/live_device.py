"""A device's daemon for a live run: ``covey-device run`` as it is, but for its randomness, which follows from a seed.

    python -m firmware_sim.fleet.live_device run --config device.toml

Everything else is the device's own: store, ledger, MQTT over TLS, LiteRT. Whoever knows the seed knows all noise and
all masks, so this protects nobody's recordings: it is for comparing a live run with a virtual one, and refuses a broker
that is not on this machine. ``covey-device`` draws from the operating system, and has no option to do otherwise.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from device_client.adapters.encrypted_files import EncryptedFiles
from device_client.adapters.systemd import Systemd
from device_client.assembly import DeviceFiles, RealDevice
from device_client.cli import exit_code_of
from device_client.cli_store import run_until_stopped
from device_client.device_ports import DevicePorts
from firmware_sim.fleet.life_file import begin_life
from firmware_sim.seeded_entropy import SeededEntropy
from fl_protocol.adapters.journal import JsonLines
from fl_protocol.errors import ConfigError, CoveyError
from fl_protocol.terminal import visible

_THIS_MACHINE = {"127.0.0.1"}


class SeededDevice(RealDevice):
    """`RealDevice` whose noise, masks and coins follow from the ``life.json`` beside its configuration.

    Raises:
        ConfigError: a study's broker is not on this machine.
        FleetError: there is no such file.
    """

    def __init__(self, files: DeviceFiles, ports: DevicePorts, store: EncryptedFiles, watchdog: Systemd) -> None:
        # Security: what has predictable noise must not reach an aggregator that somebody else reads.
        if elsewhere := {study.broker.host for study in files.config.studies} - _THIS_MACHINE:
            raise ConfigError(
                f"configuration {files.path}: a device with seeded noise protects nobody, so its broker has to be on "
                f"127.0.0.1, got {', '.join(sorted(elsewhere))}; run covey-device"
            )
        seed = begin_life(files.path.parent).entropy_seed
        seeded = replace(ports, entropy=SeededEntropy(seed), jitter=SeededEntropy(f"{seed} session"))
        super().__init__(files, seeded, store, watchdog)


def main(argv: list[str] | None = None) -> int:
    """Entry point; errors and exit codes are those of ``covey-device``."""
    parser = argparse.ArgumentParser(prog="live_device", description="A device of a live run, with seeded randomness.")
    parser.add_argument("command", choices=["run"], help="take part until stopped; one JSON line per event")
    parser.add_argument("--config", type=Path, required=True, help="path of device.toml")
    try:
        return run_until_stopped(SeededDevice.open(parser.parse_args(argv).config, journal=JsonLines()))
    except CoveyError as error:
        sys.stderr.write(f"{visible(f'live_device: {error}')}\n")
        return exit_code_of(error)


if __name__ == "__main__":
    sys.exit(main())
