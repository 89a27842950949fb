"""What a run found out, as data: `report.json` is these models, written as they stand.

Numbers here were measured in the run that wrote them; `docs/report.md` says what each field means and in
which unit. Everything is frozen, and apart from seconds and memory the same run gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from gemexport.formats.storage.errors import InputError
from gemexport.formats.storage.files import atomic
from gemexport.shared.bound import Bound
from gemexport.shared.measured import (
    ChatReport,
    DepartureReport,
    FactReport,
    GridReport,
    LogitsReport,
    LossReport,
    NpuReport,
    ReportModel,
    TokenizerReport,
    UnjudgedReport,
    WeightsReport,
)
from gemexport.shared.vectors import VectorLoss, VectorsReport

Status = Literal["pass", "partial", "fail", "error", "written", "skipped"]
# What a command leaves with status 0 for: judged and found right, or not asked to be judged, or to be made.
WELL: frozenset[Status] = frozenset(("pass", "written", "skipped"))

SCHEMA = 1
JSON = "report.json"
_PACKAGES = (
    *(
        "gemexport",
        "torch",
        "transformers",
        "tokenizers",
        "numpy",
        "numba",
        "gguf",
        "xllamacpp",
        "libggml-python",
        "mlx",
        "mlx-lm",
    ),
    *("onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-qnn", "coremltools", "compressed-tensors"),
)


class LatticeTensor(ReportModel):
    """One matrix of the source, `[out, in]` or a stack of them, and the share of its blocks that lie on a grid."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    grid: GridReport | None = None
    grid_fraction: float
    left: bool = False  # an adapter was merged into it, which took it off the grid that its base lies on


class LatticeReport(ReportModel):
    """What the search for integer grids found: `weights` were looked at, `on_grid` of them lie on one."""

    weights: int
    on_grid: int
    seconds: float
    tensors: tuple[LatticeTensor, ...] = ()


class ModelReport(ReportModel):
    """The checkpoint that went in. `bytes` is what its decoder holds, `left_out` names what was not taken.

    `adapter` is the LoRA that was merged in, `compression` the method of llm-compressor that quantized it; `notes` say
    what reading, merging and compressing changed.
    """

    name: str
    architecture: str
    parameters: int
    bytes: int
    source: str
    fingerprint: str | None = None  # of the files that it was read from
    left_out: tuple[str, ...] = ()
    adapter: str | None = None
    compression: str | None = None
    notes: tuple[str, ...] = ()
    lattice: LatticeReport | None = None


class FileReport(ReportModel):
    """One file of an artefact, its path relative to the output folder."""

    path: str
    bytes: int
    sha256: str


class ExportStats(ReportModel):
    """Wall-clock seconds of the export alone, and the peak of its anonymous memory (RssAnon) in bytes."""

    seconds: float
    peak_rss_bytes: int | None = None


class ValidationReport(ReportModel):
    """Wall-clock seconds of a validation, those of the runtimes in it, and all of them by what they were spent on."""

    seconds: float
    runtime_seconds: float
    steps: dict[str, float] = Field(default_factory=dict)


class Origin(ReportModel):
    """What measured a row of an earlier run: a report tells this of its own run."""

    recipe: str | None = None
    versions: dict[str, str]
    machine: str | None = None
    jobs: int | None = None


class ArtifactReport(ReportModel):
    """One artefact: what was written, how close it is to the model, and the verdict with its reasons.

    `pass`: weights, metadata, tokenizer, chat template and logits were judged, and nothing is wrong. `partial`: nothing
    is, as far as was judged; `unjudged` says what was not. `written` and `skipped` claim nothing: nobody asked for a
    verdict, or for this format; `reason` says which. `stand_in` says what was run in place of the program that users
    have. `run` is the line that runs it. `more_logits` holds further runtimes or arithmetics than the one the table
    shows.
    """

    format: str
    variant: str
    path: str | None = None
    bytes: int | None = None
    sha256: str | None = None
    files: tuple[FileReport, ...] = ()
    status: Status
    reason: str | None = None
    unjudged: tuple[UnjudgedReport, ...] = ()
    stand_in: str | None = None
    run: str | None = None
    notes: tuple[str, ...] = ()
    widths: dict[str, int] = Field(default_factory=dict)
    export: ExportStats | None = None
    weights: WeightsReport | None = None
    facts: tuple[FactReport, ...] = ()
    tokenizer: TokenizerReport | None = None
    chat: ChatReport | None = None
    loss: LossReport | None = None
    logits: LogitsReport | None = None
    more_logits: tuple[LogitsReport, ...] = ()
    vectors: tuple[VectorsReport, ...] = ()
    vector_loss: VectorLoss | None = None
    departs: DepartureReport | None = None
    npu: NpuReport | None = None
    bounds: tuple[Bound, ...] = ()
    validation: ValidationReport | None = None
    seconds: float = 0.0
    earlier: Origin | None = None  # the run that measured it, where it is not the one that wrote the report

    def well(self, allow_partial: bool = False) -> bool:
        """Whether nothing is wrong with it and all was judged that was asked for; `allow_partial`: or some of that."""
        return self.status in WELL or (allow_partial and self.status == "partial")

    def to_json(self) -> str:
        """This artefact as JSON with a newline at its end."""
        return self.model_dump_json(indent=2) + "\n"


class Report(ReportModel):
    """A whole run: the model that went in and one entry for each artefact, those of earlier runs in the folder too."""

    schema_version: int = SCHEMA
    model: ModelReport
    recipe: str | None = None
    versions: dict[str, str]
    artifacts: tuple[ArtifactReport, ...] = ()
    machine: str | None = None
    jobs: int | None = None
    reference_seconds: float | None = None
    seconds: float = 0.0
    peak_rss_bytes: int | None = None
    allow_partial: bool = False

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong with any artefact of this run, and all was judged (or `allow_partial`)."""
        return all(row.well(self.allow_partial) for row in self.artifacts if row.earlier is None)

    def to_json(self) -> str:
        """What `report.json` holds: fields in the order above, and a newline at the end."""
        return self.model_dump_json(indent=2) + "\n"


def verdict(bounds: Iterable[Bound], unjudged: Iterable[UnjudgedReport] = ()) -> tuple[Status, str | None]:
    """`("pass", None)`, or another status and why: every bound that did not hold, then what was not judged.

    What is known to be wrong comes before what is not known.
    """
    broken = [str(bound) for bound in bounds if not bound.held]
    missing = [item for item in unjudged if item.because != "refused"]  # which has a bound of its own
    reason = "; ".join([*broken, *map(str, missing)]) or None
    if broken:
        return "fail", reason
    if any(item.because == "crashed" for item in missing):
        return "error", reason
    return ("partial" if missing else "pass"), reason


def package_versions() -> dict[str, str]:
    """The versions of the packages a run can depend on, those that are installed, sorted by name."""
    found: dict[str, str] = {}
    for package in sorted(_PACKAGES):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def read_report(path: Path) -> Report:
    """The report at `path`; fields that a later gemexport added are passed over. Raises InputError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(path, f"cannot be read ({error})", "give the report.json of a gemexport run") from error
    try:
        return Report.model_validate_json(text, extra="ignore")
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise InputError(
            path, f"is not a report: {where}: {first['msg']}", "write it anew with gemexport all"
        ) from error


def write_text(path: Path, text: str) -> Path:
    """Write `text` to `path`, which never holds half of it; return `path`. Raises InputError."""
    with atomic(path) as beside:
        beside.write_text(text, encoding="utf-8", newline="\n")
    return path
