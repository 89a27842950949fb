"""Codes that other programs chose: no alarm, and a fault in a single block of them is named."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from gemexport.formats.grids.recipe import RECIPES
from gemexport.formats.tensor import ArrayTensor, Floats, Grid, evaluate, round_to
from gemexport.judge.verdict import bounds
from gemexport.shared.measured import TensorReport, Validation, WeightsReport
from gemexport.validators.checks.weights import compare

SHAPE = (96, 512)
Coded = tuple[Grid, np.ndarray, Floats, Floats | None]
NAME = "model.layers.0.mlp.up_proj.weight"


def normal(seed: int = 0) -> Floats:
    return (np.random.default_rng(seed).standard_normal(SHAPE) / 22).astype(np.float32)


def heavy() -> Floats:
    """With outliers, and columns of unlike size, as trained weights have them."""
    stream = np.random.default_rng(1)
    columns = np.exp(stream.standard_normal(SHAPE[1]) / 2)
    return (stream.standard_t(4, SHAPE) * columns / 30).astype(np.float32)


def ggml(kind: str, importance: float = 0.0) -> Callable[[Floats], Coded]:
    def code(values: Floats) -> Coded:
        pytest.importorskip("libggml")
        from gguf.constants import GGMLQuantizationType

        from gemexport.formats.gguf.layouts import LAYOUTS
        from gemexport.formats.gguf.quantizer import quantize

        type_ = GGMLQuantizationType[kind]
        columns = np.random.default_rng(3).standard_normal(SHAPE[1])
        data = quantize(type_, values, np.exp(columns * importance).astype(np.float32) if importance else None)
        assert data is not None
        rows = LAYOUTS[type_].rows(data)
        return LAYOUTS[type_].grid, *rows.grid(), rows.shifts

    return code


def mlx(bits: int, group: int) -> Callable[[Floats], Coded]:
    def code(values: Floats) -> Coded:
        mx = pytest.importorskip("mlx.core")
        from gemexport.formats.storage.bitpack import unpack

        packed, scales, biases = mx.quantize(mx.array(values).astype(mx.bfloat16), group_size=group, bits=bits)
        codes = unpack(np.array(packed).view(np.uint8), bits, SHAPE[1])
        grid = Grid(bits, group, "bf16", True, "affine")
        return grid, codes, *(np.array(array.astype(mx.float32)) for array in (scales, biases))

    return code


def nearest(bits: int, group: int) -> Callable[[Floats], Coded]:
    """As llm-compressor rounds: the largest weight between the two outermost codes, scales in bf16."""

    def code(values: Floats) -> Coded:
        blocks = values.reshape(SHAPE[0], -1, group)
        scales = round_to(np.abs(blocks).max(axis=2) / np.float32((2**bits - 1) / 2), "bf16")
        codes = np.clip(np.rint(blocks / scales[:, :, None]), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        return Grid(bits, group, "bf16", True), codes.reshape(SHAPE).astype(np.int8), scales, None

    return code


def zero_points(bits: int, group: int, clip: float) -> Callable[[Floats], Coded]:
    """As AWQ packs them: zero points, ranges clipped by a search."""

    def code(values: Floats) -> Coded:
        blocks = values.reshape(SHAPE[0], -1, group)
        low, high = (blocks.min(axis=2) * np.float32(clip), blocks.max(axis=2) * np.float32(clip))
        scales = round_to((high - low) / np.float32(2**bits - 1), "f16")
        zeros = np.rint(-low / scales)
        codes = np.clip(np.rint(blocks / scales[:, :, None]) + zeros[:, :, None], 0, 2**bits - 1)
        return Grid(bits, group, "f16", True, "zero-point"), codes.reshape(SHAPE).astype(np.uint8), scales, zeros

    return code


def gptq(bits: int, group: int) -> Callable[[Floats], Coded]:
    """Frantar et al. 2023: what rounding a column costs is made up for in the columns that follow."""

    def code(values: Floats) -> Coded:
        stream, width = np.random.default_rng(5), SHAPE[1]
        seen = stream.standard_normal((2048, 64)) @ stream.standard_normal((64, width))
        seen = (seen + stream.standard_normal(seen.shape) * 4) * np.exp(stream.standard_normal(width) / 2)
        hessian = seen.T @ seen
        hessian[np.diag_indices(width)] += 0.01 * np.mean(np.diag(hessian))
        upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
        left, codes = values.astype(np.float64), np.empty(SHAPE)
        scales = np.empty((SHAPE[0], width // group), np.float32)
        for i in range(width):
            if i % group == 0:
                scales[:, i // group] = np.abs(left[:, i : i + group]).max(axis=1) / ((2**bits - 1) / 2)
            scale = scales[:, i // group].astype(np.float64)
            codes[:, i] = np.clip(np.rint(left[:, i] / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            left[:, i:] -= np.outer((left[:, i] - codes[:, i] * scale) / upper[i, i], upper[i, i:])
        return Grid(bits, group, "f32", True), codes.astype(np.int8), scales, None

    return code


MADE = {
    "Q4_0": ggml("Q4_0"), "Q4_1": ggml("Q4_1"), "Q5_0": ggml("Q5_0"), "Q8_0": ggml("Q8_0"), "Q3_K": ggml("Q3_K"),
    "Q4_K": ggml("Q4_K"), "Q5_K": ggml("Q5_K"), "Q6_K": ggml("Q6_K"), "Q4_0, imatrix": ggml("Q4_0", 1.5),
    "Q4_K, imatrix": ggml("Q4_K", 1.5), "Q6_K, imatrix": ggml("Q6_K", 1.5), "MLX 3": mlx(3, 64), "MLX 4": mlx(4, 64),
    "MLX 4, groups of 32": mlx(4, 32), "MLX 6": mlx(6, 64), "MLX 8": mlx(8, 64), "RTN 4": nearest(4, 128),
    "RTN 8": nearest(8, 128), "GPTQ 4": gptq(4, 128), "GPTQ 4, groups of 32": gptq(4, 32), "GPTQ 3": gptq(3, 128),
    "GPTQ 8": gptq(8, 128), "AWQ 4": zero_points(4, 128, 0.95), "AWQ 4, clipped": zero_points(4, 64, 0.8),
}  # fmt: skip
SURE = [
    name for name in MADE if not name.startswith(("Q3", "MLX 3", "GPTQ 3"))
]  # single blocks of 3 bits may look alike


def said(values: Floats, coded: Coded) -> list[str]:
    """The bounds that somebody's tensor breaks."""
    grid, codes, scales, shifts = coded
    stored = ArrayTensor(
        NAME, evaluate(grid, codes, scales, shifts).astype(np.float32), "f32", codes, scales, grid, shifts
    )
    found = compare({NAME: ArrayTensor(NAME, values, "f32")}, {NAME: stored}, ours=False)
    report = TensorReport.model_validate(found.tensors[0], from_attributes=True)
    assert report.blocks is not None
    weights = WeightsReport(compared=1, exact=0, exact_fraction=0.0, max_relative_error=0.0, tensors=(report,))
    held = bounds(Validation(weights), {}, RECIPES["default"])
    return [f"{bound.metric}: {bound.where}" for bound in held if not bound.held]


@pytest.mark.parametrize("values", [normal(), heavy()], ids=["normal", "heavy"])
@pytest.mark.parametrize("name", MADE)
def test_what_other_programs_make_gives_no_alarm(name: str, values: Floats) -> None:
    assert said(values, MADE[name](values)) == []


@pytest.mark.parametrize("factor", [0.5, 1.7])
@pytest.mark.parametrize("name", SURE)
def test_one_block_with_another_scale_is_named(name: str, factor: float) -> None:
    values = normal()
    grid, codes, scales, shifts = MADE[name](values)
    scales = scales.copy()
    row, block = 17, 2
    scales[row, block] *= np.float32(factor)
    found = said(values, (grid, codes, scales, shifts))
    assert found, name
    assert f"row {row}, from column {block * grid.block}" in found[0]


@pytest.mark.parametrize("factor", [0.5, 1.7])
@pytest.mark.parametrize("name", SURE)
def test_every_scale_another_is_named(name: str, factor: float) -> None:
    values = normal()
    grid, codes, scales, shifts = MADE[name](values)
    assert said(values, (grid, codes, scales * np.float32(factor), shifts)) != []


@pytest.mark.parametrize("name", SURE)
def test_a_block_with_another_ones_codes_is_named(name: str) -> None:
    values = normal()
    grid, codes, scales, shifts = MADE[name](values)
    codes = codes.copy()
    codes[5, : grid.block] = codes[6, : grid.block]
    assert said(values, (grid, codes, scales, shifts)) != []
