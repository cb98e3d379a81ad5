"""Read a TFLite flatbuffer's own tables: what a graph contains, without running it."""

from __future__ import annotations

from typing import Any

from tensorflow.lite.python import schema_py_generated as schema


def read_model(graph: bytes) -> Any:
    """The object form (``ModelT``) of a flatbuffer."""
    return schema.ModelT.InitFromObj(schema.Model.GetRootAs(bytearray(graph), 0))


def operators(graph: bytes) -> list[str]:
    """The operators of all subgraphs in order; a custom one (Flex too) shows as ``CUSTOM:name``."""
    model = read_model(graph)
    codes = operator_names(model)
    return [codes[operator.opcodeIndex] for graph_ in model.subgraphs for operator in graph_.operators]


def operator_names(model: Any) -> list[str]:
    """The name of each entry of a model's operator codes."""
    names = {code: name for name, code in vars(schema.BuiltinOperator).items() if not name.startswith("_")}
    return [_operator_name(code, names) for code in model.operatorCodes]


def _operator_name(code: Any, names: dict[int, str]) -> str:
    """The builtin's name, or ``CUSTOM:name``."""
    # Files from before 2.4 have the code in the deprecated byte only; the larger of the two is the real one.
    name = names[max(code.builtinCode, code.deprecatedBuiltinCode)]
    if name == "CUSTOM":
        return f"CUSTOM:{text(code.customCode or '')}"
    return name


def signatures(graph: bytes) -> dict[str, tuple[list[str], list[str]]]:
    """Names of inputs and outputs by signature."""
    return {
        text(signature.signatureKey): (
            sorted(text(entry.name) for entry in signature.inputs),
            sorted(text(entry.name) for entry in signature.outputs),
        )
        for signature in read_model(graph).signatureDefs
    }


def text(value: str | bytes) -> str:
    """A flatbuffer string."""
    return value.decode() if isinstance(value, bytes) else value
