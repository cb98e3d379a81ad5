"""Durable files under a full disk and a kill at any moment. The limits are the kernel's, set in a child process."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fl_protocol.adapters.files import append_durably, fsync_folder, write_atomic

LIMITED = """
import errno, resource, sys
from pathlib import Path
from fl_protocol.adapters.files import append_durably, write_atomic
function = {"append": append_durably, "write": write_atomic}[sys.argv[1]]
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
try:
    function(Path(sys.argv[2]), b"new" * int(sys.argv[4]))
except OSError as error:
    print(errno.errorcode[error.errno])
else:
    print("done")
"""


def with_file_size_limit(function: str, path: Path, *, limit: int, repeats: int) -> str:
    """What came of writing b"new" * repeats where no file may grow beyond `limit` bytes."""
    command = [sys.executable, "-c", LIMITED, function, str(path), str(limit), str(repeats)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_a_write_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "state"
    write_atomic(path, b"old")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["state"]


def test_files_can_be_read_by_their_owner_only(tmp_path: Path) -> None:
    write_atomic(tmp_path / "written", b"x")
    append_durably(tmp_path / "appended", b"x")
    for name in ("written", "appended"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600


@pytest.mark.parametrize("repeats", [1000, 100_000])
def test_a_write_that_does_not_fit_leaves_the_old_file(tmp_path: Path, repeats: int) -> None:
    path = tmp_path / "state"
    write_atomic(path, b"old")
    assert with_file_size_limit("write", path, limit=2048, repeats=repeats) == "EFBIG"
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["state"]
    assert with_file_size_limit("write", path, limit=4096, repeats=1000) == "done"
    assert path.read_bytes() == b"new" * 1000


@pytest.mark.parametrize("repeats", [1000, 100_000])
def test_an_append_that_does_not_fit_leaves_what_was_there(tmp_path: Path, repeats: int) -> None:
    path = tmp_path / "log"
    append_durably(path, b"old")
    assert with_file_size_limit("append", path, limit=2048, repeats=repeats) == "EFBIG"
    assert path.read_bytes() == b"old"
    assert with_file_size_limit("append", path, limit=4096, repeats=1) == "done"
    assert path.read_bytes() == b"oldnew"


def test_a_full_disk_is_survived(tmp_path: Path) -> None:
    """On a real file system of 64 KiB, where a new user and mount namespace can be had."""
    folder = tmp_path / "small"
    folder.mkdir()
    script = f"""
import errno
from pathlib import Path
from fl_protocol.adapters.files import append_durably, write_atomic
folder = Path({str(folder)!r})
write_atomic(folder / "state", b"old")
append_durably(folder / "log", b"old")
for function, name in ((write_atomic, "state"), (append_durably, "log")):
    try:
        function(folder / name, bytes(1_000_000))
    except OSError as error:
        print(errno.errorcode[error.errno], (folder / name).read_bytes().decode())
print(sorted(entry.name for entry in folder.iterdir()))
write_atomic(folder / "state", b"new")
print((folder / "state").read_bytes().decode())
"""
    mount = f'mount -t tmpfs -o size=64k tmpfs {folder} && exec {sys.executable} -c "$SCRIPT"'
    command = ["unshare", "--mount", *([] if os.getuid() == 0 else ["--map-root-user"]), "sh", "-c"]
    probe = subprocess.run([*command, f"mount -t tmpfs tmpfs {folder}"], capture_output=True, check=False)
    if probe.returncode != 0:
        pytest.skip("this user may not mount a file system")
    done = subprocess.run(
        [*command, mount], capture_output=True, text=True, check=True, env={**os.environ, "SCRIPT": script}
    )
    assert done.stdout.splitlines() == ["ENOSPC old", "ENOSPC old", "['log', 'state']", "new"]


def test_a_kill_at_any_moment_leaves_one_whole_version(tmp_path: Path) -> None:
    path = tmp_path / "state"
    script = f"""
from pathlib import Path
from fl_protocol.adapters.files import write_atomic
number = 0
while True:
    write_atomic(Path({str(path)!r}), bytes([65 + number % 26]) * 200_000)
    if number == 0:
        print("started", flush=True)
    number += 1
"""
    for _ in range(5):
        with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"started\n"
            process.send_signal(signal.SIGKILL)
        data = path.read_bytes()
        assert len(data) == 200_000
        assert len(set(data)) == 1
    write_atomic(path, b"after")  # whatever temporary file was left is no obstacle
    assert [entry.name for entry in tmp_path.iterdir()] == ["state"]


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    changes: tuple[Callable[[], object], ...] = (
        lambda: write_atomic(tmp_path / "no" / "file", b"x"),
        lambda: append_durably(tmp_path / "no" / "file", b"x"),
        lambda: fsync_folder(tmp_path / "no"),
    )
    for act in changes:
        with pytest.raises(FileNotFoundError):
            act()
    assert list(tmp_path.iterdir()) == []
