"""MIL operations on images `[…, height, width]`: blocks of pixels into channels and back, cropping, resampling.

Each says what coremltools' reference of its name says (coremltools.converters.mil.mil.ops.defs, image_resizing.py and
tensor_transformation.py).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gemexport.validators.mil.registry import Unsupported, flag, integer, integers, number, op


@op("pixel_shuffle")
def pixel_shuffle(x: Tensor, upscale_factor: Any) -> Tensor:
    return F.pixel_shuffle(x, integer(upscale_factor))


@op("pixel_unshuffle")
def pixel_unshuffle(x: Tensor, downscale_factor: Any) -> Tensor:
    return F.pixel_unshuffle(x, integer(downscale_factor))


@op("depth_to_space")
def depth_to_space(x: Tensor, block_size: Any) -> Tensor:
    """`[n, c / b², h b, w b]`; the place within a block is the slowest part of the channel, as in TensorFlow."""
    n, c, h, w = x.shape
    b = integer(block_size)
    blocks = x.reshape(n, b, b, c // (b * b), h, w)
    return blocks.permute(0, 3, 4, 1, 5, 2).reshape(n, c // (b * b), h * b, w * b)


@op("space_to_depth")
def space_to_depth(x: Tensor, block_size: Any) -> Tensor:
    """`[n, c b², h / b, w / b]`: what depth_to_space undoes."""
    n, c, h, w = x.shape
    b = integer(block_size)
    blocks = x.reshape(n, c, h // b, b, w // b, b)
    return blocks.permute(0, 3, 5, 1, 2, 4).reshape(n, c * b * b, h // b, w // b)


@op("space_to_batch")
def space_to_batch(x: Tensor, block_shape: Any, paddings: Any) -> Tensor:
    """`[n a b, c, h / a, w / b]` after padding; the place within a block is the slowest part of the batch."""
    a, b = integers(block_shape)
    top, bottom, left, right = integers(paddings)
    x = F.pad(x, [left, right, top, bottom])
    n, c, h, w = x.shape
    blocks = x.reshape(n, c, h // a, a, w // b, b)
    return blocks.permute(3, 5, 0, 1, 2, 4).reshape(n * a * b, c, h // a, w // b)


@op("batch_to_space")
def batch_to_space(x: Tensor, block_shape: Any, crops: Any) -> Tensor:
    """`[n / (a b), c, h a, w b]`, cropped: what space_to_batch undoes."""
    a, b = integers(block_shape)
    n, c, h, w = x.shape
    blocks = x.reshape(a, b, n // (a * b), c, h, w)
    whole = blocks.permute(2, 3, 4, 0, 5, 1).reshape(n // (a * b), c, h * a, w * b)
    return _cropped(whole, *integers(crops))


def _cropped(x: Tensor, top: int, bottom: int, left: int, right: int) -> Tensor:
    return x[..., top : x.shape[-2] - bottom, left : x.shape[-1] - right]


@op("crop")
def crop(x: Tensor, crop_height: Any, crop_width: Any) -> Tensor:
    return _cropped(x, *integers(crop_height), *integers(crop_width))


def _grid(size: int, count: int, mode: str) -> Tensor:
    """Where along an axis of `size` the `count` samples lie, float64, for resize_bilinear's sampling modes."""
    steps = torch.arange(count, dtype=torch.float64)
    last = max(count - 1, 1)
    if mode == "ALIGN_CORNERS" and count == 1:
        points = (size - 1) / 2 + 0 * steps
    elif mode in ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS"):
        points = steps * (size - 1) / last
    elif mode == "DEFAULT":
        points = steps * (size - size / count) / last
    elif mode == "OFFSET_CORNERS":
        delta = max(1, size - 1) / count
        points = 0.5 * delta + steps * delta
    else:  # UNALIGN_CORNERS
        points = (steps + 0.5) * size / count - 0.5
    return points.clamp(0, size - 1)


def _along(x: Tensor, axis: int, points: Tensor) -> Tensor:
    """`x` sampled linearly at `points` along an axis."""
    below = points.floor().long()
    above = torch.clamp(below + 1, max=x.shape[axis] - 1)
    share = (points - below).to(x.dtype).reshape(-1, *[1] * (x.ndim - 1 - axis % x.ndim))
    low, high = x.index_select(axis, below), x.index_select(axis, above)
    return low + (high - low) * share


def _bilinear(x: Tensor, height: int, width: int, mode: str) -> Tensor:
    rows = _along(x, x.ndim - 2, _grid(x.shape[-2], height, mode))
    return _along(rows, x.ndim - 1, _grid(x.shape[-1], width, mode))


@op("resize_bilinear")
def resize_bilinear(
    x: Tensor, target_size_height: Any = 1, target_size_width: Any = 1, sampling_mode: str = "DEFAULT"
) -> Tensor:
    return _bilinear(x, integer(target_size_height), integer(target_size_width), sampling_mode)


@op("upsample_bilinear")
def upsample_bilinear(
    x: Tensor, scale_factor_height: Any = 1, scale_factor_width: Any = 1, align_corners: Any = True
) -> Tensor:
    height = math.floor(x.shape[-2] * number(scale_factor_height))
    width = math.floor(x.shape[-1] * number(scale_factor_width))
    return _bilinear(x, height, width, "STRICT_ALIGN_CORNERS" if flag(align_corners) else "UNALIGN_CORNERS")


@op("resize_nearest_neighbor")
def resize_nearest_neighbor(x: Tensor, target_size_height: Any, target_size_width: Any) -> Tensor:
    return _repeated(x, integer(target_size_height) / x.shape[-2], integer(target_size_width) / x.shape[-1])


@op("upsample_nearest_neighbor")
def upsample_nearest_neighbor(x: Tensor, scale_factor_height: Any = 1, scale_factor_width: Any = 1) -> Tensor:
    return _repeated(x, number(scale_factor_height), number(scale_factor_width))


def _repeated(x: Tensor, height: float, width: float) -> Tensor:
    if height != int(height) or width != int(width):
        raise Unsupported("which pixel is the nearest is not documented for factors that are no integers")
    return x.repeat_interleave(int(height), -2).repeat_interleave(int(width), -1)
