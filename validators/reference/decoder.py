"""transformers' decoder without its weights, and what fills its modules with some of them for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import transformers

from gemexport.formats.activations import Activations
from gemexport.formats.gemma.architecture import TensorSpec
from gemexport.formats.gemma.embedder import Embedder
from gemexport.formats.gemma.model import architecture
from gemexport.formats.gemma.names import module_of
from gemexport.formats.tensor import Floats, Tensor, matrix_of, row_slices
from gemexport.validators.reference import activation_rounding
from gemexport.validators.reference.arithmetic import DTYPES, Arithmetic, install

# What a config says about how weights were stored: the weights given here are plain numbers already.
STORAGE_KEYS = ("quantization_config", "quantization", "dtype", "torch_dtype")


class Decoder:
    """transformers' causal language model of a config on the meta device, and the tensors that belong into it.

    `model` is that; `text` the model in it without the head, `embeddings` the tables of that by their names in it.
    Of an `embedder`, `dense` are the linears that a text's vector goes through, modules of `model` as well.
    """

    def __init__(
        self,
        text_config: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        arithmetic: Arithmetic = "f32",
        activations: Activations | None = None,
        embedder: Embedder | None = None,
    ) -> None:
        self.tensors, self.dtype = tensors, DTYPES[arithmetic]
        config = config_of(text_config)
        kind: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        attention = activation_rounding.attention_implementation(activations)
        with quiet(), torch.device("meta"):
            self.model = kind._from_config(
                config, attn_implementation=attention, experts_implementation="eager", dtype=self.dtype
            ).eval()
        self.text: Any = self.model.model
        self.embedder = embedder
        self.dense = [_attached(self.model, spec) for spec in (embedder.specs() if embedder else ())]
        self._names: dict[torch.nn.Module, str] = {module: name for name, module in self.model.named_modules()}
        embedding, head = (
            f"{self._names[module]}.weight"
            for module in (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        )
        self._tied = {head: embedding} if config.tie_word_embeddings else {}
        self._check(config.model_type)
        self.head = tensors[self._tied.get(head, head)]  # the matrix that gives the logits, `[vocab, hidden]`
        # Frequencies are in no checkpoint: they are computed when the module is made.
        self.text.rotary_emb = type(self.text.rotary_emb)(config)
        _make_constants(self.text)
        self.embeddings: dict[str, Any] = {
            name: module for name, module in self.text.named_children() if isinstance(module, torch.nn.Embedding)
        }
        install(self.model, arithmetic)
        if activations is not None:
            decoder = architecture(dict(text_config), config.model_type)
            activation_rounding.install(self.model, activations, decoder)

    def _check(self, model_type: str) -> None:
        """Raise ValueError unless the tensors are those that the modules need, in their shapes."""
        state = self.model.state_dict()
        needed = {name: tuple(value.shape) for name, value in state.items() if name not in self._tied}
        given = {name: tensor.shape for name, tensor in self.tensors.items()}
        wrong = {
            "missing_keys": sorted(needed.keys() - given.keys()),
            "unexpected_keys": sorted(given.keys() - needed.keys()),
            "mismatched_keys": sorted(name for name in needed.keys() & given.keys() if needed[name] != given[name]),
        }
        if any(wrong.values()):
            raise ValueError(f"the tensors do not make up a {model_type}: {wrong}")

    def name(self, module: torch.nn.Module) -> str:
        """What a module of `model` is called: its tensors' names begin with that."""
        return self._names[module]

    def whole(self) -> Any:
        """`model` with all of its weights, from now on."""
        weights = {name: self.read(tensor) for name, tensor in self.tensors.items()}
        weights |= {name: weights[other] for name, other in self._tied.items()}
        self.model.load_state_dict(weights, assign=True)
        for module in self.embeddings.values():
            module.embed_scale = torch.tensor(module.scalar_embed_scale)
        return self.model

    def weights(self, module: torch.nn.Module) -> dict[str, torch.Tensor]:
        """What `filled` gives a module of `model`, by the names in it."""
        return {name: self.read(self.tensors[f"{self._names[module]}.{name}"]) for name in module.state_dict()}

    @contextmanager
    def filled(self, module: torch.nn.Module, weights: Mapping[str, torch.Tensor] | None = None) -> Iterator[None]:
        """Give a module of `model` its weights as long as the block lasts; those that were read already, if given."""
        given = self.weights(module) if weights is None else weights
        module.load_state_dict({name: value.to(self.dtype) for name, value in given.items()}, assign=True)
        del given
        try:
            yield
        finally:
            module.to_empty(device="meta")

    def read(self, tensor: Tensor, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """The whole tensor, or rows of a matrix, read a piece at a time so that no second copy exists."""
        shape = tensor.shape if stop is None else (stop - start, tensor.shape[1])
        found = torch.empty(shape, dtype=self.dtype)
        rows = found.view(matrix_of(shape))
        for first, last in row_slices(shape):
            values = tensor.rows(start + first, start + last).values
            rows[first:last].copy_(torch.from_numpy(_writable(values)))
        return found

    def table(self, name: str, ids: list[int]) -> torch.nn.Module:
        """One of `embeddings` with only the rows `ids`, ascending: its id i looks up ids[i].

        An id that a table of fewer rows does not have looks up its first, as in transformers' models with such a table.
        """
        whole = self.embeddings[name]
        tensor = self.tensors[f"{self._names[whole]}.weight"]
        ids = [index if index < tensor.shape[0] else 0 for index in ids]
        found: torch.nn.Module = type(whole)(len(ids), tensor.shape[1], None, embed_scale=whole.scalar_embed_scale)
        rows = torch.empty((len(ids), tensor.shape[1]), dtype=self.dtype)
        for first, last in _runs(ids):
            values = tensor.rows(ids[first], ids[last - 1] + 1).values
            rows[first:last].copy_(torch.from_numpy(_writable(values)))
        found.weight = torch.nn.Parameter(rows, requires_grad=False)
        return found


def _attached(model: Any, spec: TensorSpec) -> torch.nn.Linear:
    """A new linear in `model`, under the name of its tensor, without weights."""
    place, _, inner = module_of(spec.name).rpartition(".")
    out, inside = spec.shape
    found = torch.nn.Linear(inside, out, bias=False, device="meta", dtype=model.dtype)
    holder = torch.nn.Module()
    holder.add_module(inner, found)
    model.add_module(place, holder)
    return found


def _make_constants(text: Any) -> None:
    """Give modules the numbers that are in no checkpoint and that they make of the config, as plain attributes.

    Those of embeddings and of rotary embeddings are made with these. Whoever fills and empties a module leaves
    attributes alone.
    """
    for module in text.modules():
        for name in sorted(module._non_persistent_buffers_set):
            value = getattr(module, name)
            if value.is_meta and not isinstance(module, torch.nn.Embedding):
                setattr(module, name, torch.empty_like(value, device="cpu"))
                text._init_weights(module)
                made = getattr(module, name)
                delattr(module, name)
                setattr(module, name, made)


def by_position(hidden: torch.Tensor) -> torch.Tensor:
    """`[n, width]` of hidden states of one sequence, `[1, n, hidden]`; of several streams `[streams, 1, n, hidden]`,
    beside each other.
    """
    return hidden[0] if hidden.ndim == 3 else hidden[:, 0].movedim(0, 1).flatten(1)


def _runs(ids: list[int]) -> Iterator[tuple[int, int]]:
    """Where ids that follow each other begin and end in the list."""
    start = 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or ids[i] != ids[i - 1] + 1:
            yield start, i
            start = i


def _writable(values: Floats) -> Floats:
    # What is mapped cannot be written to, and PyTorch has no tensors like that.
    return np.require(values, np.float32, ["C", "W"])


def config_of(text_config: Mapping[str, Any]) -> Any:
    """The transformers config, without what would make it quantize or cast the weights."""
    raw = {key: value for key, value in text_config.items() if key not in STORAGE_KEYS}
    return transformers.AutoConfig.for_model(raw.pop("model_type"), **raw)


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and load reports on the way: what is wrong is raised."""
    bars, level = transformers.utils.logging.is_progress_bar_enabled(), transformers.logging.get_verbosity()
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()
