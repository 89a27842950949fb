"""What each program takes to run an artefact, in anonymous bytes: what is mapped from files is the system's to drop.

Estimates from a model's sizes alone, before there is an artefact, so that a run can be planned; they import no runtime.
The factors were measured on the real Gemma 3 270M (benchmarks/README.md); they are those of the adapters beside this.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from gemexport.formats.gemma.model import Model
from gemexport.formats.gemma.roles import Role

# Of a step with the reference's libraries and a layer that it holds, 900 MB, and of the command that waits for it;
# measured, rounded up.
INTERPRETER = 1 << 30


@dataclass(frozen=True)
class Room:
    """Anonymous bytes: what a program cannot do without, and what it takes where it is left to itself."""

    least: int
    most: int


@dataclass(frozen=True)
class Sizes:
    """What of a model decides how much memory it takes."""

    matrices: int  # weights that are multiplied with, those of the head included
    tables: int  # weights of which rows are looked up, and nothing else
    layer: int  # weights of the largest layer
    largest: int  # weights of the largest matrix that is multiplied with
    position: int  # bytes of a position's logits, in f32
    positions: int  # of the longest sequence
    stored: float  # bytes of a weight in the artefact

    @property
    def logits(self) -> int:
        """Bytes of a sequence's logits."""
        return self.position * self.positions


def sizes(model: Model, positions: int, stored: float) -> Sizes:
    """Those of `model` for sequences of so many tokens, in an artefact with so many bytes a weight."""
    layers: dict[int | None, int] = {}
    matrices, tables, largest = 0, 0, 0
    for spec in model.specs.values():
        count = math.prod(spec.shape)
        layers[spec.layer] = layers.get(spec.layer, 0) + count
        if spec.role.is_looked_up and not (spec.role is Role.EMBEDDING and model.decoder.tied):
            tables += count
        else:
            matrices, largest = matrices + count, max(largest, count)
    held = max(count for layer, count in layers.items() if layer is not None)
    return Sizes(matrices, tables, held, largest, 4 * model.decoder.vocab_size, positions, stored)


def room(runtime: str, found: Sizes) -> Room:
    """What a module of this package takes, the interpreter with it."""
    least, most = _ROOMS[runtime](found)
    return Room(INTERPRETER + least, INTERPRETER + max(least, most))


def _llama_cpp(found: Sizes) -> tuple[int, int]:
    """Two batches of 128 positions, the whole, and matrices of codes laid out anew; what computes in f32 maps all."""
    anew = found.stored * found.matrices if found.stored < 2 else 0
    takes = found.logits + 2 * 128 * found.position + int(anew)
    return takes, takes


def _onnxruntime(found: Sizes) -> tuple[int, int]:
    """Weights are mapped; laid out anew they are 1.2 times as large, in an NPU's two decoders 1.35 times each.

    The least is one decoder at a time (npu), or none laid out anew.
    """
    pieces = found.logits + 2 * 256 * found.position
    return pieces + int(1.35 * found.stored * found.matrices), pieces + int(2.7 * found.stored * found.matrices)


def _openvino(found: Sizes) -> tuple[int, int]:
    """Compiled for the CPU, matrices in blocks take 3 bytes a weight."""
    takes = found.logits + 2 * 256 * found.position + 3 * found.matrices
    return takes, takes


def _mlx(found: Sizes) -> tuple[int, int]:
    """The file in memory, biases and all, or f32 where it has no codes; logits on both sides of a pipe.

    The least leaves tables of codes in their file.
    """
    weight = 10 / 9 * found.stored if found.stored < 2 else 4
    pieces = 2 * found.logits + _MLX_LIBRARIES + int(weight * found.matrices)
    whole = pieces + int(weight * found.tables)
    return (pieces if found.stored < 2 else whole), whole


def _compressed_tensors(found: Sizes) -> tuple[int, int]:
    """Everything in f32, and the logits of PyTorch beside ours; the least is a layer, and what is unpacked for it."""
    least = 2 * found.logits + 8 * found.layer
    return least, max(least, 2 * found.logits + 4 * (found.matrices + found.tables))


def _coreml(found: Sizes) -> tuple[int, int]:
    """Constants are read by rows or a matrix at a time, or up to 4 GiB of them are held in f32."""
    pieces = found.logits + 2 * 256 * found.position + 4 * found.layer
    return pieces, pieces + min(4 * found.matrices, 4 << 30)


_MLX_LIBRARIES = 500 << 20  # of mlx-lm's own process
_ROOMS: dict[str, Callable[[Sizes], tuple[int, int]]] = {
    "llama_cpp": _llama_cpp,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "mlx": _mlx,
    "compressed_tensors": _compressed_tensors,
    "coreml": _coreml,
}
