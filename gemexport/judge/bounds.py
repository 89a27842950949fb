"""How far apart two right implementations are: every number that a verdict rests on, each measured (docs/bounds.md).

`benchmarks/faults.py clean` measures the distances between right implementations anew, over seeds and shapes.
"""

from __future__ import annotations

import math

from gemexport.shared.measured import Divergence, LossWord

# A runtime in f32 is held to so many times the mean KL divergence, in nats, that PyTorch shows when it plays that
# arithmetic on the run's own weights and tokens; to no less than the first of the two limits, and to no more than the
# second, which is far beyond what any model was seen to need. Where nothing was played the first alone holds.
F32_FACTOR = 5.0
F32_KLD = (1e-10, 1e-3)
F32_TOP1 = 0.999
# A runtime that rounds activations is held to what that rounding does in PyTorch, on the same weights and tokens: to
# twice its mean, or to what two means over so few positions differ by, in standard errors. Where a router chooses
# another expert a position is off by a nat, and of 128 positions it is three that make the mean.
NOISE_FACTOR, NOISE_ERRORS = 2.0, 4.0
NOISES = {
    "static-activations": ("f32-reordered", "f64"),
    "int8-activations-256": ("bf16", "int8-activations", "int8-activations-256"),
    "int8-activations": ("bf16", "int8-activations"),
    "bf16": ("bf16",),
    "f16": ("bf16",),
}
# Of a requantized matrix, relative to it: Q4_K to Q6_K stay below 0.2, the coarsest type of ggml below 0.7, and another
# matrix is at 1.4 (docs/kquants.md).
REQUANTIZED_RMS = 0.75
# Of somebody else's codes of plain weights, block by block (validators/checks/blocks.py, docs/bounds.md has the
# measurements). A gain: how many times less another scale would make a block's error. No program's file has a median
# above 1.1, more than one block in 1,500 above 4, or a block of more than 5 times what all but a thousandth stay below.
BLOCK_GAIN, BLOCK_USUAL, BLOCK_MEDIAN = 4.0, 6.0, 2.0
BLOCK_MANY = 0.002
# Excess: a block's error over the least that its kind reaches. GPTQ was seen at 36, scrambled codes of 4 bits at 124.
BLOCK_EXCESS = 60.0
# Of a norm's or a scalar's largest value: what rounding to the dtype that holds it costs, with room for the 1 that some
# formats add to a norm's weights before they round. As 8-bit integers, half a step of the range.
VECTOR_STEPS = {"f32": 2.0**-16, "f16": 2.0**-9, "bf16": 2.0**-7}
REQUANTIZED_VECTOR = 1 / 255
# Wider codes in place of a grid, in steps of the tensor's largest weight. With one scale a row, the largest weight at
# the largest code, rounding is half a step, and a float32 scale is off by 2^-24 of itself, times a code of up to 127.
# Least squares on f16 scales may clip a block's largest weight besides: 0.87 at most in 512,000 random weights, and
# 0.503 of those that were not clipped.
ROW_STEPS = 0.5 * (1 + 1e-4)
BLOCK_STEPS = 1.0
# Choices between tokens whose logits are closer than this are ties that rounding decides: which of them is likeliest
# says nothing, alone or in a greedy continuation. A KL divergence d is logits that are off by sqrt(2 d) nats, and there
# are two of them.
TIE_NATS = 1e-3
# Share of the texts that the runtime alone may read differently; with Gemma 3's own tables llama.cpp does 1.0 % so.
RUNTIME_TEXTS = 0.02
# What a layer's output may be off by in f32, root mean square over its size. llama.cpp looks GELU up in f16.
LAYER_ERROR = 1e-4
LAYER_ERRORS = {"gguf": 1e-2}
# Of a matrix in the vector codec: what its fit measured, and room for another order of the same sum in float64. A wrong
# code among the 587 million of E2B's table at 2x8, a vector as long as the right one, moves it by some 1e-8.
CODEC_ROOM = 1e-9

# What a loss is called: the first of these whose two limits hold in every kind of text, mean KL divergence in nats and
# the share of tokens that changed. `lossless` is what bf16 costs the source in this run, twice, since that is two draws
# of one noise; of a hundred tokens such noise changes two.
LOSS_NOISE, CHANGED = 2.0, 0.03
LOSSES: tuple[tuple[LossWord, float, float], ...] = (
    ("lossless", 0.0, 0.0),
    ("near", 0.02, 0.05),
    ("lossy", 0.25, 0.30),
    ("poor", math.inf, 1.0),
)

# The same of a text's vector, in 1 - cosine, means over texts. What a loss is called goes by its share of how far
# apart unrelated texts are (docs/bounds.md has what that does to the nearest text).
VECTOR_F32 = (1e-12, 1e-4)
VECTOR_LOSSES: tuple[tuple[LossWord, float], ...] = (
    ("lossless", 0.0),
    ("near", 0.01),
    ("lossy", 0.1),
    ("poor", math.inf),
)


def f32_limit(played: float | None) -> float:
    """The mean KL divergence that a runtime in f32 is held to, where PyTorch playing it is off by `played`."""
    least, most = F32_KLD
    return least if played is None else min(max(F32_FACTOR * played, least), most)


def noise_limit(played: Divergence) -> tuple[float, str]:
    """What a runtime that computes as PyTorch `played` is held to, and how that is called."""
    twice = NOISE_FACTOR * played.kld_mean
    drawn = played.kld_mean + NOISE_ERRORS * math.sqrt(2) * (played.kld_error or 0.0)
    return max((twice, f"{NOISE_FACTOR:g} times"), (drawn, f"{NOISE_ERRORS:g} standard errors beyond"))


def tie(played: Divergence | None) -> float:
    """The difference of two logits, in nats, below which a runtime in f32 may choose either.

    A choice is one position, and a mean says little of the farthest: PyTorch's own is as much as eleven times its mean.
    """
    farthest = 0.0 if played is None else min(played.kld_max, F32_KLD[1])
    limit = f32_limit(None if played is None else played.kld_mean)
    return max(TIE_NATS, 2 * math.sqrt(2 * max(limit, farthest)))
