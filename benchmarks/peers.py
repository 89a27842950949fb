"""gemexport and its peers on the same checkpoint, side by side: time, memory, exact weights, KL divergence.

Each peer gets an environment of its own under --work (llama.cpp is built there, which takes minutes, once). Ours and
theirs run in turn, round after round, so that a machine that slows down slows both; one round before them warms the
caches and is not counted. Ours includes the search for the lattice and the checksums. The quality of every artefact
is measured by the same validator, `gemexport validate`.

    python benchmarks/peers.py MODEL --work FOLDER [--peers llama.cpp,mlx-lm,llm-compressor] [--rounds 3]
                               [--tokens 1024] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from environments import PEERS, Peer
from machine import machine
from processes import Usage, measure
from rich.console import Console
from rich.table import Table

import gemexport
from gemexport.formats.checkpoint import open_checkpoint
from gemexport.registry import TARGETS

OURS = "gemexport"
MEASURES = {
    "seconds": "seconds",
    "processor_seconds": "processor seconds",
    "anonymous_bytes": "peak RssAnon, GB",
    "resident_bytes": "peak RSS, GB",
}


@dataclass
class Side:
    """One program's runs for one format, and what its artefact is worth."""

    program: str
    artifact: Path
    rounds: list[Usage] = field(default_factory=list)
    bytes: int = 0
    quality: dict[str, Any] = field(default_factory=dict)

    def median(self, name: str) -> float:
        """The median over the rounds of one of MEASURES."""
        return statistics.median(getattr(usage, name) for usage in self.rounds)


def fitting(model: Path, work: Path) -> Path:
    """The checkpoint as every peer can read it: without the tokens that its vocabulary has no embeddings for.

    llama.cpp's converter stops at a tokenizer that has them, as those of Gemma 3 do. Weights are linked.
    """
    checkpoint = open_checkpoint(model)
    size = checkpoint.architecture.vocab_size
    tokenizer = json.loads((model / "tokenizer.json").read_text("utf-8"))
    added = [token for token in tokenizer["added_tokens"] if token["id"] < size]
    if len(added) == len(tokenizer["added_tokens"]):
        return model
    folder = work / "checkpoint" / model.resolve().name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file in model.iterdir():
        (folder / file.name).symlink_to(file.resolve())
    names = {token["content"] for token in tokenizer["added_tokens"]} - {token["content"] for token in added}
    tokenizer["added_tokens"] = added
    config = json.loads((model / "tokenizer_config.json").read_text("utf-8"))
    decoder = config.get("added_tokens_decoder", {})
    config["added_tokens_decoder"] = {key: token for key, token in decoder.items() if int(key) < size}
    # The names of these tokens would bring them back.
    config.pop("extra_special_tokens", None)
    config = {key: value for key, value in config.items() if not (isinstance(value, str) and value in names)}
    for name, content in (("tokenizer.json", tokenizer), ("tokenizer_config.json", config)):
        (folder / name).unlink()
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), "utf-8")
    print(f"{len(names)} token(s) beyond the vocabulary left out of the tokenizer for all sides", file=sys.stderr)
    return folder


def run_ours(peer: Peer, model: Path, output: Path) -> Usage:
    """Our export into the peer's format, without its validator."""
    command = [sys.executable, "-m", "gemexport.cli", peer.format, str(model), "-o", str(output)]
    return measure([*command, "--no-validate", "--fresh", "--json"])


def run_theirs(peer: Peer, model: Path, output: Path, work: Path) -> Usage:
    """The peer's commands, one after the other."""
    output.mkdir(parents=True)
    usages = [measure(command) for command in peer.commands(work / peer.name, model, output)]
    return sum(usages[1:], start=usages[0])


def size(path: Path) -> int:
    """Bytes of a file or of a folder's files."""
    files: Iterable[Path] = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


def quality(model: Path, artifact: Path, tokens: int) -> dict[str, Any]:
    """Exact weights, and what the artefact loses against the checkpoint in float32, by our validator."""
    command = [sys.executable, "-m", "gemexport.cli", "validate", str(model), str(artifact)]
    done = subprocess.run([*command, "--tokens", str(tokens), "--json"], check=False, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    report = json.loads(done.stdout)
    matrices = [tensor for tensor in report["weights"]["tensors"] if len(tensor["shape"]) == 2]
    quantized = [tensor for tensor in matrices if tensor["grid"]]
    found: dict[str, Any] = {"exact": _exact(matrices), "exact_quantized": _exact(quantized)}
    if report["logits"]:
        found |= {key: report["logits"][key] for key in ("runtime", "tokens", "loss", "noise_floor")}
    return found


def _exact(tensors: list[dict[str, Any]]) -> float | None:
    compared = sum(tensor["compared"] for tensor in tensors)
    return sum(tensor["exact"] for tensor in tensors) / compared if compared else None


def compare(peer: Peer, model: Path, work: Path, rounds: int, tokens: int) -> list[Side]:
    """Ours and theirs for one format: a warm-up, `rounds` in turn, then the quality of what the last one left."""
    name = open_checkpoint(model).name
    target = TARGETS[peer.format]
    places = {side: work / "out" / peer.name / side for side in ("ours", "theirs")}
    ours = Side(OURS, target.path(places["ours"], name, target.variants[0]))
    theirs = Side(peer.name, places["theirs"] / peer.output)
    for number in range(rounds + 1):
        # Who goes first changes, so that neither always finds what the other left in memory.
        for side in (ours, theirs) if number % 2 else (theirs, ours):
            place = places["ours" if side is ours else "theirs"]
            shutil.rmtree(place, ignore_errors=True)
            run = run_ours(peer, model, place) if side is ours else run_theirs(peer, model, place, work)
            print(f"{peer.format}, round {number}: {side.program} {run.seconds:.1f} s", file=sys.stderr)
            if number:
                side.rounds.append(run)
    for side in (ours, theirs):
        side.bytes = size(side.artifact)
        if tokens:
            side.quality = quality(model, side.artifact, tokens)
    return [ours, theirs]


def table(results: dict[str, list[Side]], title: str) -> Table:
    """What was measured, each peer beside ours, and its ratio to ours."""
    made = Table(title=title, title_justify="left")
    for column in ("format", "", *results_columns(results)):
        made.add_column(column, justify="left" if column in ("format", "") else "right")
    for format_name, (ours, theirs) in results.items():
        rows = {side.program: _cells(side) for side in (ours, theirs)}
        for program, cells in rows.items():
            made.add_row(format_name if program == OURS else "", program, *cells)
        ratios = [f"{theirs.median(name) / ours.median(name):.2f} ×" for name in MEASURES]
        made.add_row("", "theirs / ours", *ratios, f"{theirs.bytes / ours.bytes:.2f} ×", end_section=True)
    return made


def results_columns(results: dict[str, list[Side]]) -> list[str]:
    """The table's columns after the names."""
    columns = [*MEASURES.values(), "size, MB"]
    if any(side.quality for sides in results.values() for side in sides):
        columns += ["exact weights", "of those quantized", "mean KLD", "same top-1", "noise floor"]
    return columns


def _cells(side: Side) -> list[str]:
    cells = [f"{side.median(name) / (1e9 if name.endswith('bytes') else 1):.2f}" for name in MEASURES] + [
        f"{side.bytes / 1e6:.0f}"
    ]
    if not side.quality:
        return cells
    if "error" in side.quality:
        return [*cells, side.quality["error"]]
    exact = [side.quality[key] for key in ("exact", "exact_quantized")]
    cells += ["" if share is None else f"{share:.2%}" for share in exact]
    loss, floor = side.quality.get("loss"), side.quality.get("noise_floor")
    cells += [f"{loss['kld_mean']:.2e}", f"{loss['top1_agreement']:.1%}"] if loss else ["", ""]
    return [*cells, f"{floor['kld_mean']:.2e}, {floor['top1_agreement']:.1%}" if floor else ""]


def main() -> int:
    """Parse the command line, run, print the table; returns the exit status."""
    parser = argparse.ArgumentParser(description="gemexport and its peers on the same checkpoint.")
    parser.add_argument("model", type=Path, help="a checkpoint in Hugging Face layout")
    parser.add_argument("--work", type=Path, required=True, help="folder for environments and outputs")
    parser.add_argument("--peers", default=",".join(peer.name for peer in PEERS), help="some of these")
    parser.add_argument("--rounds", type=int, default=3, help="rounds that count")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens for the KL divergence; 0 for none")
    parser.add_argument("--json", type=Path, help="write the numbers there too")
    options = parser.parse_args()
    work = options.work.resolve()
    asked = options.peers.split(",")
    chosen = [peer for peer in PEERS if peer.name in asked]
    if len(chosen) < len(asked):
        parser.error(f"--peers takes some of {', '.join(peer.name for peer in PEERS)}")
    for peer in chosen:
        peer.install(work)
    model = fitting(options.model.resolve(), work)
    results = {peer.format: compare(peer, model, work, options.rounds, options.tokens) for peer in chosen}
    Console(width=210).print(table(results, f"{options.model.resolve().name}, median of {options.rounds} rounds"))
    if options.json:
        content = {
            "machine": machine(),
            "versions": {OURS: gemexport.__version__} | {peer.name: peer.versions(work) for peer in chosen},
            "model": options.model.resolve().name,
            "results": {name: [asdict(side) for side in sides] for name, sides in results.items()},
        }
        options.json.write_text(json.dumps(content, indent=2, default=str) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
