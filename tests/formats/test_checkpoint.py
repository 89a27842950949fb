"""Folders as other tools leave them: heads beside tied embeddings, indexes, and the names of other classes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemexport.formats.checkpoint import checkpoint_name, open_checkpoint
from gemexport.formats.storage.errors import InputError
from gemexport.formats.storage.safetensors import INDEX_NAME, Entry, ShardedWriter, read_folder

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Arrays = dict[str, tuple[str, np.ndarray]]


@pytest.fixture
def model(tiny_gemma4: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(tiny_gemma4, tmp_path / "model"))


def rewrite(folder: Path, change: Callable[[Arrays], object]) -> None:
    """Write the tensors of a folder again, by name with their dtypes, after a change."""
    arrays = {name: (stored.entry.dtype, np.array(stored.array)) for name, stored in read_folder(folder).items()}
    change(arrays)
    entries = [Entry(name, dtype, array.shape) for name, (dtype, array) in arrays.items()]
    with ShardedWriter(folder, entries) as out:
        for name, (_, array) in arrays.items():
            out.write(name, array)


def edit(folder: Path, **changes: Any) -> None:
    """Change config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_copy_of_the_embedding_as_head_is_left_out(model: Path) -> None:
    rewrite(model, lambda arrays: arrays.update({HEAD: arrays[EMBEDDING]}))
    found = open_checkpoint(model)
    assert found.architecture.tied
    assert found.left_out == (HEAD,)


@pytest.mark.parametrize("quantization", [None, {"bits": 4, "group_size": 32}])
def test_a_head_of_its_own_is_not_passed_over(quantization: dict[str, int] | None, model: Path) -> None:
    """PEFT's modules_to_save trains one; transformers then computes with it, whatever config.json says."""

    def train(arrays: Arrays) -> None:
        dtype, table = arrays[EMBEDDING]
        head = table.copy()
        head[-1, -1] += 1
        arrays[HEAD] = dtype, head

    rewrite(model, train)
    if quantization:
        edit(model, quantization=quantization)
    with pytest.raises(InputError, match=r"config\.json: says that the head is tied .* but the model has a head"):
        open_checkpoint(model)
    edit(model, tie_word_embeddings=False)
    assert HEAD in open_checkpoint(model).tensors


def test_a_model_without_a_head_is_read_under_its_own_names(model: Path) -> None:
    """What AutoModel saves of a multimodal model: its decoder is `language_model`, without anything before it."""
    expected = {name: tensor.numpy().copy() for name, tensor in open_checkpoint(model).tensors.items()}

    def rename(arrays: Arrays) -> None:
        for name in [*arrays]:
            arrays[name.replace("model.", "language_model.", 1)] = arrays.pop(name)

    rewrite(model, rename)
    found = open_checkpoint(model)
    assert found.left_out == ()
    assert all(np.array_equal(found.tensors[name].numpy(), values) for name, values in expected.items())


def test_an_index_of_shards_that_are_gone_is_passed_over_for_a_whole_file(model: Path) -> None:
    stale = {"weight_map": {EMBEDDING: "model-00001-of-00002.safetensors"}}
    (model / INDEX_NAME).write_text(json.dumps(stale))
    assert open_checkpoint(model).left_out == ()


def test_quantization_settings_of_the_decoder_alone_are_found(golden: Path, tmp_path: Path) -> None:
    """Some tools leave them in text_config."""
    folder = Path(shutil.copytree(golden / "awq", tmp_path / "model"))
    (folder / "tokenizer.json").write_text("{}")
    expected = open_checkpoint(folder)
    config = json.loads((folder / "config.json").read_text())
    settings = config.pop("quantization_config")
    inner = {**config, "quantization_config": settings}
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": inner}))
    found = open_checkpoint(folder)
    name = "model.layers.0.mlp.up_proj.weight"
    assert found.tensors[name].grid == expected.tensors[name].grid is not None
    assert "quantization_config" not in found.text_config


@pytest.mark.parametrize("name", ["config.json", INDEX_NAME])
def test_json_that_is_nested_too_deep_is_named(name: str, model: Path) -> None:
    (model / name).write_text("[" * 100_000)
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        open_checkpoint(model)


def test_a_model_in_the_hubs_cache_is_called_as_its_repository(tmp_path: Path) -> None:
    blob = tmp_path / "models--org--gemma-3--qat" / "blobs" / ("0" * 64)
    snapshot = tmp_path / "models--google--gemma-3-270m" / "snapshots" / ("ab" * 20)
    for folder in (blob.parent, snapshot):
        folder.mkdir(parents=True)
    blob.touch()
    (snapshot / "model-Q4_0.gguf").symlink_to(blob)
    (tmp_path / "mine").symlink_to(snapshot)
    assert checkpoint_name(snapshot) == "gemma-3-270m"
    assert checkpoint_name(snapshot / "model-Q4_0.gguf") == "model-Q4_0"
    assert checkpoint_name(tmp_path / "mine") == "mine"
    assert checkpoint_name(snapshot / ".." / ".." / ".." / "mine") == "mine"
