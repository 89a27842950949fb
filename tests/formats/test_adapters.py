"""Adapters as people have them, made by peft and mlx-lm themselves (tests/golden/make_adapters.py)."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gemexport.formats.checkpoint import Checkpoint, open_checkpoint
from gemexport.formats.gemma.names import EMBEDDING
from gemexport.formats.lora import CONFIG, WEIGHTS
from gemexport.formats.storage.errors import InputError
from gemexport.formats.storage.safetensors import read_file


def held_to(merged: Checkpoint, folder: Path, rounds: float = 1.0) -> list[str]:
    """Compare a merged checkpoint with the rows that peft's merge_and_unload made; the names that were compared."""
    expected = read_file(folder / "merged.safetensors")
    for name, stored in expected.items():
        wanted = np.array(stored.array)
        values = merged.tensors[name].rows(0, len(wanted)).values
        # peft rounds each of its steps to float32: a last bit of the largest, and of each that came before.
        np.testing.assert_allclose(values, wanted, rtol=0, atol=rounds * np.spacing(np.abs(wanted).max()))
    return list(expected)


@pytest.mark.parametrize(("name", "rounds"), [("rslora", 1.0), ("dora", 4.0)])
def test_merged_is_what_peft_merges(name: str, rounds: float, golden: Path, tiny_gemma3: Path) -> None:
    folder = golden / "adapters" / name
    merged, base = open_checkpoint(tiny_gemma3, adapter=folder), open_checkpoint(tiny_gemma3)
    for tensor in held_to(merged, folder, rounds):
        assert np.abs(merged.tensors[tensor].numpy() - base.tensors[tensor].numpy()).max() > 0.01


def test_several_adapters_in_order(golden: Path, tiny_gemma3: Path) -> None:
    """The second one was made for what the first one left, as merge_and_unload leaves it."""
    first, second = golden / "adapters" / "dora", golden / "adapters" / "second"
    both = open_checkpoint(tiny_gemma3, adapter=[first, second])
    assert held_to(both, second, 4.0) == ["model.layers.0.mlp.down_proj.weight", "model.layers.2.mlp.up_proj.weight"]
    assert both.name == f"{tiny_gemma3.name}-dora-second"
    assert [note.split()[2] for note in both.notes] == ["dora", "second"]
    third = open_checkpoint(tiny_gemma3, adapter=[first, golden / "adapters" / "resized"])
    assert {EMBEDDING, *open_checkpoint(tiny_gemma3, adapter=first).bases} == set(third.bases)
    other = open_checkpoint(tiny_gemma3, adapter=[second, first])
    name = "model.layers.0.mlp.down_proj.weight"
    assert np.abs(both.tensors[name].numpy() - other.tensors[name].numpy()).max() > 0.01
    assert both.adapter != other.adapter
    # What they took off the lattice is compared with the base's own.
    base = open_checkpoint(tiny_gemma3).tensors
    for changed in ("model.layers.0.mlp.down_proj.weight", "model.layers.2.mlp.up_proj.weight"):
        np.testing.assert_array_equal(both.bases[changed].numpy(), base[changed].numpy())


def test_keys_and_values_of_sharing_layers(golden: Path, tiny_gemma4: Path) -> None:
    """transformers has no such modules, so peft makes no factors for them; what it makes is merged."""
    folder = golden / "adapters" / "sharing"
    merged = open_checkpoint(tiny_gemma4, adapter=folder)
    names = held_to(merged, folder)
    assert "merged into 10 matrices" in merged.notes[0]
    assert len(names) == 10


def test_a_larger_vocabulary(golden: Path, tiny_gemma3: Path, tmp_path: Path) -> None:
    folder = golden / "adapters" / "resized"
    merged, base = open_checkpoint(tiny_gemma3, tmp_path / "scratch", adapter=folder), open_checkpoint(tiny_gemma3)
    held_to(merged, folder)
    assert merged.architecture.vocab_size == merged.text_config["vocab_size"] == 516
    assert merged.tensors[EMBEDDING].shape == (516, 64)
    table = base.tensors[EMBEDDING].numpy()
    np.testing.assert_array_equal(merged.tensors[EMBEDDING].rows(0, 512).values, table)
    assert np.abs(merged.tensors[EMBEDDING].rows(512, 516).values).max() > 0
    assert merged.notes[0] == (
        "model.embed_tokens came with the adapter resized, of 516 rows instead of 512; so did the tokenizer"
    )
    tokens = json.loads((merged.assets / "tokenizer.json").read_text())["added_tokens"]
    assert [token["content"] for token in tokens if token["id"] >= 512] == [f"<new-{i}>" for i in range(4)]


def test_tables_that_are_not_the_bases(golden: Path, tiny_gemma3: Path, tiny_gemma4: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(golden / "adapters" / "resized", tmp_path / "other"))
    (folder / "tokenizer.json").unlink()
    # Without a tokenizer of its own the base's is used: rows for which it has no token.
    merged = open_checkpoint(tiny_gemma3, adapter=folder)
    assert merged.notes[0].endswith("of 516 rows instead of 512")
    # A Gemma 4 of the same width has per-layer embeddings, which the adapter does not bring.
    with pytest.raises(InputError, match="has 516 tokens, 4 without a row of per-layer embeddings"):
        open_checkpoint(tiny_gemma4, adapter=folder)
    config = folder / CONFIG
    config.write_text(json.dumps({**json.loads(config.read_text()), "modules_to_save": ["score"]}))
    with pytest.raises(InputError, match="the adapter has modules_to_save score, which cannot be merged"):
        open_checkpoint(tiny_gemma3, adapter=folder)


def test_factors_of_a_tied_head(golden: Path, tiny_gemma3: Path, tmp_path: Path) -> None:
    folder = golden / "adapters" / "head"
    with pytest.raises(InputError, match=r"changes lm_head, .*; give the base a head of its own \(copy"):
        open_checkpoint(tiny_gemma3, adapter=folder)
    # The remedy is true: peft's own advice, a model that is not tied.
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_gemma3, tie_word_embeddings=False)
    model.lm_head.weight.data = model.model.embed_tokens.weight.data.clone()
    untied = tmp_path / "untied"
    model.save_pretrained(untied)
    shutil.copyfile(tiny_gemma3 / "tokenizer.json", untied / "tokenizer.json")
    merged = open_checkpoint(untied, adapter=folder)
    assert "merged into 2 matrices" in merged.notes[0]
    assert not merged.architecture.tied
    assert not np.array_equal(merged.tensors["lm_head.weight"].numpy(), merged.tensors[EMBEDDING].numpy())


def test_an_adapter_that_mlx_lm_made(tiny_gemma3: Path, tmp_path: Path) -> None:
    mlx_lm, core = pytest.importorskip("mlx_lm"), pytest.importorskip("mlx.core")
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import save_config

    model, _ = mlx_lm.load(str(tiny_gemma3))
    model.freeze()
    settings = {"rank": 4, "scale": 8.0, "dropout": 0.0}
    linear_to_lora_layers(model, 2, settings)
    core.save_safetensors(str(tmp_path / "adapters.safetensors"), dict(tree_flatten(model.trainable_parameters())))
    save_config({"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": settings}, tmp_path / CONFIG)
    with pytest.raises(InputError, match=r"is one of mlx-lm; merge it with mlx_lm\.fuse --model BASE"):
        open_checkpoint(tiny_gemma3, adapter=tmp_path)
    with pytest.raises(InputError, match=r"is an adapter of mlx-lm, not a model; merge it .*mlx_lm\.fuse"):
        open_checkpoint(tmp_path)
    # The remedy is true.
    paths = ("--model", tiny_gemma3, "--adapter-path", tmp_path, "--save-path", tmp_path / "merged")
    subprocess.run([sys.executable, "-m", "mlx_lm", "fuse", *map(str, paths)], check=True, capture_output=True)
    assert list(open_checkpoint(tmp_path / "merged").tensors) == list(open_checkpoint(tiny_gemma3).tensors)


@pytest.mark.parametrize("name", ["dora", "resized"])
def test_an_adapter_as_the_model(name: str, golden: Path) -> None:
    """Also one that has a tokenizer beside it."""
    with pytest.raises(InputError, match=r"is an adapter, not a model; give the model it was made for .*--adapter "):
        open_checkpoint(golden / "adapters" / name)


def test_dora_without_its_magnitudes(golden: Path, tiny_gemma3: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(golden / "adapters" / "rslora", tmp_path / "dora"))
    (folder / CONFIG).write_text(json.dumps({**json.loads((folder / CONFIG).read_text()), "use_dora": True}))
    with pytest.raises(InputError, match=f"{WEIGHTS}: .*down_proj has A and B for factors"):
        open_checkpoint(tiny_gemma3, adapter=folder)
