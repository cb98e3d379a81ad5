"""What an export is given beside the bundle: trained parameters and recordings; checked, and never unpickled."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fl_protocol.bundle import ModelBundle
from fl_protocol.errors import LocalMisuseError
from fl_protocol.model_manifest import BundleManifest
from models.npz_file import UNREADABLE, checked_x, read_arrays


@dataclass(frozen=True)
class Examples:
    """Recordings in the manifest's units.

    Args:
        x: float32 [n, ...].
        y: their labels, int32 [n] or float32 [n, K]; None if there are none.
    """

    x: NDArray[np.float32]
    y: NDArray[Any] | None

    def rows(self, index: NDArray[np.int64]) -> Examples:
        """Some of them."""
        return Examples(self.x[index], None if self.y is None else self.y[index])


def read_params(path: Path, bundle: ModelBundle) -> NDArray[np.float32]:
    """All parameters, float32 [d], from a ``.npy`` of them all or of the shared ones.

    Raises:
        LocalMisuseError: the file is no such vector.
    """
    manifest = bundle.manifest
    try:
        vector = np.load(path, allow_pickle=False)
    except OSError as error:
        raise LocalMisuseError(f"--params {path}: cannot be read ({error.strerror}).") from error
    except UNREADABLE as error:
        raise LocalMisuseError(f"--params {path}: expected a .npy file of float32.") from error
    lengths = sorted({manifest.num_parameters, manifest.num_shared_parameters})
    if not isinstance(vector, np.ndarray):
        raise LocalMisuseError(f"--params {path}: expected a .npy file; a trained .covey is exported as it is.")
    if vector.dtype != np.float32 or vector.ndim != 1 or vector.size not in lengths:
        wanted = " or ".join(f"[{length}]" for length in lengths)
        raise LocalMisuseError(f"--params {path}: expected float32 {wanted}, got {vector.dtype} {list(vector.shape)}.")
    if not np.isfinite(vector).all():
        raise LocalMisuseError(f"--params {path}: expected finite numbers, got NaN or infinity.")
    return vector if vector.size == manifest.num_parameters else bundle.with_personal(vector)


def read_examples(path: Path, manifest: BundleManifest) -> Examples:
    """The arrays ``x`` and ``y`` of an ``.npz``.

    Raises:
        LocalMisuseError: the file is none, or its arrays do not fit the model.
    """
    name = f"--data {path}"
    x, y = read_arrays(path, name)
    windows = checked_x(name, x, manifest, kinds="fiu")
    return Examples(windows, None if y is None else _checked_y(path, y, len(windows), manifest))


def _checked_y(path: Path, y: NDArray[Any], count: int, manifest: BundleManifest) -> NDArray[Any] | None:
    """Labels of the model's kind; None for an autoencoder, which has none."""
    label = manifest.label
    outputs = len(label.names)
    if label.kind == "input":
        return None
    if label.kind == "class":
        if y.shape != (count,) or y.dtype.kind not in "iu":
            raise LocalMisuseError(f"--data {path}: expected y as whole numbers [{count}], got {y.dtype} {y.shape}.")
        if y.min() < 0 or y.max() >= outputs:
            raise LocalMisuseError(
                f"--data {path}: y holds {y.min()} to {y.max()}; the model's classes are 0 to {outputs - 1} "
                f"({', '.join(label.names)})."
            )
        return y.astype(np.int32)
    if y.shape not in {(count, outputs), (count,) if outputs == 1 else (count, outputs)} or y.dtype.kind not in "fiub":
        raise LocalMisuseError(f"--data {path}: expected y as float32 [{count}, {outputs}], got {y.dtype} {y.shape}.")
    y = y.reshape(count, outputs).astype(np.float32)
    if not np.isfinite(y).all():
        raise LocalMisuseError(f"--data {path}: y holds NaN or infinity.")
    if label.kind == "binary" and not np.isin(y, (0, 1)).all():
        raise LocalMisuseError(f"--data {path}: y holds other numbers than 0 and 1.")
    return y
