"""MIL operations that slide a window: convolutions, their transposes, pools.

Each says what coremltools' reference of its name says (coremltools.converters.mil.mil.ops.defs, conv.py and pool.py).
`x` is `[n, channels, *D]` with one to three spatial axes D; padding is before and after each of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gemexport.validators.mil.registry import Unsupported, flag, integer, integers, op


def _each(value: Any, x: Tensor) -> list[int]:
    """One number for each spatial axis; 1 where none is given."""
    return [1] * (x.ndim - 2) if value is None else integers(value)


def _around(x: Tensor, pad_type: str, pad: Any, kernel: list[int], strides: list[int]) -> list[int]:
    """Padding before and after each spatial axis, first axis first; `kernel` counts what dilation spreads."""
    if pad_type == "custom":
        return integers(pad)
    if pad_type == "valid":
        return [0] * (2 * len(kernel))
    found = []
    for size, reach, stride in zip(x.shape[2:], kernel, strides, strict=True):
        total = max(0, (math.ceil(size / stride) - 1) * stride + reach - size)
        small, large = total // 2, total - total // 2
        found += [large, small] if pad_type == "same_lower" else [small, large]
    return found


def _padded(x: Tensor, around: list[int], value: float = 0.0) -> Tensor:
    # F.pad names the last axis first.
    pairs = [around[i : i + 2] for i in range(0, len(around), 2)]
    return F.pad(x, [size for pair in reversed(pairs) for size in pair], value=value)


def _reach(weight: Tensor, dilations: list[int]) -> list[int]:
    return [(size - 1) * dilation + 1 for size, dilation in zip(weight.shape[2:], dilations, strict=True)]


@op("conv")
def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    strides: Any = None,
    pad_type: str = "valid",
    pad: Any = None,
    dilations: Any = None,
    groups: Any = 1,
) -> Tensor:
    """Convolution by `weight` `[out, in / groups, *K]`."""
    stride, dilation = _each(strides, x), _each(dilations, x)
    x = _padded(x, _around(x, pad_type, pad, _reach(weight, dilation), stride))
    convolve = (F.conv1d, F.conv2d, F.conv3d)[x.ndim - 3]
    result: Tensor = convolve(x, weight, bias, stride=stride, dilation=dilation, groups=integer(groups))
    return result


@op("conv_transpose")
def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pad: Any = None,
    output_shape: Any = None,
    pad_type: str = "valid",
    strides: Any = None,
    dilations: Any = None,
    groups: Any = 1,
) -> Tensor:
    """The transpose of a convolution, by `weight` `[in, out / groups, *K]`; padding is cut off what comes out.

    An `output_shape` says how much is cut off at the end, or that zeros are added there.
    """
    stride, dilation = _each(strides, x), _each(dilations, x)
    transposed = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[x.ndim - 3]
    whole: Tensor = transposed(x, weight, None, stride=stride, dilation=dilation, groups=integer(groups))
    reach = _reach(weight, dilation)
    if pad_type == "custom" and pad is not None:
        cut = integers(pad)
    elif pad_type in ("same", "same_lower"):
        totals = [max(0, kernel - step) for kernel, step in zip(reach, stride, strict=True)]
        halves = [(total // 2, total - total // 2) for total in totals]
        cut = [size for pair in halves for size in (pair if pad_type == "same" else pair[::-1])]
    else:
        cut = [0] * (2 * len(stride))
    if output_shape is not None:
        for i, wanted in enumerate(integers(output_shape)[2:]):
            cut[2 * i + 1] = whole.shape[2 + i] - cut[2 * i] - wanted
    elif pad_type == "same":
        for i, (size, step) in enumerate(zip(x.shape[2:], stride, strict=True)):
            cut[2 * i + 1] = whole.shape[2 + i] - cut[2 * i] - size * step
    y = _padded(whole, [-size for size in cut])
    return y if bias is None else y + bias.reshape(1, -1, *[1] * (x.ndim - 2))


def _windows(x: Tensor, kernel: list[int], strides: list[int]) -> Tensor:
    """`[n, channels, *D_out, *K]`: every window of `x`."""
    for axis, (size, step) in enumerate(zip(kernel, strides, strict=True)):
        x = x.unfold(2 + axis, size, step)
    return x


def _ceiling(x: Tensor, around: list[int], kernel: list[int], strides: list[int]) -> list[int]:
    """More padding at the end of each axis, so that a last window which begins inside counts as well."""
    wider = list(around)
    for i, (size, reach, step) in enumerate(zip(x.shape[2:], kernel, strides, strict=True)):
        padded = size + around[2 * i] + around[2 * i + 1]
        count = -(-(padded - reach) // step) + 1
        if (count - 1) * step >= size + around[2 * i] and around[2 * i] + around[2 * i + 1] > 0:
            count -= 1
        wider[2 * i + 1] += max(0, (count - 1) * step + reach - padded)
    return wider


def _pool(
    reduce: Callable[[Tensor, list[int]], Tensor],
    x: Tensor,
    kernel_sizes: Any,
    strides: Any,
    pad_type: str,
    pad: Any,
    ceil_mode: Any,
    padding: float,
) -> Tensor:
    kernel, steps = integers(kernel_sizes), _each(strides, x)
    around = _around(x, pad_type, pad, kernel, steps)
    if flag(ceil_mode):
        around = _ceiling(x, around, kernel, steps)
    windows = _windows(_padded(x, around, padding), kernel, steps)
    return reduce(windows, list(range(x.ndim, windows.ndim)))


@op("max_pool")
def max_pool(
    x: Tensor, kernel_sizes: Any, strides: Any = None, pad_type: str = "valid", pad: Any = None, ceil_mode: Any = False
) -> Tensor:
    return _pool(torch.amax, x, kernel_sizes, strides, pad_type, pad, ceil_mode, -math.inf)


@op("avg_pool")
def avg_pool(
    x: Tensor,
    kernel_sizes: Any,
    strides: Any = None,
    pad_type: str = "valid",
    pad: Any = None,
    exclude_padding_from_average: Any = False,
    ceil_mode: Any = False,
) -> Tensor:
    """Means; with `exclude_padding_from_average` of what lies inside alone."""
    if flag(ceil_mode) and not flag(exclude_padding_from_average):
        raise Unsupported("what counts beyond the padding in ceil_mode is not documented")
    total = _pool(torch.sum, x, kernel_sizes, strides, pad_type, pad, ceil_mode, 0.0)
    if not flag(exclude_padding_from_average):
        return total / math.prod(integers(kernel_sizes))
    return total / _pool(torch.sum, torch.ones_like(x), kernel_sizes, strides, pad_type, pad, ceil_mode, 0.0)


@op("l2_pool")
def l2_pool(
    x: Tensor, kernel_sizes: Any, strides: Any = None, pad_type: str = "valid", pad: Any = None, ceil_mode: Any = False
) -> Tensor:
    return torch.sqrt(_pool(torch.sum, x * x, kernel_sizes, strides, pad_type, pad, ceil_mode, 0.0))


@op("sliding_windows")
def sliding_windows(x: Tensor, axis: Any, size: Any, stride: Any = 1) -> Tensor:
    """`[…, windows, size, …]`: every window along an axis."""
    at = integer(axis) % x.ndim
    return x.unfold(at, integer(size), integer(stride)).movedim(-1, at + 1)
