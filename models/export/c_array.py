"""A flatbuffer as C source, for firmware without a file system: one header, one source file."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from tensorflow.lite.python import schema_py_generated as schema

from fl_protocol.model_manifest import BundleManifest
from models.export.convert import STATEFUL
from models.export.micro import resolver_name
from models.flatbuffer import operators, read_model

_BYTES_PER_LINE = 12


@dataclass(frozen=True)
class CSource:
    """The text of the two files.

    Args:
        header: declarations, for C and C++.
        source: definitions, C++11.
    """

    header: str
    source: str


def c_source(
    graph: bytes, manifest: BundleManifest, *, stem: str, output: str, arena_bytes: int | None = None
) -> CSource:
    """The flatbuffer as source code.

    Args:
        graph: the flatbuffer, one example a call.
        manifest: of the bundle.
        stem: of both file names.
        output: what the output is: ``logits``, ``probabilities`` or ``values``.
        arena_bytes: the tensor arena it needed, if that was measured.
    """
    name = c_name(manifest.name)
    ends = _constants(name, graph)
    comment = _comment(graph, manifest, output=output, arena_bytes=arena_bytes)
    guard = f"{name.upper()}_MODEL_H_"
    declarations = "\n".join(f"extern {kind} {symbol};" for kind, symbol, _ in ends)
    definitions = "\n".join(f"{kind} {symbol} = {value};" for kind, symbol, value in ends)
    header = (
        f'{comment}\n#ifndef {guard}\n#define {guard}\n\n#ifdef __cplusplus\nextern "C" {{\n#endif\n\n'
        f"/* The model for tflite::GetModel(), aligned to 16 bytes. */\n"
        f"extern const unsigned char {name}_model[];\nextern const unsigned int {name}_model_len;\n\n"
        f"{declarations}{chr(10) if declarations else ''}\n#ifdef __cplusplus\n}}\n#endif\n\n#endif\n"
    )
    source = (
        f'{comment}\n#include "{stem}.h"\n\n'
        f"alignas(16) const unsigned char {name}_model[] = {{\n{_bytes(graph)}\n}};\n"
        f"const unsigned int {name}_model_len = {len(graph)};\n{definitions}\n"
    )
    return CSource(header=header, source=source)


def c_name(text: str) -> str:
    """A C identifier for a model's name."""
    name = re.sub(r"[^0-9a-zA-Z]+", "_", text).strip("_").lower() or "covey"
    return f"m_{name}" if name[0].isdigit() else name


def _constants(name: str, graph: bytes) -> list[tuple[str, str, str]]:
    """Type, symbol and value of the scales and zero points of int8 ends: real = scale * (q - zero_point)."""
    found = []
    for end, (scale, zero_point) in _quantisation(graph).items():
        found += [
            ("const float", f"{name}_{end}_scale", f"{_float(scale)}f"),
            ("const int", f"{name}_{end}_zero_point", str(zero_point)),
        ]
    return found


def _quantisation(graph: bytes) -> dict[str, tuple[float, int]]:
    """Scale and zero point of the input and the output; nothing for float32."""
    (subgraph, *_) = read_model(graph).subgraphs
    found = {}
    for end, index in (("input", subgraph.inputs[0]), ("output", subgraph.outputs[0])):
        tensor = subgraph.tensors[index]
        if tensor.type == schema.TensorType.INT8:
            found[end] = (float(tensor.quantization.scale[0]), int(tensor.quantization.zeroPoint[0]))
    return found


def _float(value: float) -> str:
    """Nine digits give every float32 back exactly; a point makes it a C float."""
    text = f"{value:.9g}"
    return text if any(mark in text for mark in ".e") else f"{text}.0"


def _comment(graph: bytes, manifest: BundleManifest, *, output: str, arena_bytes: int | None) -> str:
    """What somebody needs to know who finds the file in a firmware tree."""
    schema_ = manifest.input
    channels = ", ".join(f"{c} [{u}]" for c, u in zip(schema_.channels, schema_.units, strict=True))
    rate = f" at {schema_.sampling_rate_hz:g} Hz" if schema_.sampling_rate_hz else ""
    used = sorted(set(operators(graph)))
    lines = [
        f"{manifest.name} version {manifest.version}, made by covey-model export; do not edit.",
        f"SHA-256 of the {len(graph)} bytes: {hashlib.sha256(graph).hexdigest()}",
        "",
        f"Input: {' x '.join(map(str, schema_.shape))}{rate}, row-major: {channels}",
        f"Output: {output}: {_outputs(manifest)}",
    ]
    for end, (scale, zero_point) in _quantisation(graph).items():
        lines.append(f"{end.title()} is int8: real value = {_float(scale)} * (q - ({zero_point}))")
    if not _quantisation(graph):
        lines.append("Input and output are float32.")
    if arena_bytes is not None:
        lines.append(f"Tensor arena: {arena_bytes} bytes on a 64-bit host; a 32-bit chip needs less.")
    if STATEFUL in used:
        lines.append("The LSTM keeps its state: call interpreter.Reset() before every window.")
    lines += ["", f"tflite::MicroMutableOpResolver<{len(used)}> resolver;"]
    lines += [f"resolver.Add{resolver_name(each)}();" for each in used]
    # Comment marks in a name would end the comment.
    return (
        "/*\n"
        + "\n".join(f" * {line}".rstrip() for line in "\n".join(lines).replace("*/", "* /").split("\n"))
        + "\n */"
    )


def _outputs(manifest: BundleManifest) -> str:
    """What the entries of the output are."""
    label = manifest.label
    if label.kind == "input":
        return "the input as the first trained layer sees it"
    units = label.units or ("",) * len(label.names)
    pairs = zip(label.names, units, strict=True)
    return ", ".join(f"{number} {name}{f' [{unit}]' if unit else ''}" for number, (name, unit) in enumerate(pairs))


def _bytes(graph: bytes) -> str:
    """Hexadecimal, twelve a line."""
    rows = (graph[start : start + _BYTES_PER_LINE] for start in range(0, len(graph), _BYTES_PER_LINE))
    return "\n".join("    " + " ".join(f"0x{byte:02x}," for byte in row) for row in rows)
