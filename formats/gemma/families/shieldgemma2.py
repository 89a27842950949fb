"""ShieldGemma 2: Gemma 3 4B's decoder inside a classifier of pictures (transformers' modeling_shieldgemma2.py)."""

from __future__ import annotations

from typing import Any

from gemexport.formats.gemma.families.gemma3 import Gemma3

YES, NO = 10_784, 3771


class ShieldGemma2(Gemma3):
    """The decoder is computed as any Gemma 3's; its verdict on a picture is the probability of one of two tokens."""

    name = whole_type = "shieldgemma2"
    text_type = ""  # the classifier's own text_config is a Gemma 3's
    whole_class = "ShieldGemma2ForImageClassification"

    def choice(self, config: dict[str, Any], vocabulary: int) -> tuple[int, int] | None:
        # "Yes" and "No" of Gemma 3's vocabulary, where config.json does not say it; a smaller one has neither.
        found = (config.get("yes_token_index", YES), config.get("no_token_index", NO))
        known = all(type(token) is int and 0 <= token < vocabulary for token in found)
        return found if known else None

    def spelt(self, config: dict[str, Any]) -> dict[str, Any]:
        return {**config, "model_type": self.reference_type}

    def canonical_name(self, name: str) -> str:
        """The name in the model that the classifier holds as its `model`, whose own decoder may be named twice."""
        while name.startswith(("model.model.", "model.language_model.model.")):
            name = name.removeprefix("model.")
        return super().canonical_name(name)
