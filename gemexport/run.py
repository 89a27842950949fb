"""A run: the DAG read -> grids -> export and reference -> validate, then the report; and one artefact judged."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from gemexport.engine.dag import graph, grid_index, judgement
from gemexport.engine.disk import check_room, is_ample
from gemexport.engine.memory import COMMAND, logits_memory
from gemexport.engine.output import claim, forget, work_beside
from gemexport.engine.processes import Workers
from gemexport.engine.scheduler import Scheduler
from gemexport.exporters.support import refusal
from gemexport.formats.checkpoint import Checkpoint
from gemexport.formats.grids.vector_codec import check
from gemexport.formats.stamps import ChangedError
from gemexport.formats.storage.errors import InputError
from gemexport.formats.storage.files import abandon, remove
from gemexport.judge.speed import machine
from gemexport.outcomes import artifact_report, crashed, fingerprint, model_report
from gemexport.registry import Target, check_able
from gemexport.report.earlier import Earlier, merged, withdrawn
from gemexport.report.notes import allocation_notes, compression_note, rounding_notes
from gemexport.report.schema import ArtifactReport, ModelReport, Report, package_versions
from gemexport.request import Request, Step, refusals, steps
from gemexport.shared.node import Call, Events, Node, Outcome, StepError, succeeded, value_of
from gemexport.shared.place import FLEETING, Place
from gemexport.shared.scratch import keep_log


def run(asked: Request, events: Events | None = None, workers: Workers | None = None) -> Report:
    """Run a request: write its artefacts, the reports and `SHA256SUMS`.

    `workers` may have a process that is ready already; all of them have ended when this returns.
    Raises InputError when the request or the checkpoint is at fault; of what was created until then, the artefacts that
    are whole stay, named in notes of the exception, whatever it is, and the rest is removed again.
    Raises ChangedError, an InputError, when the checkpoint does not stay as it is: then no artefact of this run stays.
    Raises StepError when a step fails on which all others rest, and leaves its log.
    """
    started = time.monotonic()
    checkpoint = asked.checkpoint()
    for codec in filter(None, asked.ple_codec):
        check(codec, checkpoint.architecture.per_layer, checkpoint.path)
    wanted, unavailable = _available(asked, steps(asked, checkpoint))
    wanted, refused = _supported(checkpoint, wanted)
    paths = [step.path for step in wanted]
    written = {step.path.relative_to(asked.out).as_posix(): (step.target.name, step.label) for step in wanted}
    mark = fingerprint(checkpoint)
    with (
        _undone(asked.out, paths),
        claim(asked.out, checkpoint, asked.fresh) as work,
        withdrawn(asked.out, checkpoint.name, mark, written) as earlier,
        _kept(paths, work),
    ):
        nodes = graph(asked, checkpoint, work, wanted)
        if not is_ample(work, nodes, asked.jobs):
            check_room(work, _exact(asked, checkpoint, nodes, wanted), asked.jobs)
        scheduler = Scheduler(
            asked.jobs, asked.memory - COMMAND, work, events or Events(), workers or Workers(), checkpoint.stamps
        )
        with ThreadPoolExecutor(1) as beside:
            settings = beside.submit(asked.place(work, checkpoint).plain().unpack)
            renderer = beside.submit(_renderer)
            outcomes = scheduler.run(nodes, settings)
        source, notes = checkpoint, [*earlier.notes]
        for name in ("compress", "grids", "allocate", "round"):
            if name in outcomes:
                value_of(name, outcomes)
        if asked.compression is not None:
            checkpoint = asked.place(work, source).checkpoint()
            notes.append(compression_note(asked.compression, asked.recipe, outcomes["compress"]))
        if "allocate" in outcomes:
            notes += allocation_notes(outcomes["allocate"])
        if "round" in outcomes:
            notes += rounding_notes(outcomes["round"])
        with ThreadPoolExecutor(os.cpu_count()) as beside:  # hashing is most of it
            described = list(beside.map(lambda step: artifact_report(asked, step, outcomes, work), wanted))
        artifacts = described + refused + unavailable
        errors = [outcome.error for outcome in outcomes.values() if outcome.error]
        if errors and all(artifact.status in ("error", "skipped") for artifact in artifacts):
            raise errors[0]
        _sweep(work)
        model = model_report(asked, source, checkpoint, _gridded(outcomes), notes)
        report = _report(asked, model, merged(earlier.rows, artifacts), outcomes, started)
        source.stamps.check()
        renderer.result().write_reports(report, asked.out)
    return report


def _exact(asked: Request, checkpoint: Checkpoint, nodes: list[Node], wanted: list[Step]) -> list[Node]:
    """The nodes with what their artefacts will come to, which takes as long as some exports, and their libraries."""
    from gemexport.engine.sizes import artifact_sizes, sized

    checkpoint.unpack()
    return sized(nodes, artifact_sizes(asked, checkpoint, wanted), wanted)


def _gridded(outcomes: Mapping[str, Outcome]) -> Outcome:
    """How the search of grids ended, with those that formats were made of."""
    return replace(outcomes["grids"], value=grid_index(outcomes))


def _report(
    asked: Request,
    model: ModelReport,
    rows: tuple[ArtifactReport, ...],
    outcomes: Mapping[str, Outcome],
    started: float,
) -> Report:
    """The report of a run that ends here and began at `started`."""
    return Report(
        model=model,
        recipe=asked.recipe.name,
        versions=package_versions(),
        artifacts=rows,
        machine=machine(),
        jobs=asked.jobs,
        reference_seconds=outcomes["reference"].seconds if "reference" in outcomes else None,
        seconds=time.monotonic() - started,
        peak_rss_bytes=max((outcome.peak_bytes or 0 for outcome in outcomes.values()), default=0),
        allow_partial=asked.allow_partial,
    )


def _sweep(work: Path) -> None:
    """Remove what no later run wants."""
    for name in FLEETING:
        shutil.rmtree(work / name, ignore_errors=True)


def _renderer() -> ModuleType:
    """What writes the reports, its templates compiled, which takes as long as hashing the artefacts."""
    from gemexport.report import render

    render.load_templates()
    return render


def validate(
    artifact: Path,
    target: Target,
    asked: Request,
    events: Events | None = None,
    *,
    out: Path | None = None,
    qnn_context: Path | None = None,
    qnn_arch: str | None = None,
) -> ArtifactReport:
    """Judge one artefact of the model that was asked for, whoever made it.

    With `out` the reports lie there, beside what they say already of the same model. With `qnn_context` it is also
    judged by the NPU's compiler, which writes there.
    """
    started = time.monotonic()
    if qnn_arch is not None and qnn_context is None:
        raise InputError(f"--qnn-arch {qnn_arch}", "is for --qnn-context", "name the folder for the context binaries")
    if qnn_context is not None and not target.calibrated:
        raise InputError(
            artifact, f"is {target.title}, which the NPU's compiler does not take", "leave out --qnn-context"
        )
    checkpoint = asked.checkpoint()
    check_able([target], judged=True)
    artifact = artifact.absolute()
    asked, step = replace(asked, out=out or artifact.parent), Step(target, artifact.stem, artifact)
    with ExitStack() as held:
        if out is None:
            work, earlier = held.enter_context(work_beside(artifact)), Earlier()
        else:
            work, earlier = held.enter_context(_reported(asked, checkpoint, step))
        nodes = judgement(asked, checkpoint, work, step)
        if qnn_context is not None:
            place = asked.place(work, checkpoint)
            nodes.append(compiling(asked, checkpoint, place, artifact, qnn_context, qnn_arch))
        outcomes = _judged(asked, checkpoint, work, nodes, events or Events())
        for name, outcome in outcomes.items():
            if outcome.error or name in (step.open_node, "grids"):
                value_of(name, outcomes)
        found = artifact_report(asked, step, outcomes, work)
        if out is not None:
            model = model_report(asked, checkpoint, checkpoint, outcomes["grids"], [*earlier.notes])
            report = _report(asked, model, merged(earlier.rows, [found]), outcomes, started)
            _renderer().write_reports(report, out)
    return found


def _judged(
    asked: Request, checkpoint: Checkpoint, work: Path, nodes: list[Node], events: Events
) -> dict[str, Outcome]:
    """How the steps that judge an artefact ended."""
    check_room(work, nodes, asked.jobs)
    scheduler = Scheduler(asked.jobs, asked.memory - COMMAND, work, events, source=checkpoint.stamps)
    with ThreadPoolExecutor(1) as beside:
        outcomes = scheduler.run(nodes, beside.submit(asked.place(work, checkpoint).plain().unpack))
    return {name: _with_kept_log(name, outcome) for name, outcome in outcomes.items()}


@contextmanager
def _reported(asked: Request, checkpoint: Checkpoint, step: Step) -> Iterator[tuple[Path, Earlier]]:
    """The folder for the report on an artefact that lies anywhere: its work folder, and the rows that are there."""
    written = {Path(os.path.relpath(step.path, asked.out)).as_posix(): (step.target.name, step.label)}
    with (
        _undone(asked.out, ()),
        claim(asked.out, checkpoint, asked.fresh) as work,
        withdrawn(asked.out, checkpoint.name, fingerprint(checkpoint), written) as earlier,
    ):
        try:
            yield work, earlier
        finally:
            _sweep(work)


def compiling(
    asked: Request, checkpoint: Checkpoint, place: Place, artifact: Path, context: Path, architecture: str | None
) -> Node:
    """The step that hands an artefact to the NPU's compiler."""
    arguments = {"place": place, "path": artifact, "context": context.absolute(), "architecture": architecture}
    call = Call("gemexport.judge.npu:compile_npu", arguments)
    return Node("npu", call, ("grids",), memory=logits_memory(checkpoint, asked.tokens), total=asked.tokens)


def _with_kept_log(name: str, outcome: Outcome) -> Outcome:
    """An outcome whose log, where it speaks of one, outlives the work folder."""
    if outcome.log is None or (succeeded(outcome) and not crashed(outcome)):
        return outcome
    text = outcome.log.read_text("utf-8", errors="replace")
    return replace(outcome, log=keep_log(re.sub(r"\W", "-", name), text))


@contextmanager
def _undone(out: Path, artifacts: Sequence[Path]) -> Iterator[None]:
    """Remove the output folder again when the block fails, if it was made in it and no artefact is there.

    Not for a step that failed, whose log is there.
    """
    existed = out.exists()
    first_made = next((parent for parent in [*reversed(out.parents), out] if not parent.exists()), None)
    try:
        yield
    except StepError:
        raise
    except BaseException:
        if not existed and first_made is not None and not any(path.exists() for path in artifacts):
            shutil.rmtree(first_made, ignore_errors=True)
        raise


@contextmanager
def _kept(artifacts: Sequence[Path], work: Path) -> Iterator[None]:
    """When the block fails, leave nothing half written; notes of the exception name the artefacts that are whole.

    Of a checkpoint that changed on the way nothing is kept: nobody can tell which of the two an artefact is made of.
    """
    before = {path: _written(path) for path in artifacts}
    try:
        yield
    except BaseException as error:
        for path in artifacts:
            abandon(path)
        _sweep(work)
        whole = [path for path in artifacts if _written(path) not in (None, before[path])]
        if isinstance(error, ChangedError):
            for path in whole:
                remove(path)
            forget(work)
            raise
        for path in whole:
            error.add_note(f"whole, and kept: {path}")
        raise


def _written(path: Path) -> tuple[int, int] | None:
    """What tells the file or folder at `path` from one that replaces it; None where there is none."""
    if not path.exists():
        return None
    found = path.stat()
    return found.st_ino, found.st_mtime_ns


def _supported(checkpoint: Checkpoint, wanted: list[Step]) -> tuple[list[Step], list[ArtifactReport]]:
    """The steps whose formats hold the model, and reports for the others; InputError where no step is left."""
    reasons = refusals(checkpoint, wanted)
    errors = {step: refusal(checkpoint, reason, step.target.name) for step, reason in reasons.items()}
    if errors and len(errors) == len(wanted):
        raise next(iter(errors.values()))
    reports = [
        ArtifactReport(format=step.target.name, variant=step.label, status="error", reason=str(error))
        for step, error in errors.items()
    ]
    return [step for step in wanted if step not in errors], reports


def _available(asked: Request, wanted: list[Step]) -> tuple[list[Step], list[ArtifactReport]]:
    """The steps whose packages are installed, and reports for the others; InputError for one that was asked for."""
    possible, left_out = [], []
    for step in wanted:
        missing = step.target.missing()
        if not missing:
            possible.append(step)
            continue
        problem = f"needs {', '.join(missing)}, which is not installed"
        if step.target.name in asked.formats:
            raise InputError(step.target.name, problem, step.target.install_hint())
        left_out.append(
            ArtifactReport(format=step.target.name, variant=step.label, status="skipped",
                           reason=f"{problem}; install gemexport[{step.target.extra},reference]")
        )  # fmt: skip
    check_able([step.target for step in wanted], asked.validate)
    return possible, left_out
