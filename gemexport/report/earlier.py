"""What earlier runs left in an output folder: rows that still hold, and what is said of those that do not.

No row and no checksum outlives the bytes that it speaks of. So a run takes those that it is about to replace out of the
reports before it replaces anything: whatever ends it, nothing there claims what was not judged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gemexport.formats.storage.errors import InputError
from gemexport.formats.storage.files import remove
from gemexport.registry import TARGETS
from gemexport.report.checksums import SUMS, describe_files
from gemexport.report.schema import JSON, ArtifactReport, Origin, Report, read_report

VIEWS = (JSON, "report.html", "report.md", "report.junit.xml", SUMS)
UNFINISHED = "a run that was to replace it did not end: what lies there now was not judged"
OTHER_BYTES = "what lies there is not what was judged"

Written = Mapping[str, tuple[str, str]]  # an artefact's path in the folder: format and variant


@dataclass(frozen=True)
class Earlier:
    """Rows that a run leaves as they are, and a sentence about what else lies there."""

    rows: tuple[ArtifactReport, ...] = ()
    notes: tuple[str, ...] = ()


@contextmanager
def withdrawn(out: Path, model: str, fingerprint: str, written: Written) -> Iterator[Earlier]:
    """What earlier runs left in `out`, for a run that will write what `written` names.

    Until the block ends the reports have the rows that it leaves alone, and of what it replaces that nothing is known.
    When the block fails, rows whose bytes are still there come back. Raises InputError for reports that cannot be
    written.
    """
    report = _read(out)
    if report is None or report.model.name != model:
        for name in VIEWS:
            remove(out / name)
        yield Earlier(notes=() if report is None else (_foreign_note(report, out),))
        return
    rows = report.artifacts
    leaving = [row for row in rows if row.path in written or (row.format, row.variant) in written.values()]
    kept = [found for row in rows if row not in leaving and (found := _judged(row, report, out, fingerprint))]
    marked = [_marked(row, UNFINISHED) for row in leaving if row.path is not None]
    _rewrite(report, merged(kept, marked), out)
    try:
        yield Earlier(tuple(kept))
    except BaseException as error:
        back = [found for row in leaving if row.path and (found := _judged(row, report, out, fingerprint))]
        try:
            _rewrite(report, merged(kept, back), out)
        except InputError as full:
            error.add_note(str(full))
        raise


def merged(kept: Sequence[ArtifactReport], new: Sequence[ArtifactReport]) -> tuple[ArtifactReport, ...]:
    """Rows of earlier runs and of this one, by format; what was not tried takes no earlier row's place."""
    known = {(row.format, row.variant) for row in kept}
    rows = [*kept, *(row for row in new if row.path or row.status == "error" or (row.format, row.variant) not in known)]
    order = {name: position for position, name in enumerate(TARGETS)}
    return tuple(sorted(rows, key=lambda row: order.get(row.format, len(order))))


def _foreign_note(report: Report, out: Path) -> str:
    """That the folder was another model's, and which artefacts of that still lie there."""
    found = [row.path for row in report.artifacts if row.path is not None and (out / row.path).exists()]
    there = f"; still there, and in no report: {', '.join(found)}" if found else ""
    return f"the output folder was another model's until now ({report.model.name}){there}"


def _read(out: Path) -> Report | None:
    try:
        return read_report(out / JSON)
    except InputError:
        return None  # none is there, or it is damaged: then there is nothing that it proves


def _judged(row: ArtifactReport, report: Report, out: Path, fingerprint: str) -> ArtifactReport | None:
    """A row as it may stand in the report of a later run; None: there is nothing that it speaks of."""
    if row.path is None:
        return _of(row, report) if row.status == "error" else None
    if not (out / row.path).exists():
        return None
    if report.model.fingerprint != fingerprint:
        return _marked(row, f"was made of {report.model.name} as its files were before; write it anew")
    if row.files and describe_files(out, out / row.path) != row.files:
        return _marked(row, OTHER_BYTES)
    return _of(row, report)


def _of(row: ArtifactReport, report: Report) -> ArtifactReport:
    """The row, which says what measured it."""
    origin = Origin(recipe=report.recipe, versions=report.versions, machine=report.machine, jobs=report.jobs)
    return row if row.earlier is not None else row.model_copy(update={"earlier": origin})


def _marked(row: ArtifactReport, reason: str) -> ArtifactReport:
    """A row that claims nothing any more."""
    return ArtifactReport(format=row.format, variant=row.variant, path=row.path, status="skipped", reason=reason)


def _rewrite(report: Report, rows: tuple[ArtifactReport, ...], out: Path) -> None:
    """Write the report of an earlier run with these rows in place of its own."""
    from gemexport.report.render import write_reports

    write_reports(report.model_copy(update={"artifacts": rows}), out)
