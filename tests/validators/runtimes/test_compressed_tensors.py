"""transformers loads an exported folder as it is: in bf16 it is the checkpoint, in f32 the numbers in the file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from samples import with_grids

from gemexport import demo
from gemexport.exporters import compressed_tensors as exporter
from gemexport.formats import compressed_tensors
from gemexport.formats.checkpoint import Checkpoint
from gemexport.formats.storage.errors import InputError
from gemexport.validators.checks import prompts, tokenizer
from gemexport.validators.checks.divergence import Divergence
from gemexport.validators.runtimes import compressed_tensors as adapter
from gemexport.validators.runtimes.protocol import outputs
from gemexport.validators.runtimes.pytorch import whole

pytest.importorskip("compressed_tensors")

# Loads both folders as users do, with nothing of ours, and compares what was unpacked with the source.
PROGRAM = """
import sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
source = load_file(sys.argv[2] + "/model.safetensors")
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
print(model.generate(torch.tensor([[2, 5, 6]]), max_new_tokens=4, do_sample=False).shape[1])
state = model.state_dict()
assert all(torch.equal(state[name], value) for name, value in source.items())
assert torch.equal(state["lm_head.weight"], source["model.embed_tokens.weight"])
assert not any(name.startswith("gemexport") for name in sys.modules)
"""


@pytest.fixture(scope="module", params=["gemma3", "gemma4"])
def checkpoint(request: pytest.FixtureRequest) -> Checkpoint:
    found: Checkpoint = request.getfixturevalue(request.param)
    return found


@pytest.mark.parametrize("pack_embeddings", [False, True], ids=["linears", "embeddings"])
def test_conversion(checkpoint: Checkpoint, tmp_path: Path, pack_embeddings: bool) -> None:
    folder = exporter.export(checkpoint, tmp_path / "out", pack_embeddings=pack_embeddings).path
    encode = tokenizer.load(checkpoint.path / "tokenizer.json")
    texts = [encode(text) for text in prompts.prompts()]
    sequence = prompts.sequences(texts, checkpoint.architecture, 60)[0]
    runtime = adapter.load(folder, threads=2, context=256)
    expected = whole(checkpoint.text_config, compressed_tensors.tensors(folder), 2)
    total = Divergence()
    total.add(expected.logits(sequence), runtime.logits(sequence), sequence)
    assert total.kld_mean < 1e-9
    assert total.top1_agreement == 1.0
    assert runtime.greedy(sequence[:20], 32) == expected.greedy(sequence[:20], 32)
    assert tokenizer.compare(encode, lambda text: runtime.tokenize(text) or [], prompts.HARD_TEXTS).equal
    assert runtime.arithmetic == "f32"
    frugal = adapter.load(folder, threads=2, context=256, frugal=True)
    np.testing.assert_array_equal(frugal.logits(sequence), runtime.logits(sequence))
    others = [sequence, sequence[:7]]
    for found, tokens in zip(outputs(frugal, others), others, strict=True):
        np.testing.assert_array_equal(found, runtime.logits(tokens), "all sequences go through a layer together")
    assert frugal.greedy(sequence[:20], 32) == [], "there is no cache to try"
    assert frugal.tokenize("Hello") == runtime.tokenize("Hello")
    own, usual = frugal.habits(), runtime.habits()
    assert (own.begins, own.stops, own.pad) == (usual.begins, usual.stops, usual.pad)
    for ours, theirs in zip(frugal.hidden(sequence), runtime.hidden(sequence), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("pack_embeddings", [False, True], ids=["linears", "embeddings"])
def test_loaded_in_bf16_it_is_the_checkpoint(checkpoint: Checkpoint, tmp_path: Path, pack_embeddings: bool) -> None:
    folder = exporter.export(checkpoint, tmp_path / "out", pack_embeddings=pack_embeddings).path
    command = [sys.executable, "-c", PROGRAM, str(folder), str(checkpoint.path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "7"


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["f16", "row"])
def test_other_lattices_load_as_the_checkpoint(tmp_path: Path, rule: str) -> None:
    model = demo.make(tmp_path / "model", size="tiny", rule=rule)
    checkpoint = with_grids(model, tmp_path / "grids")
    for pack_embeddings in (False, True):
        folder = exporter.export(checkpoint, tmp_path / "out", pack_embeddings=pack_embeddings).path
        command = [sys.executable, "-c", PROGRAM, str(folder), str(model)]
        done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]


def test_a_folder_that_does_not_load_is_explained(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = exporter.export(checkpoint, tmp_path / "out").path
    path = folder / "config.json"
    path.write_text(path.read_text().replace(checkpoint.text_config["model_type"], "no_such_model"))
    with pytest.raises(InputError, match="transformers cannot load it"):
        adapter.load(folder, threads=1, context=16)
