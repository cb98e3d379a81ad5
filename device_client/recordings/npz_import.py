"""Windows from an ``.npz`` file, all of it at once. The only I/O is reading the file that is named."""

from __future__ import annotations

from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from device_client.recordings.recording_msg import RecordingError
from device_client.training import Records
from fl_protocol.errors import ConfigError
from fl_protocol.model_manifest import InputSchema, LabelSchema, label_array, label_problem


def read_npz(
    path: Path,
    *,
    input: InputSchema,
    label: LabelSchema,
) -> Records:
    """Windows of an ``.npz`` file, in the model's own channels, units and rate: nothing in it says so.

    Args:
        path: of a file with `x` [n, ...] in the schema's shape, and `y` [n] or [n, K].
        input: what the model takes.
        label: what the model predicts; of kind ``input`` no `y` is needed.

    Raises:
        ConfigError: the file cannot be read, or holds something else.
        RecordingError: the windows do not fit the model.
    """
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            raise ConfigError(f"{path}: expected an .npz with arrays x and y, got a single array")
        with loaded as archive:
            x = archive["x"].astype(np.float32)
            y = label_array(archive.get("y"), len(x), label=label)
    # numpy: EOFError for an empty file, BadZipFile for a damaged one.
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise ConfigError(f"{path}: expected an .npz with arrays x and y ({error})") from error
    if len(x) != len(y):
        raise ConfigError(f"{path}: expected as many labels as windows, got {len(y)} and {len(x)}")
    if x.shape[1:] != input.shape:
        raise RecordingError(f"the windows are {x.shape[1:]}, the model takes {input.shape}; import others")
    if not np.isfinite(x).all():
        raise RecordingError("the windows hold numbers that are not finite; import others")
    problem = label_problem(y, label)
    if problem:
        raise RecordingError(f"{problem}; import others")
    return Records(x, y)
