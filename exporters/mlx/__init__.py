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

import numpy as np

from gemexport.exporters.fitting import Answer, Container, fitting
from gemexport.exporters.fitting import promises as fitted
from gemexport.exporters.mlx.config import problem, text_config
from gemexport.exporters.mlx.modes import Mode, columns, default_scales, holds_scales, mode_of
from gemexport.exporters.result import Export, ignore
from gemexport.exporters.streaming import (
    Column,
    Rounding,
    rounding_note,
    settings_bytes,
    write_packed,
    write_plain,
    write_settings,
)
from gemexport.exporters.support import require
from gemexport.formats.checkpoint import Checkpoint
from gemexport.formats.gemma.model import Model
from gemexport.formats.gemma.names import FINAL_NORM, LAYERS
from gemexport.formats.gemma.stacks import apart, switched
from gemexport.formats.pieces import Pieces, whole
from gemexport.formats.promise import Promise
from gemexport.formats.storage.bitpack import words
from gemexport.formats.storage.errors import InputError
from gemexport.formats.storage.files import atomic
from gemexport.formats.storage.safetensors import DTYPE_NAMES, Entry, ShardedWriter, nbytes
from gemexport.formats.tensor import ITEM_BYTES, ArrayTensor, DType, Grid, Plain, Tensor

VARIANTS: tuple[str, ...] = ("4bit", "bf16", "f32")
METADATA = {"format": "mlx"}  # of the weights
PLAIN: dict[str, DType] = {"bf16": "bf16", "f32": "f32"}
_TOP = LAYERS.partition(".")[0]
_NOUGHT = np.float32(0)


@dataclass
class _Plan:
    """What becomes of each tensor: the mode it is packed in, or plain numbers."""

    dtype: DType  # of scales, biases and everything that is not quantized
    modes: dict[str, Mode] = field(default_factory=dict)
    rounded: dict[str, int] = field(default_factory=dict)  # scales and biases of each tensor
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

    `4bit` packs every tensor that has a grid with the grid's own bits, whatever these are; `bf16` and `f32` hold plain
    numbers. `scales` is the dtype of scales, biases and unquantized tensors, which is what mlx-lm computes in;
    docs/mlx-scales.md has the measurements behind the default.

    Raises InputError for a decoder that mlx-lm has no way to say, and for `scales` that are no dtype.
    """
    if scales is not None and scales not in ITEM_BYTES:
        raise InputError(path, f"scales in {scales} do not exist", f"use one of {', '.join(ITEM_BYTES)}")
    checkpoint, plan, config = _prepared(checkpoint, variant, scales)
    with atomic(Path(path)) as folder:
        _write_weights(checkpoint, folder, plan, progress)
        write_settings(folder, config, checkpoint)
    files = sorted(file for file in Path(path).iterdir() if file.is_file())
    run = f"mlx_lm.generate --model {quote(str(path))} --prompt 'The capital of France is'"
    notes = [*plan.notes, *rounding_note(plan.rounded, plan.dtype)]
    return Export(Path(path), variant, run, notes, files)


def size(checkpoint: Checkpoint, *, variant: str = VARIANTS[0], scales: DType | None = None) -> int:
    """Bytes of what `export` writes; raises as it does."""
    checkpoint, plan, config = _prepared(checkpoint, variant, scales)
    return nbytes(_layout(checkpoint, plan)[0], METADATA) + settings_bytes(config, checkpoint)


def _prepared(checkpoint: Checkpoint, variant: str, scales: DType | None) -> tuple[Checkpoint, _Plan, dict[str, Any]]:
    """The tensors as MLX holds them, how, and config.json."""
    require(checkpoint, supports(checkpoint.model, variant), "mlx")
    checkpoint = replace(checkpoint, tensors=apart(checkpoint.tensors, checkpoint.model.specs, switched))
    if variant in PLAIN:
        plan = _Plan(PLAIN[variant])
    else:
        checkpoint, plan = _plan(checkpoint, variant, scales)
    config = text_config(checkpoint)
    checkpoint, plan = _as_called(checkpoint, plan)
    if plan.modes:
        config["quantization"] = _quantization(checkpoint, plan)
    return checkpoint, plan, config


def _as_called(checkpoint: Checkpoint, plan: _Plan) -> tuple[Checkpoint, _Plan]:
    """The tensors under mlx-lm's names, with those that its module asks for and does not read."""
    family, dtype = checkpoint.model.family, checkpoint.tensors[FINAL_NORM].dtype
    zeros = family.unread(checkpoint.architecture)
    if zeros:
        plan.notes.append(
            f"{len(zeros)} tensors are zeros ({next(iter(zeros))} …): mlx-lm asks for them, and reads none"
        )
    tensors: dict[str, Tensor] = dict(checkpoint.tensors)
    tensors |= {name: ArrayTensor(name, np.broadcast_to(_NOUGHT, shape), dtype) for name, shape in zeros.items()}
    if family.mlx_module == _TOP:
        return replace(checkpoint, tensors=tensors), plan
    called = {name: f"{family.mlx_module}{name.removeprefix(_TOP)}" for name in tensors}
    modes = {called[name]: mode for name, mode in plan.modes.items()}
    renamed = {called[name]: Pieces(called[name], tensor.shape, [whole(tensor)]) for name, tensor in tensors.items()}
    return replace(checkpoint, tensors=renamed), replace(plan, modes=modes)


def supports(model: Model, variant: str) -> str | None:
    """Why mlx-lm does not run a model; None where it does."""
    found = problem(model)
    return None if found is None else f"the model {found}, which mlx-lm does not run"


def container(grid: Grid, width: int, variant: str) -> Answer:
    """What holds a grid in rows of `width` weights in a variant."""
    if variant in PLAIN:
        return f"the variant {variant} holds plain numbers"
    mode = mode_of(grid, width)
    if isinstance(mode, str):
        return mode
    return Container(f"{mode.name} {mode.bits} bit, group {mode.group}", "f32")


def promises(checkpoint: Checkpoint, variant: str, *, scales: DType | None = None, **_: Any) -> dict[str, Promise]:
    """What a folder has to hold of each tensor, by canonical name: numbers in the dtype that mlx-lm computes in."""
    if variant in PLAIN:
        return {name: Promise(Plain(tensor), plain=PLAIN[variant]) for name, tensor in checkpoint.tensors.items()}
    stacks = replace(checkpoint, tensors=apart(checkpoint.tensors, checkpoint.model.specs, switched))
    dtype = _plan(stacks, variant, scales)[1].dtype
    found = fitted(checkpoint, lambda grid, width: container(grid, width, variant))
    return {
        name: Promise(item.tensor, scales="f32" if _has_byte_scales(item.tensor) else dtype, plain=dtype, biased=True)
        for name, item in found.items()
    }


def _has_byte_scales(tensor: Tensor) -> bool:
    """Whether a tensor's scales are bytes, whatever the others are."""
    return tensor.grid is not None and tensor.grid.kind == "codebook"


def _plan(checkpoint: Checkpoint, variant: str, scales: DType | None) -> tuple[Checkpoint, _Plan]:
    """The tensors as MLX holds them, and how."""
    tensors, containers, notes = fitting(checkpoint, lambda grid, width: container(grid, width, variant))
    modes: dict[str, Mode] = {}
    for name in containers:
        tensor = tensors[name]
        assert tensor.grid is not None
        mode = mode_of(tensor.grid, tensor.shape[-1])
        assert isinstance(mode, Mode)  # `fitting` left grids that have a container
        if holds_scales(tensor, mode):
            modes[name] = mode
        else:
            tensors[name] = Plain(tensor)
            notes.append(f"{name} is written without its grid: a scale is none of the mode {mode.name}")
    model = checkpoint.tensors[FINAL_NORM].dtype
    needed = {default_scales(tensor, model) for tensor in tensors.values()}
    # bf16 where it holds the source's numbers, else f32.
    plan = _Plan(scales or ("bf16" if needed == {"bf16"} else "f32"), modes, notes=notes)
    return replace(checkpoint, tensors=tensors), plan


def _quantization(checkpoint: Checkpoint, plan: _Plan) -> dict[str, Any]:
    """config.json's `quantization`: the commonest mode, and by name each module that differs."""
    usual, _ = Counter(plan.modes.values()).most_common(1)[0]
    modules: dict[str, Any] = {}
    for name, tensor in checkpoint.tensors.items():
        own = plan.modes.get(name)
        if len(tensor.shape) >= 2 and own != usual:
            modules[_module(name)] = own.settings() if own else False
    return {**usual.settings(), **modules}


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _layout(
    checkpoint: Checkpoint, plan: _Plan
) -> tuple[list[Entry], dict[str, tuple[Column, ...]], dict[str, Rounding]]:
    """The arrays of the file, and of each tensor that is packed what stands beside its codes, and its rounding."""
    rounding = {name: Rounding(plan.dtype) for name in plan.modes}
    beside = {name: tuple(columns(checkpoint.tensors[name], mode, rounding[name])) for name, mode in plan.modes.items()}
    entries = [entry for tensor in checkpoint.tensors.values() for entry in _entries(tensor, plan, beside)]
    return entries, beside, rounding


def _write_weights(checkpoint: Checkpoint, folder: Path, plan: _Plan, progress: Callable[[int], None]) -> None:
    entries, beside, rounding = _layout(checkpoint, plan)
    with ShardedWriter(folder, entries, METADATA) as out:
        for name, tensor in checkpoint.tensors.items():
            if name not in plan.modes:
                write_plain(out, tensor, plan.dtype, plan.notes, progress)
                continue
            write_packed(out, folder, tensor, (name, plan.modes[name].words), beside[name], progress)
            plan.rounded[name] = rounding[name].count


def _entries(tensor: Tensor, plan: _Plan, beside: dict[str, tuple[Column, ...]]) -> Iterator[Entry]:
    mode = plan.modes.get(tensor.name)
    if mode is None:
        yield Entry(tensor.name, DTYPE_NAMES[plan.dtype], tensor.shape)
        return
    *leading, width = tensor.shape
    yield Entry(tensor.name, "U32", (*leading, words(width, mode.bits)))
    yield from (column.entry for column in beside[tensor.name])
