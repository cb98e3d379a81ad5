"""The first line of a CSV file of recordings: which column is which channel, in which unit. No I/O."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from device_client.recordings.recording_msg import listed, shown
from fl_protocol.errors import ConfigError, LocalMisuseError
from fl_protocol.model_manifest import InputSchema, LabelSchema

_COLUMN = re.compile(r"(?P<name>[^\[\]]+)(\[(?P<unit>[^\[\]]+)\])?")


@dataclass(frozen=True)
class CsvFormat:
    """What a CSV file does not say itself.

    Args:
        units: of channels whose header has none; a header's own unit may not differ.
        sampling_rate_hz: of the file; None only with a `t_s` column, which is then held against the model's rate.
        hop: samples between the starts of successive windows; None for no overlap.
        stream: the stream that takes the recordings.
    """

    units: Mapping[str, str] = field(default_factory=dict)
    sampling_rate_hz: float | None = None
    hop: int | None = None
    stream: str = "default"

    def __post_init__(self) -> None:
        if self.hop is not None and self.hop < 1:
            raise LocalMisuseError(f"hop: expected at least 1 sample, got {self.hop}")
        if self.sampling_rate_hz is not None and not 0 < self.sampling_rate_hz < math.inf:
            raise LocalMisuseError(f"sampling_rate_hz: expected a rate above 0, got {self.sampling_rate_hz}")


@dataclass(frozen=True)
class CsvHeader:
    """Which column is what.

    Args:
        width: columns of the file.
        channels, units: the model's channels in its order, and the units that the file has them in.
        columns: where the channels are.
        label_column, time_column: where `label` and `t_s` are, if there.
    """

    width: int
    channels: tuple[str, ...]
    units: tuple[str, ...]
    columns: tuple[int, ...]
    label_column: int | None
    time_column: int | None

    @classmethod
    def read(
        cls,
        path: Path,
        cells: list[str],
        *,
        input: InputSchema,
        label: LabelSchema,
        file_format: CsvFormat,
    ) -> CsvHeader:
        """Take the first line apart, and hold it against the model.

        Args:
            path: for the sentences.
            cells: of the first line.
            input: what the model takes.
            label: what the model predicts.
            file_format: what the file does not say itself.

        Raises:
            ConfigError: a column is missing, unknown, twice there or without a unit.
        """
        names, units = [], {}
        for cell in cells:
            match = _COLUMN.fullmatch(cell.strip())
            if match is None:
                raise ConfigError(f"{path}, line 1: expected a column such as ax or ax[m/s^2], got {shown(cell)}")
            names.append(match["name"].strip())
            if match["unit"]:
                units[names[-1]] = match["unit"].strip()
        if len(set(names)) != len(names):
            raise ConfigError(f"{path}, line 1: expected each column once, got {listed(names)}")
        missing = [name for name in input.channels if name not in names]
        if label.kind != "input" and "label" not in names:
            missing.append("label")
        if missing:
            raise ConfigError(
                f"{path}, line 1: expected columns {listed([*input.channels, 'label'])}; missing {listed(missing)}"
            )
        extra = [name for name in names if name not in {*input.channels, "label", "t_s"}]
        if extra:
            raise ConfigError(f"{path}, line 1: the model does not take {listed(extra)}; remove the columns")
        if "t_s" not in names and file_format.sampling_rate_hz is None:
            raise ConfigError(f"{path}: expected a column t_s (time in seconds) or a sampling rate; give one")
        return cls(
            width=len(names),
            channels=input.channels,
            units=tuple(_unit(path, name, units, file_format.units) for name in input.channels),
            columns=tuple(names.index(name) for name in input.channels),
            label_column=names.index("label") if "label" in names else None,
            time_column=names.index("t_s") if "t_s" in names else None,
        )


def _unit(path: Path, channel: str, header: Mapping[str, str], given: Mapping[str, str]) -> str:
    """The unit of a channel, said by the header or by the person, and not twice differently."""
    said = {units[channel] for units in (header, given) if channel in units}
    if len(said) != 1:
        raise ConfigError(
            f"{path}, line 1: expected one unit of {channel}, such as {channel}[m/s^2], got {listed(sorted(said))}"
        )
    return said.pop()
