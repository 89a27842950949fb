"""A graph of any format as operations of a few kinds, as far as its structure is judged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

Kind = Literal[
    "same", "join", "add", "mul", "div", "power", "tanh", "erf", "sigmoid", "gelu", "root", "mean", "relu", "softmax",
    "linear", "matmul", "attention", "norm", "other",
]  # fmt: skip
LEAST: dict[Kind, int] = {"add": 2, "mul": 2, "div": 2, "matmul": 2, "attention": 2, "other": 0}  # inputs
# Of a constant, half a unit in its last place: relative to it, and of the smallest ones that the dtype has.
ROUNDINGS = {"f16": (2.0**-11, 2.0**-25), "bf16": (2.0**-8, 2.0**-134)}
ROUNDING = 2.0**-24  # of one in f32, or of more bits


@dataclass(frozen=True)
class Number:
    """A constant, and how far its dtype may have moved it, relative to itself."""

    value: float
    rounding: float = ROUNDING

    @classmethod
    def of(cls, value: float, dtype: str) -> Number:
        """A constant as a dtype stores it: `f16`, `bf16`, or one of more bits."""
        relative, smallest = ROUNDINGS.get(dtype, (ROUNDING, 0.0))
        return cls(value, max(relative, smallest / abs(value) if value else 0.0))

    def __mul__(self, other: Number) -> Number:
        return Number(self.value * other.value, self.rounding + other.rounding)

    def inverse(self) -> Number | None:
        """One over it; None of nought."""
        return None if self.value == 0 else Number(1 / self.value, self.rounding)

    def is_near(self, value: float) -> bool:
        """Whether it may be `value`, rounded."""
        return self.agrees(Number(value, 0.0))

    def agrees(self, other: Number) -> bool:
        """Whether both may be the same number, each rounded."""
        return abs(self.value - other.value) <= 2 * (self.rounding + other.rounding) * abs(other.value)


ONE = Number(1.0, 0.0)


@dataclass(frozen=True)
class Operation:
    """What makes values out of values.

    `same` moves or stores the numbers of its first input anew, `join` takes each from some of its inputs. `linear` has
    one input and a `weight`, `attention` the queries and then the keys as inputs, and `norm` has a weight if it can.
    """

    kind: Kind
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weight: str | None = None  # canonical name
    factor: Number | None = ONE  # of a product or of scores; None of scores: one over the root of a head's size
    softcap: Number | None = None  # of scores; None where there is none
    mode: str = ""  # of a GELU: tanh, erf or sigmoid
    epsilon: Number | None = None  # what a norm, or a root, adds to what it is taken of


@dataclass
class Program:
    """Operations in the order in which they are computed, and the values that are known beforehand."""

    operations: list[Operation] = field(default_factory=list)
    numbers: dict[str, Number] = field(default_factory=dict)  # constants that are one number
    weights: dict[str, str] = field(default_factory=dict)  # canonical names of the decoder's tensors, by value
    fixed: set[str] = field(default_factory=set)  # every constant
    outputs: tuple[str, ...] = ()
    makers: dict[str, Operation] = field(default_factory=dict)
    users: dict[str, list[int]] = field(default_factory=dict)  # places of operations that read a value

    def add(self, operation: Operation) -> None:
        """Put an operation at the end; one with fewer inputs than its kind has is none of that kind."""
        if len(operation.inputs) < LEAST.get(operation.kind, 1):
            operation = replace(operation, kind="other")
        for value in dict.fromkeys(operation.inputs):
            self.users.setdefault(value, []).append(len(self.operations))
        self.makers |= dict.fromkeys(operation.outputs, operation)
        self.operations.append(operation)

    def of_kind(self, *kinds: Kind) -> Iterator[Operation]:
        """The operations of some kinds."""
        return (operation for operation in self.operations if operation.kind in kinds)

    def behind(self, value: str) -> str | None:
        """The tensor of the decoder that a value is, moved or looked up in, if it is one."""
        while value not in self.weights:
            maker = self.makers.get(value)
            if maker is None or maker.kind != "same":
                return None
            value = maker.inputs[0]
        return self.weights[value]
