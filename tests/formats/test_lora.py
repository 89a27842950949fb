"""LoRA adapters merge to what peft merges them to, and adapters of another kind, rank or base are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemexport import demo
from gemexport.formats import lora
from gemexport.formats.checkpoint import open_checkpoint
from gemexport.formats.grids.recipe import load_recipe
from gemexport.formats.grids.search import attach, find_grids, fingerprint
from gemexport.formats.storage.errors import InputError
from gemexport.formats.storage.safetensors import Entry, ShardedWriter, read_file

QUERY = "model.layers.1.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj"
EMBEDDING = "model.embed_tokens"
FACTOR = f"base_model.model.{QUERY}.lora_A.weight"


def _adapter(golden: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(golden / "lora", tmp_path / "lora"))


def _products(adapter: Path) -> dict[str, np.ndarray]:
    """B @ A of each module in float64, by what the file's names say."""
    stored = {name: np.array(array.array, float) for name, array in read_file(adapter / lora.WEIGHTS).items()}
    found = {}
    for name in stored:
        module = name.removeprefix("base_model.model.").rpartition(".lora_")[0]
        if name.endswith("lora_A.weight"):
            found[module] = stored[name.replace("lora_A", "lora_B")] @ stored[name]
        if name.endswith("lora_embedding_A"):
            found[module] = (stored[name.replace("embedding_A", "embedding_B")] @ stored[name]).T
    return found


def test_merged_is_what_peft_merges(golden: Path, tiny_gemma3: Path) -> None:
    """merged.safetensors has the first 64 rows of what peft's merge_and_unload made (tests/golden/README.md)."""
    merged, base = open_checkpoint(tiny_gemma3, adapter=golden / "lora"), open_checkpoint(tiny_gemma3)
    expected = read_file(golden / "lora" / "merged.safetensors")
    assert len(expected) == 5
    for name, stored in expected.items():
        values, wanted = merged.tensors[name].rows(0, 64).values, np.array(stored.array)
        # peft rounds the product, its scaling and the sum to float32 one after the other: a last bit of the largest.
        np.testing.assert_allclose(values, wanted, rtol=0, atol=np.spacing(np.abs(wanted).max()))
        assert merged.tensors[name].dtype == "f32"
        assert np.abs(values - base.tensors[name].rows(0, 64).values).max() > 0.05
    for name, tensor in merged.tensors.items():
        if name not in expected:
            np.testing.assert_array_equal(tensor.numpy(), base.tensors[name].numpy())
    assert merged.name == f"{tiny_gemma3.name}-lora"
    assert merged.notes[0] == "the adapter lora is merged into 5 matrices, in f32"
    assert "output head is the embedding table" in merged.notes[1]


def test_scaling_by_pattern_and_rank(golden: Path, tiny_gemma3: Path, tmp_path: Path) -> None:
    folder = _adapter(golden, tmp_path)
    base, products = open_checkpoint(tiny_gemma3), _products(folder)

    def check(settings: dict[str, Any], **scaling: float) -> None:
        _configure(folder, **settings)
        merged = open_checkpoint(tiny_gemma3, adapter=folder).tensors
        for module, factor in scaling.items():
            name = {"query": QUERY, "down": DOWN}[module]
            expected = base.tensors[f"{name}.weight"].numpy() + factor * products[name]
            np.testing.assert_array_equal(merged[f"{name}.weight"].numpy(), expected.astype(np.float32))

    check({"alpha_pattern": {}}, query=16 / 6, down=16 / 4)
    check({"alpha_pattern": {"layers.0.mlp.down_proj": 8}}, query=16 / 6, down=8 / 4)
    check({"alpha_pattern": {r".*\.0\..*": 2}}, query=16 / 6, down=2 / 4)
    check({"alpha_pattern": {}, "use_rslora": True}, query=16 / sqrt(6), down=16 / sqrt(4))


def test_slices_make_the_same_numbers(golden: Path, tiny_gemma3: Path) -> None:
    tensors = open_checkpoint(tiny_gemma3, adapter=golden / "lora").tensors
    for name in (f"{DOWN}.weight", f"{EMBEDDING}.weight"):
        whole = tensors[name].numpy()
        for start, stop in ((0, 1), (3, 17), (40, 64)):
            np.testing.assert_array_equal(tensors[name].rows(start, stop).values, whole[start:stop])
        assert tensors[name].grid is None


def test_what_is_merged_leaves_the_lattice_and_the_recipe_takes_it(
    golden: Path, tiny_gemma3: Path, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(tiny_gemma3, adapter=golden / "lora")
    index = find_grids(checkpoint, tmp_path / "grids", load_recipe("default"))
    merged = set(read_file(golden / "lora" / "merged.safetensors"))
    assert {record.name for record in index.tensors if record.left} == merged == set(checkpoint.bases)
    assert {record.name for record in index.tensors if not record.lossless} == merged
    attached = attach(checkpoint, tmp_path / "grids").tensors
    bits = {name: tensor.grid.bits for name, tensor in attached.items() if name in merged and tensor.grid}
    assert bits == {name: 8 if name == f"{EMBEDDING}.weight" else 4 for name in merged}
    # With the recipe that quantizes nothing it stays as it is, and the grids are others.
    index = find_grids(checkpoint, tmp_path / "grids", load_recipe("lossless"))
    assert {record.name for record in index.tensors if record.bits is None} == merged
    # The grids of the base alone, or with another adapter, are not those of this one.
    other = _adapter(golden, tmp_path)
    _configure(other, lora_alpha=1e-9, alpha_pattern={})
    small = open_checkpoint(tiny_gemma3, adapter=other)
    assert fingerprint(small, load_recipe("default")) != fingerprint(checkpoint, load_recipe("default"))
    index = find_grids(open_checkpoint(tiny_gemma3), tmp_path / "grids", load_recipe("lossless"))
    assert all(record.lossless and not record.left for record in index.tensors)


def test_a_base_that_lay_on_no_lattice_leaves_none(golden: Path, tmp_path: Path) -> None:
    base = demo.make(tmp_path / "plain", family="gemma3", size="tiny", rule=None)
    index = find_grids(open_checkpoint(base, adapter=golden / "lora"), tmp_path / "grids", load_recipe("default"))
    assert not any(record.left or record.lossless for record in index.tensors)


def _configure(folder: Path, **changes: Any) -> None:
    path = folder / lora.CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _rewrite(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    """The adapter's weights after a change to its arrays (all float32 but the copy of the embedding table)."""
    arrays = {name: np.array(stored.array) for name, stored in read_file(folder / lora.WEIGHTS).items()}
    change(arrays)
    names = {np.dtype(np.float32): "F32", np.dtype(np.int32): "I32", np.dtype(np.uint16): "BF16"}
    entries = [Entry(name, names[array.dtype], array.shape) for name, array in arrays.items()]
    scratch = folder / "scratch"
    with ShardedWriter(scratch, entries) as out:
        for name, array in arrays.items():
            out.write(name, array)
    (scratch / "model.safetensors").replace(folder / lora.WEIGHTS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora, which cannot be merged here"),
        ({"bias": "lora_only"}, "bias lora_only"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"peft_type": "IA3"}, "is a IA3, not a LORA"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights pissa_niter_4"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"r": 8}, "have the ranks 4 and 4, where adapter_config.json says 8"),
        ({"rank_pattern": {}}, r"layers.1.self_attn.q_proj have the ranks 6 and 6, where adapter_config.json says 4"),
        ({"rank_pattern": {"q_proj": 2}}, r"q_proj have the ranks . and ., where adapter_config.json says 2"),
        ({"rank_pattern": {"(": 2}}, "is no regular expression"),
        ({"lora_alpha": None}, "the adapter settings are not understood .lora_alpha: .*not None"),
        (
            {"lora_alpha": float("nan")},
            r"adapter settings are not understood .lora_alpha: .*nan.; use the ad",
        ),
        ({"r": 0}, r"the adapter settings are not understood .r: .*greater than 0, not 0.; use the adapter_config"),
        ({"alpha_pattern": {"q_proj": "x"}}, r"the adapter settings are not understood .alpha_pattern\.q_proj"),
    ],
)
def test_adapters_that_are_refused(
    golden: Path, tiny_gemma3: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = _adapter(golden, tmp_path)
    _configure(folder, **changes)
    with pytest.raises(InputError, match=message):
        open_checkpoint(tiny_gemma3, adapter=folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays: arrays.pop(FACTOR), "q_proj has B for factors"),
        (lambda arrays: arrays.update({FACTOR: arrays[FACTOR][:2]}), "have the ranks 2 and 6"),
        (lambda arrays: arrays.update({FACTOR: arrays[FACTOR][:, :8].copy()}), r"make \[64, 8\], the base has"),
        (lambda arrays: arrays.update({FACTOR: arrays[FACTOR][0]}), "is no matrix of floats"),
        (lambda arrays: arrays.update({FACTOR: arrays[FACTOR].astype(np.int32)}), "is no matrix of floats"),
        (lambda arrays: arrays.update({f"base_model.model.{QUERY}.bias": arrays[FACTOR]}), "is no factor of a LoRA"),
        (
            lambda arrays: arrays.update({"base_model.model.lm_head.weight": arrays[FACTOR]}),
            "brings lm_head.weight along, and it is not the base's",
        ),
        (lambda arrays: arrays.clear(), "holds no factors"),
        (
            lambda arrays: arrays.update({name.replace("layers.0", "layers.9"): arrays[name] for name in [*arrays]}),
            "changes model.layers.9.*, which the base does not have",
        ),
        (
            lambda arrays: arrays.update({name.replace(DOWN, "lm_head"): arrays[name] for name in [*arrays]}),
            "changes lm_head, which is the embedding table here",
        ),
        (
            lambda arrays: arrays.update({f"base_model.model.{QUERY}.base_layer.weight": arrays[FACTOR]}),
            "brings model.layers.1.self_attn.q_proj.weight along, and it is not the base's",
        ),
    ],
)
def test_weights_that_are_refused(
    golden: Path, tiny_gemma3: Path, tmp_path: Path, change: Callable[..., Any], message: str
) -> None:
    folder = _adapter(golden, tmp_path)
    _rewrite(folder, change)
    with pytest.raises(InputError, match=message):
        open_checkpoint(tiny_gemma3, adapter=folder)


def test_embeddings_that_were_saved_beside_the_factors(golden: Path, tiny_gemma3: Path, tmp_path: Path) -> None:
    """peft's save_embedding_layers: the table as it is in the base, a second time for the head that is tied to it."""
    table = open_checkpoint(tiny_gemma3).tensors["model.embed_tokens.weight"].numpy()
    names = ("base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight")
    folder = _adapter(golden, tmp_path)
    expected = len(open_checkpoint(tiny_gemma3, adapter=folder).bases)
    _rewrite(folder, lambda arrays: arrays.update(dict.fromkeys(names, table)))
    assert len(open_checkpoint(tiny_gemma3, adapter=folder).bases) == expected


def test_folders_that_are_no_adapters(golden: Path, tiny_gemma3: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no adapter_config\.json"):
        open_checkpoint(tiny_gemma3, adapter=tmp_path)
    folder = _adapter(golden, tmp_path)
    (folder / lora.WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(InputError, match=r"there is no adapter_model\.safetensors"):
        open_checkpoint(tiny_gemma3, adapter=folder)
    (folder / lora.CONFIG).write_text("{")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        open_checkpoint(tiny_gemma3, adapter=folder)
    (folder / lora.CONFIG).write_text("[]")
    with pytest.raises(InputError, match="is not a JSON object"):
        open_checkpoint(tiny_gemma3, adapter=folder)


def test_changes_to_towers_are_left_out(golden: Path, tiny_gemma3: Path, tmp_path: Path) -> None:
    folder = _adapter(golden, tmp_path)
    tower = "model.vision_tower.encoder.layers.0.q_proj"
    _rewrite(folder, lambda arrays: arrays.update({name.replace(DOWN, tower): arrays[name] for name in [*arrays]}))
    assert (
        open_checkpoint(tiny_gemma3, adapter=folder).notes[1]
        == "the adapter's changes to 1 modules of towers are left out"
    )


def test_base_that_has_codes(golden: Path, tiny_gemma3: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(golden / "gptq", tmp_path / "base"))
    shutil.copyfile(tiny_gemma3 / "tokenizer.json", folder / "tokenizer.json")
    adapter = _adapter(golden, tmp_path)
    # Of this adapter, what fits the other base as well: a query of 64 by 64.
    _rewrite(adapter, lambda arrays: [arrays.pop(name) for name in [*arrays] if QUERY not in name])
    base, merged = open_checkpoint(folder), open_checkpoint(folder, adapter=adapter)
    tensor = merged.tensors[f"{QUERY}.weight"]
    assert tensor.grid is None
    assert tensor.dtype == "f32"
    expected = base.tensors[tensor.name].numpy() + 16 / 6 * _products(adapter)[QUERY]
    np.testing.assert_array_equal(tensor.numpy(), expected.astype(np.float32))
    assert merged.tensors[f"{DOWN}.weight"].grid is not None


def test_keys_of_a_layer_that_shares_them_are_left_out(tiny_gemma4: Path, tmp_path: Path) -> None:
    """peft makes factors for every module of that name, transformers calls those of sharing layers never."""
    base = open_checkpoint(tiny_gemma4)
    layers = base.architecture.layers
    own, shared = layers[0], next(layer for layer in reversed(layers) if not layer.owns_cache)
    hidden, rank = base.architecture.hidden_size, 2
    arrays: dict[str, np.ndarray] = {}
    for layer in (own, shared):
        for kind in ("k_proj", "v_proj"):
            name = f"base_model.model.model.layers.{layer.index}.self_attn.{kind}"
            arrays[f"{name}.lora_A.weight"] = np.ones((rank, hidden), np.float32)
            arrays[f"{name}.lora_B.weight"] = np.ones((layer.kv_heads * layer.head_dim, rank), np.float32)
    folder = tmp_path / "lora"
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 4}
    (folder / lora.CONFIG).write_text(json.dumps(settings))
    entries = [Entry(name, "F32", array.shape) for name, array in arrays.items()]
    with ShardedWriter(folder, entries) as out:
        for name, array in arrays.items():
            out.write(name, array)
    (folder / "model.safetensors").rename(folder / lora.WEIGHTS)
    merged = open_checkpoint(tiny_gemma4, adapter=folder)
    assert "merged into 2 matrices" in merged.notes[0]
    assert f"layers.{shared.index}.self_attn.k_proj" in merged.notes[1]
    assert "2 modules are left out" in merged.notes[1]
    assert list(merged.tensors) == list(base.tensors)


def test_an_adapter_of_mlx_lm(tiny_gemma3: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"fine_tune_type": "lora", "lora_parameters": {"rank": 8}}')
    (tmp_path / "adapters.safetensors").touch()
    with pytest.raises(InputError, match=r"is one of mlx-lm; merge it with mlx_lm\.fuse --model BASE"):
        open_checkpoint(tiny_gemma3, adapter=tmp_path)


def test_an_adapter_as_the_model(golden: Path) -> None:
    with pytest.raises(InputError, match=r"is an adapter, not a model; give the model it was made for .*--adapter "):
        open_checkpoint(golden / "lora")
