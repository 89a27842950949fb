"""Runs a saved ML program, operation by operation, in PyTorch: any .mlpackage on any machine, in f32 or in f16.

`f32` computes everything in float32, which shows what the program means; `f16` rounds every value to the type that
the program declares for it, as Core ML does on CPU and GPU, so what overflows there overflows here. Inside one
operation sums run in float32 either way; Core ML says nothing of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from gemexport.formats.coreml import constants
from gemexport.formats.coreml.arrays import Array
from gemexport.formats.coreml.package import Type, open_package, typed
from gemexport.formats.storage.errors import InputError
from gemexport.validators.mil import (
    elementwise,
    gathers,
    images,
    lists,
    math,
    norms,
    recurrent,
    sampling,
    shapes,
    windows,
)
from gemexport.validators.mil.plan import REMEDY, Block, Step, planned, read, steps
from gemexport.validators.mil.registry import (
    BY_ROWS,
    OPERATIONS,
    Unsupported,
    Weight,
    as_tensor,
    flag,
    round_half,
)

Arithmetic = Literal["f32", "f16"]
Observer = Callable[[str, str, Tensor], None]
State = dict[str, Tensor]
KNOWN_MODULES = (  # importing them registers the operations
    elementwise,
    gathers,
    images,
    lists,
    math,
    norms,
    recurrent,
    sampling,
    shapes,
    windows,
)
SMALL = 1 << 20  # bytes up to which a constant is simply loaded
_FLOATS = frozenset(("fp16", "fp32", "fp64", "bf16"))
_INTEGERS = {"int8": torch.int8, "uint8": torch.uint8, "int16": torch.int16, "bool": torch.bool}


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
        self.steps = planned(steps(self.package, self.package.operations, self._constants), set(self.outputs))

    def _load_constants(self, hold: int) -> dict[str, Any]:
        loaded: dict[str, Any] = {}
        used, looked_up = read(self.package)
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
        Raises InputError for inputs that the program does not have or lacks, or that have another shape.
        """
        if set(inputs) != set(self.inputs):
            wanted = ", ".join(sorted(self.inputs))
            raise InputError(self.path, f"was given {', '.join(sorted(inputs))}", f"its inputs are {wanted}")
        values: dict[str, Any] = dict(self._constants)
        for name, kind in self.inputs.items():
            values[name] = self._conform(self._given(name, np.asarray(inputs[name]), kind), kind)
        state = self.make_state() if state is None else state
        with torch.inference_mode():
            for step in self.steps:
                self._run(step, values, state, observe)
        # MLMultiArray knows no scalars: MLModel.predict gives one element.
        return {name: np.atleast_1d(values[name].numpy()) for name in self.outputs}

    def _given(self, name: str, value: np.ndarray, kind: Type) -> Tensor:
        """An input as a tensor of the declared shape; of one element where that is a scalar."""
        if not kind.shape and value.size == 1:
            value = value.reshape(())
        sizes = zip(value.shape, kind.shape, strict=False)
        if value.ndim != len(kind.shape) or any(wanted not in (-1, size) for size, wanted in sizes):
            raise InputError(self.path, f"was given {name} {list(value.shape)}", f"its shape is {list(kind.shape)}")
        return as_tensor(value)

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
        elif step.kind == "cond":
            taken, other = step.blocks
            results = self._block(taken if flag(arguments["pred"]) else other, [], values, state, observe)
        elif step.kind == "while_loop":
            condition, body = step.blocks
            results = tuple(arguments["loop_vars"])
            while flag(self._block(condition, results, values, state, observe)[0]):
                results = self._block(body, results, values, state, observe)
        else:
            results = self._computed(step, arguments)
        results = results if isinstance(results, tuple) else (results,)
        for name, kind, result in zip(step.outputs, step.types, results, strict=False):
            values[name] = result if step.in_place or step.kind == "read_state" else self._conform(result, kind)
            if observe is not None and isinstance(values[name], Tensor):
                observe(step.kind, name, values[name])
        for name in step.free:
            del values[name]

    def _block(
        self,
        block: Block,
        given: Sequence[Any],
        values: dict[str, Any],
        state: State,
        observe: Observer | None,
    ) -> tuple[Any, ...]:
        """What a block gives for the values that it is given; it sees the values around it, and leaves none behind."""
        inside = values | dict(zip(block.inputs, given, strict=True))
        for step in block.steps:
            self._run(step, inside, state, observe)
        return tuple(self._argument("", "", name, inside) for name in block.outputs)

    def _computed(self, step: Step, arguments: dict[str, Any]) -> Any:
        try:
            return OPERATIONS[step.kind](**arguments)
        except Unsupported as error:
            raise InputError(self.path, f"{step.kind} {step.outputs[0]}: {error}", REMEDY) from error

    def _argument(self, kind: str, name: str, found: str | list[str], values: dict[str, Any]) -> Any:
        if isinstance(found, list):
            return [value.whole() if isinstance(value := values[item], Weight) else value for item in found]
        value = values.get(found, found)
        return value.whole() if isinstance(value, Weight) and name not in BY_ROWS.get(kind, ()) else value

    def _conform(self, value: Any, kind: Type) -> Any:
        """`value` as the declared type: floats rounded in f16 arithmetic, integers of MIL's width; a list as it is."""
        if isinstance(value, lists.TensorList):
            return value
        if kind.kind in _FLOATS:
            value = value if value.dtype == torch.float32 else value.float()
            return round_half(value) if self.arithmetic == "f16" and kind.kind == "fp16" else value
        wanted = _INTEGERS.get(kind.kind, torch.int32)
        return value if value.dtype == wanted else value.to(wanted)
