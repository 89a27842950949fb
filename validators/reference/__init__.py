"""The reference: transformers' own text decoder in PyTorch, holding whichever weights it is given, a layer at a time.

A validator builds it from the source's tensors, which shows what the compression cost, and from those read
back out of an artefact, which shows whether a runtime computes what the artefact's numbers mean.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from gemexport.formats.activations import Activations
from gemexport.formats.gemma.embedder import Embedder
from gemexport.formats.storage.files import atomic
from gemexport.formats.tensor import Floats, Tensor
from gemexport.validators.reference.arithmetic import Arithmetic
from gemexport.validators.reference.columns import Columns
from gemexport.validators.reference.decoder import Decoder
from gemexport.validators.reference.walk import Walk, head_slices

__all__ = ["Arithmetic", "Reference", "reference", "write_together"]


def reference(
    text_config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    threads: int | None = None,
    *,
    dtype: Arithmetic = "f32",
    activations: Activations | None = None,
    embedder: Embedder | None = None,
) -> Reference:
    """The decoder that `text_config` describes, holding `tensors` (canonical names, canonical values).

    `text_config` is the decoder's own config.json, in the old or the new spelling, with its `model_type`
    (`gemma3_text`, `gemma4_text`). `activations` are rounded as the checkpoint, or the artefact, says. With an
    `embedder` it gives one vector of a sequence where others give logits.

    The other ways to compute exist to be measured against "f32": "bf16", as the checkpoint is served;
    "int8-activations", as llama.cpp multiplies: the inputs of every matrix rounded to 8 bits in blocks of 32, or, for
    K-quants ("int8-activations-256"), of 256 where these divide the row; "f32-reordered", which adds the products of a
    matrix in another order, as another implementation would; "f32-f16-gelu", which looks GELU up in a table of f16
    numbers, as llama.cpp does, and takes the deviation of sparse MLPs of n - 1 numbers; "f32-f16-constants", whose
    factors are f16 numbers, as Core ML has them; "f64", which is off by less than any of them, but where transformers
    computes in f32 itself: norms, angles, softmax.

    Raises ValueError when a tensor that the decoder needs is missing, or one that it does not know is given.
    """
    return Reference(Decoder(text_config, tensors, dtype, activations, embedder), dtype, threads or os.cpu_count() or 1)


class Reference:
    """A decoder that is asked for logits, or taken through layer by layer.

    Memory: one layer's weights, 2 to 8 bytes each, or a slice of the head, and what a layer makes of a sequence.
    """

    def __init__(self, decoder: Decoder, arithmetic: Arithmetic, threads: int) -> None:
        self.name = f"transformers {transformers.__version__}, PyTorch {torch.__version__}"
        self.arithmetic: Arithmetic = arithmetic
        self.decoder, self._threads = decoder, threads

    @contextmanager
    def walk(
        self, sequences: Sequence[Sequence[int]], beside: Path | None = None, keeps: bool = False
    ) -> Iterator[Walk]:
        """These sequences on their way through the layers; what waits lies in a folder in `beside`.

        Without one it lies where temporary files go.

        One that `keeps` what went into each layer can be gone back (`gradients`).
        """
        with tempfile.TemporaryDirectory(prefix="walk-", dir=beside) as folder:
            yield Walk(self.decoder, sequences, Path(folder), self.arithmetic, self._threads, keeps)

    def write_logits(
        self,
        sequences: Sequence[Sequence[int]],
        paths: Sequence[Path],
        progress: Callable[[int], None] = lambda positions: None,
    ) -> None:
        """Leave the teacher-forced logits of each sequence in a file of NumPy's, as `write_together`."""
        write_together([(self, sequences, paths)], progress)

    def logits(self, tokens: Sequence[int]) -> Floats:
        """The same of one sequence, in memory."""
        with tempfile.TemporaryDirectory(prefix="gemexport-") as folder:
            path = Path(folder) / "logits.npy"
            self.write_logits([tokens], [path])
            found: Floats = np.load(path)
            return found

    def hidden(self, tokens: Sequence[int], beside: Path | None = None) -> Iterator[Floats]:
        """What goes into the first layer and then what each layer gives, `[n, hidden]`, as it is asked for."""
        with self.walk([tokens], beside) as walk:
            yield from (found.float().numpy() for found in walk.embedded())
            for visit in walk.layers():
                yield from (found.float().numpy() for found in visit.outputs())


Wanted = tuple[Reference, Sequence[Sequence[int]], Sequence[Path]]  # sequences, and a file for each


def write_together(wanted: Sequence[Wanted], progress: Callable[[int], None] = lambda positions: None) -> None:
    """Leave the teacher-forced logits of sequences in files of NumPy's, `[n, vocab]` in f32, from several references.

    Row i is what follows tokens[: i + 1]; with an embedder there is one row, the text's vector `[1, size]`.
    The references hold the same tensors, and compute otherwise: each layer, and
    each slice of the head, is read once for all of them. Progress in positions, once for each layer and once for the
    head.
    """
    with ExitStack() as held:
        walks = [held.enter_context(each.walk(sequences, paths[0].parent)) for each, sequences, paths in wanted]
        counts = [sum(map(len, sequences)) for _, sequences, _ in wanted]
        # One in bf16 could not give its weights to one in f32.
        wide = max((each.decoder for each, *_ in wanted), key=lambda decoder: decoder.dtype.itemsize)
        for index, module in enumerate(wide.text.layers):
            weights = wide.weights(module)
            for walk, count in zip(walks, counts, strict=True):
                with walk.layer(index, weights):
                    pass
                progress(count)
            del weights
        if wide.embedder is not None:
            _write_vectors(walks, [paths for *_, paths in wanted])
        else:
            _write_logits(walks, wanted, wide, held)
        for count in counts:
            progress(count)


def _write_logits(walks: Sequence[Walk], wanted: Sequence[Wanted], wide: Decoder, held: ExitStack) -> None:
    """The head, a slice of its rows at a time."""
    files = [
        [
            held.enter_context(Columns(held.enter_context(atomic(path)), (len(tokens), wide.head.shape[0])))
            for tokens, path in zip(sequences, paths, strict=True)
        ]
        for _, sequences, paths in wanted
    ]
    for walk in walks:
        held.enter_context(walk.head())
    for start, stop in head_slices(wide.head.shape):
        weight = wide.read(wide.head, start, stop)
        for walk, own in zip(walks, files, strict=True):
            for number, found in walk.slice(weight):
                own[number].write(start, found.numpy())


def _write_vectors(walks: Sequence[Walk], paths: Sequence[Sequence[Path]]) -> None:
    """What becomes of each text after the last layer."""
    for walk, own in zip(walks, paths, strict=True):
        for path, vector in zip(own, walk.vectors(), strict=True):
            with atomic(path) as partial, partial.open("wb") as file:
                np.save(file, vector.numpy()[None])
