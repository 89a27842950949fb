"""How far apart two right implementations are: every number that a verdict rests on, each measured (docs/bounds.md).

`benchmarks/faults.py clean` measures the distances between right implementations anew, over seeds and shapes.
"""

from __future__ import annotations

# Four times the largest mean KL divergence, in nats, that was measured between right implementations in f32.
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
# Of a norm's or a scalar's largest value: what rounding to the dtype that holds it costs, with room for the 1 that some
# formats add to a norm's weights before they round. As 8-bit integers, half a step of the range.
VECTOR_STEPS = {"f32": 2.0**-16, "f16": 2.0**-9, "bf16": 2.0**-7}
REQUANTIZED_VECTOR = 1 / 255
# Choices between tokens whose logits are closer than this are ties that rounding decides: logits that are F32_KLD apart
# are off by about sqrt(2 * F32_KLD) = 4.5e-3 nats, and there are two of them (1e-3 failed one of 204 right artefacts).
TIE_NATS = 1e-2
# Share of the texts that the runtime alone may read differently; with Gemma 3's own tables llama.cpp does 1.0 % so.
RUNTIME_TEXTS = 0.02
# What a layer's output may be off by in f32, root mean square over its size. llama.cpp looks GELU up in f16.
LAYER_ERROR = 1e-4
LAYER_ERRORS = {"gguf": 1e-2}
# Of a matrix in the vector codec: what its fit measured, and room for another order of the same sum in float64. A wrong
# code among the 587 million of E2B's table at 2x8, a vector as long as the right one, moves it by some 1e-8.
CODEC_ROOM = 1e-9
