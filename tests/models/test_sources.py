"""Models from a user's file or a saved Keras model, and what is said when they cannot be trained on a device."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from bundle_files import EXAMPLES

from fl_protocol.errors import BundleError, LocalMisuseError
from fl_protocol.model_manifest import ClipGroup, LossSpec
from models.errors import ConversionError, ModelSpecError
from models.sources import Description, describe, load_spec

pytestmark = pytest.mark.tensorflow
tf = pytest.importorskip("tensorflow")

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # noqa: E402

from fl_protocol.bundle import open_bundle  # noqa: E402
from models.build import build_bundle  # noqa: E402
from models.layers.registry import entry_for  # noqa: E402
from models.network import Network  # noqa: E402

NOTHING = Description()
KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))


def write(folder: Path, body: str) -> str:
    path = folder / "my_model.py"
    path.write_text(f"import tensorflow as tf\nlayers = tf.keras.layers\ndef make_model():\n{body}\n")
    return f"{path}:make_model"


def dense_model(loss: Any = "sparse_categorical_crossentropy", activation: str | None = "softmax") -> Any:
    model = tf.keras.Sequential([tf.keras.Input((4,)), tf.keras.layers.Dense(3, activation=activation, name="d")])
    model.compile(loss=loss)
    return model


def saved(folder: Path, model: Any, name: str = "m.keras") -> str:
    model.save(folder / name)
    return str(folder / name)


def test_the_example_is_described_by_itself_and_the_command_line() -> None:
    said = Description(labels=tuple("abcdefg"), units=("g",) * 6, sampling_rate_hz=50.0, personal_layers=("exercise",))
    spec = load_spec(f"{EXAMPLES}/activity_model.py:make_model", said)
    assert (spec.name, spec.loss.name) == ("activity", "softmax_cross_entropy")
    assert (spec.label.kind, spec.label.names) == ("class", tuple("abcdefg"))
    assert (spec.input.shape, spec.input.units, spec.input.sampling_rate_hz) == ((128, 6), ("g",) * 6, 50.0)
    network = Network(spec)
    # The head stays on the device: it lies behind everything that is shared.
    assert network.num_parameters - network.num_shared_parameters == 16 * 7 + 7
    assert [p.name for p in network.parameters[-2:]] == ["exercise/kernel", "exercise/bias"]


def test_a_layer_of_ones_own_is_built_and_checked() -> None:
    spec = load_spec(f"{EXAMPLES}/own_layer.py:make_model", NOTHING)
    bundle = open_bundle(build_bundle(spec, publisher_key=KEY, batch_size=4), publisher=KEY.public_key())
    assert bundle.manifest.layers[0].kind == "ChannelGain"
    assert bundle.manifest.layers[0].norm_methods == {"gain": "materialised"}


def with_halved_norms(found: Any) -> Any:
    """The same gradients, with norms that are too small: each example would count more than the clip allows."""

    class HalfNorms:
        def __init__(self, form: Any) -> None:
            self.roles, self.weighted_sum, self.sum = form.roles, form.weighted_sum, form.sum
            self._form = form

        def squared_norms(self) -> Any:
            return 0.25 * self._form.squared_norms()

    inputs, forms = found
    return inputs, tuple(HalfNorms(form) for form in forms)


def test_a_layer_whose_norms_are_wrong_is_not_signed(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = load_spec(f"{EXAMPLES}/own_layer.py:make_model", NOTHING)
    layer: Any = entry_for(spec.model.get_layer("gain")).factory
    right = layer.backward
    monkeypatch.setattr(layer, "backward", lambda *given: with_halved_norms(right(*given)))
    with pytest.raises(ConversionError, match="differ from automatic differentiation"):
        build_bundle(spec, publisher_key=KEY, batch_size=4)


def test_a_saved_model_keeps_weights_and_loss(tmp_path: Path) -> None:
    model = dense_model()
    spec = load_spec(saved(tmp_path, model), NOTHING)
    assert spec.loss.name == "softmax_cross_entropy"
    assert (Network(spec).initial_parameters[:12] == model.get_weights()[0].ravel()).all()


def test_losses_are_recognised_with_their_settings(tmp_path: Path) -> None:
    losses = tf.keras.losses
    for given, want in (
        (losses.Huber(0.3), LossSpec("huber", 0.3)),
        ("mse", LossSpec("mean_squared_error")),
        (losses.MeanSquaredError(), LossSpec("mean_squared_error")),
        (losses.BinaryCrossentropy(from_logits=True), LossSpec("binary_cross_entropy")),
        (losses.CategoricalCrossentropy(from_logits=True), LossSpec("softmax_cross_entropy")),
    ):
        assert load_spec(saved(tmp_path, dense_model(given, activation=None)), NOTHING).loss == want
    assert load_spec(saved(tmp_path, dense_model("mse", None)), Description(loss="huber:0.7")).loss.delta == 0.7


def refused(source: str, match: str, said: Description = NOTHING) -> None:
    with pytest.raises((ModelSpecError, LocalMisuseError), match=match) as caught:
        Network(load_spec(source, said))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("loss", "activation", "match"),
    [
        ("sparse_categorical_crossentropy", None, "Layer d: the loss expects probabilities.*from_logits=True"),
        ("binary_crossentropy", "softmax", "Layer d: .*does not end in sigmoid"),
        ("mae", None, "the loss mae is not supported; use one of binary_crossentropy"),
        ("poisson", None, "the loss poisson is not supported"),
        (None, None, "not compiled with one loss"),
    ],
)
def test_a_wrong_loss_is_named(tmp_path: Path, loss: str | None, activation: str | None, match: str) -> None:
    refused(saved(tmp_path, dense_model(loss, activation)), match)


def test_a_loss_that_would_apply_softmax_twice_is_refused(tmp_path: Path) -> None:
    loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    refused(saved(tmp_path, dense_model(loss)), "apply softmax twice")


def test_label_smoothing_is_refused(tmp_path: Path) -> None:
    loss = tf.keras.losses.CategoricalCrossentropy(label_smoothing=0.1)
    refused(saved(tmp_path, dense_model(loss)), "label_smoothing")


@pytest.mark.parametrize(
    ("body", "match"),
    [
        ("    return None", "returned None"),
        ("    return 1/0", r"my_model.py: ZeroDivisionError in line 4"),
        ("    return tf.keras.Sequential([layers.Dense(2)])", "begin it with keras.Input"),
        ("    return 'model'", "expected a tf.keras Sequential or functional model"),
    ],
)
def test_a_function_that_gives_no_model_is_named(tmp_path: Path, body: str, match: str) -> None:
    refused(write(tmp_path, body), match, Description(loss="mean_squared_error"))


def test_sources_that_are_not_there_are_named(tmp_path: Path) -> None:
    refused("no_such_model", "expected a model of the catalogue .watch_cnn.*FILE.py:FUNCTION")
    refused(f"{tmp_path}/absent.py:make_model", "there is no such Python file")
    refused(write(tmp_path, "    pass").replace("make_model", "other"), r"there is no function other\(\)")
    (tmp_path / "rubbish.keras").write_bytes(b"rubbish")
    refused(f"{tmp_path}/rubbish.keras", "expected a model saved with")


@pytest.mark.parametrize("name", ["m.keras", "m.h5", "folder"])
def test_a_python_function_hidden_in_a_saved_model_is_not_run(tmp_path: Path, name: str) -> None:
    marker = tmp_path / "was_run"
    # The path as a literal: what a lambda closes over cannot be saved.
    function = eval(f"lambda x: (open({str(marker)!r}, 'w').close(), x)[1]")  # noqa: S307
    run = tf.keras.layers.Lambda(function)
    model = tf.keras.Sequential([tf.keras.Input((4,)), run, tf.keras.layers.Dense(2)])
    model.compile(loss="mse")
    source = saved(tmp_path, model, name)
    marker.unlink()
    with pytest.raises((BundleError, LocalMisuseError), match="program code"):
        load_spec(source, NOTHING)
    assert not marker.exists()


def test_a_saved_model_that_names_a_foreign_module_is_refused_unimported(tmp_path: Path) -> None:
    source = saved(tmp_path, dense_model())
    with zipfile.ZipFile(source) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    config = json.loads(members["config.json"])
    config["config"]["layers"][1].update(module="antigravity", class_name="Fly", registered_name=None)
    members["config.json"] = json.dumps(config).encode()
    with zipfile.ZipFile(source, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    refused(source, "Fly, which is not known here")
    assert "antigravity" not in sys.modules


def test_an_activation_that_only_has_the_name_of_one_is_refused() -> None:
    def relu(x: Any) -> Any:
        return tf.nn.leaky_relu(x)

    with pytest.raises(ModelSpecError, match=r"Layer d: the activation relu .not of Keras. is not supported"):
        Network(describe(small(tf.keras.layers.Dense(2, activation=relu, name="d")), NOTHING))
    Network(describe(small(tf.keras.layers.Dense(2, activation=tf.nn.relu)), NOTHING))


def small(*layers: Any, **compiled: Any) -> Any:
    model = tf.keras.Sequential([tf.keras.Input((4,)), *layers], name="small")
    model.compile(**({"loss": "mse"} | compiled))
    return model


def test_what_no_layer_may_be_is_named() -> None:
    layers = tf.keras.layers
    shared = layers.Dropout(0.5, name="drop")
    for model, match in (
        (small(layers.Dense(2, name="a/b")), "Layer a/b: a name takes letters"),
        (small(layers.Dense(2, dtype="float16", name="d")), "Layer d: it computes in float16"),
        (small(layers.Dropout(1.0, name="all"), layers.Dense(2)), "Layer all: Dropout at rate 1"),
        (small(shared, layers.Dense(4), shared, layers.Dense(2)), "Layer drop: it is used more than once"),
        (small(layers.Reshape((2, 2)), layers.Dense(3)), r"its output is \(2, 3\), expected one row"),
        (small(layers.Dense(6_000), layers.Dense(6_000), layers.Dense(2)), "parameters are more than a bundle holds"),
    ):
        with pytest.raises(ModelSpecError, match=match):
            Network(describe(model, NOTHING))


def test_a_loss_of_ones_own_is_not_taken_for_keras() -> None:
    def mse(wanted: Any, got: Any) -> Any:
        return tf.abs(wanted - got)

    layer = tf.keras.layers.Dense(3)
    named = tf.keras.losses.MeanSquaredError(name="huber")
    assert describe(small(layer, loss=named), NOTHING).loss.name == "mean_squared_error"
    ignoring = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=0)
    for loss, match in ((mse, "the loss mse .not of Keras. is not supported"), (ignoring, "ignore_class")):
        with pytest.raises(ModelSpecError, match=match):
            describe(small(layer, loss=loss), NOTHING)


@pytest.mark.parametrize(
    ("said", "match"),
    [
        (Description(label_units=("a", "b")), "has names .'value 0',. and units"),
        (Description(learning_rate=float("inf")), "No device could open this bundle"),
        (Description(learning_rate=-1.0), "expected numbers above 0"),
        (Description(sampling_rate_hz=float("nan")), "No device could open this bundle"),
        (Description(tolerance=-1.0), "its tolerance -1"),
    ],
)
def test_what_no_device_could_open_is_not_signed(said: Description, match: str) -> None:
    spec = describe(small(tf.keras.layers.Dense(1)), said)
    with pytest.raises(LocalMisuseError, match=match):
        build_bundle(spec, publisher_key=KEY, batch_size=2)


def test_whole_numbers_as_input_are_built() -> None:
    inputs = tf.keras.Input((6,), dtype="uint8")
    model = tf.keras.Model(inputs, tf.keras.layers.Dense(2)(tf.keras.layers.Rescaling(1 / 255)(inputs)))
    model.compile(loss="mse")
    build_bundle(describe(model, NOTHING), publisher_key=KEY, batch_size=2)


def test_options_that_do_not_fit_are_named(tmp_path: Path) -> None:
    model = saved(tmp_path, dense_model())
    refused(model, "is to be a file's", Description(name="a/b"))
    refused(model, "--loss median: expected one of", Description(loss="median"))
    refused(model, "--loss huber:x", Description(loss="huber:x"))
    refused(model, "for the labels a, b", Description(labels=("a", "b")))
    refused(model, "no trained layer 'x' to be personal", Description(personal_layers=("x",)))
    refused(model, "every layer is personal", Description(personal_layers=("d",)))
    refused(model, "norm_clips name the layers", Description(norm_clips=(ClipGroup(("x",), 1.0),)))
    refused(model, "add up to 0.25", Description(norm_clips=(ClipGroup(("d",), 0.5),)))
    refused(model, "expected 4 channel names", Description(channels=("a", "b")))
    refused(model, "does not fit a label of kind input", Description(label_kind="input"))
