"""Which GELU a program computes, by what scores are multiplied, and where they and logits are capped.

Ways between operators are followed as far as each operator is known; where one is not, nothing is said.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import pi, sqrt

from gemexport.formats.gemma.names import role_of
from gemexport.formats.gemma.roles import Role
from gemexport.validators.structure.program import ONE, Number, Operation, Program

GATES = (Role.GATE, Role.PER_LAYER_GATE, Role.EXPERT_GATE_UP)
HEADS = (Role.HEAD, Role.EMBEDDING)
# Of GELU in its tanh form, 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), and of its fit by a sigmoid.
CUBIC, ROOT, QUICK = 0.044715, sqrt(2 / pi), 1.702
STEPS = 64  # from a softmax, or an output, back to its product
# What may lie between a linear and what its GELU is multiplied by: also how a sparse MLP leaves most of it out.
_LOCAL = ("same", "join", "add", "mul", "div", "power", "tanh", "erf", "sigmoid", "gelu", "mean", "root", "relu")


class UnknownWayError(Exception):
    """An operator lies on the way of which it is not known what it does to a factor."""


@dataclass(frozen=True)
class Scores:
    """What scores, or logits, are: `factor` times a product, `cap` times the tanh of that where there is one."""

    product: Operation
    factor: Number
    cap: Number | None = None

    @property
    def whole(self) -> Number:
        """The factor of all: that inside of a soft cap times the cap."""
        return self.factor if self.cap is None else self.factor * self.cap


def gelus(program: Program) -> Iterator[tuple[str, str | None]]:
    """For each linear that a GELU follows its weight, and `tanh`, `erf`, `sigmoid` or `silu`; None if unknown."""
    for place, operation in enumerate(program.operations):
        if operation.kind == "linear" and operation.weight and role_of(operation.weight) in GATES:
            yield operation.weight, _function(program, list(_region(program, place)))


def _region(program: Program, place: int) -> Iterator[Operation]:
    """The operations after one whose inputs all come from it alone, and constants."""
    known = set(program.operations[place].outputs)
    waiting = sorted({user for value in known for user in program.users.get(value, ())})
    done: set[int] = set()
    while waiting:
        user = heapq.heappop(waiting)
        operation = program.operations[user]
        alone = all(not value or value in known or value in program.fixed for value in operation.inputs)
        if user in done or operation.kind not in _LOCAL or not (alone or operation.kind == "same"):
            continue
        done.add(user)
        yield operation
        for value in operation.outputs:
            known.add(value)
            for after in program.users.get(value, ()):
                heapq.heappush(waiting, after)


def _function(program: Program, region: list[Operation]) -> str | None:
    kinds, modes = {item.kind for item in region}, {item.mode for item in region if item.kind == "gelu"}
    numbers = [program.numbers[value] for item in region for value in item.inputs if value in program.numbers]

    def has(value: float) -> bool:
        return any(number.is_near(value) for number in numbers)

    if modes:
        return modes.pop() if len(modes) == 1 else None
    if "erf" in kinds:
        return "erf"
    if "tanh" in kinds:
        return "tanh" if has(CUBIC) and has(ROOT) else None
    if "sigmoid" in kinds:
        return "sigmoid" if has(QUICK) else None if numbers else "silu"
    return None


def attentions(program: Program) -> Iterator[tuple[str, Scores | None]]:
    """For each attention the weight that its queries come from, and its scores; None if they are not understood.

    The factor of an operator that takes one over the root of a head's size is left to whoever knows that: it is None
    in `Scores.product.factor`.
    """
    ways = _Ways(program)
    for operation in program.of_kind("attention", "softmax"):
        if operation.kind == "attention":
            product: Operation | None = operation
        else:
            product = ways.product(operation.inputs[0])
        weight = None if product is None else ways.queries(product)
        if weight is None:
            continue  # of no attention, or of somebody else's making
        try:
            yield weight, ways.fused(operation) if operation is product else ways.scores(operation.inputs[0])
        except UnknownWayError:
            yield weight, None


def logits(program: Program) -> Iterator[Scores | None]:
    """For each output that is the head's product, by what it is multiplied and capped; None if not understood."""
    ways = _Ways(program)
    for value in program.outputs:
        product = ways.product(value)
        if product is not None and product.weight and role_of(product.weight) in HEADS:
            try:
                yield ways.scores(value)
            except UnknownWayError:
                yield None


def norms(program: Program) -> Iterator[tuple[str, str | None, Number]]:
    """For each norm the operator's name, its weight if it has a known one, and what is added to the mean square."""
    for operation in program.of_kind("norm"):
        if operation.epsilon is not None:
            yield operation.name, operation.weight, operation.epsilon
    for operation in program.of_kind("root"):
        source = program.makers.get(operation.inputs[0])
        epsilon = operation.epsilon
        if source is not None and source.kind == "add":  # the mean and a number
            added = [program.numbers[value] for value in source.inputs if value in program.numbers]
            free = [value for value in source.inputs if value not in program.fixed]
            epsilon = added[0] if len(added) == len(free) == 1 else None
            source = program.makers.get(free[0]) if epsilon is not None else None
        if epsilon is not None and source is not None and source.kind == "mean":
            yield operation.name, _multiplies(program, operation), epsilon


def _multiplies(program: Program, root: Operation) -> str | None:
    """The weight of a norm in several operators, by which what it gives is multiplied next."""
    values, steps = list(root.outputs), 4  # the root's inverse, its product with what is normed, casts between them
    while values and steps:
        users = [program.operations[place] for value in values for place in program.users.get(value, ())]
        weights = [program.behind(value) for user in users if user.kind == "mul" for value in user.inputs]
        found = next((weight for weight in weights if weight is not None), None)
        if found is not None:
            return found
        after = [user for user in users if user.kind in ("same", "mul", "div", "root")]
        values, steps = [value for user in after for value in user.outputs], steps - 1
    return None


class _Ways:
    """Ways back from values to the products that they come from."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._gains: dict[str, Number | None] = {}
        self._products: dict[str, Operation | None] = {}

    def product(self, value: str, steps: int = STEPS) -> Operation | None:
        """The product that a value is, but for factors, sums, masks and a cap; None if there is none, or several."""
        if value not in self._products:
            maker = self._program.makers.get(value)
            found: Operation | None = None
            if maker is not None and maker.kind in ("matmul", "linear"):
                found = maker
            elif maker is not None and steps and maker.kind in ("same", "join", "add", "mul", "div", "tanh"):
                inputs = maker.inputs[:1] if maker.kind == "same" else maker.inputs
                sources = [item for source in inputs if (item := self.product(source, steps - 1)) is not None]
                found = sources[0] if len(sources) == 1 else None
            self._products[value] = found
        return self._products[value]

    def scores(self, value: str) -> Scores:
        """What a value is that comes from a product. Raises UnknownWayError for what is more than factors and a cap."""
        product, maker = self.product(value), self._program.makers[value]
        assert product is not None
        if maker is product:
            return Scores(product, self._factor(product))
        source = next(item for item in maker.inputs if self.product(item) is product)
        found = self.scores(source)
        if maker.kind == "tanh":
            if found.cap is not None:
                raise UnknownWayError
            return replace(found, cap=ONE)
        if maker.kind not in ("mul", "div"):
            return found
        number = self._number(maker, source)
        if found.cap is not None:
            return replace(found, cap=found.cap * number)
        return replace(found, factor=found.factor * number)

    def fused(self, operation: Operation) -> Scores:
        """The scores inside of an operator of attention."""
        query, *keys = operation.inputs
        factor = (operation.factor or ONE) * (self.gain(query) or ONE) * (self._joined(keys) or ONE)
        if operation.softcap is None:
            return Scores(operation, factor)
        within = operation.softcap.inverse()
        if within is None:
            raise UnknownWayError
        return Scores(operation, factor * within, operation.softcap)

    def queries(self, product: Operation) -> str | None:
        """The weight of the linear that an attention's queries come from; None where it is not a single one."""
        inputs = product.inputs[:1] if product.kind == "attention" else product.inputs
        found, waiting, seen = set(), list(inputs), set(inputs)
        while waiting:
            maker = self._program.makers.get(waiting.pop())
            if maker is None or maker.kind in ("matmul", "attention", "softmax"):
                continue
            if maker.kind == "linear":
                found |= {maker.weight} if maker.weight and role_of(maker.weight) is Role.Q else set()
                continue
            more = [value for value in maker.inputs if value not in seen]
            seen |= set(more)
            waiting += more
        return found.pop() if len(found) == 1 and product.kind != "linear" else None

    def _factor(self, product: Operation) -> Number:
        """What a product is multiplied by: a factor of its own, and those of its inputs since their norms."""
        found = product.factor or ONE
        for value in product.inputs:
            found = found * (self.gain(value) or ONE)
        return found

    def gain(self, value: str) -> Number | None:
        """By what a value was multiplied since the last norm; None of what comes from no norm, as a table's rows do.

        Raises UnknownWayError where an operator is not known.
        """
        if value not in self._gains:
            self._gains[value] = self._gain(value)
        return self._gains[value]

    def _gain(self, value: str) -> Number | None:
        maker = self._program.makers.get(value)
        if maker is None or value in self._program.fixed:
            return None
        if maker.kind == "norm":
            return ONE
        if maker.kind == "same":
            return self.gain(maker.inputs[0])
        if maker.kind == "linear":
            own = self.gain(maker.inputs[0])
            return own if own is None else own * (maker.factor or ONE)
        if maker.kind == "attention" and value in maker.outputs[1:2]:  # the keys of all positions so far
            return self._joined(maker.inputs[1:])
        if maker.kind in ("join", "add"):
            return self._joined(maker.inputs)
        if maker.kind in ("mul", "div"):
            return self._multiplied(maker)
        raise UnknownWayError

    def _joined(self, values: tuple[str, ...] | list[str]) -> Number | None:
        """The gain that all of some values have, those apart that have none."""
        found = [gain for value in values if value and (gain := self.gain(value)) is not None]
        if any(not item.agrees(found[0]) for item in found):
            raise UnknownWayError
        return found[0] if found else None

    def _multiplied(self, maker: Operation) -> Number | None:
        first, second = maker.inputs
        numbers = self._program.numbers
        if second in numbers or (first in numbers and maker.kind == "mul"):
            source = first if second in numbers else second
            own = self.gain(source)
            return own if own is None else own * self._number(maker, source)
        if self._norms(second) or (maker.kind == "mul" and self._norms(first)):
            return ONE
        gains = [gain for value in maker.inputs if (gain := self.gain(value)) is not None]
        if len(gains) > 1 or (maker.kind == "div" and self.gain(second) is not None):
            raise UnknownWayError
        return gains[0] if gains else None

    def _norms(self, value: str) -> bool:
        """Whether a value is a root of a mean, or one over it: what a norm in several operators multiplies by."""
        rooted, maker = False, self._program.makers.get(value)
        while maker is not None and maker.kind in ("same", "add", "div", "root"):
            rooted = rooted or maker.kind == "root"
            read = maker.inputs[:1] if maker.kind == "same" else maker.inputs
            free = [item for item in read if item not in self._program.fixed]
            maker = self._program.makers.get(free[0]) if len(free) == 1 else None
        return rooted and maker is not None and maker.kind == "mean"

    def _number(self, maker: Operation, source: str) -> Number:
        """What a value is multiplied by, of the two inputs that are not the source."""
        other = maker.inputs[1] if maker.inputs[0] == source else maker.inputs[0]
        found = self._program.numbers.get(other)
        if found is not None and maker.kind == "div":
            found = found.inverse() if maker.inputs[0] == source else None
        if found is None:
            raise UnknownWayError
        return found
