"""Every fault in every format is caught, and the verdict names the place; nothing is said of artefacts without one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gemexport.faults import experts
from gemexport.faults.matrix import COLUMNS, Bench, Cell, applicable, catalogue, markdown
from gemexport.faults.sources import SOURCES, Source

FEW = (
    ("gguf", "Q4_0", "1 + weight norm for weight"),
    ("gguf", "Q4_0", "RoPE base wrong"),
    ("gguf", "Q4_0", "tied head untied with noise"),
    ("gguf", "Q4_0", "truncated file"),
    ("mlx", "4bit", "layer scalar lost"),
    ("mlx", "4bit", "sliding window off by one"),
    ("onnx", "int4", "shared KV layer reads the wrong donor"),
    ("onnx", "npu", "nibbles exchanged"),
    ("coreml", "int4", "one block's scale halved"),
    ("coreml", "int4", "sliding window off by one"),
    ("compressed-tensors", "w4a16", "soft cap lost"),
)
OF_WEIGHTS = (
    "one block's scale halved", "one block's codes off by one", "nibbles exchanged", "one weight of a norm changed",
    "scales rounded to bf16",
)  # fmt: skip
WIDTHS = ("2-bit codes off by one", "8-bit codes off by one")


@pytest.fixture(scope="module")
def bench(tiny_gemma4: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The tiny Gemma 4, its artefacts made as they are asked for."""
    return Bench(tiny_gemma4, tmp_path_factory.mktemp("faults"))


def complaint(cell: Cell) -> str | None:
    """What is wrong with a cell: a fault that was missed, or a verdict that does not name the place."""
    if cell.caught is None:
        return None
    if not cell.caught:
        return f"{cell.fault} in {cell.target} {cell.variant} was missed"
    if not re.search(cell.named, cell.reason):
        return f"{cell.fault} in {cell.target} {cell.variant}: {cell.named} is not in: {cell.reason}"
    return None


@pytest.mark.parametrize(("target", "variant", "fault"), FEW)
def test_a_fault_is_caught_and_named(target: str, variant: str, fault: str, bench: Bench) -> None:
    cell = bench.cell(fault, target, variant)
    assert cell.caught is not None
    assert complaint(cell) is None


@pytest.mark.parametrize(("target", "variant"), COLUMNS)
def test_faults_of_experts_are_caught_and_named(target: str, variant: str, bench: Bench) -> None:
    for fault in experts.FAULTS:
        cell = bench.cell(fault, target, variant)
        assert cell.caught is not None
        assert complaint(cell) is None
        assert cell.by == "weights"


@pytest.mark.slow
@pytest.mark.parametrize("column", COLUMNS)
def test_no_fault_is_missed(column: tuple[str, str], bench: Bench) -> None:
    cells = list(bench.cells((column,)))
    assert [text for cell in cells if (text := complaint(cell))] == [], markdown(cells)
    assert [cell.fault for cell in cells] == catalogue()


@pytest.mark.slow
@pytest.mark.parametrize("source", [source for source in SOURCES if source != "lattice"])
def test_faults_of_weights_are_caught_whatever_these_lie_on(source: Source, tmp_path: Path) -> None:
    """Of the other sources, and half of the formats, those that show without running; benchmarks/faults.py has all."""
    bench = Bench(SOURCES[source](tmp_path / "model"), tmp_path / "work", source=source)
    cells = list(bench.cells(COLUMNS[::2], (*OF_WEIGHTS, *WIDTHS)))
    assert [text for cell in cells if (text := complaint(cell))] == [], markdown(cells)
    caught = {cell.fault for cell in cells if cell.caught and cell.by == "weights"}
    # Scales that bf16 holds have nothing to lose by it; wherever one has, the line above wants it caught.
    assert caught >= {*OF_WEIGHTS, *(WIDTHS if source == "mobile" else ())} - {"scales rounded to bf16"}


def test_every_fault_is_applicable_somewhere(bench: Bench) -> None:
    for name in catalogue():
        reasons = [applicable(name, target, variant, bench) for target, variant in COLUMNS]
        assert not all(isinstance(reason, str) for reason in reasons), name


def test_a_graph_that_departs_is_placed(bench: Bench) -> None:
    """Layer 5 is the first of the shared ones, and what the first layer reads has no scale."""
    donor = bench.cell("shared KV layer reads the wrong donor", "onnx", "int4").reason
    scale = bench.cell("embedding scale lost", "onnx", "int4").reason
    assert "departs at model.layers.5," in donor
    assert "departs at model.embed_tokens," in scale
