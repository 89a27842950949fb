"""The middle form: a tensor read row by row, with the integer grid that its values lie on, if they lie on one.

Readers yield it, writers ask it one question: can I hold this grid exactly? A code stands for a level, and `block`
consecutive weights of a row share a scale and, on some grids, a shift of it:

    symmetric    w = scale * code              codes signed
    zero-point   w = scale * (code - zero)     codes and zeros unsigned integers
    affine       w = scale * code + bias       codes unsigned, any bias
    codebook     w = scale * levels[code]      codes unsigned
    vectors      w = scale * sum of vectors    a code of each codebook for some weights together, unsigned

Rows are the last axis, whatever the rank: the axes before it count as one. Experts `[128, 1408, 2816]` are 180,224 rows
of 2,816 weights; a norm `[n]` is one row of n, a scalar `[]` one row of one. So whatever reads rows reads any tensor a
slice at a time, and no reader or writer asks for a rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

DType = Literal["bf16", "f16", "f32"]
Floats = NDArray[np.float32]
Codes = NDArray[np.integer[Any]]  # int8 of symmetric grids, uint8 of the others
Kind = Literal["symmetric", "zero-point", "affine", "codebook", "vectors"]

_INFINITY = 0x7F800000  # its bits as float32; above them lie NaNs
_F16_NORMAL = (0x38800000, 0x477FE000)  # 2**-14 and 65,504, between which a float16 has all of its 11 bits
ITEM_BYTES: dict[DType, int] = {"bf16": 2, "f16": 2, "f32": 4}


@dataclass(frozen=True)
class Grid:
    """What the values of a tensor are multiples of."""

    bits: int  # signed codes lie in [-2**(bits - 1), 2**(bits - 1) - 1], unsigned ones in [0, 2**bits - 1]
    block: int  # consecutive weights along the last axis that share a scale; divides the row
    scale_dtype: DType  # the narrowest dtype that holds every scale, and every bias of an affine grid
    lossless: bool  # what the grid stands for, rounded to the tensor's dtype, is the source's value bit for bit
    kind: Kind = "symmetric"
    levels: tuple[float, ...] = ()  # of a codebook, by code; of vectors, the numbers of all, as in `vectors`
    vector: int = 1  # consecutive weights that a code stands for: more than one on vectors
    codebooks: int = 1  # whose vectors are added up

    @property
    def width(self) -> int:
        """The bits of a weight; on vectors, of one's share of the codes, rounded up."""
        return -(-self.bits * self.codebooks // self.vector)

    @property
    def codec(self) -> str | None:
        """How a grid of vectors is spelled (formats/grids/vector_codec); None for the others."""
        return f"aqlm:{self.codebooks}x{self.bits}:{self.vector}" if self.kind == "vectors" else None

    @cached_property
    def vectors(self) -> Floats:
        """The codebooks of a grid of vectors, `[codebooks, 2**bits, vector]`."""
        return np.asarray(self.levels, np.float32).reshape(self.codebooks, -1, self.vector)


def row_count(shape: Sequence[int]) -> int:
    """How many rows a tensor of this shape has: the product of all axes but the last."""
    return math.prod(shape[:-1])


def matrix_of(shape: Sequence[int]) -> tuple[int, int]:
    """A tensor's rows, and the weights of each: its shape with the leading axes counted as one."""
    return row_count(shape), shape[-1] if shape else 1


class Rows:
    """A slice of rows `[rows, in]`: values, and of a tensor that has a grid codes `[rows, in]`, scales and shifts.

    On vectors there is a code a codebook for each vector of weights, `[rows, in // vector, codebooks]`.

    Values and codes may be given as functions, which are called when these are first asked for: who wants codes alone
    need not wait for values to be computed from them.
    """

    def __init__(
        self,
        values: Floats | Callable[[], Floats],
        codes: Codes | Callable[[], Codes] | None = None,
        scales: Floats | None = None,
        shifts: Floats | None = None,
    ) -> None:
        self._values, self._codes = values, codes
        self.scales = scales  # [rows, in // block]
        self.shifts = shifts  # [rows, in // block]: zero points (integers) or biases, where the grid has them

    @cached_property
    def values(self) -> Floats:
        """The tensor's own values, `[rows, in]`."""
        return self._values() if callable(self._values) else self._values

    @cached_property
    def codes(self) -> Codes | None:
        """`[rows, in]`, of vectors `[rows, in // vector, codebooks]`; int8 of a symmetric grid, else uint8."""
        return self._codes() if callable(self._codes) else self._codes

    def beside(self) -> Rows:
        """Scales and shifts alone: what can wait in memory while the values and codes of other rows are worked on."""
        return Rows(_let_go, None, self.scales, self.shifts)

    def grid(self) -> tuple[Codes, Floats]:
        """Codes and scales of a slice that has them; asking a plain tensor for them is a bug."""
        if self.codes is None or self.scales is None:
            raise ValueError("these rows have no grid")
        return self.codes, self.scales

    def shifted(self) -> tuple[Codes, Floats, Floats]:
        """Codes, scales and shifts of a slice of a zero-point or affine grid."""
        if self.codes is None or self.scales is None or self.shifts is None:
            raise ValueError("these rows have no grid with shifts")
        return self.codes, self.scales, self.shifts


def _let_go() -> Floats:
    raise ValueError("the values of these rows were let go of")


class Tensor(Protocol):
    """A named tensor that can be read a slice of rows at a time."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> DType: ...
    @property
    def grid(self) -> Grid | None: ...
    @property
    def width(self) -> int | None:
        """The bits of a stored weight, known without reading any; None where floats are stored."""
        ...

    @property
    def requantized(self) -> bool:
        """Whether the artefact says that its codes were fitted to somebody's values, as was asked."""
        ...

    @property
    def fitted_rms(self) -> float | None:
        """The error that the artefact says this fit measured, relative to the values' root mean square."""
        ...

    def rows(self, start: int, stop: int) -> Rows:
        """Rows `start` to `stop` of `row_count(shape)`, read now."""
        ...

    def as_it_runs(self, start: int, stop: int) -> Floats | None:
        """The values that the format's runtime makes of rows `[rows, in]`; None where it rounds nothing on the way."""
        ...

    def numpy(self) -> Floats:
        """The whole tensor in its own shape: for norms and scalars, and for whoever holds a model anyway."""
        ...


def slices(tensor: Tensor, target_bytes: int = 16 << 20, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Ranges of rows `(start, stop)` that cover a tensor, as `row_slices`."""
    return row_slices(tensor.shape, target_bytes, multiple)


def row_slices(shape: Sequence[int], target_bytes: int = 16 << 20, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Ranges of rows `(start, stop)` that cover a tensor of this shape, each of about `target_bytes` as float32.

    Each but the last is a multiple of `multiple` rows.
    """
    count, width = matrix_of(shape)
    step = max(1, target_bytes // (4 * max(width, 1)) // multiple) * multiple
    for start in range(0, count, step):
        yield start, min(start + step, count)


class TensorBase:
    """What tensors have in common that do not say otherwise."""

    requantized: bool = False
    fitted_rms: float | None = None

    @property
    def width(self: Tensor) -> int | None:
        """The width of the tensor's grid."""
        return None if self.grid is None else self.grid.width

    def as_it_runs(self, start: int, stop: int) -> Floats | None:
        """None: the format's runtime computes with the values as they are."""
        return None

    def numpy(self: Tensor) -> Floats:
        """The whole tensor in its own shape, filled slice by slice."""
        found = np.empty(matrix_of(self.shape), np.float32)
        for start, stop in slices(self):
            found[start:stop] = self.rows(start, stop).values
        return found.reshape(self.shape)


def expand(scales: Floats, block: int) -> Floats:
    """Scales `[rows, in // block]` repeated to one a weight, `[rows, in]`."""
    return np.repeat(scales, block, axis=1)


def evaluate(grid: Grid, codes: Codes, scales: Floats, shifts: Floats | None = None) -> NDArray[np.float64]:
    """What codes `[rows, in]` (of vectors as in `Rows`) on a grid stand for, `[rows, in]`, without rounding.

    float64 holds every product of a code and a float32 scale; a sum with a bias more than 2**20 times smaller than the
    scale would be rounded.
    """
    if grid.kind == "vectors":
        from gemexport.formats.grids.additive import evaluate as evaluate_vectors  # whose loops Numba compiles

        return evaluate_vectors(codes, grid.vectors, scales)
    wide = codes.reshape(*scales.shape, grid.block)
    factors = scales[..., None].astype(np.float64)
    if grid.kind == "codebook":
        values = np.asarray(grid.levels)[wide] * factors
    elif grid.kind == "symmetric":
        values = wide * factors
    else:
        assert shifts is not None
        offsets = shifts[..., None].astype(np.float64)
        values = (wide - offsets) * factors if grid.kind == "zero-point" else wide * factors + offsets
    return values.reshape(codes.shape)


def on_grid(grid: Grid, codes: Codes, scales: Floats, shifts: Floats | None = None) -> Rows:
    """Rows of a stored grid: codes, scales and shifts as they are, and the float32 values nearest to what they mean."""

    def values() -> Floats:
        if grid.kind != "symmetric":
            return evaluate(grid, codes, scales, shifts).astype(np.float32)
        found = codes.astype(np.float32, order="C")  # one product, rounded once: float32 is as good, and faster
        blocks = found.reshape(*scales.shape, grid.block)
        blocks *= scales[..., None]
        return found

    return Rows(values, codes, scales, shifts)


def reblock(scales: Floats, block: int, target: int) -> Floats | None:
    """Scales for blocks of `target` weights out of scales for blocks of `block`: repeated, never changed.

    None when a target block would span two scales.
    """
    if block == target:
        return scales
    return np.repeat(scales, block // target, axis=1) if block % target == 0 else None


def from_bf16(bits: NDArray[np.uint16]) -> Floats:
    """The float32 values of bfloat16 bit patterns."""
    wide = bits.astype(np.uint32)
    wide <<= np.uint32(16)  # in place: what is written twice is fetched twice
    return wide.view(np.float32)


def to_bf16(values: Floats) -> NDArray[np.uint16]:
    """The bit patterns of float32 values rounded to bfloat16, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = bits >> np.uint32(16)
    rounded &= np.uint32(1)
    rounded += np.uint32(0x7FFF)  # in place: arrays on the way take longer than what is computed
    rounded += bits
    rounded >>= np.uint32(16)
    found = rounded.astype(np.uint16)
    nan = np.isnan(values)
    if nan.any():
        found[nan] = 0x7FC0
    return found


def round_to(values: Floats, dtype: DType) -> Floats:
    """Float32 values rounded to what `dtype` can hold, as float32."""
    if dtype == "bf16":
        return from_bf16(to_bf16(values))
    if dtype == "f16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    return values.astype(np.float32, copy=False)


def holding(values: Floats, dtypes: Sequence[DType] = ("bf16", "f16")) -> tuple[DType, ...]:
    """Those of the dtypes that hold every value exactly; none holds NaN.

    Seen from the bits, which is quicker than to round: a value that bf16 holds ends in 16 zeros, one that f16 holds in
    13. Only among these some are too large or too small for f16, and are rounded to tell.
    """
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    magnitudes = bits & np.uint32(0x7FFFFFFF)
    ones, largest = (int(part.reduce(magnitudes, axis=None, initial=0)) for part in (np.bitwise_or, np.maximum))
    if largest > _INFINITY:
        return ()
    held = {"f32": True, "bf16": not ones & 0xFFFF, "f16": False}
    if "f16" in dtypes and not ones & 0x1FFF:
        magnitudes -= np.uint32(1)  # a zero becomes the largest of all, and is no smallest any more
        smallest = int(np.minimum.reduce(magnitudes, axis=None, initial=_INFINITY)) + 1
        normal = largest <= _F16_NORMAL[1] and smallest >= _F16_NORMAL[0]
        held["f16"] = normal or np.array_equal(round_to(values, "f16"), values)
    return tuple(dtype for dtype in dtypes if held[dtype])


def narrowest(scales: Floats) -> DType:
    """The narrowest dtype that holds every scale exactly: bf16 first, then f16, else f32."""
    return next(iter(holding(scales)), "f32")


class Plain(TensorBase):
    """A tensor without its grid: for formats that cannot hold that, and variants that want floats."""

    grid: Grid | None = None

    def __init__(self, base: Tensor) -> None:
        self.name, self.shape, self.dtype = base.name, base.shape, base.dtype
        self._base = base

    def rows(self, start: int, stop: int) -> Rows:
        return Rows(self._base.rows(start, stop).values)

    def numpy(self) -> Floats:
        return self._base.numpy()


class ArrayTensor(TensorBase):
    """A tensor that is already in memory: small ones, and those of tests.

    Values and codes are `[…, in]`, scales and shifts `[…, in // block]`, with the same leading axes or one for all.
    """

    def __init__(
        self,
        name: str,
        values: Floats,
        dtype: DType = "f32",
        codes: Codes | None = None,
        scales: Floats | None = None,
        grid: Grid | None = None,
        shifts: Floats | None = None,
    ) -> None:
        self.name = name
        self.shape: tuple[int, ...] = tuple(values.shape)
        self.dtype: DType = dtype
        self.grid = grid
        self._values, self._beside = values, (codes, scales, shifts)

    def rows(self, start: int, stop: int) -> Rows:
        def part(array: NDArray[Any]) -> NDArray[Any]:
            return array.reshape(matrix_of(array.shape))[start:stop]

        return Rows(part(self._values), *(None if array is None else part(array) for array in self._beside))

    def numpy(self) -> Floats:
        return self._values
