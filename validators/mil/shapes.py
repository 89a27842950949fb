"""MIL operations that move elements: shapes, slices, concatenation, padding, constants made on the spot.

Each says what coremltools' reference of its name says (coremltools.converters.mil.mil.ops.defs).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gemexport.validators.mil.registry import Unsupported, Weight, flag, integer, integers, number, op


@op("shape")
def shape(x: Tensor | Weight) -> Tensor:
    return torch.tensor(list(x.shape), dtype=torch.int32)


@op("reshape")
def reshape(x: Tensor, shape: Tensor) -> Tensor:
    """A zero copies the size of x at its place, counted from the last, or is 1 beyond it; one -1 takes what is left."""
    sizes = integers(shape)
    ones = [1] * max(0, len(sizes) - x.ndim)
    kept = [*ones, *x.shape][-len(sizes) :]
    return x.reshape([kept[i] if size == 0 else size for i, size in enumerate(sizes)])


@op("transpose")
def transpose(x: Tensor, perm: Tensor) -> Tensor:
    return x.permute(integers(perm))


@op("expand_dims")
def expand_dims(x: Tensor, axes: Tensor) -> Tensor:
    rank = x.ndim + len(integers(axes))
    for axis in sorted(axis % rank for axis in integers(axes)):
        x = x.unsqueeze(axis)
    return x


@op("squeeze")
def squeeze(x: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(integers(axes))


@op("flatten2d")
def flatten2d(x: Tensor, axis: Any = 1) -> Tensor:
    at = integer(axis) + x.ndim if integer(axis) < 0 else integer(axis)
    rows = int(torch.tensor(x.shape[:at]).prod()) if at else 1
    return x.reshape(rows, -1)


@op("concat")
def concat(values: list[Tensor], axis: Any, interleave: Any = False) -> Tensor:
    values = [value.reshape(1) if value.ndim == 0 else value for value in values]
    if flag(interleave):
        at = integer(axis) % values[0].ndim
        return torch.stack(values, at + 1).flatten(at, at + 1)
    return torch.cat(values, integer(axis))


@op("stack")
def stack(values: list[Tensor], axis: Any) -> Tensor:
    return torch.stack(values, integer(axis))


@op("split")
def split(x: Tensor, axis: Any, num_splits: Any = None, split_sizes: Tensor | None = None) -> tuple[Tensor, ...]:
    if split_sizes is not None:
        return torch.split(x, integers(split_sizes), integer(axis))
    return torch.chunk(x, integer(num_splits), integer(axis))


@op("tile")
def tile(x: Tensor, reps: Tensor) -> Tensor:
    return x.repeat(integers(reps))


@op("reverse")
def reverse(x: Tensor, axes: Tensor | None = None) -> Tensor:
    return torch.flip(x, integers(axes) if axes is not None else list(range(x.ndim)))


def _index(
    x: Tensor,
    begin: Tensor,
    end: Tensor,
    stride: Tensor | None,
    begin_mask: Tensor | None,
    end_mask: Tensor | None,
    squeeze_mask: Tensor | None,
) -> tuple[tuple[int | slice, ...], list[int]]:
    """Numpy's index for a slice with MIL's masks, and the axes that run backwards (which torch cannot slice)."""
    none = [0] * x.ndim
    starts, stops = integers(begin), integers(end)
    steps = [1] * x.ndim if stride is None else integers(stride)
    masks = [none if mask is None else integers(mask) for mask in (begin_mask, end_mask, squeeze_mask)]
    index: list[int | slice] = []
    backwards: list[int] = []
    for axis, (start, stop, step) in enumerate(zip(starts, stops, steps, strict=True)):
        if masks[2][axis]:
            index.append(start)
            continue
        chosen = range(x.shape[axis])[slice(None if masks[0][axis] else start, None if masks[1][axis] else stop, step)]
        if step < 0:
            backwards.append(axis)
            chosen = chosen[::-1]
        index.append(slice(chosen.start, chosen.stop, chosen.step))
    return tuple(index), backwards


def _turned(part: Tensor, index: tuple[int | slice, ...], backwards: list[int]) -> Tensor:
    """What lies at `index` of a tensor, with the axes the other way round that run `backwards`."""
    kept = [axis for axis, item in enumerate(index) if isinstance(item, slice)]
    return torch.flip(part, [kept.index(axis) for axis in backwards])


@op("slice_by_index")
def slice_by_index(
    x: Tensor,
    begin: Tensor,
    end: Tensor,
    stride: Tensor | None = None,
    begin_mask: Tensor | None = None,
    end_mask: Tensor | None = None,
    squeeze_mask: Tensor | None = None,
) -> Tensor:
    index, backwards = _index(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    # A copy: what a state's slice was read as must not change when the state is written.
    return _turned(x[index], index, backwards).clone()


@op("slice_by_size")
def slice_by_size(x: Tensor, begin: Tensor, size: Tensor) -> Tensor:
    starts = integers(begin)
    sizes = [x.shape[i] - starts[i] if n == -1 else n for i, n in enumerate(integers(size))]
    return x[tuple(slice(start, start + n) for start, n in zip(starts, sizes, strict=True))].clone()


@op("slice_update")
def slice_update(
    x: Tensor,
    update: Tensor,
    begin: Tensor,
    end: Tensor,
    stride: Tensor | None = None,
    begin_mask: Tensor | None = None,
    end_mask: Tensor | None = None,
    squeeze_mask: Tensor | None = None,
    in_place: bool = False,
) -> Tensor:
    """`x` with a slice replaced; `in_place` is the evaluator's own, for a state that is written back at once."""
    index, backwards = _index(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    result = x if in_place else x.clone()
    result[index] = _turned(update, index, backwards)
    return result


@op("pad")
def pad(x: Tensor, pad: Tensor, mode: str = "constant", constant_val: Any = 0.0) -> Tensor:
    """Before and after each of the last axes, first axis first; F.pad names the last axis first."""
    sizes = integers(pad)
    pairs = [sizes[i : i + 2] for i in range(0, len(sizes), 2)]
    order = [size for pair in reversed(pairs) for size in pair]
    if mode == "constant":
        return F.pad(x, order, value=number(constant_val))
    for at, (before, after) in enumerate(reversed(pairs)):
        x = _extended(x, x.ndim - 1 - at, before, after, mode)
    return x


def _extended(x: Tensor, axis: int, before: int, after: int, mode: str) -> Tensor:
    """More elements at both ends of an axis: the first and the last again, or mirrored at them."""
    size = x.shape[axis]
    places = torch.arange(-before, size + after)
    if mode == "replicate":
        return x.index_select(axis, places.clamp(0, size - 1))
    if max(before, after) >= size:
        raise Unsupported("a mirror image longer than what it mirrors is not documented")
    folded = (size - 1) - ((size - 1) - places.abs()).abs()
    return x.index_select(axis, folded)


@op("range_1d")
def range_1d(end: Tensor, start: Tensor, step: Tensor) -> Tensor:
    return torch.arange(start.item(), end.item(), step.item(), dtype=start.dtype)


@op("fill")
def fill(shape: Tensor, value: Any = 0.0) -> Tensor:
    return torch.full(integers(shape), value.item() if isinstance(value, Tensor) else value)


@op("fill_like")
def fill_like(ref_tensor: Tensor, value: Any = 0.0) -> Tensor:
    return torch.full(list(ref_tensor.shape), value.item() if isinstance(value, Tensor) else value)


@op("band_part")
def band_part(x: Tensor, lower: Any = -1, upper: Any = -1) -> Tensor:
    rows = torch.arange(x.shape[-2])[:, None]
    columns = torch.arange(x.shape[-1])[None]
    below, above = integer(lower), integer(upper)
    keep = ((rows - columns <= below) | torch.tensor(below < 0)) & ((columns - rows <= above) | torch.tensor(above < 0))
    return x * keep


@op("cumsum")
def cumsum(x: Tensor, axis: Any = 0, exclusive: Any = False, reverse: Any = False) -> Tensor:
    at = integer(axis)
    x = torch.flip(x, [at]) if flag(reverse) else x
    total = torch.cumsum(x, at) - (x if flag(exclusive) else 0)
    return torch.flip(total, [at]) if flag(reverse) else total


@op("reshape_like")
def reshape_like(
    x: Tensor, ref_tensors: list[Tensor], begins: list[Any], ends: list[Any], end_masks: list[Any]
) -> Tensor:
    """The shape is put together from parts of the shapes of `ref_tensors`."""
    sizes: list[int] = []
    for reference, begin, end, to_the_end in zip(ref_tensors, begins, ends, end_masks, strict=True):
        sizes += reference.shape[integer(begin) : None if flag(to_the_end) else integer(end)]
    return x.reshape(sizes)


@op("reverse_sequence")
def reverse_sequence(x: Tensor, lengths: Tensor, seq_axis: Any = 0, batch_axis: Any = 0) -> Tensor:
    """Of each element along `batch_axis`, the first of `lengths` elements along `seq_axis` in reverse order."""
    along, batch = integer(seq_axis) % x.ndim, integer(batch_axis) % x.ndim
    places = torch.arange(x.shape[along]).reshape([-1 if axis == along else 1 for axis in range(x.ndim)])
    counts = lengths.long().reshape([-1 if axis == batch else 1 for axis in range(x.ndim)])
    index = torch.where(places < counts, counts - 1 - places, places)
    return torch.take_along_dim(x, index.expand(x.shape), along)
