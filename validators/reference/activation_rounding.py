"""Static activation rounding in a transformers model: what goes in and out of its linears, and what its caches hold.

transformers' own mobile layers do the first (`transformers.integrations.gemma_quant.apply_srq`) and ignore the scales
of caches; here both are hooks, so that any model in any transformers can have them.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gemexport.formats.activations import Activations, CacheActivations, Quantizer
from gemexport.formats.gemma.architecture import Architecture
from gemexport.formats.gemma.names import attention_module, module_of

ATTENTION = "gemexport_rounded_cache"  # transformers' eager attention on rounded keys and values
_CACHE = "_gemexport_cache"


def rounded(x: torch.Tensor, quantizer: Quantizer | None) -> torch.Tensor:
    """`x` on the quantizer's integers, in `x`'s dtype; `x` itself without one."""
    if quantizer is None:
        return x
    scale = torch.tensor(quantizer.scale, dtype=torch.float32).to(x.dtype)
    low, high = quantizer.limits
    codes = torch.clamp(torch.round(x / scale) + quantizer.zero_point, low, high)
    return (codes - quantizer.zero_point) * scale


def attention_implementation(activations: Activations | None) -> str:
    """The name of the attention that a model with these activations needs."""
    if activations is None or not activations.caches:
        return "eager"
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, eager_mask)
    return ATTENTION


def install(model: Any, activations: Activations, decoder: Architecture) -> None:
    """Round what goes through the linears and caches of `model`, a text decoder, from now on."""
    for weight, both in activations.linears.items():
        module = model.get_submodule(module_of(weight))
        _round_linear(module, both.input, both.output)
    for layer in decoder.layers:
        # A layer that reads another's cache reads what that one remembered.
        cache = activations.caches.get(layer.kv_source, CacheActivations())
        setattr(model.get_submodule(attention_module(layer.index)), _CACHE, cache)


def _round_linear(module: torch.nn.Module, before: Quantizer | None, after: Quantizer | None) -> None:
    if before is not None:
        module.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0], before), *inputs[1:]))
    if after is not None:
        module.register_forward_hook(lambda _, inputs, output: rounded(output, after))


def _attend(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **options: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """transformers' eager attention; rounding what was rounded before changes nothing, so the cache may hold either."""
    cache: CacheActivations = getattr(module, _CACHE)
    eager = sys.modules[type(module).__module__].eager_attention_forward
    found: tuple[torch.Tensor, torch.Tensor | None] = eager(
        module, query, rounded(key, cache.key), rounded(value, cache.value), mask, **options
    )
    return found
