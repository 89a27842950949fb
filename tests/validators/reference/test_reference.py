"""The reference is transformers' own model: the same logits to the last bit, however the config is spelt."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers

from gemexport.formats.tensor import ArrayTensor, Tensor
from gemexport.validators.reference import reference
from gemexport.validators.reference.arithmetic import install, round_to_int8
from gemexport.validators.runtimes.pytorch import whole

TOKENS = [2, 17, 5, 99, 100, 3, 64, 42, 7, 11, 12, 13, 90, 91, 92, 93, 94, 95, 33, 34]

GEMMA3 = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 8,
    "query_pre_attn_scalar": 16, "sliding_window_pattern": 3,
}  # fmt: skip
GEMMA4 = {
    "vocab_size": 128, "vocab_size_per_layer_input": 128, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    "global_head_dim": 32, "hidden_size_per_layer_input": 16, "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True, "sliding_window": 8, "final_logit_softcapping": 30.0,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip
EXPERTS = {
    **GEMMA4, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "use_double_wide_mlp": False,
    "enable_moe_block": True, "num_experts": 6, "top_k_experts": 2, "moe_intermediate_size": 32,
}  # fmt: skip


GEMMA3N = {
    "vocab_size": 128, "vocab_size_per_layer_input": 96, "hidden_size": 32, "intermediate_size": [64, 64, 96, 64],
    "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 8,
    "hidden_size_per_layer_input": 16, "num_kv_shared_layers": 2, "laurel_rank": 8, "altup_active_idx": 1,
    "activation_sparsity_pattern": [0.95, 0.8, 0.0, 0.95], "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip


def _model(model_type: str, settings: dict[str, Any]) -> Any:
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(model_type, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.ndim < 2 and name.endswith(("norm.weight", "layer_scalar", "output_scale")):
                tensor.copy_(tensor + 0.2 * torch.rand_like(tensor))
    return model


def _tensors(model: Any) -> dict[str, Tensor]:
    state = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    return {name: ArrayTensor(name, value.numpy()) for name, value in state.items()}


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [("gemma3_text", GEMMA3), ("gemma4_text", GEMMA4), ("gemma4_text", EXPERTS), ("gemma3n_text", GEMMA3N)],
)
def test_is_the_same_model(model_type: str, settings: dict[str, Any]) -> None:
    model = _model(model_type, settings)
    with torch.inference_mode():
        expected = model(torch.tensor([TOKENS])).logits[0].numpy()
    old_spelling = {**settings, "model_type": model_type}
    for raw in (old_spelling, model.config.to_dict()):
        got = reference(raw, _tensors(model), 2)
        np.testing.assert_array_equal(got.logits(TOKENS), expected)
        assert got.arithmetic == "f32"


@pytest.mark.parametrize(
    ("model_type", "settings"), [("gemma3_text", GEMMA3), ("gemma4_text", GEMMA4), ("gemma3n_text", GEMMA3N)]
)
def test_greedy_follows_the_logits(model_type: str, settings: dict[str, Any]) -> None:
    model = whole({**settings, "model_type": model_type}, _tensors(_model(model_type, settings)), 2)
    tokens = TOKENS[:4]
    for token in model.greedy(tokens, 12):
        assert token == model.logits(tokens)[-1].argmax()
        tokens = [*tokens, token]
    assert model.greedy(TOKENS, 0) == []


def test_bf16_rounds_and_says_so() -> None:
    raw = {**GEMMA3, "model_type": "gemma3_text"}
    tensors = _tensors(_model("gemma3_text", GEMMA3))
    exact, rounded = reference(raw, tensors, 2), reference(raw, tensors, 2, dtype="bf16")
    assert rounded.arithmetic == "bf16"
    logits = rounded.logits(TOKENS)
    assert logits.dtype == np.float32
    difference = np.abs(logits - exact.logits(TOKENS)).max()
    assert 0 < difference < 0.1 * np.abs(logits).max()


@pytest.mark.parametrize(
    ("width", "sizes", "block"), [(512, (256, 32), 256), (96, (256, 32), 32), (96, (32,), 32), (48, (256, 32), None)]
)
def test_activations_are_rounded_in_the_widest_blocks_that_fit(
    width: int, sizes: tuple[int, ...], block: int | None
) -> None:
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((3, width)).astype(np.float32))
    rounded = round_to_int8(x, sizes)
    if block is None:
        assert rounded is x
        return
    scales = (x.reshape(3, -1, block).abs().amax(-1, keepdim=True) / 127).half().float()
    codes = rounded.reshape(3, -1, block) / scales
    assert (codes - codes.round()).abs().max() < 1e-4
    assert ((rounded - x).reshape(3, -1, block).abs() <= 0.501 * scales).all()


def test_wider_blocks_round_coarser() -> None:
    settings = {**GEMMA3, "hidden_size": 256, "intermediate_size": 256}
    raw, tensors = {**settings, "model_type": "gemma3_text"}, _tensors(_model("gemma3_text", settings))
    exact = reference(raw, tensors, 2).logits(TOKENS)
    errors = [
        float(np.square(reference(raw, tensors, 2, dtype=dtype).logits(TOKENS) - exact).mean())
        for dtype in ("int8-activations", "int8-activations-256")
    ]
    assert 0 < errors[0] < errors[1]


def test_experts_are_rounded_and_reordered_like_linears() -> None:
    raw, tensors = {**EXPERTS, "model_type": "gemma4_text"}, _tensors(_model("gemma4_text", EXPERTS))
    # Nothing but the experts is left that could change.
    same = {name: ArrayTensor(name, np.zeros_like(tensor.numpy())) if name.endswith("proj.weight") else tensor
            for name, tensor in tensors.items()}  # fmt: skip
    exact = reference(raw, same, 2).logits(TOKENS)
    reordered = reference(raw, same, 2, dtype="f32-reordered").logits(TOKENS)
    rounded = reference(raw, same, 2, dtype="int8-activations").logits(TOKENS)
    size = np.abs(exact).max()
    assert 0 < np.abs(reordered - exact).max() < 1e-5 * size
    assert 1e-5 * size < np.abs(rounded - exact).max() < 0.1 * size


def test_storage_settings_do_not_reach_the_model() -> None:
    raw = {**GEMMA3, "model_type": "gemma3_text", "dtype": "bfloat16", "quantization": {"bits": 4},
           "quantization_config": {"quant_method": "compressed-tensors"}}  # fmt: skip
    model = _model("gemma3_text", GEMMA3)
    with torch.inference_mode():
        expected = model(torch.tensor([TOKENS])).logits[0].numpy()
    np.testing.assert_array_equal(reference(raw, _tensors(model), 2).logits(TOKENS), expected)


def test_missing_and_unknown_tensors_are_named() -> None:
    raw = {**GEMMA3, "model_type": "gemma3_text"}
    tensors = _tensors(_model("gemma3_text", GEMMA3))
    without = {name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}
    with pytest.raises(ValueError, match=r"missing_keys.*model\.norm\.weight"):
        reference(raw, without, 2)
    with pytest.raises(ValueError, match=r"unexpected_keys.*model\.extra\.weight"):
        reference(raw, {**tensors, "model.extra.weight": tensors["model.norm.weight"]}, 2)


def test_gelu_is_looked_up_as_ggml_does_it() -> None:
    """By the f16 number next to x, to an f16 number; beyond ±10 it is 0 or x itself."""
    model = torch.nn.ModuleDict({"mlp": torch.nn.Module()})
    model["mlp"].act_fn = torch.nn.GELU(approximate="tanh")
    install(model, "f32-f16-gelu")
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.half)
    x = every[every.isfinite()].float()
    table = torch.nn.functional.gelu(x, approximate="tanh").half().float()
    expected = torch.where(x >= 10, x, torch.where(x <= -10, torch.zeros(()), table))
    torch.testing.assert_close(model["mlp"].act_fn(x), expected, rtol=0, atol=0)
    between = torch.tensor([1.00001, 12.34567, -9.99999])
    assert model["mlp"].act_fn(between)[:2].tolist() == [model["mlp"].act_fn(torch.ones(1)).item(), between[1].item()]


def test_constants_in_f16_are_as_far_off_as_the_soft_cap() -> None:
    raw, tensors = {**GEMMA4, "model_type": "gemma4_text"}, _tensors(_model("gemma4_text", GEMMA4))
    exact = reference(raw, tensors, 2).logits(TOKENS)
    rounded = reference(raw, tensors, 2, dtype="f32-f16-constants").logits(TOKENS)
    error = np.abs(rounded - exact).max() / np.abs(exact).max()
    assert 1e-5 < error < 2.0**-10, "an f16 number is off by 2^-11 of itself"
