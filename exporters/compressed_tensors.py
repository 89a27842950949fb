"""compressed-tensors: a checkpoint that `transformers.AutoModelForCausalLM` and vLLM load, its linears packed.

Codes and scales pass through unchanged in the format `pack-quantized`. Decompressed in bf16 they give the checkpoint's
own numbers back, bit for bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from gemexport.exporters.fitting import Answer, Container, fitting
from gemexport.exporters.result import Export, ignore
from gemexport.exporters.streaming import Waiting, count_rounded, rounding_note, stored, write_plain, write_settings
from gemexport.formats.bitpack import pack, words
from gemexport.formats.checkpoint import Checkpoint
from gemexport.formats.files import atomic
from gemexport.formats.safetensors import DTYPE_NAMES, Entry, ShardedWriter
from gemexport.formats.tensor import ITEM_BYTES, DType, Grid, Tensor, reblock, slices

VARIANTS: tuple[str, ...] = ("w4a16", "bf16")
CLASSES = {"gemma3": "Gemma3ForCausalLM", "gemma4": "Gemma4ForCausalLM"}
EMBEDDINGS = ("model.embed_tokens.weight", "model.embed_tokens_per_layer.weight")
HEAD = "lm_head.weight"
Scheme = tuple[int, int]  # bits, and the block of a scale; 0: a whole row


@dataclass
class _Plan:
    """What becomes of each tensor."""

    plain: DType | None  # of everything that is not packed; None: as in the source
    packed: dict[str, Scheme] = field(default_factory=dict)
    unpack_early: bool = False  # transformers is to unpack while it loads, not at the first forward pass
    rounded: dict[str, int] = field(default_factory=dict)  # scales of each tensor
    notes: list[str] = field(default_factory=list)


def export(
    checkpoint: Checkpoint,
    path: Path,
    *,
    variant: str = VARIANTS[0],
    pack_embeddings: bool = False,
    progress: Callable[[int], None] = ignore,
) -> Export:
    """Write `checkpoint` to the folder `path` for compressed-tensors; the decoder alone, if it came with towers.

    `w4a16` packs every linear that has a grid, with the grid's own bits and block; `bf16` packs nothing.
    `pack_embeddings` packs embeddings and per-layer embeddings as well.

    Loaders cast scales to the dtype of the model. Scales of a lattice that this would change are stored as f32, and
    the config asks transformers to unpack while it loads, before it casts; it also has to for packed embeddings.
    """
    tensors, _, notes = fitting(checkpoint, lambda grid, width: container(grid, width, variant))
    if variant != "bf16":
        checkpoint = replace(checkpoint, tensors=tensors)
    plan = _plan(checkpoint, variant, pack_embeddings, notes)
    with atomic(Path(path)) as folder:
        _write_weights(checkpoint, folder, plan, progress)
        write_settings(folder, _config(checkpoint, plan), checkpoint)
    files = sorted(file for file in Path(path).iterdir() if file.is_file())
    call = f"pipeline('text-generation', '{path}')('The capital of France is')[0]['generated_text']"
    run = f'python -c "from transformers import pipeline; print({call})"'
    source = checkpoint.tensors[EMBEDDINGS[0]].dtype
    return Export(Path(path), variant, run, [*plan.notes, *rounding_note(plan.rounded, source)], files)


def container(grid: Grid, width: int, variant: str) -> Answer:
    """What holds a grid in rows of `width` weights in a variant."""
    if variant == "bf16":
        return "the variant bf16 holds plain numbers"
    if grid.kind != "symmetric" or 32 % grid.bits:
        return f"there is no scheme for {grid.bits}-bit codes of the kind {grid.kind}"
    strategy = f"group {grid.block}" if grid.block < width else "channel"
    return Container(f"pack-quantized {grid.bits} bit, {strategy}", "f32")


def _plan(checkpoint: Checkpoint, variant: str, pack_embeddings: bool, notes: list[str]) -> _Plan:
    if variant == "bf16":
        return _Plan("bf16")
    plan = _Plan(None, notes=notes)
    for name, tensor in checkpoint.tensors.items():
        if tensor.grid is None:
            continue
        if name in (*EMBEDDINGS, HEAD) and not pack_embeddings:
            plan.notes.append(f"{name} stays {tensor.dtype}: embeddings are packed only when asked (pack_embeddings)")
        else:
            block = tensor.grid.block
            plan.packed[name] = tensor.grid.bits, block if block < tensor.shape[1] else 0
    if plan.packed:
        _unify(checkpoint, plan)
    widened = any(_widened(checkpoint.tensors[name]) for name in plan.packed)
    plan.unpack_early = widened or any(name in plan.packed for name in EMBEDDINGS)
    if plan.unpack_early:
        _keep_one_scheme(checkpoint, plan)
    return plan


def _scale_dtype(tensor: Tensor) -> DType:
    """What a tensor's scales are stored in: what loaders leave as it is, or f32 where the values depend on it."""
    assert tensor.grid is not None
    if tensor.dtype in (tensor.grid.scale_dtype, "f32"):
        return tensor.grid.scale_dtype
    return "f32" if tensor.grid.lossless else tensor.dtype


def _widened(tensor: Tensor) -> bool:
    return _scale_dtype(tensor) == "f32" != tensor.dtype


def _unify(checkpoint: Checkpoint, plan: _Plan) -> None:
    """Give wider blocks the commonest block, by repeating their scales: kernels want one scheme."""
    bits, block = _usual(plan.packed)
    for name, scheme in plan.packed.items():
        grid = checkpoint.tensors[name].grid
        assert grid is not None
        if block and scheme[0] == bits and grid.block % block == 0:
            plan.packed[name] = bits, block


def _keep_one_scheme(checkpoint: Checkpoint, plan: _Plan) -> None:
    """Leave unpacked what differs from the commonest scheme.

    transformers 5.23, decompressing while it loads, reads every module by the first scheme of the config.
    """
    usual = _usual(plan.packed)
    for name, (bits, block) in list(plan.packed.items()):
        if (bits, block) != usual:
            del plan.packed[name]
            dtype = checkpoint.tensors[name].dtype
            plan.notes.append(
                f"{name} stays {dtype}: transformers, unpacking while it loads, knows one scheme, and "
                f"this has {bits} bits in blocks of {block or 'a row'}"
            )


def _config(checkpoint: Checkpoint, plan: _Plan) -> dict[str, Any]:
    """config.json of the decoder alone, in the spelling it came in."""
    kept = {key: value for key, value in checkpoint.text_config.items() if key != "torch_dtype"}
    dtypes = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
    stored = plan.plain or checkpoint.tensors[EMBEDDINGS[0]].dtype
    config = {**kept, "architectures": [CLASSES[checkpoint.architecture.family]], "dtype": dtypes[stored]}
    if plan.packed:
        config["quantization_config"] = _quantization(checkpoint, plan)
    return config


def _quantization(checkpoint: Checkpoint, plan: _Plan) -> dict[str, Any]:
    """`quantization_config`, as compressed_tensors.quantization.QuantizationConfig serialises it.

    The commonest scheme has every Linear for its target, the others the modules that differ, by name.
    """
    schemes = plan.packed
    linears = [name for name in schemes if name not in EMBEDDINGS]
    usual = _usual(schemes)
    ordered = [usual, *sorted(set(schemes.values()) - {usual})]
    groups = {}
    for i, scheme in enumerate(ordered):
        named = [_module(name) for name, own in schemes.items() if own == scheme]
        if scheme == usual and linears:
            named = ["Linear", *(name for name in named if f"{name}.weight" in EMBEDDINGS)]
        groups[f"group_{i}"] = _group(scheme, named)
    matrices = [name for name, tensor in checkpoint.tensors.items() if len(tensor.shape) == 2]
    left = [_module(name) for name in matrices if name not in schemes and name not in EMBEDDINGS]
    if checkpoint.architecture.tied:
        left.append(_module(HEAD))
    return {
        "config_groups": groups,
        # transformers 5.23 initialises modules after loading them, and an embedding without `weight` stops it
        # there; told to decompress while it loads, it has one.
        "dequantize": plan.unpack_early,
        "format": "pack-quantized",
        "global_compression_ratio": None,
        "ignore": left,
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    bits, block = scheme
    weights = {
        "dynamic": False,
        "group_size": block or None,
        "num_bits": bits,
        "strategy": "group" if block else "channel",
        "symmetric": True,
        "type": "int",
    }
    return {
        "format": "pack-quantized",
        "input_activations": None,
        "output_activations": None,
        "targets": targets,
        "weights": weights,
    }


def _usual(schemes: dict[str, Scheme]) -> Scheme:
    """The commonest scheme of the linears, or of the embeddings when no linear is packed."""
    linears = [scheme for name, scheme in schemes.items() if name not in EMBEDDINGS]
    return Counter(linears or schemes.values()).most_common(1)[0][0]


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _write_weights(checkpoint: Checkpoint, folder: Path, plan: _Plan, progress: Callable[[int], None]) -> None:
    entries = [entry for tensor in checkpoint.tensors.values() for entry in _entries(tensor, plan)]
    with ShardedWriter(folder, entries, {"format": "pt"}) as out:
        for name, tensor in checkpoint.tensors.items():
            if name in plan.packed:
                _write_packed(out, folder, tensor, plan, progress)
            else:
                write_plain(out, tensor, plan.plain or tensor.dtype, plan.notes, progress)


def _entries(tensor: Tensor, plan: _Plan) -> Iterator[Entry]:
    scheme, grid = plan.packed.get(tensor.name), tensor.grid
    if scheme is None or grid is None:
        yield Entry(tensor.name, DTYPE_NAMES[plan.plain or tensor.dtype], tensor.shape)
        return
    (out, width), module = tensor.shape, _module(tensor.name)
    yield Entry(f"{module}.weight_packed", "I32", (out, words(width, grid.bits)))
    yield Entry(f"{module}.weight_scale", DTYPE_NAMES[_scale_dtype(tensor)], (out, width // (scheme[1] or width)))
    yield Entry(f"{module}.weight_shape", "I64", (2,))


def _write_packed(
    out: ShardedWriter, folder: Path, tensor: Tensor, plan: _Plan, progress: Callable[[int], None]
) -> None:
    """Words slice by slice; the scales wait, since they come after the last of the words."""
    grid, module = tensor.grid, _module(tensor.name)
    assert grid is not None
    dtype = _scale_dtype(tensor)
    exact, plan.rounded[tensor.name] = dtype in (grid.scale_dtype, "f32"), 0
    with Waiting(folder, dtype) as waiting:
        for start, stop in slices(tensor):
            codes, scales = tensor.rows(start, stop).grid()
            out.write(f"{module}.weight_packed", pack(codes, grid.bits).view("<i4"))
            grouped = reblock(scales, grid.block, plan.packed[tensor.name][1] or grid.block)
            assert grouped is not None
            plan.rounded[tensor.name] += 0 if exact else count_rounded(grouped, dtype)
            waiting.write(grouped, exact)
            progress((stop - start) * tensor.shape[1] * ITEM_BYTES[tensor.dtype])
        for scales in waiting.chunks():
            out.write(f"{module}.weight_scale", stored(scales, dtype, exact=True))
    out.write(f"{module}.weight_shape", np.array(tensor.shape, dtype="<i8"))
