"""Proves the validator: the matrix of faults and formats, and fault-free artefacts over seeds and shapes.

    python benchmarks/faults.py matrix [--source plain] [--whole] [--family gemma4]    # a table, and what verdicts say
    python benchmarks/faults.py clean --models 52 --run-every 5        # 8 artefacts a model, a fifth run

With `--whole` every artefact is run even if its weights or metadata have shown the fault. Exit status 1: a fault was
missed, or an artefact without one failed.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median

from gemexport.faults.clean import fault_free
from gemexport.faults.matrix import COLUMNS, Bench, catalogue, markdown
from gemexport.faults.sources import SOURCES
from gemexport.shared.measured import Divergence


def matrix(work: Path, asked: argparse.Namespace) -> int:
    """Print the matrix and every verdict; how many faults were missed."""
    model = SOURCES[asked.source](work / "model", asked.family)
    bench = Bench(model, work / "work", source=asked.source, whole=asked.whole)
    cells = []
    names = [name for name in catalogue() if asked.faults is None or re.search(asked.faults, name)]
    for cell in bench.cells(tuple(column for column in COLUMNS if asked.only in (None, column[0])), names):
        cells.append(cell)
        named = "" if not cell.caught or re.search(cell.named, cell.reason) else " NOT NAMED"
        said = f"{cell.text:7}{named} {cell.target} {cell.variant}: {cell.fault}: {cell.reason}"
        print(said, file=sys.stderr, flush=True)
    print(markdown(cells))
    count = Counter(cell.text.partition(":")[0] for cell in cells)
    print(", ".join(f"{number} {text}" for text, number in count.items()))
    return count["MISSED"]


def clean(work: Path, models: int, first: int, run_every: int) -> int:
    """Judge fault-free artefacts; how many gave an alarm. Prints how far each runtime is from the reference."""
    done: Counter[str] = Counter()
    noise: dict[int, float] = {}
    distances: dict[str, list[Divergence]] = {}
    for item in fault_free(work, range(first, first + models), run_every=run_every):
        for logits in item.logits:
            if logits.conversion is not None:
                distances.setdefault(f"{logits.runtime} | {logits.arithmetic}", []).append(logits.conversion)
        if item.noise is not None:
            noise[item.model.seed] = item.noise
        kind = "run" if item.logits else "weights and metadata"
        done[f"{item.model.kind}, {item.target} {item.variant}, {kind}: {'ALARM' if item.alarms else 'quiet'}"] += 1
        told = f"ALARM {'; '.join(item.alarms)}" if item.alarms else "quiet"
        print(f"seed {item.model.seed} ({item.model}) {item.target} {item.variant}: {told}", flush=True)
    print("\n".join(f"{name} {count}" for name, count in sorted(done.items())))
    if noise:
        print(f"noise of bf16 in {len(noise)} models: {min(noise.values()):.2g} to {max(noise.values()):.2g} nats")
    for name, all_of in sorted(distances.items()):
        mean, most = max(one.kld_mean for one in all_of), max(one.kld_max for one in all_of)
        agreed = min(one.top1_agreement for one in all_of)
        but_ties = min(one.top1_but_ties for one in all_of if one.top1_but_ties is not None)
        typical = median(one.kld_mean for one in all_of)
        print(f"| {name} | {len(all_of)} | {typical:.2g} | {mean:.2g} | {most:.2g} | {agreed:.2%} | {but_ties:.2%} |")
    alarms = sum(count for name, count in done.items() if name.endswith("ALARM"))
    print(f"{sum(done.values())} artefacts, {alarms} alarms")
    return alarms


def main() -> int:
    """1 when something was missed, or an alarm was false."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("matrix", "clean"))
    parser.add_argument("--family", choices=("gemma3", "gemma4"), default="gemma4")
    parser.add_argument("--source", choices=tuple(SOURCES), default="lattice")
    parser.add_argument("--faults", metavar="PATTERN", help="some of the catalogue")
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--only", help="a format of the matrix")
    parser.add_argument("--models", type=int, default=52)
    parser.add_argument("--run-every", type=int, default=5, help="one model in so many is run in its programs")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    asked = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gemexport-faults-") as folder:
        work = Path(folder)
        found = (
            matrix(work, asked) if asked.what == "matrix" else clean(work, asked.models, asked.first, asked.run_every)
        )
    print(f"{time.monotonic() - started:.0f} s")
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
