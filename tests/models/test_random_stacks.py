"""Random stacks of layers against automatic differentiation: what no table of models thought of."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.tensorflow
tf = pytest.importorskip("tensorflow")

from layer_models import layers, spec_of  # noqa: E402

from models import check  # noqa: E402
from models.convert import convert_signatures, input_tensors  # noqa: E402
from models.network import Network  # noqa: E402
from models.steps import clipped_step  # noqa: E402

TOLERANCE = 1e-4
BATCH = 3

FUNCTIONS = st.sampled_from(["relu", "tanh", "sigmoid", "gelu", "relu6", "linear"])
PADDINGS = st.sampled_from(["same", "valid"])


@dataclass(frozen=True)
class Step:
    """One layer, named without its number of axes, and whether its input goes around it too."""

    kind: str
    options: dict[str, Any]
    around: bool


def _step(kind: str, **options: Any) -> st.SearchStrategy[Step]:
    drawn = {name: value if isinstance(value, st.SearchStrategy) else st.just(value) for name, value in options.items()}
    return st.builds(Step, st.just(kind), st.fixed_dictionaries(drawn), st.booleans())


_window = {
    "kernel_size": st.integers(1, 3),
    "strides": st.integers(1, 2),
    "padding": PADDINGS,
    "use_bias": st.booleans(),
    "activation": FUNCTIONS,
}
WINDOWS = st.one_of(
    _step("Conv{}D", filters=st.integers(2, 5), **_window),
    _step("SeparableConv{}D", filters=st.integers(2, 5), depth_multiplier=st.integers(1, 2), **_window),
    _step("DepthwiseConv{}D", depth_multiplier=st.integers(1, 2), **_window),
    _step("MaxPooling{}D", pool_size=st.integers(2, 3), strides=st.integers(1, 2), padding=PADDINGS),
    _step("AveragePooling{}D", pool_size=st.integers(2, 3), strides=st.integers(1, 2), padding=PADDINGS),
)
POINTS = st.one_of(
    _step("Dense", units=st.integers(2, 6), activation=FUNCTIONS, use_bias=st.booleans()),
    _step("LayerNormalization", center=st.booleans()),
    _step("GroupNormalization", groups=st.sampled_from([1, -1])),
    _step("Activation", activation=FUNCTIONS),
    _step("Softmax"),
    _step("Dropout", rate=0.25),
    _step("Rescaling", scale=0.5, offset=0.1),
)
STATES = st.one_of(
    _step("GRU", units=st.integers(2, 4), return_sequences=True, use_bias=st.booleans()),
    _step("LSTM", units=st.integers(2, 4), return_sequences=True, use_bias=st.booleans()),
)


def _built(shape: tuple[int, ...], steps: list[Step], ending: str) -> Any:
    """The steps that still fit, then a pooling and a Dense head."""
    value = x = tf.keras.Input(shape)
    rank = len(shape) - 1
    for step in steps:
        before = value
        sizes = [value for name, value in step.options.items() if name in ("kernel_size", "pool_size")]
        if sizes and min(before.shape[1:-1]) < sizes[0]:
            continue
        value = getattr(layers, step.kind.format(rank))(**step.options)(before)
        if step.around and before.shape == value.shape:
            value = layers.Add()([before, value])
        elif step.around and before.shape[:-1] == value.shape[:-1]:
            value = layers.Concatenate()([value, before])
    return tf.keras.Model(x, layers.Dense(3)(getattr(layers, ending.format(rank))()(value)))


@settings(
    max_examples=12,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(
    image=st.booleans(),
    data=st.data(),
    ending=st.sampled_from(["Flatten", "GlobalAveragePooling{}D", "GlobalMaxPooling{}D"]),
)
def test_any_stack_of_layers_matches_autodiff(image: bool, data: st.DataObject, ending: str) -> None:
    shape = data.draw(st.sampled_from([(5, 6, 2), (6, 4, 3)] if image else [(7, 3), (8, 2)]))
    kinds = st.one_of(WINDOWS, POINTS) if image else st.one_of(WINDOWS, POINTS, STATES)
    network = Network(spec_of(_built(shape, data.draw(st.lists(kinds, min_size=3, max_size=6)), ending)))
    note(" → ".join(f"{info.kind}{info.output_shape}" for info in network.layers))
    train = functools.partial(clipped_step, network)
    graph = convert_signatures({"train": (train, input_tensors(network, batch_size=BATCH))})
    some_cases = list(check.cases(network, batch_size=BATCH))
    for runtime in check.RUNTIMES:
        runner = check.interpreter(runtime, graph).get_signature_runner("train")
        assert check.worst_error(runner, some_cases) < TOLERANCE, runtime
