"""The table of events: what goes in comes out, in order, whatever the shards; a broken table says where."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firmware_sim.errors import FleetError
from firmware_sim.fleet.windows import FleetEvent
from firmware_sim.fleet_events import COLUMNS, EventTable, read_events, to_parquet
from tests.enrolments import broken_copy

EVENTS = [
    FleetEvent(0.0, "device-1", "smartwatch", "charged", 1, 0.1, ""),
    FleetEvent(0.1 + 0.2, "device-2", "phone, fast", "update_refused", 3, -1.5e-300, 'said "no",\nand left'),
    FleetEvent(604_800.0, "gerät-3", "smartwatch", "crashed", 0, 0.0, "ValueError: \r\t ε = ∞"),
]


def written(path: Path, events: list[FleetEvent]) -> bytes:
    with EventTable(path) as table:
        for event in events:
            table.append(event)
    return path.read_bytes()


def test_what_is_written_is_read(tmp_path: Path) -> None:
    written(tmp_path / "events.csv", EVENTS)
    assert list(read_events(tmp_path / "events.csv")) == EVENTS


def test_the_columns_are_the_documented_ones(tmp_path: Path) -> None:
    assert written(tmp_path / "events.csv", []) == b"time_s,device,profile,event,round,value,detail\r\n"
    page = (Path(__file__).parents[2] / "docs" / "simulation-report.md").read_text(encoding="utf-8")
    for column in COLUMNS:
        assert f"| `{column}` |" in page, column


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("events")


# Letters that are no valid text are told with escapes, so they come back as these: not in this property.
_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@settings(max_examples=40)
@given(
    st.lists(
        st.builds(
            FleetEvent,
            st.floats(0, 1e9),
            _TEXT,
            _TEXT,
            _TEXT,
            st.integers(0, 2**40),
            st.floats(allow_nan=False, allow_infinity=False),
            _TEXT,
        )
    )
)
def test_any_events_come_back_as_they_were(folder: Path, events: list[FleetEvent]) -> None:
    path = folder / "events.csv"
    events.sort(key=lambda event: event.time_s)
    written(path, events)
    assert list(read_events(path)) == events


def windows_in_shards(shards: int, seed: int) -> list[list[FleetEvent]]:
    """The same events of 40 devices in 3 windows, as so many shards hand them over in a turn of their own."""
    draw = random.Random(seed)  # noqa: S311 - an order, no secret
    windows: list[list[FleetEvent]] = []
    for start in (0.0, 1.0, 2.0):
        of_shards: list[list[FleetEvent]] = [[] for _ in range(shards)]
        for number in range(40):
            # Two events at one time: their order is the device's own.
            of_shards[number % shards] += [
                FleetEvent(start + number % 4 / 4, f"device-{number}", "phone", event) for event in ("woke", "began")
            ]
        draw.shuffle(of_shards)
        windows.append([event for events in of_shards for event in events])
    return windows


def bytes_of_shards(path: Path, shards: int, seed: int, table: type[EventTable] = EventTable) -> bytes:
    with table(path) as opened:
        for window in windows_in_shards(shards, seed):
            opened.append_window(window)
    return path.read_bytes()


def test_which_shard_a_device_is_in_changes_no_byte(tmp_path: Path) -> None:
    expected = bytes_of_shards(tmp_path / "a.csv", 1, 0)
    assert len(expected.splitlines()) == 1 + 3 * 80
    for shards, seed in ((2, 1), (5, 2), (5, 3)):
        assert bytes_of_shards(tmp_path / "b.csv", shards, seed) == expected


def test_a_table_that_sorts_by_time_alone_is_caught(tmp_path: Path) -> None:
    broken = broken_copy("firmware_sim.fleet_events", ("(event.time_s, event.device)", "event.time_s"))
    expected = bytes_of_shards(tmp_path / "a.csv", 1, 0, broken.EventTable)
    assert bytes_of_shards(tmp_path / "b.csv", 5, 2, broken.EventTable) != expected


@pytest.mark.parametrize(
    ("event", "complaint"),
    [
        (
            FleetEvent(4.0, "device-1", "phone", "woke"),
            "expected a time not before the last one's 5.0 s, got",
        ),
        (FleetEvent(float("nan"), "device-1", "phone", "woke"), "expected finite numbers"),
        (FleetEvent(6.0, "device-1", "phone", "woke", 1, float("inf")), "expected finite numbers"),
    ],
)
def test_an_event_out_of_order_or_without_a_number_is_refused(
    tmp_path: Path, event: FleetEvent, complaint: str
) -> None:
    with EventTable(tmp_path / "events.csv") as table:
        table.append(FleetEvent(5.0, "device-2", "phone", "woke"))
        with pytest.raises(FleetError, match=complaint):
            table.append(event)
    assert len(list(read_events(tmp_path / "events.csv"))) == 1


def test_a_run_that_goes_on_writes_the_table_it_would_have_written(tmp_path: Path) -> None:
    whole = written(tmp_path / "whole.csv", EVENTS)
    killed = EventTable(tmp_path / "killed.csv")
    killed.append(EVENTS[0])
    kept = killed.flushed_bytes()
    killed.append(EVENTS[1])
    killed.close()
    with EventTable(tmp_path / "killed.csv", keep_bytes=kept) as table:
        table.append(EVENTS[1])
        table.append(EVENTS[2])
    assert (tmp_path / "killed.csv").read_bytes() == whole


def test_a_table_shorter_than_what_is_to_be_kept_is_told(tmp_path: Path) -> None:
    length = len(written(tmp_path / "events.csv", EVENTS))
    with pytest.raises(FleetError, match=f"expected at least {length + 1} bytes of the run that goes on, got {length}"):
        EventTable(tmp_path / "events.csv", keep_bytes=length + 1)


def test_a_name_that_is_no_text_is_told_with_escapes(tmp_path: Path) -> None:
    written(tmp_path / "events.csv", [FleetEvent(0.0, "device-\udcff", "phone", "woke")])
    assert [event.device for event in read_events(tmp_path / "events.csv")] == [r"device-\udcff"]


HEADER = b"time_s,device,profile,event,round,value,detail\r\n"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "cannot be read"),
        (b"", "expected the columns time_s"),
        (b"a,b\n1,2\n", "expected the columns .* got a, b"),
        (HEADER + b"1,d,p,e,0,0.0,\n2,d,p\n", "line 3: expected time_s"),
        (HEADER + b"soon,d,p,e,0,0.0,\n", "line 2: expected time_s"),
        (HEADER + b"1,\xff,p,e,0,0.0,\n", "expected a table in UTF-8"),
    ],
    ids=["missing", "empty", "other columns", "short line", "no number", "no text"],
)
def test_a_table_that_is_none_says_where(tmp_path: Path, content: bytes | None, complaint: str) -> None:
    path = tmp_path / "events.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FleetError, match=complaint):
        list(read_events(path))


def test_parquet_holds_the_same_events(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    written(tmp_path / "events.csv", EVENTS)
    to_parquet(tmp_path / "events.csv", tmp_path / "events.parquet")
    table = parquet.read_table(tmp_path / "events.parquet")
    assert [FleetEvent(**row) for row in table.to_pylist()] == EVENTS
    assert [str(kind) for kind in table.schema.types] == [
        *("double", "string", "string", "string", "int64", "double", "string")
    ]
    first = (tmp_path / "events.parquet").read_bytes()
    to_parquet(tmp_path / "events.csv", tmp_path / "events.parquet")
    assert (tmp_path / "events.parquet").read_bytes() == first


def test_an_empty_table_is_an_empty_parquet(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    written(tmp_path / "events.csv", [])
    to_parquet(tmp_path / "events.csv", tmp_path / "events.parquet")
    table = parquet.read_table(tmp_path / "events.parquet")
    assert (table.num_rows, tuple(table.column_names)) == (0, COLUMNS)


@pytest.mark.parametrize("content", [None, b"", b"a,b\n1,2\n", HEADER + b"soon,d,p,e,0,0.0,\n"])
def test_a_broken_table_leaves_no_parquet(tmp_path: Path, content: bytes | None) -> None:
    pytest.importorskip("pyarrow")
    if content is not None:
        (tmp_path / "events.csv").write_bytes(content)
    with pytest.raises(FleetError, match=r"events\.csv"):
        to_parquet(tmp_path / "events.csv", tmp_path / "events.parquet")
    assert {path.name for path in tmp_path.iterdir()} <= {"events.csv"}


def test_without_pyarrow_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # as where it is not installed: importing it raises ImportError
    written(tmp_path / "events.csv", EVENTS)
    with pytest.raises(FleetError, match=r"needs pyarrow: pip install 'covey\[parquet\]'"):
        to_parquet(tmp_path / "events.csv", tmp_path / "events.parquet")
