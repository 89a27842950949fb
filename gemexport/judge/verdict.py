"""Pass or fail, and why: every bound with the measurement that it comes from (docs/bounds.md tells the whole story)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from gemexport.formats.gemma.names import role_of
from gemexport.formats.grids.recipe import Recipe
from gemexport.formats.tensor import DType, Grid
from gemexport.judge.bounds import (
    BLOCK_EXCESS,
    BLOCK_GAIN,
    BLOCK_MANY,
    BLOCK_MEDIAN,
    BLOCK_STEPS,
    BLOCK_USUAL,
    CODEC_ROOM,
    F32_FACTOR,
    F32_TOP1,
    NOISES,
    REQUANTIZED_RMS,
    REQUANTIZED_VECTOR,
    ROW_STEPS,
    RUNTIME_TEXTS,
    VECTOR_STEPS,
    f32_limit,
    noise_limit,
)
from gemexport.judge.diagnosis import diagnose
from gemexport.judge.loss import judged_loss, loss_bounds
from gemexport.judge.vectors import judged_vectors, vector_bounds, vector_loss_bounds
from gemexport.shared.bound import Bound
from gemexport.shared.measured import (
    ChatReport,
    Divergence,
    LogitsReport,
    TensorReport,
    TokenizerReport,
    Validation,
)
from gemexport.shared.vectors import VectorDistance

TEXT = 60  # characters of a text that is named
NAMED = 3  # of the tensors, facts or texts that broke a bound

Holds = Callable[[Grid, int], bool]


def bounds(
    found: Validation,
    floors: Mapping[str, Divergence | VectorDistance],
    recipe: Recipe,
    holds: Holds = lambda grid, width: True,
    plain: DType | None = None,
) -> tuple[Bound, ...]:
    """Every bound that an artefact is held to; `holds` tells whether its format has a container for a grid in rows of
    so many weights, `plain` is the dtype that was asked for in place of codes.
    """
    result = [*_weights(found, holds, plain)]
    origin = "an artefact says of the decoder what the checkpoint says"
    result.append(Bound.at_most("metadata.different", len(found.facts), 0, origin, _listed(map(str, found.facts))))
    origin = "an artefact is taken by the programs that it is for"
    for item in found.unjudged:
        if item.because == "refused":
            result.append(Bound.at_most(f"{item.part}.refused", 1, 0, origin, item.reason))
    if found.tokenizer is not None:
        result += _tokenizer(found.tokenizer)
    if found.chat is not None:
        result += _chat(found.chat)
    of_logits = {name: floor for name, floor in floors.items() if isinstance(floor, Divergence)}
    of_vectors = {name: floor for name, floor in floors.items() if isinstance(floor, VectorDistance)}
    for logits in (found.logits, *found.more_logits):
        if logits is not None:
            second = found.logits is not None and logits.runtime != found.logits.runtime
            result += _conversion(logits, of_logits, found, f", {logits.runtime}" if second else "")
    for run in found.vectors:
        second = run.runtime != found.vectors[0].runtime
        result += vector_bounds(run, of_vectors, found, f", {run.runtime}" if second else "")
    if (moved := judged_vectors(found, of_vectors)) is not None:
        result += vector_loss_bounds(moved, recipe)
    loss = judged_loss(found, of_logits)
    if loss is not None:
        result += loss_bounds(loss, recipe, all(bound.held for bound in result))
    return tuple(result)


def _tokenizer(report: TokenizerReport) -> list[Bound]:
    """Tables equal, texts equal but for what the runtime itself gets wrong; of ordinary texts not even that."""
    same = report.equal + report.runtime_only
    texts = _listed(f"the text {item.text[:TEXT]!r}" for item in report.differences if not item.runtime)
    origin = "the tables must be the checkpoint's"
    tables = Bound.at_most(
        "tokenizer.vocabulary differences", len(report.vocabulary), 0, origin, "; ".join(report.vocabulary) or None
    )
    origin = "the same texts must give the same tokens"
    result = [tables, Bound.at_least("tokenizer.equal", same, report.texts, origin, texts)]
    if report.runtime_only:
        texts = _listed(f"the text {item.text[:TEXT]!r}" for item in report.differences if item.runtime)
        origin = "a runtime that reads ordinary texts differently makes every other number say nothing"
        result.append(Bound.at_most("tokenizer.ordinary texts that differ", report.ordinary, 0, origin, texts))
        origin = "twice what llama.cpp gets wrong with Gemma's own tables; more would be another tokenizer"
        share = report.runtime_only / report.texts
        result.append(Bound.at_most("tokenizer.runtime_only share", share, RUNTIME_TEXTS, origin, texts))
    return result


def _chat(report: ChatReport) -> list[Bound]:
    """Every conversation laid out as the checkpoint's template does it, but for what the engine itself gets wrong."""
    names = _listed(f"the conversation {item.conversation!r}" for item in report.differences if not item.runtime)
    origin = "the chat template must lay out every conversation as the checkpoint's does"
    result = [Bound.at_least("chat.equal", report.equal + report.runtime_only, report.conversations, origin, names)]
    if report.refusal is not None:
        origin = "a chat template lays out some conversation, if only of contents in parts"
        result.append(Bound.at_least("chat.conversations", report.conversations, 1, origin, report.refusal))
    return result


def _weights(found: Validation, holds: Holds, plain: DType | None) -> list[Bound]:
    """Nothing missing, and what was promised is there to the bit.

    Where nothing was, what lies on the source's lattice, or has no grid at all, kept its values; the rest is near.
    """
    report = found.weights
    origin = "an artefact holds every tensor of the decoder"
    result = [Bound.at_most("weights.missing", len(report.missing), 0, origin, _listed(report.missing))]
    origin = "an artefact holds no tensor that the decoder does not have"
    result.append(Bound.at_most("weights.unexpected", len(report.unexpected), 0, origin, _listed(report.unexpected)))
    promised = [item for item in report.tensors if item.kept is not None]
    if promised:
        result.append(_kept(promised))
    return result + _near([item for item in report.tensors if item.kept is None], holds, plain)


def _kept(promised: Sequence[TensorReport]) -> Bound:
    """Codes and scales are those that the exporter was given, rounded as the format prescribes and no further."""
    share = sum(item.kept or 0 for item in promised) / max(sum(item.compared for item in promised), 1)
    origin = "what went into the exporter comes out: codes, scales and values to the bit, as the format rounds them"
    broken = sorted((item for item in promised if item.kept != item.compared), key=_kept_share)
    lattices = [item for item in broken if item.source_grid is not None and item.source_grid.lossless]
    where = "; ".join([*diagnose(lattices), *filter(None, [_listed(map(_broken, broken))])]) or None
    return Bound.at_least("weights.kept", share, 1.0, origin, where)


def _kept_share(item: TensorReport) -> float:
    return (item.kept or 0) / max(item.compared, 1)


def _broken(item: TensorReport) -> str:
    """A tensor that is not as it was promised, and the first place where it is not."""
    if item.broken_at is None:
        return item.name
    row, column = item.broken_at
    return f"{item.name} (from row {row}, column {column})"


def _near(tensors: Sequence[TensorReport], holds: Holds, plain: DType | None) -> list[Bound]:
    """The bounds of tensors of which nobody knows what they were to be."""
    result = []
    held = [item for item in tensors if _must_be_exact(item, holds) and not _narrowed(item, plain)]
    moved = [item for item in tensors if _widened(item)]
    if held:
        share = sum(item.exact for item in held) / max(sum(item.compared for item in held), 1)
        origin = "no weight changes its value unless the format cannot hold it"
        changed = sorted((item for item in held if item.exact < item.compared), key=lambda item: item.exact_fraction)
        where = "; ".join([*diagnose(changed), *filter(None, [_listed(item.name for item in changed)])]) or None
        result.append(Bound.at_least("weights.exact_fraction", share, 1.0, origin, where))
    result += _vectors([item for item in tensors if _is_vector(item) or _narrowed(item, plain)])
    result += [_as_fitted(item, item.fitted_rms) for item in tensors if item.fitted_rms is not None]
    anew = [item for item in tensors if _quantized_anew(item, holds, plain)]
    if anew:
        worst, limit, name = _farthest((item.rms_relative_error or 0.0, REQUANTIZED_RMS, item.name) for item in anew)
        origin = "a matrix that was quantized anew is still nearer to the source's than another one would be"
        result.append(Bound.at_most("weights.rms_relative_error", worst, limit, origin, name))
    result += _blocks([item for item in anew if item.blocks is not None])
    if moved:
        error, limit, name = _farthest((item.max_relative_error, _step_limit(item), item.name) for item in moved)
        origin = "steps of the wider codes that the format has instead: half of one, and of blocks what clipping adds"
        result.append(Bound.at_most("weights.max_relative_error of requantized tensors", error, limit, origin, name))
    return result


def _blocks(tensors: Sequence[TensorReport]) -> list[Bound]:
    """Somebody else's codes are what their kind of block can do: each of them, most, and the one in the middle."""
    gains: list[tuple[float, float, str]] = []
    manies, medians, excesses = gains.copy(), gains.copy(), gains.copy()
    for item in tensors:
        blocks = item.blocks
        assert blocks is not None
        row, column = blocks.at
        where = f"{item.name} (row {row}, from column {column}: its values times {blocks.factor:.3g} would be nearer)"
        gains.append((blocks.gain, max(BLOCK_GAIN, BLOCK_USUAL * blocks.gain_usual), where))
        manies.append((blocks.many, max(1.0, BLOCK_MANY * blocks.blocks), item.name))
        medians.append((blocks.gain_median, BLOCK_MEDIAN, where))
        excesses.append((blocks.excess, max(BLOCK_EXCESS, BLOCK_USUAL * blocks.excess_usual), item.name))
    origins = {
        "block gain": (gains, "no other scale would make the error of a block so many times less"),
        "blocks with a gain of 4": (manies, "as many as chance and importances bring about"),
        "median block gain": (medians, "no other scales would make the error of most blocks so many times less"),
        "block excess": (excesses, "the error of a block is near the least that its kind of block can reach"),
    }
    result = []
    for name, (found, origin) in origins.items():
        if found:
            value, limit, where = _farthest(found)
            result.append(Bound.at_most(f"weights.{name}", value, limit, origin, where))
    return result


def _is_vector(item: TensorReport) -> bool:
    """Whether a tensor is a vector of factors, for which no format has codes: by what it is for, whatever its shape."""
    role = role_of(item.name)
    return len(item.shape) < 2 if role is None else not role.has_rows


def _farthest(found: Iterable[tuple[float, float, str]]) -> tuple[float, float, str]:
    """Of errors with their limits and names, the one that is largest beside its limit, or no number."""
    return max(found, key=lambda item: (math.isnan(item[0]), item[0] / item[1]))


def _step_limit(item: TensorReport) -> float:
    """How far wider codes may be from a tensor's weights, relative to the largest of them."""
    assert item.grid is not None
    steps = ROW_STEPS if item.grid.block == item.shape[-1] else BLOCK_STEPS
    return steps / ((1 << (item.grid.bits - 1)) - 1)


def _as_fitted(item: TensorReport, fitted: float) -> Bound:
    """The error of a matrix in the vector codec is the one that its fit measured: the codes that were read are its."""
    metric = f"weights.rms_relative_error of {item.name} as {item.codec}"
    origin = "the error that the fit of the codec measured"
    return Bound.at_most(metric, item.rms_relative_error or 0.0, fitted * (1 + CODEC_ROOM), origin)


def _vectors(tensors: Sequence[TensorReport]) -> list[Bound]:
    """Norms and scalars, which no format has codes for, and what was to be narrower: as near as its dtype is."""
    found = [(item.max_relative_error, _vector_limit(item), item.name) for item in tensors]
    if not found:
        return []
    error, limit, name = _farthest(found)
    origin = "norms, scalars and what was asked for in a narrower dtype are held in the dtype that the artefact stores"
    return [Bound.at_most("weights.max_relative_error of vectors", error, limit, origin, name)]


def _narrowed(item: TensorReport, plain: DType | None) -> bool:
    """Whether plain numbers are in the dtype that was asked for, which has no room for all of the source's."""
    return plain is not None and item.grid is None and item.dtype == plain not in ("f32", item.source_dtype)


def _vector_limit(item: TensorReport) -> float:
    """How far a vector may be from the source's; one that is stored in the source's dtype, or in f32, is all but it."""
    if item.requantized:
        return REQUANTIZED_VECTOR
    return VECTOR_STEPS["f32" if item.dtype == item.source_dtype else item.dtype]


def _listed(names: Iterable[str]) -> str | None:
    """The first few of some names, and how many more there are; None for none."""
    found = list(names)
    more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
    return ", ".join(found[:NAMED]) + more if found else None


def _must_be_exact(item: TensorReport, holds: Holds) -> bool:
    """Whether the artefact could hold this tensor as it is.

    A plain tensor that was put on a grid could not, nor could one whose grid has no container in the format, or whose
    scales were rounded to the dtype that the format prescribes, nor one that was quantized anew because somebody asked
    for it. An artefact without a grid that still differs is a plain one in a narrower dtype.
    """
    if item.requantized or _widened(item):
        return False
    if item.source_grid is not None and item.source_grid.lossless and holds(item.source_grid.grid(), item.shape[-1]):
        return not (item.scale_rounded and item.exact < item.compared)
    return item.grid is None and not _is_vector(item)


def _quantized_anew(item: TensorReport, holds: Holds, plain: DType | None) -> bool:
    """Whether codes were fitted to a tensor's values: as somebody asked, or since a plain one has no others."""
    if item.fitted_rms is not None or _widened(item):
        return False
    return item.requantized or not (_is_vector(item) or _narrowed(item, plain) or _must_be_exact(item, holds))


def _widened(item: TensorReport) -> bool:
    """Whether codes became wider ones with fewer scales, as in a format that knows one scale a row and no blocks."""
    source, stored = item.source_grid, item.grid
    if source is None or stored is None or not source.lossless or stored.kind == "vectors":
        return False
    return stored.block > source.block and stored.bits > source.bits


def _conversion(report: LogitsReport, floors: Mapping[str, Divergence], found: Validation, program: str) -> list[Bound]:
    """The bounds of what a program computed; `program` says in their names which, where it is not the first."""
    conversion = report.conversion
    if conversion is None:
        return []
    if report.arithmetic == "f32":
        return _in_f32(report, conversion, found, floors.get(found.played), program)
    metric = f"conversion.kld_mean in {report.arithmetic}{program}"
    # Integers made of f32 differ where the f32 does, and a program's own may differ more than by the order of a sum.
    own = (found.played,) if report.arithmetic == "static-activations" else ()
    noises = {name: floors[name] for name in (*NOISES.get(report.arithmetic, ()), *own) if name in floors}
    if not noises:
        origin = "a number: nothing was measured that tells how far this arithmetic takes a right artefact"
        return [Bound.at_most(metric, conversion.kld_mean, math.inf, origin)]
    (limit, multiple), noise = max((noise_limit(played), name) for name, played in noises.items())
    origin = f"{multiple} what PyTorch in {noise} differs from its f32 on the same tokens"
    return [Bound.at_most(metric, conversion.kld_mean, limit, origin)]


def _in_f32(
    report: LogitsReport, conversion: Divergence, found: Validation, played: Divergence | None, program: str
) -> list[Bound]:
    limit = f32_limit(None if played is None else played.kld_mean)
    multiple = f"{F32_FACTOR:g} times what PyTorch in {found.played} differs from its f32 on the run's own tokens"
    kld_origin = f"{multiple}, in the limits of docs/bounds.md"
    origin = "two right implementations in f32 choose the same tokens"
    where = None if found.departs is None else str(found.departs)
    agreement = conversion.top1_agreement if conversion.top1_but_ties is None else conversion.top1_but_ties
    # Of fewer than a thousand all but one: llama.cpp moves a position in 80 of a right artefact by more than a tie.
    share = min(F32_TOP1, (report.tokens - 1) / max(report.tokens, 1))
    result = [
        Bound.at_most(f"conversion.kld_mean in f32{program}", conversion.kld_mean, limit, kld_origin, where),
        Bound.at_least(f"conversion.top1_agreement but for ties in f32{program}", agreement, share, origin),
    ]
    if report.greedy is not None:
        origin = "the KV cache must not change what follows"
        result.append(
            Bound.at_least(f"greedy.equal in f32{program}", report.greedy.equal, report.greedy.tokens, origin)
        )
    return result
