"""Stacks of matrices that a format keeps apart: what it calls the parts, and which rows of ours each of them has.

A layer's experts are two tensors of three axes in transformers, `gate_up_proj` and `down_proj`. mlx-lm and GGUF have
the gate and the up projections of all experts each by themselves, vLLM and llm-compressor a module for each projection
of each expert. A layout says so once, and is used both ways.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from gemexport.formats.gemma.architecture import Shape, TensorSpec
from gemexport.formats.gemma.roles import Role
from gemexport.formats.pieces import Piece, Pieces
from gemexport.formats.tensor import Tensor, row_count


@dataclass(frozen=True)
class Part:
    """A tensor of a format's own that holds rows of one of ours: which ones, in its order."""

    name: str
    shape: Shape
    rows: tuple[tuple[int, int], ...]


Layout = Callable[[TensorSpec], tuple[Part, ...]]  # one part, of the same name, for what is not kept apart


def together(spec: TensorSpec) -> tuple[Part, ...]:
    """As transformers has it: every tensor is itself."""
    return (Part(spec.name, spec.shape, ((0, row_count(spec.shape)),)),)


def switched(spec: TensorSpec) -> tuple[Part, ...]:
    """As mlx-lm's SwitchGLU has experts (mlx_lm.models.gemma4_text): a stack for each of the three projections."""
    stem = f"{spec.name.rpartition('.')[0]}.switch_glu"
    return by_projection(spec, f"{stem}.gate_proj.weight", f"{stem}.up_proj.weight", f"{stem}.down_proj.weight")


def by_projection(spec: TensorSpec, gate: str, up: str, down: str) -> tuple[Part, ...]:
    """A stack for each of the three projections, under these names."""
    if spec.role is Role.EXPERT_DOWN:
        return (Part(down, spec.shape, ((0, row_count(spec.shape)),)),)
    if spec.role is not Role.EXPERT_GATE_UP:
        return together(spec)
    count, both, width = spec.shape
    half = both // 2
    starts = [[expert * both + first for expert in range(count)] for first in (0, half)]
    return tuple(
        Part(name, (count, half, width), tuple((start, start + half) for start in own))
        for name, own in zip((gate, up), starts, strict=True)
    )


def by_expert(spec: TensorSpec) -> tuple[Part, ...]:
    """As vLLM and llm-compressor have experts: a module for each projection of each one."""
    projections = {Role.EXPERT_GATE_UP: ("gate_proj", "up_proj"), Role.EXPERT_DOWN: ("down_proj",)}.get(spec.role)
    if projections is None:
        return together(spec)
    count, rows, width = spec.shape
    stem, each = spec.name.rpartition(".")[0], rows // len(projections)
    names = [f"{stem}.{expert}.{projection}.weight" for expert in range(count) for projection in projections]
    return tuple(Part(name, (each, width), ((i * each, (i + 1) * each),)) for i, name in enumerate(names))


def take(tensor: Tensor, part: Part) -> Tensor:
    """A part of one of our tensors, as the tensor that a format has; it reads the rows of ours."""
    if (part.name, part.shape) == (tensor.name, tensor.shape):
        return tensor
    return Pieces(part.name, part.shape, [Piece(tensor, start, stop) for start, stop in part.rows])


def apart(tensors: Mapping[str, Tensor], specs: Mapping[str, TensorSpec], layout: Layout) -> dict[str, Tensor]:
    """All tensors of a model as a format with this layout has them, in the same order."""
    return {part.name: take(tensor, part) for name, tensor in tensors.items() for part in layout(specs[name])}


def put(spec: TensorSpec, parts: Iterable[tuple[Part, Tensor]]) -> Tensor:
    """One of our tensors out of its parts."""
    pieces: list[tuple[int, Piece]] = []
    for part, tensor in parts:
        offset = 0
        for start, stop in part.rows:
            pieces.append((start, Piece(tensor, offset, offset + stop - start)))
            offset += stop - start
    return Pieces(spec.name, spec.shape, [piece for _, piece in sorted(pieces, key=lambda item: item[0])])
