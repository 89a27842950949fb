"""The dtype that a config.json asks its loaders to compute in.

transformers takes it from there, whatever the weights are stored in ("auto", modeling_utils.py), and so does vLLM,
which refuses float16 for Gemma 2 and 3 (config/model.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def stated_dtype(*configs: Mapping[str, Any]) -> str | None:
    """The name of the dtype in the first of these that states one, such as `bfloat16`; None where none does."""
    stated = (str(config.get("dtype") or config.get("torch_dtype") or "") for config in configs)
    return next((name.removeprefix("torch.") for name in stated if name), None)
