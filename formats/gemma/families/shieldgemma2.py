"""ShieldGemma 2: Gemma 3 4B's decoder inside a classifier of pictures (transformers' modeling_shieldgemma2.py)."""

from __future__ import annotations

from typing import Any

from gemexport.formats.gemma.families.gemma3 import Gemma3


class ShieldGemma2(Gemma3):
    """The decoder is computed as any Gemma 3's; its verdict on a picture is the probability of one of two tokens."""

    name = whole_type = "shieldgemma2"
    text_type = ""  # the classifier's own text_config is a Gemma 3's
    whole_class = "ShieldGemma2ForImageClassification"

    def spelt(self, config: dict[str, Any]) -> dict[str, Any]:
        return {**config, "model_type": self.reference_type}

    def canonical_name(self, name: str) -> str:
        """The name in the model that the classifier holds as its `model`, whose own decoder may be named twice."""
        while name.startswith(("model.model.", "model.language_model.model.")):
            name = name.removeprefix("model.")
        return super().canonical_name(name)
