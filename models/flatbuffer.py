"""Read a TFLite flatbuffer's own tables: what a graph contains, without running it."""

from __future__ import annotations

from typing import Any

from tensorflow.lite.python import schema_py_generated as schema


def read_model(graph: bytes) -> Any:
    """The object form (``ModelT``) of a flatbuffer."""
    return schema.ModelT.InitFromObj(schema.Model.GetRootAs(bytearray(graph), 0))


def operators(graph: bytes) -> list[str]:
    """The operators of all subgraphs in order; a custom one (Flex too) shows as ``CUSTOM:name``."""
    # The tables are read where they lie: the object form would copy every tensor to count the operators.
    model = schema.Model.GetRootAs(graph, 0)
    codes = [model.OperatorCodes(i) for i in range(model.OperatorCodesLength())]
    names = [_operator_name(code.BuiltinCode(), code.DeprecatedBuiltinCode(), code.CustomCode()) for code in codes]
    return [
        names[subgraph.Operators(i).OpcodeIndex()]
        for subgraph in (model.Subgraphs(i) for i in range(model.SubgraphsLength()))
        for i in range(subgraph.OperatorsLength())
    ]


def operator_names(model: Any) -> list[str]:
    """The name of each entry of a model's operator codes."""
    return [
        _operator_name(code.builtinCode, code.deprecatedBuiltinCode, code.customCode) for code in model.operatorCodes
    ]


_BUILTINS = {code: name for name, code in vars(schema.BuiltinOperator).items() if not name.startswith("_")}


def _operator_name(code: int, deprecated_code: int, custom: str | bytes | None) -> str:
    """The builtin's name, or ``CUSTOM:name``."""
    # Files from before 2.4 have the code in the deprecated byte only; the larger of the two is the real one.
    name = _BUILTINS[max(code, deprecated_code)]
    return f"CUSTOM:{text(custom or '')}" if name == "CUSTOM" else name


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
