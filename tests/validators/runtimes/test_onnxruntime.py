"""ONNX Runtime computes what the artefact's numbers mean, in one go and token by token."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from gemexport.formats.checkpoint import Checkpoint, open_checkpoint
from gemexport.formats.storage.errors import InputError
from gemexport.judge.attempts import Attempts
from gemexport.judge.wording import check_wording

pytest.importorskip("torch")
ort = pytest.importorskip("onnxruntime")
export = pytest.importorskip("gemexport.exporters.onnx").export
adapter = pytest.importorskip("gemexport.validators.runtimes.onnxruntime")
divergence = pytest.importorskip("gemexport.validators.checks.divergence")
whole = pytest.importorskip("gemexport.validators.runtimes.pytorch").whole
tensors = pytest.importorskip("gemexport.formats.onnx").tensors

TOKENS = np.random.default_rng(0).integers(10, 500, 75).tolist()


@pytest.fixture(scope="module", params=["gemma3", "gemma4"])
def checkpoint(request: pytest.FixtureRequest) -> Checkpoint:
    found: Checkpoint = request.getfixturevalue(request.param)
    return found


def agrees(checkpoint: Checkpoint, path: Path) -> None:
    """The artefact gives the logits of transformers with its weights, and the same continuation."""
    runtime = adapter.load(path, threads=1, context=128)
    model = whole(checkpoint.text_config, tensors(path), 1)
    total = divergence.Divergence()
    total.add(model.logits(TOKENS), runtime.logits(TOKENS), TOKENS)
    assert total.kld_max < 1e-6
    assert total.top1_agreement == 1.0
    assert runtime.greedy(TOKENS[:21], 32) == model.greedy(TOKENS[:21], 32)
    assert runtime.arithmetic == "f32"
    assert runtime.tokenize("Hello") is not None
    runtime.close()


@pytest.mark.parametrize("variant", ["int4", "f32", "npu"])
def test_an_artefact_is_the_model(checkpoint: Checkpoint, tmp_path: Path, variant: str) -> None:
    # The window is 8 positions, the prompt's chunk 16: every cache overflows, and the first chunk has padding.
    agrees(checkpoint, export(checkpoint, tmp_path / variant, variant=variant, context=128, prefill=16).path)


def test_one_decoder_at_a_time_gives_what_both_give(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = export(checkpoint, tmp_path / "npu", variant="npu", context=128, prefill=16).path
    found, held = [], []
    for frugal in (False, True):
        runtime = adapter.load(path, threads=1, context=128, frugal=frugal)
        assert isinstance(runtime, adapter.NpuModel)
        found.append((runtime.logits(TOKENS), runtime.greedy(TOKENS[:21], 4)))
        held.append(sorted(runtime.sessions))
        runtime.close()
    np.testing.assert_array_equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    assert held == [["decode", "embeddings", "prefill"], ["decode", "embeddings"]]


@pytest.mark.parametrize("variant", ["int4", "npu"])
def test_plain_weights_and_a_capped_attention(checkpoint: Checkpoint, tmp_path: Path, variant: str) -> None:
    """Nothing quantized, and the cap that Gemma 2 had against the same graph without one."""
    plain = open_checkpoint(checkpoint.path)
    path = export(plain, tmp_path / variant, variant=variant, context=128, prefill=16).path
    agrees(plain, path)
    decoder = plain.architecture.model_copy(update={"attention_softcap": 0.5})
    capped = replace(plain, model=replace(plain.model, decoder=decoder))
    other = export(capped, tmp_path / f"capped-{variant}", variant=variant, context=128, prefill=16).path
    first, second = (adapter.load(p, threads=1, context=128).logits(TOKENS[:20]) for p in (path, other))
    np.testing.assert_allclose(first[0], second[0], atol=1e-4)  # one key: its share is 1 whatever the score
    assert np.abs(first - second).max() > 1e-2


def test_a_batch_of_two_is_two_times_one(tiny_gemma4: Path, tmp_path: Path) -> None:
    path = export(open_checkpoint(tiny_gemma4), tmp_path / "f32", variant="f32").path
    session = ort.InferenceSession(path / "model.onnx", providers=["CPUExecutionProvider"])
    past = {
        item.name: np.zeros((2, item.shape[1], 0, item.shape[3]), np.float32)
        for item in session.get_inputs()
        if item.name.startswith("past_key_values.")
    }
    ids = np.array([TOKENS[:7]] * 2, np.int64)
    positions = np.tile(np.arange(7), (2, 1))
    fed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": positions}
    logits = session.run(["logits"], fed | past)[0]
    assert logits.shape == (2, 7, 512)
    np.testing.assert_array_equal(logits[0], logits[1])


@pytest.mark.parametrize("variant", ["int4", "npu"])
def test_the_script_beside_a_model_runs_it_without_us(checkpoint: Checkpoint, tmp_path: Path, variant: str) -> None:
    made = export(checkpoint, tmp_path / variant, variant=variant, context=128, prefill=8)
    script = made.path / "generate.py"
    assert "gemexport" not in script.read_text("utf-8")
    assert str(script) in made.run
    # -I keeps the working tree out of its sight.
    told = subprocess.run(
        [sys.executable, "-I", script, "Hello there, this is more than eight tokens", "9"],
        capture_output=True,
        text=True,
        check=True,
        encoding="utf-8",
    )
    tokenizer = tokenizers.Tokenizer.from_file(str(made.path / "tokenizer.json"))
    prompt = tokenizer.encode("Hello there, this is more than eight tokens").ids
    runtime = adapter.load(made.path, threads=1, context=64)
    ends = set(checkpoint.architecture.eos_token_ids)
    found = runtime.greedy(prompt, 9)
    stop = next((i + 1 for i, token in enumerate(found) if token in ends), len(found))
    assert told.stdout.strip("\n") == tokenizer.decode(prompt + found[:stop]).strip("\n")


@pytest.mark.parametrize("shared", [False, True])
def test_onnxruntime_genai_generates(checkpoint: Checkpoint, tmp_path: Path, shared: bool) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    path = export(checkpoint, tmp_path / "int4").path
    model = og.Model(str(path))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=60, do_sample=False, past_present_share_buffer=shared)
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array(TOKENS[:21], np.int32))
    found = []
    while not generator.is_done() and len(found) < 32:
        generator.generate_next_token()
        found.append(int(generator.get_next_tokens()[0]))
    assert found == adapter.load(path, threads=1, context=128).greedy(TOKENS[:21], 32)[: len(found)]


def test_texts_are_read_as_onnxruntime_genai_reads_them(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """With BOS, by the option that docs/onnx.md names: the text then goes on as in the script beside the graphs."""
    og = pytest.importorskip("onnxruntime_genai")
    made = export(checkpoint, tmp_path / "int4")
    text = "Café déjà vu — 123 😊"
    expected = tokenizers.Tokenizer.from_file(str(made.path / "tokenizer.json")).encode(text).ids
    assert expected[0] == checkpoint.architecture.bos_token_id
    runtime = adapter.load(made.path, threads=1, context=1)
    assert runtime.tokenize(text) == expected[1:]
    assert "onnxruntime-genai" in runtime.name
    model = og.Model(str(made.path))
    tokenizer = og.Tokenizer(model)
    assert tokenizer.encode(text).tolist() == expected[1:]  # what the option is for
    tokenizer.update_options(add_special_tokens="true")
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=60, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(tokenizer.encode(text))
    found = []
    while not generator.is_done() and len(found) < 9:
        generator.generate_next_token()
        found.append(int(generator.get_next_tokens()[0]))
    said = subprocess.run([sys.executable, "-I", made.path / "generate.py", text, "9"], capture_output=True, check=True)
    plain = tokenizers.Tokenizer.from_file(str(made.path / "tokenizer.json")).decode(expected + found)
    assert said.stdout.decode("utf-8").strip("\n") == plain.strip("\n")


def test_a_tokenizer_that_onnxruntime_genai_reads_otherwise_is_told(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Without the class it takes <pad> for BOS, without the file it does not start; the other checks go on."""
    pytest.importorskip("onnxruntime_genai")
    path = export(checkpoint, tmp_path / "int4").path
    settings = json.loads((path / "tokenizer_config.json").read_text("utf-8"))
    del settings["tokenizer_class"]
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    runtime = adapter.load(path, threads=1, context=1)
    with pytest.raises(InputError, match=r"begins a text with \[0\], and the model with BOS, 2"):
        runtime.tokenize("")
    (path / "tokenizer_config.json").unlink()
    runtime = adapter.load(path, threads=1, context=1)
    with pytest.raises(InputError, match="does not read its tokenizer"):
        runtime.tokenize("")
    found, _ = check_wording(Attempts(), tmp_path / "work", checkpoint, path, runtime)
    assert found is not None
    assert found.equal == 0
    assert any("does not read its tokenizer" in line for line in found.vocabulary)


def test_what_cannot_be_loaded_is_refused_in_one_line(tiny_gemma3: Path, tmp_path: Path) -> None:
    path = export(open_checkpoint(tiny_gemma3), tmp_path / "npu", variant="npu", context=64, prefill=8).path
    with pytest.raises(InputError, match="hold 64 positions"):
        adapter.load(path, threads=1, context=65)
    (path / "prefill.onnx").unlink()
    with pytest.raises(InputError, match=r"no model\.onnx"):
        adapter.load(path, threads=1, context=8)
    (path / "model.onnx").write_bytes(b"nothing")
    with pytest.raises(InputError) as caught:
        adapter.load(path, threads=1, context=8)
    assert "\n" not in str(caught.value)
