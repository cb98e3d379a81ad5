"""The virtual environments of the peers: made once, then found again by the hash of what was asked for.

Installing is the only thing here that needs the network, and it goes through pip as this machine has it configured.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
CACHE = Path(".peers")
STAMP = "covey-peer.sha256"
INSTALL_WITHIN_S = 1800.0
IS_3_11 = sys.version_info[:2] == (3, 11)
FLOWER = "flwr==1.41.0"
FLOWER_SIMULATION = "flwr[simulation]==1.41.0"
SIMULATION_TORCH = "torch==2.13.0"


class PeerMissingError(Exception):
    """A peer's environment could not be made; the message is one sentence that names the peer and the reason."""


@dataclass(frozen=True)
class Requirements:
    """What pip is asked for."""

    packages: tuple[str, ...]
    constraints: Path | None = None

    def digest(self) -> str:
        """Changes with the packages, the constraints' content and the Python."""
        constraints = self.constraints.read_text(encoding="utf-8") if self.constraints else ""
        text = "\n".join((platform.python_version(), *self.packages, constraints))
        return hashlib.sha256(text.encode()).hexdigest()


PEERS = {
    # Both pinned in one resolution, so that Opacus cannot replace the torch build that pip chose.
    "torch": Requirements(("torch==2.13.0", "opacus==1.6.0")),
    # The exact versions were resolved on Python 3.11; other versions take what pip finds.
    "tensorflow": Requirements(
        ("tensorflow==2.15.1", "tensorflow-privacy==0.9.0"), REPOSITORY / "constraints.txt" if IS_3_11 else None
    ),
    "flower": Requirements((FLOWER, "numpy==1.26.4", "ai-edge-litert==2.3.0")),
    # With what the protocol imports: its devices are timed in the same process (`flower_secagg`).
    "flower_secagg": Requirements((FLOWER, "numpy==1.26.4", "cryptography==50.0.2", "msgspec==0.22.0")),
    # The same torch and numpy in both, so that the two differ only in what simulates.
    "flower_simulation": Requirements((FLOWER_SIMULATION, "ray==2.55.1", SIMULATION_TORCH, "numpy==2.4.6")),
    "pfl": Requirements(("pfl[pytorch]==0.6.0", SIMULATION_TORCH, "numpy==2.4.6")),
}
"""Name (also the script's and the folder's) and what its environment holds."""


def prepare(name: str, *, requirements: Requirements | None = None, cache: Path = CACHE) -> Path:
    """The Python of a peer's environment, made if it is not there.

    Args:
        name: the peer; names the folder in `cache`.
        requirements: what to install; ``PEERS[name]`` if not given.
        cache: where the environments live; the folder of this peer is emptied before it is made anew.

    Returns:
        Absolute path of the interpreter.

    Raises:
        PeerMissingError: venv or pip failed.
    """
    wanted = requirements or PEERS[name]
    folder = cache.resolve() / name
    stamp = folder / STAMP
    python = folder / "bin" / "python"  # not resolved further: the link itself makes it this environment's
    if python.exists() and stamp.exists() and stamp.read_text(encoding="ascii") == wanted.digest():
        return python
    print(f"peers: setting up {cache / name} with {', '.join(wanted.packages)} (once; minutes)", file=sys.stderr)
    _run(name, [sys.executable, "-m", "venv", "--clear", str(folder)])
    constraints = ["--constraint", str(wanted.constraints)] if wanted.constraints else []
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--quiet", "--no-input"]
    _run(name, [*pip, "install", *constraints, *wanted.packages])
    stamp.write_text(wanted.digest(), encoding="ascii")
    return python


def isolated() -> dict[str, str]:
    """This process's environment variables without what would let another environment's packages in."""
    return {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "PYTHONHOME"}}


def _run(name: str, command: list[str]) -> None:
    """Run it; the reason it failed, if it did, as one sentence."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=INSTALL_WITHIN_S, check=False, env=isolated()
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PeerMissingError(f"The environment of {name} could not be made: {error}.") from error
    if done.returncode:
        raise PeerMissingError(f"The environment of {name} could not be made: {_reason(done.stderr + done.stdout)}.")


def _reason(output: str) -> str:
    """The last line that says ERROR, or else the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["no output"]
    errors = [line.split(":", 1)[1].strip() for line in lines if line.startswith("ERROR:")]
    return (errors or lines)[-1].rstrip(".")
