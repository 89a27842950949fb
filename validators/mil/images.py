"""MIL operations on images `[…, height, width]`: blocks of pixels into channels and back, cropping.

Each says what coremltools' reference of its name says (coremltools.converters.mil.mil.ops.defs, image_resizing.py and
tensor_transformation.py).
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from gemexport.validators.mil.registry import integer, integers, op


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
