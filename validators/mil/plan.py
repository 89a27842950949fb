"""What a saved ML program computes, as steps: operations, the names they read, and when nobody needs a value any more.

`cond` and `while_loop` hold blocks of steps of their own, which see the values around them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from gemexport.formats.coreml.package import Package, Type, everything, typed
from gemexport.formats.storage.errors import InputError
from gemexport.validators.mil.registry import OPERATIONS, as_tensor, parameters

REMEDY = "run the package on macOS, or report it"
BLOCKS = frozenset(("cond", "while_loop"))
_STATES = frozenset(("read_state", "write_state"))
# Inputs of any number of values.
_TUPLES = frozenset(("values", "ref_tensors", "begins", "ends", "end_masks", "loop_vars", "elem_shape"))


@dataclass(frozen=True)
class Block:
    """Steps inside an operation: the names it is given values under, and those of what it gives."""

    inputs: list[str]
    steps: list[Step]
    outputs: list[str]


@dataclass(frozen=True)
class Step:
    """One operation: the names it reads and writes, and the names nobody needs after it."""

    kind: str
    arguments: dict[str, str | list[str]]
    outputs: list[str]
    types: list[Type]
    blocks: list[Block] = field(default_factory=list)
    free: list[str] = field(default_factory=list)
    in_place: bool = False  # a slice_update of a state that is written back at once
    alias: bool = False  # a read_state whose readers copy what they take

    def reads(self) -> set[str]:
        """Every name that it reads, in its blocks as well."""
        used = {name for found in self.arguments.values() for name in _names(found)}
        for block in self.blocks:
            used |= set(block.outputs).union(*(step.reads() for step in block.steps))
        return used


def _names(found: str | list[str]) -> list[str]:
    return found if isinstance(found, list) else [found]


def read(package: Package) -> tuple[set[str], set[str]]:
    """The values that some operation reads, or that come out; and those of which only rows are looked up."""
    used, whole = set(package.outputs), set(package.outputs)
    for operation in everything(package.operations):
        inner = {name for block in operation.blocks for name in block.outputs}
        used, whole = used | inner, whole | inner
        if operation.type.startswith("constexpr_"):
            continue
        for parameter, argument in operation.inputs.items():
            names = {binding.name for binding in argument.arguments}
            used |= names
            whole |= set() if operation.type == "gather" and parameter == "x" else names
    return used, used - whole


def steps(package: Package, operations: Iterable[Any], constants: dict[str, Any]) -> list[Step]:
    """The operations that compute, in order; values written into one of them join `constants`.

    Raises InputError for the first operation that is not known, or has an input that is not.
    """
    found: list[Step] = []
    for operation in operations:
        if operation.type == "const" or operation.type.startswith("constexpr_"):
            continue
        check(package, operation)
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
        blocks = [
            Block(
                [value.name for value in block.inputs], steps(package, block.operations, constants), list(block.outputs)
            )
            for block in operation.blocks
        ]
        types = [typed(output.type) for output in operation.outputs]
        found.append(Step(operation.type, arguments, outputs, types, blocks))
    return found


def check(package: Package, operation: Any) -> None:
    """Raise InputError for an operation that is not known, or has an input that is not."""
    kind = operation.type
    if kind in _STATES or kind in BLOCKS:
        return
    if kind.startswith("random_"):
        raise InputError(package.path, f"{kind} draws numbers of its own: nothing can be compared", REMEDY)
    if kind not in OPERATIONS:
        raise InputError(package.path, f"the operation {kind} is not known to the evaluator", REMEDY)
    if new := set(operation.inputs) - parameters(kind):
        problem = f"the input {', '.join(sorted(new))} of {kind} is not known to the evaluator"
        raise InputError(package.path, problem, REMEDY)


def planned(steps: list[Step], keep: set[str]) -> list[Step]:
    """The same steps, knowing the last use of each value (but those to `keep`) and which states need no copy."""
    readers: dict[str, list[int]] = {}
    for position, step in enumerate(steps):
        for name in step.reads():
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
    found = []
    for position, step in enumerate(steps):
        free = sorted(name for name in step.reads() & made - keep if readers[name][-1] == position)
        alias = step.kind == "read_state" and set(readers.get(step.outputs[0], ())) <= copied_anyway
        found.append(replace(step, free=free, in_place=position in in_place, alias=alias))
    return found
