"""Damages small files and reads them: a model or an InputError must come out, in bounded time and memory.

What made the reader fail is kept, and printed with its traceback; `damage.py` says what is damaged and how.

    python benchmarks/fuzz.py gguf [--seconds 180] [--seed 0] [--keep FOLDER] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

from damage import READERS, Sample, complaint, damaged


def fuzz(name: str, seconds: float, seed: int, keep: Path | None) -> tuple[Counter[str], float]:
    """Damage and read for so long; what came of it, and the longest time that one file took."""
    choose, counts, slowest = random.Random(seed), Counter[str](), 0.0
    with tempfile.TemporaryDirectory(prefix="gemexport-fuzz-") as temporary:
        folder = Path(temporary)
        samples = READERS[name](folder)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            sample = choose.choice(samples)
            copy, done = damaged(sample, folder / "damaged", choose)
            started = time.monotonic()
            found = outcome(sample, copy, done)
            slowest = max(slowest, time.monotonic() - started)
            if found == "failed" and keep is not None:
                target = keep / str(sum(counts.values()))
                shutil.copytree(copy.parent, target, dirs_exist_ok=True)
                print(f"kept in {target}", file=sys.stderr)
            counts[found] += 1
    return counts, slowest


def outcome(sample: Sample, copy: Path, done: str) -> str:
    """Read a damaged copy: `read`, `refused`, or `failed` with a traceback on standard error."""
    try:
        return "refused" if complaint(sample, copy) else "read"
    except BaseException:  # a Rust panic is no Exception
        print(done, file=sys.stderr)
        traceback.print_exc()
        return "failed"


def main() -> int:
    """Parse the command line; returns the exit status: 1 when something else than an InputError came out."""
    parser = argparse.ArgumentParser(description="Read damaged files.")
    parser.add_argument("reader", choices=sorted(READERS))
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the files that a reader failed on")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    options = parser.parse_args()
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
