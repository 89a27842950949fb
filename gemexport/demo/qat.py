"""Puts weights on an integer grid the way quantization-aware training releases do: w = bf16(scale * code).

The demo model and the examples are made with it; the rules differ in how a block's scale follows from its weights,
so that nothing which finds grids again can rely on one of them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from gemexport.formats.tensor import Codes, Floats, expand, round_to, to_bf16

BLOCK = 32
LOWEST, HIGHEST = -8, 7
LEAST_SQUARES_ROUNDS = 4


def _largest(blocks: Floats) -> Floats:
    return np.asarray(np.abs(blocks).max(axis=-1), np.float32)


def _farthest(blocks: Floats) -> Floats:
    """The weight of largest magnitude, with its sign."""
    place = np.abs(blocks).argmax(axis=-1)
    return np.asarray(np.take_along_axis(blocks, place[..., None], axis=-1)[..., 0], np.float32)


def _round_codes(blocks: Floats, scales: Floats) -> Floats:
    """The nearest codes of `[rows, blocks, block]` weights; zero where the scale is zero."""
    safe = np.where(scales != 0, scales, np.float32(1))[..., None]
    return np.asarray(np.clip(np.rint(blocks / safe), LOWEST, HIGHEST), np.float32)


def _least_squares(blocks: Floats) -> Floats:
    """Scales that minimise sum (w - s q)^2, by alternating between the codes and the scale."""
    scales = _largest(blocks) / np.float32(7.5)
    for _ in range(LEAST_SQUARES_ROUNDS):
        codes = _round_codes(blocks, scales)
        norm = (codes * codes).sum(axis=-1)
        fitted = (codes * blocks).sum(axis=-1) / np.where(norm > 0, norm, np.float32(1))
        scales = np.where(norm > 0, fitted, scales).astype(np.float32)
    return scales


_BF16_RULES: dict[str, Callable[[Floats], Floats]] = {
    "max/7": lambda blocks: _largest(blocks) / np.float32(7),
    "max/8": lambda blocks: _largest(blocks) / np.float32(8),
    "max/7.5": lambda blocks: _largest(blocks) / np.float32(7.5),
    "max/-8": lambda blocks: _farthest(blocks) / np.float32(-8),
    "least-squares": _least_squares,
    "row": lambda blocks: _largest(blocks) / np.float32(7.5),
}
RULES = (*_BF16_RULES, "f16")


def quantize(weights: Floats, rule: str = "max/7.5") -> tuple[Codes, Floats]:
    """Codes `[out, in]` in -8…7 and scales `[out, in // block]` for weights `[out, in]`.

    The rules: `max/k` takes a block's largest magnitude over k, `max/-8` its largest weight with its sign, as
    llama.cpp's Q4_0 does, which makes half of the scales negative; `least-squares` fits the scale; `f16` is max/7.5
    with scales rounded to float16 instead of bfloat16; `row` is max/7.5 with one scale a row. Blocks are 32 weights.
    Raises ValueError for a rule that is not one of RULES, or a row that blocks do not fill.
    """
    if rule not in RULES:
        raise ValueError(f"{rule!r} is not a scale rule; the rules are {', '.join(RULES)}")
    out, width = weights.shape
    block = width if rule == "row" else BLOCK
    if width % block:
        raise ValueError(f"rows of {width} weights are not whole blocks of {block}")
    blocks = weights.astype(np.float32, copy=False).reshape(out, width // block, block)
    if rule == "f16":
        scales = round_to(_BF16_RULES["max/7.5"](blocks), "f16")
    else:
        scales = round_to(_BF16_RULES[rule](blocks), "bf16")
    codes = _round_codes(blocks, scales) * (scales != 0)[..., None]
    return codes.astype(np.int8).reshape(out, width), scales


def on_grid(weights: Floats, rule: str = "max/7.5") -> NDArray[np.uint16]:
    """The bfloat16 bit patterns `[out, in]` of weights put on a grid by `rule`."""
    codes, scales = quantize(weights, rule)
    values: Floats = codes.astype(np.float32) * expand(scales, weights.shape[1] // scales.shape[1])
    return to_bf16(values)
