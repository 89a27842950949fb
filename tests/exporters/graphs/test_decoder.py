"""The decoder description is the model: computed eagerly, it gives transformers' logits."""

from __future__ import annotations

from typing import Any

import pytest

from gemexport.exporters.graphs.decoder import logits, vectors
from gemexport.formats.gemma.architecture import Architecture, Layer
from gemexport.formats.gemma.embedder import MODULES
from gemexport.formats.gemma.model import EMBEDDING, architecture, describe

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "sliding_window": 5,
    "max_position_embeddings": 256,
}
SLIDING, FULL = "sliding_attention", "full_attention"
GEMMA3 = COMMON | {
    "num_hidden_layers": 3,
    "layer_types": [SLIDING, SLIDING, FULL],
    "query_pre_attn_scalar": 48,
    "rope_parameters": {
        SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
        FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
    },
}
E2B = COMMON | {
    "num_hidden_layers": 6,
    "layer_types": [SLIDING, FULL, SLIDING, FULL, SLIDING, FULL],
    "num_key_value_heads": 1,
    "global_head_dim": 64,
    "num_kv_shared_layers": 3,
    "use_double_wide_mlp": True,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 80,
    "final_logit_softcapping": 30.0,
}
K_EQ_V = COMMON | {
    "num_hidden_layers": 4,
    "layer_types": [SLIDING, FULL, SLIDING, FULL],
    "global_head_dim": 64,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
    "tie_word_embeddings": False,
}
EXPERTS = K_EQ_V | {
    "enable_moe_block": True,
    "num_experts": 7,
    "top_k_experts": 3,
    "moe_intermediate_size": 48,
}
UNIFIED = {key: value for key, value in K_EQ_V.items() if key != "hidden_size_per_layer_input"}
GEMMA2 = COMMON | {
    "num_hidden_layers": 4,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
    "query_pre_attn_scalar": 48,
}

GEMMA1 = COMMON | {"num_hidden_layers": 3}
GEMMA3N = COMMON | {
    "num_hidden_layers": 6,
    "intermediate_size": [96, 128, 96, 96, 64, 96],
    "layer_types": [SLIDING, FULL, SLIDING, FULL, SLIDING, FULL],
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 64,
    "laurel_rank": 8,
    "activation_sparsity_pattern": [0.95, 0.7, 0.0, 0.95, 0.0, 0.2],
}
ANOTHER_STREAM = GEMMA3N | {"altup_num_inputs": 3, "altup_active_idx": 1}


class Eager:
    """The decoder's operations in PyTorch, computed at once."""

    def __init__(self, a: Architecture, weights: dict[str, Any], ids: Any) -> None:
        self.a, self.weights, self.ids = a, weights, ids
        self.cache: dict[int, tuple[Any, Any]] = {}

    def embedding(self, weight: str, scale: float) -> Any:
        ids = torch.where(self.ids < len(self.weights[weight]), self.ids, 0)
        return self.weights[weight][ids] * scale

    def linear(self, x: Any, weight: str) -> Any:
        return x @ self.weights[weight].T

    def rms_norm(self, x: Any, weight: str | None, eps: float, offset: float) -> Any:
        x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
        return x if weight is None else x * (self.weights[weight] + offset)

    def split(self, x: Any, parts: int) -> Any:
        return x.unflatten(-1, (parts, -1))

    def merge(self, x: Any) -> Any:
        return x.flatten(-2)

    def part(self, x: Any, index: int) -> Any:
        return x[..., index, :]

    def rotary(self, x: Any, layer: Layer) -> Any:
        frequencies = torch.from_numpy(layer.rope.inv_freq(layer.head_dim)).float()
        angles = torch.arange(x.shape[1])[:, None, None] * frequencies
        a, b = x.chunk(2, -1)
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)

    def remember(self, k: Any, v: Any, layer: Layer) -> None:
        self.cache[layer.index] = k, v

    def attention(self, q: Any, layer: Layer, scale: float, softcap: float | None) -> Any:
        groups = self.a.heads // layer.kv_heads
        k, v = (x.repeat_interleave(groups, 2) for x in self.cache[layer.kv_source])
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
        scores = scores if softcap is None else self.softcap(scores, softcap)
        ago = torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])
        unseen = torch.zeros_like(ago, dtype=torch.bool) if self.a.bidirectional else ago < 0
        if layer.sliding:
            unseen |= ago.abs() > self.a.reach
        return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(unseen, -torch.inf).softmax(-1), v)

    def mean(self, x: Any) -> Any:
        return x.mean(1)

    def unit(self, x: Any) -> Any:
        return torch.nn.functional.normalize(x)

    def constant(self, weight: str) -> Any:
        return self.weights[weight]

    def gelu(self, x: Any) -> Any:
        return torch.nn.functional.gelu(x, approximate="tanh")

    def add(self, a: Any, b: Any) -> Any:
        assert a.shape == b.shape
        return a + b

    def mul(self, a: Any, b: Any) -> Any:
        return a * b

    def scale(self, x: Any, factor: float) -> Any:
        return x * factor

    def softcap(self, x: Any, cap: float) -> Any:
        return cap * torch.tanh(x / cap)

    def above(self, x: Any, deviations: float) -> Any:
        least = x.mean(-1, keepdim=True) + deviations * x.std(-1, keepdim=True, unbiased=False)
        return (x - least).relu()

    def as_large(self, x: Any, like: Any) -> Any:
        have, want = (y.square().mean(-1, keepdim=True) for y in (x, like))
        return x * (want / have.clamp(min=1e-5)).sqrt()

    def softmax(self, x: Any) -> Any:
        return x.softmax(-1)

    def best(self, x: Any, k: int) -> tuple[Any, Any]:
        found = x.topk(k, -1)
        return found.values, found.indices

    def take(self, weight: str, ids: Any) -> Any:
        return self.weights[weight][ids]

    def experts(self, x: Any, ids: Any, shares: Any, gate_up: str, down: str) -> Any:
        gate, up = torch.einsum("bnh,bnkoh->bnko", x, self.weights[gate_up][ids]).chunk(2, -1)
        made = torch.einsum("bnki,bnkhi->bnkh", self.gelu(gate) * up, self.weights[down][ids])
        return (made * shares[..., None]).sum(2)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("Gemma3", GEMMA3),
        ("Gemma4", E2B),
        ("Gemma4", K_EQ_V),
        ("Gemma4", EXPERTS),
        ("Gemma4Unified", UNIFIED),
        ("Gemma2", GEMMA2),
        ("Gemma", GEMMA1),
        ("VaultGemma", GEMMA2),
        ("Gemma3n", GEMMA3N),
        ("Gemma3n", ANOTHER_STREAM),
    ],
    ids=["gemma3", "e2b", "k_eq_v", "experts", "12b", "gemma2", "gemma1", "vaultgemma", "3n", "3n-active"],
)
def test_the_description_gives_transformers_logits(kind: str, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    text = getattr(transformers, f"{kind}TextConfig", None) or getattr(transformers, f"{kind}Config")
    config = text(**settings)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for weight in (*model.parameters(), *(b for n, b in model.named_buffers() if n.endswith("layer_scalar"))):
            # Large enough that soft caps, masks and norms matter.
            weight.copy_(torch.randn_like(weight) * (0.3 if weight.ndim == 1 else 0.2))
    a = architecture(config.to_dict(), "config.json")
    state = model.state_dict()
    weights = {name: state[name] for name in a.tensor_shapes()}
    ids = torch.randint(0, 80, (2, 24))
    with torch.no_grad():
        wanted, found = model(ids).logits, logits(a, Eager(a, weights, ids))
    assert wanted.std() > 0.1
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [8, 9])
def test_the_description_gives_the_vectors_of_transformers(window: int) -> None:
    """Both ways, half a window on either side; then the mean, two linears and a length of 1."""
    torch.manual_seed(0)
    settings = GEMMA3 | {"use_bidirectional_attention": True, "sliding_window": window}
    config = transformers.Gemma3TextConfig(**settings)
    model = transformers.Gemma3TextModel(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * (0.3 if weight.ndim == 1 else 0.2))
    said = config.to_dict() | {MODULES: {"pooling": "mean", "dense": [[96, 64], [24, 96]], "normalize": True}}
    described = describe(said, "config.json")
    assert described.gives == EMBEDDING
    assert described.embedder is not None
    state = model.state_dict()
    weights = {name: state[name.removeprefix("model.")] for name in described.decoder.tensor_shapes()}
    first, second = (torch.randn(spec.shape) * 0.2 for spec in described.embedder.specs())
    weights |= {spec.name: value for spec, value in zip(described.embedder.specs(), (first, second), strict=True)}
    ids = torch.randint(0, 80, (2, 24))
    with torch.no_grad():
        wanted = model(ids).last_hidden_state
        vector = torch.nn.functional.normalize(wanted.mean(1) @ first.T @ second.T)
        hidden, found = vectors(described.decoder, described.embedder, Eager(described.decoder, weights, ids))
    assert wanted.std() > 0.1
    torch.testing.assert_close(hidden, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found, vector, rtol=1e-4, atol=1e-5)
