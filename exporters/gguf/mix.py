"""Which block type each matrix gets in a K-quant file: Q4_K_M and its like are mixes of types, not types.

The rules are llama.cpp's (`llama_tensor_get_type` and `tensor_allows_quantization` in src/llama-quant.cpp) as far as
they concern a Gemma decoder; the tests hold them against tables that llama-quantize printed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Type

from gemexport.formats.gemma.architecture import GATHERINGS, SPREADS, TensorSpec
from gemexport.formats.gemma.roles import Kind, Role

Chosen = Callable[[int, int], bool]  # (i, n): whether the i-th of n projections gets the better type

# What llama.cpp never quantizes.
_LEFT_ALONE = {Role.PER_LAYER_MODEL_PROJECTION, Role.RESIDUAL_LEFT, Role.RESIDUAL_RIGHT, *SPREADS, *GATHERINGS}
_LEFT_ALONE |= {role for role in Role if role.kind in (Kind.ROUTER, Kind.MIXER)}
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


def types(mix: Mix, specs: Mapping[str, TensorSpec], layers: int) -> dict[str, Type]:
    """The type of every matrix that llama.cpp quantizes, in the order of `specs`; what is not in it stays as it is.

    `specs` are those of the whole file by its own names; `layers` is how many the decoder has.
    """
    values = sorted(spec.layer for spec in specs.values() if spec.role is Role.V and spec.layer is not None)
    tied = all(spec.role is not Role.HEAD for spec in specs.values())
    found = {}
    for name, spec in specs.items():
        # ggml drops leading axes of length one: a matrix of one row is a vector to it.
        if not spec.role.is_matrix or spec.shape[0] == 1 or spec.role in _LEFT_ALONE:
            continue
        width = spec.shape[1]
        if spec.role is Role.HEAD or (tied and spec.role.is_looked_up):  # the head's type, where there is no other
            kind = Type.Q8_0 if width % _block(mix.base) else Type.Q6_K
        else:
            kind = mix.better if _is_better(mix, spec, values, layers) else mix.base
        found[name] = _fitting(kind, width)
    return found


def _is_better(mix: Mix, spec: TensorSpec, values: list[int], layers: int) -> bool:
    if spec.layer is None:
        return False
    if spec.role is Role.V:
        return mix.values(values.index(spec.layer), len(values))
    return spec.role is Role.DOWN and mix.downs(spec.layer, layers)


def _fitting(kind: Type, width: int) -> Type:
    if width % _block(kind):
        kind = _FALLBACK.get(kind, kind)
    return Type.F16 if width % _block(kind) else kind


def _block(kind: Type) -> int:
    return GGML_QUANT_SIZES[kind][0]
