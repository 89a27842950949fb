"""Static activation scales in compressed-tensors: which of a checkpoint have a place, and their arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemexport.exporters.compressed_tensors.schemes import Integers, Scheme
from gemexport.formats.activations import Activations, CacheActivations, LinearActivations, Quantizer
from gemexport.formats.compressed_tensors.activations import CACHE_SCALES
from gemexport.formats.gemma.architecture import Architecture
from gemexport.formats.gemma.names import attention_module, module_of
from gemexport.formats.storage.safetensors import Entry
from gemexport.formats.tensor import DType, round_to


def signed(activations: Activations) -> Activations:
    """The same numbers by signed integers, which are the only ones that the library has."""

    def shifted(found: Quantizer | None) -> Quantizer | None:
        if found is None or found.signed:
            return found
        return replace(found, zero_point=found.zero_point - (1 << (found.bits - 1)), signed=True)

    return Activations(
        {name: LinearActivations(shifted(a.input), shifted(a.output)) for name, a in activations.linears.items()},
        {layer: CacheActivations(shifted(a.key), shifted(a.value)) for layer, a in activations.caches.items()},
    )


def held(activations: Activations, dtype: DType) -> bool:
    """Whether a dtype has every scale, so that loaders may cast them to it."""
    scales = [
        item.scale
        for both in (*activations.linears.values(), *activations.caches.values())
        for item in vars(both).values()
        if item is not None
    ]
    exact = np.array(scales, np.float32)
    return dtype == "f32" or bool(np.array_equal(round_to(exact, dtype), exact))


def placed(activations: Activations, packed: Mapping[str, Scheme], decoder: Architecture) -> Activations:
    """Those of packed linears, whose zero points are none or fit a byte, and the caches if all layers agree.

    The library rounds every layer's cache or none. Version 0.20 has vLLM know no zero points there, and cannot load a
    model with such a scheme whose layers differ in the size of their heads, as most of Gemma 4 do.
    """
    linears = {
        name: both
        for name, both in activations.linears.items()
        if name in packed and all(item is None or _fits(item) for item in vars(both).values())
    }
    wanted = {layer.index for layer in decoder.layers if layer.owns_cache}
    items = [item for both in activations.caches.values() for item in vars(both).values()]
    same = {item.bits if item is not None and item.zero_point == 0 else None for item in items}
    alike = len({layer.head_dim for layer in decoder.layers}) == 1
    whole = alike and activations.caches.keys() == wanted and len(same) == 1 and None not in same
    return Activations(linears, activations.caches if whole else {})


def _fits(found: Quantizer) -> bool:
    return found.zero_point == 0 or found.bits <= 8


def with_activations(packed: Mapping[str, Scheme], activations: Activations) -> dict[str, Scheme]:
    """The schemes of the modules, with the integers of what they read and write."""

    def integers(found: Quantizer | None) -> Integers:
        return () if found is None else (found.bits, found.zero_point == 0)

    return {
        name: replace(
            scheme, input=integers(activations.linear(name).input), output=integers(activations.linear(name).output)
        )
        for name, scheme in packed.items()
    }


def cache_scheme(activations: Activations) -> Integers:
    """The integers of all caches; () where they stay in floating point."""
    return next(((both.key.bits, True) for both in activations.caches.values() if both.key is not None), ())


def arrays(activations: Activations) -> Iterator[tuple[Entry, NDArray[Any]]]:
    """The arrays of one number that hold the scales, and the zero points that are not 0."""
    for name, linear in activations.linears.items():
        module = module_of(name)
        for side, found in vars(linear).items():
            if found is not None:
                yield Entry(f"{module}.{side}_scale", "F32", (1,)), np.array([found.scale], "<f4")
            if found is not None and found.zero_point:
                yield Entry(f"{module}.{side}_zero_point", "I8", (1,)), np.array([found.zero_point], np.int8)
    for layer, cache in activations.caches.items():
        for kind, found in vars(cache).items():
            if found is not None:
                name = f"{attention_module(layer)}.{CACHE_SCALES[kind]}"
                yield Entry(name, "F32", (1,)), np.array([found.scale], "<f4")
