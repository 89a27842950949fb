"""Folders as other tools leave them: heads beside tied embeddings, indexes, and the names of other classes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemexport.formats.checkpoint import open_checkpoint
from gemexport.formats.errors import InputError
from gemexport.formats.safetensors import Entry, ShardedWriter, read_folder

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
