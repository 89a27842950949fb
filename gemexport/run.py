"""A run: the DAG read -> grids -> export and reference -> validate -> report, and the report out of its outcomes."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gemexport.calibration import OWN, ranges_file
from gemexport.compress import FOLDER, Compression, compression
from gemexport.exporters.result import Export
from gemexport.formats.checkpoint import Checkpoint, checkpoint_name, open_checkpoint
from gemexport.formats.errors import InputError
from gemexport.formats.grids import GridIndex
from gemexport.formats.recipe import Recipe, load_recipe
from gemexport.formats.vector_codec import Codec, check, parse_all
from gemexport.nodes import Validation, Workplace
from gemexport.notes import compression_note, left_notes
from gemexport.npu import npu_bounds
from gemexport.registry import TARGETS, Target
from gemexport.render import write_reports
from gemexport.report import (
    ArtifactReport,
    Divergence,
    ExportStats,
    GridReport,
    LatticeReport,
    LatticeTensor,
    ModelReport,
    NpuReport,
    Report,
    ValidationReport,
    artifact_sha256,
    describe_files,
    package_versions,
    verdict,
)
from gemexport.scheduler import Events, Node, Scheduler, available_memory, succeeded
from gemexport.speed import machine
from gemexport.verdict import bounds
from gemexport.wording import notes
from gemexport.worker import Call, Outcome
from gemexport.workspace import claim

DEFAULT_TOKENS = 512
# Anonymous memory of an interpreter with the libraries of a step, measured on Linux, rounded up.
EXPORT_BYTES = 600 << 20
RUNTIME_BYTES = 900 << 20


@dataclass(frozen=True)
class Request:
    """What a run was asked for."""

    model: Path
    out: Path
    variants: dict[str, tuple[str, ...]]  # by format
    recipe: Recipe
    jobs: int
    memory: int
    tokens: int = DEFAULT_TOKENS
    validate: bool = True
    fresh: bool = False
    options: dict[str, dict[str, Any]] = field(default_factory=dict)  # of exporters, by format
    ple_codecs: tuple[Codec | None, ...] = (None,)  # for the per-layer embeddings, an artefact each
    asked_for: frozenset[str] = frozenset()  # formats named by the user: one that is not installed is an error
    adapter: Path | None = None  # the folder of a LoRA that is merged into the model
    compression: Compression | None = None
    calibration: Path | None = None  # a text file to measure activations on; None: the built-in prompts

    def place(self, work: Path, name: str) -> Workplace:
        """Where the steps of a run of the model `name` find each other's results."""
        compressed = work / FOLDER / name if self.compression else None
        return Workplace(self.model, work, self.tokens, self.adapter, compressed)

    def checkpoint(self) -> Checkpoint:
        """The model, with its adapter merged in."""
        return open_checkpoint(self.model, adapter=self.adapter)


def request(
    model: str | Path,
    out: str | Path | None = None,
    formats: list[str] | None = None,
    skip: list[str] | None = None,
    variants: dict[str, tuple[str, ...]] | None = None,
    recipe: str | Recipe = "default",
    jobs: int | None = None,
    memory: int | None = None,
    adapter: str | Path | None = None,
    compress: str | None = None,
    compress_python: str | Path | None = None,
    calibration: str | Path | None = None,
    ple_codec: str | None = None,
    **settings: Any,
) -> Request:
    """A request with what was not said filled in; InputError for what cannot be done."""
    path = Path(model)
    chosen = {name: TARGETS[name].variants for name in formats or TARGETS if name not in (skip or [])}
    for name, asked in (variants or {}).items():
        unknown = [variant for variant in asked if variant not in TARGETS[name].known_variants]
        if unknown:
            known = ", ".join(TARGETS[name].known_variants)
            raise InputError(name, f"there is no variant {unknown[0]}", f"use some of {known}")
        chosen[name] = asked
    merged = None if adapter is None else Path(adapter)
    names = [checkpoint_name(path), *([] if merged is None else [merged.resolve().name])]
    return Request(
        model=path,
        out=Path(out) if out else Path(f"{'-'.join(names)}-gemexport"),
        variants=chosen,
        recipe=recipe if isinstance(recipe, Recipe) else load_recipe(recipe),
        jobs=jobs or os.cpu_count() or 1,
        memory=memory or int(available_memory() * 0.8),
        ple_codecs=(None,) if ple_codec is None else parse_all(ple_codec),
        asked_for=frozenset(formats or ()),
        adapter=merged,
        compression=compression(compress, compress_python, calibration),
        calibration=None if calibration is None else Path(calibration),
        **settings,
    )


@dataclass(frozen=True)
class Step:
    """One artefact of a request."""

    target: Target
    variant: str
    path: Path
    codec: Codec | None = None  # of its per-layer embeddings

    @property
    def label(self) -> str:
        """What it is called in the report: the variant, and its codec."""
        return labelled(self.variant, self.codec)

    @property
    def key(self) -> str:
        """Its name in the DAG."""
        return f"{self.target.name}:{self.label}"


def labelled(variant: str, codec: Codec | None) -> str:
    """A variant with its codec: `int4-aqlm-2x8`."""
    return variant if codec is None else f"{variant}-{codec.label}"


def steps(asked: Request, checkpoint: Checkpoint) -> list[Step]:
    """The artefacts of a request, in the registry's order."""
    return [
        Step(target, variant, target.path(asked.out, checkpoint.name, labelled(variant, codec)), codec)
        for target, variants in ((TARGETS[name], variants) for name, variants in asked.variants.items())
        for variant in variants
        for codec in (asked.ple_codecs if variant in target.codec_variants else (None,))
    ]


def graph(asked: Request, checkpoint: Checkpoint, work: Path, wanted: list[Step]) -> list[Node]:
    """The DAG of a request."""
    place = asked.place(work, checkpoint.name)
    weights, recipe, nodes = checkpoint.architecture.parameters(), asked.recipe, []
    before: tuple[str, ...] = ()
    if asked.compression is not None:
        call = Call("gemexport.compress:compress", {"place": place, "asked": asked.compression, "recipe": recipe})
        nodes.append(Node("compress", call, (), logits_memory(checkpoint, asked.tokens), 1, all_cores=True))
        # The codes are ours, not those of a maker who left the rest as it is on purpose.
        before, recipe = ("compress",), recipe.model_copy(update={"requantize_mixed": True})
    call = Call("gemexport.nodes:grids", {"place": place, "recipe": recipe})
    nodes.append(Node("grids", call, before, EXPORT_BYTES, weights, light=True))
    for codec in dict.fromkeys(step.codec for step in wanted if step.codec is not None):
        call = Call("gemexport.nodes:fit_codec", {"place": replace(place, codec=codec)})
        coded = _per_layer_weights(checkpoint)
        nodes.append(Node(f"codec {codec}", call, ("grids",), EXPORT_BYTES, coded, all_cores=True))
    nodes += calibrations(asked, checkpoint, place, recipe, wanted)
    for step in wanted:
        options = asked.options.get(step.target.name, {})
        if measures(asked, step):
            options = {**options, "ranges": ranges_file(replace(place, codec=step.codec))}
        arguments = {
            "place": replace(place, codec=step.codec), "target": step.target.name, "variant": step.variant,
            "path": step.path, "options": options,
        }  # fmt: skip
        call = Call("gemexport.nodes:export", arguments)
        coded_by = () if step.codec is None else (f"codec {step.codec}",)
        needs = ("grids", *coded_by, *((calibration_name(step.codec),) if measures(asked, step) else ()))
        nodes.append(Node(f"export {step.key}", call, needs, EXPORT_BYTES, checkpoint.plain_nbytes(), light=True))
    if asked.validate and wanted:
        nodes += validators(asked, checkpoint, place, wanted)
    return nodes


def measures(asked: Request, step: Step) -> bool:
    """Whether an artefact waits for activations to be measured."""
    return step.variant in step.target.calibrated and not OWN & asked.options.get(step.target.name, {}).keys()


def calibration_name(codec: Codec | None) -> str:
    """The node that measures activations."""
    return "calibrate" if codec is None else f"calibrate {codec}"


def calibrations(
    asked: Request, checkpoint: Checkpoint, place: Workplace, recipe: Recipe, wanted: list[Step]
) -> list[Node]:
    """The nodes that measure activations: one for all variants that want it, with each codec."""
    nodes = []
    for codec in dict.fromkeys(step.codec for step in wanted if measures(asked, step)):
        options = asked.options.get("onnx", {})
        arguments = {
            "place": replace(place, codec=codec), "recipe": recipe, "text": asked.calibration,
            "sizes": {key: options[key] for key in ("context", "prefill") if key in options},
        }  # fmt: skip
        call = Call("gemexport.calibration:calibrate", arguments)
        needs = ("grids", *(() if codec is None else (f"codec {codec}",)))
        room = logits_memory(checkpoint, asked.tokens)
        nodes.append(Node(calibration_name(codec), call, needs, room, checkpoint.plain_nbytes()))
    return nodes


def _per_layer_weights(checkpoint: Checkpoint) -> int:
    layers = checkpoint.architecture.per_layer
    return 0 if layers is None else layers.vocab_size * layers.dim * len(checkpoint.architecture.layers)


def validators(asked: Request, checkpoint: Checkpoint, place: Workplace, wanted: list[Step]) -> list[Node]:
    """The reference and the validators: those of artefacts that lie there, or wait for their export."""
    weights, room = checkpoint.architecture.parameters(), logits_memory(checkpoint, asked.tokens)
    affordable = room <= asked.memory
    # Blocks of a GGUF file go back as they are, so any variant may be computed as K-quants are.
    own = bool(checkpoint.files)
    noises = {noise for step in wanted for noise in step.target.noises_of("" if own else step.variant)}
    if checkpoint.activations:
        # A last bit that differs moves some activations to the next integer: so far apart are two right programs.
        noises.add("f32-reordered")
    nodes = []
    if affordable:
        call = Call("gemexport.nodes:reference", {"place": place, "noises": tuple(sorted(noises))})
        nodes.append(Node("reference", call, (), room, asked.tokens * (1 + len(noises)), all_cores=True))
    for step in wanted:
        needs = (f"export {step.key}", *(("reference",) if affordable else ()))
        call = Call(
            "gemexport.nodes:validate",
            {"place": place, "target": step.target.name, "path": step.path, "run_logits": affordable},
        )
        total = weights * (1 + len(step.target.arithmetics))
        memory = room if affordable else EXPORT_BYTES
        nodes.append(Node(f"validate {step.key}", call, needs, memory, total))
    return nodes


def logits_memory(checkpoint: Checkpoint, tokens: int) -> int:
    """Anonymous bytes that a logits validator takes: a model in f32, logits of a sequence on both sides, libraries."""
    from gemexport.validators.prompts import sequence_length

    decoder = checkpoint.architecture
    return decoder.parameters() * 4 + 2 * sequence_length(decoder, tokens) * decoder.vocab_size * 4 + RUNTIME_BYTES


def run(asked: Request, events: Events | None = None) -> Report:
    """Run a request: write its artefacts, the reports and `SHA256SUMS`.

    Raises InputError when the request or the checkpoint is at fault; what was created until then is removed again.
    """
    started = time.monotonic()
    checkpoint = asked.checkpoint()
    for codec in filter(None, asked.ple_codecs):
        check(codec, checkpoint.architecture.per_layer, checkpoint.path)
    wanted, unavailable = _available(asked, steps(asked, checkpoint))
    with _undone_on_error(asked.out):
        work = claim(asked.out, checkpoint, asked.fresh)
        scheduler = Scheduler(asked.jobs, asked.memory, work / "logs", events or Events())
        outcomes = scheduler.run(graph(asked, checkpoint, work, wanted))
        for name in ("compress", "grids"):
            first = outcomes.get(name, Outcome())
            if first.error:
                raise first.error
            if not succeeded(first):
                raise RuntimeError(f"the step {name} failed: {first.failure}; see {work / 'logs'}")
        source, notes = checkpoint, []
        if asked.compression is not None:
            checkpoint = asked.place(work, source.name).checkpoint()
            notes.append(compression_note(asked.compression, asked.recipe, outcomes["compress"]))
        artifacts = [_artifact(asked, step, outcomes) for step in wanted] + unavailable
        errors = [outcome.error for outcome in outcomes.values() if outcome.error]
        if errors and not any(artifact.status in ("pass", "fail") for artifact in artifacts):
            raise errors[0]
    for scratch in ("reference", "logits"):
        shutil.rmtree(work / scratch, ignore_errors=True)
    report = Report(
        model=_model(asked, source, checkpoint, outcomes["grids"], notes),
        recipe=asked.recipe.name,
        versions=package_versions(),
        artifacts=tuple(artifacts),
        machine=machine(),
        jobs=asked.jobs,
        reference_seconds=outcomes["reference"].seconds if "reference" in outcomes else None,
        seconds=time.monotonic() - started,
        peak_rss_bytes=max((outcome.peak_bytes or 0 for outcome in outcomes.values()), default=0),
    )
    write_reports(report, asked.out)
    return report


def validate(
    model: Path,
    artifact: Path,
    target: Target,
    asked: Request,
    events: Events | None = None,
    *,
    qnn_context: Path | None = None,
    qnn_arch: str | None = None,
) -> ArtifactReport:
    """Judge one artefact, whoever made it; with `qnn_context` also by the NPU's compiler, which writes there."""
    checkpoint = asked.checkpoint()
    artifact = artifact.absolute()
    asked = replace(asked, out=artifact.parent)
    with tempfile.TemporaryDirectory(prefix="gemexport-") as folder:
        work = Path(folder)
        place = asked.place(work, checkpoint.name)
        step = Step(target, artifact.stem, artifact)
        nodes = graph(asked, checkpoint, work, []) + [
            Node(node.name, node.call, tuple("grids" if need.startswith("export") else need for need in node.needs),
                 node.memory, node.total)
            for node in validators(asked, checkpoint, place, [step])
        ]  # fmt: skip
        if qnn_context is not None:
            arguments = {"place": place, "path": artifact, "context": qnn_context.absolute(), "architecture": qnn_arch}
            call = Call("gemexport.npu:compile_npu", arguments)
            nodes.append(Node("npu", call, ("grids",), logits_memory(checkpoint, asked.tokens), asked.tokens))
        outcomes = Scheduler(asked.jobs, asked.memory, work / "logs", events or Events()).run(nodes)
    for outcome in outcomes.values():
        if outcome.error:
            raise outcome.error
    return _artifact(asked, step, outcomes)


@contextmanager
def _undone_on_error(out: Path) -> Iterator[None]:
    """Remove the output folder again when the block fails, if it was made in it."""
    existed = out.exists()
    first_made = next((parent for parent in [*reversed(out.parents), out] if not parent.exists()), None)
    try:
        yield
    except BaseException:
        if not existed and first_made is not None:
            shutil.rmtree(first_made, ignore_errors=True)
        raise


def _available(asked: Request, wanted: list[Step]) -> tuple[list[Step], list[ArtifactReport]]:
    """The steps whose packages are installed, and reports for the others; InputError for one that was asked for."""
    possible, left_out = [], []
    for step in wanted:
        missing = step.target.missing()
        if not missing:
            possible.append(step)
            continue
        problem = f"needs {', '.join(missing)}, which is not installed"
        if step.target.name in asked.asked_for:
            raise InputError(step.target.name, problem, step.target.install_hint())
        left_out.append(
            ArtifactReport(format=step.target.name, variant=step.label, status="skipped",
                           reason=f"{problem}; {step.target.install_hint()}")
        )  # fmt: skip
    return possible, left_out


def _artifact(asked: Request, step: Step, outcomes: dict[str, Outcome]) -> ArtifactReport:
    """The report of one artefact out of its nodes' outcomes."""
    exported = outcomes.get(f"export {step.key}", Outcome())
    judged, compiled = outcomes.get(f"validate {step.key}", Outcome()), outcomes.get("npu", Outcome())
    floors: dict[str, Divergence] = outcomes.get("reference", Outcome()).value or {}
    base: dict[str, Any] = {"format": step.target.name, "variant": step.label}
    failed = next((item for item in (exported, judged, compiled) if not succeeded(item)), None)
    if step.path.exists() and succeeded(exported):
        files = describe_files(asked.out, step.path)
        base |= {
            "path": step.path.relative_to(asked.out).as_posix(),
            "bytes": sum(file.bytes for file in files),
            "sha256": artifact_sha256(files),
            "files": files,
        }
    if isinstance(exported.value, Export):
        base |= {
            "run": exported.value.run,
            "notes": (*exported.value.notes, *_codec_notes(asked, step)),
            "export": ExportStats(seconds=exported.seconds, peak_rss_bytes=exported.peak_bytes),
        }
    seconds = exported.seconds + judged.seconds
    if failed is not None:
        reason = str(failed.error) if failed.error else failed.failure
        return ArtifactReport(**base, status="error", reason=reason, seconds=seconds)
    if not isinstance(judged.value, Validation):
        return ArtifactReport(**base, status="skipped", reason="not validated (--no-validate)", seconds=seconds)
    found = judged.value
    npu: NpuReport | None = compiled.value
    held = bounds(found, floors, asked.recipe, step.target.holds(step.variant), step.target.plain(step.variant)) + (
        npu_bounds(npu) if npu else ()
    )
    status, reason = verdict(held)
    if found.logits is None and status == "pass":
        reason = "logits were not compared: the model does not fit into --memory"
    measured = {"noise_floor": floors.get("bf16"), "seconds": judged.seconds}
    logits = found.logits.model_copy(update=measured) if found.logits else None
    base["notes"] = (*base.get("notes", ()), *notes(found.tokenizer, found.chat))
    return ArtifactReport(
        **base,
        status=status,
        reason=reason,
        weights=found.weights,
        facts=found.facts,
        tokenizer=found.tokenizer,
        chat=found.chat,
        logits=logits,
        more_logits=found.more_logits,
        departs=found.departs,
        npu=npu,
        bounds=held,
        validation=_validation(found, judged.seconds),
        seconds=seconds,
    )


def _codec_notes(asked: Request, step: Step) -> list[str]:
    """That a codec was asked for which the artefact has no place for."""
    codecs = ", ".join(str(codec) for codec in asked.ple_codecs if codec is not None)
    if not codecs or step.variant in step.target.codec_variants:
        return []
    what = f"the variant {step.variant}" if step.target.codec_variants else step.target.title
    return [f"{what} has nothing that holds a vector codec ({codecs}): the per-layer embeddings are as without it"]


def _validation(found: Validation, seconds: float) -> ValidationReport:
    """How long the validation took, and the runtimes in it."""
    runs = [logits.speed for logits in (found.logits, *found.more_logits) if logits and logits.speed]
    return ValidationReport(seconds=seconds, runtime_seconds=sum(run.seconds for run in runs), steps=found.steps)


def _model(asked: Request, source: Checkpoint, checkpoint: Checkpoint, found: Outcome, notes: list[str]) -> ModelReport:
    """The report of the model `source`, and of the grids of what was made of it."""
    decoder = checkpoint.architecture
    return ModelReport(
        name=source.name,
        architecture=decoder.family,
        parameters=decoder.parameters(),
        bytes=source.nbytes(),
        source=str(asked.model),
        left_out=source.left_out,
        compression=None if asked.compression is None else asked.compression.method,
        adapter=None if asked.adapter is None else str(asked.adapter),
        notes=(*source.notes, *notes, *(left_notes(found.value) if isinstance(found.value, GridIndex) else ())),
        lattice=lattice_report(checkpoint, found.value, found.seconds) if isinstance(found.value, GridIndex) else None,
    )


def lattice_report(checkpoint: Checkpoint, index: GridIndex, seconds: float) -> LatticeReport:
    """What the lattice search found, as the report tells it."""
    tensors, weights, on_grid = [], 0, 0.0
    for record in index.tensors:
        tensor = checkpoint.tensors[record.name]
        count = tensor.shape[0] * tensor.shape[1]
        weights, on_grid = weights + count, on_grid + count * record.lattice_fraction
        grid = GridReport.of(tensor.grid)
        if grid is None and record.bits and record.block and record.scale_dtype:
            grid = GridReport(
                bits=record.bits, block=record.block, scale_dtype=record.scale_dtype, lossless=record.lossless
            )
        tensors.append(
            LatticeTensor(
                name=record.name,
                shape=tensor.shape,
                dtype=tensor.dtype,
                grid=grid,
                grid_fraction=record.lattice_fraction,
                left=record.left,
            )
        )
    return LatticeReport(weights=weights, on_grid=round(on_grid), seconds=seconds, tensors=tuple(tensors))
