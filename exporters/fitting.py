"""The one question that a format answers for each tensor: what would hold this grid, if anything does?

Every exporter has `container(grid, width, variant)`, and writes what `fitting` gives it. The table in docs/exactness.md
comes from the same answers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gemexport.formats.activations import Activations
from gemexport.formats.checkpoint import Checkpoint
from gemexport.formats.promise import Promise
from gemexport.formats.tensor import DType, Grid, Plain, Tensor


@dataclass(frozen=True)
class Container:
    """What holds a grid: its codes pass through unchanged."""

    name: str  # as the format calls it
    scales: DType  # what scales (and biases) are stored in: wider ones are rounded


Answer = Container | str  # or why nothing holds it, as half a sentence


def fitting(
    checkpoint: Checkpoint, container: Callable[[Grid, int], Answer], placed: Activations | None = None
) -> tuple[dict[str, Tensor], dict[str, Container], list[str]]:
    """The checkpoint's tensors as a format holds them, the containers of those that keep a grid, and notes.

    `placed` are those of the checkpoint's static activation scales that the format computes with. A grid that has no
    container is dropped: the values are then written as the format writes plain ones, or put on the grid that every
    format holds where the source had nothing but codes (`Checkpoint.fallbacks`).
    """
    tensors: dict[str, Tensor] = {}
    containers: dict[str, Container] = {}
    notes = []
    for name, tensor in checkpoint.tensors.items():
        tensors[name] = tensor
        if tensor.grid is None:
            continue
        answer = container(tensor.grid, tensor.shape[-1])
        if isinstance(answer, str):
            second = checkpoint.fallbacks.get(name)
            again = container(second.grid, second.shape[-1]) if second is not None and second.grid is not None else ""
            if second is not None and second.grid is not None and isinstance(again, Container):
                tensors[name], containers[name] = second, again
                becomes = f"is rounded to {second.grid.bits} bit, blocks of {second.grid.block}"
            else:
                tensors[name] = Plain(tensor)
                becomes = "is written without its grid"
            notes.append(f"{name} {becomes}: {answer}")
        else:
            containers[name] = answer
    return tensors, containers, [*notes, *left_out(checkpoint.activations, placed)]


def promises(checkpoint: Checkpoint, container: Callable[[Grid, int], Answer]) -> dict[str, Promise]:
    """What an artefact has to hold of each tensor: the codes that its format has a place for, as `fitting` says it.

    A format that rounds anything besides, or makes codes of values, has a function `promises` of its own beside its
    `container`.
    """
    tensors, containers, _ = fitting(checkpoint, container)
    found = {}
    for name, tensor in tensors.items():
        held = containers.get(name)
        found[name] = Promise(tensor, scales="f32" if held is None else held.scales)
    return found


def left_out(activations: Activations | None, placed: Activations | None = None) -> list[str]:
    """A sentence about static activation scales that an artefact has no place for, if there are any."""
    there, kept = activations or Activations(), placed or Activations()
    linears, caches = len(there.linears) - len(kept.linears), len(there.caches) - len(kept.caches)
    counted = [f"{count} {kind}" for count, kind in ((linears, "linears"), (caches, "caches")) if count]
    if not counted:
        return []
    return [f"static activation scales of {' and '.join(counted)} are left out: these stay in floating point"]
