"""The table of docs/exactness.md is the one that the exporters' answers make."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemexport.formats.tensor import Grid
from gemexport.report import exactness


def test_the_page_is_what_the_code_says() -> None:
    page = Path(__file__).parents[3] / "docs" / "exactness.md"
    assert page.read_text("utf-8") == exactness.markdown(), (
        "run: python -m gemexport.report.exactness > docs/exactness.md"
    )


@pytest.mark.parametrize("target", ["mlx", "onnx", "coreml", "compressed-tensors"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rows_of_mobile_checkpoints_are_exact(target: str, bits: int) -> None:
    variant = exactness.TARGETS[target].variants[0]
    assert exactness.cell(Grid(bits, exactness.WIDTH, "f32", lossless=True), target, variant).outcome == "exact"


def test_what_gguf_has_no_block_for_is_said() -> None:
    found = exactness.cell(Grid(8, 64, "bf16", lossless=True, kind="affine"), "gguf", "Q4_0")
    assert found.outcome.startswith("requantized to 8 bit")
    assert found.container == "Q8_0"
