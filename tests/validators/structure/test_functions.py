"""Functions and factors are known in the spellings that others give them; of what is not known nothing is said."""

from __future__ import annotations

from math import pi, sqrt

import pytest

from gemexport.formats.gemma.names import CANONICAL
from gemexport.formats.gemma.roles import Role
from gemexport.validators.structure import functions
from gemexport.validators.structure.program import Kind, Number, Operation, Program

GATE, Q, K = (CANONICAL.name(role, 0) for role in (Role.GATE, Role.Q, Role.K))
Step = tuple[Kind, str, tuple[str | float, ...]]  # what gives a value of that name out of others and numbers


def program(*steps: Step, weights: dict[str, str] | None = None) -> Program:
    """A program of steps; a linear's weight goes by the name of its value."""
    found = Program(outputs=(steps[-1][1],))
    for kind, name, inputs in steps:
        read = []
        for value in inputs:
            label = str(value)
            read.append(label)
            if isinstance(value, float):
                found.fixed.add(label)
                found.numbers[label] = Number(value)
        found.add(Operation(kind, name, tuple(read), (name,), weight=(weights or {}).get(name)))
    return found


def after_gate(*steps: Step) -> str | None:
    first: Step = ("linear", "h", ("x",))
    last: Step = ("mul", "gated", ("y", "up"))
    ((weight, mode),) = functions.gelus(program(first, *steps, last, weights={"h": GATE}))
    assert weight == GATE
    return mode


def tanh_form(cubic: float, root: float) -> tuple[Step, ...]:
    return (
        ("power", "cube", ("h", 3.0)), ("mul", "a", ("cube", cubic)), ("add", "b", ("h", "a")),
        ("mul", "c", ("b", root)), ("tanh", "t", ("c",)), ("add", "d", ("t", 1.0)), ("mul", "half", ("h", 0.5)),
        ("mul", "y", ("half", "d")),
    )  # fmt: skip


def test_gelu_in_several_operators_is_known() -> None:
    assert after_gate(*tanh_form(0.044715, sqrt(2 / pi))) == "tanh"
    assert after_gate(*tanh_form(0.0447, sqrt(2 / pi))) is None
    assert after_gate(*tanh_form(0.044715, 0.79)) is None
    erf: tuple[Step, ...] = (
        ("div", "a", ("h", sqrt(2))), ("erf", "b", ("a",)), ("add", "c", ("b", 1.0)), ("mul", "d", ("h", "c")),
        ("mul", "y", ("d", 0.5)),
    )  # fmt: skip
    assert after_gate(*erf) == "erf"
    assert after_gate(("mul", "a", ("h", 1.702)), ("sigmoid", "s", ("a",)), ("mul", "y", ("h", "s"))) == "sigmoid"
    assert after_gate(("sigmoid", "s", ("h",)), ("mul", "y", ("h", "s"))) == "silu"
    assert after_gate(("other", "y", ("h",))) is None


def heads(scale: float = 1.0) -> tuple[Step, ...]:
    """Queries and keys, normed in several operators, the queries multiplied by a number first."""
    steps: list[Step] = []
    for name in ("q", "k"):
        steps += [
            ("linear", f"{name}_linear", ("x",)),
            ("power", f"{name}_square", (f"{name}_linear", 2.0)), ("mean", f"{name}_mean", (f"{name}_square",)),
            ("add", f"{name}_eps", (f"{name}_mean", 1e-6)), ("root", f"{name}_root", (f"{name}_eps",)),
            ("div", f"{name}_normed", (f"{name}_linear", f"{name}_root")),
            ("mul", f"{name}_head", (f"{name}_normed", f"{name}_weight")),
        ]  # fmt: skip
    return (*steps, ("mul", "asked", ("q_head", scale)), ("same", "turned", ("k_head",)))


def scores(*steps: Step, scale: float = 1.0) -> functions.Scores | None:
    made = program(*heads(scale), *steps, ("softmax", "shares", ("masked",)), weights={"q_linear": Q, "k_linear": K})
    ((weight, found),) = functions.attentions(made)
    assert weight == Q
    return found


def test_a_scale_is_found_wherever_it_stands() -> None:
    product: Step = ("matmul", "scores", ("asked", "turned"))
    mask: Step = ("add", "masked", ("scaled", "mask"))
    found = scores(product, ("mul", "scaled", ("scores", 0.25)), mask)
    assert found is not None
    assert found.whole.value == 0.25
    found = scores(product, ("div", "scaled", ("scores", 8.0)), mask, scale=2.0)
    assert found is not None
    assert (found.whole.value, found.cap) == (0.25, None)


def test_a_cap_is_told_from_the_scale_inside_of_it() -> None:
    found = scores(
        ("matmul", "scores", ("asked", "turned")), ("div", "small", ("scores", 50.0)), ("tanh", "t", ("small",)),
        ("mul", "capped", ("t", 50.0)), ("join", "masked", ("capped", "least")), scale=0.0625,
    )  # fmt: skip
    assert found is not None
    assert found.cap is not None
    assert (found.cap.value, found.whole.value) == (50.0, 0.0625)


@pytest.mark.parametrize(
    "steps",
    [
        (("matmul", "scores", ("asked", "turned")), ("mul", "masked", ("scores", "per_head"))),
        (("other", "changed", ("asked",)), ("matmul", "masked", ("changed", "turned"))),
        (("add", "both", ("asked", "q_head")), ("matmul", "masked", ("both", "turned"))),
    ],
    ids=["by another value", "an unknown operator", "a sum of two scales"],
)
def test_of_what_is_not_understood_nothing_is_said(steps: tuple[Step, ...]) -> None:
    assert scores(*steps, scale=3.0) is None


def test_a_number_is_near_what_its_dtype_may_have_made_of_it() -> None:
    half = Number(0.0625 * (1 + 2.0**-12), 2.0**-11)
    assert half.is_near(0.0625)
    assert not Number(half.value).is_near(0.0625)
    assert not Number(1.002).is_near(1.0)


def test_an_operator_without_its_inputs_is_none_of_its_kind() -> None:
    made = Program()
    made.add(Operation("mul", "alone", ("x",), ("y",)))
    assert made.operations[0].kind == "other"
