"""The inference-only file: `infer` with its parameters as one constant at a known place.

The converter would fold constants it knows (transposing, merging, splitting them), so the function is converted with
the parameters as an input, and the finished flatbuffer is then edited: the input becomes a constant tensor. A host
without TensorFlow makes a deployable model by overwriting those bytes (`fl_protocol.bundle.ModelBundle`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flatbuffers  # type: ignore[import-untyped]
import numpy as np
from numpy.typing import NDArray
from tensorflow.lite.python import schema_py_generated as schema

from models.errors import ConversionError
from models.flatbuffer import read_model, text

_FILE_IDENTIFIER = b"TFL3"
_BUFFER_ALIGNMENT = 16
"""The schema's ``force_align`` of buffer data; runtimes map tensors in place and may load them with SIMD."""


@dataclass(frozen=True)
class InferTemplate:
    """A flatbuffer and where its parameters lie.

    Args:
        graph: the ``.tflite`` file.
        params_offset: byte offset of d little-endian float32 within it, a multiple of 16.
    """

    graph: bytes
    params_offset: int


def with_constant_params(graph: bytes, params: NDArray[np.float32]) -> InferTemplate:
    """Turn the input ``params`` of a single-signature graph into a constant that holds `params` [d].

    Raises:
        ConversionError: the graph is not of that kind, or the constant did not land where a runtime needs it.
    """
    model = read_model(graph)
    if len(model.subgraphs) != 1 or len(model.signatureDefs) != 1:
        raise ConversionError("The inference template needs one subgraph and one signature.")
    subgraph, signature = model.subgraphs[0], model.signatureDefs[0]
    mapped = [entry for entry in signature.inputs if text(entry.name) == "params"]
    if len(mapped) != 1:
        raise ConversionError("The inference graph has no input named params.")
    index = mapped[0].tensorIndex
    signature.inputs = [entry for entry in signature.inputs if entry is not mapped[0]]
    subgraph.inputs = [i for i in subgraph.inputs if i != index]
    data = params.astype("<f4").tobytes()
    tensor = subgraph.tensors[index]
    if list(tensor.shape) != [params.size] or tensor.type != schema.TensorType.FLOAT32:
        raise ConversionError(f"The input params is {list(tensor.shape)}, expected float32 [{params.size}].")
    tensor.buffer = len(model.buffers)
    buffer = schema.BufferT()
    buffer.data = np.frombuffer(data, np.uint8)
    model.buffers.append(buffer)
    return _located(pack_model(model), tensor.buffer, data)


def pack_model(model: Any) -> bytes:
    """Serialise the object form."""
    builder = _AligningBuilder(1 << 16)
    builder.Finish(model.Pack(builder), _FILE_IDENTIFIER)
    return bytes(builder.Output())


def _located(graph: bytes, buffer_index: int, data: bytes) -> InferTemplate:
    """The template, once the constant is found in the packed bytes and every buffer is aligned."""
    packed = schema.Model.GetRootAs(bytearray(graph), 0)
    for i in range(packed.BuffersLength()):
        if packed.Buffers(i).DataLength() and _data_offset(packed.Buffers(i)) % _BUFFER_ALIGNMENT:
            raise ConversionError(f"Buffer {i} of the inference template is not aligned to {_BUFFER_ALIGNMENT} bytes.")
    offset = _data_offset(packed.Buffers(buffer_index))
    if graph[offset : offset + len(data)] != data:
        raise ConversionError("The parameters are not where the inference template says they are.")
    return InferTemplate(graph=graph, params_offset=offset)


def _data_offset(buffer: Any) -> int:
    """Where a buffer's data starts, counted from the start of the file."""
    table = buffer._tab
    data_field = 4  # The first field of a flatbuffers table.
    return int(table.Vector(table.Offset(data_field)))


class _AligningBuilder(flatbuffers.Builder):  # type: ignore[misc]  # flatbuffers publishes no types
    """Honours ``force_align: 16`` of buffer data, which the generated Python packer ignores.

    Every byte vector is aligned so: besides buffers these are only a few short ones.
    """

    def CreateNumpyVector(self, x: NDArray[Any]) -> int:  # noqa: N802  # flatbuffers' name
        """Write `x`, its first element on a 16-byte boundary counted from the end of the file."""
        self.Prep(_BUFFER_ALIGNMENT, x.nbytes)
        return int(super().CreateNumpyVector(x))
