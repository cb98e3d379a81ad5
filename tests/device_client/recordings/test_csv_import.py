"""CSV and .npz import: every window that a recording holds, cut where label or time does; wrong lines are named."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device_client.recordings.csv_header import CsvFormat
from device_client.recordings.csv_import import MAX_LINE_BYTES, CsvProgress, CsvResult, read_csv, store_csv
from device_client.recordings.ingestion import StreamTarget
from device_client.recordings.npz_import import read_npz
from device_client.recordings.recording_msg import Recording, RecordingError
from fl_protocol.errors import ConfigError, LocalMisuseError
from fl_protocol.model_manifest import InputSchema, LabelSchema

NOW_S = 1_700_000_000.0
WATCH = InputSchema(shape=(4, 2), channels=("ax", "wz"), units=("g", "rad/s"), sampling_rate_hz=50.0)
WALK_OR_RUN = LabelSchema(kind="class", names=("walk", "run"))
PULSE = LabelSchema(kind="value", names=("pulse", "stress"), units=("1/min", "1"))
ITSELF = LabelSchema(kind="input")
RATE = CsvFormat(sampling_rate_hz=50.0)
HEADER = "ax[g],wz[rad/s],label"


class Kept:
    """A store that keeps everything in a list."""

    def __init__(self) -> None:
        self.x: list[Any] = []
        self.y: list[Any] = []
        self.at_s: list[float] = []

    def append(self, x: Any, y: Any, *, at_s: float) -> int:
        self.x.extend(x.tolist())
        self.y.extend(y.tolist())
        self.at_s.append(at_s)
        return len(self.x)


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recording.csv"
    path.write_text(text, encoding="utf-8")
    return path


def rows_of(count: int, *, label: str = "run", first: int = 0) -> str:
    return "".join(f"{index},{-index},{label}\n" for index in range(first, first + count))


def timed(times_s: list[float], *, label: str = "run") -> str:
    return "t_s,ax[g],wz[rad/s],label\n" + "".join(f"{t},{i},0,{label}\n" for i, t in enumerate(times_s))


def stored_from(
    path: Path, *, file_format: CsvFormat = RATE, label: LabelSchema = WALK_OR_RUN, takes: InputSchema = WATCH
) -> tuple[Kept, CsvResult]:
    kept = Kept()
    target = StreamTarget(takes, label, kept.append)
    return kept, store_csv(path, target=target, file_format=file_format, now_s=NOW_S)


def recordings(path: Path, *, file_format: CsvFormat = RATE, label: LabelSchema = WALK_OR_RUN) -> list[Recording]:
    return list(read_csv(path, input=WATCH, label=label, file_format=file_format))


def test_a_recording_is_cut_where_the_label_changes(tmp_path: Path) -> None:
    path = written(tmp_path, f"{HEADER}\n{rows_of(9)}{rows_of(4, label='walk', first=9)}{rows_of(3, first=13)}")
    kept, result = stored_from(path)
    assert [[row[0] for row in window] for window in kept.x] == [[0, 1, 2, 3], [4, 5, 6, 7], [9, 10, 11, 12]]
    assert [row[1] for row in kept.x[0]] == [0, -1, -2, -3]
    assert kept.y == [1, 1, 0]
    assert result == CsvResult(stored=3, left_out=1 + 3, notes=())


def test_columns_may_be_in_any_order_with_units_from_header_or_person(tmp_path: Path) -> None:
    path = written(tmp_path, "label, wz ,ax [m/s^2]\n" + "0,180,9.80665\n" * 4)
    kept, result = stored_from(path, file_format=CsvFormat(sampling_rate_hz=50.4, units={"wz": "deg/s"}))
    np.testing.assert_allclose(kept.x, [[[1.0, np.pi]] * 4], rtol=1e-6)
    assert kept.y == [0]
    assert result.notes == ("ax: converted from m/s^2 to g", "wz: converted from deg/s to rad/s")


def test_rows_without_a_label_are_left_out_whatever_they_hold(tmp_path: Path) -> None:
    path = written(tmp_path, f"{HEADER}\n{rows_of(6)}nan,broken,\n{rows_of(5, first=7)}")
    kept, result = stored_from(path)
    assert [window[0][0] for window in kept.x] == [0, 7]
    assert result.left_out == 2 + 1 + 1


def test_what_spreadsheets_write_is_read(tmp_path: Path) -> None:
    text = "\ufeff" + HEADER.replace("label", '"label"') + "\n" + rows_of(4) + "\n"
    kept, _ = stored_from(written(tmp_path, text.replace("\n", "\r\n")))
    assert kept.y == [1]


def test_a_gap_in_time_cuts_and_one_missing_sample_does_not(tmp_path: Path) -> None:
    times = [0.0, 0.02, 0.04, 0.08, 0.10, 0.12]  # the sample at 0.06 is missing
    gap = [0.18, 0.20, 0.22, 0.24]  # those at 0.14 and 0.16 are
    kept, result = stored_from(written(tmp_path, timed(times + gap)), file_format=CsvFormat())
    assert [[row[0] for row in window] for window in kept.x] == [[0, 1, 2, 3], [6, 7, 8, 9]]
    assert result.left_out == 2


def test_records_age_from_when_they_are_stored(tmp_path: Path) -> None:
    path = written(tmp_path, timed([i * 0.02 for i in range(4)] + [60 + i * 0.02 for i in range(4)]))
    assert stored_from(path, file_format=CsvFormat())[0].at_s == [NOW_S, NOW_S]


def test_time_that_goes_backwards_is_refused_with_its_line(tmp_path: Path) -> None:
    path = written(tmp_path, timed([0.0, 0.02, 0.04, 0.03, 0.05]))
    with pytest.raises(ConfigError, match=r"line 5: expected t_s to increase, got 0.03 after 0.04; sort the rows"):
        recordings(path, file_format=CsvFormat())
    with pytest.raises(ConfigError, match="line 3: expected t_s to increase"):
        recordings(written(tmp_path, timed([1.0, 1.0])), file_format=CsvFormat())


@pytest.mark.parametrize(
    ("rate_hz", "sentence"),
    [
        (25.0, "lines 2 to 201: expected 50 Hz within 1%, but t_s says 25 Hz; resample"),
        (51.5, "but t_s says 51.5 Hz"),
        (10.0, "t_s jumps by more than 2 samples at 199 of 200 rows; check the unit of t_s"),
        (0.05, "check the unit of t_s"),
        (50_000.0, "but t_s says 5e\\+04 Hz"),
    ],
)
def test_a_file_of_another_rate_is_refused_before_anything_is_stored(
    tmp_path: Path, rate_hz: float, sentence: str
) -> None:
    path = written(tmp_path, timed([index / rate_hz for index in range(200)]))
    kept = Kept()
    with pytest.raises(ConfigError, match=sentence):
        store_csv(path, target=StreamTarget(WATCH, WALK_OR_RUN, kept.append), file_format=CsvFormat(), now_s=NOW_S)
    assert kept.x == []


def test_a_claimed_rate_is_held_against_the_model(tmp_path: Path) -> None:
    path = written(tmp_path, f"{HEADER}\n{rows_of(8)}")
    with pytest.raises(RecordingError, match="expected 50 Hz within 1%, got 25 Hz; resample"):
        stored_from(path, file_format=CsvFormat(sampling_rate_hz=25.0))
    with pytest.raises(ConfigError, match=r"expected a column t_s \(time in seconds\) or a sampling rate"):
        stored_from(path, file_format=CsvFormat())


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "line 1: expected columns ax, wz, label; missing ax, wz, label"),
        (f"{HEADER}\n1,2\n", "line 2: expected 3 columns, got 2"),
        (f"{HEADER}\n1,2,run\n\n1,x,run\n", "line 4: expected numbers .*'x'.*; repair the row or leave it out"),
        (f"{HEADER}\n1,nan,run\n", "line 2: expected finite numbers, got 1, nan"),
        (f"{HEADER}\n1,1_000,run\n", "line 2: expected finite numbers, got 1, 1_000"),
        (f"{HEADER}\n1,2,jump\n", "line 2: expected a label out of walk, run, got 'jump'"),
        (f"{HEADER}\n1,2,2\n", "line 2: expected a label out of walk, run, got '2'"),
        (f"{HEADER}\n1,2,-1\n", "line 2: expected a label out of walk, run, got '-1'"),
        ("ax[g],label\n", "line 1: expected columns ax, wz, label; missing wz"),
        (f"{HEADER},heart\n", "line 1: the model does not take heart; remove the columns"),
        (f"{HEADER},ax\n", "line 1: expected each column once"),
        ("ax[g],wz,label\n", r"line 1: expected one unit of wz, such as wz\[m/s\^2\], got none"),
        ("ax[g,wz,label\n", "line 1: expected a column such as ax"),
        (f'{HEADER}\n"1"2,2,run\n', "line 2: expected comma-separated values"),
        (f"{HEADER}\n{'1' * MAX_LINE_BYTES},2,run\n", "line 2: expected at most 65,536 bytes"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        recordings(written(tmp_path, text))


def test_a_file_that_is_no_text_or_is_not_there_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recording.csv"
    with pytest.raises(ConfigError, match=r"the file cannot be read \(No such file or directory\)"):
        recordings(path)
    path.write_bytes(HEADER.encode() + b"\n1,2,\xff\n")
    with pytest.raises(ConfigError, match="line 2: expected UTF-8"):
        recordings(path)


def test_a_unit_may_not_be_said_twice_differently(tmp_path: Path) -> None:
    path = written(tmp_path, f"{HEADER}\n{rows_of(4)}")
    with pytest.raises(ConfigError, match=r"expected one unit of ax, such as ax.*, got g, m/s\^2"):
        recordings(path, file_format=CsvFormat(sampling_rate_hz=50.0, units={"ax": "m/s^2"}))
    assert len(recordings(path, file_format=CsvFormat(sampling_rate_hz=50.0, units={"ax": "g"}))) == 1


def test_a_wrong_last_line_stores_nothing(tmp_path: Path) -> None:
    path = written(tmp_path, f"{HEADER}\n{rows_of(4000)}1,broken,run\n")
    kept = Kept()
    with pytest.raises(ConfigError, match="line 4002"):
        store_csv(path, target=StreamTarget(WATCH, WALK_OR_RUN, kept.append), file_format=RATE, now_s=NOW_S)
    assert kept.x == []
    assert len(recordings(written(tmp_path, f"{HEADER}\n{rows_of(4000)}"))) > 1  # it would have been given out


def test_a_file_without_one_whole_window_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, f"{HEADER}\n{rows_of(3)}{rows_of(3, label='walk')}")
    with pytest.raises(RecordingError, match=r"expected 4 samples with one label and no gap .* none in 6 rows"):
        stored_from(path)


def test_an_image_model_takes_no_csv(tmp_path: Path) -> None:
    image = InputSchema(shape=(2, 2, 1), channels=("grey",), units=("1/255",), sampling_rate_hz=0.0)
    with pytest.raises(ConfigError, match=r"import an \.npz for this one"):
        stored_from(written(tmp_path, "grey,label\n"), takes=image)


def test_labels_may_be_several_numbers_or_none(tmp_path: Path) -> None:
    path = written(tmp_path, "ax[g],wz[rad/s],label\n" + "1,2,61.5;0.5\n" * 4)
    assert stored_from(path, label=PULSE)[0].y == [[61.5, 0.5]]
    with pytest.raises(ConfigError, match=r"line 2: the labels have shape .1, 1., the model takes 2 numbers"):
        recordings(written(tmp_path, "ax[g],wz[rad/s],label\n1,2,61.5\n"), label=PULSE)
    unlabelled = written(tmp_path, "ax[g],wz[rad/s]\n" + "1,2\n" * 5)
    kept, result = stored_from(unlabelled, label=ITSELF)
    assert (kept.y, result.left_out) == ([0], 1)


@settings(max_examples=80, deadline=None)
@given(
    pieces=st.lists(
        st.tuples(
            st.integers(1, 40) | st.integers(1015, 1040) | st.integers(2035, 2060), st.sampled_from(["walk", "run", ""])
        ),
        min_size=1,
        max_size=3,
    ),
    hop=st.none() | st.integers(1, 9),
)
def test_the_windows_are_those_of_each_piece_alone(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[tuple[int, str]], hop: int | None
) -> None:
    """Long pieces are given out in parts; no window is lost, doubled or across a border by that."""
    text, expected, covered, first = "", [], set(), 0
    merged: list[tuple[int, str]] = []
    for count, label in pieces:
        if merged and merged[-1][1] == label:
            merged[-1] = (merged[-1][0] + count, label)
        else:
            merged.append((count, label))
    for count, label in merged:
        text += rows_of(count, label=label, first=first)
        starts = range(first, first + count - 3, hop or 4) if label else range(0)
        expected += list(starts)
        covered |= {row for start in starts for row in range(start, start + max(4, hop or 4))}
        first += count
    path = written(tmp_path_factory.mktemp("csv"), f"{HEADER}\n{text}")
    kept = Kept()
    target = StreamTarget(WATCH, WALK_OR_RUN, kept.append)
    file_format = CsvFormat(sampling_rate_hz=50.0, hop=hop)
    if not expected:
        with pytest.raises(RecordingError, match="one window"):
            store_csv(path, target=target, file_format=file_format, now_s=NOW_S)
        return
    result = store_csv(path, target=target, file_format=file_format, now_s=NOW_S)
    assert [window[0][0] for window in kept.x] == expected
    assert all([row[0] - window[0][0] for row in window] == [0, 1, 2, 3] for window in kept.x)
    assert result.stored == len(expected)
    if (hop or 4) <= 4:
        assert result.left_out == first - len(covered)


@pytest.mark.parametrize("hop", [None, 1, 1_000_000])
def test_a_long_file_is_read_in_bounded_memory(tmp_path: Path, hop: int | None) -> None:
    path = tmp_path / "long.csv"
    with path.open("w") as stream:
        stream.write(f"{HEADER}\n")
        for _ in range(8):
            stream.write("0.125,-0.125,run\n" * 10_000)
    file_format = CsvFormat(sampling_rate_hz=50.0, hop=hop)
    tracemalloc.start()
    for recording in read_csv(path, input=WATCH, label=WALK_OR_RUN, file_format=file_format):
        assert len(recording.x) <= 256 * 4
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert path.stat().st_size > 1_000_000
    assert peak < 400_000


def test_a_file_without_line_ends_is_refused_after_one_read(tmp_path: Path) -> None:
    path = tmp_path / "recording.csv"
    path.write_bytes(b"1" * 8_000_000)
    tracemalloc.start()
    with pytest.raises(ConfigError, match="line 1: expected at most 65,536 bytes"):
        recordings(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


def test_progress_is_told_in_rows_and_bytes(tmp_path: Path) -> None:
    path = written(tmp_path, f"{HEADER}\n{rows_of(100_005)}")
    told: list[CsvProgress] = []
    for _ in read_csv(path, input=WATCH, label=WALK_OR_RUN, file_format=RATE, progress=told.append):
        pass
    size = path.stat().st_size
    assert [(now.rows, now.total_bytes) for now in told] == [(100_000, size), (100_005, size)]
    assert 0 < told[0].bytes_read < size
    assert told[1] == CsvProgress(rows=100_005, bytes_read=size, total_bytes=size, left_out=1)


@pytest.mark.parametrize("wrong", [{"hop": 0}, {"sampling_rate_hz": 0.0}, {"sampling_rate_hz": float("nan")}])
def test_a_format_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(LocalMisuseError, match="expected"):
        CsvFormat(**wrong)


def test_npz_windows_are_taken_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "windows.npz"
    np.savez(path, x=np.ones((3, 4, 2)), y=np.array([0, 1, 1]))
    records = read_npz(path, input=WATCH, label=WALK_OR_RUN)
    assert (records.x.dtype, records.y.dtype, records.y.tolist()) == (np.float32, np.int32, [0, 1, 1])
    np.savez(path, x=np.ones((3, 4, 2)))
    assert read_npz(path, input=WATCH, label=ITSELF).y.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"x": np.ones((2, 5, 2)), "y": np.zeros(2)}, r"the windows are \(5, 2\), the model takes \(4, 2\); import"),
        ({"x": np.full((2, 4, 2), np.inf), "y": np.zeros(2)}, "numbers that are not finite; import others"),
        ({"x": np.ones((2, 4, 2)), "y": np.array([0, 2])}, "the labels run from 0 to 2, .*; import others"),
        ({"x": np.ones((2, 4, 2)), "y": np.zeros(3)}, "expected as many labels as windows, got 3 and 2"),
        ({"x": np.ones((2, 4, 2)), "y": np.full(2, 0.5)}, "expected an .npz with arrays x and y .*not whole"),
        ({"x": np.ones((2, 4, 2))}, "expected an .npz with arrays x and y"),
        ({"x": np.array([{}]), "y": np.zeros(1)}, "expected an .npz with arrays x and y"),
    ],
)
def test_npz_files_that_do_not_fit_are_refused(tmp_path: Path, arrays: dict[str, Any], sentence: str) -> None:
    path = tmp_path / "windows.npz"
    np.savez(path, **arrays)
    with pytest.raises((ConfigError, RecordingError), match=sentence):
        read_npz(path, input=WATCH, label=WALK_OR_RUN)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 broken", b"no numpy file", None])
def test_files_that_are_no_npz_are_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "windows.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"expected an \.npz with arrays x and y"):
        read_npz(path, input=WATCH, label=WALK_OR_RUN)


def test_a_single_array_is_no_npz(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones(3))
    with pytest.raises(ConfigError, match="got a single array"):
        read_npz(tmp_path / "x.npy", input=WATCH, label=WALK_OR_RUN)
