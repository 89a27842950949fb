"""What validators measure, as data: the parts of `report.json` that are numbers about an artefact.

`docs/report.md` says what each field means and in which unit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

from gemexport.formats.grids.allocation import Goal
from gemexport.formats.grids.search import GridIndex
from gemexport.formats.tensor import DType, Grid, Kind

if TYPE_CHECKING:
    from gemexport.shared.vectors import VectorsReport
    from gemexport.validators.checks import divergence

Arithmetic = Literal[
    "f32", "f16", "bf16", "int8-activations", "int8-activations-256", "static-activations", "static-int8",
    "static-int16",
]  # fmt: skip


class ReportModel(BaseModel):
    """Frozen; a misspelt field is an error; NaN and infinity become strings, so that JSON stays JSON.

    Validators are built when they are first used: a process that only exports never does.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings", defer_build=True)


class GridReport(ReportModel):
    """An integer grid: codes of `bits` bits, one scale for `block` consecutive weights of a row."""

    bits: int
    block: int
    scale_dtype: DType
    lossless: bool
    kind: Kind = "symmetric"
    levels: tuple[float, ...] = ()  # of a codebook, by code; those of vectors are too many to report
    vector: int = 1  # consecutive weights that a code stands for
    codebooks: int = 1  # whose vectors are added up

    def __str__(self) -> str:
        if self.kind == "vectors":
            return f"{self.grid().codec} / {self.block} · {self.scale_dtype}"
        signed = "int" if self.kind == "symmetric" else "uint"
        extra = {"symmetric": "", "zero-point": " - zero", "affine": " + bias", "codebook": " levels"}[self.kind]
        return f"{signed}{self.bits}{extra} / {self.block} · {self.scale_dtype}"

    @classmethod
    def of(cls, grid: Grid | None) -> GridReport | None:
        """A tensor's grid, if it has one, as the report tells it."""
        if grid is None:
            return None
        return cls(**{**asdict(grid), **({"levels": ()} if grid.kind == "vectors" else {})})

    def grid(self) -> Grid:
        """The grid that was reported."""
        return Grid(**dict(self))


class BlocksReport(ReportModel):
    """Somebody else's codes of a tensor, block by block, against the best that such a block can do.

    `excess` is a block's error over the least, `gain` over what another scale would leave of it: the largest of the
    `blocks`, the `usual` one that all but one in a thousand stay below, the median; `many` have a gain of 4 and more.
    The largest gain is `at` this row and column, whose values should be multiplied by `factor`.
    """

    blocks: int
    gain_median: float
    gain_usual: float
    gain: float
    many: int
    excess_median: float
    excess_usual: float
    excess: float
    at: tuple[int, int]
    factor: float


class TensorReport(ReportModel):
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
    exact_as_run: int | None = None
    requantized: bool = False
    codec: str | None = None
    fitted_rms: float | None = None
    kept: int | None = None
    broken_at: tuple[int, int] | None = None
    blocks: BlocksReport | None = None


class WeightsReport(ReportModel):
    """The weights read back from the written artefact against the source's."""

    compared: int
    exact: int
    exact_fraction: float
    max_relative_error: float
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    folded: tuple[str, ...] = ()  # compared with the source's under channel scales that somebody folded in, as AWQ does
    tensors: tuple[TensorReport, ...] = ()


class FactReport(ReportModel):
    """A fact of the decoder that an artefact's metadata state otherwise than the checkpoint; in some layers or all."""

    name: str
    found: str
    expected: str
    layers: tuple[int, ...] = ()

    def __str__(self) -> str:
        some = f" in layers {', '.join(map(str, self.layers))}" if self.layers else ""
        return f"{self.name} is {self.found}{some}, the checkpoint says {self.expected}"


class UnjudgedReport(ReportModel):
    """A part of a verdict that was not judged: `weights`, `metadata`, `tokenizer`, `chat`, `logits`, `greedy` (the
    key/value cache), or one of these in a further program or arithmetic (`logits in openvino`).

    `because` it was `left out` (nobody tried: no room, nothing there), `refused` (what judges it says what is wrong
    with the artefact) or `crashed` (what judges it did).
    """

    part: str
    because: Literal["left out", "refused", "crashed"]
    reason: str

    def __str__(self) -> str:
        return f"{self.part} not judged: {self.reason}"


class DepartureReport(ReportModel):
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


class TokenizerDifference(ReportModel):
    """A text on which the artefact's tokenizer gives other ids than the checkpoint's."""

    text: str
    expected: tuple[int, ...]
    found: tuple[int, ...]
    runtime: bool = False


class TokenizerReport(ReportModel):
    """On how many texts the artefact's own tokenizer gives exactly the ids of the checkpoint's.

    Of those that differ, `ordinary` are built-in prompts, and `runtime_only` are the runtime's own fault: the
    artefact's tables, read back, give the checkpoint's ids. `vocabulary` says what differs in these tables;
    `differences` shows some texts, `notes` what the program leaves to whoever calls it, and what to do.
    """

    texts: int
    equal: int
    name: str | None = None
    runtime_only: int = 0
    ordinary: int = 0
    vocabulary: tuple[str, ...] = ()
    differences: tuple[TokenizerDifference, ...] = ()
    notes: tuple[str, ...] = ()


class ChatDifference(ReportModel):
    """A conversation that the artefact's engine lays out differently; `runtime`: with the checkpoint's template."""

    conversation: str
    expected: str
    found: str
    runtime: bool = False


class ChatReport(ReportModel):
    """Conversations laid out by the artefact's engine as by transformers with the checkpoint's chat template.

    `runtime_only` of those that differ are the engine's own fault: the artefact's template is right in transformers.
    `refusal` is what the checkpoint's template says where it takes no plain text: then contents are given in parts.
    """

    engine: str
    conversations: int
    equal: int
    runtime_only: int = 0
    refusal: str | None = None
    differences: tuple[ChatDifference, ...] = ()
    notes: tuple[str, ...] = ()  # why another engine than the program's own was asked


class Figures(ReportModel):
    """Two models on the same tokens: KL divergence in nats, shares from 0 to 1, a ratio of perplexities.

    `changed` is the share of positions at which the second's likeliest token is another one, and not one that the first
    finds as likely but for a tenth.
    """

    kld_mean: float
    kld_error: float | None = None  # standard error of the mean, over positions
    kld_max: float
    top1_agreement: float
    changed: float | None = None
    perplexity_ratio: float


class KindReport(Figures):
    """The same on one kind of text, over `tokens` positions."""

    kind: str
    tokens: int


class Divergence(Figures):
    """The same over all texts, and by kind where they are of several.

    `top1_but_ties` counts choices between tokens that are all but equally likely as agreement; None if nobody asked.
    Of a model whose verdict is the probability of one of two tokens, by how much that is another: on average, at most.
    """

    top1_but_ties: float | None = None
    choice_mean: float | None = None
    choice_max: float | None = None
    kinds: tuple[KindReport, ...] = ()

    @property
    def mean(self) -> float:
        """The figure that bounds are of."""
        return self.kld_mean

    @classmethod
    def of(cls, total: divergence.Divergence, kinds: Sequence[tuple[str, int]] = ()) -> Divergence:
        """The figures of what was added up over sequences, whose kinds and lengths may be given."""
        whole = cls.model_validate(total, from_attributes=True)
        parts = [
            KindReport(kind=kind, tokens=part.positions, **dict(Figures.model_validate(part, from_attributes=True)))
            for kind, part in total.by_kind(kinds).items()
        ]
        return whole.model_copy(update={"kinds": tuple(parts)})


LossWord = Literal["lossless", "near", "lossy", "poor"]


class KindLossReport(ReportModel):
    """The loss on one kind of text in a word, beside what PyTorch's bf16 costs the source there (`noise`, in nats)."""

    kind: str
    tokens: int
    word: LossWord
    kld_mean: float
    changed: float
    noise: float


class LossReport(ReportModel):
    """What an artefact's numbers cost, in a word: that of the kind of text which fares worst.

    Measured where its program computes most exactly: `runtime` in `arithmetic`. `choice_mean` and `choice_max` are of a
    model whose verdict is the probability of one of two tokens.
    """

    word: LossWord
    kind: str
    kld_mean: float
    choice_mean: float | None = None
    choice_max: float | None = None
    runtime: str
    arithmetic: Arithmetic
    kinds: tuple[KindLossReport, ...]


class GreedyReport(ReportModel):
    """A greedy continuation with the runtime's own cache: its first `equal` ids are the reference's."""

    tokens: int
    equal: int


class Pace(ReportModel):
    """Tokens a second of `tokens` tokens that were computed in `pieces`: the median piece, and the quartiles."""

    tokens: int
    pieces: int
    lower: float
    median: float
    upper: float


class SpeedReport(ReportModel):
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


class LogitsReport(ReportModel):
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


class NpuRefusal(ReportModel):
    """A node that the NPU's compiler does not take, in one of the artefact's graphs."""

    graph: str
    node: str
    operator: str
    reason: str


class NpuComparison(ReportModel):
    """Logits that one way of computing the graphs gives against another's, `max_difference` being the largest."""

    of: str
    against: str
    divergence: Divergence
    max_difference: float


class NpuReport(ReportModel):
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


@dataclass(frozen=True)
class Allocated:
    """The widths of plain matrices that were chosen for a size or a loss."""

    index: GridIndex
    goal: Goal
    loss: float | None = None  # nats a position that are to be expected; None where there was nothing to choose
    measured: float | None = None  # those that were found, where a loss was asked for
    weights: Mapping[str, int] = field(default_factory=dict)  # by width, those of units
    sizes: Mapping[str, int] = field(default_factory=dict)  # bytes by artefact
    rest: tuple[str, ...] = ()  # matrices that keep the recipe's width


@dataclass(frozen=True)
class Swept:
    """A point on an artefact's curve."""

    artefact: str
    bytes: int
    bits: float  # of a code, in the mean; what stays as it is counts as 16
    loss: float  # nats a position that are to be expected
    weights: Mapping[str, int]  # by width


@dataclass(frozen=True)
class Rounded:
    """What of the tensors that lie on no lattice was rounded on what."""

    tokens: int  # of calibration
    chosen: tuple[str, ...]  # tensors whose codes were chosen on their inputs
    nearest: tuple[str, ...]  # those of which each weight was rounded by itself


@dataclass(frozen=True)
class Validation:
    """What the validator of one artefact measured."""

    weights: WeightsReport
    tokenizer: TokenizerReport | None = None
    chat: ChatReport | None = None
    logits: LogitsReport | None = None
    more_logits: tuple[LogitsReport, ...] = ()
    vectors: tuple[VectorsReport, ...] = ()  # in place of logits, of a model that makes one vector of a text
    departs: DepartureReport | None = None  # where the runtime leaves the reference, if it does
    facts: tuple[FactReport, ...] = ()  # that the artefact states otherwise than the checkpoint
    notes: tuple[str, ...] = ()  # on what of a graph was not judged, as others make it in other ways
    played: str = "f32-reordered"  # the arithmetic of PyTorch that its program's f32 is held to
    unjudged: tuple[UnjudgedReport, ...] = ()
    steps: dict[str, float] = field(default_factory=dict)  # seconds by what they were spent on
