"""The program of a Core ML package as one whose structure can be judged, without its weights.

Operations: coremltools' documentation of `coremltools.converters.mil.mil.ops.defs`.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

from gemexport.formats.coreml import canonical_name
from gemexport.formats.coreml.package import Package, everything, open_package, typed
from gemexport.validators.structure.program import Kind, Number, Operation, Program

_KINDS: dict[str, tuple[Kind, tuple[str, ...]]] = {  # and what it reads of its arguments
    **dict.fromkeys(
        ("cast", "reshape", "transpose", "expand_dims", "squeeze", "slice_by_index", "slice_by_size", "split", "tile",
         "identity", "gather", "gather_along_axis", "gather_nd"), ("same", ("x",))
    ),
    **dict.fromkeys(("quantize", "dequantize"), ("same", ("input",))),
    "coreml_update_state": ("same", ("value",)),
    "slice_update": ("join", ("x", "update")), "concat": ("join", ("values",)), "select": ("join", ("a", "b")),
    "add": ("add", ("x", "y")), "sub": ("add", ("x", "y")), "mul": ("mul", ("x", "y")),
    "real_div": ("div", ("x", "y")), "pow": ("power", ("x", "y")), "square": ("power", ("x",)),
    "tanh": ("tanh", ("x",)), "erf": ("erf", ("x",)), "sigmoid": ("sigmoid", ("x",)), "silu": ("sigmoid", ("x",)),
    "gelu": ("gelu", ("x",)), "rsqrt": ("root", ("x",)), "sqrt": ("root", ("x",)), "inverse": ("root", ("x",)),
    "reduce_mean": ("mean", ("x",)), "relu": ("relu", ("x",)),
    "softmax": ("softmax", ("x",)), "linear": ("linear", ("x",)),
    "matmul": ("matmul", ("x", "y")), "scaled_dot_product_attention": ("attention", ("query", "key")),
}  # fmt: skip
_GELUS = {"EXACT": "erf", "TANH_APPROXIMATION": "tanh", "SIGMOID_APPROXIMATION": "sigmoid"}
_SOURCES = ("read_state",)  # give what was kept, which comes from no norm of this run


def programs(path: Path) -> dict[str, Program]:
    """The program of the package at `path`. Raises InputError for one that is not whole."""
    package = open_package(path)
    found = Program(outputs=tuple(package.outputs))
    for operation in everything(package.operations):
        if operation.type == "const" or operation.type.startswith("constexpr_"):
            _add_constant(found, package, operation)
        elif operation.type not in _SOURCES:
            found.add(_operation(found, package, operation))
    return {"": found}


def _add_constant(program: Program, package: Package, operation: Any) -> None:
    for output in operation.outputs:
        program.fixed.add(output.name)
        weight = canonical_name(output.name)
        if weight is not None:
            program.weights[output.name] = weight
        elif operation.type == "const":
            number = _number(package, operation.attributes["val"])
            if number is not None:
                program.numbers[output.name] = number


def _number(package: Package, proto: Any) -> Number | None:
    """A constant that is one number."""
    if proto.type.WhichOneof("type") != "tensorType":
        return None
    kind = typed(proto.type)
    if kind.kind == "string" or prod(kind.shape) != 1:
        return None
    stored = package.value(proto)
    assert not isinstance(stored, str | list)
    return Number.of(float(stored.numpy().reshape(-1)[0]), {"fp16": "f16"}.get(kind.kind, kind.kind))


def _operation(program: Program, package: Package, operation: Any) -> Operation:
    kind, wanted = _KINDS.get(operation.type, ("other", tuple(sorted(operation.inputs))))
    inputs = tuple(
        name for key in wanted if key in operation.inputs
        for name in _bound(program, package, operation, key)
    )  # fmt: skip
    outputs = tuple(output.name for output in operation.outputs)
    further: dict[str, Any] = {}
    if operation.type == "gelu":
        further["mode"] = _GELUS.get(_text(package, operation, "mode"), "")
    if kind == "root" and "epsilon" in operation.inputs:
        further["epsilon"] = program.numbers.get(_bound(program, package, operation, "epsilon")[0])
    if kind == "attention":
        scale = _bound(program, package, operation, "scale") if "scale" in operation.inputs else ("",)
        further["factor"] = program.numbers.get(scale[0])
    if kind in ("linear", "matmul"):
        other = _bound(program, package, operation, "weight" if kind == "linear" else "y")[0]
        further["weight"] = program.behind(other)
        kind = "matmul" if further["weight"] is None else "linear"
        inputs = (inputs[0], other) if kind == "matmul" else inputs[:1]
    return Operation(kind, outputs[0] if outputs else operation.type, inputs, outputs, **further)


def _bound(program: Program, package: Package, operation: Any, key: str) -> tuple[str, ...]:
    """The values that an argument names; one that it states becomes a constant with a name of its own."""
    found = []
    for place, binding in enumerate(operation.inputs[key].arguments):
        name = binding.name
        if binding.WhichOneof("binding") == "value":
            owner = operation.outputs[0].name if operation.outputs else operation.type
            name = f"{owner}/{key}/{place}"
            program.fixed.add(name)
            number = _number(package, binding.value)
            if number is not None:
                program.numbers[name] = number
        found.append(name)
    return tuple(found)


def _text(package: Package, operation: Any, key: str) -> str:
    """An argument that is a text, by the constant that it names or as it is stated."""
    if key not in operation.inputs:
        return "EXACT"  # what a GELU is that says nothing
    (binding,) = operation.inputs[key].arguments
    if binding.WhichOneof("binding") == "value":
        return str(package.value(binding.value))
    named = (item for item in package.operations if item.outputs and item.outputs[0].name == binding.name)
    source = next(named, None)
    return "" if source is None or source.type != "const" else str(package.value(source.attributes["val"]))
