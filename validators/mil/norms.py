"""MIL operations that normalise, and scaled dot-product attention.

Each says what coremltools' reference of its name says (coremltools.converters.mil.mil.ops.defs, normalization.py and
iOS18/transformers.py).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gemexport.validators.mil.registry import integer, integers, number, op


def _shaped(parameter: Tensor | None, shape: list[int], default: float) -> Tensor:
    return torch.tensor(default) if parameter is None else parameter.reshape(shape)


@op("layer_norm")
def layer_norm(
    x: Tensor, axes: Any = None, gamma: Tensor | None = None, beta: Tensor | None = None, epsilon: Any = 1e-5
) -> Tensor:
    """Gamma and beta have the shape of `x` along the axes alone, in the order of the axes of `x`."""
    over = sorted(axis % x.ndim for axis in (range(x.ndim) if axes is None else integers(axes)))
    shape = [size if axis in over else 1 for axis, size in enumerate(x.shape)]
    centred = x - x.mean(over, keepdim=True)
    y = centred * torch.rsqrt((centred * centred).mean(over, keepdim=True) + number(epsilon))
    return y * _shaped(gamma, shape, 1) + _shaped(beta, shape, 0)


@op("batch_norm")
def batch_norm(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: Any = 1e-5,
) -> Tensor:
    return F.batch_norm(x, mean, variance, gamma, beta, training=False, eps=number(epsilon))


@op("instance_norm")
def instance_norm(x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, epsilon: Any = 1e-5) -> Tensor:
    """Over the spatial axes of `[n, channels, *D]`, one image and channel at a time."""
    over = list(range(2, x.ndim))
    shape = [1, x.shape[1], *[1] * len(over)]
    y = (x - x.mean(over, keepdim=True)) * torch.rsqrt(x.var(over, correction=0, keepdim=True) + number(epsilon))
    return y * _shaped(gamma, shape, 1) + _shaped(beta, shape, 0)


@op("l2_norm")
def l2_norm(x: Tensor, epsilon: Any = 1e-6) -> Tensor:
    return x * torch.rsqrt(torch.sum(x * x, [-3, -2, -1], keepdim=True) + number(epsilon))


@op("local_response_norm")
def local_response_norm(x: Tensor, size: Any, alpha: Any = 1e-4, beta: Any = 0.75, k: Any = 1.0) -> Tensor:
    """Over `size` channels, of an even number one more before than after, as PyTorch does.

    The documentation has the channels in the second axis; of three axes they are the first, by the numbers of
    coremltools' test (iOS14/test_normalization.py).
    """
    axis, width = (0 if x.ndim == 3 else 1), integer(size)
    padded = F.pad((x * x).movedim(axis, -1), [width // 2, (width - 1) // 2])
    squares = padded.unfold(-1, width, 1).sum(-1).movedim(-1, axis)
    return x / (number(k) + number(alpha) / width * squares) ** number(beta)


@op("scaled_dot_product_attention")
def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """softmax(query key^T / sqrt(E) + mask) value, over the last two axes; a boolean mask says what takes part."""
    scores = torch.matmul(query, key.transpose(-1, -2)) / math.sqrt(query.shape[-1])
    if attn_mask is not None:
        keep = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -math.inf) if keep else scores + attn_mask
    return torch.matmul(torch.softmax(scores, -1), value)
