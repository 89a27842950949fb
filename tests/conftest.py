"""Checkpoints that many tests share: tiny random models on an int4 grid, made once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemexport import demo


@pytest.fixture(scope="session")
def tiny_gemma3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 3 of half a million weights, in bf16, on a block-32 grid with scales of max/7.5. Do not write to it."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny-gemma3"
    return demo.make(folder, family="gemma3", size="tiny", rule="max/7.5")


@pytest.fixture(scope="session")
def tiny_gemma4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 4 with every feature of E2B, in bf16, on a block-32 grid with scales of max/7. Do not write to it."""
    return demo.make(tmp_path_factory.mktemp("checkpoints") / "tiny-gemma4", size="tiny")
