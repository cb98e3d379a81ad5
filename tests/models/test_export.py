"""Exports of a trained watch_cnn: they do what the bundle does, or are refused."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec.structs import replace
from numpy.typing import NDArray
from typer.testing import CliRunner

from firmware_sim.watch_data import all_wrists, load_recordings, windows_of
from fl_protocol.bundle import ModelBundle, open_bundle
from fl_protocol.errors import BundleError, CoveyError, LocalMisuseError

pytestmark = pytest.mark.tensorflow
tf = pytest.importorskip("tensorflow")

from models.build import build_bundle  # noqa: E402
from models.check import interpreter  # noqa: E402
from models.cli_export import export  # noqa: E402
from models.errors import ConversionError  # noqa: E402
from models.export.checked import Exported, ExportRequest, export_bundle  # noqa: E402
from models.export.comparison import ExportError, compare, require_same  # noqa: E402
from models.export.convert import convert, float_operators  # noqa: E402
from models.export.data import Examples, read_examples, read_params  # noqa: E402
from models.export.micro import MicroRunner  # noqa: E402
from models.export.run import GraphRunner  # noqa: E402
from models.flatbuffer import operators  # noqa: E402
from models.keras_bundle import keras_model  # noqa: E402
from models.network import Network  # noqa: E402
from models.publisher import write_public_key  # noqa: E402
from models.sources import Description, describe, load_python  # noqa: E402
from models.zoo import watch_cnn, watch_features  # noqa: E402

HELD_OUT = (9, 10)


@dataclass(frozen=True)
class Trained:
    """A bundle, where it lies, and windows of people its parameters have not seen."""

    bundle: ModelBundle
    path: Path
    params: Path
    data: Path
    examples: Examples


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("export")
    recordings = load_recordings(folder / "cache")
    wrists = [(wrist, windows_of(recordings, wrist, samples=128)) for wrist in all_wrists()]
    seen = [windows for wrist, windows in wrists if wrist.person not in HELD_OUT]
    held_out = [windows for wrist, windows in wrists if wrist.person in HELD_OUT]
    spec, key = watch_cnn.make_model(), Ed25519PrivateKey.generate()
    data = build_bundle(spec, publisher_key=key, batch_size=8)
    (folder / "watch_cnn.covey").write_bytes(data)
    write_public_key(key, folder)
    tf.keras.utils.set_random_seed(0)
    spec.model.compile("adam", tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    spec.model.fit(np.concatenate([w.x for w in seen]), np.concatenate([w.y for w in seen]), epochs=12, verbose=0)
    np.save(folder / "params.npy", Network(spec).initial_parameters)
    x, y = np.concatenate([w.x for w in held_out]), np.concatenate([w.y for w in held_out])
    np.savez(folder / "held_out.npz", x=x, y=y)
    return Trained(
        bundle=open_bundle(data, publisher=key.public_key()),
        path=folder / "watch_cnn.covey",
        params=folder / "params.npy",
        data=folder / "held_out.npz",
        examples=Examples(x, y),
    )


def exported(trained: Trained, format: str, **wanted: Any) -> Exported:
    return export_bundle(trained.bundle, ExportRequest(format, params(trained), trained.examples, **wanted))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def float32(trained: Trained) -> Exported:
    return exported(trained, "float32")


def params(trained: Trained) -> NDArray[np.float32]:
    return read_params(trained.params, trained.bundle)


def infer(trained: Trained, x: NDArray[np.float32]) -> NDArray[np.float32]:
    return GraphRunner(trained.bundle.inference_model(params(trained)))(x)


def command(trained: Trained, out: Path, *options: str | Path) -> str:
    """What the command prints; its errors are raised."""
    app = typer.Typer()
    app.command()(export)
    words = [trained.path, "--params", trained.params, "--out", out, *options]
    result = CliRunner().invoke(app, list(map(str, words)))
    if result.exception is not None:
        raise result.exception
    return result.stdout


def test_float32_is_the_same_model_in_conventional_operators(trained: Trained, float32: Exported) -> None:
    made = float32
    assert made.comparison.error < 1e-5
    assert made.comparison.examples == len(trained.examples.x)
    assert made.comparison.before == made.comparison.after > 0.6  # chance is 1/7
    assert (made.comparison.drop, made.comparison.agreement) == (0, 1)
    assert {"CONV_2D", "FULLY_CONNECTED", "MAX_POOL_2D"} <= set(operators(made.graph))
    assert len(operators(made.graph)) < 20


@pytest.mark.parametrize("count", [1, 5])
def test_a_float32_export_takes_any_number_of_windows_on_both_runtimes(
    trained: Trained, float32: Exported, count: int, runtime: str
) -> None:
    x = trained.examples.x[:count]
    phone = interpreter(runtime, float32.graph)
    phone.resize_tensor_input(phone.get_input_details()[0]["index"], x.shape)
    runner = phone.get_signature_runner()
    np.testing.assert_allclose(runner(x=x)["logits"], infer(trained, x), atol=1e-4, rtol=1e-5)


def test_float16_halves_the_file_and_stays_within_a_hundredth(trained: Trained) -> None:
    made = exported(trained, "float16")
    assert made.comparison.error < 1e-2
    assert abs(made.comparison.drop) < 1
    assert len(made.graph) < 0.7 * made.reference_bytes


@pytest.mark.parametrize("wanted", [{}, {"int8_io": True}], ids=["float ends", "int8 ends"])
def test_int8_computes_in_integers_and_costs_less_than_five_points(trained: Trained, wanted: dict[str, bool]) -> None:
    made = exported(trained, "int8", **wanted)
    assert made.comparison.drop < 5
    assert made.comparison.agreement > 0.9
    assert made.calibrated_on + made.comparison.examples == len(trained.examples.x)
    assert float_operators(made.graph) == []
    assert ("QUANTIZE" in operators(made.graph)) == (not wanted)


def test_probabilities_are_those_of_the_logits(trained: Trained) -> None:
    made = exported(trained, "float32", probabilities=True)
    scores = np.exp(infer(trained, trained.examples.x).astype(np.float64))
    outputs = GraphRunner(made.graph)(trained.examples.x)
    np.testing.assert_allclose(outputs, scores / scores.sum(1, keepdims=True), atol=1e-5)


def test_the_c_array_holds_the_flatbuffer_and_compiles(trained: Trained, tmp_path: Path) -> None:
    shown = command(trained, tmp_path / "exercises.cc", "--format", "tflm", "--data", trained.data)
    assert "Calibrated on" in shown
    source, header = (tmp_path / "exercises.cc").read_text(), (tmp_path / "exercises.h").read_text()
    held = bytes(int(byte, 16) for byte in re.findall(r"0x([0-9a-f]{2}),", source))
    assert held == exported(trained, "tflm").graph
    assert f"watch_cnn_model_len = {len(held)};" in source
    for part in ("ax [g]", "wx [rad/s]", "0 PEN", "resolver.AddConv2D();", "watch_cnn_input_scale;"):
        assert part in header
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    (tmp_path / "use.c").write_text(
        '#include "exercises.h"\n#include <stdint.h>\n#include <stdio.h>\n'
        "int main(void) { unsigned long sum = 0; for (unsigned i = 0; i < watch_cnn_model_len; i++)"
        " sum += watch_cnn_model[i];\n"
        ' printf("%lu %.9g %d %d", sum, watch_cnn_input_scale, watch_cnn_output_zero_point,'
        " (int)((uintptr_t)watch_cnn_model % 16)); return 0; }\n"
    )
    for words in (
        [compiler, "-std=c++11", "-Wall", "-Wextra", "-Werror", "-c", "exercises.cc"],
        ["gcc", "-Wall", "-Werror", "-c", "use.c"],
        [compiler, "-o", "use", "use.o", "exercises.o"],
    ):
        subprocess.run(words, cwd=tmp_path, check=True)
    printed = subprocess.run(["./use"], cwd=tmp_path, check=True, capture_output=True, text=True).stdout.split()
    scale = re.search(r"input_scale = (\S+)f;", source)
    assert scale is not None
    assert (int(printed[0]), printed[3]) == (sum(held), "0")
    assert np.float32(printed[1]) == np.float32(scale[1])


def test_micro_runs_what_is_made_for_it(trained: Trained) -> None:
    if not MicroRunner.is_installed():
        pytest.skip("tflite-micro is not installed")
    for wanted in ({}, {"keep_float": True}):
        made = exported(trained, "tflm", **wanted)
        assert made.runtime == "TensorFlow Lite Micro"
        assert made.comparison.drop < 5
        assert 5_000 < made.arena_bytes < 50_000


def test_a_damaged_export_is_caught(trained: Trained) -> None:
    x, manifest = trained.examples.x, trained.bundle.manifest
    model = keras_model(trained.bundle, params(trained))
    kernel, bias = model.get_layer("conv2").get_weights()
    model.get_layer("conv2").set_weights([np.flip(kernel, -2), bias])
    for precision in ("float32", "int8"):
        graph = convert(model, precision=precision, calibration=x[:50])  # type: ignore[arg-type]
        damaged = compare(manifest, infer(trained, x), GraphRunner(graph)(x), trained.examples.y)
        with pytest.raises(ExportError, match="does not compute what the bundle's infer does"):
            require_same(damaged, precision=precision, what="It")  # type: ignore[arg-type]
    spoilt = compare(manifest, infer(trained, x), np.full_like(infer(trained, x), np.nan), None)
    with pytest.raises(ExportError):
        require_same(spoilt, precision="int8", what="It")


def test_a_keras_model_that_is_not_the_bundles_own_is_caught(trained: Trained) -> None:
    other = replace(trained.bundle, keras_json=trained.bundle.keras_json.replace(b'"relu"', b'"tanh"'))
    with pytest.raises(ExportError, match="The Keras model does not compute"):
        export_bundle(other, ExportRequest("float32"))


def test_a_drop_above_the_limit_keeps_no_file(trained: Trained, tmp_path: Path) -> None:
    # With the float model's own predictions as labels every other prediction is a drop.
    np.savez(tmp_path / "own.npz", x=trained.examples.x, y=infer(trained, trained.examples.x).argmax(1))
    options = ("--format", "int8", "--data", tmp_path / "own.npz")
    with pytest.raises(ExportError, match="--max-drop 0"):
        command(trained, tmp_path / "no.tflite", *options, "--max-drop", "0")
    assert list(tmp_path.glob("*no.tflite*")) == []
    assert "accuracy" in command(trained, tmp_path / "yes.tflite", *options, "--max-drop", "20")
    with pytest.raises(LocalMisuseError, match="exists"):
        command(trained, tmp_path / "yes.tflite", *options)


def test_without_data_it_says_that_accuracy_was_not_measured(trained: Trained, tmp_path: Path) -> None:
    shown = command(trained, tmp_path / "m.tflite", "--format", "float32")
    assert "not measured" in shown
    assert "random windows only" in shown


def test_what_has_no_integer_form_is_refused_by_name(trained: Trained) -> None:
    key = Ed25519PrivateKey.generate()
    features = open_bundle(
        build_bundle(watch_features.make_model(), publisher_key=key, batch_size=8), publisher=key.public_key()
    )
    with pytest.raises(ConversionError, match="SQRT would stay in float32"):
        export_bundle(features, ExportRequest("int8", examples=trained.examples))
    assert export_bundle(features, ExportRequest("tflm", keep_float=True)).comparison.error < 1e-5


def test_a_recurrent_layer_becomes_a_loop_that_is_not_quantised() -> None:
    model = tf.keras.Sequential([tf.keras.Input((8, 2)), tf.keras.layers.GRU(3), tf.keras.layers.Dense(2)])
    with pytest.raises(ConversionError, match="use LSTM instead of GRU"):
        convert(model, precision="int8", calibration=np.zeros((4, 8, 2), np.float32))


@pytest.mark.parametrize(
    ("class_name", "more", "expected", "error"),
    [
        ("Lambda", {}, "program code", BundleError),
        (
            "Mine",
            {"module": "mine", "registered_name": "mine>Mine"},
            r"mine>Mine.*--custom MODULE\.py",
            LocalMisuseError,
        ),
        ("system", {"module": "os"}, "--custom", LocalMisuseError),
        ("function", {"module": "builtins", "config": "eval"}, "--custom", LocalMisuseError),
    ],
)
def test_nothing_but_known_classes_is_looked_up(
    trained: Trained, class_name: str, more: dict[str, str], expected: str, error: type[CoveyError]
) -> None:
    config = json.loads(trained.bundle.keras_json)
    config["config"]["layers"][2]["config"]["kernel_initializer"] = {"class_name": class_name, "config": {}, **more}
    with pytest.raises(error, match=expected):
        keras_model(replace(trained.bundle, keras_json=json.dumps(config).encode()))


def test_a_custom_layer_is_known_once_its_file_was_run(trained: Trained, tmp_path: Path) -> None:
    config = json.loads(trained.bundle.keras_json)
    scale = config["config"]["layers"][1]
    scale.update(module="mine", class_name="MineForTest", registered_name="mine>MineForTest")
    bundle = replace(trained.bundle, keras_json=json.dumps(config).encode())
    with pytest.raises(LocalMisuseError, match="mine>MineForTest"):
        keras_model(bundle)
    (tmp_path / "layers.py").write_text(
        "import tensorflow as tf\nfrom models.zoo.channel_scale import ChannelScale\n"
        "@tf.keras.saving.register_keras_serializable(package='mine')\nclass MineForTest(ChannelScale):\n    pass\n"
    )
    load_python(tmp_path / "layers.py")
    assert type(keras_model(bundle).get_layer("scale")).__name__ == "MineForTest"
    with pytest.raises(LocalMisuseError, match="no such Python file"):
        load_python(tmp_path / "missing.py")


def test_frozen_layers_come_back_with_their_weights() -> None:
    layers = tf.keras.layers
    inputs = tf.keras.Input((12, 2))
    frozen = layers.Conv1D(3, 4, trainable=False, name="frozen")
    outputs = layers.Dense(3)(layers.GlobalMaxPooling1D()(layers.Conv1D(4, 3)(frozen(inputs))))
    model = tf.keras.Model(inputs, outputs, name="partly")
    model.compile(loss=tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    spec = describe(model, Description())
    key = Ed25519PrivateKey.from_private_bytes(bytes(32))
    bundle = open_bundle(build_bundle(spec, publisher_key=key, batch_size=2), publisher=key.public_key())
    assert bundle.frozen.size == 4 * 2 * 3 + 3
    x = np.random.default_rng(0).standard_normal((5, 12, 2)).astype(np.float32)
    np.testing.assert_allclose(keras_model(bundle)(x), model(x), atol=1e-6)
    with pytest.raises(BundleError, match="Layer frozen has 27 weights"):
        keras_model(replace(bundle, frozen=bundle.frozen[:5]))


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        ({"y": np.zeros(3, np.int32)}, "no array x"),
        ({"x": np.zeros((3, 128, 5)), "y": np.zeros(3, int)}, r"\[n, 128, 6\]"),
        ({"x": np.zeros((0, 128, 6)), "y": np.zeros(0, int)}, r"\[n, 128, 6\]"),
        ({"x": np.zeros((3, 128, 6), bool)}, "as float32"),
        ({"x": np.full((3, 128, 6), np.nan), "y": np.zeros(3, int)}, r"x\[0\] holds NaN"),
        ({"x": np.zeros((3, 128, 6)), "y": np.array([0, 1, 7])}, "classes are 0 to 6"),
        ({"x": np.zeros((3, 128, 6)), "y": np.zeros(2, int)}, r"whole numbers \[3\]"),
        ({"x": np.zeros((3, 128, 6)), "y": np.zeros(3)}, "whole numbers"),
        ({"x": np.array([{"a": 1}], object)}, r"expected an \.npz file"),
    ],
)
def test_recordings_that_do_not_fit_are_refused(
    trained: Trained, tmp_path: Path, arrays: dict[str, Any], expected: str
) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(LocalMisuseError, match=expected):
        read_examples(tmp_path / "bad.npz", trained.bundle.manifest)


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut short"])
def test_files_that_are_something_else_are_refused(trained: Trained, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other"
    path.write_bytes(content)
    with pytest.raises(LocalMisuseError, match=r"expected an \.npz file"):
        read_examples(path, trained.bundle.manifest)
    with pytest.raises(LocalMisuseError, match=r"expected a \.npy file"):
        read_params(path, trained.bundle)
    with pytest.raises(LocalMisuseError, match="cannot be read"):
        read_examples(tmp_path / "missing", trained.bundle.manifest)


@pytest.mark.parametrize(
    ("vector", "expected"),
    [
        (np.zeros(8710, np.float32), r"float32 \[8711\], got float32 \[8710\]"),
        (np.zeros(8711), "got float64"),
        (np.full(8711, np.inf, np.float32), "finite"),
        (np.array([None]), r"expected a \.npy file"),
    ],
)
def test_parameters_of_another_length_or_kind_are_refused(
    trained: Trained, tmp_path: Path, vector: NDArray[Any], expected: str
) -> None:
    np.save(tmp_path / "bad.npy", vector)
    with pytest.raises(LocalMisuseError, match=expected):
        read_params(tmp_path / "bad.npy", trained.bundle)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--format", "int8"], "give --data"),
        (["--format", "tflm"], "give --data"),
        (["--format", "float32", "--max-drop", "1"], "--max-drop"),
        (["--format", "float16", "--int8-io"], "--int8-io is for"),
        (["--format", "int8", "--float"], "--float is for"),
        (["--format", "tflm", "--float"], r"expected a \.cc file"),
    ],
)
def test_options_that_cannot_be_met_are_refused_before_tensorflow_is_imported(
    trained: Trained, tmp_path: Path, options: list[str], expected: str
) -> None:
    with pytest.raises(LocalMisuseError, match=expected):
        command(trained, tmp_path / "m.tflite", *options)


def test_an_unknown_format_is_a_usage_error(trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        command(trained, tmp_path / "m.tflite", "--format", "onnx")
    assert stop.value.code == 2
