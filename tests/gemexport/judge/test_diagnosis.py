"""What is wrong with weights, in one plain sentence for each sort of fault."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from gemexport.formats.tensor import DType, Floats, Grid, Rows, TensorBase
from gemexport.judge.diagnosis import diagnose, fault
from gemexport.shared.measured import GridReport, TensorReport
from gemexport.validators.checks.weights import compare

LATTICE = GridReport(bits=4, block=32, scale_dtype="bf16", lossless=True)
Q4_0 = GridReport(bits=4, block=32, scale_dtype="f16", lossless=False)


def tensor(exact: int = 21, **changes: Any) -> TensorReport:
    base = {
        "name": "w", "shape": (10, 10), "dtype": "f32", "grid": Q4_0, "source_grid": LATTICE, "compared": 100,
        "exact": exact, "exact_fraction": exact / 100, "max_relative_error": 0.1, "source_dtype": "bf16",
    }  # fmt: skip
    return TensorReport(
        **{key: value for key, value in {**base, **changes}.items() if key in TensorReport.model_fields}
    )


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"same_scales": 0.1}, "scales are not the checkpoint's"),
        ({"same_scales": 1.0}, "codes are not the checkpoint's, on its scales"),
        ({"same_scales": 0.68, "exact": 68}, "scales are not the checkpoint's"),
        ({"scale_rounded": True, "same_scales": 1.0}, "codes are the checkpoint's, scales are rounded"),
        ({"grid": Q4_0.model_copy(update={"bits": 8})}, "another grid, int8 / 32 · f16 for the checkpoint's int4 / 32"),
        (
            {"grid": Q4_0.model_copy(update={"block": 64})},
            "another grid, int4 / 64 · f16 for the checkpoint's int4 / 32",
        ),
        ({"grid": None, "dtype": "f16"}, "without codes, rounded to f16"),
        ({"source_grid": None}, "rounded to int4 / 32 · f16"),
        ({"source_grid": None, "grid": None, "dtype": "f16"}, "rounded to f16"),
        ({"requantized": True}, "codes are fitted anew as int4 / 32 · f16"),
    ],
)
def test_each_sort_of_fault_has_a_name(changes: dict[str, Any], what: str) -> None:
    assert fault(tensor(**changes)).startswith(what)


def test_a_sentence_for_each_sort_that_of_the_most_weights_first() -> None:
    found = diagnose(
        [
            tensor(),
            tensor(exact=100),
            tensor(grid=None, dtype="f16", name="head", compared=1000, exact=999),
            tensor(same_scales=0.2),
        ]
    )
    assert found == (
        "without codes, rounded to f16: 99.9 % of the weights exact in head",
        "scales are not the checkpoint's: 21.0 % of the weights exact in 2 matrices",
    )
    assert diagnose([tensor(exact=100)]) == ()


@dataclass(frozen=True)
class Held(TensorBase):
    """A matrix of codes and scales in memory."""

    codes: np.ndarray
    scales: Floats
    name: str = "w"
    dtype: DType = "f32"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def grid(self) -> Grid:
        return Grid(bits=4, block=self.codes.shape[1] // self.scales.shape[1], scale_dtype="f32", lossless=True)

    def rows(self, start: int, stop: int) -> Rows:
        scales = np.repeat(self.scales[start:stop], self.grid.block, axis=1)
        return Rows(self.codes[start:stop] * scales, self.codes[start:stop], self.scales[start:stop])


def test_scales_are_compared_block_by_block() -> None:
    stream = np.random.default_rng(1)
    codes = stream.integers(-8, 8, (6, 64), dtype=np.int8)
    scales = stream.uniform(0.1, 1.0, (6, 2)).astype(np.float32)
    other = scales.copy()
    other[0, 0] *= 2
    other[1, 1] *= -1  # a grid that runs the other way is the same grid
    turned = codes.copy()
    turned[1, 32:] = -np.maximum(codes[1, 32:], -7)
    (found,) = compare({"w": Held(codes, scales)}, {"w": Held(turned, other)}).tensors
    assert found.same_scales == 11 / 12
    wide = Held(codes, np.abs(scales[:, :1]))
    assert compare({"w": Held(codes, scales)}, {"w": wide}).tensors[0].same_scales is None
