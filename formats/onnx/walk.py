"""Ways through an ONNX graph between an initializer and the operators that compute with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

_SAME = frozenset(("Cast", "Identity"))  # give the values that they are given


@dataclass(frozen=True)
class Use:
    """An operator that reads a value as its input `index`, behind transposes by `orders`."""

    node: ir.Node
    index: int
    orders: tuple[tuple[int, ...], ...] = ()
    casts: tuple[str, ...] = ()  # the types that it was cast to on the way

    def reads(self, operator: str, index: int) -> bool:
        """Whether this is input `index` of an operator of that type."""
        return self.node.op_type == operator and self.index == index

    @property
    def called(self) -> str:
        """What to call the operator in a message."""
        return f"{self.node.op_type} {self.node.name}" if self.node.name else self.node.op_type

    @property
    def turned(self) -> bool:
        """Whether the value is a weight `[…, in, out]`: MatMul wants that, and Gemm unless it is told otherwise."""
        wanted = self.reads("MatMul", 1) or not attribute(self.node, "transB", 0)
        return wanted != (sum(swaps(order) for order in self.orders) % 2 == 1)


def uses(value: ir.Value) -> Iterator[Use]:
    """The operators that compute with a value, through casts and transposes."""
    for node, index in value.uses():
        if node.op_type in _SAME:
            cast = node.attributes.get("to")
            casts = () if cast is None else (type_name(cast.as_int()),)
            for use in uses(node.outputs[0]):
                yield Use(use.node, use.index, use.orders, casts + use.casts)
        elif node.op_type == "Transpose":
            for use in uses(node.outputs[0]):
                yield Use(use.node, use.index, (_order(node), *use.orders), use.casts)
        else:
            yield Use(node, index)


def _order(node: ir.Node) -> tuple[int, ...]:
    """The axes that a Transpose puts in order; empty where it turns all of them round."""
    order = node.attributes.get("perm")
    return () if order is None else tuple(int(axis) for axis in order.as_ints())


def swaps(order: tuple[int, ...]) -> bool:
    """Whether a transpose changes the last two axes and nothing else."""
    rank = len(order)
    return not order or order == (*range(rank - 2), rank - 1, rank - 2)


def type_name(number: int) -> str:
    """ONNX's name of an element type."""
    import onnx_ir as ir

    return ir.DataType(number).name


def turned(value: ir.Value) -> bool:
    """Whether a value is a weight `[…, in, out]`, the way round that MatMul wants it."""
    return any(use.turned for use in uses(value) if use.reads("MatMul", 1) or use.reads("Gemm", 1))


def multiplying(value: ir.Value) -> Use | None:
    """The product of matrices that a value is the weight of, dequantized or as it is; None where there is none."""
    for use in uses(value):
        if use.index == 1 and use.node.op_type in ("MatMul", "Gemm", "MatMulNBits"):
            return use
        if use.index == 0 and use.node.op_type in ("DequantizeLinear", "QuantizeLinear"):
            found = multiplying(use.node.outputs[0])
            if found is not None:
                return found
    return None


def attribute(node: ir.Node, name: str, default: int) -> int:
    """An integer attribute of an operator."""
    found = node.attributes.get(name)
    return default if found is None else int(found.as_int())


def constant(value: ir.Value | None) -> ir.Value | None:
    """The initializer behind a value, through casts."""
    producer = None if value is None else value.producer()
    return constant(producer.inputs[0]) if producer is not None and producer.op_type in _SAME else value
