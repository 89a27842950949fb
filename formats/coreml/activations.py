"""The static activation scales of an ML program, read back from `quantize` and `dequantize` around its linears.

Keys and values are rounded before they go into a state; which layer's they are says the name of what was rounded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gemexport.formats.activations import Activations, CacheActivations, LinearActivations, Quantizer
from gemexport.formats.coreml import canonical_name, constants
from gemexport.formats.coreml.package import Package, Value, open_package

_CACHE = re.compile(r"^layers_(\d{1,6})_(key|value)_cache$")


def cache_name(layer: int, kind: str) -> str:
    """What the rounded keys or values of a layer are called in a program."""
    return f"layers_{layer}_{kind}_cache"


def activations(path: str | Path) -> Activations | None:
    """The quantizers of linears' inputs and outputs and of what is cached in package `path`; None without any."""
    package = open_package(path)
    graph = _Graph(package)
    linears = {name: both for name, both in graph.linears() if both != LinearActivations()}
    return Activations(linears, graph.caches()) or None


class _Graph:
    """The operations of a program, by what they give and by what they read."""

    def __init__(self, package: Package) -> None:
        self._package = package
        self._constants: dict[str, Value] = constants(package)
        self._made: dict[str, Any] = {}
        self._read: dict[str, list[Any]] = {}
        for operation in package.operations:
            for output in operation.outputs:
                self._made[output.name] = operation
            bindings = [binding for values in operation.inputs.values() for binding in values.arguments]
            for name in {binding.name for binding in bindings if binding.WhichOneof("binding") == "name"}:
                self._read.setdefault(name, []).append(operation)

    def linears(self) -> Iterator[tuple[str, LinearActivations]]:
        """Each linear by its weight's canonical name, and what is around it."""
        for operation in self._package.operations:
            weight = self._name(operation, "weight") if operation.type == "linear" else None
            name = canonical_name(weight) if weight is not None else None
            if name is not None:
                yield name, LinearActivations(self._before(operation), self._after(operation))

    def caches(self) -> dict[int, CacheActivations]:
        """The rounded keys and values, by layer."""
        found: dict[int, dict[str, Quantizer | None]] = {}
        for name, operation in self._made.items():
            match = _CACHE.match(name)
            if match and operation.type == "dequantize":
                found.setdefault(int(match[1]), {})[match[2]] = self._quantizer(operation)
        return {layer: CacheActivations(**kinds) for layer, kinds in found.items()}

    def _before(self, operation: Any) -> Quantizer | None:
        """What rounds the input of a linear, behind casts and factors."""
        made = self._made.get(self._name(operation, "x") or "")
        while made is not None and self._passes(made):
            made = self._made.get(self._name(made, "x") or "")
        return self._quantizer(made) if made is not None and made.type == "dequantize" else None

    def _after(self, operation: Any) -> Quantizer | None:
        """What rounds the output of a linear, behind casts and factors."""
        while True:
            users = self._read.get(operation.outputs[0].name, [])
            rounding = next((user for user in users if user.type == "quantize"), None)
            if rounding is not None:
                return self._quantizer(rounding)
            if len(users) != 1 or not self._passes(users[0]):
                return None
            operation = users[0]

    def _passes(self, operation: Any) -> bool:
        """Whether an operation only changes the type of its input, or multiplies it by a number."""
        if operation.type == "cast":
            return True
        factor = self._constant(operation, "y") if operation.type == "mul" else None
        return factor is not None and not isinstance(factor, str | list) and factor.shape == ()

    def _quantizer(self, operation: Any) -> Quantizer | None:
        """The integers of a `quantize` or `dequantize` with one scale."""
        scale, zero = self._constant(operation, "scale"), self._constant(operation, "zero_point")
        integers = operation if operation.type == "quantize" else self._made.get(self._name(operation, "input") or "")
        kind = self._constant(integers, "output_dtype") if integers is not None else None
        if scale is None or isinstance(scale, str | list) or scale.shape != () or kind not in ("int8", "uint8"):
            return None
        point = 0 if zero is None or isinstance(zero, str | list) else int(zero.numpy().item())
        return Quantizer(float(scale.numpy().item()), point, 8, kind == "int8")

    def _name(self, operation: Any, key: str) -> str | None:
        """The name that an input is bound to; None for one written into the program, or left out."""
        if key not in operation.inputs:
            return None
        binding = operation.inputs[key].arguments[0]
        return str(binding.name) if binding.WhichOneof("binding") == "name" else None

    def _constant(self, operation: Any, key: str) -> Value | None:
        if key not in operation.inputs:
            return None
        binding = operation.inputs[key].arguments[0]
        if binding.WhichOneof("binding") == "name":
            return self._constants.get(binding.name)
        return self._package.value(binding.value)
