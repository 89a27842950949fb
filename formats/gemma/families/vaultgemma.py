"""VaultGemma, as transformers' modeling_vaultgemma.py has it: a Gemma 2 without norms after attention and MLP."""

from __future__ import annotations

from gemexport.formats.gemma.facts import Flat
from gemexport.formats.gemma.families.gemma2 import Gemma2


class VaultGemma(Gemma2):
    """transformers alone computes it: llama.cpp has no graph of it and mlx-lm no module."""

    name = text_type = reference_type = "vaultgemma"
    reference_class = "VaultGemmaForCausalLM"
    gguf = mlx_type = ""
    post_norms = False

    def mlx_problem(self, flat: Flat) -> str | None:
        return "is a VaultGemma"

    def gguf_problem(self, flat: Flat) -> str | None:
        return "there is no graph of a VaultGemma"
