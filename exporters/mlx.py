"""MLX: a folder that `mlx_lm.load` and `mlx_lm.generate` take as it is.

Codes and scales pass through unchanged; a grid that MLX cannot hold leaves its tensor unquantized, and a note says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from shlex import quote
from typing import Any

from gemexport.exporters.fitting import Answer, Container, fitting
from gemexport.exporters.mlx_config import text_config
from gemexport.exporters.result import Export, ignore
from gemexport.exporters.streaming import Waiting, count_rounded, rounding_note, stored, write_plain, write_settings
from gemexport.formats.bitpack import pack, words, zero_code
from gemexport.formats.checkpoint import Checkpoint
from gemexport.formats.errors import InputError
from gemexport.formats.files import atomic
from gemexport.formats.mlx import SYMMETRIC_BITS, group_for
from gemexport.formats.safetensors import DTYPE_NAMES, Entry, ShardedWriter
from gemexport.formats.tensor import ITEM_BYTES, DType, Grid, Tensor, reblock, slices

VARIANTS: tuple[str, ...] = ("4bit", "bf16", "f32")
PLAIN: dict[str, DType] = {"bf16": "bf16", "f32": "f32"}


@dataclass
class _Plan:
    """What becomes of each tensor: the group it is packed in, or plain numbers."""

    dtype: DType  # of scales, biases and everything that is not quantized
    groups: dict[str, int] = field(default_factory=dict)
    rounded: dict[str, int] = field(default_factory=dict)  # scales of each tensor
    notes: list[str] = field(default_factory=list)


def export(
    checkpoint: Checkpoint,
    path: Path,
    *,
    variant: str = VARIANTS[0],
    scales: DType | None = None,
    progress: Callable[[int], None] = ignore,
) -> Export:
    """Write `checkpoint` to the folder `path` for mlx-lm.

    `4bit` packs every tensor that has a grid with the grid's own bits (so 2 and 8 as well); `bf16` and `f32` hold
    plain numbers. `scales` is the dtype of scales, biases and unquantized tensors, which is what mlx-lm computes in;
    docs/mlx-scales.md has the measurements behind the default.

    Raises InputError for a decoder that mlx-lm has no way to say, and for `scales` that are no dtype.
    """
    if scales is not None and scales not in ITEM_BYTES:
        raise InputError(path, f"scales in {scales} do not exist", f"use one of {', '.join(ITEM_BYTES)}")
    tensors, _, notes = fitting(checkpoint, lambda grid, width: container(grid, width, variant))
    if variant not in PLAIN:
        checkpoint = replace(checkpoint, tensors=tensors)
    plan = _plan(checkpoint, variant, scales, notes)
    config = text_config(checkpoint)
    if plan.groups:
        config["quantization"] = _quantization(checkpoint, plan)
    with atomic(Path(path)) as folder:
        _write_weights(checkpoint, folder, plan, progress)
        write_settings(folder, config, checkpoint)
    files = sorted(file for file in Path(path).iterdir() if file.is_file())
    run = f"mlx_lm.generate --model {quote(str(path))} --prompt 'The capital of France is'"
    notes = [*plan.notes, *rounding_note(plan.rounded, plan.dtype)]
    return Export(Path(path), variant, run, notes, files)


def container(grid: Grid, width: int, variant: str) -> Answer:
    """What holds a grid in rows of `width` weights in a variant."""
    if variant in PLAIN:
        return f"the variant {variant} holds plain numbers"
    group = group_for(grid.block, width)
    if group is None:
        return f"MLX has no group for blocks of {grid.block} weights"
    if grid.kind != "symmetric" or grid.bits not in SYMMETRIC_BITS:
        return f"MLX has no mode for {grid.bits}-bit codes of the kind {grid.kind}"
    return Container(f"affine {grid.bits} bit, group {group}", "f32")


def _plan(checkpoint: Checkpoint, variant: str, scales: DType | None, notes: list[str]) -> _Plan:
    if variant in PLAIN:
        return _Plan(PLAIN[variant])
    plan = _Plan(scales or _default_dtype(checkpoint), notes=notes)
    for name, tensor in checkpoint.tensors.items():
        if tensor.grid is not None:
            group = group_for(tensor.grid.block, tensor.shape[1])
            assert group is not None  # `fitting` left grids that have a container
            plan.groups[name] = group
    return plan


def _default_dtype(checkpoint: Checkpoint) -> DType:
    """bf16 where it holds the source's numbers, else f32; never f16, in which Gemma's activations overflow.

    The scales of a tensor that was rounded to its grid have no value to keep: the grid is as good with bf16 ones.
    """
    needed = {
        tensor.grid.scale_dtype if tensor.grid and tensor.grid.lossless else tensor.dtype
        for tensor in checkpoint.tensors.values()
    }
    return "bf16" if needed == {"bf16"} else "f32"


def _quantization(checkpoint: Checkpoint, plan: _Plan) -> dict[str, Any]:
    """config.json's `quantization`: the commonest bits and group, and by name each module that differs."""
    chosen = {name: (group, _bits(checkpoint.tensors[name])) for name, group in plan.groups.items()}
    (group, bits), _ = Counter(chosen.values()).most_common(1)[0]
    modules: dict[str, Any] = {}
    for name, tensor in checkpoint.tensors.items():
        if len(tensor.shape) != 2 or chosen.get(name) == (group, bits):
            continue
        own = chosen.get(name)
        modules[_module(name)] = {"group_size": own[0], "bits": own[1], "mode": "affine"} if own else False
    return {"group_size": group, "bits": bits, "mode": "affine", **modules}


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _bits(tensor: Tensor) -> int:
    assert tensor.grid is not None
    return tensor.grid.bits


def _write_weights(checkpoint: Checkpoint, folder: Path, plan: _Plan, progress: Callable[[int], None]) -> None:
    entries = [entry for tensor in checkpoint.tensors.values() for entry in _entries(tensor, plan)]
    with ShardedWriter(folder, entries, {"format": "mlx"}) as out:
        for name, tensor in checkpoint.tensors.items():
            if name in plan.groups:
                _write_packed(out, folder, tensor, plan, progress)
            else:
                write_plain(out, tensor, plan.dtype, plan.notes, progress)


def _entries(tensor: Tensor, plan: _Plan) -> Iterator[Entry]:
    dtype = DTYPE_NAMES[plan.dtype]
    group = plan.groups.get(tensor.name)
    if group is None:
        yield Entry(tensor.name, dtype, tensor.shape)
        return
    (out, width), module = tensor.shape, _module(tensor.name)
    yield Entry(tensor.name, "U32", (out, words(width, _bits(tensor))))
    yield Entry(f"{module}.scales", dtype, (out, width // group))
    yield Entry(f"{module}.biases", dtype, (out, width // group))


def _write_packed(
    out: ShardedWriter, folder: Path, tensor: Tensor, plan: _Plan, progress: Callable[[int], None]
) -> None:
    """Words slice by slice; the scales wait, since they come after the last of the words."""
    grid, module = tensor.grid, _module(tensor.name)
    assert grid is not None
    exact, plan.rounded[tensor.name] = plan.dtype in (grid.scale_dtype, "f32"), 0
    with Waiting(folder, plan.dtype) as waiting:
        for start, stop in slices(tensor):
            codes, scales = tensor.rows(start, stop).grid()
            out.write(tensor.name, pack(codes, grid.bits))
            grouped = reblock(scales, grid.block, plan.groups[tensor.name])
            assert grouped is not None
            plan.rounded[tensor.name] += 0 if exact else count_rounded(grouped, plan.dtype)
            waiting.write(grouped, exact)
            progress((stop - start) * tensor.shape[1] * ITEM_BYTES[tensor.dtype])
        for scales in waiting.chunks():
            out.write(f"{module}.scales", stored(scales, plan.dtype, exact=True))
        for scales in waiting.chunks():
            # A power of two times a scale: exact as well.
            out.write(f"{module}.biases", stored(-zero_code(grid.bits) * scales, plan.dtype, exact=True))
