"""An ONNX model that makes one vector of a text, in ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gemexport.formats.onnx import EMBEDDING_OUTPUT
from gemexport.validators.runtimes.onnxruntime import OnnxModel

# Positions after a text's end, as beside a longer text in a batch: they must change nothing.
FILLED = 3


class OnnxEncoder(OnnxModel):
    """One graph: input_ids and attention_mask in; a text's vector among its outputs."""

    def vector(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """A text's vector `[1, size]`, with a few positions to fill up a batch after it."""
        (found,) = self._encode_ids([*tokens, *[0] * FILLED], len(tokens), [EMBEDDING_OUTPUT])
        return np.asarray(found, np.float32)

    def hidden(self, tokens: Sequence[int]) -> list[NDArray[np.float32]] | None:
        """What goes into the first layer and what each gives, `[layers + 1][n, hidden]`; None for other graphs."""
        with self._shown() as names:
            return [found[0] for found in self._encode_ids(tokens, len(tokens), names)] if names else None

    def _encode_ids(self, tokens: Sequence[int], held: int, names: Sequence[str]) -> list[NDArray[np.float32]]:
        """These outputs, of which the first `held` tokens are a text."""
        mask = (np.arange(len(tokens)) < held).astype(np.int64)
        with self.laps.lap(held):
            found = self.session.run(
                list(names), {"input_ids": np.asarray(tokens, np.int64)[None], "attention_mask": mask[None]}
            )
        return [np.asarray(value) for value in found]
