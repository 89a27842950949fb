"""Damages small checkpoints and reads them: a model or an InputError must come out, in bounded time and memory.

A mutation changes bytes, overwrites a number with an extreme one, cuts a piece out, doubles one, or cuts off the end.
What made the reader fail is kept, and printed with its traceback.

    python benchmarks/fuzz.py gguf [--seconds 180] [--seed 0] [--keep FOLDER] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gemexport import demo
from gemexport.formats.checkpoint import open_checkpoint
from gemexport.formats.errors import InputError
from gemexport.formats.grids import attach, find_grids
from gemexport.formats.recipe import RECIPES
from gemexport.formats.tensor import slices

SMALL = demo.Size(vocab=512, hidden=32, intermediate=32, heads=1, kv_heads=1, head_dim=32, per_layer=32, window=8)
EXTREMES = (0, 1, 2, 7, 8, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1, (1 << 64) - 1)
TIME_LIMIT = 20  # seconds for one file of some 30 kB
MEMORY_LIMIT = 4 << 30  # bytes of address space, of which libraries take most


def gguf(folder: Path, family: demo.Family) -> Path:
    """A GGUF file of a tiny model."""
    from gemexport.exporters import gguf as exporter

    checkpoint = open_checkpoint(demo.make(folder / "source", family=family, size=SMALL))
    find_grids(checkpoint, folder / "grids", RECIPES["default"])
    return exporter.export(attach(checkpoint, folder / "grids"), folder / f"{family}.gguf").path


# By name: checkpoints, a file or a folder each, that the reader is tried on. Another reader is another line.
READERS: dict[str, Callable[[Path], list[Path]]] = {
    "gguf": lambda folder: [gguf(folder / family, family) for family in ("gemma3", "gemma4")],
    "safetensors": lambda folder: [demo.make(folder / "plain", family="gemma3", size=SMALL)],
}


def read(model: Path, scratch: Path) -> None:
    """Everything that a run reads of a checkpoint: config, every tensor, the tokenizer."""
    from tokenizers import Tokenizer

    checkpoint = open_checkpoint(model, scratch)
    for tensor in checkpoint.tensors.values():
        if len(tensor.shape) == 2:
            for start, stop in slices(tensor):
                tensor.rows(start, stop)
        else:
            tensor.numpy()
    if model.is_file():  # the one that came with a folder is not ours to vouch for
        Tokenizer.from_file(str(checkpoint.assets / "tokenizer.json")).encode("Café <eos>  two\n\n")


def mutate(data: bytearray, choose: random.Random) -> str:
    """Damage `data` in place; returns what was done."""
    kind = choose.choice(("bytes", "number", "number", "cut", "double", "end"))
    # Headers are at the front, and short: half of the damage goes there.
    place = choose.randrange(min(len(data), 4096) if choose.random() < 0.5 else len(data))
    if kind == "bytes":
        for _ in range(choose.randint(1, 8)):
            data[min(len(data) - 1, place + choose.randrange(64))] = choose.randrange(256)
    elif kind == "number":
        size = choose.choice((1, 2, 4, 8))
        value = choose.choice(EXTREMES) & ((1 << 8 * size) - 1)
        data[place : place + size] = value.to_bytes(size, "little")
    elif kind == "cut":
        del data[place : place + choose.randint(1, 64)]
    elif kind == "double":
        data[place:place] = data[place : place + choose.randint(1, 64)]
    else:
        del data[place:]
    return f"{kind} at {place}"


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise TimeoutError when the block takes longer."""

    def late(*_: object) -> None:
        raise TimeoutError(f"took longer than {seconds} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def fuzz(name: str, seconds: float, seed: int, keep: Path | None) -> tuple[Counter[str], float]:
    """Damage and read for so long; what came of it, and the longest time that one file took."""
    choose, counts, slowest = random.Random(seed), Counter[str](), 0.0
    with tempfile.TemporaryDirectory(prefix="gemexport-fuzz-") as temporary:
        folder = Path(temporary)
        models = READERS[name](folder)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            model = choose.choice(models)
            damaged = folder / "damaged" / model.name
            shutil.rmtree(damaged.parent, ignore_errors=True)
            damaged.parent.mkdir()
            (shutil.copytree if model.is_dir() else shutil.copyfile)(model, damaged)
            file = damaged if damaged.is_file() else choose.choice(sorted(damaged.iterdir()))
            data = bytearray(file.read_bytes())
            done = ", ".join(mutate(data, choose) for _ in range(choose.randint(1, 3)) if data)
            file.write_bytes(data)
            started = time.monotonic()
            counts[
                outcome(damaged, folder / "damaged" / "scratch", f"{file.name}: {done}", keep, sum(counts.values()))
            ] += 1
            slowest = max(slowest, time.monotonic() - started)
    return counts, slowest


def outcome(model: Path, scratch: Path, done: str, keep: Path | None, number: int) -> str:
    """Read a damaged model: `read`, `refused`, or `failed` with a traceback on standard error."""
    try:
        with limited(TIME_LIMIT):
            read(model, scratch)
    except InputError as error:
        if "\n" not in str(error):
            return "refused"
        print(f"{done}: the message has more than one line: {error}", file=sys.stderr)
    except BaseException:  # a Rust panic is no Exception
        print(done, file=sys.stderr)
        traceback.print_exc()
    else:
        return "read"
    if keep is not None:
        target = keep / str(number)
        shutil.copytree(model.parent, target, dirs_exist_ok=True)
        print(f"kept in {target}", file=sys.stderr)
    return "failed"


def main() -> int:
    """Parse the command line; returns the exit status: 1 when something else than an InputError came out."""
    parser = argparse.ArgumentParser(description="Read damaged checkpoints.")
    parser.add_argument("reader", choices=sorted(READERS))
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the files that a reader failed on")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, resource.getrlimit(resource.RLIMIT_AS)[1]))
    warnings.simplefilter("ignore", RuntimeWarning)  # infinite scales times zero
    counts, slowest = fuzz(options.reader, options.seconds, options.seed, options.keep)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    result = {
        "reader": options.reader, "seed": options.seed, "seconds": options.seconds, "files": sum(counts.values()),
        **{key: counts[key] for key in ("read", "refused", "failed")}, "slowest_seconds": slowest, "peak_bytes": peak,
    }  # fmt: skip
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
