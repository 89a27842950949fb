"""What a run found out, as data: `report.json` is these models, written as they stand.

Numbers here were measured in the run that wrote them; `docs/report.md` says what each field means and in
which unit. Everything is frozen, and apart from seconds and memory the same run gives the same bytes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from gemexport.formats.errors import InputError
from gemexport.formats.files import atomic
from gemexport.formats.tensor import DType, Grid, Kind

Status = Literal["pass", "fail", "error", "skipped"]
Arithmetic = Literal[
    "f32", "f16", "bf16", "int8-activations", "int8-activations-256", "static-activations", "static-int8",
    "static-int16",
]  # fmt: skip

SCHEMA = 1
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


class _Model(BaseModel):
    """Frozen; a misspelt field is an error; NaN and infinity become strings, so that JSON stays JSON.

    Validators are built when they are first used: a process that only exports never does.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings", defer_build=True)


class GridReport(_Model):
    """An integer grid: codes of `bits` bits, one scale for `block` consecutive weights of a row."""

    bits: int
    block: int
    scale_dtype: DType
    lossless: bool
    kind: Kind = "symmetric"
    levels: tuple[float, ...] = ()  # of a codebook, by code

    def __str__(self) -> str:
        signed = "int" if self.kind == "symmetric" else "uint"
        extra = {"symmetric": "", "zero-point": " - zero", "affine": " + bias", "codebook": " levels"}[self.kind]
        return f"{signed}{self.bits}{extra} / {self.block} · {self.scale_dtype}"

    @classmethod
    def of(cls, grid: Grid | None) -> GridReport | None:
        """A tensor's grid, if it has one, as the report tells it."""
        return cls(**asdict(grid)) if grid else None

    def grid(self) -> Grid:
        """The grid that was reported."""
        return Grid(**dict(self))


class LatticeTensor(_Model):
    """One 2-D tensor of the source `[out, in]` and the share of its blocks that lie on an integer grid."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    grid: GridReport | None = None
    grid_fraction: float
    left: bool = False  # an adapter was merged into it, which took it off the grid that its base lies on


class LatticeReport(_Model):
    """What the search for integer grids found: `weights` were looked at, `on_grid` of them lie on one."""

    weights: int
    on_grid: int
    seconds: float
    tensors: tuple[LatticeTensor, ...] = ()


class ModelReport(_Model):
    """The checkpoint that went in. `bytes` is what its decoder holds, `left_out` names what was not taken.

    `adapter` is the LoRA that was merged in, `compression` the method of llm-compressor that quantized it; `notes` say
    what reading, merging and compressing changed.
    """

    name: str
    architecture: str
    parameters: int
    bytes: int
    source: str
    left_out: tuple[str, ...] = ()
    adapter: str | None = None
    compression: str | None = None
    notes: tuple[str, ...] = ()
    lattice: LatticeReport | None = None


class FileReport(_Model):
    """One file of an artefact, its path relative to the output folder."""

    path: str
    bytes: int
    sha256: str


class ExportStats(_Model):
    """Wall-clock seconds of the export alone, and the peak of its anonymous memory (RssAnon) in bytes."""

    seconds: float
    peak_rss_bytes: int | None = None


class TensorReport(_Model):
    """One tensor read back from the artefact and compared with the source's, under its canonical name."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    source_dtype: str | None = None
    grid: GridReport | None = None
    source_grid: GridReport | None = None
    compared: int
    exact: int
    exact_fraction: float
    max_relative_error: float
    rms_relative_error: float | None = None
    scale_rounded: bool = False
    same_scales: float | None = None
    requantized: bool = False
    codec: str | None = None
    fitted_rms: float | None = None


class WeightsReport(_Model):
    """The weights read back from the written artefact against the source's."""

    compared: int
    exact: int
    exact_fraction: float
    max_relative_error: float
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    tensors: tuple[TensorReport, ...] = ()


class FactReport(_Model):
    """A fact of the decoder that an artefact's metadata state otherwise than the checkpoint; in some layers or all."""

    name: str
    found: str
    expected: str
    layers: tuple[int, ...] = ()

    def __str__(self) -> str:
        some = f" in layers {', '.join(map(str, self.layers))}" if self.layers else ""
        return f"{self.name} is {self.found}{some}, the checkpoint says {self.expected}"


class DepartureReport(_Model):
    """The first place where a runtime's values are not the reference's, on the same weights and tokens.

    `layer` counts from 0; -1 is what goes into the first one, the number of layers what comes after the last.
    `relative_error` is the root mean square of the difference over that of the reference's values.
    """

    layer: int | None
    name: str
    relative_error: float | None = None
    limit: float

    def __str__(self) -> str:
        by = "" if self.relative_error is None else f", whose output is off by {self.relative_error:.2g} of its size"
        return f"it departs at {self.name}{by}"


class TokenizerDifference(_Model):
    """A text on which the artefact's tokenizer gives other ids than the checkpoint's."""

    text: str
    expected: tuple[int, ...]
    found: tuple[int, ...]
    runtime: bool = False


class TokenizerReport(_Model):
    """On how many texts the artefact's own tokenizer gives exactly the ids of the checkpoint's.

    Of those that differ, `ordinary` are built-in prompts, and `runtime_only` are the runtime's own fault: the
    artefact's tables, read back, give the checkpoint's ids. `vocabulary` says what differs in these tables;
    `differences` shows some texts.
    """

    texts: int
    equal: int
    name: str | None = None
    runtime_only: int = 0
    ordinary: int = 0
    vocabulary: tuple[str, ...] = ()
    differences: tuple[TokenizerDifference, ...] = ()


class ChatDifference(_Model):
    """A conversation that the artefact's engine lays out differently; `runtime`: with the checkpoint's template."""

    conversation: str
    expected: str
    found: str
    runtime: bool = False


class ChatReport(_Model):
    """Conversations laid out by the artefact's engine as by transformers with the checkpoint's chat template.

    `runtime_only` of those that differ are the engine's own fault: the artefact's template is right in transformers.
    """

    engine: str
    conversations: int
    equal: int
    runtime_only: int = 0
    differences: tuple[ChatDifference, ...] = ()


class Divergence(_Model):
    """Two models on the same tokens: KL divergence in nats, a share from 0 to 1, a ratio of perplexities."""

    kld_mean: float
    kld_max: float
    top1_agreement: float
    perplexity_ratio: float


class GreedyReport(_Model):
    """A greedy continuation with the runtime's own cache: its first `equal` ids are the reference's."""

    tokens: int
    equal: int


class Pace(_Model):
    """Tokens a second of `tokens` tokens that were computed in `pieces`: the median piece, and the quartiles."""

    tokens: int
    pieces: int
    lower: float
    median: float
    upper: float


class SpeedReport(_Model):
    """What a runtime took in the validator's passes, on this machine with `threads` threads beside other steps.

    `prefill` is of the sequences that were compared, with logits at every position; `decode` one token at a time
    through the cache. `seconds` are the runtime's own for all `tokens`. Memory is anonymous: `peak_rss_bytes` while
    generating, `idle_rss_bytes` what the process had before the runtime was loaded.
    """

    threads: int
    load_seconds: float
    tokens: int
    seconds: float
    prefill: Pace | None = None
    decode: Pace | None = None
    peak_rss_bytes: int | None = None
    idle_rss_bytes: int | None = None

    @property
    def memory_bytes(self) -> int | None:
        """What the runtime added to the process; None where the system does not tell."""
        if self.peak_rss_bytes is None or self.idle_rss_bytes is None:
            return None
        return max(0, self.peak_rss_bytes - self.idle_rss_bytes)


class ValidationReport(_Model):
    """Wall-clock seconds of a validation, those of the runtimes in it, and all of them by what they were spent on."""

    seconds: float
    runtime_seconds: float
    steps: dict[str, float] = {}


class LogitsReport(_Model):
    """An artefact run in a runtime, teacher-forced over `tokens` positions.

    `conversion` is against the reference holding the weights read back from the artefact, `loss` against the
    reference holding the source's; `noise_floor` is PyTorch's own bf16 against its f32 on the same tokens.
    `top_k` is set where the runtime tells only its k likeliest tokens; the rest are one bucket.
    """

    runtime: str
    arithmetic: Arithmetic
    tokens: int
    top_k: int | None = None
    reference: str | None = None
    conversion: Divergence | None = None
    loss: Divergence | None = None
    noise_floor: Divergence | None = None
    greedy: GreedyReport | None = None
    speed: SpeedReport | None = None
    seconds: float | None = None
    peak_rss_bytes: int | None = None


class NpuRefusal(_Model):
    """A node that the NPU's compiler does not take, in one of the artefact's graphs."""

    graph: str
    node: str
    operator: str
    reason: str


class NpuComparison(_Model):
    """Logits that one way of computing the graphs gives against another's, `max_difference` being the largest."""

    of: str
    against: str
    divergence: Divergence
    max_difference: float


class NpuReport(_Model):
    """The artefact in the NPU's own compiler and emulator.

    `context` is what the compiler wrote, `context_bytes` the binaries in it; both graphs are compiled with nothing left
    to the CPU, or not at all. The emulator and the CPU are judged against exact arithmetic, over `tokens` positions.
    """

    compiler: str
    architecture: str
    seconds: float
    context: str | None = None
    context_bytes: int = 0
    refused: tuple[NpuRefusal, ...] = ()
    errors: tuple[str, ...] = ()
    tokens: int = 0
    comparisons: tuple[NpuComparison, ...] = ()


class Bound(_Model):
    """One thing the verdict rests on: a metric, its value, its limit and where that comes from.

    `where` names what broke it: tensors, facts, a text.
    """

    metric: str
    value: float
    relation: Literal["<=", ">="]
    limit: float
    origin: str
    held: bool
    where: str | None = None

    @classmethod
    def at_most(cls, metric: str, value: float, limit: float, origin: str, where: str | None = None) -> Bound:
        """`value` must not exceed `limit`; NaN does not hold."""
        held = value <= limit
        return cls(metric=metric, value=value, relation="<=", limit=limit, origin=origin, held=held, where=where)

    @classmethod
    def at_least(cls, metric: str, value: float, limit: float, origin: str, where: str | None = None) -> Bound:
        """`value` must reach `limit`; NaN does not hold."""
        held = value >= limit
        return cls(metric=metric, value=value, relation=">=", limit=limit, origin=origin, held=held, where=where)

    def __str__(self) -> str:
        broken = "" if self.held else "not "
        text = f"{self.metric} is {self.value:.4g}, {broken}{self.relation} {self.limit:.4g} ({self.origin})"
        text = re.sub(r"e([+-])0?(\d+)\b", lambda found: f"e{found[1].lstrip('+')}{found[2]}", text)
        return text if self.held or not self.where else f"{text}: {self.where}"


class ArtifactReport(_Model):
    """One artefact: what was written, how close it is to the model, and the verdict with its reasons.

    `skipped` claims nothing: not written, or written and not validated; `reason` says which. `run` is the
    line that runs it. `more_logits` holds further runtimes or arithmetics than the one the table shows.
    """

    format: str
    variant: str
    path: str | None = None
    bytes: int | None = None
    sha256: str | None = None
    files: tuple[FileReport, ...] = ()
    status: Status
    reason: str | None = None
    run: str | None = None
    notes: tuple[str, ...] = ()
    export: ExportStats | None = None
    weights: WeightsReport | None = None
    facts: tuple[FactReport, ...] = ()
    tokenizer: TokenizerReport | None = None
    chat: ChatReport | None = None
    logits: LogitsReport | None = None
    more_logits: tuple[LogitsReport, ...] = ()
    departs: DepartureReport | None = None
    npu: NpuReport | None = None
    bounds: tuple[Bound, ...] = ()
    validation: ValidationReport | None = None
    seconds: float = 0.0

    def to_json(self) -> str:
        """This artefact as JSON with a newline at its end."""
        return self.model_dump_json(indent=2) + "\n"


class Report(_Model):
    """A whole run: the model that went in and one entry for each artefact, in the order of the request."""

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

    @property
    def ok(self) -> bool:
        """Whether no artefact failed its validator or stopped with an error."""
        return all(artifact.status in ("pass", "skipped") for artifact in self.artifacts)

    def to_json(self) -> str:
        """What `report.json` holds: fields in the order above, and a newline at the end."""
        return self.model_dump_json(indent=2) + "\n"


def verdict(bounds: Iterable[Bound]) -> tuple[Status, str | None]:
    """`("pass", None)`, or `("fail", reason)` where the reason names every bound that did not hold."""
    broken = [str(bound) for bound in bounds if not bound.held]
    return ("fail", "; ".join(broken)) if broken else ("pass", None)


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


def describe_files(root: Path, path: Path) -> tuple[FileReport, ...]:
    """The files of the artefact at `path` (a file or a folder), sorted, their paths relative to `root`."""
    found = []
    for file in _files(path):
        relative = file.relative_to(root).as_posix()
        found.append(FileReport(path=relative, bytes=file.stat().st_size, sha256=file_sha256(file)))
    return tuple(found)


def artifact_sha256(files: Sequence[FileReport]) -> str:
    """One digest for an artefact: a file's own, or for a folder that of its lines in `SHA256SUMS`."""
    if len(files) == 1:
        return files[0].sha256
    return hashlib.sha256("".join(_sum_line(file) for file in files).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal, read a slice at a time."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_sums(out: Path, artifacts: Iterable[ArtifactReport]) -> Path:
    """Write `SHA256SUMS`, as `sha256sum -c` reads it, for every file of the artefacts; return its path.

    The reports are not in it: they hold measured seconds, and without them two builds of the same model have
    the same `SHA256SUMS`.
    """
    files = {file.path: file for artifact in artifacts for file in artifact.files}
    return write_text(out / "SHA256SUMS", "".join(_sum_line(files[path]) for path in sorted(files)))


def write_text(path: Path, text: str) -> Path:
    """Write `text` to `path`, which never holds half of it; return `path`. Raises InputError."""
    with atomic(path) as beside:
        beside.write_text(text, encoding="utf-8", newline="\n")
    return path


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    yield from sorted((file for file in path.rglob("*") if file.is_file()), key=lambda file: file.as_posix())


def _sum_line(file: FileReport) -> str:
    # coreutils marks a line whose name holds a backslash or a line break with a leading backslash.
    name = file.path.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
    mark = "\\" if name != file.path else ""
    return f"{mark}{file.sha256}  {name}\n"
