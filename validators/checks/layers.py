"""Where a runtime departs from the reference: what each layer gives, side by side, on the same tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from gemexport.formats.gemma.names import CANONICAL, EMBEDDING, FINAL_NORM, layer_module, module_of
from gemexport.formats.gemma.roles import Role
from gemexport.formats.tensor import Floats

T = TypeVar("T")


@dataclass(frozen=True)
class Departure:
    """The first place whose values are another's: -1 is what goes into the first layer, `layers` the head."""

    layer: int
    name: str
    relative_error: float  # root mean square of the difference, relative to the reference's


def in_order(by_norm: Mapping[str, T]) -> list[T]:
    """What the norm before each layer reads, then the last norm; empty unless all are there."""
    found: list[T] = []
    while (name := CANONICAL.name(Role.INPUT_NORM, len(found))) in by_norm:
        found.append(by_norm[name])
    return [*found, by_norm[FINAL_NORM]] if found and FINAL_NORM in by_norm else []


def relative_error(found: Floats, expected: Floats) -> float:
    """Root mean square of the difference over that of `expected`; infinite where a number is none."""
    ours, theirs = np.asarray(expected, np.float64), np.asarray(found, np.float64)
    error = float(np.sqrt(np.square(theirs - ours).mean() / max(np.square(ours).mean(), 1e-30)))
    return error if np.isfinite(error) else float("inf")


def departure(found: Sequence[Floats], expected: Iterable[Floats], limit: float) -> Departure | None:
    """The first of the layers' inputs and outputs that is further from the reference than `limit`; None: none is.

    No more of `expected` is asked for than that takes.
    """
    for index, (theirs, ours) in enumerate(zip(found, expected, strict=True)):
        error = relative_error(theirs, ours)
        if error > limit:
            name = layer_module(index - 1) if index else module_of(EMBEDDING)
            return Departure(index - 1, name, error)
    return None
