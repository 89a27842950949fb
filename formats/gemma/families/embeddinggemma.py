"""EmbeddingGemma: a Gemma 3 whose attention goes both ways, pooled and projected to one vector of a text.

Its config is a Gemma 3's with `use_bidirectional_attention` (transformers' modeling_gemma3.py).
"""

from __future__ import annotations

from typing import Any

from gemexport.formats.gemma.embedder import MODULES, Embedder, embedder
from gemexport.formats.gemma.facts import MEAN, Fact, Flat, Form
from gemexport.formats.gemma.families.gemma3 import FACTS as GEMMA3
from gemexport.formats.gemma.families.gemma3 import Fields, Gemma3

# src/models/gemma-embedding.cpp
FACTS = (
    *GEMMA3,
    Fact("pooling", Form.COUNT, "{arch}.pooling_type"),
    *(
        Fact(f"dense_{number}.{side}", Form.COUNT_OR_NONE, f"{{arch}}.dense_{number}_feat_{side}", 0, always=False)
        for number in (2, 3)
        for side in ("in", "out")
    ),
)


class EmbeddingGemma(Gemma3):
    """A sliding layer sees half a window on either side; there is no head."""

    name = "embeddinggemma"
    text_type = ""  # a Gemma 3's, with a flag: see `claims`
    whole_type = whole_class = None
    reference_class = "Gemma3TextModel"
    gguf = "gemma-embedding"
    mlx_type = ""
    facts = FACTS
    bidirectional = True
    gguf_layers_by_width = 0  # llama.cpp scales by the size of a head

    def claims(self, config: dict[str, Any]) -> bool:
        flag = config.get("use_bidirectional_attention")
        return config.get("model_type") == self.reference_type and flag in (True, "all")

    def embedder(self, config: dict[str, Any], hidden: int, path: Any) -> Embedder | None:
        return embedder(config, hidden, path)

    def spelt(self, config: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in config.items() if key != MODULES}

    def refused(self, fields: Fields) -> dict[str, bool]:
        own = {"attention is bidirectional": False, "it has a head of its own": not fields.tie_word_embeddings}
        return fields.refused() | own

    def file_config(self, flat: Flat, q_norm_factor: float) -> dict[str, Any]:
        dense = [(flat[f"dense_{number}.out"], flat[f"dense_{number}.in"]) for number in (2, 3)]
        pooling = "mean" if flat["pooling"] == MEAN else f"llama.cpp's type {flat['pooling']}"
        modules = {"pooling": pooling, "dense": [pair for pair in dense if any(pair)], "normalize": True}
        return {**super().file_config(flat, q_norm_factor), "use_bidirectional_attention": True, MODULES: modules}

    def mlx_problem(self, flat: Flat) -> str | None:
        return "makes one vector of a text"
