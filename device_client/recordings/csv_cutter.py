"""Rows of a CSV file, cut into recordings where the label changes or time jumps. No I/O.

Invariants: a recording is as long as its windows need, and at least one window; one that is longer than some windows is
given out in parts that together have the same windows; nothing is filled in.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from device_client.recordings.csv_header import CsvFormat, CsvHeader
from device_client.recordings.ingestion import MAX_WINDOW_VALUES, RATE_TOLERANCE
from device_client.recordings.recording_msg import Label, Recording, listed, shown
from fl_protocol.errors import ConfigError
from fl_protocol.model_manifest import InputSchema, LabelSchema, label_array, label_problem

GAP_SAMPLES = 2
"""A step of `t_s` of more samples than this cuts the recording (half a sample is allowed for rounding)."""

_PART_WINDOWS = 256
"""Most windows of one recording that is given out."""


class _Clock:
    """Follows `t_s`: always forwards, at the rate that is expected, with gaps."""

    def __init__(self, path: Path, rate_hz: float) -> None:
        self._path, self._rate_hz = path, rate_hz
        self._first = self._last = (0, 0.0)  # line and time, since the last gap
        self._count = self._rows = self._gaps = 0

    def tick(self, line: int, time_s: float) -> bool:
        """The next row's time; whether there is a gap before it."""
        self._rows += 1
        step_s = time_s - self._last[1]
        if self._count and step_s <= 0:
            raise ConfigError(
                f"{self._path}, line {line}: expected t_s to increase, got {time_s} after {self._last[1]}; "
                "sort the rows, or import each recording as a file of its own"
            )
        gap = self._count > 0 and step_s * self._rate_hz > GAP_SAMPLES + 0.5
        if gap:
            self._gaps += 1
            self._check_rate()
        if gap or not self._count:
            self._first, self._count = (line, time_s), 0
        self._last = (line, time_s)
        self._count += 1
        return gap

    def end(self) -> None:
        """No more rows come."""
        self._check_rate()
        if self._gaps * 2 > self._rows:
            raise ConfigError(
                f"{self._path}: expected samples at {self._rate_hz:g} Hz, but t_s jumps by more than {GAP_SAMPLES} "
                f"samples at {self._gaps:,} of {self._rows:,} rows; check the unit of t_s (seconds), or resample"
            )

    def _check_rate(self) -> None:
        """Since the last gap as much time has passed as so many samples take; one of them may be missing."""
        expected_s = (self._count - 1) / self._rate_hz
        passed_s = self._last[1] - self._first[1]
        if abs(passed_s - expected_s) > RATE_TOLERANCE * expected_s + 1 / self._rate_hz:
            raise ConfigError(
                f"{self._path}, lines {self._first[0]} to {self._last[0]}: expected {self._rate_hz:g} Hz within "
                f"{RATE_TOLERANCE:.0%}, but t_s says {(self._count - 1) / passed_s:.4g} Hz; resample the file"
            )


class CsvCutter:
    """Collects rows of one label without a gap, and gives them out as recordings.

    Args:
        path: for the sentences.
        header: which column is what.
        input: what the model takes; it has a time axis.
        label: what the model predicts.
        file_format: what the file does not say itself.
    """

    def __init__(
        self,
        path: Path,
        header: CsvHeader,
        *,
        input: InputSchema,
        label: LabelSchema,
        file_format: CsvFormat,
    ) -> None:
        self._path, self._header, self._label, self._format = path, header, label, file_format
        self._rate_hz = file_format.sampling_rate_hz or input.sampling_rate_hz
        self._clock = _Clock(path, self._rate_hz)
        self._length, self._width = input.shape
        self._hop = file_format.hop or self._length
        windows = _windows_of_a_part(self._length, self._width, hop=self._hop)
        self._part_rows = (windows - 1) * self._hop + self._length
        self._part_step = windows * self._hop
        self._said: str | None = None
        self._given: Label = None
        self._values = array("d")
        self._used = 0  # rows at the start that were given out already
        self._skip = 0  # rows to come that lie between windows
        self.left_out = 0

    def row(self, line: int, cells: list[str]) -> Iterator[Recording]:
        """Take one row; recordings that it completes.

        Args:
            line: its number, for the sentences.
            cells: as they are in the file.

        Raises:
            ConfigError: a cell is missing or wrong.
        """
        header, where = self._header, f"{self._path}, line {line}"
        if len(cells) != header.width:
            raise ConfigError(f"{where}: expected {header.width} columns, got {len(cells)}")
        gap = False
        if header.time_column is not None:
            (time_s,) = _numbers(where, [cells[header.time_column]])
            gap = self._clock.tick(line, time_s)
        said = "" if header.label_column is None else cells[header.label_column].strip()
        if gap or said != self._said:
            yield from self._finish()
            self._said, self._given = said, _label_of(where, said, self._label)
        if said == "" and self._label.kind != "input":
            self.left_out += 1
            return
        values = _numbers(where, [cells[column] for column in header.columns])
        if self._skip:
            self._skip -= 1
            return
        self._values.extend(values)
        if len(self._values) // self._width == self._part_rows:
            yield self._recording(self._part_rows)
            self._forget(self._part_step)

    def end(self) -> Iterator[Recording]:
        """No more rows come: the last recording. Raises ConfigError where `t_s` is not at the rate."""
        if self._header.time_column is not None:
            self._clock.end()
        yield from self._finish()

    def _finish(self) -> Iterator[Recording]:
        """The recording ends here."""
        rows = len(self._values) // self._width
        if rows >= self._length:
            whole = (rows - self._length) // self._hop * self._hop + self._length
            yield self._recording(whole)
            self.left_out += rows - whole
        else:
            self.left_out += max(0, rows - self._used)
        self._forget(rows)
        self._used = self._skip = 0

    def _recording(self, rows: int) -> Recording:
        """The first rows, as a recording."""
        return Recording(
            channels=self._header.channels,
            units=self._header.units,
            sampling_rate_hz=self._rate_hz,
            x=np.array(self._values[: rows * self._width]).reshape(rows, self._width),
            label=self._given,
            stream=self._format.stream,
            hop=self._format.hop,
        )

    def _forget(self, rows: int) -> None:
        """Drop the first rows, and as many to come as there are too few."""
        self._skip = max(0, rows - len(self._values) // self._width)
        del self._values[: rows * self._width]
        self._used = len(self._values) // self._width


def _windows_of_a_part(length: int, width: int, *, hop: int) -> int:
    """How many windows a recording is given out with, so that neither it nor they fill the memory."""
    windows = max(1, min(_PART_WINDOWS, MAX_WINDOW_VALUES // (length * width)))
    return min(windows, (windows - 1) * length // hop + 1)


def _numbers(where: str, cells: list[str]) -> list[float]:
    """Cells as finite numbers."""
    try:
        values = [float(cell) for cell in cells]
    except ValueError as error:
        raise ConfigError(
            f"{where}: expected numbers ({error}); repair the row or leave it out by emptying its label"
        ) from None
    # Python's float() also reads 1_000.
    if not all(map(math.isfinite, values)) or any("_" in cell for cell in cells):
        raise ConfigError(
            f"{where}: expected finite numbers, got {listed(cells)}; "
            "repair the row or leave it out by emptying its label"
        )
    return values


def _label_of(where: str, text: str, label: LabelSchema) -> Label:
    """A cell of the column `label`; None for an empty one and where the model takes none."""
    if not text or label.kind == "input":
        return None
    if label.kind == "class":
        if text in label.names:
            return text
        if text.isdecimal() and int(text[:9]) < len(label.names):
            return int(text[:9])
        raise ConfigError(f"{where}: expected a label out of {listed(label.names)}, got {shown(text)}")
    numbers = _numbers(where, text.split(";"))
    problem = label_problem(label_array(np.array([numbers]), 1, label=label), label)
    if problem:
        raise ConfigError(f"{where}: {problem} (in the column label, with ; between them)")
    return tuple(numbers)
