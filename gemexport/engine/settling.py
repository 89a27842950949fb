"""Widths for a loss are not left to a prediction: what was chosen is rounded, measured, and chosen again by that.

Losses of matrices are added up as if each were alone, and to second order; of a table the most is not known before its
codes are. The whole is therefore measured where verdicts measure it, on their texts: what they give is one number, by
which the curve is moved, and no code is chosen on them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from gemexport.engine.rounding import round_linears, rounds
from gemexport.formats.grids.allocation import Choice
from gemexport.formats.grids.recipe import Recipe
from gemexport.formats.storage.files import remove
from gemexport.formats.tensor import Grid, Rows, Tensor, TensorBase, on_grid
from gemexport.shared.place import Place, Progress, model_activations
from gemexport.shared.probes import probe_of

if TYPE_CHECKING:
    from pathlib import Path

TRIES = 4  # of widths, each of which takes a rounding of the whole model
NEAR, AIM = 0.9, 0.95  # of the loss that may be: what is near enough, and what is tried; formats differ by some percent


class Stored(TensorBase):
    """A tensor as its grid has it."""

    grid: Grid | None = None

    def __init__(self, tensor: Tensor) -> None:
        self.name, self.shape, self.dtype, self._tensor = tensor.name, tensor.shape, tensor.dtype, tensor

    def rows(self, start: int, stop: int) -> Rows:
        rows, grid = self._tensor.rows(start, stop), self._tensor.grid
        return rows if grid is None else Rows(on_grid(grid, *rows.grid()).values)


def lost(place: Place, name: str) -> float:
    """Nats a position that the grids of `place` cost, on the texts that verdicts are about; `name` is theirs alone."""
    checkpoint, source = place.open(), place.source()
    sequences, total = place.sequences(checkpoint), probe_of(checkpoint.model).sums()
    tensors: dict[str, Tensor] = {name: Stored(tensor) for name, tensor in checkpoint.tensors.items()}
    store = place.store(f"settling-{name}", checkpoint, tensors, model_activations(checkpoint))
    for tokens in sequences:
        for each in (source, store):
            each.compute([tokens])
        total.add(source.logits(tokens), store.logits(tokens), tokens)
    remove(store.folder)
    return float(probe_of(checkpoint.model).figures(total).mean)


def rounded_loss(place: Place, recipe: Recipe, text: Path | None) -> float:
    """The same once linears and head are rounded as the node `round` rounds them, which then finds it done."""
    if rounds(recipe):
        round_linears(place, recipe, text, lambda _: None)
    return lost(place, "chosen")


def settled(
    within: Callable[[float], Choice], measured: Callable[[Choice], float], most: float, progress: Progress
) -> tuple[Choice, float]:
    """The choice that comes near a loss of `most` nats from below, and what it loses.

    `within` gives the smallest whose prediction is within so many nats, `measured` what a choice loses once it is made:
    the one that is returned was measured last. Progress in tries. With none below `most`, it is the one with the least.
    """
    found: list[tuple[Choice, float]] = []
    aim = most
    for _ in range(TRIES):
        choice = within(aim)
        if any(choice == before for before, _ in found):
            break
        found.append((choice, measured(choice)))
        progress(1)
        loss = found[-1][1]
        if NEAR * most <= loss <= most or loss <= 0 or choice.loss <= 0:
            break
        aim = choice.loss * AIM * most / loss
    progress(TRIES - len(found))
    below = [item for item in found if item[1] <= most]
    best = max(below, key=lambda item: item[1]) if below else min(found, key=lambda item: item[1])
    return best if best is found[-1] else (best[0], measured(best[0]))
