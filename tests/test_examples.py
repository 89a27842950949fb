"""The example scripts, without what they download: a file of ours stands in for the packages."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from gemexport.formats.checkpoint import Checkpoint, open_checkpoint
from gemexport.formats.grids.recipe import RECIPES
from gemexport.formats.grids.search import find_grids

EXAMPLES = Path(__file__).parent.parent / "examples"


def script(name: str) -> ModuleType:
    spec = spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec
    assert spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def cache(gemma3: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the assembled GGUF file lies already: the tiny model's, as llama.cpp lays one out."""
    pytest.importorskip("gguf")
    from gemexport.exporters import gguf

    folder = tmp_path_factory.mktemp("cache")
    gguf.export(gemma3, folder / "gemma-3-270m-q4_k_m.gguf", variant="BF16")
    return folder


def test_real_model_reads_back_what_was_written(cache: Path, tiny_gemma3: Path, tmp_path: Path) -> None:
    """The checkpoint made of the file is the one that the file was made of: names, norms, values, tokenizer."""
    from tokenizers import Tokenizer

    out = tmp_path / "model"
    script("real_model").make(out, None, cache, "gguf")
    expected, found = open_checkpoint(tiny_gemma3), open_checkpoint(out)
    assert found.architecture.tensor_shapes() == expected.architecture.tensor_shapes()
    for name, tensor in expected.tensors.items():
        # 1 + w in float32 loses the last bits of a norm's small w.
        np.testing.assert_allclose(found.tensors[name].numpy(), tensor.numpy(), rtol=2**-8, atol=2**-24)
    before = Tokenizer.from_file(str(tiny_gemma3 / "tokenizer.json"))
    after = Tokenizer.from_file(str(out / "tokenizer.json"))
    for text in ("Café déjà vu — 123 😊", "  two\n\n\nthree\tx", "<start_of_turn>user\nHi<end_of_turn>"):
        assert after.encode(text).ids == before.encode(text).ids


@pytest.mark.parametrize("rule", ["max/7", "f16", "row"])
def test_real_model_on_a_grid(cache: Path, tmp_path: Path, rule: str) -> None:
    out = tmp_path / "model"
    script("real_model").make(out, rule, cache, "gguf")
    index = find_grids(open_checkpoint(out), tmp_path / "grids", RECIPES["lossless"])
    assert index.lattice_fraction() == 1.0


def test_a_small_model_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On our own documentation, a tiny one: it learns, its weights are on no lattice, and it can be exported."""
    pytest.importorskip("transformers")
    from gemexport import demo
    from gemexport.exporters import mlx

    module, out = script("train_small"), tmp_path / "model"
    monkeypatch.setattr(module, "SIZE", demo.SIZES["tiny"]._replace(vocab=1024))
    module.make(out, [EXAMPLES.parent / "docs"], 100_000, module.Training(30, 10.0, 4, 1e-2, seed=0))
    told = capsys.readouterr().out
    lost = float(told.partition(" nats a token on held-out text")[0].split()[-1])
    assert lost < 0.9 * np.log(1024)  # what a model that knows nothing loses
    checkpoint = open_checkpoint(out)
    assert find_grids(checkpoint, tmp_path / "grids", RECIPES["lossless"]).lattice_fraction() == 0.0
    mlx.export(checkpoint, tmp_path / "mlx", variant="bf16")
    assert module.main([str(tmp_path / "none"), "--text", str(tmp_path / "model")]) == 2
    assert not (tmp_path / "none").exists()


def test_real_model_says_what_is_wrong(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    command = [sys.executable, str(EXAMPLES / "real_model.py"), str(blocked / "out"), "--cache", str(blocked / "cache")]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_python_api(tiny_gemma4: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    command = [sys.executable, str(EXAMPLES / "python_api.py"), str(tiny_gemma4), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "judged again: pass" in done.stdout
    report = json.loads((tmp_path / "out" / "run" / "report.json").read_text("utf-8"))
    assert report["artifacts"][0]["weights"]["exact_fraction"] == 1.0


def test_the_swift_example_keeps_the_contract() -> None:
    """Names and numbers that Core ML and our evaluator go by; there is no compiler for it here."""
    from gemexport.exporters import coreml
    from gemexport.exporters.coreml import backend
    from gemexport.formats.assets.stops import GENERATION
    from gemexport.validators.runtimes.coreml.feeds import MASKED

    text = "".join(file.read_text("utf-8") for file in sorted((EXAMPLES / "swift" / "Sources").rglob("*.swift")))
    names = (backend.INPUT_IDS, backend.FULL_MASK, backend.SLIDING_MASK, backend.LOGITS, GENERATION)
    for name in (*names, coreml.SLIDING_WINDOW, "keyCache", "eos_token_id", "top_k", "top_p"):
        assert f'"{name}"' in text
    assert f"repeating: {MASKED:.0f}" in text
