"""MIL operations that pick elements by index and put them there, and those that find the indices.

Each says what coremltools' reference of its name says (coremltools.converters.mil.mil.ops.defs, scatter_gather.py and
tensor_operation.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gemexport.validators.mil.registry import Unsupported, Weight, flag, integer, op


def _counted(index: Tensor, size: int, validate: Any) -> Tensor:
    """Indices counted from the front; before iOS 17, which `validate_indices` came with, negative ones from the end.

    What lies outside is an error with `validate_indices`, and not documented without.
    """
    if validate is None:
        index = torch.where(index < 0, index + size, index)
    if ((index < 0) | (index >= size)).any():
        raise Unsupported(f"an index lies outside of the {size} places there are")
    return index


@op("gather", by_rows=("x",))
def gather(
    x: Tensor | Weight, indices: Tensor, axis: Any = 0, batch_dims: Any = 0, validate_indices: Any = None
) -> Tensor:
    at, batch = integer(axis), integer(batch_dims)
    index = indices.long()
    if isinstance(x, Weight):
        if at == 0 and batch == 0:
            return x.pick(_counted(index, x.shape[0], validate_indices))
        x = x.whole()
    at %= x.ndim
    index = _counted(index, x.shape[at], validate_indices)
    if batch == 0:
        return x.index_select(at, index.reshape(-1)).reshape((*x.shape[:at], *index.shape, *x.shape[at + 1 :]))
    lead = x.shape[:batch]
    flat = x.reshape(-1, *x.shape[batch:])
    wanted = index.reshape(flat.shape[0], *index.shape[batch:])
    parts = [gather(one, rows, at - batch, 0, validate_indices) for one, rows in zip(flat, wanted, strict=True)]
    return torch.stack(parts).reshape((*lead, *parts[0].shape))


@op("gather_along_axis")
def gather_along_axis(x: Tensor, indices: Tensor, axis: Any = 0, validate_indices: Any = None) -> Tensor:
    return torch.take_along_dim(x, _counted(indices.long(), x.shape[integer(axis)], validate_indices), integer(axis))


@op("gather_nd")
def gather_nd(x: Tensor, indices: Tensor, batch_dims: Any = 0, validate_indices: Any = None) -> Tensor:
    if integer(batch_dims):
        pairs, batch = zip(x, indices, strict=True), integer(batch_dims) - 1
        return torch.stack([gather_nd(a, b, batch, validate_indices) for a, b in pairs])
    return x[_places(x, indices, validate_indices)]


def _places(x: Tensor, indices: Tensor, validate: Any) -> tuple[Tensor, ...]:
    """The last axis of `indices` as one index for each of the first axes of `x`."""
    return tuple(_counted(part.long(), x.shape[axis], validate) for axis, part in enumerate(indices.unbind(-1)))


def _combine(flat: Tensor, index: Tensor, updates: Tensor, mode: str) -> Tensor:
    """`flat` `[places]` with `updates` put, or worked in, at `index`; of several at one place, every one counts.

    Of several that replace, coremltools leaves open which wins; here the last one does.
    """
    if mode == "update":
        result = flat.clone()
        for place, value in zip(index.tolist(), updates, strict=True):
            result[place] = value
        return result
    if mode in ("add", "sub"):
        return flat.index_add(0, index, updates if mode == "add" else -updates)
    if mode == "div":
        return flat / torch.ones_like(flat).scatter_reduce(0, index, updates, "prod")
    reduce = {"mul": "prod", "max": "amax", "min": "amin"}[mode]
    return flat.scatter_reduce(0, index, updates, reduce)


def _scattered(data: Tensor, places: tuple[Tensor, ...], updates: Tensor, mode: str) -> Tensor:
    """`data` with `updates` at `places`, an index for each axis, all of one shape."""
    index = torch.zeros_like(places[0])
    for axis, part in enumerate(places):
        index = index * data.shape[axis] + part
    return _combine(data.reshape(-1), index.reshape(-1), updates.reshape(-1), mode).reshape(data.shape)


def _mesh(shape: torch.Size | tuple[int, ...]) -> list[Tensor]:
    return list(torch.meshgrid(*[torch.arange(size) for size in shape], indexing="ij"))


@op("scatter")
def scatter(
    data: Tensor, indices: Tensor, updates: Tensor, axis: Any = 0, mode: str = "add", validate_indices: Any = None
) -> Tensor:
    """Slices of `data` across an axis; `updates` has the indices' shape in the place of that axis."""
    at = integer(axis) % data.ndim
    flat = updates.reshape(*data.shape[:at], -1, *data.shape[at + 1 :])
    index = _counted(indices.long().reshape(-1), data.shape[at], validate_indices)
    places = _mesh(flat.shape)
    places[at] = index[places[at]]
    return _scattered(data, tuple(places), flat, mode)


@op("scatter_along_axis")
def scatter_along_axis(
    data: Tensor, indices: Tensor, updates: Tensor, axis: Any = 0, mode: str = "add", validate_indices: Any = None
) -> Tensor:
    at = integer(axis) % data.ndim
    places = _mesh(indices.shape)
    places[at] = _counted(indices.long(), data.shape[at], validate_indices)
    return _scattered(data, tuple(places), updates, mode)


@op("scatter_nd")
def scatter_nd(
    data: Tensor, indices: Tensor, updates: Tensor, mode: str = "add", validate_indices: Any = None
) -> Tensor:
    depth, lead = indices.shape[-1], indices.shape[:-1]
    rest = data.shape[depth:]
    whole = _mesh((*lead, *rest))
    found = [
        part.reshape(*lead, *[1] * len(rest)).expand(*lead, *rest) for part in _places(data, indices, validate_indices)
    ]
    return _scattered(data, (*found, *whole[len(lead) :]), updates, mode)


@op("one_hot")
def one_hot(indices: Tensor, one_hot_vector_size: Any, axis: Any = -1, on_value: Any = 1, off_value: Any = 0) -> Tensor:
    hot = indices.long().unsqueeze(-1) == torch.arange(integer(one_hot_vector_size))
    values = torch.where(hot, torch.as_tensor(on_value), torch.as_tensor(off_value))
    return torch.movedim(values, -1, integer(axis))


@op("topk")
def topk(
    x: Tensor,
    k: Any = 1,
    axis: Any = -1,
    ascending: Any = False,
    sort: Any = True,
    return_indices: Any = True,
    output_indices_dtype: str = "int32",
) -> tuple[Tensor, ...]:
    at = integer(axis)
    count = x.shape[at] if integer(k) == -1 else integer(k)
    values, indices = torch.topk(x, count, at, largest=not flag(ascending), sorted=True)
    return (values, indices) if flag(return_indices) else (values,)


@op("argsort")
def argsort(x: Tensor, axis: Any = -1, ascending: Any = False) -> Tensor:
    return torch.argsort(x, dim=integer(axis), descending=not flag(ascending), stable=True)


@op("non_zero")
def non_zero(x: Tensor) -> Tensor:
    return torch.nonzero(x)
