"""Every family, small and random with its real structure, through every default artefact; and in full precision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import gemexport
from gemexport import demo
from gemexport.demo.configs import wrapped
from gemexport.formats.checkpoint import open_checkpoint
from gemexport.formats.gemma.families import named
from gemexport.formats.gemma.model import describe
from gemexport.formats.grids.recipe import RECIPES
from gemexport.formats.storage.errors import InputError
from gemexport.registry import TARGETS
from gemexport.report.schema import Report

TINY = demo.SIZES["tiny"]
# Of Gemma 3 4B and more: positions of full layers go eight times as slowly.
SCALED = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
# Windows as long as what is tested: mlx-lm's Gemma 2 has none.
WIDE = {"sliding_window": 4096}


def config_of(name: str) -> dict[str, Any]:
    """The config.json of a small model with the structure of what the name stands for."""
    if name == "gemma4-12b":
        return wrapped(demo.config_json("gemma4_unified", TINY), named("gemma4_unified"))
    if name == "gemma3n-whole":
        return wrapped(demo.config_json("gemma3n", TINY), named("gemma3n"))
    if name == "gemma3-4b":
        return wrapped(demo.config_json("gemma3", TINY) | SCALED, named("gemma3"))
    if name == "shieldgemma2":
        return wrapped(demo.config_json("gemma3", TINY) | SCALED, named("shieldgemma2"))
    if name == "gemma2-wide":
        return demo.config_json("gemma2", TINY) | WIDE
    return demo.config_json(name, TINY)


def made(name: str, folder: Path, rule: str | None = "max/7") -> Path:
    config = config_of(name)
    prefix = "model.language_model." if "text_config" in config else "model."
    return demo.write(folder / name, config, rule=rule, prefix=prefix)


def supported(name: str, variants: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Of these variants, those that the format's program runs."""
    model = describe(config_of(name), name)
    held = {
        target: tuple(variant for variant in some if TARGETS[target].supports(model, variant) is None)
        for target, some in variants.items()
    }
    return {target: some for target, some in held.items() if some}


def passed(report: Report) -> None:
    for item in report.artifacts:
        assert (item.format, item.variant, item.status, item.reason) == (item.format, item.variant, "pass", None)


NAMES = ("gemma4-12b", "gemma3-4b", "gemma2", "gemma", "vaultgemma")
# Both spellings of Gemma 3n are one decoder, of 25 layers: one spelling a kind of weights.
CASES = [
    *((name, rule) for name in NAMES for rule in ("max/7", None)),
    ("gemma3n", "max/7"),
    ("gemma3n-whole", None),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rule"), CASES, ids=[f"{name}-{'lattice' if rule else 'plain'}" for name, rule in CASES]
)
def test_every_default_artefact_passes(name: str, rule: str | None, tmp_path: Path) -> None:
    variants = supported(name, {target.name: target.variants for target in TARGETS.values()})
    # What 4 bits cost random weights is not asked here: a recipe's budget, for which no width is chosen.
    recipe = RECIPES["default"].model_copy(update={"max_kld": None if rule else 100.0})
    report = gemexport.export(
        made(name, tmp_path, rule),
        tmp_path / "out",
        formats=list(variants),
        variants=variants,
        tokens=128,
        recipe=recipe,
    )
    passed(report)
    assert sum(map(len, variants.values())) == len(report.artifacts) >= 4
    for item in report.artifacts:
        assert item.weights
        if rule is not None:
            assert all(tensor.exact_fraction == 1 for tensor in item.weights.tensors if len(tensor.shape) > 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NAMES, "gemma2-wide"])
def test_programs_continue_alike_in_full_precision(name: str, tmp_path: Path) -> None:
    """llama.cpp, mlx-lm and ONNX Runtime, through their own caches, 32 tokens."""
    variants = supported(name, {"gguf": ("F32",), "mlx": ("f32",), "onnx": ("f32",)})
    report = gemexport.export(made(name, tmp_path), tmp_path / "out", formats=list(variants), variants=variants,
                              tokens=128)  # fmt: skip
    passed(report)
    for item in report.artifacts:
        assert item.logits
        assert item.logits.greedy
        assert (item.logits.greedy.tokens, item.logits.greedy.equal) == (32, 32)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["max/7", None], ids=["lattice", "plain"])
def test_an_embedding_model_is_judged_by_its_vectors(rule: str | None, tmp_path: Path) -> None:
    wanted = {"gguf": ("Q4_0", "F32"), "onnx": ("int4", "f32")}
    variants = supported("embeddinggemma", wanted)
    folder = made("embeddinggemma", tmp_path, rule)
    budget = None if rule else 1.0  # what 4 bits cost random weights is not asked here
    report = gemexport.export(
        folder, tmp_path / "out", formats=list(variants), variants=variants, tokens=1024, max_kld=budget
    )
    passed(report)
    assert variants == wanted
    for item in report.artifacts:
        assert item.logits is None
        assert item.vectors
        assert item.vectors[-1].arithmetic == "f32"
        assert all(run.texts >= 5 for run in item.vectors)
        assert item.vector_loss
        assert item.weights
        if rule is not None:
            assert item.vector_loss.word == "lossless"
            assert all(tensor.exact_fraction == 1 for tensor in item.weights.tensors if len(tensor.shape) > 1)
    source = tmp_path / "out" / str(report.artifacts[0].path)
    again = gemexport.export(source, tmp_path / "again", formats=["gguf"], tokens=512, max_kld=budget)
    passed(again)


@pytest.mark.slow
def test_12b_out_of_what_other_formats_hold(tmp_path: Path) -> None:
    """GGUF, MLX and compressed-tensors of a 12B-shaped model as MODEL: their codes pass through."""
    variants = {"gguf": ("Q4_0",), "mlx": ("4bit",), "compressed-tensors": ("w4a16",)}
    first = gemexport.export(
        made("gemma4-12b", tmp_path), tmp_path / "first", formats=list(variants), variants=variants, validate=False
    )
    for item in first.artifacts:
        assert item.path
        out = tmp_path / f"out-{item.format}"
        again = gemexport.export(tmp_path / "first" / item.path, out, formats=["gguf", "onnx"], tokens=128)
        passed(again)
        for artifact in again.artifacts:
            assert artifact.weights
            assert all(tensor.exact_fraction == 1 for tensor in artifact.weights.tensors if len(tensor.shape) > 1)


def test_a_classifier_that_transformers_saved(tmp_path: Path) -> None:
    """ShieldGemma 2's decoder is found in the classifier's own names, and is the Gemma 3 in it."""
    transformers = pytest.importorskip("transformers")
    text = {key: value for key, value in demo.config_json("gemma3", TINY).items() if key != "architectures"} | SCALED
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = transformers.ShieldGemma2Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = transformers.ShieldGemma2ForImageClassification(config)
    folder = tmp_path / "shieldgemma2"
    model.save_pretrained(folder)
    tokens = demo.make(tmp_path / "tokens", family="gemma3", size="tiny") / "tokenizer.json"
    (folder / "tokenizer.json").write_bytes(tokens.read_bytes())
    checkpoint = open_checkpoint(folder)
    assert checkpoint.model.family.name == "shieldgemma2"
    assert checkpoint.architecture.tied
    assert next(layer.rope.factor for layer in checkpoint.architecture.layers if not layer.sliding) == 8.0
    assert any("vision_tower" in name for name in checkpoint.left_out)
    state = model.model.get_decoder().state_dict()
    for name, tensor in checkpoint.tensors.items():
        expected = state[name.removeprefix("model.")].float().numpy()
        assert (tensor.numpy() == expected.reshape(tensor.shape)).all()


def test_the_verdict_of_a_classifier_is_a_choice_of_two_tokens() -> None:
    """Known by its config alone: the decoder in it is a Gemma 3, and so is what its artefacts say that they are."""
    config = config_of("shieldgemma2")
    assert describe(config, "config.json").choice is None  # a vocabulary without the tokens
    said = config | {"yes_token_index": 300, "no_token_index": 301}
    assert describe(said, "config.json").choice == (300, 301)
    real = config | {"text_config": config["text_config"] | {"vocab_size": 262_208}}
    assert describe(real, "config.json").choice == (10_784, 3771)
    assert describe(real["text_config"], "config.json").choice is None


@pytest.mark.slow
def test_the_loss_of_a_classifier_tells_what_its_verdict_is_off_by(tmp_path: Path) -> None:
    config = config_of("shieldgemma2") | {"yes_token_index": 300, "no_token_index": 301}
    folder = demo.write(tmp_path / "model", config, rule=None, prefix="model.model.language_model.")
    report = gemexport.export(folder, tmp_path / "out", formats=["mlx"], variants={"mlx": ("4bit", "f32")}, tokens=128,
                              max_kld=100.0)  # fmt: skip
    passed(report)
    moved = {item.variant: item.loss for item in report.artifacts}
    four, exact = moved["4bit"], moved["f32"]
    assert four is not None
    assert exact is not None
    assert four.choice_mean is not None
    assert four.choice_max is not None
    assert exact.choice_max is not None
    assert four.choice_max > four.choice_mean > 1e-3
    assert exact.choice_max < 1e-4
    html = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert html.count("P(Yes) / (P(Yes) + P(No))") == 2


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("diffusion_gemma", "is DiffusionGemma, which denoises a block of tokens at once and would need an encoder"),
        ("embedding_gemma2", "is an EmbeddingGemma 2"),
    ],
)
def test_relatives_are_refused_by_name(kind: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "text_config": {}}))
    with pytest.raises(InputError, match=words):
        open_checkpoint(tmp_path)


def test_an_encoder_without_its_modules_is_refused_as_what_it_is() -> None:
    config = demo.config_json("gemma3", TINY) | {"use_bidirectional_attention": True}
    with pytest.raises(InputError, match=r"as an encoder such as EmbeddingGemma does, and no modules\.json says"):
        describe(config, "config.json")
