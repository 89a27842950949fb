"""Checkpoints that many tests share: tiny random models on an int4 grid, made once a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemexport import demo
from gemexport.formats.checkpoint import Checkpoint


@pytest.fixture(scope="session")
def tiny_gemma3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 3 of half a million weights, in bf16, on a block-32 grid with scales of max/7.5. Do not write to it."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny-gemma3"
    return demo.make(folder, family="gemma3", size="tiny", rule="max/7.5")


@pytest.fixture(scope="session")
def tiny_gemma4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 4 with every feature of E2B, in bf16, on a block-32 grid with scales of max/7. Do not write to it."""
    return demo.make(tmp_path_factory.mktemp("checkpoints") / "tiny-gemma4", size="tiny")


TwoLayers = Callable[..., Checkpoint]


@pytest.fixture(scope="session")
def two_layers() -> TwoLayers:
    """Makes a Gemma 4 of one sliding and one full layer in memory, random weights with one scale a row.

    With `wide` it has E2B's widths and the vocabulary that is asked for, else it is tiny.
    """

    def make(*, bits: int = 4, wide: bool = False, vocab: int = 256) -> Checkpoint:
        return demo.in_memory(two_layer_config(wide, vocab), bits)

    return make


def two_layer_config(wide: bool, vocab: int) -> dict[str, Any]:
    """Two of E2B's layers, or a small model of the same shape."""
    sizes = (1536, 6144, 8, 256, 512, 256, 512) if wide else (64, 128, 2, 32, 64, 32, 8)
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "head_dim", "global_head_dim",
             "hidden_size_per_layer_input", "sliding_window")  # fmt: skip
    rope = {
        "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "proportional"},
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
    }
    return dict(zip(names, sizes, strict=True)) | {
        "model_type": "gemma4_text", "num_hidden_layers": 2, "num_key_value_heads": 1, "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"], "rope_parameters": rope, "vocab_size": vocab,
        "vocab_size_per_layer_input": vocab, "final_logit_softcapping": 30.0, "tie_word_embeddings": True,
        "max_position_embeddings": 4096,
    }  # fmt: skip
