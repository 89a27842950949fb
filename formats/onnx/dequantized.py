"""Tensors that DequantizeLinear makes, whoever wrote it: a scale a tensor, a channel or a block, along any axis.

(https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gemexport.formats.onnx.blocks import PackedTensor
from gemexport.formats.onnx.stored import FLOATS, INTEGERS, SMALL_FLOATS, Elements, array, described, needed
from gemexport.formats.onnx.walk import Use, attribute, turned, type_name, uses
from gemexport.formats.storage.errors import InputError
from gemexport.formats.storage.minifloat import E2M1
from gemexport.formats.tensor import DType, Floats, Grid, Kind, Rows, TensorBase, on_grid, row_count

if TYPE_CHECKING:
    import onnx_ir as ir

REMEDY = "export it with a layout of the ONNX standard"
SCALES = frozenset((*FLOATS, "FLOAT8E8M0"))
_PLACES = (("axis", 1), ("block_size", 0))  # attributes that say which scale belongs to what, and their defaults
Index = NDArray[np.int64]
Parts: TypeAlias = tuple[NDArray[Any], Floats, NDArray[np.int64]]  # codes [rows, in]; scales, zeros [rows, blocks]
_DTYPES: dict[str, DType] = {"FLOAT16": "f16", "BFLOAT16": "bf16"}


@dataclass(frozen=True)
class View:
    """A tensor of `shape` whose elements lie `strides` apart in a stored one; `sizes` of them share each along an axis.

    Of the tensor itself, that is one; of its scales and zero points, a block.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, shape: Sequence[int]) -> View:
        """A stored tensor as it lies."""
        strides = [int(np.prod(shape[axis + 1 :], dtype=np.int64)) for axis in range(len(shape))]
        return cls(tuple(shape), tuple(strides), (1,) * len(shape))

    @classmethod
    def shared(cls, shape: Sequence[int], stored: Sequence[int], axis: int, block: int) -> View | None:
        """Scales of shape `stored` seen as a tensor of `shape`; None where they do not fit it."""
        rank = len(shape)
        if not stored or tuple(stored) == (1,):
            return cls(tuple(shape), (0,) * rank, (1,) * rank)
        if not -rank <= axis < rank:
            return None
        along = axis % rank
        if block:
            fits = [-(-size // block) if each == along else size for each, size in enumerate(shape)]
            sizes = tuple(block if each == along else 1 for each in range(rank))
            return cls(tuple(shape), cls.of(fits).strides, sizes) if tuple(stored) == tuple(fits) else None
        strides = tuple(1 if each == along else 0 for each in range(rank))
        return cls(tuple(shape), strides, (1,) * rank) if tuple(stored) == (shape[along],) else None

    def permuted(self, axes: Sequence[int]) -> View:
        """The same elements with the axes in another order."""
        return View(*(tuple(part[axis] for axis in axes) for part in (self.shape, self.strides, self.sizes)))

    @property
    def block(self) -> int:
        """How many elements of a row share one: a divisor of the row, so 1 where the last block is a shorter one."""
        size = self.sizes[-1] if self.strides[-1] else self.shape[-1]
        return size if self.shape[-1] % size == 0 else 1

    def rows(self, start: int, stop: int, block: int) -> Index:
        """`[rows, in / block]`: where the elements of rows lie, one for each block of the last axis.

        Rows count all axes but the last as one.
        """
        first = np.zeros(stop - start, np.int64)
        if len(self.shape) > 1:
            lead = np.unravel_index(np.arange(start, stop), self.shape[:-1])
            for part, stride, size in zip(lead, self.strides, self.sizes, strict=False):
                first += part // size * stride
        steps = np.arange(0, self.shape[-1], block, dtype=np.int64) // self.sizes[-1] * self.strides[-1]
        return first[:, None] + steps


Factor: TypeAlias = tuple[Elements, View]  # scales or zero points, seen as a tensor of the shape of what they belong to


class DequantizedTensor(TensorBase):
    """A tensor `[…, out, in]` of codes, scales and zero points: value = (code - zero point) * scale.

    It has a grid where codes fit into a byte and zero points are such codes. With `rounded` the codes are not stored,
    but floats that QuantizeLinear makes integers of that type of.
    """

    dtype: DType = "f32"

    def __init__(
        self,
        name: str,
        stored: Elements,
        view: View,
        scales: Factor,
        zeros: Factor | None,
        rounded: str | None = None,
    ) -> None:
        self.name, self.shape = name, view.shape
        self._stored, self._view, self._scales, self._zeros = stored, view, scales, zeros
        self._kind, self._rounded = rounded or stored.kind, rounded is not None
        self._bits = INTEGERS.get(self._kind, stored.bits)
        self._signed = self._kind.startswith("INT")
        self._block = scales[1].block
        self.grid = self._gridded(np.zeros(1, np.int64) if zeros is None else zeros[0].whole())

    def _gridded(self, zeros: NDArray[Any]) -> Grid | None:
        dtype = _DTYPES.get(self._scales[0].kind, "f32")
        if self._kind == "FLOAT4E2M1":
            return Grid(4, self._block, dtype, True, "codebook", E2M1)
        low = -(1 << (self._bits - 1)) if self._signed else 0
        codes = (zeros >= low).all() and (zeros < low + (1 << self._bits)).all()  # a cast may have made them wider
        if self._kind not in INTEGERS or self._bits > 8 or not codes:
            return None
        kind: Kind = "zero-point" if zeros.any() or not self._signed else "symmetric"
        return Grid(self._bits, self._block, dtype, True, kind)

    def rows(self, start: int, stop: int) -> Rows:
        codes, scales, zeros = self._parts(start, stop)
        if self.grid is None:
            return Rows(self._evaluated(codes, scales, zeros).astype(np.float32))
        if self.grid.kind != "zero-point":
            return on_grid(self.grid, codes, scales)
        middle = 1 << (self._bits - 1) if self._signed else 0
        unsigned = (codes.astype(np.int16) + middle).astype(np.uint8)
        return on_grid(self.grid, unsigned, scales, (zeros + middle).astype(np.float32))

    def _parts(self, start: int, stop: int) -> Parts:
        scale, seen = self._scales
        scales = scale.at(seen.rows(start, stop, self._block))
        zeros = np.zeros(scales.shape, np.int64)
        if self._zeros is not None:
            zero, seen = self._zeros
            zeros = zero.at(seen.rows(start, stop, self._block)).astype(np.int64)
        codes = self._stored.at(self._view.rows(start, stop, 1))
        return (self._codes(codes, scales, zeros) if self._rounded else codes), scales, zeros

    @staticmethod
    def _evaluated(codes: NDArray[Any], scales: Floats, zeros: NDArray[np.int64]) -> NDArray[np.float64]:
        wide = codes.reshape(*scales.shape, -1) - zeros[..., None].astype(np.float64)
        return (wide * scales[..., None].astype(np.float64)).reshape(codes.shape)

    def _codes(self, values: Floats, scales: Floats, zeros: NDArray[np.int64]) -> NDArray[Any]:
        """What QuantizeLinear makes of floats: to the nearest, ties to even, and what lies beyond to the last."""
        low = -(1 << (self._bits - 1)) if self._signed else 0
        wide = np.rint(values.reshape(*scales.shape, -1) / scales[..., None]).astype(np.float64) + zeros[..., None]
        codes = np.clip(wide, low, low + (1 << self._bits) - 1).reshape(values.shape)
        narrow: type[np.integer[Any]] = np.int8 if self._signed else np.uint8
        found: NDArray[Any] = codes.astype(narrow if self._bits <= 8 else np.int64)
        return found

    def exact(self) -> NDArray[np.float64]:
        """All values in the tensor's own shape, not rounded: of small ones."""
        codes, scales, zeros = self._parts(0, row_count(self.shape))
        return self._evaluated(codes, scales, zeros).reshape(self.shape)


def dequantized(name: str, value: ir.Value, use: Use, file: Path) -> PackedTensor | DequantizedTensor:
    """What the DequantizeLinear of `use` makes of an initializer, or the one behind the QuantizeLinear of `use`.

    Raises InputError, naming operator and initializer, for what the standard does not have.
    """
    stored, node = Elements(value, file), use.node
    rounded = None
    if node.op_type == "QuantizeLinear":
        rounded, node = _rounded(value, use, file)
    where = f"{use.called} reads {value.name}"
    kind = rounded or stored.kind
    if kind not in INTEGERS and kind not in SMALL_FLOATS:
        raise InputError(file, f"{where}, which is {kind}", REMEDY)
    if lossy := [cast for cast in use.casts if rounded is None and not _holds(cast, kind)]:
        raise InputError(file, f"{where}, cast from {kind} to {lossy[0]}", REMEDY)
    view = View.of(stored.shape or (1,))
    for order in use.orders:
        view = view.permuted(order or tuple(reversed(range(len(view.shape)))))
    factors = _factors(node, view, where, file)
    if kind in SMALL_FLOATS and factors[1] is not None and factors[1][0].whole().any():
        raise InputError(file, f"{where} with zero points, which {kind} has none of", REMEDY)
    wanted = len(view.shape) > 1 and turned(node.outputs[0])
    seen, beside = factors[0][1], factors[1]
    if wanted:
        order = (*range(len(view.shape) - 2), len(view.shape) - 1, len(view.shape) - 2)
        view, seen = view.permuted(order), seen.permuted(order)
        beside = None if beside is None else (beside[0], beside[1].permuted(order))
    if rounded is None and not use.orders and _whole_bytes(stored, view, seen, factors[0][0]):
        return _packed(name, array(value, file), stored, view.shape[1] // seen.block, factors, wanted)
    zeros = None if kind in SMALL_FLOATS else beside
    return DequantizedTensor(name, stored, view, (factors[0][0], seen), zeros, rounded)


def _factors(node: ir.Node, view: View, where: str, file: Path) -> tuple[Factor, Factor | None]:
    """The scales and zero points of a DequantizeLinear, seen as tensors of the shape of what it reads."""
    axis, block = attribute(node, "axis", 1), attribute(node, "block_size", 0)
    found: list[Factor] = []
    for i, what in ((1, "scales"), (2, "zero points"))[: 1 + (len(node.inputs) > 2 and node.inputs[2] is not None)]:
        elements = Elements(needed(node, i, file), file)
        seen = View.shared(view.shape, elements.shape, axis, block)
        if seen is None or (i == 1 and elements.kind not in SCALES):
            problem = f"{where} with {what} {elements.kind} {list(elements.shape)} along axis {axis}, blocks of {block}"
            raise InputError(file, problem, REMEDY)
        found.append((elements, seen))
    return found[0], found[1] if len(found) > 1 else None


def _holds(target: str, kind: str) -> bool:
    """Whether a cast to `target` changes no value of type `kind`."""
    if target not in INTEGERS or kind not in INTEGERS:
        return target == kind or (kind in SMALL_FLOATS and target in FLOATS)
    room = INTEGERS[target] - INTEGERS[kind]
    return room >= 0 if target.startswith("U") == kind.startswith("U") else room > 0 and kind.startswith("U")


def _rounded(value: ir.Value, use: Use, file: Path) -> tuple[str, ir.Node]:
    """The type that a QuantizeLinear makes of an initializer, and the DequantizeLinear that reads just that back."""
    quantizer = use.node
    readers = list(uses(quantizer.outputs[0]))
    if not readers or any(not reader.reads("DequantizeLinear", 0) or reader.orders for reader in readers):
        problem = f"{use.called} reads {value.name}, and no DequantizeLinear what it gives"
        raise InputError(file, problem, REMEDY)
    reader = readers[0].node
    for i in range(1, max(len(quantizer.inputs), len(reader.inputs))):
        one, other = (Elements(needed(node, i, file), file).whole() for node in (quantizer, reader))
        if not np.array_equal(one, other):
            raise InputError(file, f"{reader.name} reads back others than {use.called} makes of {value.name}", REMEDY)
    if any(attribute(quantizer, key, default) != attribute(reader, key, default) for key, default in _PLACES):
        raise InputError(file, f"{reader.name} reads back others than {use.called} makes of {value.name}", REMEDY)
    if len(quantizer.inputs) > 2 and quantizer.inputs[2] is not None:
        return described(needed(quantizer, 2, file), file)[0], reader
    stated = attribute(quantizer, "output_dtype", 0)
    return type_name(stated) if stated else "UINT8", reader


def _whole_bytes(stored: Elements, view: View, scales: View, scale: Elements) -> bool:
    """Whether a matrix can be read by whole bytes: rows fill some, and scales are those of blocks along `in`."""
    if stored.kind not in INTEGERS or stored.bits > 8 or len(view.shape) != 2 or scale.kind not in FLOATS:
        return False
    along = scales.sizes[0] == 1 and (scales.block > 1 or view.shape[1] == 1)
    return along and stored.shape[1] * stored.bits % 8 == 0


def _packed(
    name: str, codes: NDArray[Any], stored: Elements, blocks: int, factors: tuple[Factor, Factor | None], wanted: bool
) -> PackedTensor:
    """A matrix whose rows fill whole bytes, with `blocks` scales along `in`; `wanted` the other way round it lies."""
    out = stored.shape[1 if wanted else 0]
    shape = (blocks, out) if wanted else (out, blocks)

    def spread(values: NDArray[Any], size: tuple[int, ...]) -> NDArray[Any]:
        flat = values.reshape(size if len(size) == 2 else (1, -1) if wanted else (-1, 1))
        return np.broadcast_to(flat, shape)

    (scale, _), zero = factors
    middle = 0 if stored.signed else 1 << (stored.bits - 1)
    zeros = np.zeros(1, np.int64) if zero is None else zero[0].whole()
    shifts = zeros.astype(np.float32) - np.float32(middle)
    # Asked before they are spread over all blocks: mostly all are 0.
    shifted = spread(shifts, () if zero is None else zero[0].shape) if shifts.any() else None
    scales = spread(scale.stored(), scale.shape)
    signed = stored.signed
    return PackedTensor(
        name, codes.view(np.uint8), scales, stored.bits, signed=signed, transposed=wanted, zero_points=shifted
    )
