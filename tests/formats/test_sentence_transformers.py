"""Folders of sentence-transformers: what their modules say, and what is refused of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemexport import demo
from gemexport.formats.checkpoint import open_checkpoint
from gemexport.formats.gemma.model import EMBEDDING, LOGITS
from gemexport.formats.stamps import ChangedError
from gemexport.formats.storage.errors import InputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return demo.make(tmp_path / "model", family="embeddinggemma", size="tiny")


def change(path: Path, edit: Callable[[Any], Any]) -> None:
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))


def test_modules_are_parts_of_the_model(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    model = checkpoint.model
    assert model.family.name == "embeddinggemma"
    assert model.gives == EMBEDDING
    assert model.embedder is not None
    assert model.embedder.dense == ((256, 64), (64, 256))
    assert checkpoint.architecture.bidirectional
    assert checkpoint.architecture.reach == checkpoint.architecture.sliding_window // 2
    assert list(checkpoint.tensors)[-2:] == ["2_Dense.linear.weight", "3_Dense.linear.weight"]
    assert not checkpoint.left_out
    assert "sentence_transformers" not in checkpoint.text_config


def test_other_models_give_logits(tmp_path: Path) -> None:
    assert open_checkpoint(demo.make(tmp_path / "other", family="gemma3", size="tiny")).model.gives == LOGITS


def test_the_newer_spelling_of_pooling_is_read(folder: Path) -> None:
    change(folder / "1_Pooling" / "config.json", lambda _: {"pooling_mode": "mean", "embedding_dimension": 64})
    assert open_checkpoint(folder).model.embedder is not None


@pytest.mark.parametrize(
    ("file", "edit", "words"),
    [
        ("1_Pooling/config.json", lambda said: {"pooling_mode_cls_token": True}, "pooling is pooling_mode_cls_token"),
        ("2_Dense/config.json", lambda said: said | {"bias": True}, "has a bias"),
        ("2_Dense/config.json", lambda said: said | {"activation_function": "torch.nn.Tanh"}, "Tanh"),
        ("2_Dense/config.json", lambda said: said | {"in_features": 63}, "takes 63 numbers and is given 64"),
        ("modules.json", lambda said: said[:-1], "normalize is False"),
        ("modules.json", lambda said: [*said, {"path": "5_X", "type": "a.b.LayerNorm"}], "module LayerNorm"),
        ("modules.json", lambda said: {"a": 1}, "is no list of modules"),
        ("modules.json", lambda said: [{"path": "../x", "type": "a.Dense"}], "an entry that is no module"),
    ],
)  # fmt: skip
def test_what_is_not_done_is_refused(folder: Path, file: str, edit: Callable[[Any], Any], words: str) -> None:
    change(folder / file, edit)
    with pytest.raises(InputError, match=words):
        open_checkpoint(folder)


def test_a_module_that_is_missing_is_named(folder: Path) -> None:
    (folder / "3_Dense" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="3_Dense"):
        open_checkpoint(folder)
    (folder / "3_Dense" / "config.json").unlink()
    with pytest.raises(InputError, match="3_Dense"):
        open_checkpoint(folder)


def test_a_module_that_is_replaced_is_another_checkpoint(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    before = checkpoint.facts()
    other = demo.make(folder.parent / "other", family="embeddinggemma", size="tiny", seed=1)
    (other / "2_Dense" / "model.safetensors").replace(folder / "2_Dense" / "model.safetensors")
    with pytest.raises(ChangedError, match="2_Dense"):
        checkpoint.stamps.check()
    assert open_checkpoint(folder).facts() != before
