"""What the steps of a run take of the memory, in anonymous bytes; estimates, made before anything runs.

Peaks as a run itself measures them (gemexport/shared/memory.py): what libraries take, which tiny models show, what is
held of a tokenizer, and slices, layers or logits. `benchmarks/plans.py` holds them against runs.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

from gemexport.engine.disk import artifact_bytes, lying
from gemexport.engine.scheduler import KEPT_BYTES
from gemexport.formats.checkpoint import Checkpoint
from gemexport.formats.storage.parallel import IN_FLIGHT, SLICE
from gemexport.formats.storage.parallel import room as room_for
from gemexport.request import Step
from gemexport.validators.checks.prompts import sequence_length
from gemexport.validators.runtimes.memory import LIBRARIES, Room, room, sizes

SEARCH_BYTES = 66 << 20  # of an interpreter with NumPy and the compiled loops
# Of one with the libraries of an export, by format.
EXPORTS = {"gguf": 72 << 20, "mlx": 68 << 20, "onnx": 117 << 20, "coreml": 305 << 20, "compressed-tensors": 68 << 20}
ROUNDS = 300 << 20  # of one with PyTorch, transformers, tokenizers and the loops that choose codes
CALIBRATED = 1 << 16  # tokens, more than any sequence has
COMMAND = 124 << 20  # of the command itself, which waits for its steps; rounded up
READ_ANEW = 2304  # bytes of a token, as tokenizer.json is parsed and read by tokenizers
ENCODES = 1290  # bytes of a token, of a tokenizer that encodes and of which nothing else is read
SPELT = 1152  # bytes of a token, as a GGUF file's tables are made of tokenizer.json
LISTED = 200  # bytes of a token in the tables of a GGUF file that is the source
HEAD = 64 << 20  # bytes of the head's rows that the reference takes at a time, in f32


def search_memory(checkpoint: Checkpoint) -> int:
    """What finding grids takes: slices of a matrix in each thread, fewer of one that has its codes already."""
    coded, plain = (_largest(checkpoint, coded) for coded in (True, False))
    # Weights, their scales over and over, codes, and what these are off by.
    slices = min(max(5 * 4 * plain, 2 * 4 * coded), (14 << 20) + 2 * SLICE * _threads())
    return SEARCH_BYTES + _source(checkpoint) + slices


def export_memory(checkpoint: Checkpoint, target: str, before: Sequence[str] = ()) -> int:
    """What writing an artefact takes: libraries, slices of a matrix, for GGUF its tables of tokens before these.

    Its process may have written artefacts of the targets `before` it, and still hold their libraries.
    """
    tables = SPELT * checkpoint.architecture.vocab_size if target == "gguf" else 0
    shared = [taken for name in before if (taken := EXPORTS.get(name, SEARCH_BYTES)) <= KEPT_BYTES]
    own = max([EXPORTS.get(target, SEARCH_BYTES), *shared])
    return own + _source(checkpoint) + max(tables, _slices(checkpoint, 48 << 20))


def _slices(checkpoint: Checkpoint, held: int) -> int:
    """What slices of the largest matrix take in all threads, with what is held of those before."""
    coded, plain = (_largest(checkpoint, coded) for coded in (True, False))
    return min(max(3 * 4 * plain, 2 * 4 * coded), held + 2 * SLICE * _threads())


def _largest(checkpoint: Checkpoint, coded: bool) -> int:
    """Weights of the largest tensor that has codes in its file, or has none; 0 where there is no such tensor."""
    found = (tensor for tensor in checkpoint.tensors.values() if (tensor.grid is not None) == coded)
    return max((math.prod(tensor.shape) for tensor in found), default=0)


def _threads() -> int:
    return min(os.cpu_count() or 1, IN_FLIGHT // SLICE)


def _source(checkpoint: Checkpoint) -> int:
    """What is held of a source whose tables of tokens every step reads."""
    return LISTED * checkpoint.architecture.vocab_size if checkpoint.files else 0


def validator_room(checkpoint: Checkpoint, tokens: int, step: Step) -> Room:
    """What the programs take that an artefact is judged in: at least the first of them, at most any.

    Its size is that of what lies there, or of what is going to.
    """
    weights = checkpoint.architecture.parameters()
    stored = (lying(step.path) or artifact_bytes(checkpoint.tensors, step.variant)) / weights
    found = sizes(checkpoint.model, sequence_length(checkpoint.architecture, tokens), stored)
    static = checkpoint.activations is not None
    programs = [room(program, found) for program in step.target.programs(step.variant, static)]
    source = _source(checkpoint)
    return Room(programs[0].least + source, max(program.most for program in programs) + source)


def judging_memory(checkpoint: Checkpoint) -> int:
    """What judging weights and words takes, where no program runs."""
    return LIBRARIES + READ_ANEW * checkpoint.architecture.vocab_size + _source(checkpoint)


def multiplied(checkpoint: Checkpoint) -> int:
    """The weights that something is multiplied with: a copy of an artefact to compute in f32 has these in that."""
    return sizes(checkpoint.model, 0, 0).matrices


def reference_memory(checkpoint: Checkpoint, tokens: int) -> int:
    """What the reference takes: tokenizer, libraries, and the largest layer in f32 with what it makes of a sequence.

    Or, where that is more, some rows of the head in f32, and rounded as whoever plays a program has them.
    """
    decoder, length = checkpoint.architecture, sequence_length(checkpoint.architecture, tokens)
    # A layer as f32 and, for whoever plays bf16, as that; with static activations f64 is played too.
    each = 12 if checkpoint.activations else 6
    layer = each * sizes(checkpoint.model, length, 0).layer + _made(checkpoint, length)
    head = 2 * min(HEAD, 4 * decoder.vocab_size * decoder.hidden_size)
    return judging_memory(checkpoint) + max(layer, head)


def _made(checkpoint: Checkpoint, length: int) -> int:
    """What a layer makes of a sequence, in f32."""
    decoder = checkpoint.architecture
    wide = max(layer.intermediate_size for layer in decoder.layers)
    # Scores before and after the mask and the softmax; the feed-forward's gate, its activation, up, and their product.
    return 4 * length * max(3 * decoder.heads * length, 4 * wide)


def rounding_memory(checkpoint: Checkpoint, widest: int, largest: int, block: int) -> int:
    """What choosing codes takes: a layer in f32 and what it makes of a sequence, H of the widest row and its factor,
    and what is made of slices of rows on the way (formats/grids/feedback.py), of blocks of so many weights.

    `largest` is the number of weights in the largest of the matrices, which need not fill a slice.
    """
    rows = max(SLICE, 4 * widest)
    slices = int(made_of_rows(widest, block) * min(rows * room_for(rows), 4 * largest))
    length = sequence_length(checkpoint.architecture, CALIBRATED)
    layer = 4 * sizes(checkpoint.model, length, 0).layer + _made(checkpoint, length)
    tokenizer = ENCODES * checkpoint.architecture.vocab_size
    return ROUNDS + tokenizer + _source(checkpoint) + layer + 8 * widest**2 + slices


def made_of_rows(width: int, block: int) -> float:
    """How many times the bytes of rows are taken while their codes are chosen.

    For codes these are weights in two orders, what they are off by, codes, and what goes into these: eight in all. For
    scales, the products of a row's blocks with each other, in f32 and, to be solved, in f64, beside weights and codes.
    """
    return max(8.0, 2 + 3 * width / block**2)


def sensitivity_memory(checkpoint: Checkpoint, tokens: int, widest: int) -> int:
    """What choosing widths takes: what the reference does, H of the widest row and its factor, and slices of rows in
    all widths.
    """
    return reference_memory(checkpoint, tokens) + 8 * widest**2 + 16 * IN_FLIGHT


def logits_memory(checkpoint: Checkpoint, tokens: int) -> int:
    """What a step takes that holds a model in f32 and logits of a sequence on both sides; libraries."""
    decoder = checkpoint.architecture
    logits = 4 * sequence_length(decoder, tokens) * decoder.vocab_size
    return 4 * decoder.parameters() + 2 * logits + judging_memory(checkpoint)
