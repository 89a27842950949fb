"""`gemexport plan` against a run: bytes of each artefact, and peak memory of each step, as a table.

Both runs are whole ones, validators and all, unless `--no-validate` leaves those out. Where something else fills the
machine, steps take turns otherwise and what they hold from before differs; the figures do by a few per cent.

    python benchmarks/plans.py MODEL... --work FOLDER [--no-validate] [--only FORMATS] [--tokens 512] [--recipe NAME]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from gemexport.engine.dag import graph
from gemexport.engine.sizes import artifact_sizes
from gemexport.registry import split_formats
from gemexport.request import Request, request, steps
from gemexport.run import run
from gemexport.shared.node import Events, Node, Outcome
from gemexport.shared.place import WORK

SIZES, MEMORY = 0.01, 0.20  # what is asked of a plan


def compare(asked: Request) -> list[str]:
    """Rows of a table: what was planned, what the run took, and how far apart that is."""
    checkpoint = asked.checkpoint()
    checkpoint.unpack()
    wanted = steps(asked, checkpoint)
    sizes = artifact_sizes(asked, checkpoint, wanted)
    planned = {node.name: node.memory for node in graph(asked, checkpoint, asked.out / WORK, wanted)}
    peaks: dict[str, int] = {}

    def ended(node: Node, outcome: Outcome) -> None:
        peaks[node.name] = outcome.peak_bytes or 0

    report = run(asked, Events(ended=ended))
    rows = [_row(name, planned[name], peak, 1 << 20, MEMORY) for name, peak in peaks.items()]
    rows.append(
        _row("peak of the whole run", max(map(planned.__getitem__, peaks)), report.peak_rss_bytes, 1 << 20, MEMORY)
    )
    for row in report.artifacts:
        rows.append(
            _row(
                f"bytes of {row.format}:{row.variant}",
                sizes[f"export {row.format}:{row.variant}"],
                row.bytes or 0,
                1,
                SIZES,
            )
        )
    return rows


def _row(name: str, planned: int, found: int, unit: int, limit: float) -> str:
    off = planned / found - 1 if found else float("nan")
    mark = "" if abs(off) <= limit else " **over**"
    return f"| {name} | {planned // unit:,} | {found // unit:,} | {100 * off:+.1f} %{mark} |"


def main() -> int:
    """Run as a script; the status is 1 where something is further off than is asked for."""
    parser = argparse.ArgumentParser(description="What is planned, and what is taken.")
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--work", required=True, type=Path, help="folder for the output folders, which are made anew")
    parser.add_argument("--no-validate", action="store_true")
    parser.add_argument("--only", help="formats, comma-separated")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--recipe", help="of what lies on no lattice")
    given = parser.parse_args()
    over = False
    for model in given.models:
        asked = request(
            model=model, out=given.work / model.name, fresh=True, validate=not given.no_validate, tokens=given.tokens,
            recipe=given.recipe, formats=split_formats(given.only) if given.only else None,
        )  # fmt: skip
        rows = compare(asked)
        over |= any("**over**" in row for row in rows)
        print(
            f"\n{model.name}\n\n| what | planned | run | planned / run - 1 |\n| --- | ---: | ---: | ---: |", flush=True
        )
        print("\n".join(rows), flush=True)
    return int(over)


if __name__ == "__main__":
    sys.exit(main())
