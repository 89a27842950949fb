"""Runs a whole model of transformers, all of its weights in memory: logits, and a greedy continuation."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import transformers

from gemexport.formats.tensor import Floats, Tensor
from gemexport.validators.checks.habits import Habits
from gemexport.validators.reference.arithmetic import computing
from gemexport.validators.reference.decoder import Decoder, by_position
from gemexport.validators.runtimes.protocol import Arithmetic, Laps, Layout


def whole(text_config: Mapping[str, Any], tensors: Mapping[str, Tensor], threads: int | None = None) -> PyTorch:
    """The decoder that `text_config` describes, holding all of `tensors`, 4 bytes a weight, in f32.

    Raises ValueError when a tensor that the decoder needs is missing, or one that it does not know is given.
    """
    return PyTorch(Decoder(text_config, tensors).whole(), "f32", threads or os.cpu_count() or 1)


class PyTorch:
    """A transformers causal language model, asked for logits or for a greedy continuation."""

    def __init__(self, model: Any, arithmetic: Arithmetic, threads: int, name: str | None = None) -> None:
        self.name = name or f"transformers {transformers.__version__}, PyTorch {torch.__version__}"
        self.arithmetic: Arithmetic = arithmetic
        self._model = model.eval()
        self._threads = threads
        self.laps = Laps()

    def logits(self, tokens: Sequence[int]) -> Floats:
        """Teacher-forced logits `[len(tokens), vocab]`: row i is what follows tokens[: i + 1]."""
        with computing(self.arithmetic, self._threads):
            with self.laps.lap(len(tokens)):
                output = self._model(_row(tokens), use_cache=False)
            return np.ascontiguousarray(output.logits[0].float().numpy())

    def greedy(self, tokens: Sequence[int], count: int) -> list[int]:
        """The `count` most likely tokens after `tokens`, one at a time through the key/value cache."""
        continuation: list[int] = []
        step, cache = _row(tokens), None
        with computing(self.arithmetic, self._threads):
            while len(continuation) < count:
                with self.laps.lap(step.shape[1]):
                    output = self._model(step, past_key_values=cache, use_cache=True)
                continuation.append(int(output.logits[0, -1].argmax()))
                step, cache = _row(continuation[-1:]), output.past_key_values
        return continuation

    def hidden(self, tokens: Sequence[int]) -> list[Floats]:
        """What goes into the first layer and what each layer gives, `[layers + 1][n, hidden]`."""
        found: list[Floats] = []
        with computing(self.arithmetic, self._threads), _shown(self._model.model.layers, found):
            self._model(_row(tokens), use_cache=False)
        return found

    def tokenize(self, text: str) -> list[int] | None:
        """None: weights and a config have no tokenizer."""
        return None

    def habits(self) -> Habits | None:
        """None: whoever runs it has habits of their own."""
        return None

    def chat(self, layouts: Sequence[Layout]) -> list[str] | None:
        """None: and no chat template."""
        return None

    def close(self) -> None:
        """Let go of the weights."""
        self._model = None


def _row(tokens: Sequence[int]) -> torch.Tensor:
    return torch.tensor([list(tokens)], dtype=torch.long)


@contextmanager
def _shown(layers: Any, found: list[Floats]) -> Iterator[None]:
    """Add to `found` what goes into the first of these layers, and what each gives."""

    def keep(value: Any) -> None:
        tensor = value[0] if isinstance(value, tuple) else value
        found.append(np.ascontiguousarray(by_position(tensor).float().numpy()))

    hooks = [layers[0].register_forward_pre_hook(lambda _, inputs: keep(inputs[0]))]
    hooks += [layer.register_forward_hook(lambda _, inputs, output: keep(output)) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
