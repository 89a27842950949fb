"""How much memory one large tensor takes on its way through each step that streams, by the number of threads.

A tensor of 24,576 x 8,192 bf16 weights on a lattice (400 MB; 805 MB as float32) is searched, exported and compared, in
a process for each step and number of threads, with the environment of the processes that a run starts. Memory is
anonymous memory (RssAnon), sampled as a run samples it: all of the process, with the interpreter and the libraries that
the step imports, and, in a column of its own, what of it the process had when the step began.

    python benchmarks/streaming.py [--rows 24576] [--width 8192] [--threads 2,8,32] [--steps "gguf Q4_0"] [--rounds 3]
                                   [--work FOLDER] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from machine import machine
from rich.console import Console
from rich.table import Table

from gemexport import demo
from gemexport.demo import qat
from gemexport.engine.processes import environment
from gemexport.formats.checkpoint import Checkpoint, open_checkpoint
from gemexport.formats.grids.search import GridTensor
from gemexport.formats.storage.safetensors import Entry, MappedTensor, ShardedWriter, read_folder
from gemexport.formats.tensor import ArrayTensor, Grid, matrix_of, row_slices
from gemexport.shared.memory import MemoryWatch, anonymous_bytes

NAME, NORM, SCALES = "model.embed_tokens.weight", "model.norm.weight", "scales.f32"
STEPS = ("search", "gguf Q4_0", "mlx 4bit", "compressed-tensors W4A16", "weights")


def make(folder: Path, rows: int, width: int) -> None:
    """A tiny model, and beside it the tensor that takes the place of its embedding, with the scales that it lies on."""
    demo.make(folder / "model", family="gemma3", size="tiny")
    stream, shape = np.random.default_rng(0), (rows, width)
    with ShardedWriter(folder / "large", [Entry(NAME, "BF16", shape)]) as out, (folder / SCALES).open("wb") as file:
        for start, stop in row_slices(shape):
            values = stream.standard_normal((stop - start, width), dtype=np.float32)
            codes, scales = qat.quantize(values, "max/7")
            out.write(NAME, qat.to_bf16(codes * np.repeat(scales, qat.BLOCK, axis=1)))
            file.write(scales.astype("<f4").data)


def large(folder: Path) -> GridTensor:
    """The tensor on its grid, mapped."""
    base = MappedTensor(read_folder(folder / "large")[NAME])
    count, width = matrix_of(base.shape)
    scales = np.memmap(folder / SCALES, "<f4", "r", shape=(count, width // qat.BLOCK))
    return GridTensor(base, Grid(4, qat.BLOCK, "bf16", lossless=True), scales)


def step(name: str, checkpoint: Checkpoint, folder: Path) -> Callable[[], object]:
    """The step of a name over the one tensor of `checkpoint`, with everything that it needs imported."""
    from gemexport.formats.grids.lattice import load, search_all

    load()
    tensor = checkpoint.tensors[NAME]
    if name == "search":
        plain = MappedTensor(read_folder(folder / "large")[NAME])
        return lambda: sum(part.on for part in search_all([plain]))
    if name == "weights":
        from gemexport.validators.checks.weights import compare

        return lambda: compare({NAME: tensor}, {NAME: large(folder)})
    target, variant = name.split()
    if target == "gguf":
        from gemexport.exporters import gguf as exporter
    elif target == "mlx":
        from gemexport.exporters import mlx as exporter
    else:
        from gemexport.exporters import compressed_tensors as exporter
    return lambda: exporter.export(checkpoint, folder / f"out-{target}", variant=variant)


def measure(name: str, folder: Path, threads: int) -> dict[str, float]:
    """Peak and initial anonymous memory in bytes, and seconds, of a step in this process."""
    os.cpu_count = lambda: threads  # what the steps go by
    whole = open_checkpoint(folder / "model")
    rows, width = (tensor := large(folder)).shape
    tensors = {NAME: tensor, NORM: ArrayTensor(NORM, np.ones(width, np.float32), "bf16")}
    decoder = whole.architecture.model_copy(update={"vocab_size": rows, "hidden_size": width})
    model = replace(whole.model, decoder=decoder)  # exporters ask it for the shapes that tensors have
    action = step(name, replace(whole, tensors=tensors, model=model), folder)
    before, started = anonymous_bytes() or 0, time.perf_counter()
    with MemoryWatch(interval=0.005) as watch:
        action()
    return {"peak": watch.peak or 0, "before": before, "seconds": time.perf_counter() - started}


def in_a_process(name: str, folder: Path, threads: int) -> dict[str, float]:
    """`measure` in a process such as a run starts."""
    command = [sys.executable, __file__, "--measure", name, "--work", str(folder), "--threads", str(threads)]
    done = subprocess.run(command, env=environment(threads), check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare_threads(folder: Path, threads: list[int], steps: list[str], rounds: int) -> list[dict[str, object]]:
    """For each step and number of threads the largest peak and the shortest time of some rounds, taken in turn."""
    results: list[dict[str, object]] = []
    for name in steps:
        runs: dict[int, list[dict[str, float]]] = {count: [] for count in threads}
        for _ in range(rounds):
            for count in threads:
                runs[count].append(in_a_process(name, folder, count))
        results += [
            {
                "step": name,
                "threads": count,
                "peak": max(run["peak"] for run in found),
                "before": max(run["before"] for run in found),
                "seconds": min(run["seconds"] for run in found),
            }
            for count, found in runs.items()
        ]
    return results


def main() -> int:
    """Parse the command line and print the table; returns the exit status."""
    parser = argparse.ArgumentParser(description="Memory of streaming one large tensor, by threads.")
    parser.add_argument("--rows", type=int, default=24_576)
    parser.add_argument("--width", type=int, default=8_192)
    parser.add_argument("--threads", default="2,8,32")
    parser.add_argument("--steps", default=",".join(STEPS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, help="keeps what is made there, and takes what is there already")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="write the numbers there too")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.work, int(options.threads))))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.work or Path(scratch)
        if not (folder / SCALES).is_file():
            make(folder, options.rows, options.width)
        threads = [int(count) for count in options.threads.split(",")]
        results = compare_threads(folder, threads, options.steps.split(","), options.rounds)
    table = Table(title=f"{options.rows} x {options.width} bf16 weights, {os.cpu_count()} cores", title_justify="left")
    for column in ("step", "threads", "peak MB", "of it before", "seconds"):
        table.add_column(column, justify="left" if column == "step" else "right")
    for row in results:
        sizes = [f"{row[key] / 1e6:.0f}" for key in ("peak", "before")]
        table.add_row(str(row["step"]), str(row["threads"]), *sizes, f"{row['seconds']:.2f}")
    Console(width=110).print(table)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "results": results}, indent=2) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
