"""Pass or fail, and why: every bound with the measurement that it comes from (docs/bounds.md tells the whole story)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from gemexport.formats.recipe import Recipe
from gemexport.formats.tensor import Grid
from gemexport.nodes import Validation
from gemexport.report import Bound, Divergence, LogitsReport, TensorReport, TokenizerReport

# Four times the largest mean KL divergence that was measured between right implementations in f32 (docs/bounds.md).
F32_KLD = 1e-5
F32_TOP1 = 0.999
# A runtime that rounds activations is held to what that rounding does in PyTorch, on the same weights and tokens.
NOISE_FACTOR = 2.0
NOISES = {
    "static-activations": ("f32-reordered",),
    "int8-activations-256": ("bf16", "int8-activations", "int8-activations-256"),
    "int8-activations": ("bf16", "int8-activations"),
    "bf16": ("bf16",),
    "f16": ("bf16",),
}
# Of a requantized matrix, relative to it: Q4_K to Q6_K stay below 0.2, the coarsest type of ggml below 0.7, and another
# matrix is at 1.4 (docs/kquants.md).
REQUANTIZED_RMS = 0.75
# Share of the texts; with Gemma 3's own tables llama.cpp gets 1.0 % of them wrong (docs/bounds.md).
RUNTIME_TEXTS = 0.02


Holds = Callable[[Grid, int], bool]


def bounds(
    found: Validation, floors: Mapping[str, Divergence], recipe: Recipe, holds: Holds = lambda grid, width: True
) -> tuple[Bound, ...]:
    """Every bound that an artefact is held to; `holds` tells whether its format has a container for a grid in rows of
    so many weights.
    """
    result = [*_weights(found, holds)]
    if found.tokenizer is not None:
        result += _tokenizer(found.tokenizer)
    if found.chat is not None:
        own = next((item for item in found.chat.differences if not item.runtime), None)
        origin = "the chat template must lay out every conversation as the checkpoint's does"
        origin += f", not so: {own.conversation}" if own else ""
        same = found.chat.equal + found.chat.runtime_only
        result.append(Bound.at_least("chat.equal", same, found.chat.conversations, origin))
    for logits in (found.logits, *found.more_logits):
        if logits is not None:
            result += _conversion(logits, floors)
    if recipe.max_kld is not None and found.logits is not None and found.logits.loss is not None:
        origin = f"the budget of the recipe {recipe.name}"
        result.append(Bound.at_most("loss.kld_mean", found.logits.loss.kld_mean, recipe.max_kld, origin))
    return tuple(result)


def _tokenizer(report: TokenizerReport) -> list[Bound]:
    """Tables equal, texts equal but for what the runtime itself gets wrong; of ordinary texts not even that."""
    shown = next((item for item in report.differences if not item.runtime), None)
    origin = "the same texts must give the same tokens" + (f", not so: {shown.text!r}" if shown else "")
    result = [
        Bound.at_least("tokenizer.equal", report.equal + report.runtime_only, report.texts, origin),
        Bound.at_most(
            "tokenizer.vocabulary differences", len(report.vocabulary), 0,
            "; ".join(report.vocabulary) or "the tables must be the checkpoint's",
        ),
    ]  # fmt: skip
    if report.runtime_only:
        origin = "of a right artefact the runtime reads every ordinary text as the checkpoint does"
        result.append(Bound.at_most("tokenizer.ordinary texts that differ", report.ordinary, 0, origin))
        origin = "more than twice what llama.cpp gets wrong with Gemma's own tables would be another tokenizer"
        share = report.runtime_only / report.texts
        result.append(Bound.at_most("tokenizer.runtime_only share", share, RUNTIME_TEXTS, origin))
    return result


def _weights(found: Validation, holds: Holds) -> list[Bound]:
    """Nothing missing; what lies on the source's lattice, or has no grid at all, kept its values, the rest is near."""
    report = found.weights
    held = [item for item in report.tensors if _must_be_exact(item, holds)]
    moved = [item for item in report.tensors if _widened(item)]
    result = [Bound.at_most("weights.missing", len(report.missing), 0, "an artefact holds every tensor of the decoder")]
    if held:
        share = sum(item.exact for item in held) / max(sum(item.compared for item in held), 1)
        origin = "no weight changes its value unless the format cannot hold it"
        result.append(Bound.at_least("weights.exact_fraction", share, 1.0, origin))
    errors = [item.rms_relative_error or 0.0 for item in report.tensors if item.requantized]
    if errors:
        worst = max(errors, key=lambda error: (math.isnan(error), error))
        origin = "a matrix that was quantized anew is still nearer to the source's than another one would be"
        result.append(Bound.at_most("weights.rms_relative_error", worst, REQUANTIZED_RMS, origin))
    if moved:
        bits = min(item.grid.bits for item in moved if item.grid is not None)
        # Rounding costs half a step, and least squares may clip a block's largest weight by half a step more.
        limit = 1 / ((1 << (bits - 1)) - 1)
        worst = max(item.max_relative_error for item in moved)
        origin = f"a step of the {bits}-bit codes that the format has instead"
        result.append(Bound.at_most("weights.max_relative_error of requantized tensors", worst, limit, origin))
    return result


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
    return item.grid is None and len(item.shape) == 2


def _widened(item: TensorReport) -> bool:
    """Whether codes became wider ones with fewer scales, as in a format that knows one scale a row and no blocks."""
    source, stored = item.source_grid, item.grid
    if source is None or stored is None or not source.lossless:
        return False
    return stored.block > source.block and stored.bits > source.bits


def _conversion(report: LogitsReport, floors: Mapping[str, Divergence]) -> list[Bound]:
    conversion = report.conversion
    if conversion is None:
        return []
    if report.arithmetic == "f32":
        return _in_f32(report, conversion)
    noises = {name: floors[name] for name in NOISES.get(report.arithmetic, ()) if name in floors}
    if not noises:
        return []
    noise, floor = max(noises.items(), key=lambda item: item[1].kld_mean)
    origin = f"{NOISE_FACTOR:g} times what PyTorch in {noise} differs from its f32 on the same tokens"
    metric = f"conversion.kld_mean in {report.arithmetic}"
    return [Bound.at_most(metric, conversion.kld_mean, NOISE_FACTOR * floor.kld_mean, origin)]


def _in_f32(report: LogitsReport, conversion: Divergence) -> list[Bound]:
    origin = "two right implementations in f32 are closer than that"
    # One position may be a tie that rounding decides.
    share = min(F32_TOP1, 1 - 1 / max(report.tokens, 1))
    result = [
        Bound.at_most("conversion.kld_mean in f32", conversion.kld_mean, F32_KLD, origin),
        Bound.at_least("conversion.top1_agreement in f32", conversion.top1_agreement, share, origin),
    ]
    if report.greedy is not None:
        origin = "the KV cache must not change what follows"
        result.append(Bound.at_least("greedy.equal in f32", report.greedy.equal, report.greedy.tokens, origin))
    return result
