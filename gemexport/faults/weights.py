"""Faults of the weights, for every format at once: each changes the stored numbers of one tensor or two.

A fault gets the artefact and the model it was made from, changes the artefact in place, and returns the name of the
tensor that a verdict must name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemexport.faults.places import PLACES
from gemexport.faults.stored import Numbers, Place, floats, like
from gemexport.formats.gemma.architecture import Architecture, Layer
from gemexport.formats.gemma.model import Model
from gemexport.formats.gemma.names import CANONICAL
from gemexport.formats.gemma.roles import Kind, Role
from gemexport.formats.tensor import from_bf16, to_bf16

name_of = CANONICAL.name
ONE_EPSILON = "the format states one epsilon for all norms"
LARGER = 1.7  # times what a scale was
NOISE = 0.02  # of a weight, in a head that should be the embedding


class Inapplicable(Exception):
    """Why an artefact has nothing that a fault breaks, found when it was looked at."""


@dataclass(frozen=True)
class Harmless:
    """A fault that changes what is stored, and nothing that the format's program computes, with the reason why.

    Where no verdict names it, the matrix runs the program on both artefacts, and their logits must be the same bits.
    """

    make: Make
    why: str


@dataclass(frozen=True)
class Subject:
    """The artefact that a fault is put into."""

    target: str
    path: Path
    model: Model

    @property
    def decoder(self) -> Architecture:
        """What the model computes."""
        return self.model.decoder

    def place(self, name: str) -> Place:
        """Where a tensor lies."""
        return PLACES[self.target](self.path, name)

    def change(self, name: str, edit: Callable[[Numbers], None]) -> str:
        """Apply `edit` to the numbers of a tensor; returns its name."""
        place = self.place(name)
        numbers = place.read()
        edit(numbers)
        place.write(numbers)
        return name

    def layer(self, sliding: bool = True) -> Layer:
        """The first layer of its own keys and values, of one attention type."""
        return next(layer for layer in self.decoder.layers if layer.sliding == sliding and layer.owns_cache)


def q_and_k_swapped(subject: Subject) -> str:
    """The query and the key projection exchanged, as far as the smaller one has rows."""
    layer = subject.layer().index
    q, k = (subject.place(name_of(role, layer)) for role in (Role.Q, Role.K))
    ours, theirs = q.read(), k.read()
    rows = min(len(ours.codes), len(theirs.codes))
    for a, b in zip([ours.codes, *ours.scales], [theirs.codes, *theirs.scales], strict=True):
        a[:rows], b[:rows] = b[:rows].copy(), a[:rows].copy()
    q.write(ours)
    k.write(theirs)
    return name_of(Role.Q, layer)


def from_the_neighbour(subject: Subject) -> str:
    """A layer's down projection is the next layer's."""
    name = name_of(Role.DOWN, 0)
    subject.place(name).write(subject.place(name_of(Role.DOWN, 1)).read())
    return name


def transposed(subject: Subject) -> str:
    """A square matrix transposed, its codes and, where the blocks of both ways hold as many, its scales."""
    specs = subject.model.specs.values()
    name = next(spec.name for spec in specs if spec.role.is_matrix and spec.shape[0] == spec.shape[1])

    def edit(numbers: Numbers) -> None:
        numbers.codes = np.ascontiguousarray(numbers.codes.T)

    return subject.change(name, edit)


def interleaved(subject: Subject) -> str:
    """Rows of a query projection in the order of interleaved rotary embeddings, for a runtime that splits heads."""
    layer = subject.layer()
    half = np.arange(layer.head_dim).reshape(2, -1).T.reshape(-1)
    rows = np.concatenate([half + head * layer.head_dim for head in range(subject.decoder.heads)])
    return subject.change(name_of(Role.Q, layer.index), lambda numbers: _rows(numbers, rows))


def _rows(numbers: Numbers, order: NDArray[np.intp]) -> None:
    numbers.codes = numbers.codes[order]
    numbers.scales = [array[order] for array in numbers.scales]


def norm_without_one(subject: Subject) -> str:
    """A norm that multiplies by `1 + weight` where it means `weight`, or the other way round."""
    by = 1.0 if subject.decoder.norm_offset == 0.0 else -1.0
    return subject.change(name_of(Role.POST_ATTENTION_NORM, 1), lambda numbers: _moved(numbers, by))


def _moved(numbers: Numbers, by: float) -> None:
    numbers.codes = like(floats(numbers.codes) + np.float32(by), numbers.codes)


def layer_scalar_lost(subject: Subject) -> str:
    """A layer's output is not scaled."""

    def edit(numbers: Numbers) -> None:
        numbers.codes = like(np.ones(numbers.codes.shape, np.float32), numbers.codes)

    return subject.change(name_of(Role.LAYER_SCALAR, 0), edit)


def per_layer_shifted(subject: Subject) -> str:
    """Every layer is told the next layer's part of the per-layer embeddings."""
    assert subject.decoder.per_layer is not None
    dim = subject.decoder.per_layer.dim

    def edit(numbers: Numbers) -> None:
        width = numbers.codes.shape[1]
        numbers.codes = np.roll(numbers.codes, -dim, axis=1)
        numbers.scales = [np.roll(array, -dim * array.shape[1] // width, axis=1) for array in numbers.scales]

    return subject.change(name_of(Role.PER_LAYER_EMBEDDING), edit)


def _matrix(subject: Subject) -> str:
    return name_of(Role.UP, subject.layer(sliding=False).index)


def wide(subject: Subject) -> str:
    """The name of a matrix that is not square."""
    specs = subject.model.specs.values()
    return next(spec.name for spec in specs if spec.role is Role.GATE and spec.shape[0] != spec.shape[1])


def scale_halved(subject: Subject) -> str:
    """One block's scale is half of what it was; a row may be a block."""

    def edit(numbers: Numbers) -> None:
        for array in numbers.scales:
            last = min(1, array.shape[1] - 1)
            array[3, last] = like(floats(array[3:4, last]) / np.float32(2), array)[0]

    return subject.change(_matrix(subject), edit)


def codes_off_by_one(subject: Subject) -> str:
    """One block's codes are one too large, the largest one too small."""
    return subject.change(_matrix(subject), _off_by_one)


def _off_by_one(numbers: Numbers) -> None:
    block = numbers.codes[2, 32:64]
    numbers.codes[2, 32:64] = np.where(block < numbers.largest, block + 1, block - 1)


def _codes_of(bits: int) -> Make:
    """The same fault in the last linear that has codes of so many bits."""

    def fault(subject: Subject) -> str:
        linears = [
            spec for spec in subject.model.specs.values() if spec.role.kind is Kind.LINEAR and spec.role.in_layer
        ]
        for spec in reversed(linears):
            if spec.shape[1] >= 64 and subject.place(spec.name).read().bits == bits:
                return subject.change(spec.name, _off_by_one)
        raise Inapplicable(f"no linear has codes of {bits} bits")

    return fault


def nibbles_exchanged(subject: Subject) -> str:
    """Codes of one row that share a byte, each in the other's place."""

    def edit(numbers: Numbers) -> None:
        row = numbers.codes[1]
        # Q4_0 puts codes 16 apart into a byte, the others neighbours.
        pairs = row.reshape(-1, 2, 16) if subject.target == "gguf" else row.reshape(-1, 2)
        numbers.codes[1] = pairs[:, ::-1].reshape(-1)

    return subject.change(_matrix(subject), edit)


def scales_larger(subject: Subject) -> str:
    """Every scale is 1.7 times what it was, so that all weights are."""
    return _every_scale(subject, lambda values: values * np.float32(LARGER))


def scales_as_bf16(subject: Subject) -> str:
    """Every scale is rounded to bf16, though its container has more digits."""
    return _every_scale(subject, lambda values: from_bf16(to_bf16(values)))


def _every_scale(subject: Subject, change: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> str:
    """Change the scales, and the biases in their unit, of all matrices; ValueError where that changes none."""
    changed: list[str] = []
    for spec in subject.model.specs.values():
        if not spec.role.is_matrix:
            continue
        place = subject.place(spec.name)
        numbers = place.read()
        new = [like(change(floats(array)), array) for array in numbers.scales]
        if any((one != other).any() for one, other in zip(new, numbers.scales, strict=True)):
            numbers.scales = new
            place.write(numbers)
            changed.append(spec.name)
    if not changed:
        raise Inapplicable("its scales are such numbers already")
    return "|".join(changed)


def one_weight(subject: Subject) -> str:
    """A single weight of a tensor without codes is another."""

    def edit(numbers: Numbers) -> None:
        flat = numbers.codes.reshape(-1)
        flat[5] = like(floats(flat[5:6]) * np.float32(1.5), numbers.codes)[0]

    return subject.change(name_of(Role.FINAL_NORM), edit)


Make = Callable[[Subject], Any]
Fault = Make | Harmless
FAULTS: dict[str, Fault] = {
    "q and k swapped": q_and_k_swapped,
    "a layer's weights from the neighbour": from_the_neighbour,
    "a square matrix transposed": transposed,
    "interleaved for half-split rotary": interleaved,
    "1 + weight norm for weight": norm_without_one,
    "layer scalar lost": layer_scalar_lost,
    "per-layer embedding shifted by a layer": per_layer_shifted,
    "one block's scale halved": scale_halved,
    "one block's codes off by one": codes_off_by_one,
    "2-bit codes off by one": _codes_of(2),
    "8-bit codes off by one": _codes_of(8),
    "nibbles exchanged": nibbles_exchanged,
    "one weight of a norm changed": one_weight,
    "every scale times 1.7": scales_larger,
    "scales rounded to bf16": scales_as_bf16,
}
