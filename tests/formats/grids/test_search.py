"""Grids of whole checkpoints: found once, kept, attached again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gemexport import demo
from gemexport.formats.checkpoint import open_checkpoint
from gemexport.formats.grids.recipe import RECIPES, Recipe, Scheme, load_recipe
from gemexport.formats.grids.search import attach, find_grids
from gemexport.formats.storage.errors import InputError
from gemexport.formats.tensor import expand, round_to


def test_every_matrix_of_a_qat_checkpoint_is_on_its_lattice(tiny_gemma4: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_gemma4)
    index = find_grids(checkpoint, tmp_path / "grids", RECIPES["default"])
    assert {record.name for record in index.tensors} == {
        name for name, tensor in checkpoint.tensors.items() if len(tensor.shape) == 2
    }
    assert all(record.lossless and record.lattice_fraction == 1 for record in index.tensors)
    attached = attach(checkpoint, tmp_path / "grids")
    for name, tensor in attached.tensors.items():
        if tensor.grid is not None:
            codes, scales = tensor.rows(0, 8).grid()
            again = round_to((codes * expand(scales, tensor.grid.block)).astype(np.float32), tensor.dtype)
            assert np.array_equal(again, checkpoint.tensors[name].rows(0, 8).values)


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_decoder_is_found_inside_a_multimodal_checkpoint(wrapped: bool, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(demo.make(tmp_path / "model", size="tiny", wrapped=wrapped))
    assert list(checkpoint.tensors) == list(checkpoint.architecture.tensor_shapes())
    assert any("vision_tower" in name for name in checkpoint.left_out) == wrapped


def test_a_plain_checkpoint_gets_the_recipes_schemes(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(demo.make(tmp_path / "model", size="tiny", rule=None))
    index = find_grids(checkpoint, tmp_path / "grids", RECIPES["default"])
    bits = {record.name: record.bits for record in index.tensors}
    assert bits["model.embed_tokens.weight"] == 8
    assert bits["model.layers.0.self_attn.q_proj.weight"] == 4
    errors = {record.bits: record.squared_error for record in index.tensors}
    assert 0 < errors[8] < 1e-4 < errors[4] < 0.02
    assert not any(record.lossless for record in index.tensors)


def test_the_search_is_not_repeated(tiny_gemma3: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_gemma3)
    first = find_grids(checkpoint, tmp_path / "grids", RECIPES["default"])
    stamp = (tmp_path / "grids" / "grids.json").stat().st_mtime_ns
    assert find_grids(checkpoint, tmp_path / "grids", RECIPES["default"]) == first
    assert (tmp_path / "grids" / "grids.json").stat().st_mtime_ns == stamp
    other = find_grids(checkpoint, tmp_path / "grids", RECIPES["int8"])
    assert other.fingerprint != first.fingerprint


def test_recipes_from_files(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("max_kld = 0.1\n[linear]\nbits = 8\ngroup_size = 64\n")
    assert load_recipe(str(path)) == Recipe(name="mine", max_kld=0.1, linear=Scheme(bits=8, group_size=64))
    path.write_text("[linear]\nbits = 7\n")
    with pytest.raises(InputError, match=r"mine\.toml: linear\.bits"):
        load_recipe(str(path))


def test_linears_off_the_lattice_of_others_are_a_fine_tunes() -> None:
    embedding, linear, router = "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "router.proj.weight"
    router, other = f"model.layers.0.{router}", "model.layers.1.mlp.up_proj.weight"
    default, every = RECIPES["default"], RECIPES["default"].model_copy(update={"requantize_mixed": True})
    none = default.model_copy(update={"requantize_mixed": False})

    def chosen(recipe: Recipe, *lattices: bool | None, left: tuple[str, ...] = ()) -> list[str]:
        return list(recipe.chosen(dict(zip((embedding, linear, router, other), lattices, strict=True)), left))

    assert chosen(default, False, False, False, False) == [embedding, linear, router, other]
    assert chosen(default, True, False, False, False) == [linear, other]
    assert chosen(default, False, False, False, True) == [linear]
    assert chosen(default, False, None, False, False) == []  # its maker's choice
    # So it is where a lattice is found beside them: of a GGUF file, matrices of a type that is read as plain numbers.
    assert chosen(default, None, False, False, True) == []
    assert chosen(default, True, None, False, False) == []
    assert chosen(every, None, False, False, True) == [linear, router]
    assert chosen(default, None, False, False, False, left=(linear,)) == [linear]
    assert chosen(every, False, False, False, True) == [embedding, linear, router]
    assert chosen(none, False, False, False, True) == []
    assert chosen(RECIPES["lossless"], True, False, False, False) == []
