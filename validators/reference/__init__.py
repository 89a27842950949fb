"""The reference model: transformers' own text decoder in float32, holding whichever weights it is given.

A validator builds it from the source's tensors, which shows what the compression cost, and from those read
back out of an artefact, which shows whether a runtime computes what the artefact's numbers mean.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import transformers
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from gemexport.formats.activations import Activations
from gemexport.formats.gemma.model import architecture
from gemexport.formats.tensor import Floats, Tensor, matrix_of, slices
from gemexport.validators.reference import activation_rounding, experts
from gemexport.validators.runtimes import protocol as runtime
from gemexport.validators.runtimes.protocol import Laps, Layout

Arithmetic = Literal["f32", "bf16", "int8-activations", "int8-activations-256", "f32-reordered"]

DTYPES: dict[Arithmetic, torch.dtype] = {
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "int8-activations": torch.float32,
    "int8-activations-256": torch.float32,
    "f32-reordered": torch.float32,
}
# Inputs of a row that are rounded together: those of ggml's Q8_0 and Q8_K, which its K-quants are multiplied with.
_ROUNDED: dict[Arithmetic, tuple[int, ...]] = {"int8-activations": (32,), "int8-activations-256": (256, 32)}

# What a config says about how weights were stored: the weights given here are plain numbers already.
STORAGE_KEYS = ("quantization_config", "quantization", "dtype", "torch_dtype")


def reference(
    text_config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    threads: int | None = None,
    *,
    dtype: Arithmetic = "f32",
    activations: Activations | None = None,
) -> Reference:
    """The decoder that `text_config` describes, holding `tensors` (canonical names, canonical values).

    `text_config` is the decoder's own config.json, in the old or the new spelling, with its `model_type`
    (`gemma3_text`, `gemma4_text`). `activations` are rounded as the checkpoint, or the artefact, says.

    The other ways to compute exist to be measured against "f32": "bf16", as the checkpoint is served;
    "int8-activations", as llama.cpp multiplies: the inputs of every matrix rounded to 8 bits in blocks of 32, or, for
    K-quants ("int8-activations-256"), of 256 where these divide the row; and "f32-reordered", which adds the products
    of a matrix in another order, as another implementation would. Memory: one copy of the weights, 4 or 2 bytes each,
    and in bf16 the widest one in f32.

    Raises ValueError when a tensor that the decoder needs is missing, or one that it does not know is given.
    """
    config = _config(text_config)
    weights = {name: _materialise(tensor, DTYPES[dtype]) for name, tensor in tensors.items()}
    # With a state dict, from_pretrained builds the module on the meta device, hangs these very tensors into
    # it, ties the embeddings, and recomputes the buffers that no checkpoint holds (RoPE, embedding scales).
    decoder: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with quiet():
        model, report = decoder.from_pretrained(
            None,
            config=config,
            state_dict=weights,
            dtype=DTYPES[dtype],
            attn_implementation=activation_rounding.attention_implementation(activations),
            experts_implementation="eager",
            output_loading_info=True,
        )
    complaints = ("missing_keys", "unexpected_keys", "mismatched_keys")
    wrong = {complaint: sorted(map(str, report[complaint])) for complaint in complaints}
    if any(wrong.values()):
        raise ValueError(f"the tensors do not make up a {config.model_type}: {wrong}")
    linear = _rounded_linear(_ROUNDED[dtype]) if dtype in _ROUNDED else _in_halves
    if dtype in _ROUNDED or dtype == "f32-reordered":
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.forward = partial(_through, module, linear)  # type: ignore[method-assign]
        experts.install(model, linear)
    if activations is not None:
        activation_rounding.install(model, activations, architecture(dict(text_config), config.model_type))
    return Reference(model, dtype, threads or os.cpu_count() or 1)


class _Bf16Products(TorchFunctionMode):
    """Products of bf16 matrices as kernels compute them: summed in f32, the result rounded.

    PyTorch's own kernels do the same sums in another order, but without AVX-512 they take four times as long.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in _PRODUCTS or args[0].dtype is not torch.bfloat16:
            return func(*args, **(kwargs or {}))
        wide = [item.float() if isinstance(item, torch.Tensor) else item for item in args]
        return func(*wide, **(kwargs or {})).to(torch.bfloat16)


_PRODUCTS = (functional.linear, torch.matmul)


def _round_to_int8(x: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
    """`x` `[…, in]` rounded to 8-bit codes on one f16 scale a block, of the first of `sizes` that divides the row.

    Blocks of 32 are ggml's Q8_0, blocks of 256 its Q8_K but for the scale, which is f32 there (ggml-common.h).
    """
    block = next((size for size in sizes if x.shape[-1] % size == 0), None)
    if block is None:
        return x
    blocks = x.reshape(*x.shape[:-1], -1, block)
    scale = (blocks.abs().amax(-1, keepdim=True) / 127).half().float()
    codes = torch.where(scale > 0, blocks / scale, 0).round().clamp(-128, 127)
    return (codes * scale).reshape(x.shape)


def _through(module: torch.nn.Linear, linear: experts.Linear, x: torch.Tensor) -> torch.Tensor:
    """What a linear without bias computes by another way of multiplying."""
    return linear(x, module.weight)


def _rounded_linear(sizes: tuple[int, ...]) -> experts.Linear:
    """What a linear without bias computes of inputs that are rounded to 8 bits."""
    return lambda x, weight: functional.linear(_round_to_int8(x, sizes), weight)


def _in_halves(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What a linear without bias computes, its sums taken in two halves."""
    half = weight.shape[1] // 2
    return functional.linear(x[..., :half], weight[:, :half]) + functional.linear(x[..., half:], weight[:, half:])


class Reference:
    """A transformers causal language model, asked for logits or for a greedy continuation."""

    def __init__(
        self, model: Any, arithmetic: Arithmetic | runtime.Arithmetic, threads: int, name: str | None = None
    ) -> None:
        self.name = name or f"transformers {transformers.__version__}, PyTorch {torch.__version__}"
        self.arithmetic: Arithmetic | runtime.Arithmetic = arithmetic
        self._model = model.eval()
        self._threads = threads
        self.laps = Laps()

    def logits(self, tokens: Sequence[int]) -> Floats:
        """Teacher-forced logits `[len(tokens), vocab]`: row i is what follows tokens[: i + 1]."""
        with self._running():
            with self.laps.lap(len(tokens)):
                output = self._model(_row(tokens), use_cache=False)
            return np.ascontiguousarray(output.logits[0].float().numpy())

    def greedy(self, tokens: Sequence[int], count: int) -> list[int]:
        """The `count` most likely tokens after `tokens`, one at a time through the key/value cache."""
        continuation: list[int] = []
        step, cache = _row(tokens), None
        with self._running():
            while len(continuation) < count:
                with self.laps.lap(step.shape[1]):
                    output = self._model(step, past_key_values=cache, use_cache=True)
                continuation.append(int(output.logits[0, -1].argmax()))
                step, cache = _row(continuation[-1:]), output.past_key_values
        return continuation

    def hidden(self, tokens: Sequence[int]) -> list[Floats]:
        """What goes into the first layer and what each layer gives, `[layers + 1][n, hidden]`."""
        layers = self._model.model.layers
        found: list[Floats] = []

        def keep(value: Any) -> None:
            tensor = value[0] if isinstance(value, tuple) else value
            found.append(np.ascontiguousarray(tensor[0].float().numpy()))

        hooks = [layers[0].register_forward_pre_hook(lambda _, inputs: keep(inputs[0]))]
        hooks += [layer.register_forward_hook(lambda _, inputs, output: keep(output)) for layer in layers]
        try:
            with self._running():
                self._model(_row(tokens), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def tokenize(self, text: str) -> list[int] | None:
        """None: weights and a config have no tokenizer."""
        return None

    def chat(self, layouts: Sequence[Layout]) -> list[str] | None:
        """None: and no chat template."""
        return None

    def close(self) -> None:
        """Let go of the weights."""
        self._model = None

    @contextmanager
    def _running(self) -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            with torch.inference_mode(), _Bf16Products() if self.arithmetic == "bf16" else nullcontext():
                yield
        finally:
            torch.set_num_threads(before)


def _row(tokens: Sequence[int]) -> torch.Tensor:
    return torch.tensor([list(tokens)], dtype=torch.long)


def _config(text_config: Mapping[str, Any]) -> Any:
    """The transformers config, without what would make it quantize or cast the weights."""
    raw = {key: value for key, value in text_config.items() if key not in STORAGE_KEYS}
    return transformers.AutoConfig.for_model(raw.pop("model_type"), **raw)


def _materialise(tensor: Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor's values as a torch tensor, filled by slices of rows so that no second copy exists."""
    whole = torch.empty(tensor.shape, dtype=dtype)
    rows = whole.view(matrix_of(tensor.shape))
    for start, stop in slices(tensor):
        # What is mapped cannot be written to, and PyTorch has no tensors like that.
        values = np.require(tensor.rows(start, stop).values, np.float32, ["C", "W"])
        rows[start:stop].copy_(torch.from_numpy(values))
    return whole


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
