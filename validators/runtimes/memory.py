"""What each program takes to run an artefact, in anonymous bytes: what is mapped from files is the system's to drop.

Estimates from a model's sizes alone, before there is an artefact, so that a run can be planned; they import no runtime.
What libraries take was measured on tiny models, where they take it all, and the factors on the real Gemma 3 270M
(benchmarks/README.md, benchmarks/plans.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from gemexport.formats.gemma.model import Model
from gemexport.formats.gemma.roles import Role

LIBRARIES = 350 << 20  # of a step with PyTorch, transformers and tokenizers
TOKEN = 128  # bytes of a token of the vocabulary in a Gemma's tokenizer.json, its merges with it
WORDS = 12 * TOKEN  # of a token, once the checkpoint's and the artefact's tokenizer have been compared
CHUNK = 256  # positions whose logits a program gives at a time


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

    @property
    def vocabulary(self) -> int:
        """Tokens that there are."""
        return self.position // 4


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
    """What a module of this package takes, with the interpreter, its libraries and what is known of the tokenizer."""
    least, most = _ROOMS[runtime](found)
    always = LIBRARIES + _OWN[runtime] + WORDS * found.vocabulary
    return Room(always + least, always + max(least, most))


def _llama_cpp(found: Sizes) -> tuple[int, int]:
    """Two batches of 128 positions, the whole, and matrices of codes laid out anew; what computes in f32 maps all."""
    anew = found.stored * found.matrices if found.stored < 2 else 0
    takes = found.logits + 2 * 128 * found.position + int(anew)
    return takes, takes


def _onnxruntime(found: Sizes) -> tuple[int, int]:
    """Weights are mapped; laid out anew they are 1.2 times as large. The least is one of an NPU's decoders at a time.

    What such an artefact holds beside them (tables of embeddings that are the head as well) is not laid out.
    """
    pieces = found.logits + CHUNK * found.position
    anew = int(1.2 * (found.stored if found.stored >= 2 else min(found.stored, 0.8)) * found.matrices)
    return pieces + anew // 2, pieces + anew


def _openvino(found: Sizes) -> tuple[int, int]:
    """Compiled for the CPU, matrices in blocks take 1.8 bytes a weight; tokenizers are done with by then."""
    takes = found.logits + int(1.8 * found.matrices) - WORDS * found.vocabulary
    return takes, takes


def _mlx(found: Sizes) -> tuple[int, int]:
    """The file in memory, biases and all, or f32 where it has no codes; logits on both sides of a pipe.

    The least leaves tables of codes in their file.
    """
    weight = 10 / 9 * found.stored if found.stored < 2 else 4
    pieces = 2 * found.logits + int(weight * found.matrices)
    whole = pieces + int(weight * found.tables)
    return (pieces if found.stored < 2 else whole), whole


def _compressed_tensors(found: Sizes) -> tuple[int, int]:
    """Everything in f32, and the logits; the least is a layer, and what is unpacked for it."""
    least = found.logits + 8 * found.layer
    return least, max(least, found.logits + 4 * (found.matrices + found.tables))


def _coreml(found: Sizes) -> tuple[int, int]:
    """Constants are read by rows or a matrix at a time, or up to 4 GiB of them are held in f32."""
    pieces = found.logits + CHUNK * found.position + 4 * found.layer
    return pieces, pieces + min(4 * found.matrices, 4 << 30)


# What a program's own libraries take: mlx-lm has a process of its own, OpenVINO compiles at run time.
_OWN = {
    "llama_cpp": 30 << 20,
    "onnxruntime": 30 << 20,
    "openvino": 380 << 20,
    "mlx": 270 << 20,
    "compressed_tensors": 20 << 20,
    "coreml": 30 << 20,
}
_ROOMS: dict[str, Callable[[Sizes], tuple[int, int]]] = {
    "llama_cpp": _llama_cpp,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "mlx": _mlx,
    "compressed_tensors": _compressed_tensors,
    "coreml": _coreml,
}
