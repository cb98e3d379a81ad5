"""Recordings for central training: an ``.npz`` with x and y, checked against the bundle, never unpickled."""

from __future__ import annotations

from pathlib import Path

from device_client.training import Records
from fl_protocol.errors import LocalMisuseError
from fl_protocol.model_manifest import BundleManifest, label_array, label_problem
from models.npz_file import checked_x, read_arrays


def read_records(path: Path, manifest: BundleManifest, *, option: str) -> Records:
    """The examples x [n, ...] and labels y of an ``.npz``, as the graph takes them.

    Numbers of any kind become float32 as they are: 8-bit images stay 0 to 255, and scaling is the graph's.

    Args:
        path: of the file.
        manifest: of the bundle that will be trained.
        option: what errors call the file, such as ``--data``.

    Raises:
        LocalMisuseError: the file cannot be read, or its arrays do not fit the model.
    """
    name = f"{option} {path}"
    x, y = read_arrays(path, name)
    checked = checked_x(name, x, manifest, kinds="fiub")
    if y is not None and (y.ndim == 0 or len(y) != len(checked)):
        raise LocalMisuseError(f"{name}: there are {len(checked)} examples in x and y has shape {list(y.shape)}.")
    if y is not None and y.dtype.kind not in "fiub":
        raise LocalMisuseError(f"{name}: y holds {y.dtype}; expected numbers.")
    try:
        labels = label_array(y, len(checked), label=manifest.label)
    except KeyError:
        raise LocalMisuseError(f"{name}: there is no array y, and the model needs labels.") from None
    except ValueError as error:
        raise LocalMisuseError(f"{name}: {error}.") from error
    if labels.ndim != (1 if manifest.label.kind in ("class", "input") else 2):
        raise LocalMisuseError(f"{name}: y has shape {list(labels.shape)}; expected one class index an example.")
    problem = label_problem(labels, manifest.label)
    if problem:
        raise LocalMisuseError(f"{name}: {problem}.")
    return Records(checked, labels)
