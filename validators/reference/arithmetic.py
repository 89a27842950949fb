"""Other ways to compute what the reference computes, played by PyTorch: each shows how far it takes right programs.

All of them change how transformers' modules multiply, or the dtype of these: nothing else is computed otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from statistics import NormalDist
from typing import Any, Literal

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from gemexport.validators.reference import experts

Arithmetic = Literal[
    "f32", "f64", "bf16", "int8-activations", "int8-activations-256", "f32-reordered", "f32-f16-gelu",
    "f32-f16-constants",
]  # fmt: skip

DTYPES: dict[Arithmetic, torch.dtype] = {
    "f32": torch.float32,
    "f64": torch.float64,
    "bf16": torch.bfloat16,
    "int8-activations": torch.float32,
    "int8-activations-256": torch.float32,
    "f32-reordered": torch.float32,
    "f32-f16-gelu": torch.float32,
    "f32-f16-constants": torch.float32,
}
# Inputs of a row that are rounded together: those of ggml's Q8_0 and Q8_K, which its K-quants are multiplied with.
_ROUNDED: dict[Arithmetic, tuple[int, ...]] = {"int8-activations": (32,), "int8-activations-256": (256, 32)}


def install(model: Any, arithmetic: Arithmetic) -> None:
    """Make the linears and experts of `model` compute so from now on, whatever weights they are given."""
    if arithmetic == "f32-f16-gelu":
        for module in model.modules():
            function = getattr(module, "act_fn", None)
            if isinstance(function, torch.nn.Module):
                module.act_fn = _HalfTable(function)
            if hasattr(module, "_gaussian_topk"):
                module._gaussian_topk = partial(_above_of_samples, module.activation_sparsity)
    if arithmetic == "f32-f16-constants":
        _round_constants(model)
    if arithmetic in _ROUNDED:
        linear = _rounded_linear(_ROUNDED[arithmetic])
    elif arithmetic in ("f32-reordered", "f32-f16-constants"):
        linear = _in_turns
    else:
        return
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.forward = partial(_through, module, linear)  # type: ignore[method-assign]
    experts.install(model, linear)


@contextmanager
def computing(arithmetic: str, threads: int, gradients: bool = False) -> Iterator[None]:
    """Compute with so many threads, and keep nothing for gradients but for who asks."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode(not gradients), _Bf16Products() if arithmetic == "bf16" else nullcontext():
            yield
    finally:
        torch.set_num_threads(before)


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


def round_to_int8(x: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
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
    return lambda x, weight: functional.linear(round_to_int8(x, sizes), weight)


def _round_constants(model: Any) -> None:
    """Factors that a program in f16 has as f16 numbers, however it is evaluated: of per-layer inputs, of soft caps."""
    text, cap = model.get_decoder(), getattr(model.config, "final_logit_softcapping", None)
    if hasattr(text, "per_layer_input_scale"):
        given = text.per_layer_input_scale  # a number, or a tensor of one
        text.per_layer_input_scale = given.half().float() if isinstance(given, torch.Tensor) else _half(given)
    if cap is not None:
        model.get_output_embeddings().register_forward_hook(lambda _, inputs, logits: logits * (_half(1 / cap) * cap))
    for module in model.modules():
        if (of_scores := getattr(module, "attn_logit_softcapping", None)) is not None:
            root = module.head_dim**0.5
            for factor in (module.scaling * root, 1 / root, 1 / of_scores):  # of queries, of queries, of scores
                module.scaling *= _half(factor) / factor


def _half(value: float) -> float:
    return torch.tensor(value).half().item()


class _HalfTable(torch.nn.Module):
    """An activation function as ggml looks it up: by f16 numbers, of f16 numbers, and beyond ±10 the line it nears.

    `ggml_vec_gelu_f32` in ggml's vec.h, compiled with GGML_GELU_FP16, as it is.
    """

    def __init__(self, function: torch.nn.Module) -> None:
        super().__init__()
        self._function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        table = self._function(x.half().float()).half().float()
        return torch.where(x.abs() < 10, table, functional.relu(x))


def _above_of_samples(sparsity: float, x: torch.Tensor) -> torch.Tensor:
    """`Gemma3nTextMLP._gaussian_topk` as src/models/gemma3n.cpp has it: its deviation is of n - 1 numbers, not of n."""
    least = x.mean(-1, keepdim=True) + x.std(-1, keepdim=True, unbiased=True) * NormalDist().inv_cdf(sparsity)
    return functional.relu(x - least)


def _in_turns(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What a linear without bias computes, its sums taken of every second product, and of those between.

    Not in two halves: kernels take long rows in pieces, and where the halves are made of those, the sums are the same.
    """
    even, odd = (functional.linear(x[..., i::2].contiguous(), weight[:, i::2].contiguous()) for i in range(2))
    return even + odd
