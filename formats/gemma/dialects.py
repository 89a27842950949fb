"""Where other programs put the tensors, by role, as far as it does not follow from the canonical names.

Core ML's names and MLX' do follow; llama.cpp's are in gguf-py's map of transformers' names (`formats.gguf`).
"""

from __future__ import annotations

from gemexport.formats.gemma.names import CANONICAL, Dialect
from gemexport.formats.gemma.roles import Role

# ONNX Runtime GenAI's model builder (onnxruntime_genai/models/builders/base.py, gemma.py), without `.MatMul` and the
# endings of quantized weights. It calls the last norm by a layer after the last one.
_ATTENTION = "model.layers.{}.attn."
GENAI_BUILDER = Dialect(
    {
        Role.Q: f"{_ATTENTION}q_proj.weight",
        Role.K: f"{_ATTENTION}k_proj.weight",
        Role.V: f"{_ATTENTION}v_proj.weight",
        Role.O: f"{_ATTENTION}o_proj.weight",
        Role.Q_NORM: f"{_ATTENTION}q_norm.layernorm.weight",
        Role.K_NORM: f"{_ATTENTION}k_norm.layernorm.weight",
    }
)
GENAI_STACKED = ".attn.qkv_proj.weight"  # queries, keys and values of a layer, in this order


def genai_canonical(name: str) -> str:
    """The canonical name of a tensor of the builder's; a name that is none as it is."""
    if name.startswith("model.layers.") and name.endswith(".final_norm_layernorm.weight"):
        return CANONICAL.name(Role.FINAL_NORM)
    place = GENAI_BUILDER.find(name)
    return name if place is None else CANONICAL.name(*place)
