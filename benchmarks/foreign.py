"""What `gemexport validate` says of the artefacts that other programs make of a checkpoint.

With --work, those that the peers of `benchmarks/peers.py` make of it there: llama.cpp's Q4_0, mlx-lm's 4 bit,
llm-compressor's W4A16. "Exact" counts weights of matrices that lie on the checkpoint's lattice and that the artefact
has codes for: its stored numbers, evaluated without rounding; and "as it runs" what the runtime makes of them, where it
rounds on the way, as MLX does to the dtype of the scales.

    python benchmarks/foreign.py MODEL [ARTIFACT …] [--work FOLDER] [--tokens 128] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from environments import PEERS
from peers import fitting, run_theirs
from rich.console import Console
from rich.table import Table

from gemexport.judge.diagnosis import diagnose
from gemexport.report.schema import ArtifactReport
from gemexport.shared.measured import TensorReport

COLUMNS = (
    "artefact",
    "grids",
    "exact",
    "as it runs",
    "what is wrong",
    "texts",
    "chat",
    "loss, KLD",
    "same top-1",
    "verdict",
)


def judged(model: Path, artifact: Path, tokens: int) -> ArtifactReport:
    """The validator's report on one artefact; RuntimeError with its last words where it gives none."""
    command = [sys.executable, "-m", "gemexport.cli", "validate", str(model), str(artifact), "--tokens", str(tokens)]
    done = subprocess.run([*command, "--json"], check=False, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{artifact}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return ArtifactReport.model_validate_json(done.stdout)


def quantized(report: ArtifactReport) -> list[TensorReport]:
    """Matrices with codes that lie on the checkpoint's lattice."""
    found = report.weights.tensors if report.weights else ()
    return [item for item in found if item.grid and item.source_grid and item.source_grid.lossless]


def row(artifact: Path, report: ArtifactReport) -> tuple[str, ...]:
    """One line of the table, in the order of COLUMNS."""
    matrices = quantized(report)
    compared = max(sum(item.compared for item in matrices), 1)
    as_run = sum(item.exact if item.exact_as_run is None else item.exact_as_run for item in matrices)
    wrong = diagnose(matrices)
    tokenizer, chat, logits = report.tokenizer, report.chat, report.logits
    loss = logits.loss if logits else None
    return (
        artifact.name,
        ", ".join(sorted({str(item.grid) for item in matrices})),
        f"{sum(item.exact for item in matrices) / compared:.2%}",
        f"{as_run / compared:.2%}",
        wrong[0] if wrong else "–",
        f"{tokenizer.equal} of {tokenizer.texts}" if tokenizer else "–",
        f"{chat.equal} of {chat.conversations}" if chat else "–",
        f"{loss.kld_mean:.4f}" if loss else "–",
        f"{loss.top1_agreement:.1%}" if loss else "–",
        report.status,
    )


def of_peers(model: Path, work: Path) -> Iterator[Path]:
    """What each peer makes of the checkpoint, in environments under `work` that are made where there are none."""
    fitted = fitting(model.resolve(), work)
    for peer in PEERS:
        peer.install(work)
        output = work / "foreign" / model.resolve().name / peer.name
        shutil.rmtree(output, ignore_errors=True)
        run_theirs(peer, fitted, output, work)
        yield output / peer.output


def main() -> int:
    """Judge, print the table, write the reports."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("artifacts", type=Path, nargs="*")
    parser.add_argument("--work", type=Path, help="let the peers convert it, in this folder of benchmarks/peers.py")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--json", type=Path, help="write the reports here")
    options = parser.parse_args()
    artifacts = [*options.artifacts, *(of_peers(options.model, options.work.resolve()) if options.work else ())]
    table = Table(*COLUMNS)
    reports: dict[str, Any] = {}
    for artifact in artifacts:
        report = judged(options.model, artifact, options.tokens)
        reports[str(artifact)] = json.loads(report.to_json())
        table.add_row(*row(artifact, report))
    Console(width=200).print(table)
    if options.json:
        options.json.write_text(json.dumps(reports, indent=2) + "\n", "utf-8")
    return 0 if artifacts else 2


if __name__ == "__main__":
    sys.exit(main())
