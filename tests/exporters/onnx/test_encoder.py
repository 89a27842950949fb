"""A model that makes one vector of a text as ONNX, in onnxruntime alone, against transformers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from gemexport import demo
from gemexport.exporters import onnx
from gemexport.formats.checkpoint import open_checkpoint
from gemexport.formats.storage.errors import InputError

TEXTS = [[2, 17, 5, 99, 100, 3, 64, 42, 7, 11, 12, 13, 90, 91, 92, 93, 94, 95, 33, 34, 1], [2, 40, 41, 42, 43, 1]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo.make(tmp_path_factory.mktemp("encoder") / "model", family="embeddinggemma", size="tiny")


@pytest.fixture(scope="module")
def artefact(folder: Path) -> Path:
    path = folder.parent / "onnx"
    onnx.export(open_checkpoint(folder), path, variant="f32")
    return path


def test_texts_of_a_batch_give_what_each_gives_alone(folder: Path, artefact: Path) -> None:
    longest = max(map(len, TEXTS))
    ids = np.array([[*row, *[7] * (longest - len(row))] for row in TEXTS], np.int64)
    mask = np.array([[1] * len(row) + [0] * (longest - len(row)) for row in TEXTS], np.int64)
    graph = onnxruntime.InferenceSession(artefact / "model.onnx", providers=["CPUExecutionProvider"])
    assert [item.name for item in graph.get_inputs()] == ["input_ids", "attention_mask"]
    hidden, found = graph.run(["last_hidden_state", "sentence_embedding"], {"input_ids": ids, "attention_mask": mask})
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    first, second = (load_file(folder / f"{i}_Dense" / "model.safetensors")["linear.weight"].float() for i in (2, 3))
    for number, row in enumerate(TEXTS):
        with torch.inference_mode():
            wanted = model(torch.tensor([row])).last_hidden_state
            vector = torch.nn.functional.normalize(wanted.mean(1) @ first.T @ second.T)[0]
        np.testing.assert_allclose(hidden[number, : len(row)], wanted[0].numpy(), atol=2e-5)
        np.testing.assert_allclose(found[number], vector.numpy(), atol=1e-6)


def test_the_script_beside_it_runs(artefact: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(artefact / "embed.py"), "one", "two"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("[[1. ") or done.stdout.startswith("[[1.  ")


def test_what_the_graphs_of_npus_do_not_do_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="makes one vector of a text"):
        onnx.export(open_checkpoint(folder), tmp_path / "npu", variant="npu")
    with pytest.raises(InputError, match=r"transformers\.js"):
        onnx.export(open_checkpoint(folder), tmp_path / "js", variant="f32", layout="transformers.js")
    assert not list(tmp_path.iterdir())
