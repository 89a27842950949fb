"""GGUF export: what passes through unchanged, what falls back and says so, and the tokenizer out of tokenizer.json."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Type
from gguf.constants import TokenType
from samples import with_grids

from gemexport import demo
from gemexport.exporters import gguf as exporter
from gemexport.exporters.gguf.facts import metadata, problem, q_norm_factor, rope_frequencies
from gemexport.exporters.gguf.tokenizer import (
    build_vocabulary,
    sentencepiece_scores,
    token_type,
    tokenizer,
)
from gemexport.formats import gguf
from gemexport.formats.checkpoint import Checkpoint, open_checkpoint
from gemexport.formats.gemma.model import Model, describe
from gemexport.formats.gguf.container import read
from gemexport.formats.storage.errors import InputError
from gemexport.formats.tensor import ArrayTensor, DType, Grid, expand, round_to
from gemexport.validators.checks.weights import compare


def _lattice(name: str, codes: np.ndarray, scales: np.ndarray, bits: int, dtype: DType = "bf16") -> ArrayTensor:
    """A tensor on a grid, as a checkpoint with grids yields it."""
    block = codes.shape[1] // scales.shape[1]
    values = round_to(codes * expand(scales, block), dtype)
    return ArrayTensor(name, values, dtype, codes, scales, Grid(bits, block, "f32", lossless=True))


def _random_lattice(shape: tuple[int, int], block: int, bits: int, dtype: DType = "bf16") -> ArrayTensor:
    stream = np.random.default_rng(3)
    codes = stream.integers(-(1 << (bits - 1)), 1 << (bits - 1), shape).astype(np.int8)
    scales = round_to(stream.uniform(0.001, 0.1, (shape[0], shape[1] // block)).astype(np.float32), "bf16")
    return _lattice("model.embed_tokens.weight", codes, scales, bits, dtype)


@pytest.mark.parametrize("variant", ["Q4_0", "Q8_0", "BF16", "F32"])
@pytest.mark.parametrize("family", ["gemma3", "gemma4"])
def test_every_weight_of_a_lattice_is_exact(
    family: str, variant: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    checkpoint = request.getfixturevalue(family)
    path = tmp_path / f"{variant}.gguf"
    seen = []
    result = exporter.export(checkpoint, path, variant=variant, progress=seen.append)
    assert result.notes == []
    assert (result.path, result.variant, result.files) == (path, variant, [path])
    assert sum(seen) == checkpoint.nbytes()
    judged = compare(checkpoint.tensors, gguf.tensors(path))
    assert (judged.missing, judged.unexpected) == ((), ())
    assert all(item.exact == item.compared for item in judged.tensors)
    wanted = {"Q4_0": Type.Q4_0, "Q8_0": Type.Q8_0, "BF16": Type.BF16, "F32": Type.F32}[variant]
    for tensor in read(path).tensors.values():
        assert tensor.type == (wanted if len(tensor.shape) == 2 else Type.F32)


def test_the_same_input_gives_the_same_bytes(gemma4: Checkpoint, tmp_path: Path) -> None:
    first, second = tmp_path / "first.gguf", tmp_path / "second.gguf"
    exporter.export(gemma4, first)
    exporter.export(gemma4, second)
    assert first.read_bytes() == second.read_bytes()


def test_plain_tensors_keep_their_dtype_and_round_in_q8_0(tiny_gemma3: Path, tmp_path: Path) -> None:
    plain = open_checkpoint(tiny_gemma3)
    kept = exporter.export(plain, tmp_path / "kept.gguf")
    assert {item.type for item in read(kept.path).tensors.values()} == {Type.BF16, Type.F32}
    rounded = exporter.export(plain, tmp_path / "rounded.gguf", variant="Q8_0")
    judged = compare(plain.tensors, gguf.tensors(rounded.path))
    assert all(item.max_relative_error < 1 / 127 for item in judged.tensors)


def test_a_recipe_for_plain_tensors_passes_through(tiny_gemma3: Path, tmp_path: Path) -> None:
    """Grids that the recipe made keep their codes, 8-bit ones too, whatever the rounding cost."""
    plain = open_checkpoint(tiny_gemma3)
    noise = np.random.default_rng(0)
    tensors: dict[str, Any] = {}
    for name, tensor in plain.tensors.items():
        values = tensor.numpy()
        moved = values * noise.uniform(0.5, 1.5, values.shape).astype(np.float32) if values.ndim == 2 else values
        tensors[name] = ArrayTensor(name, round_to(moved, "bf16"), "bf16")
    moved_checkpoint = replace(plain, tensors=tensors)
    checkpoint = with_grids(moved_checkpoint, tmp_path / "grids")
    path = exporter.export(checkpoint, tmp_path / "model.gguf").path
    found = gguf.tensors(path)
    assert read(path).tensors["token_embd.weight"].type == Type.Q8_0
    for name, tensor in checkpoint.tensors.items():
        if tensor.grid is not None:
            wanted, stored = tensor.rows(0, tensor.shape[0]), found[name].rows(0, tensor.shape[0])
            assert np.array_equal(wanted.codes, stored.codes)
            assert np.array_equal(wanted.scales, stored.scales)


@pytest.mark.parametrize(
    ("block", "bits", "kind"), [(32, 4, Type.Q4_0), (64, 4, Type.Q4_0), (128, 2, Type.Q4_0), (128, 8, Type.Q8_0)]
)
def test_wide_blocks_repeat_their_scale(gemma3: Checkpoint, tmp_path: Path, block: int, bits: int, kind: Type) -> None:
    path, notes = _export_with(gemma3, tmp_path, _random_lattice((512, 128), block, bits))
    assert notes == []
    assert read(path).tensors["token_embd.weight"].type == kind


@pytest.mark.parametrize(
    ("tensor", "variant", "kind", "note"),
    [
        (_random_lattice((512, 128), 16, 4), "Q4_0", Type.BF16, "without its grid: blocks of 16 weights"),
        (_random_lattice((512, 128), 16, 4, "f16"), "Q4_0", Type.F16, "without its grid: blocks of 16 weights"),
        (_random_lattice((512, 128), 16, 4), "Q8_0", Type.Q8_0, "without its grid: blocks of 16 weights"),
        (_random_lattice((512, 48), 16, 4), "Q4_0", Type.BF16, "rows of 48 weights are no multiple of 32"),
        (_random_lattice((512, 128), 32, 4, "f32"), "BF16", Type.BF16, "was rounded from f32"),
    ],
)
def test_what_a_block_cannot_hold_is_noted(
    gemma3: Checkpoint, tmp_path: Path, tensor: ArrayTensor, variant: str, kind: Type, note: str
) -> None:
    path, notes = _export_with(gemma3, tmp_path, tensor, variant)
    assert len(notes) == 1
    assert notes[0].startswith("model.embed_tokens.weight ")
    assert note in notes[0]
    assert read(path).tensors["token_embd.weight"].type == kind
    if kind not in (Type.Q8_0,) and variant != "BF16":
        stored = gguf.tensors(path)["model.embed_tokens.weight"]
        assert np.array_equal(stored.numpy(), tensor.numpy())


def test_a_scale_that_f16_cannot_hold_keeps_the_tensor_in_its_dtype(
    gemma3: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One scale of the last rows is too small: what was packed before it is taken back."""
    monkeypatch.setattr(exporter, "slices", lambda tensor: [(i, i + 64) for i in range(0, tensor.shape[0], 64)])
    base = _random_lattice((512, 128), 32, 4)
    part = base.rows(0, 512)
    scales = part.scales.copy()
    scales[500, 1] = 2.0**-26
    tensor = _lattice(base.name, part.codes, scales, 4)
    path, notes = _export_with(gemma3, tmp_path, tensor)
    assert notes == ["model.embed_tokens.weight is stored as BF16: a scale is no f16 number"]
    assert np.array_equal(gguf.tensors(path)[base.name].numpy(), tensor.numpy())
    judged = compare(gemma3.tensors, gguf.tensors(path))
    assert all(item.exact == item.compared for item in judged.tensors if item.name != base.name)


def _export_with(
    checkpoint: Checkpoint, folder: Path, tensor: ArrayTensor, variant: str = "Q4_0"
) -> tuple[Path, list[str]]:
    changed = replace(checkpoint, tensors={**checkpoint.tensors, tensor.name: tensor})
    result = exporter.export(changed, folder / "model.gguf", variant=variant)
    return result.path, result.notes


def test_nothing_is_left_of_an_export_that_fails(gemma3: Checkpoint, tmp_path: Path) -> None:
    class Broken(ArrayTensor):
        def rows(self, start: int, stop: int) -> Any:
            raise KeyError("the disk is gone")

    values = np.zeros((512, 128), np.float32)
    broken = replace(gemma3, tensors={**gemma3.tensors, "model.norm.weight": ArrayTensor("n", np.ones(64, np.float32))})
    broken = replace(broken, tensors={**broken.tensors, "model.embed_tokens.weight": Broken("e", values, "bf16")})
    with pytest.raises(KeyError):
        exporter.export(broken, tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == []


def test_metadata_describes_every_feature(gemma4: Checkpoint) -> None:
    decoder = gemma4.architecture
    values = {key: value.value for key, value in metadata(gemma4.model, "name", "Q4_0").items()}
    assert values["general.architecture"] == "gemma4"
    assert values["gemma4.attention.shared_kv_layers"] == sum(not layer.owns_cache for layer in decoder.layers)
    assert values["gemma4.attention.sliding_window_pattern"] == [layer.sliding for layer in decoder.layers]
    assert values["gemma4.feed_forward_length"] == [layer.intermediate_size for layer in decoder.layers]
    assert values["gemma4.attention.key_length"] == 2 * values["gemma4.attention.key_length_swa"]
    assert values["gemma4.embedding_length_per_layer_input"] == decoder.per_layer.dim
    assert values["gemma4.final_logit_softcapping"] == 30.0
    frequencies = rope_frequencies(gemma4.model)
    full = next(layer for layer in decoder.layers if not layer.sliding)
    assert frequencies.shape == (full.head_dim // 2,)
    assert (frequencies == 1).sum() == full.rope.rotary_dims // 2
    assert (frequencies > 1e29).sum() == full.head_dim // 2 - full.rope.rotary_dims // 2


def test_an_attention_scale_that_llama_cpp_lacks_goes_into_the_query_norm(gemma3: Checkpoint, tmp_path: Path) -> None:
    scale = gemma3.architecture.attention_scale
    decoder = gemma3.architecture.model_copy(update={"attention_scale": scale / 3})
    changed = replace(gemma3, model=replace(gemma3.model, decoder=decoder))
    assert q_norm_factor(gemma3.model) == 1.0
    assert q_norm_factor(changed.model) == pytest.approx(1 / 3)
    path = exporter.export(changed, tmp_path / "scaled.gguf").path
    judged = compare(gemma3.tensors, gguf.tensors(path))
    assert all(item.exact == item.compared for item in judged.tensors)


def test_decoders_that_llama_cpp_would_compute_differently_are_refused(gemma4: Checkpoint, tmp_path: Path) -> None:
    decoder = gemma4.architecture
    last = decoder.layers[-1]
    wrong_donor = last.model_copy(update={"kv_source": 0})
    layers = (*decoder.layers[:-1], wrong_donor)

    def changed(**update: Any) -> Model:
        return replace(gemma4.model, decoder=decoder.model_copy(update=update))

    assert "shared layers" in (problem(changed(layers=layers)) or "")
    with pytest.raises(InputError, match=r"llama\.cpp cannot run this decoder: its attention scores are soft-capped"):
        exporter.export(replace(gemma4, model=changed(attention_softcap=50.0)), tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == []
    assert problem(gemma4.model) is None


def _tokenizer_json(**model: Any) -> dict[str, Any]:
    vocab = ["<pad>", "<eos>", "<bos>", "<unk>", "\n", "▁▁", "<0x41>", "a", "b", "▁", "ab", "▁ab", "<x>"]
    merges = [["▁", "▁"], ["a", "b"], ["▁", "ab"]]
    special = [{"id": i, "content": text, "special": True} for i, text in enumerate(vocab[:4])]
    added = [{"id": i, "content": vocab[i], "special": False} for i in (4, 5, 12)]
    return {
        "added_tokens": [*special, *added],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"},
        "model": {
            "type": "BPE",
            "byte_fallback": True,
            "unk_token": "<unk>",
            "vocab": {text: i for i, text in enumerate(vocab)},
            "merges": merges,
            **model,
        },
    }


def test_token_types() -> None:
    vocabulary = build_vocabulary(_tokenizer_json(), 13)
    control, user, normal = TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.NORMAL
    expected = [control, control, control, TokenType.UNKNOWN, user, normal, TokenType.BYTE, *[normal] * 5, user]
    assert vocabulary.types == expected
    assert vocabulary.notes == []
    assert token_type("<|tool_call>", {"special": True}, unknown=False) == user


def test_surplus_tokens_are_left_out_and_missing_ones_filled_in() -> None:
    small = build_vocabulary(_tokenizer_json(), 11)
    assert small.texts[-1] == "ab"
    assert small.notes == ["2 tokens beyond the vocabulary of 11 are left out: <x> (12), ▁ab (11)"]
    large = build_vocabulary(_tokenizer_json(), 15)
    assert large.texts[13:] == ["[PAD13]", "[PAD14]"]
    assert large.types[13:] == [TokenType.UNUSED] * 2
    assert len(large.notes) == 1


def test_scores_exist_only_for_merges_of_a_sentencepiece_model() -> None:
    vocabulary = build_vocabulary(_tokenizer_json(), 13)
    merges = [tuple(pair) for pair in _tokenizer_json()["model"]["merges"]]
    scores = sentencepiece_scores(vocabulary, merges)
    assert scores is not None
    ranked = [scores[vocabulary.texts.index(text)] for text in ("▁▁", "ab", "▁ab", "<x>")]
    assert ranked == sorted(ranked, reverse=True)
    assert sentencepiece_scores(vocabulary, merges[:-1]) is None, "a pair without a merge would be joined"
    spelled = build_vocabulary(_tokenizer_json(vocab={**_tokenizer_json()["model"]["vocab"], "▁a": 13}), 14)
    split = [("▁", "▁"), ("▁", "ab"), ("a", "b"), ("▁a", "b"), ("▁", "a")]
    assert sentencepiece_scores(spelled, split) is None, "pairs of one token have different ranks"


def test_a_lone_tokenizer_json_is_enough(gemma3: Checkpoint, gemma4: Checkpoint) -> None:
    for checkpoint, model in ((gemma3, "llama"), (gemma4, "gemma4")):
        values, notes = tokenizer(checkpoint)
        assert notes == []
        assert values["tokenizer.ggml.model"].value == model
        assert ("tokenizer.ggml.merges" in values) == (model == "gemma4")
        assert values["tokenizer.ggml.add_bos_token"].value is True
        assert values["tokenizer.ggml.add_space_prefix"].value is False
        assert values["tokenizer.ggml.bos_token_id"].value == checkpoint.architecture.bos_token_id
        assert len(values["tokenizer.ggml.tokens"].value) == checkpoint.architecture.vocab_size


def test_the_chat_template_comes_from_wherever_it_is(tiny_gemma3: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_gemma3, folder)
    settings_path = folder / "tokenizer_config.json"
    settings = json.loads(settings_path.read_text("utf-8"))
    settings["chat_template"] = [{"name": "default", "template": "D"}, {"name": "tools", "template": "T"}]
    settings_path.write_text(json.dumps(settings), "utf-8")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    values, _ = tokenizer(open_checkpoint(folder))
    assert values["tokenizer.chat_template"].value == "D"
    assert values["tokenizer.chat_template.tools"].value == "T"
    (folder / "chat_template.jinja").write_text("J", "utf-8")
    values, _ = tokenizer(open_checkpoint(folder))
    assert values["tokenizer.chat_template"].value == "J"


def test_a_tokenizer_that_is_not_gemmas_is_refused_or_noted(tiny_gemma3: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_gemma3, folder)
    path = folder / "tokenizer.json"
    source = json.loads(path.read_text("utf-8"))
    split = {"type": "Split", "pattern": {"Regex": r"\w+"}, "behavior": "Isolated", "invert": False}
    source["pre_tokenizer"] = split
    path.write_text(json.dumps(source), "utf-8")
    _, notes = tokenizer(open_checkpoint(folder))
    assert any("splits a text before merging" in note for note in notes)
    source["model"]["byte_fallback"] = False
    path.write_text(json.dumps(source), "utf-8")
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        tokenizer(open_checkpoint(folder))


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"laurel_rank": 32}, "laurel_rank"),
        ({"altup_num_inputs": 3}, "altup_num_inputs"),
        ({"altup_active_idx": 1}, "altup_active_idx"),
        ({"hidden_size_per_layer_input": 128}, "hidden_size_per_layer_input"),
        ({"activation_sparsity_pattern": 0.5}, "activation_sparsity_pattern"),
        ({"num_kv_shared_layers": 0}, "num_kv_shared_layers"),
        ({"final_logit_softcapping": None}, "final_logit_softcapping"),
        ({"intermediate_size": [96] * 24 + [64]}, "intermediate_size"),
        ({"vocab_size_per_layer_input": 600}, "another vocabulary"),
    ],
)
def test_what_llama_cpps_gemma_3n_has_built_in_is_refused_otherwise(said: dict[str, Any], words: str) -> None:
    config = demo.config_json("gemma3n", demo.SIZES["tiny"])
    assert problem(describe(config, "config.json")) is None
    assert words in (problem(describe(config | said, "config.json")) or "")
