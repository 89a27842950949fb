"""MIL operations that bend a value element by element, and softmax.

Each says what coremltools' reference of its name says (coremltools.converters.mil.mil.ops.defs, activation.py).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gemexport.validators.mil.registry import integer, number, op


@op("gelu")
def gelu(x: Tensor, mode: str = "EXACT") -> Tensor:
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="tanh" if mode == "TANH_APPROXIMATION" else "none")


@op("leaky_relu")
def leaky_relu(x: Tensor, alpha: Any = 0.01) -> Tensor:
    return F.leaky_relu(x, number(alpha))


@op("clamped_relu")
def clamped_relu(x: Tensor, alpha: Any, beta: Any) -> Tensor:
    return torch.clamp(F.leaky_relu(x, number(alpha)), max=number(beta))


@op("thresholded_relu")
def thresholded_relu(x: Tensor, alpha: Any = 1.0) -> Tensor:
    return torch.where(x >= number(alpha), x, torch.zeros_like(x))


@op("prelu")
def prelu(x: Tensor, alpha: Tensor) -> Tensor:
    return torch.where(x > 0, x, x * _by_channel(alpha, x))


@op("softplus_parametric")
def softplus_parametric(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return _by_channel(alpha, x) * F.softplus(_by_channel(beta, x) * x)


def _by_channel(parameter: Tensor, x: Tensor) -> Tensor:
    """A vector along the second axis, shaped to broadcast with `x`."""
    return parameter.reshape(1, -1, *[1] * (x.ndim - 2))


@op("elu")
def elu(x: Tensor, alpha: Any = 1.0) -> Tensor:
    return F.elu(x, number(alpha))


@op("linear_activation")
def linear_activation(x: Tensor, alpha: Any = 1.0, beta: Any = 0.0) -> Tensor:
    return x * number(alpha) + number(beta)


@op("scaled_tanh")
def scaled_tanh(x: Tensor, alpha: Any = 1.0, beta: Any = 1.0) -> Tensor:
    return number(alpha) * torch.tanh(x * number(beta))


@op("sigmoid_hard")
def sigmoid_hard(x: Tensor, alpha: Any = 0.2, beta: Any = 0.5) -> Tensor:
    return torch.clamp(number(alpha) * x + number(beta), 0, 1)


@op("softmax")
def softmax(x: Tensor, axis: Any = -1) -> Tensor:
    return torch.softmax(x, integer(axis))
