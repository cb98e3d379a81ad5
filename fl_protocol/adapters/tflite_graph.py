"""The trainable graph on whichever TFLite runtime is installed; both have the same interpreter interface.

Devices train and measure with it, the aggregator judges models by it (`aggregator.adapters.graph_judge`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fl_protocol.adapters import litert, tflite_runtime
from fl_protocol.bundle import ModelBundle
from fl_protocol.errors import BundleError, GraphError
from fl_protocol.model_manifest import DropoutMask

Float32 = NDArray[np.float32]
Labels = NDArray[np.int32] | NDArray[np.float32]

Runtime = Literal["litert", "tflite_runtime"]
_MAKERS: dict[Runtime, Callable[..., Any]] = {
    "litert": litert.make_interpreter,
    "tflite_runtime": tflite_runtime.make_interpreter,
}


class TfliteGraph:
    """The signatures ``train`` and ``evaluate`` of a bundle's graph; what `device_client.ports.Graph` asks for.

    ``train_few`` too, which graphs do not have that were built before there was one.

    Args:
        model: the flatbuffer, from a verified bundle.
        batch_size: B of the bundle's manifest.
        num_parameters: d of the bundle's manifest.
        dropout: the masks that the bundle's manifest asks for.
        runtime: which runtime; by default the first that is installed.
        num_threads: threads of the interpreter.

    Raises:
        GraphError: no runtime is installed, or it cannot work with the installed numpy.
        BundleError: the flatbuffer does not load or lacks a signature.
    """

    def __init__(
        self,
        model: bytes,
        *,
        batch_size: int,
        num_parameters: int,
        dropout: tuple[DropoutMask, ...] = (),
        runtime: Runtime | None = None,
        num_threads: int = 1,
    ) -> None:
        self.batch_size, self.dropout = batch_size, dropout
        self._num_parameters = num_parameters
        self.runtime, interpreter = _interpreter(model, runtime, num_threads)
        try:
            few = ["train_few"] if "train_few" in interpreter.get_signature_list() else []
            trainings = [_Signature(interpreter.get_signature_runner(name)) for name in (*few, "train")]
            self._train = {signature.shapes["mask"][0]: signature for signature in trainings}
            self._evaluate = _Signature(interpreter.get_signature_runner("evaluate"))
        except (ValueError, KeyError) as error:
            raise BundleError(f"the graph has no usable train and evaluate signatures ({error})") from error
        self.train_sizes = tuple(self._train)
        if self.train_sizes[-1] != batch_size:
            raise BundleError(f"the graph trains on {self.train_sizes[-1]} rows, the manifest says {batch_size}")

    @classmethod
    def of_bundle(cls, bundle: ModelBundle, *, runtime: Runtime | None = None, num_threads: int = 1) -> TfliteGraph:
        """The trainable graph of a verified bundle. Raises as the constructor does."""
        manifest = bundle.manifest
        return cls(
            bundle.graph,
            batch_size=manifest.batch_size,
            num_parameters=manifest.num_parameters,
            dropout=manifest.dropout,
            runtime=runtime,
            num_threads=num_threads,
        )

    def train(
        self, params: Float32, x: Float32, y: Labels, mask: Float32, *, clip: float, dropout: Float32 | None = None
    ) -> Float32:
        """Clipped gradient sum, float32 [d], by the signature for so many rows."""
        masks = {} if dropout is None else {"dropout": dropout}
        signature = self._train.get(len(mask), self._train[self.train_sizes[-1]])
        result = signature.run(params=params, x=x, y=y, mask=mask, clip=np.float32(clip), **masks)
        gradient: Float32 = result["grad"]
        if gradient.shape != (self._num_parameters,):
            raise BundleError(
                f"the graph returned {gradient.shape} gradients, the manifest says {self._num_parameters}"
            )
        return gradient

    def evaluate(self, params: Float32, x: Float32, y: Labels, mask: Float32) -> tuple[float, float]:
        """Summed loss and number correct."""
        result = self._evaluate.run(params=params, x=x, y=y, mask=mask)
        return float(result["loss_sum"]), float(result["correct"])


class _Signature:
    """One signature, its errors as ours."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self.shapes = {name: tuple(map(int, told["shape"])) for name, told in runner.get_input_details().items()}

    def run(self, **inputs: Any) -> Any:
        """Run it. Raises GraphError."""
        # Measured: tflite-runtime 2.14 resizes its inputs to whatever comes, and computes with that; LiteRT 2.3 raises.
        wrong = {name: value.shape for name, value in inputs.items() if value.shape != self.shapes.get(name)}
        if wrong:
            raise GraphError(f"the graph takes inputs of shapes {self.shapes}, got {wrong}")
        try:
            return self._runner(**inputs)
        except (RuntimeError, ValueError) as error:
            raise GraphError(f"the TFLite runtime failed: {error}") from error


def _interpreter(model: bytes, runtime: Runtime | None, num_threads: int) -> tuple[Runtime, Any]:
    """An interpreter of the wanted runtime, or of the first installed."""
    for name in [runtime] if runtime is not None else list(_MAKERS):
        try:
            return name, _MAKERS[name](model, num_threads=num_threads)
        except ImportError:
            continue
        except SystemError as error:  # measured: tflite-runtime 2.14 with numpy 2, which it was not built for
            raise GraphError(
                f"{name} cannot work with numpy {np.__version__}: tflite-runtime 2.14 needs numpy below 2; try pip "
                "install 'numpy<2'"
            ) from error
        except (ValueError, RuntimeError) as error:
            raise BundleError(f"the bundle's graph does not load in {name}: {error}") from error
    wanted = runtime or "ai-edge-litert or tflite-runtime"
    raise GraphError(f"no TFLite runtime: expected {wanted} to be installed; try pip install 'covey[device]'")
