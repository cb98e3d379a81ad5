"""Every registered layer against Keras and automatic differentiation, on both runtimes; and that the check can tell."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytestmark = pytest.mark.tensorflow
tf = pytest.importorskip("tensorflow")

import layer_models  # noqa: E402
from layer_models import MODELS, branches, spec_of, stack  # noqa: E402

from models import check, steps  # noqa: E402
from models.convert import convert_infer, convert_network, convert_signatures, input_tensors  # noqa: E402
from models.errors import ModelSpecError  # noqa: E402
from models.flatbuffer import operators  # noqa: E402
from models.layers import registry  # noqa: E402
from models.layers.activations import ActivationLayer  # noqa: E402
from models.layers.dense import DenseLayer  # noqa: E402
from models.layers.gradients import ParameterGradient, row_product  # noqa: E402
from models.layers.layer import Backward  # noqa: E402
from models.network import Network  # noqa: E402
from models.reference import Reference  # noqa: E402
from models.template import with_constant_params  # noqa: E402

BATCH = 5
TOLERANCE = 1e-5


@dataclass(frozen=True, eq=False)
class Converted:
    """A model, its graph and what the graph has to return, each made once for all tests."""

    network: Network
    graph: bytes
    cases: list[check.Case]

    @functools.cached_property
    def reference(self) -> Reference:
        return Reference(self.network)

    @functools.cache  # noqa: B019  # they all live as long as the tests
    def interpreter(self, runtime: str) -> Any:
        return check.interpreter(runtime, self.graph)

    def run(self, runtime: str, signature: str, **inputs: Any) -> dict[str, NDArray[Any]]:
        outputs: dict[str, NDArray[Any]] = self.interpreter(runtime).get_signature_runner(signature)(**inputs)
        return outputs


@functools.cache
def bound(name: str) -> Network:
    return Network(MODELS[name]())


@functools.cache
def converted(name: str) -> Converted:
    graph = convert_network(bound(name), batch_size=BATCH)
    return Converted(bound(name), graph, list(check.cases(bound(name), batch_size=BATCH)))


def test_every_registered_layer_is_in_a_model() -> None:
    tested = {type(layer) for name in MODELS for layer in bound(name).spec.model.layers}
    # The stages of the zoo are held to the oracle with its models; other tests may have registered layers of users.
    own = {kind for kind in registry.registered_classes() if kind.__module__.startswith("keras.")}
    assert own <= tested


@pytest.mark.parametrize("name", MODELS)
def test_clipped_sums_match_autodiff(name: str, runtime: str) -> None:
    model = converted(name)
    runner = model.interpreter(runtime).get_signature_runner("train")
    assert check.worst_error(runner, model.cases) < TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_only_builtin_operators_are_used(name: str) -> None:
    assert not [operator for operator in operators(converted(name).graph) if operator.startswith("CUSTOM")]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("count", [BATCH, 3])
def test_predictions_match_keras_at_any_batch_size(name: str, count: int, runtime: str) -> None:
    model = converted(name)
    batch = check.random_batch(model.network, batch_size=count, seed=7)
    got = model.run(runtime, "infer", params=batch["params"], x=batch["x"])["logits"]
    want = model.reference.output(batch["params"], batch["x"])
    if model.network.spec.loss.name == "softmax_cross_entropy":
        # A softmax that Keras applied can be undone but for a constant.
        got, want = (scores - scores.mean(1, keepdims=True) for scores in (got, want))
    assert check.relative_error(got, want) < TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_evaluation_matches_keras(name: str, runtime: str) -> None:
    model = converted(name)
    batch = check.random_batch(model.network, batch_size=BATCH, seed=8)
    mask = np.array([1, 0, 1, 1, 1], np.float32)
    inputs = {"params": batch["params"], "x": batch["x"], "y": batch["y"], "mask": mask}
    got = model.run(runtime, "evaluate", **inputs)
    losses = model.reference.losses(batch["params"], batch["x"], batch["y"])
    np.testing.assert_allclose(got["loss_sum"], (mask * losses).sum(), rtol=TOLERANCE)
    assert got["correct"] == (mask * correct(model, batch)).sum()


def correct(model: Converted, batch: dict[str, Any]) -> NDArray[np.bool_]:
    """Which predictions of the Keras model are right, said once more in numpy."""
    label = model.network.spec.label
    scores = model.reference.output(batch["params"], batch["x"]).reshape(BATCH, -1)
    if label.kind == "class":
        right = scores.argmax(1) == batch["y"]
    elif label.kind == "binary":
        right = ((scores > 0) == (batch["y"] > 0.5)).all(1)
    else:
        run = model.network.forward(model.network.split(batch["params"]), tf.constant(batch["x"]))
        target = run.window.numpy().reshape(BATCH, -1) if label.kind == "input" else batch["y"]
        right = (np.abs(scores - target) <= label.tolerance).all(1)
    return np.asarray(right)


@pytest.mark.parametrize("name", ["convolutions_2d", "gru", "embedding_of_few", "normalisation_1d"])
def test_the_inference_file_takes_any_batch(name: str, runtime: str) -> None:
    network = converted(name).network
    batch = check.random_batch(network, batch_size=2, seed=9)
    graph = with_constant_params(convert_infer(network, batch_size=1), batch["params"]).graph
    got = check.interpreter(runtime, graph).get_signature_runner("infer")(x=batch["x"])["logits"]
    assert check.relative_error(got, converted(name).reference.output(batch["params"], batch["x"])) < TOLERANCE


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -1.0, 60.0, 1e9, -3e38, 2.0**31])
def test_no_id_reads_outside_of_the_embedding(bad: float, runtime: str) -> None:
    model = converted("embedding_of_many")
    case = model.cases[0]
    table = case.inputs["params"][:300].reshape(60, 5)
    x = np.full_like(case.inputs["x"], bad)
    got = model.run(runtime, "infer", params=case.inputs["params"], x=x)["logits"]
    # It reads the first or the last row; which one NaN reads depends on the processor.
    allowed = [model.reference.output(case.inputs["params"], np.full_like(x, row)) for row in (0, len(table) - 1)]
    assert any(np.allclose(got, want, rtol=1e-5, atol=1e-6) for want in allowed)
    out = model.run(runtime, "train", **case.inputs | {"x": x})
    assert np.isfinite(out["grad"]).all()


def test_the_form_of_an_embeddings_norm_follows_its_size() -> None:
    methods = {
        name: converted(name).network.layers[0].norm_methods for name in ("embedding_of_many", "embedding_of_few")
    }
    assert methods == {
        "embedding_of_many": {"embeddings": "by row"},
        "embedding_of_few": {"embeddings": "materialised"},
    }


class _NormForgetsTheBias(DenseLayer):
    def backward(self, weights: Sequence[Any], saved: Any, output_gradient: Any) -> Backward:
        back, (form,) = super().backward(weights, saved, output_gradient)
        kernel = row_product(saved, self._rows(output_gradient), copies=1, roles=("kernel",))
        return back, (_Changed(form, norms=kernel.squared_norms),)


class _SumForgetsTheBias(DenseLayer):
    def backward(self, weights: Sequence[Any], saved: Any, output_gradient: Any) -> Backward:
        back, (form,) = super().backward(weights, saved, output_gradient)
        return back, (_Changed(form, sums=lambda kernel, bias: (kernel, bias * 0.0)),)


class _NormOverTheBatch(DenseLayer):
    def backward(self, weights: Sequence[Any], saved: Any, output_gradient: Any) -> Backward:
        back, (form,) = super().backward(weights, saved, output_gradient)
        return back, (_Changed(form, norms=lambda: 0.0 * form.squared_norms() + tf.reduce_mean(form.squared_norms())),)


class _InputGradientDoubled(DenseLayer):
    def backward(self, weights: Sequence[Any], saved: Any, output_gradient: Any) -> Backward:
        (dx,), forms = super().backward(weights, saved, output_gradient)
        return (2.0 * dx,), forms


class _Changed:
    """A gradient form, one of whose answers is replaced."""

    def __init__(self, form: ParameterGradient, *, norms: Any = None, sums: Any = None) -> None:
        self.roles, self._form = form.roles, form
        self.squared_norms = norms or form.squared_norms
        self._sums = sums or (lambda *parts: parts)

    def weighted_sum(self, factors: Any, counted: Any) -> Any:
        return self._sums(*self._form.weighted_sum(factors, counted))

    def sum(self) -> Any:
        return self._form.sum()


class _NoSlope(ActivationLayer):
    def __init__(self, layer: Any, context: Any) -> None:
        super().__init__("relu", context)

    def backward(self, weights: Sequence[Any], saved: Any, output_gradient: Any) -> Backward:
        return (output_gradient,), ()


@pytest.mark.parametrize(
    ("keras_class", "broken"),
    [
        (layer_models.layers.Dense, _NormForgetsTheBias),
        (layer_models.layers.Dense, _SumForgetsTheBias),
        (layer_models.layers.Dense, _NormOverTheBatch),
        (layer_models.layers.Dense, _InputGradientDoubled),
        (layer_models.layers.ReLU, _NoSlope),
    ],
)
def test_a_broken_layer_fails_the_same_check(
    monkeypatch: pytest.MonkeyPatch, keras_class: Any, broken: Callable[..., Any]
) -> None:
    monkeypatch.setitem(registry._REGISTRY, keras_class, registry.Entry(broken, output_activation=False))
    layers = layer_models.layers
    network = Network(spec_of(stack((6,), layers.Dense(4), layers.ReLU(), layers.Dense(3))))
    tensors = input_tensors(network, batch_size=BATCH)
    graph = convert_signatures({"train": (functools.partial(steps.clipped_step, network), tensors)})
    runner = check.interpreter("litert", graph).get_signature_runner("train")
    assert check.worst_error(runner, check.cases(network, batch_size=BATCH)) > 1000 * TOLERANCE


def test_a_layer_of_ones_own_can_be_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    class Doubled(tf.keras.layers.Layer):  # type: ignore[misc]
        def call(self, x: Any) -> Any:
            return 2.0 * x

    make = functools.partial(branches, (4,), [Doubled(name="twice")], flat=False)
    with pytest.raises(ModelSpecError, match=r"twice.*register_layer"):
        Network(spec_of(make()))
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    registry.register_layer(Doubled)(lambda layer, context: ActivationLayer("relu", context))
    assert "twice" in [info.name for info in Network(spec_of(make())).layers]
