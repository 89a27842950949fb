"""Gemma 4 12B, as transformers' configuration_gemma4_unified.py has it: its decoder is computed as any Gemma 4's.

It has no towers: patches of pictures and frames of sound are projected straight into the decoder, and attention over a
picture's tokens goes both ways, which is the picture's part of the model. Of text alone every position sees what was
before, in the class of transformers that computes it too.
"""

from __future__ import annotations

from typing import Any

from gemexport.formats.gemma.families.gemma4 import Gemma4

# What its config may leave out and means otherwise than another Gemma 4's (Gemma4UnifiedTextConfig).
DEFAULTS = {"max_position_embeddings": 262_144, "sliding_window": 1024}
LACKS = {"enable_moe_block": False, "hidden_size_per_layer_input": 0}


class Gemma4Unified(Gemma4):
    """No per-layer embeddings and no experts; full layers have no values of their own."""

    name = whole_type = "gemma4_unified"
    text_type = "gemma4_unified_text"
    whole_class = "Gemma4UnifiedForConditionalGeneration"

    def spelt(self, config: dict[str, Any]) -> dict[str, Any]:
        return {**DEFAULTS, **config, **LACKS, "model_type": self.reference_type}
