"""Calls gemexport from Python: a whole run with its report, one artefact judged again, and one exporter by itself.

    python examples/python_api.py [MODEL] [--out FOLDER]

Without MODEL it makes the demo model. It writes GGUF, so it needs the `llama` and `reference` extras.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import gemexport
from gemexport import demo
from gemexport.exporters import gguf
from gemexport.formats.checkpoint import open_checkpoint
from gemexport.formats.grids.recipe import RECIPES
from gemexport.formats.grids.search import attach, find_grids


def whole_run(model: Path, out: Path) -> Path:
    """Export with validation; prints what the report says and returns the artefact's path."""
    report = gemexport.export(model, out, formats=["gguf"], tokens=256)
    for artifact in report.artifacts:
        print(f"{artifact.format} {artifact.variant}: {artifact.status}, {artifact.bytes} bytes")
        if artifact.weights:
            print(f"  exact weights: {artifact.weights.exact_fraction:.4%}")
        if artifact.logits and artifact.logits.loss:
            loss = artifact.logits.loss
            print(f"  in {artifact.logits.runtime}:")
            print(f"  mean KLD {loss.kld_mean:.2g} nats, same top-1 {loss.top1_agreement:.1%}")
        if artifact.run:
            print(f"  {artifact.run}")
    first = report.artifacts[0]
    if first.path is None:
        raise gemexport.InputError(model, f"was not exported ({first.reason})", "see the reason")
    return out / first.path


def one_exporter(model: Path, out: Path) -> Path:
    """The same steps by hand: open, find the grids, write one file, nothing validated."""
    checkpoint = open_checkpoint(model)
    grids = out / "grids"
    index = find_grids(checkpoint, grids, RECIPES["default"])
    print(f"{index.lattice_fraction():.0%} of the matrices lie on an integer grid")
    result = gguf.export(attach(checkpoint, grids), out / "by-hand.gguf", variant="Q8_0")
    for note in result.notes:
        print(f"  note: {note}")
    return result.path


def main() -> int:
    """Parse the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Call gemexport from Python.")
    parser.add_argument("model", type=Path, nargs="?", help="a checkpoint; without one the demo model is made")
    parser.add_argument("--out", type=Path, default=Path("python-api-out"))
    options = parser.parse_args()
    try:
        model = options.model or demo.make(options.out / "model")
        artifact = whole_run(model, options.out / "run")
        judged = gemexport.validate(model, artifact, tokens=256)
        print(f"judged again: {judged.status}")
        print(f"by hand: {one_exporter(model, options.out)}")
    except gemexport.InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0 if judged.status == "pass" else 1


if __name__ == "__main__":
    sys.exit(main())
