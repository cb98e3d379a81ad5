"""A Flower federation on loopback with one SuperNode that is measured: Flower's own commands and defaults, with TLS.

SuperLink, ServerApp and a second SuperNode run in the peer's environment (`environments.prepare("flower")`); the
measured SuperNode runs in the environment that it is given, so that it shares no library's pages with them. Every
process has its own ``FLWR_HOME``, as on a machine of its own. Telemetry and the look for newer releases are switched
off, and the SuperLink installs nothing for the app; everything else is as Flower sets it (a ClientApp's process for
every message, a question to the SuperLink every three seconds).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from aggregator.certificates import issue, make_ca
from benchmarks.counting_proxy import HOST, CountingProxy
from benchmarks.footprint_run import FootprintError, Run, Schedule, wait_for, watch_phases
from benchmarks.peers.environments import isolated
from firmware_sim.mosquitto_broker import free_port
from firmware_sim.processes import die_with_parent

APP = Path(__file__).resolve().parent / "flower_app"
CONNECTED = "SuperNode ID:"
LISTENING = "Uvicorn running"
WITHIN_S = 90.0
STOP_WITHIN_S = 15.0


@dataclass(frozen=True)
class Round:
    """What a round computes: the graph, the first parameters, each node's records (``.npz`` of x, y), the step."""

    graph: Path
    params: Path
    records: tuple[Path, Path]
    plan: Mapping[str, float]


@dataclass(frozen=True)
class Federation:
    """Where its processes run and keep their files.

    Args:
        folder: certificates, logs and homes.
        server: the folder of commands (``bin``) of the server's environment.
        port: the SuperLink's.
    """

    folder: Path
    server: Path
    port: int

    def log(self, name: str) -> Path:
        """What a process says."""
        return self.folder / f"{name}.log"

    def home(self, name: str) -> Path:
        """Its ``FLWR_HOME``."""
        return self.folder / name


def flower_run(folder: Path, commands: Path, server: Path, work: Round, schedule: Schedule) -> Run:
    """One run of a SuperNode.

    Args:
        folder: an empty folder for everything that the federation writes.
        commands: folder of the measured SuperNode's commands.
        server: folder of the commands for everything else.
        work: what a round computes.
        schedule: how long to be idle, and how many rounds.

    Raises:
        FootprintError: a process did not get where it should, or took too long.
    """
    folder.mkdir(parents=True)
    federation = Federation(folder, server, free_port())
    _write_files(federation)
    with ExitStack() as stack:
        stack.enter_context(_started(federation, "superlink", _superlink(federation), path=server))
        _wait_until_says(federation, "superlink", LISTENING)
        proxy = stack.enter_context(CountingProxy(federation.port))
        command = _supernode(federation, commands, proxy.port, work, number=0)
        started_s = time.monotonic()
        node = stack.enter_context(_started(federation, "measured", command, path=commands))
        _wait_until_says(federation, "measured", CONNECTED)
        cold_start_s = time.monotonic() - started_s
        command = _supernode(federation, server, federation.port, work, number=1)
        stack.enter_context(_started(federation, "other", command, path=server))
        _wait_until_says(federation, "other", CONNECTED)

        def start_rounds() -> Callable[[], bool]:
            return _ended_well(stack.enter_context(_rounds(federation, work, schedule.rounds)), federation)

        phases = watch_phases(node.pid, proxy, schedule, start_rounds=start_rounds)
    _check_results(federation, schedule.rounds)
    return Run(cold_start_s, phases)


def _superlink(federation: Federation) -> list[str]:
    certificates = federation.folder
    return [
        str(federation.server / "flower-superlink"),
        *("--ssl-ca-certfile", str(certificates / "ca.pem")),
        *("--ssl-certfile", str(certificates / "superlink.pem")),
        *("--ssl-keyfile", str(certificates / "superlink.key")),
        *("--host", HOST, "--port", str(federation.port)),
        "--disable-runtime-dependency-installation",
    ]


def _supernode(federation: Federation, commands: Path, superlink: int, work: Round, *, number: int) -> list[str]:
    return [
        str(commands / "flower-supernode"),
        *("--root-certificates", str(federation.folder / "ca.pem")),
        *("--superlink", f"{HOST}:{superlink}", "--port", str(free_port())),
        *("--node-config", f'graph="{work.graph}" records="{work.records[number]}"'),
    ]


@contextmanager
def _rounds(federation: Federation, work: Round, rounds: int) -> Iterator[subprocess.Popen[bytes]]:
    """``flwr run`` of the app; it ends when the rounds are over."""
    settings = {"num-rounds": rounds, "params": f'"{work.params}"', **work.plan}
    config = " ".join(f"{key}={value}" for key, value in settings.items())
    command = [str(federation.server / "flwr"), "run", str(federation.folder / "app"), "here", "--stream"]
    with _started(federation, "run", [*command, "--run-config", config], path=federation.server) as process:
        yield process


def _ended_well(process: subprocess.Popen[bytes], federation: Federation) -> Callable[[], bool]:
    """A question: are the rounds over?"""

    def over() -> bool:
        if process.poll():
            raise FootprintError(f"flwr run ended with code {process.returncode}: {_last_words(federation, 'run')}")
        return process.poll() == 0

    return over


def _check_results(federation: Federation, rounds: int) -> None:
    """Every round must have brought both nodes' results."""
    said = federation.log("run").read_text(encoding="utf-8", errors="replace")
    complete = said.count("aggregate_train: Received 2 results and 0 failures")
    if complete != rounds:
        raise FootprintError(f"Flower: expected {rounds} rounds with both results, got {complete}")


@contextmanager
def _started(federation: Federation, name: str, command: list[str], *, path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a session of its own, ended with all that it started."""
    variables = isolated() | {
        "PATH": f"{path}{os.pathsep}{os.environ.get('PATH', '')}",  # a SuperNode starts its helpers by name
        "FLWR_HOME": str(federation.home(name)),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PYTHONUNBUFFERED": "1",
    }
    with federation.log(name).open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=federation.folder,
            env=variables,
            start_new_session=True,
            preexec_fn=die_with_parent,  # noqa: PLW1509 - a single prctl call, no Python locks are taken
        )
    try:
        yield process
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_WITHIN_S)
        _kill_session(process)


def _kill_session(process: subprocess.Popen[bytes]) -> None:
    """End what is left of the session that a process began."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _write_files(federation: Federation) -> None:
    """A CA, the SuperLink's certificate, the app, and the command line's connection."""
    now_s = time.time()
    ca = make_ca("flower", now_s=now_s)
    superlink = issue(ca, "superlink", now_s=now_s, server_hosts=(HOST, "localhost"))
    for name, data in (
        ("ca.pem", ca.certificate),
        ("superlink.pem", superlink.certificate),
        ("superlink.key", superlink.key),
    ):
        (federation.folder / name).write_bytes(data)
    shutil.copytree(APP, federation.folder / "app", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("superlink", "measured", "other", "run"):
        federation.home(name).mkdir()
    connection = f'address = "{HOST}:{federation.port}"\nroot-certificates = "{federation.folder / "ca.pem"}"\n'
    (federation.home("run") / "config.toml").write_text(f"[superlink.here]\n{connection}", encoding="utf-8")


def _wait_until_says(federation: Federation, name: str, words: str) -> None:
    """Until a process's log has the words."""
    log = federation.log(name)
    try:
        wait_for(lambda: words.encode() in log.read_bytes(), within_s=WITHIN_S, what=f"{name}: {words!r}")
    except FootprintError as error:
        raise FootprintError(f"{error}; its last words: {_last_words(federation, name)}") from error


def _last_words(federation: Federation, name: str) -> str:
    lines = federation.log(name).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "none"
