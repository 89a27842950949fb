"""The report of a run out of what its steps returned."""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from gemexport.exporters.result import Export
from gemexport.formats.checkpoint import Checkpoint
from gemexport.formats.grids.search import GridIndex
from gemexport.judge.diagnosis import rounded_as_run
from gemexport.judge.loss import judged_loss
from gemexport.judge.npu import npu_bounds
from gemexport.judge.vectors import judged_vectors
from gemexport.judge.verdict import bounds
from gemexport.report.checksums import artifact_sha256, describe_files
from gemexport.report.notes import judging_notes, lattice_notes, wording_notes
from gemexport.report.schema import (
    ArtifactReport,
    ExportStats,
    LatticeReport,
    LatticeTensor,
    ModelReport,
    ValidationReport,
    verdict,
)
from gemexport.request import Request, Step
from gemexport.shared.measured import Divergence, GridReport, NpuReport, Validation
from gemexport.shared.node import Outcome, succeeded
from gemexport.shared.unfinished import Unfinished
from gemexport.shared.vectors import VectorDistance
from gemexport.shared.widths import reported_widths, width_note


def fingerprint(checkpoint: Checkpoint) -> str:
    """A digest that is another once the model's files are: what a report's rows were measured of."""
    return hashlib.sha256(checkpoint.facts().encode()).hexdigest()


def artifact_report(asked: Request, step: Step, outcomes: dict[str, Outcome], work: Path) -> ArtifactReport:
    """The report of one artefact out of its nodes' outcomes, and what is in the work folder of one that broke off."""
    exported = outcomes.get(step.export_node, Outcome())
    judged = with_unfinished(outcomes.get(step.validate_node, Outcome()), Unfinished.of(work, step.path))
    compiled = outcomes.get("npu", Outcome())
    reference = outcomes.get("reference", Outcome())
    floors: dict[str, Divergence | VectorDistance] = reference.value or {}
    base: dict[str, Any] = {"format": step.target.name, "variant": step.label}
    failed = next((item for item in (exported, judged, compiled) if not succeeded(item)), None)
    if step.path.exists() and succeeded(exported):
        files = describe_files(asked.out, step.path)
        base |= {
            "path": Path(os.path.relpath(step.path, asked.out)).as_posix(),
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
    if stored := _widths(exported.value, judged.value):
        base |= {"widths": stored, "notes": (*base.get("notes", ()), *width_note(step.variant, stored))}
    seconds = exported.seconds + judged.seconds
    if failed is not None:
        return ArtifactReport(**base, status="error", reason=failed.reason, seconds=seconds)
    if not isinstance(judged.value, Validation):
        return ArtifactReport(**base, status="written", reason="not validated (--no-validate)", seconds=seconds)
    found = judged.value
    npu: NpuReport | None = compiled.value
    held = bounds(found, floors, asked.budget, step.target.holds(step.variant), step.target.plain(step.variant)) + (
        npu_bounds(npu) if npu else ()
    )
    status, reason = verdict(held, found.unjudged)
    log = judged.log if succeeded(reference) else reference.log
    if crashed(judged) and log is not None:
        reason = f"{reason}; see {log}"
    of_vectors = {name: floor for name, floor in floors.items() if isinstance(floor, VectorDistance)}
    of_logits = {name: floor for name, floor in floors.items() if isinstance(floor, Divergence)}
    measured = {"noise_floor": of_logits.get("bf16"), "seconds": judged.seconds}
    logits = found.logits.model_copy(update=measured) if found.logits else None
    as_run = rounded_as_run(step.target.title, found.weights.tensors)
    base["notes"] = (
        *base.get("notes", ()), *as_run, *judging_notes(found.weights), *found.notes,
        *wording_notes(found.tokenizer, found.chat),
    )  # fmt: skip
    return ArtifactReport(
        **base,
        status=status,
        reason=reason,
        unjudged=found.unjudged,
        stand_in=step.target.stand_in if found.logits is not None or found.vectors else None,
        weights=found.weights,
        facts=found.facts,
        tokenizer=found.tokenizer,
        chat=found.chat,
        loss=judged_loss(found, of_logits),
        vectors=tuple(run.model_copy(update={"noise_floor": of_vectors.get("bf16")}) for run in found.vectors),
        vector_loss=judged_vectors(found, of_vectors),
        logits=logits,
        more_logits=found.more_logits,
        departs=found.departs,
        npu=npu,
        bounds=held,
        validation=_validation(found, judged.seconds),
        seconds=seconds,
    )


def _widths(exported: Any, judged: Any) -> dict[str, int]:
    """Weights of an artefact by what they are stored in, as its export or its validator read them back."""
    if isinstance(exported, Export):
        return dict(exported.widths)
    return reported_widths(judged.weights.tensors) if isinstance(judged, Validation) else {}


def with_unfinished(judged: Outcome, unfinished: Unfinished) -> Outcome:
    """The outcome of a validator whose process ended, with what it had found until then as its value."""
    if judged.failure is None or judged.left_out:
        return judged
    found = unfinished.ended(judged.failure)
    return judged if found is None else replace(judged, value=found, failure=None)


def crashed(judged: Outcome) -> bool:
    """Whether a part of a validation crashed, so that its log has something to say."""
    return isinstance(judged.value, Validation) and any(item.because == "crashed" for item in judged.value.unjudged)


def _codec_notes(asked: Request, step: Step) -> list[str]:
    """That a codec was asked for which the artefact has no place for."""
    codecs = ", ".join(str(codec) for codec in asked.ple_codec if codec is not None)
    if not codecs or step.variant in step.target.codec_variants:
        return []
    what = f"the variant {step.variant}" if step.target.codec_variants else step.target.title
    return [f"{what} has nothing that holds a vector codec ({codecs}): the per-layer embeddings are as without it"]


def _validation(found: Validation, seconds: float) -> ValidationReport:
    """How long the validation took, and the runtimes in it."""
    runs = [run.speed for run in (found.logits, *found.more_logits, *found.vectors) if run and run.speed]
    return ValidationReport(seconds=seconds, runtime_seconds=sum(run.seconds for run in runs), steps=found.steps)


def model_report(
    asked: Request, source: Checkpoint, checkpoint: Checkpoint, found: Outcome, further: list[str]
) -> ModelReport:
    """The report of the model `source`, and of the grids of what was made of it."""
    decoder, index = checkpoint.architecture, found.value if isinstance(found.value, GridIndex) else None
    return ModelReport(
        name=source.name,
        architecture=checkpoint.model.family.name,
        parameters=decoder.parameters(),
        bytes=source.nbytes(),
        source=str(asked.model),
        fingerprint=fingerprint(source),
        left_out=source.left_out,
        compression=None if asked.compression is None else asked.compression.method,
        adapter=", ".join(map(str, asked.adapter)) or None,
        notes=(*source.notes, *further, *(lattice_notes(index, asked.recipe) if index else ())),
        lattice=lattice_report(checkpoint, index, found.seconds) if index else None,
    )


def lattice_report(checkpoint: Checkpoint, index: GridIndex, seconds: float) -> LatticeReport:
    """What the lattice search found, as the report tells it."""
    tensors, weights, on_grid = [], 0, 0.0
    for record in index.tensors:
        tensor = checkpoint.tensors[record.name]
        count = math.prod(tensor.shape)
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
