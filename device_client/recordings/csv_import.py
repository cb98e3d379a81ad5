"""Recordings from a CSV file, read as a stream.

The file is cut into recordings where the label changes or time jumps. Invariants: a file of any size is read in
bounded memory; whatever is wrong is named with its line; nothing is resampled or filled in. The only I/O is reading the
file that is named.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from device_client.recordings.csv_cutter import CsvCutter
from device_client.recordings.csv_header import CsvFormat, CsvHeader
from device_client.recordings.ingestion import StreamTarget, Windows, has_time_axis, windows_from
from device_client.recordings.recording_msg import Recording, RecordingError
from fl_protocol.errors import ConfigError
from fl_protocol.model_manifest import InputSchema, LabelSchema

MAX_LINE_BYTES = 64 * 1024
"""Longest line of a CSV file."""

_PROGRESS_ROWS = 100_000


@dataclass(frozen=True)
class CsvProgress:
    """How far an import is.

    Args:
        rows: data rows read.
        bytes_read, total_bytes: of the file.
        left_out: rows without a label, and rows in pieces or remainders shorter than a window.
    """

    rows: int
    bytes_read: int
    total_bytes: int
    left_out: int


@dataclass(frozen=True)
class CsvResult:
    """What came of an import: windows stored, rows left out, and notes for the person."""

    stored: int
    left_out: int
    notes: tuple[str, ...]


Progress = Callable[[CsvProgress], None]


def store_csv(
    path: Path, *, target: StreamTarget, file_format: CsvFormat, now_s: float, progress: Progress | None = None
) -> CsvResult:
    """Import a file: read it once to check all of it, then again to store it, so that a wrong line stores nothing.

    Args:
        path: of the file; it should not change meanwhile.
        target: what the stream's model takes, and its store.
        file_format: what the file does not say itself.
        now_s: the device's time, Unix seconds.
        progress: called now and then in both passes, and at the end of each.

    Raises:
        ConfigError: the file cannot be read or a line is wrong; the text names the line.
        RecordingError: what it holds does not fit the model.
        StoreError: the store did not take it; earlier windows are stored.
    """
    left_out = 0

    def follow(now: CsvProgress) -> None:
        nonlocal left_out
        left_out = now.left_out
        if progress is not None:
            progress(now)

    def windows() -> Iterator[Windows]:
        read = read_csv(path, input=target.input, label=target.label, file_format=file_format, progress=follow)
        for recording in read:
            yield windows_from(recording, input=target.input, label=target.label)

    if not sum(len(part.x) for part in windows()):
        raise RecordingError(
            f"{path}: expected {target.input.shape[0]} samples with one label and no gap somewhere, one window, "
            f"but there are none in {left_out:,} rows"
        )
    stored, notes = 0, dict[str, None]()
    for part in windows():
        target.append(part.x, part.y, at_s=now_s)
        stored += len(part.x)
        notes.update(dict.fromkeys(part.notes))
    return CsvResult(stored, left_out, tuple(notes))


def read_csv(
    path: Path,
    *,
    input: InputSchema,
    label: LabelSchema,
    file_format: CsvFormat,
    progress: Progress | None = None,
) -> Iterator[Recording]:
    """Recordings of a CSV file: the samples between two changes of label or gaps in time, long ones in parts.

    The header names the channels, ``ax`` or with a unit ``ax[m/s^2]``, a column ``label`` and perhaps ``t_s``, the
    time in seconds. A label is a class name or index, or numbers with ``;`` between; rows without one are left out.
    Each recording is as long as its windows need, and at least one window.

    Args:
        path: of the file, UTF-8.
        input: what the model takes; it has to have a time axis.
        label: what the model predicts.
        file_format: what the file does not say itself.
        progress: called every 100,000 rows and at the end.

    Raises:
        ConfigError: the file cannot be read, or a line is wrong; the text names it.
    """
    if not has_time_axis(input):
        raise ConfigError(f"{path}: expected a model whose input is samples over time; import an .npz for this one")
    try:
        with path.open("rb") as stream:
            lines = _Lines(path, path.stat().st_size, progress)
            reader = csv.reader(lines.of(stream), strict=True)
            header = CsvHeader.read(path, next(reader, []), input=input, label=label, file_format=file_format)
            cutter = CsvCutter(path, header, input=input, label=label, file_format=file_format)
            for cells in reader:
                if not cells:
                    continue  # an empty line
                lines.rows += 1
                yield from cutter.row(lines.number, cells)
                lines.left_out = cutter.left_out
            yield from cutter.end()
            lines.left_out = cutter.left_out
            lines.tell()
    except OSError as error:
        raise ConfigError(f"{path}: the file cannot be read ({error.strerror})") from error
    except csv.Error as error:
        raise ConfigError(f"{path}, line {lines.number}: expected comma-separated values ({error})") from error


class _Lines:
    """The lines of a file, counted; none of them can fill the memory."""

    def __init__(self, path: Path, total_bytes: int, progress: Progress | None) -> None:
        self._path, self._total_bytes, self._progress = path, total_bytes, progress
        self.number = self.rows = self.left_out = self._bytes_read = 0

    def of(self, stream: BinaryIO) -> Iterator[str]:
        """Decoded lines; a byte order mark before the first is skipped."""
        while raw := stream.readline(MAX_LINE_BYTES + 1):
            self.number += 1
            self._bytes_read += len(raw)
            if len(raw) > MAX_LINE_BYTES:
                raise ConfigError(f"{self._path}, line {self.number}: expected at most {MAX_LINE_BYTES:,} bytes")
            if self.rows and self.rows % _PROGRESS_ROWS == 0:
                self.tell()
            try:
                yield raw.decode("utf-8-sig" if self.number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ConfigError(f"{self._path}, line {self.number}: expected UTF-8 text ({error})") from error

    def tell(self) -> None:
        """Report progress."""
        if self._progress is not None:
            self._progress(CsvProgress(self.rows, self._bytes_read, self._total_bytes, self.left_out))
