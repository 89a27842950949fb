"""MIL operations on lists of tensors, which loops fill.

Each says what coremltools' reference of its name says (coremltools.converters.mil.mil.ops.defs, control_flow.py). A
list is Python's, of tensors of one shape; a new one comes out of each operation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gemexport.validators.mil.registry import Unsupported, flag, integer, integers, op

_DTYPES = {"bool": torch.bool, "int32": torch.int32}


class TensorList(list[Tensor]):
    """A list of tensors, of `shape` (None if it is known by what is written only); one that grows when written past."""

    def __init__(self, elements: list[Tensor], empty: Tensor | None, grows: bool) -> None:
        super().__init__(elements)
        self.empty, self.grows = empty, grows

    def written(self, places: list[int], values: list[Tensor]) -> TensorList:
        """The list with `values` at `places`."""
        result = TensorList(list(self), self.empty, self.grows)
        if result.empty is None and values:
            result.empty = torch.zeros_like(values[0])
            result[:] = [result.empty for _ in result]
        for place, value in zip(places, values, strict=True):
            if place < 0 or (place >= len(result) and not self.grows):
                raise Unsupported(f"there is no element {place} in a list of {len(result)}")
            while len(result) <= place:
                result.append(torch.zeros_like(value))
            result[place] = value
        return result

    def taken(self, place: int) -> Tensor:
        """The element at `place`."""
        if not 0 <= place < len(self) or self.empty is None:
            raise Unsupported(f"element {place} of a list of {len(self)} was never written")
        return self[place]


@op("make_list")
def make_list(
    elem_shape: list[Any], init_length: Any = 1, dynamic_length: Any = True, dtype: str = "fp32"
) -> TensorList:
    """Zeros of `elem_shape`; a name in it is a size that is not known before something is written."""
    known = all(not isinstance(size, str) for size in elem_shape)
    empty = torch.zeros([integer(size) for size in elem_shape], dtype=_DTYPES.get(dtype)) if known else None
    filler = torch.zeros(()) if empty is None else empty
    return TensorList([filler] * integer(init_length), empty, flag(dynamic_length))


@op("list_length")
def list_length(ls: TensorList) -> Tensor:
    return torch.tensor(len(ls), dtype=torch.int32)


@op("list_read")
def list_read(ls: TensorList, index: Any) -> Tensor:
    return ls.taken(integer(index))


@op("list_write")
def list_write(ls: TensorList, index: Any, value: Tensor) -> TensorList:
    return ls.written([integer(index)], [value])


@op("list_gather")
def list_gather(ls: TensorList, indices: Tensor) -> Tensor:
    return torch.stack([ls.taken(place) for place in integers(indices)])


@op("list_scatter")
def list_scatter(ls: TensorList, indices: Tensor, value: Tensor) -> TensorList:
    return ls.written(integers(indices), list(value))
