"""llama.cpp as a runtime: its logits, its cache and its tokenizer, on files that are right and on broken ones."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from samples import with_grids
from tokenizers import Tokenizer

from gemexport.exporters import gguf as exporter
from gemexport.formats.checkpoint import open_checkpoint
from gemexport.formats.gguf import LOOKED_UP, tensors, write_f32
from gemexport.formats.gguf.parts import read_parts
from gemexport.formats.storage.errors import InputError
from gemexport.validators.checks.divergence import Divergence
from gemexport.validators.checks.prompts import HARD_TEXTS
from gemexport.validators.reference import Reference, reference
from gemexport.validators.runtimes import llama_cpp
from gemexport.validators.runtimes.llama_cpp import BATCH, LlamaCpp

CONTEXT = BATCH + 72
TEXTS = (
    *HARD_TEXTS,
    "Hello world! Café déjà vu — 123 😊",
    "\n" * 20 + " " * 20 + "\t" * 20,
    "   three spaces\n \n\n  and lines",
    "<0x41> is not a byte",
    "<|turn>user\nHi<turn|>\n<|channel>thought",
    "",
)


@pytest.fixture(scope="module", params=["gemma3", "gemma4"])
def model(request: pytest.FixtureRequest) -> Path:
    """The folder of a tiny checkpoint of either family."""
    return Path(request.getfixturevalue(f"tiny_{request.param}"))


@pytest.fixture(scope="module")
def files(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """GGUF files of it, by variant."""
    folder = tmp_path_factory.mktemp("gguf")
    checkpoint = with_grids(model, folder / "grids")
    return {
        variant: exporter.export(checkpoint, folder / f"{variant}.gguf", variant=variant).path
        for variant in ("Q4_0", "Q8_0", "BF16", "F32")
    }


@pytest.fixture(scope="module")
def truth(model: Path) -> Reference:
    """transformers with the source's weights."""
    checkpoint = open_checkpoint(model)
    return reference(checkpoint.text_config, checkpoint.tensors, 2)


def _tokens(vocab: int, count: int) -> list[int]:
    return [2, *np.random.default_rng(0).integers(8, vocab, count - 1).tolist()]


def _vocab_size(model: Path) -> int:
    return open_checkpoint(model).architecture.vocab_size


@pytest.fixture
def loaded(files: dict[str, Path]) -> Iterator[LlamaCpp]:
    """The F32 file."""
    found = llama_cpp.load(files["F32"], threads=2, context=CONTEXT)
    yield found
    found.close()


def test_f32_logits_are_those_of_transformers(loaded: LlamaCpp, truth: Reference, model: Path) -> None:
    """Longer than a batch and than the sliding window; GELU's f16 table is what keeps the bound from 1e-8."""
    tokens = _tokens(_vocab_size(model), CONTEXT)
    logits = loaded.logits(tokens)
    assert logits.shape == (CONTEXT, _vocab_size(model))
    found = Divergence()
    found.add(truth.logits(tokens), logits, tokens)
    # What PyTorch shows with that table is what llama.cpp shows, to a factor.
    checkpoint, played = open_checkpoint(model), Divergence()
    looked_up = reference(checkpoint.text_config, checkpoint.tensors, 2, dtype="f32-f16-gelu")
    played.add(truth.logits(tokens), looked_up.logits(tokens), tokens)
    assert played.kld_mean / 2 < found.kld_mean < 2 * played.kld_mean
    assert found.top1_agreement > 0.97
    assert loaded.arithmetic == "f32"


@pytest.mark.parametrize(("variant", "tie"), [("F32", 0.03), ("BF16", 0.2)])
def test_a_greedy_continuation_is_that_of_transformers(
    files: dict[str, Path], truth: Reference, model: Path, variant: str, tie: float
) -> None:
    """Each token is the likeliest one, or the likeliest is ahead by no more than the runtime's own noise."""
    runtime = llama_cpp.load(files[variant], threads=2, context=64)
    prompt = _tokens(_vocab_size(model), 8)
    continuation = runtime.greedy(prompt, 32)
    logits = truth.logits(prompt + continuation[:-1])[len(prompt) - 1 :]
    behind = logits.max(axis=1) - logits[np.arange(32), continuation]
    assert behind.max() <= tie
    runtime.close()


@pytest.mark.parametrize(
    ("variant", "arithmetic"), [("Q4_0", "int8-activations"), ("Q8_0", "int8-activations"), ("BF16", "bf16")]
)
def test_other_variants_load_and_are_close(
    files: dict[str, Path], truth: Reference, model: Path, variant: str, arithmetic: str
) -> None:
    runtime = llama_cpp.load(files[variant], threads=2, context=CONTEXT)
    tokens = _tokens(_vocab_size(model), 64)
    found = Divergence()
    found.add(truth.logits(tokens), runtime.logits(tokens), tokens)
    assert found.kld_mean < 0.1
    assert runtime.arithmetic == arithmetic
    runtime.close()


def test_a_file_can_be_run_without_rounding_activations(files: dict[str, Path], model: Path) -> None:
    """Then the Q4_0 file is as close to its own numbers as an F32 file is, and not only as 8 bits allow."""
    checkpoint = open_checkpoint(model)
    stored = reference(checkpoint.text_config, tensors(files["Q4_0"]), 2)
    runtime = llama_cpp.load(files["Q4_0"], threads=2, context=CONTEXT, arithmetic="f32")
    assert runtime.arithmetic == "f32"
    tokens = _tokens(_vocab_size(model), 64)
    found = Divergence()
    found.add(stored.logits(tokens), runtime.logits(tokens), tokens)
    assert found.kld_mean < 1e-4
    runtime.close()


def test_a_table_of_codes_that_is_looked_up_rounds_nothing(files: dict[str, Path], tmp_path: Path) -> None:
    """The copy in f32 keeps per-layer embeddings as they are."""
    copy = tmp_path / "copy.gguf"
    write_f32(files["Q4_0"], copy)
    kinds = {name: stored.type.name for name, (_, stored) in read_parts(copy).stored.items()}
    left = {name for name, kind in kinds.items() if kind != "F32"}
    assert left == LOOKED_UP & kinds.keys()
    assert llama_cpp.arithmetic_of(copy) == "f32"
    assert llama_cpp.arithmetic_of(files["Q4_0"]) == "int8-activations"


def test_a_call_leaves_nothing_behind_in_the_cache(loaded: LlamaCpp, model: Path) -> None:
    tokens = _tokens(_vocab_size(model), 24)
    first = loaded.logits(tokens)
    loaded.greedy(tokens[::-1], 4)
    assert np.array_equal(loaded.logits(tokens), first)


def test_the_tokenizer_is_the_checkpoints(loaded: LlamaCpp, model: Path) -> None:
    theirs = Tokenizer.from_file(str(model / "tokenizer.json"))
    for text in TEXTS:
        assert loaded.tokenize(text) == theirs.encode(text, add_special_tokens=False).ids, repr(text)


def test_what_does_not_fit_is_said(loaded: LlamaCpp, model: Path) -> None:
    size = _vocab_size(model)
    with pytest.raises(ValueError, match="do not fit into a context"):
        loaded.logits([2] * (CONTEXT + 1))
    with pytest.raises(ValueError, match=f"token {size} is not in the vocabulary"):
        loaded.logits([2, size])


def test_files_that_cannot_be_loaded_are_named(files: dict[str, Path], tmp_path: Path) -> None:
    whole = files["Q4_0"].read_bytes()
    path = tmp_path / "model.gguf"
    damages = {
        "truncated": whole[: len(whole) // 2],
        "not GGUF": b"PK" + whole[2:],
        "without a tensor": whole.replace(b"blk.0.attn_q.weight", b"blk.0.attn_Q.weight"),
        "without a key": whole.replace(b".block_count", b".block_cound"),
    }
    for damage, data in damages.items():
        path.write_bytes(data)
        with pytest.raises(InputError, match=r"model\.gguf") as raised:
            llama_cpp.load(path, threads=1, context=32)
        assert "\n" not in str(raised.value), damage
    with pytest.raises(InputError, match="missing"):
        llama_cpp.load(tmp_path / "none.gguf", threads=1, context=32)


def test_llama_cpp_is_quiet(files: dict[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    runtime = llama_cpp.load(files["Q4_0"], threads=2, context=32)
    runtime.greedy([2, 9], 2)
    runtime.close()
    runtime.close()
    assert capfd.readouterr() == ("", "")


SERVE = """
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.cpuparams.n_threads = sys.argv[1], 128, 1
answer = xllamacpp.Server(params).handle_completions({"prompt": [2, 9, 10], "n_predict": 4, "temperature": 0})
assert not [name for name in sys.modules if name.startswith("gemexport")]
print("tokens", (answer.get("usage") or {}).get("completion_tokens", answer.get("tokens_predicted")))
"""


@pytest.mark.slow
def test_llama_cpp_serves_the_file_with_nothing_of_ours(files: dict[str, Path]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SERVE, str(files["Q4_0"])], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "tokens 4" in done.stdout


def test_the_read_back_reference_is_as_close_as_the_source(files: dict[str, Path], model: Path) -> None:
    """Everything is exact here, so a reference with the file's weights is the reference with the source's."""
    checkpoint = open_checkpoint(model)
    tokens = _tokens(_vocab_size(model), 16)
    source = reference(checkpoint.text_config, checkpoint.tensors, 2).logits(tokens)
    stored = reference(checkpoint.text_config, tensors(files["F32"]), 2).logits(tokens)
    assert np.array_equal(source, stored)


def test_llama_cpp_stops_at_all_three_ends_that_a_file_can_name(tiny_gemma3: Path, tmp_path: Path) -> None:
    """EOS, EOT and EOM: the third has a key that nothing else of Gemma's uses."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_gemma3, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    ordinary = tokenizer["model"]["vocab"]["e"]  # none that llama.cpp knows by its text
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((folder / name).read_text("utf-8"))
        ends = settings["eos_token_id"] if isinstance(settings["eos_token_id"], list) else [settings["eos_token_id"]]
        (folder / name).write_text(json.dumps({**settings, "eos_token_id": [*ends, ordinary]}), "utf-8")
    checkpoint = open_checkpoint(folder)
    runtime = llama_cpp.load(exporter.export(checkpoint, tmp_path / "m.gguf").path, threads=1, context=64)
    try:
        found = runtime.habits().stops
    finally:
        runtime.close()
    assert found is not None
    assert ordinary in found
    assert set(checkpoint.architecture.eos_token_ids) <= found
