"""`--compress`: llm-compressor's codes reach the formats, and the loss is measured against what they were made of."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gemexport
from gemexport.cli import main
from gemexport.compress import compress, compression, write_plain
from gemexport.formats import gguf, mlx
from gemexport.formats.checkpoint import open_checkpoint
from gemexport.formats.grids.recipe import load_recipe
from gemexport.formats.storage.errors import InputError
from gemexport.shared.place import Place
from gemexport.shared.texts import tokens_of

# Stands in for an interpreter with llm-compressor: rounds linears to int8, one scale a row, and spoils the norms a
# little, as llm-compressor does with those of 1 + w.
STAND_IN = """#!{python}
import json, sys
from pathlib import Path
import numpy as np
from gemexport.formats.storage.safetensors import Entry, ShardedWriter, read_folder
from gemexport.formats.tensor import from_bf16, to_bf16
if sys.argv[2] == "-c":
    print(True)
    sys.exit()
task = json.loads(Path(sys.argv[-1]).read_text())
Path({calls!r}).open("a").write(json.dumps(task) + "\\n")
if task["method"] == "awq":
    print("what it did before")
    raise ValueError("no mappings for this model")
entries, arrays = [], {{}}
for name, stored in read_folder(Path(task["model"])).items():
    values = from_bf16(np.array(stored.array))
    if values.ndim == 2 and "embed" not in name:
        scales = to_bf16(np.abs(values).max(1, keepdims=True) / np.float32(127))
        arrays[name] = np.clip(np.rint(values / from_bf16(scales)), -127, 127).astype(np.int8)
        arrays[name + "_scale"] = scales
    else:
        arrays[name] = to_bf16(values + np.float32(0.01 if values.ndim == 1 else 0))
names = {{"int8": "I8", "uint16": "BF16"}}
with ShardedWriter(Path(task["out"]), [Entry(n, names[str(a.dtype)], a.shape) for n, a in arrays.items()]) as out:
    for name, array in arrays.items():
        out.write(name, array)
weights = {{"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}}
group = {{"targets": ["Linear"], "weights": weights, "format": "int-quantized"}}
settings = {{"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {{"a": group}},
            "ignore": ["lm_head"]}}
(Path(task["out"]) / "config.json").write_text(json.dumps({{"quantization_config": settings}}))
Path(sys.argv[-1]).with_name("done.json").write_text('{{"version": "stand-in"}}')
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    path = tmp_path / "python"
    path.write_text(STAND_IN.format(python=sys.executable, calls=str(tmp_path / "calls.jsonl")))
    path.chmod(0o755)
    return path


def calls(stand_in: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (stand_in.parent / "calls.jsonl").read_text().splitlines()]


def run(*arguments: str | Path) -> object:
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments)])
    return ended.value.code


@pytest.mark.slow
def test_codes_reach_the_formats_and_the_rest_stays(
    tiny_gemma3: Path, stand_in: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, text = tmp_path / "out", tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog.")
    command = ("all", tiny_gemma3, "-o", out, "--only", "gguf,mlx", "--no-validate", "--compress", "gptq",
               "--compress-python", stand_in, "--calibration", text)  # fmt: skip
    assert run(*command) == 0
    assert "llm-compressor stand-in quantized the linears (gptq, 4 bit, groups of 32)" in capsys.readouterr().out
    assert json.loads((out / "report.json").read_text())["model"]["compression"] == "gptq"
    (call,) = calls(stand_in)
    assert (call["bits"], call["group_size"], call["dtype"], call["ignore"]) == (4, 32, "bfloat16", ["lm_head"])
    assert call["samples"]
    plain, name = open_checkpoint(tiny_gemma3), tiny_gemma3.name
    made = open_checkpoint(out / ".gemexport" / "compressed" / name)
    assert (made.name, made.architecture) == (plain.name, plain.architecture)
    stored = {"gguf": gguf.tensors(out / "gguf" / f"{name}-Q4_0.gguf"), "mlx": mlx.tensors(out / "mlx" / "4bit")}
    for tensor in made.tensors.values():
        if tensor.grid is None:  # embeddings follow the recipe, norms are the source's
            np.testing.assert_array_equal(tensor.numpy(), plain.tensors[tensor.name].numpy())
            continue
        for found in stored.values():
            np.testing.assert_array_equal(found[tensor.name].rows(0, 9).codes, tensor.rows(0, 9).codes)
    assert all(found["model.embed_tokens.weight"].grid is not None for found in stored.values())
    # The same again uses what lies there; another text is another calibration.
    assert run(*command) == 0
    assert len(calls(stand_in)) == 1
    text.write_text("Something else.")
    assert run(*command) == 0
    assert len(calls(stand_in)) == 2


def test_bars_of_llm_compressor_are_progress(
    tiny_gemma3: Path, stand_in: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bars = [f"({layer}/2): {what}: {n:3}%|#| {n}/100" for layer in (1, 2) for what in ("Calibrating", "Propagating")
            for n in (0, 50, 100)]  # fmt: skip
    stand_in.write_text(stand_in.read_text().replace("task = ", f"print({chr(13).join(bars)!r})\ntask = ", 1))
    asked, steps = compression("rtn", stand_in), list[int]()
    assert asked is not None
    place = Place(tiny_gemma3, tmp_path / "work", 64, compressed=tmp_path / "work" / "compressed" / "model")
    compress(place, asked, load_recipe("default"), steps.append)
    assert [sum(steps[: i + 1]) for i, step in enumerate(steps) if step] == [12, 25, 37, 50, 62, 75, 87, 100]
    assert "Propagating: 100%" in capsys.readouterr().out


def test_calibrates_on_texts_that_no_loss_is_measured_on(tiny_gemma3: Path, stand_in: Path, tmp_path: Path) -> None:
    asked = compression("gptq", stand_in)
    assert asked is not None
    place = Place(tiny_gemma3, tmp_path / "work", 64, compressed=tmp_path / "work" / "compressed" / "model")
    compress(place, asked, load_recipe("default"), lambda _: None)
    (task,) = calls(stand_in)
    checkpoint = open_checkpoint(tiny_gemma3)
    texts = [token for ids in tokens_of(checkpoint, None) for token in ids]
    given = [token for sample in task["samples"] for token in sample[1:]]
    assert len(given) > 4096
    assert given == (texts * 2)[: len(given)]


@pytest.mark.slow
def test_loss_is_against_the_plain_model(tiny_gemma3: Path, stand_in: Path, tmp_path: Path) -> None:
    report = gemexport.export(
        tiny_gemma3, tmp_path / "out", formats=["onnx"], variants={"onnx": ("f32",)}, recipe="int8", tokens=128,
        compress="rtn", compress_python=stand_in,
    )  # fmt: skip
    (artifact,) = report.artifacts
    assert artifact.status == "pass"
    assert artifact.weights is not None
    assert artifact.logits is not None
    assert artifact.logits.conversion is not None
    assert artifact.logits.loss is not None
    # Exact against the codes that were made; what they cost shows against the model before.
    linears = [tensor for tensor in artifact.weights.tensors if "embed" not in tensor.name]
    assert {tensor.exact_fraction for tensor in linears} == {1.0}
    assert artifact.logits.conversion.kld_mean < 1e-5 < artifact.logits.loss.kld_mean


@pytest.mark.parametrize(
    ("method", "python", "problem"),
    [
        ("magic", None, "--compress magic: is not a method; use one of gptq, awq, rtn"),
        ("rtn", "/bin/echo", "--compress rtn: needs llmcompressor, which /bin/echo has not"),
        ("rtn", "/nowhere/python", "/nowhere/python: cannot be run"),
    ],
)
def test_what_cannot_be_asked_for(
    method: str, python: str | None, problem: str, tiny_gemma3: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [] if python is None else ["--compress-python", python]
    assert run("plan", tiny_gemma3, "--compress", method, *more) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"gemexport: {problem}")
    assert line.count("\n") == 1


def test_what_llm_compressor_gives_up_on(
    tiny_gemma3: Path, stand_in: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (
        "gguf",
        tiny_gemma3,
        "-o",
        tmp_path / "out",
        "--no-validate",
        "--compress-python",
        stand_in,
        "--compress",
    )
    assert run(*arguments, "awq") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("gemexport: ")]
    assert "--compress awq: llm-compressor gave up (ValueError: no mappings for this model)" in line
    log = Path(line.rpartition("see ")[2])  # the output folder is gone again
    assert not (tmp_path / "out").exists()
    assert "what it did before" in log.read_text()
    log.unlink()
    assert calls(stand_in)[0]["dtype"] == "float32"  # the norms change, and must not be rounded to bf16


def test_what_is_compressed_already(golden: Path, tiny_gemma3: Path, stand_in: Path, tmp_path: Path) -> None:
    asked = compression("rtn", stand_in)
    assert asked is not None
    model = tmp_path / "model"
    model.mkdir()
    for file in [*(golden / "gptq").iterdir(), tiny_gemma3 / "tokenizer.json"]:
        (model / file.name).write_bytes(file.read_bytes())
    place = Place(model, tmp_path / "work", 64, compressed=tmp_path / "work" / "compressed" / "model")
    with pytest.raises(InputError, match="is compressed already; leave --compress out"):
        compress(place, asked, load_recipe("default"), lambda _: None)
    place = Place(tiny_gemma3, tmp_path / "work", 64, compressed=tmp_path / "work" / "compressed" / "model")
    with pytest.raises(InputError, match="is a recipe without a scheme for linears"):
        compress(place, asked, load_recipe("lossless"), lambda _: None)


def test_plain_folder_holds_the_checkpoints_values(tiny_gemma4: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_gemma4)
    assert write_plain(checkpoint, tmp_path / "plain") == "bf16"
    (tmp_path / "plain" / "tokenizer.json").write_bytes((tiny_gemma4 / "tokenizer.json").read_bytes())
    again = open_checkpoint(tmp_path / "plain")
    assert again.architecture == checkpoint.architecture
    for name, tensor in checkpoint.tensors.items():
        np.testing.assert_array_equal(again.tensors[name].numpy(), tensor.numpy())


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llmcompressor") is None, reason="needs llmcompressor")
@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_llm_compressor_itself(method: str, tiny_gemma3: Path, tmp_path: Path) -> None:
    report = gemexport.export(tiny_gemma3, tmp_path / "out", formats=["gguf"], tokens=128, compress=method)
    assert [artifact.status for artifact in report.artifacts] == ["pass"]
