"""The two databases that the store's tests are run over: an SQLite file, and a PostgreSQL of the tests' own.

The server is one process group on loopback with a folder of its own, started once a test run; a test gets a database
in it. PostgreSQL refuses to run as root, so for root it runs as Debian's user of that name.
"""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from aggregator.store.database import Database
from tests.contracts.brokers import free_port

WITHIN_S = 30.0
"""How long the server may take to start."""
PLENTY_BYTES = 4 * 2**30
"""Of memory, unused: four times what all databases of a run take."""


class PostgresqlServer:
    """A server on loopback."""

    def __init__(self, programs: Path, folder: Path) -> None:
        self.port, self._programs, self._folder = free_port(), programs, folder
        self._data = folder / "data"
        self._as_user: list[str] = []
        if os.geteuid() == 0:
            user = pwd.getpwnam("postgres")
            os.chown(folder, user.pw_uid, user.pw_gid)
            self._as_user = [_program("setpriv"), "--reuid=postgres", "--regid=postgres", "--clear-groups"]
        self._run("initdb", "-D", str(self._data), "-U", "covey", "-A", "trust", "-E", "UTF8", "--no-sync")
        self.start()

    def start(self) -> None:
        """Start, and wait until it answers."""
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": "",
            "fsync": "off",  # what survives a crash of the machine is PostgreSQL's own business
            "shared_buffers": "16MB",
        }
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [*self._as_user, str(self._programs / "postgres"), "-D", str(self._data), *options],
                stdout=log,
                stderr=log,
                cwd=self._folder,
            )
        ends_s = time.monotonic() + WITHIN_S
        ready = [str(self._programs / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.port), "-d", "postgres"]
        while subprocess.run(ready, check=False).returncode:
            assert self._process.poll() is None, (self._folder / "log").read_text()
            assert time.monotonic() < ends_s, "PostgreSQL does not answer"
            time.sleep(0.05)

    def kill(self) -> None:
        """Die without a goodbye, as PostgreSQL's immediate shutdown does; `start` recovers it."""
        self._process.send_signal(3)
        self._process.wait()

    def stop(self) -> None:
        """End it."""
        self._process.send_signal(2)
        self._process.wait()

    def new_database(self) -> str:
        """URL of a new, empty database."""
        name = f"covey_{secrets.token_hex(6)}"
        self._run("createdb", "-h", "127.0.0.1", "-p", str(self.port), "-U", "covey", "-T", "template0", name)
        return f"postgresql+psycopg://covey@127.0.0.1:{self.port}/{name}"

    def _run(self, program: str, *arguments: str) -> None:
        """Run one of PostgreSQL's programs as the server's user."""
        command = [*self._as_user, str(self._programs / program), *arguments]
        done = subprocess.run(command, cwd=self._folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def _program(name: str) -> str:
    """A program that has to be there."""
    found = shutil.which(name)
    assert found is not None, name
    return found


def find_postgresql() -> Path | None:
    """The folder of the newest installed server's programs."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if found:
        return found[-1].parent
    here = shutil.which("initdb")
    return Path(here).resolve().parent if here else None


def folder_in_memory() -> str | None:
    """Where files are in memory, if there is plenty of it; else None, for the usual place.

    A database is 300 files, and a run makes a hundred of them: on a busy disk, removing them took a minute and more.
    """
    shared = Path("/dev/shm")  # noqa: S108 - where Linux keeps it; the folder made there has a name of its own
    room = shutil.disk_usage(shared).free if shared.is_dir() else 0
    unused = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return str(shared) if min(room, unused) >= PLENTY_BYTES else None


def start_postgresql() -> Iterator[PostgresqlServer]:
    """A server and its end; skips where none is installed."""
    programs = find_postgresql()
    if programs is None:
        reason = "PostgreSQL is not installed (Debian: apt-get install postgresql)"
        assert not os.environ.get("COVEY_TESTS_NEED_POSTGRESQL"), reason
        pytest.skip(reason)
    # Not below pytest's folders: those can be searched by root only.
    with tempfile.TemporaryDirectory(prefix="covey-postgresql-", dir=folder_in_memory()) as name:
        server = PostgresqlServer(programs, Path(name))
        try:
            yield server
        finally:
            server.stop()


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[PostgresqlServer]:
    """One server for the whole run (one for each worker of pytest-xdist)."""
    yield from start_postgresql()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of a fresh, empty database, first SQLite's, then PostgreSQL's."""
    return new_url(request, tmp_path, str(request.param))


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """A fresh database with its schema."""
    opened = Database(database_url)
    yield opened
    opened.close()


def new_url(request: pytest.FixtureRequest, folder: Path, kind: str) -> str:
    """URL of one more database of this kind."""
    if kind == "sqlite":
        return f"sqlite:///{folder / f'{secrets.token_hex(4)}.db'}"
    server: PostgresqlServer = request.getfixturevalue("postgresql_server")
    return server.new_database()
