"""Which grid survives in which format: the table of docs/exactness.md, out of what the exporters themselves answer.

`python -m gemexport.report.exactness > docs/exactness.md` writes it; a test holds the file to it, and
tests/test_every_grid.py holds the exporters to their answers.
"""

from __future__ import annotations

from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined

from gemexport.exporters.fitting import Answer
from gemexport.formats.gguf.layouts import LAYOUTS
from gemexport.formats.grids.search import FALLBACK, held_everywhere
from gemexport.formats.storage.minifloat import E2M1, E4M3
from gemexport.formats.tensor import DType, Grid, Kind
from gemexport.registry import TARGETS

WIDTH = 2048  # of the rows: a multiple of every block there is
# A number rounded to a dtype is off by at most this of itself.
ROUNDING: dict[DType, str] = {"bf16": "2⁻⁸", "f16": "2⁻¹¹", "f32": "2⁻²⁴"}
# Whether a dtype holds all numbers of another: f16 and bf16 have bits where the other has none.
_HOLDS: dict[DType, tuple[DType, ...]] = {"f32": ("f32", "f16", "bf16"), "f16": ("f16",), "bf16": ("bf16",)}


@dataclass(frozen=True)
class Source:
    """A kind of grid that checkpoints come with, and where it is found."""

    name: str
    grid: Grid


@dataclass(frozen=True)
class Cell:
    """What becomes of a grid in one variant of a format."""

    outcome: str  # exact, codes exact, or what is made of the values
    container: str  # as the format calls it


def sources() -> list[Source]:
    """The grids of the table."""

    def grid(bits: int, block: int, scales: DType, kind: Kind = "symmetric", levels: tuple[float, ...] = ()) -> Grid:
        return Grid(bits, block, scales, lossless=True, kind=kind, levels=levels)

    found = [
        Source("QAT, blocks of 32, f16 scales", grid(4, 32, "f16")),
        Source("QAT, blocks of 32, bf16 scales", grid(4, 32, "bf16")),
        Source("QAT, blocks of 32, f32 scales", grid(4, 32, "f32")),
        *(Source(f"Gemma mobile, int{bits}, a row", grid(bits, WIDTH, "f32")) for bits in (2, 4, 8)),
        Source("GPTQ, AWQ: uint4, groups of 128", grid(4, 128, "f16", "zero-point")),
        Source("GPTQ: uint8, groups of 128", grid(8, 128, "f16", "zero-point")),
        Source("compressed-tensors W8A8, a row", grid(8, WIDTH, "bf16")),
        Source("compressed-tensors W4A16, groups of 128", grid(4, 128, "bf16")),
        Source("compressed-tensors fp8, a row", grid(8, WIDTH, "bf16", "codebook", E4M3)),
        *(Source(f"MLX affine, {bits} bit, groups of 64", grid(bits, 64, "bf16", "affine")) for bits in range(2, 9)),
        Source("nvfp4, groups of 16", grid(4, 16, "bf16", "codebook", E2M1)),
    ]
    return found + [Source(f"GGUF {kind.name}", layout.grid) for kind, layout in LAYOUTS.items()]


def cell(grid: Grid, target: str, variant: str) -> Cell:
    """What a variant makes of a grid, as its exporter decides it."""
    container = TARGETS[target].exporter().container
    answer: Answer = container(grid, WIDTH, variant)
    if not isinstance(answer, str):
        if grid.kind == "zero-point" and answer.scales != "f32":
            return Cell(
                f"codes exact, scale × zero rounded to {answer.scales} ({ROUNDING[answer.scales]})", answer.name
            )
        if grid.scale_dtype in _HOLDS[answer.scales]:
            return Cell("exact", answer.name)
        return Cell(f"codes exact, scales rounded to {answer.scales} ({ROUNDING[answer.scales]})", answer.name)
    fallback = Grid(FALLBACK.bits, FALLBACK.group_size, "f16", lossless=False)
    again: Answer = container(fallback, WIDTH, variant)
    if held_everywhere(grid) or isinstance(again, str):
        return Cell("values written plain", "")
    return Cell(f"requantized to {fallback.bits} bit, blocks of {fallback.block}, least squares", again.name)


def markdown() -> str:
    """The whole page."""
    columns = [(name, variant) for name, target in TARGETS.items() for variant in target.variants]
    rows = [(source.name, [cell(source.grid, *column) for column in columns]) for source in sources()]
    environment = Environment(
        loader=PackageLoader("gemexport.report"), undefined=StrictUndefined, trim_blocks=True, autoescape=False
    )
    return environment.get_template("exactness.md").render(columns=columns, rows=rows)


if __name__ == "__main__":
    print(markdown(), end="")
