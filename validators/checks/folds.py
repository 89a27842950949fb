"""Channel scales that somebody folded into a model: AWQ's, which leave what it computes as it was.

AWQ (Lin et al. 2023) multiplies the columns of linears by a factor a channel before it rounds them, and divides what
gives these channels: the norm before q, k and v, or before gate and up, and the rows of up before down. Neither the
norm nor the linears are then the checkpoint's, and the product is. The factors follow from the norms, and the linears
must show them: a norm that is another for no reason stays one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemexport.formats.gemma.architecture import TensorSpec
from gemexport.formats.gemma.names import role_of
from gemexport.formats.gemma.roles import Role
from gemexport.formats.storage.parallel import by_rows
from gemexport.formats.tensor import ArrayTensor, DType, Floats, Grid, Rows, Tensor, TensorBase

Doubles = NDArray[np.float64]

INTO = {
    Role.INPUT_NORM: (Role.Q, Role.K, Role.V),
    Role.PRE_MLP_NORM: (Role.GATE, Role.UP),
    Role.PRE_EXPERTS_NORM: (Role.EXPERT_GATE_UP,),
}
# What clipping and rounding in groups move a factor by, beside so many of its standard errors.
NEAR, ERRORS = 0.1, 5.0
MANY = 0.1  # of the channels have a factor in a model that was folded
AGREEING = 0.5  # of those that have one are in the linears what they are in the norm


@dataclass(frozen=True)
class Folded(TensorBase):
    """A tensor of the source with factors folded in; it has no grid, whatever it had before."""

    tensor: Tensor
    columns: Floats | None = None  # `[in]`
    rows_by: Floats | None = None  # `[out]`
    dtype: DType = "f32"
    grid: Grid | None = None

    @property
    def name(self) -> str:
        return self.tensor.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    def rows(self, start: int, stop: int) -> Rows:
        values = self.tensor.rows(start, stop).values
        if self.columns is not None:
            values = values * self.columns
        if self.rows_by is not None:
            values = values * self.rows_by[start:stop, None]
        return Rows(np.asarray(values, np.float32))


@dataclass(frozen=True)
class Factors:
    """What the stored values are in those of the source, by least squares, with the standard error of each factor."""

    value: Doubles
    error: Doubles

    def agree(self, wanted: Doubles) -> NDArray[np.bool_]:
        """Where the factors are those wanted, as far as rounded weights tell."""
        return np.asarray(np.abs(self.value - wanted) <= ERRORS * self.error + NEAR * np.abs(wanted))


def folded(
    source: Mapping[str, Tensor], stored: Mapping[str, Tensor], specs: Mapping[str, TensorSpec], offset: float
) -> dict[str, Tensor]:
    """Tensors of `source` as they are with the factors folded in that `stored` shows, by name; empty without any.

    A norm multiplies by `offset` + weight. What lies on a lattice is left: no factor leaves it there.
    """
    found: dict[str, Tensor] = {}
    for spec in specs.values():
        if spec.role in INTO and spec.name in stored and stored[spec.name].shape == spec.shape:
            found.update(_of_norm(source, stored, spec, _of_layer(specs, spec, INTO[spec.role]), offset))
    if found:
        for spec in specs.values():
            if spec.role is Role.UP:
                found.update(_of_up({**source, **found}, stored, spec, _of_layer(specs, spec, (Role.DOWN,))))
    return found


def _of_layer(specs: Mapping[str, TensorSpec], spec: TensorSpec, roles: tuple[Role, ...]) -> list[str]:
    return [other.name for other in specs.values() if other.layer == spec.layer and other.role in roles]


def _plain(source: Mapping[str, Tensor], stored: Mapping[str, Tensor], names: list[str]) -> bool:
    """Whether there are such tensors, rounded by somebody and in the source on no lattice."""
    grids = [source[name].grid for name in names]
    known = all(name in stored and stored[name].shape == source[name].shape for name in names)
    return bool(names) and known and not any(grid is not None and grid.lossless for grid in grids)


def _of_norm(
    source: Mapping[str, Tensor], stored: Mapping[str, Tensor], spec: TensorSpec, linears: list[str], offset: float
) -> dict[str, Tensor]:
    """A norm and the linears behind it, as far as its factors are in all of them."""
    ours, theirs = (tensors[spec.name].numpy() for tensors in (source, stored))
    if np.array_equal(ours, theirs) or not _plain(source, stored, linears):
        return {}
    with np.errstate(divide="ignore", invalid="ignore"):
        wanted = (ours + np.float64(offset)) / (theirs + np.float64(offset))
    wanted[~(np.isfinite(wanted) & (wanted > 0))] = 1.0
    # The rows of up have factors of their own, and of nothing else.
    shown = [_of_columns(source[name], stored[name], wanted if role_of(name) is Role.UP else None) for name in linears]
    agreeing = np.logical_and.reduce([each.agree(wanted) for each in shown])
    apart = ~np.logical_and.reduce([each.agree(np.ones_like(wanted)) for each in shown])
    if not _many(apart & (wanted != 1.0), agreeing):
        return {}
    factors = np.where(agreeing, wanted, 1.0).astype(np.float32)
    norm = ArrayTensor(spec.name, np.where(agreeing, theirs, ours))
    return {spec.name: norm, **{name: Folded(source[name], factors) for name in linears}}


def _of_up(
    source: Mapping[str, Tensor], stored: Mapping[str, Tensor], spec: TensorSpec, downs: list[str]
) -> dict[str, Tensor]:
    """The rows of up, and the columns of down that take them."""
    if not _plain(source, stored, [spec.name, *downs]):
        return {}
    rows = _of_rows(source[spec.name], stored[spec.name])
    columns = _of_columns(source[downs[0]], stored[downs[0]])
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = 1 / rows.value
        both = Factors(columns.value, np.hypot(columns.error, rows.error * inverse**2))
    inverse[~(np.isfinite(inverse) & (inverse > 0))] = np.inf
    agreeing, apart = both.agree(inverse), ~both.agree(np.ones_like(inverse))
    if not _many(apart, agreeing):
        return {}
    factors = np.where(agreeing, (columns.value + inverse) / 2, 1.0).astype(np.float32)
    before = source[spec.name]
    inner = before if isinstance(before, Folded) else Folded(before)
    up = Folded(inner.tensor, inner.columns, np.reciprocal(factors))
    return {spec.name: up, downs[0]: Folded(source[downs[0]], factors)}


def _many(apart: NDArray[np.bool_], agreeing: NDArray[np.bool_]) -> bool:
    """Whether so many channels have a factor, and so many of these the one that they should, that this was meant."""
    return bool(apart.mean() >= MANY and (apart & agreeing).sum() >= AGREEING * apart.sum())


def _of_columns(source: Tensor, stored: Tensor, wanted: Doubles | None = None) -> Factors:
    """The factors of columns, after each row is divided by its own where the columns have those that are `wanted`."""
    cross, ours, theirs, count = (np.zeros(source.shape[-1]) for _ in range(4))
    for one, other in _pairs(source, stored):
        if wanted is not None:
            scaled = one * wanted
            along, square = (scaled * other).sum(1, keepdims=True), (scaled * scaled).sum(1, keepdims=True)
            other = other * np.divide(square, along, out=np.ones_like(along), where=along > 0)
        cross, ours, theirs = cross + (one * other).sum(0), ours + (one * one).sum(0), theirs + (other * other).sum(0)
        count += len(one)
    return _factors(cross, ours, theirs, count)


def _of_rows(source: Tensor, stored: Tensor) -> Factors:
    parts = [((a * b).sum(1), (a * a).sum(1), (b * b).sum(1)) for a, b in _pairs(source, stored)]
    cross, ours, theirs = (np.concatenate(each) for each in zip(*parts, strict=True))
    return _factors(cross, ours, theirs, np.full(len(cross), float(source.shape[-1])))


def _pairs(source: Tensor, stored: Tensor) -> Iterator[tuple[Doubles, Doubles]]:
    def read(bounds: tuple[int, int]) -> tuple[Doubles, Doubles]:
        one, other = (tensor.rows(*bounds).values.astype(np.float64) for tensor in (source, stored))
        return one, other

    return by_rows(read, source, 1)


def _factors(cross: Doubles, ours: Doubles, theirs: Doubles, count: Doubles) -> Factors:
    """Slopes of a line through nought, and their standard errors; what has no weights has the factor 1."""
    known = ours > 0
    value = np.divide(cross, ours, out=np.ones_like(cross), where=known)
    left = np.maximum(theirs - value * cross, 0.0)
    square = np.divide(left, np.maximum(count - 1, 1) * ours, out=np.zeros_like(cross), where=known)
    return Factors(value, np.sqrt(square))
