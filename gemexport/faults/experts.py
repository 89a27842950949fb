"""Faults of a mixture of experts, for every format at once, in the stacks however a format keeps them apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemexport.faults.stored import Numbers, Place, like
from gemexport.faults.weights import Subject, name_of
from gemexport.formats.gemma.architecture import TensorSpec
from gemexport.formats.gemma.roles import Role
from gemexport.formats.gemma.stacks import Layout, Part, by_expert, switched, together

LAYER = 1
LAYOUTS: dict[str, Layout] = {"mlx": switched, "compressed-tensors": by_expert}


class Stack:
    """The rows of a tensor of ours, in the places of a format's parts of it."""

    def __init__(self, parts: Sequence[tuple[Part, Place]]) -> None:
        self._places = [place for _, place in parts]
        rows = [np.concatenate([np.arange(start, stop) for start, stop in part.rows]) for part, _ in parts]
        self._rows: list[NDArray[np.intp]] = rows

    def read(self) -> Numbers:
        found = [place.read() for place in self._places]
        order = np.argsort(np.concatenate(self._rows))
        scales = [np.concatenate(arrays)[order] for arrays in zip(*(each.scales for each in found), strict=True)]
        return Numbers(np.concatenate([each.codes for each in found])[order], scales, found[0].bits)

    def write(self, numbers: Numbers) -> None:
        for rows, place in zip(self._rows, self._places, strict=True):
            place.write(Numbers(numbers.codes[rows], [array[rows] for array in numbers.scales]))


def _changed(subject: Subject, role: Role, edit: Callable[[Numbers, TensorSpec], None]) -> str:
    """Apply `edit` to the numbers of a stack, row by row of ours; returns its name."""
    spec = subject.model.specs[name_of(role, LAYER)]
    parts = LAYOUTS.get(subject.target, together)(spec)
    place = Stack([(part, subject.place(part.name)) for part in parts])
    numbers = place.read()
    edit(numbers, spec)
    place.write(numbers)
    return spec.name


def _in_order(numbers: Numbers, order: NDArray[np.intp]) -> None:
    numbers.codes = numbers.codes[order]
    numbers.scales = [array[order] for array in numbers.scales]


def experts_exchanged(subject: Subject) -> str:
    """The second projections of two experts in each other's place."""

    def edit(numbers: Numbers, spec: TensorSpec) -> None:
        rows = np.arange(spec.shape[0] * spec.shape[1]).reshape(spec.shape[:2])
        _in_order(numbers, rows[[1, 0, *range(2, spec.shape[0])]].reshape(-1))

    return _changed(subject, Role.EXPERT_DOWN, edit)


def halves_swapped(subject: Subject) -> str:
    """The up projection of each expert where its gate should be."""

    def edit(numbers: Numbers, spec: TensorSpec) -> None:
        rows = np.arange(spec.shape[0] * spec.shape[1]).reshape(spec.shape[0], 2, -1)
        _in_order(numbers, rows[:, ::-1].reshape(-1))

    return _changed(subject, Role.EXPERT_GATE_UP, edit)


def router_rows_swapped(subject: Subject) -> str:
    """Two experts that are chosen by each other's scores."""
    order = np.arange(subject.model.specs[name_of(Role.ROUTER, LAYER)].shape[0])
    order[:2] = 1, 0
    return subject.change(name_of(Role.ROUTER, LAYER), lambda numbers: _in_order(numbers, order))


def scale_lost(subject: Subject) -> str:
    """What experts give is not multiplied by a number of their own."""

    def edit(numbers: Numbers) -> None:
        numbers.codes = like(np.ones(numbers.codes.shape, np.float32), numbers.codes)

    return subject.change(name_of(Role.EXPERT_SCALE, LAYER), edit)


def dense_lost(subject: Subject) -> str:
    """Nothing of the MLP beside the experts is left: its norm multiplies by nought."""

    def edit(numbers: Numbers) -> None:
        numbers.codes = like(np.zeros(numbers.codes.shape, np.float32), numbers.codes)

    return subject.change(name_of(Role.POST_DENSE_NORM, LAYER), edit)


FAULTS: dict[str, Callable[[Subject], Any]] = {
    "two experts exchanged": experts_exchanged,
    "gate and up of experts swapped": halves_swapped,
    "router rows swapped": router_rows_swapped,
    "per-expert scale lost": scale_lost,
    "dense MLP lost": dense_lost,
}
