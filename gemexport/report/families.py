"""Which family runs in which format: the table of the README, out of what the exporters answer (`supports`).

`python -m gemexport.report.families` prints it; a test holds the README to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gemexport.demo import SIZES, config_json
from gemexport.demo.configs import wrapped
from gemexport.formats.gemma.families import named
from gemexport.formats.gemma.model import Model, describe
from gemexport.registry import TARGETS

# Positions and windows of the releases, on which some answers depend.
_LONG = {"max_position_embeddings": 131_072, "sliding_window": 1024}
_SHORT = {"max_position_embeddings": 8192, "sliding_window": 4096}


def models() -> Iterator[tuple[str, Model]]:
    """A model of each row, small, with the structure of what it stands for."""

    def row(family: str, further: dict[str, Any], whole: str | None = None, experts: bool = False) -> Model:
        config = config_json(family, SIZES["tiny"], experts=experts) | further
        return describe(config if whole is None else wrapped(config, named(whole)), "a row of the table")

    scaled = _LONG | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    yield "Gemma 4 E2B, E4B", row("gemma4", _LONG, "gemma4")
    yield "Gemma 4 12B", row("gemma4_unified", _LONG, "gemma4_unified")
    yield "Gemma 4 26B-A4B", row("gemma4", _LONG, "gemma4", experts=True)
    flat = {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "use_double_wide_mlp": False}
    yield "Gemma 4 31B", row("gemma4", _LONG | flat | {"attention_k_eq_v": True}, "gemma4")
    yield "Gemma 3 270M, 1B, FunctionGemma", row("gemma3", _LONG)
    yield "Gemma 3 4B, 12B, 27B, MedGemma, TranslateGemma", row("gemma3", scaled, "gemma3")
    yield "Gemma 3n E2B, E4B", row("gemma3n", {"max_position_embeddings": 32_768, "sliding_window": 512}, "gemma3n")
    yield "ShieldGemma 2", row("gemma3", scaled, "shieldgemma2")
    yield "Gemma 2", row("gemma2", _SHORT)
    yield "Gemma 1", row("gemma", {"max_position_embeddings": 8192})
    yield "EmbeddingGemma", row("embeddinggemma", {"max_position_embeddings": 2048, "sliding_window": 512})
    yield "VaultGemma", row("vaultgemma", _SHORT)


def markdown() -> str:
    """The table; a cell says yes, or a number under which the reason stands below."""
    columns = [(target, variant) for target in TARGETS.values() for variant in target.variants]
    lines = [
        f"| decoder | {' | '.join(f'{target.title} `{variant}`' for target, variant in columns)} |",
        f"| --- |{' --- |' * len(columns)}",
    ]
    reasons: list[str] = []
    for name, model in models():
        answers = [target.supports(model, variant) for target, variant in columns]
        reasons = list(dict.fromkeys([*reasons, *filter(None, answers)]))
        cells = ["yes" if answer is None else f"no ({reasons.index(answer) + 1})" for answer in answers]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    notes = [f"({number}) {reason}" for number, reason in enumerate(reasons, 1)]
    return "\n".join([*lines, "", *[f"{'; '.join(notes)}."]]) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
