"""The features equal their definition, training on kept features equals training through the whole graph."""

from __future__ import annotations

import gzip
import shutil
import struct
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

pytestmark = pytest.mark.tensorflow
pytest.importorskip("tensorflow")

from benchmarks.fashion_mnist import read_fashion_mnist, read_idx  # noqa: E402
from benchmarks.oriented_features import (  # noqa: E402
    NUM_FEATURES,
    OrientedFeatures,
    cached_features,
    features_model,
    head_model,
    stage_graph,
)
from benchmarks.published_dp import (  # noqa: E402
    EPSILON,
    LARGEST_SHORTCUT_ERROR,
    SETTINGS,
    Trainable,
    as_text,
    make_parser,
    measure,
    settings_for,
    shortcut_error,
)
from device_client.training import Records  # noqa: E402
from fl_protocol.errors import LocalMisuseError  # noqa: E402
from models import check  # noqa: E402
from models.errors import ModelSpecError  # noqa: E402
from models.flatbuffer import operators  # noqa: E402

BATCH = 4
Doubles = NDArray[np.float64]


class Built(NamedTuple):
    full: Trainable
    head: Trainable
    stage: bytes


@cache
def built() -> Built:
    full = Trainable.of(features_model(), batch_size=BATCH)
    head = Trainable.of(head_model(), batch_size=BATCH)
    return Built(full, head, stage_graph(full.network, batch_size=BATCH))


def images(count: int) -> NDArray[np.float32]:
    """Noise, a black one, a white one, a box and a slope, each 0 to 255."""
    x = np.random.default_rng(count).integers(0, 256, (max(count, 5), 28, 28, 1)).astype(np.float32)
    x[1], x[2], x[3] = 0, 255, 0
    x[3, 8:20, 5:16] = 200
    x[4] = np.add.outer(np.arange(28), 5 * np.arange(28))[:, :, None]
    return x[:count]


def records(count: int) -> Records:
    return Records(images(count), np.random.default_rng(1).integers(0, 10, count).astype(np.int32))


# The definition, in float64 and without TensorFlow.


def correlated(x: Doubles, kernel: NDArray[Any], stride: int) -> NDArray[Any]:
    """One map under one kernel, zeros around it, centred as TensorFlow's SAME is."""
    size, (out, odd) = len(kernel), divmod(len(x), stride)
    before, after = divmod(max((out + odd - 1) * stride + size - len(x), 0), 2)
    padded = np.pad(x, (before, before + after))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size))[::stride, ::stride]
    result: NDArray[Any] = (windows * kernel).sum((2, 3))
    return result


def wavelet(octave: int, orientation: int) -> NDArray[np.complex128]:
    """exp(-(u² + v²/4) / 2s²) · (exp(iku) - c), c such that the sum is 0; its Gaussian integrates to 1."""
    radius, s, k = (4, 0.8, 3 * np.pi / 4) if octave == 0 else (6, 1.6, 3 * np.pi / 8)
    angle = orientation * np.pi / 8
    result = np.zeros((2 * radius + 1, 2 * radius + 1), complex)
    bell = np.zeros_like(result)
    for row in range(-radius, radius + 1):
        for column in range(-radius, radius + 1):
            u = column * np.cos(angle) + row * np.sin(angle)
            v = row * np.cos(angle) - column * np.sin(angle)
            value = np.exp(-(u**2 + v**2 / 4) / (2 * s**2)) / (4 * np.pi * s**2)
            bell[row + radius, column + radius] = value
            result[row + radius, column + radius] = value * np.exp(1j * k * u)
    return np.asarray(result - bell * result.sum() / bell.sum())


def modulus(x: Doubles, octave: int, stride: int = 1) -> list[Doubles]:
    filtered = [correlated(x, wavelet(octave, orientation), stride) for orientation in range(8)]
    return [np.sqrt(each.real**2 + each.imag**2 + 1e-8) for each in filtered]


def smooth(maps: list[Doubles], radius: int, s: float, stride: int) -> Doubles:
    """All maps under one Gaussian of sum 1: [h, w, maps]."""
    at = np.arange(-radius, radius + 1)
    bell = np.exp(-np.add.outer(at**2, at**2) / (2 * s**2))
    return np.stack([correlated(each, bell / bell.sum(), stride) for each in maps], -1)


def features(image: NDArray[np.float32]) -> Doubles:
    """Features [7105] of one image [28, 28, 1]."""
    x = image[:, :, 0].astype(np.float64) / 255
    fine, coarse = modulus(x, 0), modulus(x, 1)
    second = [each for one in fine for each in modulus(one, 1, 2)]
    strength = np.sqrt(smooth([*fine, *coarse], 3, 0.8, 2)).reshape(14, 14, 2, 8)
    edges = (strength - strength.mean(3, keepdims=True)) / np.sqrt(strength.var(3, keepdims=True) + 1e-4)
    maps = np.concatenate([smooth([x, *fine, *coarse], 5, 1.6, 4), smooth(second, 3, 0.8, 2)], 2)
    scattering = (maps - maps.mean((0, 1))) / np.sqrt(maps.var((0, 1)) + 1e-5)
    return np.asarray(np.concatenate([edges.ravel(), scattering.ravel()]) / np.sqrt(7105))


@cache
def expected(count: int) -> Doubles:
    return np.stack([features(image) for image in images(count)])


@pytest.mark.parametrize("runtime", check.installed_runtimes())
def test_the_features_are_those_of_the_numpy_definition(runtime: str) -> None:
    x = images(8)
    runner = check.interpreter(runtime, built().stage).get_signature_runner("features")
    got = np.concatenate([runner(x=x[start : start + BATCH])["features"] for start in range(0, 8, BATCH)])
    want = expected(8)
    assert got.shape == (8, NUM_FEATURES) == (8, 7105)
    assert np.linalg.norm(want, axis=1).max() > 0.5
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())
    assert np.linalg.norm(got, axis=1).max() <= 1


@pytest.mark.parametrize("runtime", check.installed_runtimes())
def test_the_stage_takes_any_number_of_images(runtime: str) -> None:
    x = images(5)
    interpreter = check.interpreter(runtime, built().stage)
    index = interpreter.get_input_details()[0]["index"]
    interpreter.resize_tensor_input(index, x.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(index, x)
    interpreter.invoke()
    got = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    np.testing.assert_allclose(got, expected(5), rtol=0, atol=1e-5)


def test_other_images_are_refused() -> None:
    with pytest.raises(ModelSpecError, match=r"expected \(28, 28, 1\), got \(32, 32, 3\)"):
        OrientedFeatures().build((None, 32, 32, 3))


def test_features_and_layer_train_in_one_graph_of_builtin_operators() -> None:
    full = built().full
    assert not [name for name in operators(full.graph_bytes) if name.startswith("CUSTOM")]
    assert full.network.num_parameters == 10 * (7105 + 1)
    assert not full.network.initial_parameters.any()
    assert "scattering" in full.network.preprocessing


def test_the_graph_clips_what_automatic_differentiation_gives() -> None:
    full = built().full
    errors = check.worst_errors(full.network, full.graph_bytes, batch_size=BATCH)
    assert errors
    assert max(errors.values()) < 1e-4


def test_kept_features_give_the_gradients_of_the_whole_graph(tmp_path: Path) -> None:
    some = records(10)
    kept = cached_features(built().stage, some.x, tmp_path, batch_size=BATCH, on_progress=lambda done: None)
    full, head = built().full.graph, built().head.graph
    assert shortcut_error(full, head, some, kept) < LARGEST_SHORTCUT_ERROR
    # The check is awake: features that are off by a thousandth, of other images, or missing fail it.
    for wrong in (kept * 1.001, kept[::-1], np.zeros_like(kept), np.full_like(kept, np.nan)):
        assert not shortcut_error(full, head, some, wrong) < LARGEST_SHORTCUT_ERROR


def test_features_are_computed_once(tmp_path: Path) -> None:
    x, done = images(6), list[int]()
    for _ in range(2):
        kept = cached_features(built().stage, x, tmp_path, batch_size=BATCH, on_progress=done.append)
        np.testing.assert_allclose(kept[:], expected(6), rtol=0, atol=1e-5)
    assert done == [4, 6]
    (path,) = tmp_path.iterdir()
    path.unlink()
    np.save(path, kept[:3])
    with pytest.raises(LocalMisuseError, match="delete it"):
        cached_features(built().stage, x, tmp_path, batch_size=BATCH, on_progress=done.append)


def test_a_full_disk_is_told_before_anything_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(LocalMisuseError, match=r"has 0\.0 GB free"):
        cached_features(b"", images(1), tmp_path, batch_size=BATCH, on_progress=lambda done: None)


def test_both_models_are_trained_and_reported(tmp_path: Path) -> None:
    arguments = make_parser().parse_args(
        ["--repetitions", "2", "--batch-size", "16", "--steps", "2", "--cache", str(tmp_path)]
    )
    report = measure(arguments, records(32), records(8))
    assert set(report["rows"]) == {"features", "end_to_end"}
    for row in report["rows"].values():
        assert len(row["accuracies"]) == len(row["seconds"]) == 2
        assert (row["settings"]["steps"], row["epochs"]) == (2, 1.0)
        assert 0 < row["epsilon"] <= EPSILON
        assert row["delta"] == 1e-5
    assert report["accuracy"] == report["rows"]["features"]["accuracy"]
    assert report["difference_to_published"] == report["accuracy"] - 0.897
    assert report["published"]["end_to_end_cnn"] == 0.86
    assert report["rows"]["features"]["shortcut"]["max_rel_error"] < LARGEST_SHORTCUT_ERROR
    assert report["rows"]["end_to_end"]["model"]["parameters"] == 26_010
    assert "published 89.7 %" in as_text(report)


def test_training_through_the_whole_graph_keeps_no_features() -> None:
    arguments = make_parser().parse_args(
        ["--full", "--model", "features", "--repetitions", "1", "--batch-size", "16", "--steps", "2", "--validate"]
    )
    report = measure(arguments, records(32), records(8))
    assert list(report["rows"]) == ["features"]
    assert report["rows"]["features"]["settings"]["full"] is True
    assert "shortcut" not in report["rows"]["features"]
    assert report["measured_on"] == "8 held-out training images"


def test_the_settings_are_those_of_the_model_unless_told_otherwise() -> None:
    arguments = make_parser().parse_args([])
    assert (arguments.model, arguments.repetitions, arguments.full) == ("both", 3, False)
    features_plan = settings_for("features", arguments).plan(60_000)
    assert (features_plan.steps, features_plan.expected_batch_size) == (293, 8192)
    assert features_plan.noise_multiplier == 3.6512
    assert 2.999 < features_plan.epsilon(293) <= EPSILON
    changed = settings_for("end_to_end", make_parser().parse_args(["--learning-rate", "2.5"]))
    assert changed.learning_rate == 2.5
    assert changed.batch_size == SETTINGS["end_to_end"].batch_size


def test_no_repetitions_are_refused() -> None:
    with pytest.raises(LocalMisuseError, match="--repetitions: expected at least 1"):
        measure(make_parser().parse_args(["--repetitions", "0"]), records(1), records(1))


# The files.


def idx(data: NDArray[np.uint8]) -> bytes:
    return struct.pack(f">HBB{data.ndim}I", 0, 8, data.ndim, *data.shape) + data.tobytes()


def test_an_idx_file_is_read(tmp_path: Path) -> None:
    data = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    (tmp_path / "some.gz").write_bytes(gzip.compress(idx(data)))
    np.testing.assert_array_equal(read_idx(tmp_path / "some.gz", (2, 3, 4)), data)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a gzip file",
        gzip.compress(b""),
        gzip.compress(idx(np.zeros((2, 3), np.uint8))),
        gzip.compress(idx(np.zeros((2, 3, 4), np.uint8))[:-1]),
        gzip.compress(idx(np.zeros((2, 3, 4), np.uint8)) + b"\0"),
        gzip.compress(idx(np.zeros((2, 3, 4), np.uint8)).replace(b"\x08", b"\x0d")),
        gzip.compress(idx(np.zeros((2, 3, 4), np.uint8)))[:-4],
    ],
    ids=["empty", "text", "nothing", "other axes", "short", "long", "floats", "cut"],
)
def test_rubbish_is_no_idx_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "some.gz").write_bytes(content)
    with pytest.raises(LocalMisuseError, match=r"some\.gz (cannot be read|is not an idx file of 2 x 3 x 4 bytes)"):
        read_idx(tmp_path / "some.gz", (2, 3, 4))


def test_missing_images_are_named_with_their_package(tmp_path: Path) -> None:
    with pytest.raises(LocalMisuseError, match="apt-get install dataset-fashion-mnist"):
        read_fashion_mnist(tmp_path)
