"""The smartwatch recordings: read without running what a pickle asks for, cut so that no sample is in two windows."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from device_client.training import Records
from firmware_sim import watch_data
from firmware_sim.errors import FleetError
from firmware_sim.watch_data import (
    LABELS,
    MIRROR,
    PEOPLE,
    SIDES,
    Recording,
    Wrist,
    all_wrists,
    default_cache,
    load_recordings,
    windows_of,
)

Cut = Callable[..., Records]
SAMPLES = 128


def dataset_path() -> Path:
    spec = importlib.util.find_spec("seglearn")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "data" / "watch_dataset.npy"


@pytest.fixture(scope="session")
def original() -> dict[str, Any]:
    """The dataset as numpy's own, unrestricted unpickler reads it."""
    loaded: dict[str, Any] = np.load(dataset_path(), allow_pickle=True, encoding="latin1").item()
    return loaded


# The unpickler.


class RunsACommand:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


class CallsAGlobal:
    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def unpickle(data: bytes) -> Any:
    return watch_data._RestrictedUnpickler(io.BytesIO(data)).load()


def check_no_command_runs(load: Callable[[bytes], Any], witness: Path) -> None:
    """A pickle that would run a command must not; whether it is refused with an error is another question."""
    with contextlib.suppress(FleetError):
        load(pickle.dumps(RunsACommand(f"touch '{witness}'")))
    assert not witness.exists()


def test_a_pickle_that_runs_a_command_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    check_no_command_runs(unpickle, tmp_path / "ran")
    with pytest.raises(AssertionError):
        check_no_command_runs(pickle.loads, tmp_path / "ran")
    with pytest.raises(FleetError, match=r"asks for (posix|os)\.system; only numpy arrays are read"):
        unpickle(pickle.dumps(RunsACommand("true")))


@pytest.mark.parametrize(
    "pickled",
    [
        CallsAGlobal(eval, "1"),
        CallsAGlobal(getattr, "", "join"),
        CallsAGlobal(__import__, "os"),
        CallsAGlobal(open, "/dev/null"),
        CallsAGlobal(subprocess.check_output, ["true"]),
        CallsAGlobal(np.load, "x.npy"),
        CallsAGlobal(np.fromfile, "/dev/zero"),
        Path,
        Exception,
    ],
    ids=["eval", "getattr", "__import__", "open", "check_output", "np.load", "np.fromfile", "Path", "Exception"],
)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_no_other_global_is_reachable(pickled: object, protocol: int) -> None:
    with pytest.raises(FleetError, match="only numpy arrays are read"):
        unpickle(pickle.dumps(pickled, protocol=protocol))


@pytest.mark.parametrize(
    ("module", "name"),
    [("numpy", "load"), ("numpy", "ndarray.tofile"), ("numpy.core.multiarray", "scalar"), ("builtins", "eval")],
)
def test_the_list_of_globals_is_closed(module: str, name: str) -> None:
    with pytest.raises(FleetError, match="only numpy arrays are read"):
        watch_data._RestrictedUnpickler(io.BytesIO()).find_class(module, name)


def test_byte_strings_of_old_pickles_are_read_and_other_encodings_refused() -> None:
    encode = watch_data._RestrictedUnpickler(io.BytesIO()).find_class("_codecs", "encode")
    assert encode("ab\xff", "latin1") == b"ab\xff"
    with pytest.raises(FleetError, match="only latin1 is read"):
        encode("ab", "rot13")


# What is in the dataset.


def test_there_are_140_recordings_with_every_label_of_every_wrist(recordings: list[Recording]) -> None:
    assert len(recordings) == 140
    assert {(r.wrist, r.label) for r in recordings} == {(w, k) for w in all_wrists() for k in range(len(LABELS))}
    assert sum(len(r.samples) for r in recordings) == 244_102
    assert {r.samples.dtype for r in recordings} == {np.dtype(np.float32)}
    assert {r.samples.shape[1] for r in recordings} == {6}


def test_recordings_are_those_of_the_dataset_and_the_right_wrist_is_mirrored(
    recordings: list[Recording], original: dict[str, Any]
) -> None:
    assert tuple(original["y_labels"]) == LABELS
    for index, recording in enumerate(recordings):
        raw = np.asarray(original["X"][index], np.float32)
        assert recording.wrist == Wrist(int(original["subject"][index]), SIDES[int(original["side"][index])])
        assert recording.label == original["y"][index]
        expected = raw * [-1, 1, 1, 1, -1, -1] if recording.wrist.side == "right" else raw
        np.testing.assert_array_equal(recording.samples, expected.astype(np.float32))
    # A reflection, and its own inverse.
    np.testing.assert_array_equal(MIRROR * MIRROR, np.ones(6))


def test_device_ids_are_distinct_names() -> None:
    names = [wrist.device_id for wrist in all_wrists()]
    assert len(set(names)) == 20
    assert names[0] == "wrist-01-left"
    assert names[-1] == f"wrist-{PEOPLE[-1]}-right"


# Windows.


def check_windows_are_disjoint(cut: Cut, recordings: list[Recording]) -> int:
    """Give every sample a number of its own, cut, and see that no number is in two windows; the windows in all."""
    first = 1
    numbered = []
    for recording in recordings:
        numbers = np.arange(first, first + len(recording.samples), dtype=np.float32)  # exact below 2^24
        numbered.append(Recording(recording.wrist, recording.label, np.repeat(numbers[:, None], 6, axis=1)))
        first += len(recording.samples)
    assert first < 2**24
    seen: set[float] = set()
    windows = 0
    for wrist in all_wrists():
        x = cut(numbered, wrist, samples=SAMPLES).x[:, :, 0]
        windows += len(x)
        np.testing.assert_array_equal(np.diff(x, axis=1), 1)  # consecutive samples of one recording
        fresh = set(x.ravel().tolist())
        assert len(fresh) == x.size, "a sample occurs twice among one wrist's windows"
        assert not fresh & seen, "a sample occurs at two wrists"
        seen |= fresh
    return windows


def overlapping_windows_of(recordings: list[Recording], wrist: Wrist, *, samples: int) -> Records:
    """A broken copy of `windows_of` with a stride of half a window, as is usual where privacy is no concern."""
    x, y = [], []
    for recording in recordings:
        if recording.wrist == wrist:
            for start in range(0, len(recording.samples) - samples + 1, samples // 2):
                x.append(recording.samples[start : start + samples])
                y.append(recording.label)
    return Records(np.stack(x), np.array(y, np.int32))


def test_no_sample_occurs_in_two_of_the_1833_windows(recordings: list[Recording]) -> None:
    assert check_windows_are_disjoint(windows_of, recordings) == 1833


def test_overlapping_windows_would_be_noticed(recordings: list[Recording]) -> None:
    with pytest.raises(AssertionError, match="occurs twice"):
        check_windows_are_disjoint(overlapping_windows_of, recordings)


def test_windows_carry_their_recordings_label_and_lose_less_than_one_window(recordings: list[Recording]) -> None:
    for wrist in all_wrists():
        own = [recording for recording in recordings if recording.wrist == wrist]
        records = windows_of(recordings, wrist, samples=SAMPLES)
        assert records.x.shape == (len(records.y), SAMPLES, 6)
        assert records.x.dtype == np.float32
        assert records.y.dtype == np.int32
        for recording in own:
            cut = records.x[records.y == recording.label].reshape(-1, 6)
            np.testing.assert_array_equal(cut, recording.samples[: len(cut)])
            assert len(recording.samples) - len(cut) < SAMPLES


# The cache.


def test_the_cache_is_made_once_and_then_used(tmp_path: Path, recordings: list[Recording]) -> None:
    first = load_recordings(tmp_path)
    (archive,) = tmp_path.iterdir()
    assert hashlib.sha256(dataset_path().read_bytes()).hexdigest()[:16] in archive.name
    made_ns = archive.stat().st_mtime_ns
    again = load_recordings(tmp_path)
    assert archive.stat().st_mtime_ns == made_ns
    for one, other, known in zip(first, again, recordings, strict=True):
        assert (one.wrist, one.label) == (other.wrist, other.label) == (known.wrist, known.label)
        np.testing.assert_array_equal(one.samples, other.samples)


def test_a_cache_that_was_deleted_is_made_again(tmp_path: Path) -> None:
    load_recordings(tmp_path)
    (archive,) = tmp_path.iterdir()
    before = archive.read_bytes()
    archive.unlink()
    assert len(load_recordings(tmp_path)) == 140
    assert archive.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [archive.name]  # nothing temporary is left


@pytest.mark.parametrize("keep", [0, 1000], ids=["empty", "cut short"])
def test_a_damaged_cache_is_made_again(tmp_path: Path, keep: int) -> None:
    load_recordings(tmp_path)
    (archive,) = tmp_path.iterdir()
    archive.write_bytes(archive.read_bytes()[:keep])
    assert len(load_recordings(tmp_path)) == 140


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FleetError, match="cannot be kept"):
        load_recordings(tmp_path / "file" / "covey")


def test_the_cache_lives_where_the_desktop_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "covey"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert default_cache() == Path("/home/somebody/.cache/covey")


def other_dataset(**changes: object) -> bytes:
    """A .npy file of the dataset's form, with another content."""
    content = {"X": np.zeros((140, 2, 6)), "y_labels": list(LABELS), **changes}
    out = io.BytesIO()
    np.save(out, np.array(content, dtype=object), allow_pickle=True)
    return out.getvalue()


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"not a numpy file at all", "expected a .npy file"),
        (other_dataset(X=np.zeros((3, 2, 6))), "not the 140 we know"),
        (other_dataset(y_labels=["A", "B"]), "not the 140 we know"),
        (other_dataset(X=Path("/etc")), "only numpy arrays are read"),
    ],
    ids=["no .npy", "too few", "other labels", "hostile"],
)
def test_a_file_that_is_not_the_dataset_is_one_sentence(tmp_path: Path, data: bytes, complaint: str) -> None:
    source = tmp_path / "watch_dataset.npy"
    source.write_bytes(data)
    with pytest.raises(FleetError, match=complaint):
        watch_data._convert(source, tmp_path / "out.npz")
    assert not (tmp_path / "out.npz").exists()


def test_importing_the_recordings_neither_imports_seglearn_nor_pandas(cache_home: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from firmware_sim.watch_data import load_recordings;"
        "load_recordings(Path(sys.argv[1])); print(sorted({'seglearn', 'pandas', 'sklearn'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(cache_home / "covey")], capture_output=True, text=True, check=True
    )
    assert result.stdout == "[]\n"
