"""Virtual environments with only what a device installs: how large they are, by distribution, and how fast they import.

What pip adds to a fresh environment is counted as files' sizes, commands included: once without byte code, which not
every device keeps, and once with it, as pip leaves it by default. No process that is measured has to compile.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.environments import isolated

REPOSITORY = Path(__file__).resolve().parent.parent
CONSTRAINTS = REPOSITORY / "constraints.txt"


@dataclass(frozen=True)
class Install:
    """An environment and what pip put into it.

    Args:
        folder: the environment.
        install_mb: size of all files that were added, in 10^6 bytes, without byte code.
        compiled_mb: the same with byte code.
        distributions: the same by distribution, largest first.
        versions: version of each.
    """

    folder: Path
    install_mb: float
    compiled_mb: float
    distributions: dict[str, float]
    versions: dict[str, str]

    @property
    def python(self) -> str:
        """Its interpreter."""
        return str(self.folder / "bin" / "python")

    def command(self, name: str) -> str:
        """One of its commands."""
        return str(self.folder / "bin" / name)


def clean_install(folder: Path, *packages: str, constraints: bool = False) -> Install:
    """Make an environment and install `packages` into it; the repository's constraints only fit its own packages."""
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    before, already = tree_bytes(folder), set(sizes(folder))
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    if constraints and sys.version_info[:2] == (3, 11):  # the constraints were resolved on it
        pip += ["-c", str(CONSTRAINTS)]
    subprocess.run([*pip, *packages], check=True, stdout=subprocess.DEVNULL, env=isolated())
    installed = tree_bytes(folder) - before
    new = {name: size for name, size in sizes(folder).items() if name not in already}
    versions = {each.name: each.version for each in _distributions(folder) if each.name in new}
    before = tree_bytes(folder)
    # A package may hold files for other Pythons that do not compile; pip passes over them as well.
    subprocess.run([python, "-m", "compileall", "-qq", str(_packages(folder))], check=False, env=isolated())
    byte_code = tree_bytes(folder) - before
    largest_first = dict(sorted(new.items(), key=lambda item: -item[1]))
    return Install(folder, round(installed / 1e6, 1), round((installed + byte_code) / 1e6, 1), largest_first, versions)


def own_source(folder: Path) -> Path:
    """A copy of what covey is built from: what an earlier build left in the repository would be packed as well."""
    if not folder.exists():
        folder.mkdir(parents=True)
        for name in ("pyproject.toml", "README.md"):
            shutil.copy(REPOSITORY / name, folder)
        for package in REPOSITORY.glob("*/__init__.py"):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(package.parent, folder / package.parent.name, ignore=ignored)
    return folder


def sizes(folder: Path) -> dict[str, float]:
    """Size of each installed distribution, in 10^6 bytes, from the list of files that pip keeps with it."""
    return {
        each.name: round(sum(_bytes(Path(str(file.locate()))) for file in each.files or ()) / 1e6, 1)
        for each in _distributions(folder)
    }


def tree_bytes(folder: Path) -> int:
    """Size of all files below a folder; links count as nothing."""
    return sum(_bytes(path) for path in folder.rglob("*"))


def pinned(package: str) -> str:
    """``package==version`` as the constraints say, for a peer that gets the same; on another Python the bare name."""
    if sys.version_info[:2] != (3, 11):
        return package
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    return next(line for line in lines if line.startswith(f"{package}=="))


def import_times(modules: Mapping[str, tuple[Install, str]], *, repeats: int) -> dict[str, float]:
    """Median seconds from starting a Python until it has imported a module and ended, one after the other in turns.

    Args:
        modules: name in the result, the environment, and the module.
        repeats: how often each.
    """
    times: dict[str, list[float]] = {name: [] for name in modules}
    for _ in range(repeats + 1):
        for name, (install, module) in modules.items():
            started_s = time.perf_counter()
            command = [install.python, "-c", f"import {module}"]
            subprocess.run(command, check=True, cwd=install.folder, env=isolated())
            times[name].append(time.perf_counter() - started_s)
    return {name: round(statistics.median(each[1:]), 3) for name, each in times.items()}  # the first read the disk


def _distributions(folder: Path) -> list[importlib.metadata.Distribution]:
    return list(importlib.metadata.distributions(path=[str(_packages(folder))]))


def _packages(folder: Path) -> Path:
    """Where an environment keeps its packages."""
    return next(folder.glob("lib/python*/site-packages"))


def _bytes(path: Path) -> int:
    """Size of a file that is really there."""
    return path.stat().st_size if path.is_file() and not path.is_symlink() else 0
