"""Runs a saved ML program, operation by operation, in PyTorch: any .mlpackage on any machine, in f32 or in f16.

`f32` computes everything in float32, which shows what the program means; `f16` rounds every value to the type that
the program declares for it, as Core ML does on CPU and GPU, so what overflows there overflows here. Inside one
operation sums run in float32 either way; Core ML says nothing of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from gemexport.formats.coreml import constants
from gemexport.formats.coreml.arrays import Array
from gemexport.formats.coreml.package import Package, Type, open_package, typed
from gemexport.formats.storage.errors import InputError
from gemexport.validators.mil import (
    elementwise,
    gathers,
    images,
    math,
    norms,
    shapes,
    windows,
)
from gemexport.validators.mil.registry import (
    BY_ROWS,
    OPERATIONS,
    Unsupported,
    Weight,
    as_tensor,
    parameters,
    round_half,
)

Arithmetic = Literal["f32", "f16"]
Observer = Callable[[str, str, Tensor], None]
State = dict[str, Tensor]
KNOWN_MODULES = (  # importing them registers the operations
    elementwise,
    gathers,
    images,
    math,
    norms,
    shapes,
    windows,
)
SMALL = 1 << 20  # bytes up to which a constant is simply loaded
_FLOATS = frozenset(("fp16", "fp32", "fp64", "bf16"))
_STATES = frozenset(("read_state", "write_state"))
_TUPLES = frozenset(("values", "ref_tensors", "begins", "ends", "end_masks"))  # inputs of any number of values
_REMEDY = "run the package on macOS, or report it"
_INTEGERS = {"int8": torch.int8, "uint8": torch.uint8, "int16": torch.int16, "bool": torch.bool}


@dataclass(frozen=True)
class Step:
    """One operation: the names it reads and writes, and the names nobody needs after it."""

    kind: str
    arguments: dict[str, str | list[str]]
    outputs: list[str]
    types: list[Type]
    free: list[str] = field(default_factory=list)
    in_place: bool = False  # a slice_update of a state that is written back at once
    alias: bool = False  # a read_state whose readers copy what they take


class Program:
    """The main function of a package, ready to run.

    `hold` is how many bytes of dequantized weights may stay in memory between calls; the rest is read again, a slice
    of rows at a time. Raises InputError for an operation that is not known.
    """

    def __init__(self, path: str | Path, arithmetic: Arithmetic = "f32", hold: int = 0) -> None:
        self.path, self.arithmetic = Path(path), arithmetic
        self.package = open_package(path)
        self.inputs: dict[str, Type] = {}
        self.states: dict[str, Type] = {}
        for value in self.package.function.inputs:
            kind = self.states if value.type.WhichOneof("type") == "stateType" else self.inputs
            kind[value.name] = typed(value.type)
        self.outputs = self.package.outputs
        self._constants = self._load_constants(hold)
        self.steps = _planned(_steps(self.package, self._constants), set(self.outputs))

    def _load_constants(self, hold: int) -> dict[str, Any]:
        loaded: dict[str, Any] = {}
        used, looked_up = _read(self.package)
        for name, value in constants(self.package).items():
            if name not in used:
                continue  # what only other constants are made of
            if isinstance(value, str | list):
                loaded[name] = value
                continue
            loaded[name] = weight = self._weight(value)
            if isinstance(weight, Weight) and name not in looked_up and weight.nbytes <= hold:
                weight.hold()
                hold -= weight.nbytes
        return loaded

    def _weight(self, array: Array) -> Tensor | Weight:
        weight = Weight(array, half=self.arithmetic == "f16") if array.shape else None
        if weight is None:
            return as_tensor(np.asarray(array.numpy()))
        return weight.whole() if weight.nbytes <= SMALL else weight

    def make_state(self) -> State:
        """States full of zeros, as MLModel.make_state gives them."""
        return {name: torch.zeros(kind.shape) for name, kind in self.states.items()}

    def predict(
        self, inputs: Mapping[str, np.ndarray], state: State | None = None, observe: Observer | None = None
    ) -> dict[str, np.ndarray]:
        """The outputs for `inputs`, changing `state` in place, as MLModel.predict does.

        `observe` is called with the kind, the name and the value of whatever an operation gives.
        Raises InputError for inputs that the program does not have or lacks.
        """
        if set(inputs) != set(self.inputs):
            wanted = ", ".join(sorted(self.inputs))
            raise InputError(self.path, f"was given {', '.join(sorted(inputs))}", f"its inputs are {wanted}")
        values: dict[str, Any] = dict(self._constants)
        for name, kind in self.inputs.items():
            values[name] = self._conform(as_tensor(np.asarray(inputs[name])), kind)
        state = self.make_state() if state is None else state
        with torch.inference_mode():
            for step in self.steps:
                self._run(step, values, state, observe)
        return {name: values[name].numpy() for name in self.outputs}

    def _run(self, step: Step, values: dict[str, Any], state: State, observe: Observer | None) -> None:
        arguments = {name: self._argument(step.kind, name, found, values) for name, found in step.arguments.items()}
        if step.kind == "read_state":
            held = state[str(step.arguments["input"])]
            results: Any = held if step.alias else held.clone()
        elif step.kind == "write_state":
            # The state's own tensor is kept, so that whoever made it sees what was written.
            held, data = state[str(step.arguments["input"])], arguments["data"]
            if held is not data:
                held.copy_(data)
            results = ()
        elif step.in_place:
            results = shapes.slice_update(**arguments, in_place=True)
        else:
            results = self._computed(step, arguments)
        results = results if isinstance(results, tuple) else (results,)
        for name, kind, result in zip(step.outputs, step.types, results, strict=False):
            values[name] = result if step.in_place or step.kind == "read_state" else self._conform(result, kind)
            if observe is not None:
                observe(step.kind, name, values[name])
        for name in step.free:
            del values[name]

    def _computed(self, step: Step, arguments: dict[str, Any]) -> Any:
        try:
            return OPERATIONS[step.kind](**arguments)
        except Unsupported as error:
            raise InputError(self.path, f"{step.kind} {step.outputs[0]}: {error}", _REMEDY) from error

    def _argument(self, kind: str, name: str, found: str | list[str], values: dict[str, Any]) -> Any:
        if isinstance(found, list):
            return [value.whole() if isinstance(value := values[item], Weight) else value for item in found]
        value = values.get(found, found)
        return value.whole() if isinstance(value, Weight) and name not in BY_ROWS.get(kind, ()) else value

    def _conform(self, value: Tensor, kind: Type) -> Tensor:
        """`value` as the declared type: floats rounded in f16 arithmetic, integers of MIL's width."""
        if kind.kind in _FLOATS:
            value = value if value.dtype == torch.float32 else value.float()
            return round_half(value) if self.arithmetic == "f16" and kind.kind == "fp16" else value
        wanted = _INTEGERS.get(kind.kind, torch.int32)
        return value if value.dtype == wanted else value.to(wanted)


def _names(found: str | list[str]) -> list[str]:
    return found if isinstance(found, list) else [found]


def _read(package: Package) -> tuple[set[str], set[str]]:
    """The values that some operation reads, or that come out; and those of which only rows are looked up."""
    used, whole = set(package.outputs), set(package.outputs)
    for operation in package.operations:
        if operation.type.startswith("constexpr_"):
            continue
        for parameter, argument in operation.inputs.items():
            names = {binding.name for binding in argument.arguments}
            used |= names
            whole |= set() if operation.type == "gather" and parameter == "x" else names
    return used, used - whole


def _steps(package: Package, constants: dict[str, Any]) -> list[Step]:
    """The operations that compute, in order; values written into one of them join `constants`.

    Raises InputError for the first operation that is not known, or has an input that is not.
    """
    steps: list[Step] = []
    for operation in package.operations:
        if operation.type == "const" or operation.type.startswith("constexpr_"):
            continue
        if operation.type not in OPERATIONS and operation.type not in _STATES:
            raise InputError(package.path, f"the operation {operation.type} is not known to the evaluator", _REMEDY)
        if operation.type in OPERATIONS and (new := set(operation.inputs) - parameters(operation.type)):
            problem = f"the input {', '.join(sorted(new))} of {operation.type} is not known to the evaluator"
            raise InputError(package.path, problem, _REMEDY)
        arguments: dict[str, str | list[str]] = {}
        for parameter, argument in operation.inputs.items():
            names = []
            for i, binding in enumerate(argument.arguments):
                if binding.WhichOneof("binding") == "value":
                    # Dots cannot occur in a name of the program's own.
                    name = f"{operation.attributes['name'].immediateValue.tensor.strings.values[0]}.{parameter}.{i}"
                    value = package.value(binding.value)
                    constants[name] = value if isinstance(value, str | list) else as_tensor(value.numpy())
                    names.append(name)
                else:
                    names.append(binding.name)
            arguments[parameter] = names if parameter in _TUPLES else names[0]
        outputs = [output.name for output in operation.outputs]
        steps.append(Step(operation.type, arguments, outputs, [typed(output.type) for output in operation.outputs]))
    return steps


def _planned(steps: list[Step], keep: set[str]) -> list[Step]:
    """The same steps, knowing the last use of each value (but those to `keep`) and which states need no copy."""
    readers: dict[str, list[int]] = {}
    for position, step in enumerate(steps):
        for name in {name for found in step.arguments.values() for name in _names(found)}:
            readers.setdefault(name, []).append(position)
    source = {step.outputs[0]: step.arguments["input"] for step in steps if step.kind == "read_state"}
    made = {name for step in steps for name in step.outputs}

    def updates_state(position: int) -> bool:
        # read_state -> slice_update -> write_state of the same state, with nobody else looking on.
        step = steps[position]
        if step.kind != "slice_update" or position + 1 == len(steps) or readers.get(step.outputs[0]) != [position + 1]:
            return False
        write, read = steps[position + 1], str(step.arguments["x"])
        same = write.kind == "write_state" and write.arguments["input"] == source.get(read)
        return same and readers[read] == [position]

    in_place = {position for position in range(len(steps)) if updates_state(position)}
    copied_anyway = in_place | {position for position, step in enumerate(steps) if step.kind == "slice_by_index"}
    planned = []
    for position, step in enumerate(steps):
        used = {name for found in step.arguments.values() for name in _names(found)}
        free = sorted(name for name in used & made - keep if readers[name][-1] == position)
        alias = step.kind == "read_state" and set(readers.get(step.outputs[0], ())) <= copied_anyway
        planned.append(replace(step, free=free, in_place=position in in_place, alias=alias))
    return planned
