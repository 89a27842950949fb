"""What the steps of a run take of the memory, in anonymous bytes; estimates, made before anything runs."""

from __future__ import annotations

from gemexport.engine.disk import artifact_bytes, lying
from gemexport.formats.checkpoint import Checkpoint
from gemexport.formats.storage.parallel import IN_FLIGHT
from gemexport.request import Step
from gemexport.validators.checks.prompts import sequence_length
from gemexport.validators.runtimes.memory import INTERPRETER, Room, room, sizes

EXPORT_BYTES = 600 << 20  # of an interpreter with the libraries of an export, measured on Linux, rounded up


def validator_room(checkpoint: Checkpoint, tokens: int, step: Step) -> Room:
    """What the programs take that an artefact is judged in: at least the first of them, at most any.

    Its size is that of what lies there, or of what is going to.
    """
    weights = checkpoint.architecture.parameters()
    stored = (lying(step.path) or artifact_bytes(checkpoint.tensors, step.variant)) / weights
    found = sizes(checkpoint.model, sequence_length(checkpoint.architecture, tokens), stored)
    programs = [room(program, found) for program in (step.target.runtime, *step.target.second_runtimes)]
    return Room(programs[0].least, max(program.most for program in programs))


def multiplied(checkpoint: Checkpoint) -> int:
    """The weights that something is multiplied with: a copy of an artefact to compute in f32 has these in that."""
    return sizes(checkpoint.model, 0, 0).matrices


def reference_memory(checkpoint: Checkpoint, tokens: int) -> int:
    """What the reference takes: the largest layer in f32, what it makes of a sequence, libraries."""
    decoder, length = checkpoint.architecture, sequence_length(checkpoint.architecture, tokens)
    wide = max(layer.intermediate_size for layer in decoder.layers)
    # Scores before and after the mask and the softmax; the feed-forward's gate, its activation, up, and their product.
    made = length * max(3 * decoder.heads * length, 4 * wide)
    # A layer as f32 and, for whoever plays bf16, as that.
    return 6 * sizes(checkpoint.model, length, 0).layer + 4 * made + INTERPRETER


def rounding_memory(checkpoint: Checkpoint, tokens: int, widest: int) -> int:
    """What choosing codes takes: H of the widest row and its factor, and of slices of rows what is made on the way,
    beside what the reference takes.
    """
    return reference_memory(checkpoint, tokens) + 8 * widest**2 + 16 * IN_FLIGHT


def logits_memory(checkpoint: Checkpoint, tokens: int) -> int:
    """What a step takes that holds a model in f32 and logits of a sequence on both sides; libraries."""
    decoder = checkpoint.architecture
    logits = 4 * sequence_length(decoder, tokens) * decoder.vocab_size
    return 4 * decoder.parameters() + 2 * logits + INTERPRETER
