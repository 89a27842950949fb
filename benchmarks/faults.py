"""Proves the validator: the matrix of faults and formats, and fault-free artefacts over seeds and shapes.

    python benchmarks/faults.py matrix [--whole] [--family gemma4]     # a table, and what each verdict says
    python benchmarks/faults.py clean --models 34                      # 6 artefacts a model

With `--whole` every artefact is run even if its weights or metadata have shown the fault. Exit status 1: a fault was
missed, or an artefact without one failed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median

from gemexport import demo
from gemexport.faults.clean import fault_free
from gemexport.faults.matrix import COLUMNS, Bench, markdown
from gemexport.shared.measured import Divergence


def matrix(work: Path, family: demo.FamilyName, whole: bool, only: str | None) -> int:
    """Print the matrix and every verdict; how many faults were missed."""
    model = demo.make(work / "model", family=family, size="tiny")
    bench = Bench(model, work / "work", whole=whole)
    cells = []
    for cell in bench.cells(tuple(column for column in COLUMNS if only in (None, column[0]))):
        cells.append(cell)
        print(f"{cell.text:7} {cell.target} {cell.variant}: {cell.fault}: {cell.reason}", file=sys.stderr, flush=True)
    print(markdown(cells))
    count = Counter(cell.text.partition(":")[0] for cell in cells)
    print(", ".join(f"{number} {text}" for text, number in count.items()))
    return count["MISSED"]


def clean(work: Path, models: int, first: int) -> int:
    """Judge fault-free artefacts; how many failed. Prints how far each runtime and arithmetic is from the reference."""
    done: Counter[str] = Counter()
    noise: dict[str, list[Divergence]] = {}
    for item in fault_free(work, range(first, first + models)):
        for logits in item.logits:
            if logits.conversion is not None:
                noise.setdefault(f"{logits.runtime} | {logits.arithmetic}", []).append(logits.conversion)
        done[f"{item.target} {item.variant}: {item.status}"] += 1
        alarm = "" if item.status == "pass" else f" {item.reason}"
        print(f"{item.status} seed {item.seed} ({item.model}) {item.target} {item.variant}{alarm}", flush=True)
    print("\n".join(f"{name} {count}" for name, count in sorted(done.items())))
    for name, all_of in sorted(noise.items()):
        mean, most = max(one.kld_mean for one in all_of), max(one.kld_max for one in all_of)
        agreed = min(one.top1_agreement for one in all_of)
        but_ties = min(one.top1_but_ties for one in all_of if one.top1_but_ties is not None)
        typical = median(one.kld_mean for one in all_of)
        print(f"| {name} | {len(all_of)} | {typical:.2g} | {mean:.2g} | {most:.2g} | {agreed:.2%} | {but_ties:.2%} |")
    return sum(count for name, count in done.items() if not name.endswith("pass"))


def main() -> int:
    """1 when something was missed, or an alarm was false."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("matrix", "clean"))
    parser.add_argument("--family", choices=("gemma3", "gemma4"), default="gemma4")
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--only", help="a format of the matrix")
    parser.add_argument("--models", type=int, default=34)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    asked = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gemexport-faults-") as folder:
        work = Path(folder)
        found = (
            matrix(work, asked.family, asked.whole, asked.only)
            if asked.what == "matrix"
            else clean(work, asked.models, asked.first)
        )
    print(f"{time.monotonic() - started:.0f} s")
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
