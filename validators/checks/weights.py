"""The weights read back from a written artefact against the source's, tensor by tensor.

A weight is exact when the stored numbers, evaluated without rounding and then rounded to the source's dtype, are the
source's value. Evaluated without rounding means in float64, which holds every product of a code and a float32 scale.

A weight is kept when it is, evaluated so, the very number that was promised: the code and the scale that the exporter
was given, rounded as the format prescribes (`formats/promise.py`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import gcd

import numpy as np
from numpy.typing import NDArray

from gemexport.formats.grids.lattice import edges, jit
from gemexport.formats.promise import Promise
from gemexport.formats.storage.parallel import by_rows
from gemexport.formats.tensor import Codes, DType, Floats, Grid, Rows, Tensor, expand, round_to
from gemexport.validators.checks.blocks import BlockComparison, Blocks, Judged, judge
from gemexport.validators.checks.evaluated import PIECE, evaluate, numbers_of
from gemexport.validators.checks.kept import Held, Kept, held_of

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
    exact_as_run: int | None = None  # weights after the runtime evaluated them; None: it rounds nothing on the way
    codec: str | None = None  # the vector codec that it is in
    fitted_rms: float | None = None  # the error that the artefact says the codec's fit measured
    kept: int | None = None  # weights that are, to the bit, what was promised; None: nothing was
    broken_at: tuple[int, int] | None = None  # row and column of the first that is not
    blocks: BlockComparison | None = None  # of codes that nothing was promised of and that are not all exact

    @property
    def exact_fraction(self) -> float:
        """Share of the weights that are exact."""
        return self.exact / max(self.compared, 1)


@dataclass(frozen=True)
class WeightsComparison:
    """Every tensor of the decoder, and what is only on one side."""

    tensors: tuple[TensorComparison, ...]
    missing: tuple[str, ...]  # those that are there in another shape say so behind their name
    unexpected: tuple[str, ...]
    digest: str  # of the values read back: artefacts that hold the same numbers have the same


@jit
def _all_round_to(source: Floats, found: NDArray[np.float64], dtype: int, narrow: Floats) -> tuple[bool, np.uint32]:
    """Whether every number found rounds to the source's value, and the pattern of the source's largest magnitude.

    `narrow` gets the numbers as float32, whose patterns are then rounded to the source's dtype. Rounding twice goes
    wrong only where the first one ends at a tie; that, and what is no normal number of f16, is left to `_judge`: True
    is always right, False is not.
    """
    shift = np.uint32(16 if dtype == 0 else (13 if dtype == 1 else 0))  # bits of float32 that the dtype has not
    dropped = np.uint32((1 << shift) - 1)
    kept, down, odd = np.uint32(~dropped), np.uint32(dropped >> 1), np.uint32(1 if shift else 0)
    tie = np.uint32(down + 1)  # with nothing dropped there is none, and no pattern has this
    wrong, peak = np.uint32(0), np.uint32(0)
    for i in range(found.size):
        near = np.float32(found[i])
        narrow[i] = near
        bits = near.view(np.uint32)
        rounded = np.uint32(np.uint32(np.uint32(bits + down) + np.uint32((bits >> shift) & odd)) & kept)
        same = rounded.view(np.float32) == source[i]
        once = ((bits & dropped) != tie) | (np.float64(near) == found[i])
        zero = (source[i] != 0) | (found[i] == 0)
        wrong |= np.uint32(not (same & once & zero))
        peak = max(peak, np.uint32(np.float32(source[i]).view(np.uint32) & np.uint32(0x7FFFFFFF)))
    return wrong == 0, peak


@jit
def _judge(
    source: Floats, found: NDArray[np.float64], dtype: int, worst: float, error: float
) -> tuple[int, float, float]:
    """Exact weights; the largest and the summed squared error, carried on from those of the weights before."""
    exact = 0
    step = 0x10000 if dtype == 0 else (0x2000 if dtype == 1 else 1)
    patterns = source.view(np.uint32)
    for i in range(found.size):
        wanted = np.float64(source[i])
        if found[i] == wanted:
            exact += 1
            continue
        magnitude = patterns[i] & np.uint32(0x7FFFFFFF)
        if magnitude != 0 and (found[i] > 0) == (wanted > 0):
            below, above = edges(magnitude, dtype)
            size = abs(found[i])
            odd = (magnitude & step) != 0
            if below <= size <= above and not (odd and size in (below, above)):
                exact += 1
                continue
        difference = abs(found[i] - wanted)
        # A NaN must reach the report, and stay there: nothing compares greater than it.
        if difference > worst or np.isnan(difference):
            worst = difference
        error += difference * difference
    return exact, worst, error


@jit
def _compare(
    source: Floats, codes: Codes | Floats, scales: Floats, zeros: Floats, biases: Floats, dtype: int, values: Floats
) -> tuple[int, float, float, float, float]:
    """Exact weights, largest error, squared error, largest source weight, squared source weights; all arrays flat.

    `values` gets the float32 numbers nearest to what is stored. A piece at a time, which stays in the nearest cache;
    most artefacts are exact, so that is asked first, of a whole piece, in a loop that is vectorised.
    """
    exact, worst, error, peak, energy = 0, 0.0, 0.0, np.uint32(0), 0.0
    buffer = np.empty(PIECE, np.float64)
    for start in range(0, source.size, PIECE):
        stop = min(start + PIECE, source.size)
        wanted, found = source[start:stop], buffer[: stop - start]
        evaluate(codes, scales, zeros, biases, start, found)
        right, top = _all_round_to(wanted, found, dtype, values[start:stop])
        peak = max(peak, top)
        for i in range(wanted.size):
            energy += np.float64(wanted[i]) * np.float64(wanted[i])
        if right:
            exact += wanted.size
        else:
            count, worst, error = _judge(wanted, found, dtype, worst, error)
            exact += count
    return exact, worst, error, np.float64(np.uint32(peak).view(np.float32)), energy


def compare(
    source: Mapping[str, Tensor],
    artifact: Mapping[str, Tensor],
    progress: Callable[[int], None] = lambda _: None,
    threads: int | None = None,
    promises: Mapping[str, Promise] | None = None,
    *,
    ours: bool = True,
) -> WeightsComparison:
    """Compare every tensor of `source` with the one of the same name in `artifact`; `progress` is told weights.

    The artefact is held to `promises`, by name. Where it is not known to be `ours`, to those of tensors of which at
    least half show that they were made by them: no other fit gives the same codes, block by block.
    """
    digest = hashlib.sha256()  # which processors compute: twice as fast as BLAKE2 where it was measured
    compared, missing = [], []
    for name, tensor in source.items():
        stored = artifact.get(name)
        if stored is None:
            missing.append(name)
        elif stored.shape != tensor.shape:
            missing.append(f"{name} (has the shape {list(stored.shape)}, not {list(tensor.shape)})")
        else:
            promise = None if promises is None else promises.get(name)
            compared.append(_tensor(tensor, stored, digest.update, threads, promise, ours))
            progress(compared[-1].compared)
    return WeightsComparison(
        tensors=tuple(compared),
        missing=tuple(sorted(missing)),
        unexpected=tuple(sorted(set(artifact) - set(source))),
        digest=digest.hexdigest()[:32],
    )


def _count(tensor: Tensor) -> int:
    return math.prod(tensor.shape)


def _tensor(
    source: Tensor,
    stored: Tensor,
    update: Callable[[memoryview], None],
    threads: int | None,
    promise: Promise | None,
    ours: bool,
) -> TensorComparison:
    exact, worst, error, peak, energy = 0, 0.0, 0.0, 0.0, 0.0
    same_codes = source.grid is not None and stored.grid is not None
    kept: int | None = 0
    as_run: int | None = 0
    promised = Kept(source.shape)
    for (counted, largest, squared, top, power), same, scales, running, values, held in by_rows(
        lambda bounds: _slice(source, stored, bounds, promise, ours), source, threads
    ):
        update(values)
        exact, worst, error = exact + counted, float(np.maximum(worst, largest)), error + squared
        peak, energy = max(peak, top), energy + power
        same_codes = same_codes and same
        kept = None if kept is None or scales is None else kept + scales
        as_run = None if as_run is None or running is None else as_run + running
        promised.add(held)
    due = promise is not None and (ours or promised.recognised(promise, stored))
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
        requantized=stored.requantized,
        same_scales=None if kept is None else kept / max(_count(source), 1),
        exact_as_run=as_run,
        codec=None if stored.grid is None else stored.grid.codec,
        fitted_rms=stored.fitted_rms,
        kept=promised.kept if due else None,
        broken_at=promised.broken_at if due else None,
        blocks=None if due or exact == _count(source) else _blocks(source, stored, threads),
    )


def _slice(
    source: Tensor, stored: Tensor, bounds: tuple[int, int], promise: Promise | None, ours: bool
) -> tuple[tuple[int, float, float, float, float], bool, int | None, int | None, memoryview, Held | None]:
    """What `_compare` counts in a slice, whether codes and how many weights' scales are the same; how many weights are
    exact as they run; the values; and what was kept of a promise."""
    wanted, found = source.rows(*bounds), stored.rows(*bounds)
    expected = np.ascontiguousarray(wanted.values).reshape(-1)
    values = np.empty(expected.size, np.float32)
    codes, scales, zeros, biases = numbers_of(stored.grid, found)
    numbers = _compare(expected, codes, scales, zeros, biases, _SOURCE[source.dtype], values)
    same, scales_kept = _same_codes(wanted, found, source, stored), _same_scales(wanted, found, stored)
    held = None
    if promise is not None:
        own = wanted if promise.tensor is source else promise.tensor.rows(*bounds)
        held = held_of(promise, stored, own, found, ours)
    as_run = _exact_as_run(wanted.values, source.dtype, stored, bounds)
    return numbers, same, scales_kept, as_run, values.data, held


def _blocks(source: Tensor, stored: Tensor, threads: int | None) -> BlockComparison | None:
    """What somebody else's blocks are like; None where there are none. Reads both tensors a second time."""
    grid = stored.grid
    if grid is None or grid.kind == "vectors":
        return None

    def judged(bounds: tuple[int, int]) -> Judged:
        return judge(source.rows(*bounds).values, stored.rows(*bounds).values, grid)

    blocks = Blocks(grid)
    for part in by_rows(judged, source, threads):
        blocks.add(part)
    return blocks.comparison()


def _same_codes(wanted: Rows, found: Rows, source: Tensor, stored: Tensor) -> bool:
    """Whether the artefact has the source's codes, on scales and biases that differ only by the artefact's rounding."""
    if source.grid is None or stored.grid is None:
        return False
    pairs = [(wanted.scales, found.scales)]
    if wanted.shifts is not None or found.shifts is not None:
        pairs.append((_biases(source.grid, wanted), _biases(stored.grid, found)))
    alike = all(_alike(ours, theirs, source.shape[-1], stored.grid.scale_dtype) for ours, theirs in pairs)
    # Last, because the source's codes may have to be found first.
    return alike and wanted.codes is not None and found.codes is not None and np.array_equal(wanted.codes, found.codes)


def _alike(ours: Floats | None, theirs: Floats | None, width: int, dtype: DType) -> bool:
    """Whether numbers of blocks are for every weight the same, ours rounded to `dtype`; blocks may differ in size."""
    if ours is None or theirs is None:
        return False
    blocks = width // ours.shape[1], width // theirs.shape[1]
    common = gcd(*blocks)
    return np.array_equal(
        expand(round_to(ours, dtype), blocks[0] // common),
        expand(theirs, blocks[1] // common),
    )


def _same_scales(wanted: Rows, found: Rows, stored: Tensor) -> int | None:
    """Weights in blocks with the source's scale as the artefact's dtype rounds it; a grid may run the other way."""
    ours, theirs = wanted.scales, found.scales
    if ours is None or theirs is None or stored.grid is None or ours.shape != theirs.shape:
        return None
    same = np.abs(round_to(ours, stored.grid.scale_dtype)) == np.abs(theirs)
    return int(np.count_nonzero(same)) * stored.grid.block


def _exact_as_run(wanted: Floats, dtype: DType, stored: Tensor, bounds: tuple[int, int]) -> int | None:
    """Weights that are the source's after the runtime's own rounding; None where it does not round them."""
    values = stored.as_it_runs(*bounds)
    return None if values is None else int(np.count_nonzero(round_to(values, dtype) == wanted))


def _biases(grid: Grid, rows: Rows) -> Floats | None:
    """The shift of each block in the weights' own unit, `[rows, in // block]`; None when the grid has none."""
    if rows.scales is None or rows.shifts is None:
        return None
    return -rows.shifts * rows.scales if grid.kind == "zero-point" else rows.shifts
