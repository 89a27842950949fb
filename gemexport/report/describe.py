"""What a checkpoint or an artefact looks like in words: `inspect`, and the verdict on one artefact."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gemexport.formats.checkpoint import Adapters, is_gguf, open_checkpoint
from gemexport.formats.grids.lattice import likely_block
from gemexport.formats.storage.errors import InputError, shown
from gemexport.formats.storage.reading import JSON_BYTES, read_text
from gemexport.formats.storage.safetensors import read_file, read_metadata
from gemexport.formats.tensor import Grid, Tensor
from gemexport.registry import TARGETS, Target, artifacts, recognise
from gemexport.report.render import LOSS_STYLES, choice, number, quantity, share, size, style_of, vector_loss
from gemexport.report.schema import ArtifactReport
from gemexport.shared.measured import LossReport, NpuReport


def inspect_path(path: Path, as_json: bool, adapter: Adapters = None) -> None:
    """Print what a checkpoint (and an adapter merged into it), an artefact or a folder of artefacts holds."""
    if not adapter and (found := artifacts(path)):
        _print_facts([_artifact_facts(file, target) for file, target in found], as_json)
        return
    if adapter:
        facts = _checkpoint_facts(path, adapter)
    elif is_gguf(path):
        facts = _gguf_facts(path)
    elif path.suffix == ".onnx" and path.is_file():
        facts = _graph_facts(path)
    elif path.suffix == ".safetensors" and path.is_file():
        facts = _weights_facts(path)
    else:
        facts = _checkpoint_facts(path) if _is_checkpoint(path) or not path.exists() else _known_facts(path)
    _print_facts(facts, as_json)


def _known_facts(path: Path) -> dict[str, Any]:
    try:
        target = recognise(path)
    except InputError as error:
        raise InputError(path, error.problem, f"{error.remedy}, or the folder of a checkpoint") from error
    return _artifact_facts(path, target)


def _graph_facts(path: Path) -> dict[str, Any]:
    """An .onnx file with the data that lie outside it; of one graph of several, what they are together."""
    target, folder = TARGETS["onnx"], path.parent
    _check_readable(path, target)
    reader = target.reader()
    beside = [file for file in reader.graph_files(folder) if file != path] if path.name in reader.GRAPHS else []
    if beside:
        facts = _artifact_facts(folder, target)
        grids = facts.pop("grids")
        others = " and ".join(file.name for file in beside)
        return {**facts, "graphs": f"{path.name}, one model with {others}", "grids": grids}
    facts, lying = _artifact_facts(path, target), (path, *reader.data_files(path))
    return {**facts, "bytes": size(sum(file.stat().st_size for file in lying))}


def _check_readable(path: Path, target: Target) -> None:
    """InputError where what reads a format is not installed; what runs it is not needed."""
    if missing := [package for package in target.missing() if package != target.runtime]:
        raise InputError(path, f"is {target.title}, which needs {', '.join(missing)}", target.install_hint())


def _weights_facts(path: Path) -> dict[str, Any]:
    """One file of weights by itself: its tensors by dtype, and what it says of itself."""
    stored = {name: array.entry for name, array in read_file(path).items()}
    count: Counter[str] = Counter(entry.dtype for entry in stored.values())
    weights: Counter[str] = Counter()
    for entry in stored.values():
        weights[entry.dtype] += math.prod(entry.shape)
    said = ", ".join(f"{key}: {value}" for key, value in read_metadata(path).items())
    return {
        "weights": path.name,
        "format": "safetensors",
        "numbers": quantity(weights.total()),
        "bytes": size(path.stat().st_size),
        **({"metadata": said} if said else {}),
        "grids": [{"grid": dtype, "tensors": count[dtype], "weights": total} for dtype, total in weights.most_common()],
    }


def _print_facts(facts: dict[str, Any] | list[dict[str, Any]], as_json: bool) -> None:
    """Print the facts of one thing, or of several, below each other."""
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    for i, one in enumerate(facts if isinstance(facts, list) else [facts]):
        if i:
            print()
        _print_one(one)


def _print_one(facts: dict[str, Any]) -> None:
    console = Console(highlight=False)
    for key, value in facts.items():
        if key != "grids":
            console.print(f"[bold]{key:<14}[/bold]{_plain(str(value))}", soft_wrap=True)
    table = Table("grid", "tensors", "weights", box=None, pad_edge=False, header_style="bold")
    for row in facts["grids"]:
        table.add_row(_plain(row["grid"]), str(row["tensors"]), quantity(row["weights"]))
    console.print()
    console.print(table)


def _plain(text: str) -> str:
    """Text with nothing in it that rich or the terminal would act on."""
    return escape(shown(text))


def _gguf_facts(path: Path) -> dict[str, Any]:
    """A GGUF file is a checkpoint where it has all of a model; else an artefact, and the facts say why not more."""
    try:
        facts = _checkpoint_facts(path)
    except InputError as error:
        return {**_artifact_facts(path), "as a model": f"no: {error.problem}"}
    return {"model": facts.pop("model"), "format": TARGETS["gguf"].title, **facts}


def _is_checkpoint(path: Path) -> bool:
    """Whether this is what `all` takes: a folder of plain weights."""
    config = path / "config.json"
    if not config.is_file():
        return False
    text = read_text(config, JSON_BYTES)
    return '"quantization' not in text and not any(path.glob("*.onnx"))


def _checkpoint_facts(path: Path, adapter: Adapters = None) -> dict[str, Any]:
    """A checkpoint's decoder and, from a sample of rows of each tensor, the grids its weights seem to lie on."""
    checkpoint = open_checkpoint(path, adapter=adapter)
    decoder = checkpoint.architecture
    sliding = sum(layer.sliding for layer in decoder.layers)
    shared = sum(not layer.owns_cache for layer in decoder.layers)
    heads = sorted({layer.head_dim for layer in decoder.layers})
    grids = {}
    for name, tensor in checkpoint.tensors.items():
        block = likely_block(tensor) if len(tensor.shape) >= 2 and tensor.grid is None else None
        width = tensor.shape[-1] if tensor.shape else 1
        grids[name] = f"int4, {_block(block, width)} (sampled)" if block else _stored(tensor)
    return {
        "model": checkpoint.name,
        "architecture": checkpoint.model.family.name,
        "parameters": quantity(decoder.parameters()),
        "bytes": size(checkpoint.nbytes()),
        "layers": f"{len(decoder.layers)} ({sliding} sliding, {shared} share keys and values)",
        "hidden size": decoder.hidden_size,
        "head sizes": ", ".join(map(str, heads)),
        "vocabulary": decoder.vocab_size,
        "left out": f"{len(checkpoint.left_out)} tensors that the text decoder does not have",
        **({"notes": "; ".join(checkpoint.notes)} if checkpoint.notes else {}),
        "grids": _summary(checkpoint.tensors, grids),
    }


def _artifact_facts(path: Path, target: Target | None = None) -> dict[str, Any]:
    """An artefact's tensors and the grids that they are stored on."""
    target = target or recognise(path)
    _check_readable(path, target)
    tensors = target.reader().tensors(path)
    grids = {name: _stored(tensor) for name, tensor in tensors.items()}
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {
        "artefact": path.name,
        "format": target.title,
        "parameters": quantity(sum(math.prod(tensor.shape) for tensor in tensors.values())),
        "bytes": size(sum(file.stat().st_size for file in files)),
        "grids": _summary(tensors, grids),
    }


def _stored(tensor: Tensor) -> str:
    grid: Grid | None = tensor.grid
    if grid is None:
        return tensor.dtype
    if grid.codec is not None:
        return f"{grid.codec}, {tensor.shape[-1] // grid.block} scales a row"
    codes = f"{grid.bits}-bit codebook" if grid.kind == "codebook" else f"int{grid.bits}"
    shifted = {"affine": " and biases", "zero-point": " and zero points"}.get(grid.kind, "")
    return f"{codes}, {_block(grid.block, tensor.shape[-1])}, {grid.scale_dtype} scales{shifted}"


def _block(block: int, width: int) -> str:
    return "one scale a row" if block == width else f"blocks of {block}"


def _summary(tensors: Mapping[str, Tensor], grids: Mapping[str, str]) -> list[dict[str, Any]]:
    """Tensors and weights by grid, the most weights first."""
    count: Counter[str] = Counter(grids.values())
    weights: Counter[str] = Counter()
    for name, grid in grids.items():
        weights[grid] += math.prod(tensors[name].shape)
    return [{"grid": grid, "tensors": count[grid], "weights": total} for grid, total in weights.most_common()]


def print_verdict(report: ArtifactReport) -> None:
    """Print the judgement on one artefact: what was measured, and the bounds that it was held to."""
    console = Console(highlight=False)
    style = f"bold {style_of(report)}"
    console.print(f"[{style}]{report.status}[/]  {report.format} {_plain(str(report.path))}", soft_wrap=True)
    if report.reason:
        console.print(_plain(report.reason), style=style, soft_wrap=True)
    if report.stand_in:
        console.print(report.stand_in, style="yellow", soft_wrap=True)
    if report.weights:
        exact = share(report.weights.exact_fraction)
        console.print(f"weights     {exact} of {quantity(report.weights.compared)} exact")
    if report.tokenizer:
        console.print(f"tokenizer   {report.tokenizer.equal} of {report.tokenizer.texts} texts equal")
    if report.chat:
        engine = f"in {report.chat.engine}"
        console.print(f"chat        {report.chat.equal} of {report.chat.conversations} conversations equal {engine}")
    for logits in (report.logits, *report.more_logits):
        for question, figures in (("conversion", logits.conversion), ("loss", logits.loss)) if logits else ():
            if figures and logits:
                console.print(
                    f"{question:<12}KLD {number(figures.kld_mean)} nats (max {number(figures.kld_max)}), "
                    f"same top-1 {share(figures.top1_agreement)}, over {logits.tokens} tokens in {logits.runtime}, "
                    f"{logits.arithmetic}",
                    soft_wrap=True,
                )
    for run in report.vectors:
        for question, found in (("conversion", run.conversion), ("loss", run.loss)):
            console.print(
                f"{question:<12}1 - cosine {number(found.distance_mean)} (max {number(found.distance_max)}), "
                f"relative error {number(found.error_mean)}, over {found.texts} texts in {run.runtime}, "
                f"{run.arithmetic}",
                soft_wrap=True,
            )
    if report.vector_loss:
        style, told = LOSS_STYLES[report.vector_loss.word], vector_loss(report.vector_loss)
        console.print(f"the loss is [{style}]{report.vector_loss.word}[/]: {_plain(told)}", soft_wrap=True)
    if report.loss:
        _print_loss(report.loss, console)
    if report.npu:
        _print_npu(report.npu, console)
    for note in report.notes:
        console.print(f"  {_plain(note)}", soft_wrap=True)
    for bound in report.bounds:
        mark, style = ("held", "") if bound.held else ("BROKEN", "red")
        console.print(f"  {mark:<7} {_plain(str(bound))}", soft_wrap=True, style=style)


def _print_loss(loss: LossReport, console: Console) -> None:
    """Print what the loss is called, and its figures by kind of text."""
    style = LOSS_STYLES[loss.word]
    console.print(f"the loss is [{style}]{loss.word}[/], in {_plain(loss.runtime)}, {loss.arithmetic}", soft_wrap=True)
    if (moved := choice(loss)) is not None:
        console.print(f"  {moved}", soft_wrap=True)
    for part in loss.kinds:
        console.print(
            f"  {part.kind:<10}KLD {number(part.kld_mean)} nats (PyTorch's bf16: {number(part.noise)}), "
            f"{share(part.changed)} of {part.tokens} tokens changed: [{LOSS_STYLES[part.word]}]{part.word}[/]",
            soft_wrap=True,
        )


def _print_npu(npu: NpuReport, console: Console) -> None:
    """Print what the NPU's compiler and emulator said."""
    console.print(f"npu         HTP v{npu.architecture}, {npu.compiler}, {npu.seconds:.0f} s", soft_wrap=True)
    if npu.context:
        console.print(
            f"            {size(npu.context_bytes)} of context binaries in {_plain(npu.context)}", soft_wrap=True
        )
    for refusal in npu.refused:
        where = f"{refusal.graph} {refusal.node} ({refusal.operator})"
        console.print(f"  refused {_plain(f'{where}: {refusal.reason}')}", soft_wrap=True)
    for error in npu.errors:
        console.print(f"  {_plain(error)}", soft_wrap=True)
    for compared in npu.comparisons:
        figures = compared.divergence
        console.print(
            f"            {compared.of} against {compared.against}: KLD {number(figures.kld_mean)} nats "
            f"(max {number(figures.kld_max)}), same top-1 {share(figures.top1_agreement)}, largest difference of a "
            f"logit {compared.max_difference:.3g}, over {npu.tokens} tokens",
            soft_wrap=True,
        )
