"""``events.csv``: what happened in a simulated run, one line an event, in the order of time; Parquet by pyarrow.

Lines go to the file as they come, so a table of any length takes the memory of a line. The same events give the same
bytes.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType

from firmware_sim.errors import FleetError
from firmware_sim.fleet.windows import FleetEvent

COLUMNS = FleetEvent._fields


class EventTable:
    """The table being written.

    Args:
        path: of the CSV; a new file unless `keep_bytes` says otherwise.
        keep_bytes: of a run that goes on: what `flushed_bytes` told where it goes on from; what lies behind is cut.

    Raises:
        FleetError: the file cannot be written, or is shorter than `keep_bytes`.
    """

    def __init__(self, path: Path, *, keep_bytes: int | None = None) -> None:
        self._last_s = -math.inf
        try:
            if keep_bytes is not None:
                _cut(path, keep_bytes)
            # A name that is no valid text, as a path in a trace may be, is told with escapes.
            self._file = path.open("a" if keep_bytes else "w", encoding="utf-8", errors="backslashreplace", newline="")
        except OSError as error:
            raise FleetError(f"events {path}: cannot be written ({error.strerror})") from error
        self._writer = csv.writer(self._file, lineterminator="\r\n")  # the standard's; so both are quoted within cells
        if not keep_bytes:
            self._writer.writerow(COLUMNS)

    def append(self, event: FleetEvent) -> None:
        """Add an event.

        Raises:
            FleetError: it is earlier than the last, or its numbers are not finite.
        """
        if not (math.isfinite(event.time_s) and math.isfinite(event.value)):
            raise FleetError(f"event {event.event!r} of {event.device}: expected finite numbers, got {event!r}")
        if event.time_s < self._last_s:
            raise FleetError(
                f"event {event.event!r} of {event.device}: expected a time not before the last one's {self._last_s} s, "
                f"got {event.time_s} s; sort the events of a window with append_window"
            )
        self._last_s = event.time_s
        self._writer.writerow(event)

    def append_window(self, events: Iterable[FleetEvent]) -> None:
        """Add what happened in a window of time, all shards together, each device's events in their order.

        Which shard a device is in changes no byte: at equal times events are sorted by device.
        """
        for event in sorted(events, key=lambda event: (event.time_s, event.device)):
            self.append(event)

    def flushed_bytes(self) -> int:
        """How long the file is, after everything that was appended is on the disk: where a killed run can go on."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Write the last lines."""
        self._file.close()

    def __enter__(self) -> EventTable:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_events(path: Path) -> Iterator[FleetEvent]:
    """The events of a table, one at a time.

    Raises:
        FleetError: the file cannot be read, or a line of it is no event.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file)
            header = next(reader, [])
            if tuple(header) != COLUMNS:
                raise FleetError(f"events {path}: expected the columns {', '.join(COLUMNS)}, got {', '.join(header)}")
            for row in reader:
                yield _event_of(row, path, reader.line_num)
    except OSError as error:
        raise FleetError(f"events {path}: cannot be read ({error.strerror})") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise FleetError(f"events {path}: expected a table in UTF-8 ({error})") from error


def to_parquet(csv_path: Path, parquet_path: Path) -> None:
    """Write a table of events as Parquet, a block at a time; both have the same columns.

    Raises:
        FleetError: pyarrow is missing, the table cannot be read, or the file cannot be written.
    """
    try:
        import pyarrow as pa  # noqa: PLC0415 - an extra of its own
        from pyarrow import csv as arrow_csv  # noqa: PLC0415
        from pyarrow import parquet  # noqa: PLC0415
    except ImportError as error:
        raise FleetError(f"a table in Parquet needs pyarrow: pip install 'covey[parquet]' ({error})") from error
    text, number = pa.string(), pa.float64()
    schema = pa.schema(zip(COLUMNS, (number, text, text, text, pa.int64(), number, text), strict=True))
    part = parquet_path.with_name(f"{parquet_path.name}.part")
    try:
        with arrow_csv.open_csv(
            csv_path,
            parse_options=arrow_csv.ParseOptions(newlines_in_values=True),
            convert_options=arrow_csv.ConvertOptions(column_types=schema),
        ) as blocks:
            if blocks.schema != schema:
                raise FleetError(f"events {csv_path}: expected the columns {', '.join(COLUMNS)}")
            with parquet.ParquetWriter(part, schema) as writer:
                for block in blocks:
                    writer.write_batch(block)
        part.replace(parquet_path)
    except (OSError, pa.ArrowException) as error:
        raise FleetError(f"events {csv_path} cannot be written as {parquet_path} ({error})") from error
    finally:
        part.unlink(missing_ok=True)


def _cut(path: Path, length: int) -> None:
    """Keep the first bytes of a file."""
    size = path.stat().st_size
    if size < length:
        raise FleetError(f"events {path}: expected at least {length} bytes of the run that goes on, got {size}")
    os.truncate(path, length)


def _event_of(row: list[str], path: Path, line: int) -> FleetEvent:
    """One line."""
    try:
        time_s, device, profile, event, round_number, value, detail = row
        return FleetEvent(float(time_s), device, profile, event, int(round_number), float(value), detail)
    except ValueError as error:
        raise FleetError(f"events {path}, line {line}: expected {', '.join(COLUMNS)}, got {row!r}") from error
