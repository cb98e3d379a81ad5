"""Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747) from Debian's package dataset-fashion-mnist, without pickles."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from device_client.training import Records
from fl_protocol.errors import LocalMisuseError

DATA = Path("/usr/share/datasets/fashion-mnist")


def read_fashion_mnist(folder: Path) -> tuple[Records, Records]:
    """60,000 training and 10,000 test images, float32 [n, 28, 28, 1] from 0 to 255, with their classes.

    Raises:
        LocalMisuseError: a file is missing or not what it should be.
    """
    parts = []
    for prefix, count in (("train", 60_000), ("t10k", 10_000)):
        images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz", (count, 28, 28))
        labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", (count,))
        if labels.max() > 9:
            raise LocalMisuseError(f"{folder}: a label of {prefix} is {labels.max()}, expected 0 to 9.")
        parts.append(Records(images[..., None].astype(np.float32), labels.astype(np.int32)))
    return parts[0], parts[1]


def read_idx(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """The bytes of a gzipped idx file (two zeros, type 8, the number of axes, their lengths, the data).

    Raises:
        LocalMisuseError: it is missing, damaged, or of another shape.
    """
    try:
        data = gzip.decompress(path.read_bytes())
    except FileNotFoundError:
        raise LocalMisuseError(
            f"{path} is missing: install the images with apt-get install dataset-fashion-mnist, or name their folder "
            "with --data."
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise LocalMisuseError(f"{path} cannot be read ({error}).") from error
    header = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape)
    if not data.startswith(header) or len(data) != len(header) + math.prod(shape):
        raise LocalMisuseError(f"{path} is not an idx file of {' x '.join(map(str, shape))} bytes.")
    return np.frombuffer(data, np.uint8, offset=len(header)).reshape(shape)
