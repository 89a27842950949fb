"""How many weights a second the search for a checkpoint's lattice gets through, on all cores.

Weights in memory, put on a grid by each of the rules that `gemexport.demo.qat` knows, and plain ones; with --model, the
whole search over a checkpoint on disk as well, which is what an export waits for.

    python benchmarks/lattice.py [--weights 64] [--rounds 5] [--model FOLDER] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from machine import machine
from rich.console import Console
from rich.table import Table

from gemexport.demo import qat
from gemexport.formats.checkpoint import open_checkpoint
from gemexport.formats.grids.lattice import search_all
from gemexport.formats.grids.recipe import RECIPES
from gemexport.formats.grids.search import find_grids
from gemexport.formats.tensor import ArrayTensor, from_bf16

WIDTH = 2048
WARM_UP_ROWS = 64


def weights(rule: str | None, millions: float) -> ArrayTensor:
    """A bf16 matrix of about so many million normal weights, on the grid that `rule` makes, or plain."""
    rows = max(WARM_UP_ROWS, round(millions * 1e6 / WIDTH))
    values = np.random.default_rng(0).standard_normal((rows, WIDTH), dtype=np.float32) * np.float32(0.03)
    plain = from_bf16(qat.to_bf16(values))
    return ArrayTensor("weights", from_bf16(qat.on_grid(values, rule)) if rule else plain, "bf16")


def search(tensor: ArrayTensor) -> tuple[int, int]:
    """The block size that the search settles on, and how many weights lie on that grid."""
    found = list(search_all([tensor]))
    return found[0].block, sum(part.on for part in found)


def timed(action: Callable[[], object], count: int, rounds: int) -> dict[str, float]:
    """Millions of `count` weights a second, the median of `rounds` runs after one that compiles and warms up.

    Also a second of one core's time, which a machine that is busy with something else does not spoil.
    """
    action()
    wall, core = [], []
    for _ in range(rounds):
        start, used = time.perf_counter(), time.process_time()
        action()
        wall.append(time.perf_counter() - start)
        core.append(time.process_time() - used)
    millions = count / 1e6
    return {
        "millions_a_second": millions / statistics.median(wall),
        "millions_a_core_second": millions / statistics.median(core),
    }


def in_memory(millions: float, rounds: int) -> list[dict[str, object]]:
    """Millions of weights a second for every rule, and for weights on no grid."""
    found = []
    for rule in (*qat.RULES, None):
        tensor = weights(rule, millions)
        count = tensor.shape[0] * tensor.shape[1]
        block, on = search(tensor)
        speed = timed(lambda tensor=tensor: search(tensor), count, rounds)
        found.append({"weights": rule or "plain bf16", "block": block, "on_grid": on / count, **speed})
    return found


def on_disk(model: Path, rounds: int) -> dict[str, object]:
    """The same for the whole search over a checkpoint: reading, block sizes, scales written."""
    checkpoint = open_checkpoint(model)
    matrices = [tensor for tensor in checkpoint.tensors.values() if len(tensor.shape) == 2]
    count = sum(tensor.shape[0] * tensor.shape[1] for tensor in matrices)
    fractions: list[float] = []

    def once() -> None:
        with tempfile.TemporaryDirectory() as folder:
            index = find_grids(checkpoint, Path(folder) / "grids", RECIPES["lossless"])
        fractions.append(index.lattice_fraction())

    speed = timed(once, count, rounds)
    return {"weights": f"{checkpoint.name}, from disk", "block": "", "on_grid": fractions[-1], **speed}


def main() -> int:
    """Parse the command line and print the table; returns the exit status."""
    parser = argparse.ArgumentParser(description="Weights a second of the search for a lattice.")
    parser.add_argument("--weights", type=float, default=64, help="millions of weights for each rule")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", type=Path, help="a checkpoint to search from disk as well")
    parser.add_argument("--json", type=Path, help="write the numbers there too")
    options = parser.parse_args()
    results = in_memory(options.weights, options.rounds)
    if options.model:
        results.append(on_disk(options.model, options.rounds))
    table = Table(title=f"search for a lattice, {os.cpu_count()} cores", title_justify="left")
    for column in ("weights", "block", "on the grid", "million a second", "million a core's second"):
        table.add_column(column, justify="left" if column == "weights" else "right")
    for row in results:
        speeds = [f"{row[key]:.0f}" for key in ("millions_a_second", "millions_a_core_second")]
        table.add_row(str(row["weights"]), str(row["block"]), f"{row['on_grid']:.4%}", *speeds)
    Console(width=110).print(table)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "results": results}, indent=2) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
