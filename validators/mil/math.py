"""MIL operations that compute: elementwise, reductions, matrices, quantization.

Each says what coremltools' reference of its name says (coremltools.converters.mil.mil.ops.defs).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gemexport.validators.mil.registry import Weight, flag, integer, integers, number, op

_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs, "acos": torch.acos, "asin": torch.asin, "atan": torch.atan, "atanh": torch.atanh,
    "ceil": torch.ceil, "cos": torch.cos, "cosh": torch.cosh, "erf": torch.erf, "exp": torch.exp,
    "exp2": torch.exp2, "floor": torch.floor, "logical_not": torch.logical_not, "round": torch.round,
    "sign": torch.sign, "sin": torch.sin, "sinh": torch.sinh, "sqrt": torch.sqrt, "square": torch.square,
    "tan": torch.tan, "tanh": torch.tanh, "relu": F.relu, "relu6": F.relu6, "sigmoid": torch.sigmoid,
    "silu": F.silu, "softplus": F.softplus, "softsign": F.softsign, "identity": lambda x: x,
}  # fmt: skip
_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "pow": torch.pow, "mod": torch.remainder,
    "maximum": torch.maximum, "minimum": torch.minimum, "equal": torch.eq, "not_equal": torch.ne,
    "less": torch.lt, "less_equal": torch.le, "greater": torch.gt, "greater_equal": torch.ge,
    "logical_and": torch.logical_and, "logical_or": torch.logical_or, "logical_xor": torch.logical_xor,
    "floor_div": lambda x, y: torch.div(x, y, rounding_mode="floor"),
    "real_div": torch.true_divide,
}  # fmt: skip

# Of a weight in a file: so many bytes as f32 stay in the processor's cache, and memory that the allocator has is used
# again. In multiples of 16 rows the products are those of the whole.
SLICE, ROWS = 2 << 20, 16


def _unary(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def computed(x: Tensor) -> Tensor:
        return function(x)

    return computed


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def computed(x: Tensor, y: Tensor) -> Tensor:
        return function(x, y)

    return computed


for _name, _function in _UNARY.items():
    op(_name)(_unary(_function))
for _name, _two in _BINARY.items():
    op(_name)(_binary(_two))


@op("rsqrt")
def rsqrt(x: Tensor, epsilon: Any = 1e-12) -> Tensor:
    return torch.rsqrt(x + number(epsilon))


@op("inverse")
def inverse(x: Tensor, epsilon: Any = 1e-4) -> Tensor:
    return 1 / (x + number(epsilon))


@op("log")
def log(x: Tensor, epsilon: Any = 1e-45) -> Tensor:
    return torch.log(x + number(epsilon))


@op("clip")
def clip(x: Tensor, alpha: Any, beta: Any) -> Tensor:
    return torch.clamp(x, number(alpha), number(beta))


@op("threshold")
def threshold(x: Tensor, alpha: Any) -> Tensor:
    return torch.clamp(x, min=number(alpha))


@op("cast")
def cast(x: Tensor, dtype: str) -> Tensor:
    # Floats stay float32 here: to what a float is rounded, the declared type of the result says.
    if dtype == "bool":
        return x != 0
    return x.float() if dtype.startswith("fp") else torch.trunc(x).to(torch.int64) if x.is_floating_point() else x


@op("select")
def select(cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(cond, a, b)


def _axes(x: Tensor, axes: Any) -> list[int]:
    return list(range(x.ndim)) if axes is None else integers(axes)


def _reduction(function: Callable[[Tensor, list[int], bool], Tensor]) -> Callable[..., Tensor]:
    return lambda x, axes=None, keep_dims=False: function(x, _axes(x, axes), flag(keep_dims))


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted((axis % x.ndim for axis in axes), reverse=True):
        x = torch.prod(x, axis, keepdim=keep)
    return x


_REDUCTIONS: dict[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "reduce_sum": lambda x, axes, keep: torch.sum(x, axes, keepdim=keep),
    "reduce_mean": lambda x, axes, keep: torch.mean(x.float(), axes, keepdim=keep),
    "reduce_max": lambda x, axes, keep: torch.amax(x, axes, keepdim=keep),
    "reduce_min": lambda x, axes, keep: torch.amin(x, axes, keepdim=keep),
    "reduce_prod": _product,
    "reduce_l1_norm": lambda x, axes, keep: torch.sum(x.abs(), axes, keepdim=keep),
    "reduce_l2_norm": lambda x, axes, keep: torch.sqrt(torch.sum(x * x, axes, keepdim=keep)),
    "reduce_log_sum": lambda x, axes, keep: torch.log(torch.sum(x, axes, keepdim=keep)),
    "reduce_log_sum_exp": lambda x, axes, keep: torch.logsumexp(x, axes, keepdim=keep),
    "reduce_sum_square": lambda x, axes, keep: torch.sum(x * x, axes, keepdim=keep),
}
for _name, _reduce in _REDUCTIONS.items():
    op(_name)(_reduction(_reduce))


@op("reduce_argmax")
def reduce_argmax(x: Tensor, axis: Any = -1, keep_dims: Any = False, output_dtype: str = "int32") -> Tensor:
    return torch.argmax(x, integer(axis), keepdim=flag(keep_dims))


@op("reduce_argmin")
def reduce_argmin(x: Tensor, axis: Any = -1, keep_dims: Any = False, output_dtype: str = "int32") -> Tensor:
    return torch.argmin(x, integer(axis), keepdim=flag(keep_dims))


@op("linear", by_rows=("weight",))
def linear(x: Tensor, weight: Tensor | Weight, bias: Tensor | None = None) -> Tensor:
    """`x` `[…, in]` times the transpose of `weight` `[out, in]`, plus `bias` `[out]`; a weight in a file by slices."""
    if isinstance(weight, Weight):
        if weight.held is None:
            out, width = weight.shape
            step = max(ROWS, SLICE // (4 * width) // ROWS * ROWS)
            y = x.new_empty(*x.shape[:-1], out)
            for start in range(0, out, step):
                stop = min(start + step, out)
                y[..., start:stop] = F.linear(x, weight.rows(start, stop))
            return y if bias is None else y.add_(bias)
        weight = weight.held
    return F.linear(x, weight, bias)


@op("matmul", by_rows=("y",))
def matmul(x: Tensor, y: Tensor | Weight, transpose_x: Any = False, transpose_y: Any = False) -> Tensor:
    """`x` times `y`; of a stack of matrices in a file, one after the other. Integers times floats are floats."""
    # A vector is not transposed.
    x = x.transpose(-1, -2) if flag(transpose_x) and x.ndim > 1 else x
    if isinstance(y, Weight):
        if y.held is None and len(y.shape) == 3 == x.ndim and x.shape[0] in (1, y.shape[0]):
            each = x.expand(y.shape[0], *x.shape[1:])
            return torch.cat(
                [matmul(one[None], y.rows(i, i + 1), transpose_y=transpose_y) for i, one in enumerate(each)]
            )
        y = y.whole()
    y = y.transpose(-1, -2) if flag(transpose_y) and y.ndim > 1 else y
    kind = torch.promote_types(x.dtype, y.dtype)
    return torch.matmul(x.to(kind), y.to(kind))


@op("einsum")
def einsum(values: list[Tensor], equation: str) -> Tensor:
    return torch.einsum(equation, *values)


def _along(parameter: Tensor, x: Tensor, axis: Any) -> Tensor:
    """A scalar, or a vector along `axis`, shaped to broadcast with `x`."""
    if parameter.ndim == 0:
        return parameter
    shape = [1] * x.ndim
    shape[integer(axis)] = -1
    return parameter.reshape(shape)


@op("quantize")
def quantize(
    input: Tensor, scale: Tensor, output_dtype: str, zero_point: Tensor | None = None, axis: Any = None
) -> Tensor:
    codes = torch.round(input / _along(scale, input, axis))
    if zero_point is not None:
        codes = codes + _along(zero_point.float(), input, axis)
    low, high = (0, 255) if output_dtype == "uint8" else (-128, 127)
    return torch.clamp(codes, low, high)


@op("dequantize")
def dequantize(input: Tensor, scale: Tensor, zero_point: Tensor | None = None, axis: Any = None) -> Tensor:
    codes = input.float()
    if zero_point is not None:
        codes = codes - _along(zero_point.float(), input, axis)
    return codes * _along(scale, input, axis)
