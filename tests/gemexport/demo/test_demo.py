"""The demo model is the yardstick of many tests, so it is itself held to what they take for granted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemexport import demo
from gemexport.demo import qat
from gemexport.demo import tokenizer as demo_tokenizer
from gemexport.formats.checkpoint import open_checkpoint
from gemexport.formats.gemma.families import named
from gemexport.formats.gemma.families.gemma4 import Gemma4
from gemexport.formats.tensor import expand, from_bf16

FAMILIES: list[demo.FamilyName] = ["gemma3", "gemma4"]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("family", FAMILIES)
def test_same_seed_same_bytes(tmp_path: Path, family: demo.FamilyName) -> None:
    first = files(demo.make(tmp_path / "a", family=family, size="tiny"))
    again = files(demo.make(tmp_path / "b", family=family, size="tiny"))
    other = files(demo.make(tmp_path / "c", family=family, size="tiny", seed=1))
    assert first == again
    assert other["model.safetensors"] != first["model.safetensors"]
    assert other["tokenizer.json"] == first["tokenizer.json"]


def test_weights_are_the_same_on_every_machine(tmp_path: Path) -> None:
    """The digest of the weights as it was when this was written; a change here changes what every test sees."""
    from hashlib import sha256

    weights = demo.make(tmp_path / "tiny", size="tiny") / "model.safetensors"
    assert sha256(weights.read_bytes()).hexdigest()[:16] == "7fcc4890339b7f8a"


def test_gemma4_has_every_feature_of_e2b(tiny_gemma4: Path) -> None:
    model = open_checkpoint(tiny_gemma4).architecture
    own = [layer for layer in model.layers if layer.owns_cache]
    shared = [layer for layer in model.layers if not layer.owns_cache]
    assert model.per_layer
    assert model.tied
    assert model.final_softcap == 30.0
    assert len({layer.head_dim for layer in model.layers}) == 2
    for kind in (True, False):
        donors = {layer.kv_source for layer in shared if layer.sliding is kind}
        assert len(donors) == 1
        assert len([layer for layer in own if layer.sliding is kind]) > 1, "one that is no donor, too"
    assert {layer.intermediate_size for layer in shared} == {2 * layer.intermediate_size for layer in own}
    full = next(layer for layer in model.layers if not layer.sliding)
    assert full.rope.rotary_dims * 4 == full.head_dim
    tensors = open_checkpoint(tiny_gemma4).tensors
    scalars = {float(tensors[f"model.layers.{layer.index}.layer_scalar"].numpy()[0]) for layer in model.layers}
    assert len(scalars) == len(model.layers)
    assert 1.0 not in scalars


@pytest.mark.parametrize("spelling", ["global_head_dim", "per_layer_config"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_spellings_and_wrapping_are_one_model(tmp_path: Path, tiny_gemma4: Path, spelling: str, wrapped: bool) -> None:
    folder = demo.make(tmp_path / "other", size="tiny", spelling=spelling, wrapped=wrapped, max_shard_bytes=200_000)
    expected, found = open_checkpoint(tiny_gemma4), open_checkpoint(folder)
    assert (folder / "model.safetensors.index.json").exists()
    assert found.architecture == expected.architecture
    assert bool(found.left_out) is wrapped
    for name, tensor in expected.tensors.items():
        np.testing.assert_array_equal(found.tensors[name].numpy(), tensor.numpy())


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_takes_it_whole(tmp_path: Path, family: demo.FamilyName) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = demo.make(tmp_path / "model", family=family, size="tiny")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not [key for key in info["missing_keys"] if key != "lm_head.weight"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(demo_tokenizer.CORPUS, return_tensors="pt").input_ids[:, :256]
    with torch.no_grad():
        logits = model(tokens).logits[0]
    best = logits.topk(2).values
    margins = best[:, 0] - best[:, 1]
    assert margins.median() > 0.5, "a choice between tokens must not hang on rounding"
    assert (logits.argmax(-1) == tokens[0]).float().mean() < 0.2, "it must not just repeat what it is given"
    assert len(set(logits.argmax(-1).tolist())) > 30


@pytest.mark.parametrize("family", FAMILIES)
def test_chat_template_makes_turns(tmp_path: Path, family: demo.FamilyName) -> None:
    transformers = pytest.importorskip("transformers")
    folder = demo.make(tmp_path / "model", family=family, size="tiny")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "Hello"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    start, end = named(family).wording.turn
    assert text == f"<bos>{start}user\nHello{end}\n{start}model\n"
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokenizer.convert_ids_to_tokens(ids[:2]) == ["<bos>", start]


@pytest.mark.parametrize("family", FAMILIES)
def test_tokenizer_is_laid_out_as_gemmas(family: demo.FamilyName) -> None:
    tokenizer = demo_tokenizer.tokenizer_json(2048, named(family).wording)
    vocab: dict[str, int] = tokenizer["model"]["vocab"]
    assert list(vocab)[:5] == ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    assert list(vocab.values()) == list(range(2048))
    merged = [left + right for left, right in tokenizer["model"]["merges"]]
    assert [vocab[piece] for piece in merged] == sorted(vocab[piece] for piece in merged)
    assert sum(token.startswith("<0x") for token in vocab) == 256


@settings(deadline=None, max_examples=50)
@given(st.text(max_size=40))
def test_every_text_survives_the_tokenizer(text: str) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(json.dumps(demo_tokenizer.tokenizer_json(512, Gemma4.wording)))
    decoded = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids)
    assert decoded == text.replace("▁", " ")


def test_a_vocabulary_must_have_room() -> None:
    with pytest.raises(ValueError, match="at least"):
        demo_tokenizer.vocabulary(300, Gemma4.wording)


@pytest.mark.parametrize("rule", qat.RULES)
def test_grids_are_what_their_rule_says(rule: str) -> None:
    weights = np.random.default_rng(3).standard_normal((16, 128), dtype=np.float32)
    weights[2, 32:64] = 0
    codes, scales = qat.quantize(weights, rule)
    block = 128 // scales.shape[1]
    assert block == (128 if rule == "row" else 32)
    assert codes.min() >= -8
    assert codes.max() <= 7
    blocks = np.abs(weights.reshape(16, -1, block)).max(-1)
    if rule == "max/-8":
        assert (codes.reshape(16, -1, block).min(-1)[blocks > 0] == -8).all(), "of either sign, the largest one is -8"
        np.testing.assert_allclose(abs(scales), blocks / 8, rtol=2**-8)
    elif rule.startswith("max/"):
        np.testing.assert_allclose(scales, blocks / float(rule.removeprefix("max/")), rtol=2**-8)
    exact = codes * expand(scales, block)
    np.testing.assert_allclose(from_bf16(qat.on_grid(weights, rule)), exact, rtol=2**-8)
    held: Any = scales.astype(np.float16) if rule == "f16" else scales.view(np.uint32) & 0xFFFF
    assert np.array_equal(held, scales) if rule == "f16" else not held.any()


def test_least_squares_is_the_closest_rule_of_positive_scales() -> None:
    weights = np.random.default_rng(5).standard_normal((64, 64), dtype=np.float32)
    errors = {
        rule: float(np.square(from_bf16(qat.on_grid(weights, rule)) - weights).sum())
        for rule in qat.RULES
        if rule != "max/-8"
    }
    assert min(errors, key=lambda rule: errors[rule]) == "least-squares"


def test_bad_rules_are_refused() -> None:
    with pytest.raises(ValueError, match="scale rule"):
        qat.quantize(np.zeros((1, 32), np.float32), "max/9")
    with pytest.raises(ValueError, match="whole blocks"):
        qat.quantize(np.zeros((1, 48), np.float32))
