"""Static activation scales in compressed-tensors folders: of what goes into linears and comes out, and of caches.

A linear has `input_scale` and `output_scale`, perhaps with `input_zero_point`, as its config group says; an attention
has `k_scale` and `v_scale` where config.json has a `kv_cache_scheme`. Integers are signed
(compressed_tensors.quantization: calculate_range, initialize_qparams).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from gemexport.formats.activations import Activations, CacheActivations, Quantizer
from gemexport.formats.checkpoint import read_config
from gemexport.formats.compressed_tensors.settings import Args
from gemexport.formats.gemma.architecture import Architecture
from gemexport.formats.gemma.names import attention_module, canonical_name
from gemexport.formats.quantized import floats
from gemexport.formats.storage.errors import InputError
from gemexport.formats.storage.safetensors import FLOAT_DTYPES, MappedArray, read_folder

CACHE_SCALES = {"key": "k_scale", "value": "v_scale"}
SAVE_AGAIN = "download or save the model again"


def activations(path: str | Path) -> Activations | None:
    """What transformers computes with in folder `path`; None also where it unpacks while it loads.

    With `dequantize` transformers 5.23 makes a plain model, which rounds no activations.
    """
    from gemexport.formats.compressed_tensors import source

    config = read_config(Path(path))
    settings = config.get("quantization_config") or {}
    if settings.get("dequantize") or not settings.get("config_groups"):
        return None
    return source(Path(path), config).activations


def quantizer(arrays: Mapping[str, MappedArray], kind: str, args: Args) -> Quantizer | None:
    """That of a module's arrays `kind`_scale and `kind`_zero_point; None where it is not one static range of integers.

    Raises InputError for a scale that is no positive number, and a zero point that is none of the integers.
    """
    stored = arrays.get(f"{kind}_scale")
    static = args.type == "int" and args.dynamic is False and args.strategy in (None, "tensor")
    if stored is None or not static or not 2 <= args.num_bits <= 16 or stored.array.size != 1:
        return None
    if stored.entry.dtype not in FLOAT_DTYPES:
        return None
    scale = float(floats(stored, 0, 1).reshape(())) if stored.entry.shape else float(_number(stored))
    found = Quantizer(scale, _zero_point(arrays.get(f"{kind}_zero_point")), args.num_bits)
    low, high = found.limits
    if not 0 < scale < np.inf or not low <= found.zero_point <= high:
        problem = f"tensor {stored.entry.name} is {scale} with the zero point {found.zero_point}, no range of integers"
        raise InputError(stored.path, problem, SAVE_AGAIN)
    return found


def _number(stored: MappedArray) -> np.floating:
    """The float of an array without dimensions."""
    raw = np.asarray(stored.array).reshape(1)
    found: np.floating = (
        (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)[0] if stored.entry.dtype == "BF16" else raw[0]
    )
    return found


def _zero_point(stored: MappedArray | None) -> int:
    if stored is None or stored.array.size != 1:
        return 0
    return int(np.asarray(stored.array).reshape(1)[0])


def caches(folder: Path, decoder: Architecture, args: Args | None) -> tuple[dict[int, CacheActivations], set[str]]:
    """The caches of the layers that own one, and the canonical names of the tensors that say so."""
    found: dict[int, CacheActivations] = {}
    names: set[str] = set()
    if args is None:
        return found, names
    arrays = {canonical_name(name): array for name, array in read_folder(folder).items()}
    for layer in decoder.layers:
        module = attention_module(layer.index)
        own = {key: arrays[f"{module}.{key}"] for key in CACHE_SCALES.values() if f"{module}.{key}" in arrays}
        kinds = {kind: quantizer(own, key.removesuffix("_scale"), args) for kind, key in CACHE_SCALES.items()}
        if layer.owns_cache and any(kinds.values()):
            found[layer.index] = CacheActivations(**kinds)
            names.update(f"{module}.{CACHE_SCALES[kind]}" for kind, item in kinds.items() if item is not None)
    return found, names
