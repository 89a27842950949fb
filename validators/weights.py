"""The weights read back from a written artefact against the source's, tensor by tensor.

A weight is exact when the stored numbers, evaluated without rounding and then rounded to the source's dtype, are the
source's value. Evaluated without rounding means in float64, which holds every product of a code and a float32 scale.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemexport.formats.additive import AdditiveTensor
from gemexport.formats.lattice import edges, jit
from gemexport.formats.parallel import ordered
from gemexport.formats.tensor import DType, Floats, Grid, Rows, Tensor, evaluate, round_to, slices

_SOURCE: dict[DType, int] = {"bf16": 0, "f16": 1, "f32": 2}


@dataclass(frozen=True)
class TensorComparison:
    """One tensor; errors are relative to the source's largest weight (`max`) or root mean square (`rms`)."""

    name: str
    shape: tuple[int, ...]
    dtype: DType
    source_dtype: DType
    grid: Grid | None
    source_grid: Grid | None
    compared: int
    exact: int
    max_relative_error: float
    rms_relative_error: float
    scale_rounded: bool  # the source's codes, on scales that differ only by the artefact's rounding of them
    requantized: bool  # the artefact says itself that its codes were fitted to the values anew, as was asked
    same_scales: float | None = (
        None  # share of the weights whose block has the source's scale; None: not as many blocks
    )
    codec: str | None = None  # the vector codec that it is in
    fitted_rms: float | None = None  # the error that the artefact says the codec's fit measured

    @property
    def exact_fraction(self) -> float:
        """Share of the weights that are exact."""
        return self.exact / max(self.compared, 1)


@dataclass(frozen=True)
class WeightsComparison:
    """Every tensor of the decoder, and what is only on one side."""

    tensors: tuple[TensorComparison, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    digest: str  # of the values read back: artefacts that hold the same numbers have the same


@jit
def _compare(source: Floats, stored: NDArray[np.float64], dtype: int) -> tuple[int, float, float, float, float]:
    """Exact weights, largest error, squared error, largest source weight, squared source weights."""
    exact, worst, error, peak, energy = 0, 0.0, 0.0, 0.0, 0.0
    step = 0x10000 if dtype == 0 else (0x2000 if dtype == 1 else 1)
    patterns = source.view(np.uint32)
    for row in range(source.shape[0]):
        for i in range(source.shape[1]):
            wanted, found = np.float64(source[row, i]), stored[row, i]
            peak = max(peak, abs(wanted))
            energy += wanted * wanted
            if found == wanted:
                exact += 1
                continue
            magnitude = patterns[row, i] & np.uint32(0x7FFFFFFF)
            if magnitude != 0 and (found > 0) == (wanted > 0):
                below, above = edges(magnitude, dtype)
                size = abs(found)
                odd = (magnitude & step) != 0
                if below <= size <= above and not (odd and size in (below, above)):
                    exact += 1
                    continue
            difference = abs(found - wanted)
            # A NaN must reach the report, and stay there: nothing compares greater than it.
            if difference > worst or np.isnan(difference):
                worst = difference
            error += difference * difference
    return exact, worst, error, peak, energy


def compare(
    source: Mapping[str, Tensor],
    artifact: Mapping[str, Tensor],
    progress: Callable[[int], None] = lambda _: None,
    threads: int | None = None,
) -> WeightsComparison:
    """Compare every tensor of `source` with the one of the same name in `artifact`; `progress` is told weights."""
    digest = hashlib.sha256()  # which processors compute: twice as fast as BLAKE2 where it was measured
    compared = []
    for name, tensor in source.items():
        if name in artifact and _count(artifact[name]) == _count(tensor):
            compared.append(_tensor(tensor, artifact[name], digest.update, threads))
            progress(compared[-1].compared)
    return WeightsComparison(
        tensors=tuple(compared),
        missing=tuple(sorted(set(source) - {item.name for item in compared})),
        unexpected=tuple(sorted(set(artifact) - set(source))),
        digest=digest.hexdigest()[:32],
    )


def _count(tensor: Tensor) -> int:
    return int(np.prod(tensor.shape, dtype=np.int64))


def _tensor(
    source: Tensor, stored: Tensor, update: Callable[[memoryview], None], threads: int | None
) -> TensorComparison:
    exact, worst, error, peak, energy = 0, 0.0, 0.0, 0.0, 0.0
    same_codes = source.grid is not None and stored.grid is not None
    kept: int | None = 0
    for (counted, largest, squared, top, power), same, scales, values in ordered(
        lambda pair: _slice(pair[0], pair[1], source, stored), _pairs(source, stored), threads
    ):
        update(values)
        exact, worst, error = exact + counted, float(np.maximum(worst, largest)), error + squared
        peak, energy = max(peak, top), energy + power
        same_codes = same_codes and same
        kept = None if kept is None or scales is None else kept + scales
    return TensorComparison(
        name=source.name,
        shape=source.shape,
        dtype=stored.dtype,
        source_dtype=source.dtype,
        grid=stored.grid,
        source_grid=source.grid,
        compared=_count(source),
        exact=exact,
        max_relative_error=worst / peak if peak else worst,
        rms_relative_error=float(np.sqrt(error / energy)) if energy else float(np.sqrt(error)),
        scale_rounded=same_codes,
        requantized=getattr(stored, "requantized", False),
        same_scales=None if kept is None else kept / max(_count(source), 1),
        codec=str(stored.codec) if isinstance(stored, AdditiveTensor) else None,
        fitted_rms=stored.fitted_rms if isinstance(stored, AdditiveTensor) else None,
    )


def _pairs(source: Tensor, stored: Tensor) -> Iterator[tuple[Rows, Rows]]:
    """The same slices of rows of both; what is not 2-D is one row."""
    if len(source.shape) == 2 and source.shape == stored.shape:
        for start, stop in slices(source, 4 << 20):
            yield source.rows(start, stop), stored.rows(start, stop)
    else:
        yield Rows(source.numpy().reshape(1, -1)), Rows(stored.numpy().reshape(1, -1))


def _slice(
    wanted: Rows, found: Rows, source: Tensor, stored: Tensor
) -> tuple[tuple[int, float, float, float, float], bool, int | None, memoryview]:
    values = _exact(stored.grid, found)
    numbers = _compare(np.ascontiguousarray(wanted.values), values, _SOURCE[source.dtype])
    same, scales = _same_codes(wanted, found, source, stored), _same_scales(wanted, found, stored)
    return numbers, same, scales, np.ascontiguousarray(values, np.float32).data


def _exact(grid: Grid | None, rows: Rows) -> NDArray[np.float64]:
    """What stored rows stand for, without rounding, `[rows, in]`."""
    if grid is None or rows.codes is None:
        return rows.values.astype(np.float64)
    return evaluate(grid, *rows.grid(), rows.shifts)


def _same_codes(wanted: Rows, found: Rows, source: Tensor, stored: Tensor) -> bool:
    """Whether the artefact has the source's codes, on scales and biases that differ only by the artefact's rounding."""
    if source.grid is None or stored.grid is None or wanted.codes is None or found.codes is None:
        return False
    width, dtype = wanted.codes.shape[1], stored.grid.scale_dtype
    pairs = [(wanted.scales, found.scales)]
    if wanted.shifts is not None or found.shifts is not None:
        pairs.append((_biases(source.grid, wanted), _biases(stored.grid, found)))
    return np.array_equal(wanted.codes, found.codes) and all(
        ours is not None
        and theirs is not None
        and np.array_equal(
            np.repeat(round_to(ours, dtype), width // ours.shape[1], axis=1),
            np.repeat(theirs, width // theirs.shape[1], axis=1),
        )
        for ours, theirs in pairs
    )


def _same_scales(wanted: Rows, found: Rows, stored: Tensor) -> int | None:
    """Weights in blocks with the source's scale as the artefact's dtype rounds it; a grid may run the other way."""
    ours, theirs = wanted.scales, found.scales
    if ours is None or theirs is None or stored.grid is None or ours.shape != theirs.shape:
        return None
    same = np.abs(round_to(ours, stored.grid.scale_dtype)) == np.abs(theirs)
    return int(np.count_nonzero(same)) * stored.grid.block


def _biases(grid: Grid, rows: Rows) -> Floats | None:
    """The shift of each block in the weights' own unit, `[rows, in // block]`; None when the grid has none."""
    if rows.scales is None or rows.shifts is None:
        return None
    return -rows.shifts * rows.scales if grid.kind == "zero-point" else rows.shifts
