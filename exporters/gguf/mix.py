"""Which block type each matrix gets in a K-quant file: Q4_K_M and its like are mixes of types, not types.

The rules are llama.cpp's (`llama_tensor_get_type` and `tensor_allows_quantization` in src/llama-quant.cpp) as far as
they concern a Gemma decoder; the tests hold them against tables that llama-quantize printed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Type

Chosen = Callable[[int, int], bool]  # (i, n): whether the i-th of n projections gets the better type

HEADS = ("token_embd.weight", "per_layer_token_embd.weight")  # the head's type is theirs too where there is no other
_LEFT_ALONE = ("per_layer_model_proj", "ffn_gate_inp")  # small ones that llama.cpp never quantizes
_PROJECTION = re.compile(r"blk\.(\d+)\.(attn_v|ffn_down)")
# For rows that are no multiple of 256, the block of all K types; it is F16 where 32 does not divide them either.
_FALLBACK = {Type.Q4_K: Type.Q5_0, Type.Q5_K: Type.Q5_1, Type.Q6_K: Type.Q8_0}


def _none(i: int, n: int) -> bool:
    return False


def _first_four(i: int, n: int) -> bool:
    return i < 4


def _first_eighth(i: int, n: int) -> bool:
    return i < n // 8


def _spread(i: int, n: int) -> bool:
    """The first and the last eighth, and every third between."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


@dataclass(frozen=True)
class Mix:
    """`base` for a decoder's matrices, `better` for the value and down projections of some layers; heads are Q6_K."""

    base: Type
    better: Type
    values: Chosen = _none  # counts the layers that have a value projection
    downs: Chosen = _none  # counts all layers


MIXES = {
    "Q4_K_S": Mix(Type.Q4_K, Type.Q5_K, _first_four, _first_eighth),
    "Q4_K_M": Mix(Type.Q4_K, Type.Q6_K, _spread, _spread),
    "Q5_K_S": Mix(Type.Q5_K, Type.Q5_K),
    "Q5_K_M": Mix(Type.Q5_K, Type.Q6_K, _spread, _spread),
    "Q6_K": Mix(Type.Q6_K, Type.Q6_K),
}


def types(mix: Mix, shapes: Mapping[str, tuple[int, ...]], layers: int) -> dict[str, Type]:
    """The type of every matrix that llama.cpp quantizes, in the order of `shapes`; what is not in it stays as it is.

    `shapes` are those of the whole file by its own names, `[out, in]`; `layers` is how many the decoder has.
    """
    values = sorted(layer for name in shapes if (layer := _layer(name, "attn_v")) is not None)
    tied = "output.weight" not in shapes
    found = {}
    for name, shape in shapes.items():
        # ggml drops leading axes of length one: a matrix of one row is a vector to it.
        if len(shape) != 2 or shape[0] == 1 or any(part in name for part in _LEFT_ALONE):
            continue
        if name == "output.weight" or (tied and name in HEADS):
            kind = Type.Q8_0 if shape[1] % _block(mix.base) else Type.Q6_K
        else:
            kind = mix.better if _is_better(mix, name, values, layers) else mix.base
        found[name] = _fitting(kind, shape[1])
    return found


def _layer(name: str, part: str) -> int | None:
    """The layer that this projection belongs to, None for other tensors."""
    match = _PROJECTION.match(name)
    return int(match[1]) if match and match[2] == part else None


def _is_better(mix: Mix, name: str, values: list[int], layers: int) -> bool:
    value, down = _layer(name, "attn_v"), _layer(name, "ffn_down")
    if value is not None:
        return mix.values(values.index(value), len(values))
    return down is not None and mix.downs(down, layers)


def _fitting(kind: Type, width: int) -> Type:
    if width % _block(kind):
        kind = _FALLBACK.get(kind, kind)
    return Type.F16 if width % _block(kind) else kind


def _block(kind: Type) -> int:
    return GGML_QUANT_SIZES[kind][0]
