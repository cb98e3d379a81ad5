"""What a converted graph holds, and what its other signatures return."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from fl_protocol.bundle import ModelBundle
from fl_protocol.errors import CoveyError

pytestmark = pytest.mark.tensorflow
tf = pytest.importorskip("tensorflow")

from oracle_cases import model_cases, network, signature  # noqa: E402

from models import catalog, check, reference  # noqa: E402
from models.convert import convert_signatures  # noqa: E402
from models.errors import ConversionError  # noqa: E402
from models.flatbuffer import operators, read_model, signatures  # noqa: E402
from models.template import with_constant_params  # noqa: E402


@cache
def constant_buffers(graph: bytes) -> frozenset[int]:
    """Numbers of the buffers that hold data."""
    buffers = read_model(graph).buffers
    return frozenset(i for i, buffer in enumerate(buffers) if buffer.data is not None and len(buffer.data))


def test_only_builtin_operators_are_used(bundle: ModelBundle) -> None:
    for graph in (bundle.graph, bundle.infer_template):
        assert not [name for name in operators(graph) if name.startswith("CUSTOM")]


def test_an_operator_without_a_builtin_is_refused() -> None:
    with pytest.raises(ConversionError, match="BesselI0"):
        convert_signatures({"train": (lambda x: {"y": tf.math.bessel_i0(x)}, {"x": tf.TensorSpec([4], tf.float32)})})


def test_the_signatures_are_those_of_the_design(bundle: ModelBundle) -> None:
    training = ["clip", "mask", "params", "x", "y"], ["grad", "loss", "norms"]
    assert signatures(bundle.graph) == {
        "train": training,
        "train_few": training,
        "infer": (["params", "x"], ["logits"]),
        "evaluate": (["mask", "params", "x", "y"], ["correct", "loss_sum"]),
    }
    assert signatures(bundle.infer_template) == {"infer": (["x"], ["logits"])}


def test_no_machine_path_is_in_a_graph(bundle: ModelBundle) -> None:
    for graph in (bundle.graph, bundle.infer_template):
        assert not any(word in graph for word in (b"/tmp", b"/home", b"/work", b"site-packages"))


def test_infer_and_evaluate_match_tensorflow(bundle: ModelBundle, model: str, runtime: str) -> None:
    case = model_cases(model, 32)["partial, all clipped"]
    params, x, y, mask = (case.inputs[name] for name in ("params", "x", "y", "mask"))
    want = reference.Reference(network(model)).output(params, x)
    got = signature(bundle.graph, runtime, "infer")(params=params, x=x)["logits"]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
    scores = signature(bundle.graph, runtime, "evaluate")(params=params, x=x, y=y, mask=mask)
    # The windows themselves: augmentation is for training.
    losses = reference.Reference(network(model)).losses(params, x, y)
    np.testing.assert_allclose(scores["loss_sum"], (losses * mask).sum(), rtol=1e-5)
    label = bundle.manifest.label
    if label.kind == "class":
        right = want.argmax(1) == y
    else:
        target = x if label.kind == "input" else y
        right = np.abs(want - target).reshape(len(x), -1).max(1) <= label.tolerance
    assert scores["correct"] == (right * mask).sum()


def test_evaluate_skips_padding_of_nan(bundle: ModelBundle, model: str, runtime: str) -> None:
    clean, spoilt = (model_cases(model, 32)[f"{padding}, all clipped"].inputs for padding in ("partial", "NaN padding"))
    runner = signature(bundle.graph, runtime, "evaluate")
    want, got = (runner(**{n: case[n] for n in ("params", "x", "y", "mask")}) for case in (clean, spoilt))
    assert want == got


def test_the_template_infers_like_the_graph(bundle: ModelBundle, model: str, runtime: str) -> None:
    case = model_cases(model, 32)["full, all clipped"]
    params, x = case.inputs["params"], case.inputs["x"]
    want = signature(bundle.graph, runtime, "infer")(params=params, x=x)["logits"]
    got = signature(bundle.inference_model(params), runtime, "infer")(x=x)["logits"]
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("count", [1, 5, 40])
def test_inference_takes_any_number_of_windows(bundle: ModelBundle, model: str, runtime: str, count: int) -> None:
    case = model_cases(model, 32)["full, all clipped"]
    params, x = case.inputs["params"], case.inputs["x"]
    want = signature(bundle.graph, runtime, "infer")(params=params, x=x)["logits"]
    # Its own interpreter: a call with another shape resizes the graph.
    resized = check.interpreter(runtime, bundle.inference_model(params)).get_signature_runner("infer")
    got = resized(x=np.concatenate([x, x])[:count])["logits"]
    np.testing.assert_allclose(got, np.concatenate([want, want])[:count], rtol=0, atol=1e-5 * np.abs(want).max())


def test_a_training_batch_of_another_size_fails_loudly(bundle: ModelBundle, model: str, runtime: str) -> None:
    inputs = dict(model_cases(model, 32)["full, all clipped"].inputs)
    short = {name: inputs[name][:5] for name in ("x", "y", "mask")}
    runner = check.interpreter(runtime, bundle.graph).get_signature_runner("train")
    with pytest.raises(RuntimeError, match="failed to prepare"):
        runner(**inputs | short)


def test_no_constant_has_the_size_of_a_batch(bundle: ModelBundle) -> None:
    # Zeros or ones of batch size would slip in unseen but for their size; index tables are int32.
    floats = [
        4 * int(np.prod(tensor.shape))
        for subgraph in read_model(bundle.graph).subgraphs
        for tensor in subgraph.tensors
        if tensor.type == 0 and tensor.buffer in constant_buffers(bundle.graph)
    ]
    # The largest that belongs there: group normalisation's matrix of 32 by 32 channels.
    assert max(floats, default=0) <= 4 * 32 * 32
    assert len(bundle.infer_template) < 100_000 + 4 * bundle.manifest.num_parameters


def test_the_template_keeps_its_buffers_aligned(bundle: ModelBundle) -> None:
    start, size = bundle.manifest.infer_params_offset, 4 * bundle.manifest.num_parameters
    assert start % 16 == 0
    assert bundle.infer_template[start : start + size] == bundle.params.tobytes()
    constants = [b.data for b in read_model(bundle.infer_template).buffers if b.data is not None and len(b.data)]
    assert all(
        (c.__array_interface__["data"][0] - constants[0].__array_interface__["data"][0]) % 16 == 0 for c in constants
    )


def test_a_graph_without_params_makes_no_template(bundle: ModelBundle) -> None:
    with pytest.raises(ConversionError, match="params"):
        with_constant_params(bundle.infer_template, bundle.params)
    with pytest.raises(ConversionError, match="one signature"):
        with_constant_params(bundle.graph, bundle.params)


def test_a_model_that_is_not_in_the_catalogue_is_named() -> None:
    with pytest.raises(CoveyError, match="no model 'watch_rnn'"):
        catalog.load("watch_rnn")
