"""Fine-tunes of a quantization-aware checkpoint: what left the lattice is quantized, what stayed on it is exact."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemexport import demo
from gemexport.cli import main
from gemexport.formats.checkpoint import open_checkpoint
from gemexport.formats.gemma.names import EMBEDDING
from gemexport.formats.grids.recipe import is_linear
from gemexport.formats.storage.safetensors import Entry, ShardedWriter
from gemexport.formats.tensor import Floats, round_to, to_bf16
from gemexport.registry import TARGETS

RANK = 2
FORMATS = ("gguf", "mlx", "onnx", "coreml", "compressed-tensors")


def noisy(name: str, values: Floats, stream: np.random.Generator) -> Floats:
    """Every linear with noise of 2 % of its size; all else as it was."""
    noise = stream.standard_normal(values.shape).astype(np.float32)
    return values + np.float32(0.02 * values.std()) * noise if is_linear(name) else values


def with_lora(name: str, values: Floats, stream: np.random.Generator) -> Floats:
    """A LoRA on queries and values, merged and rounded to bf16 as merge_and_unload leaves it."""
    if not name.endswith(("q_proj.weight", "v_proj.weight")):
        return values
    left, right = (stream.standard_normal(shape) for shape in ((values.shape[0], RANK), (RANK, values.shape[1])))
    return values + np.float32(0.1 * values.std()) * (left @ right).astype(np.float32)


def fine_tune(base: Path, folder: Path, change: Callable[[str, Floats, np.random.Generator], Floats]) -> Path:
    """A checkpoint like `base` with other weights, in bf16."""
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors, stream = open_checkpoint(base).tensors, np.random.default_rng(1)
    with ShardedWriter(folder, [Entry(name, "BF16", tensor.shape) for name, tensor in tensors.items()]) as out:
        for name, tensor in tensors.items():
            out.write(name, to_bf16(change(name, tensor.numpy(), stream)))
    return folder


def exported(model: Path, out: Path, *more: str) -> dict[str, Any]:
    """The report of a model in every format with 4 bits."""
    variants = "onnx:int4"
    with pytest.raises(SystemExit) as ended:
        main(["all", str(model), "-o", str(out), "--variants", variants, "--no-validate", *more])
    assert ended.value.code == 0
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    return report


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What was tuned: a checkpoint on a lattice."""
    return demo.make(tmp_path_factory.mktemp("tuned") / "base", family="gemma3", size="tiny")


@pytest.fixture(scope="module")
def sizes(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """Bytes of the artefacts of a checkpoint on a lattice and of a plain one, by format."""
    out = tmp_path_factory.mktemp("sizes")
    plain = demo.make(out / "plain", family="gemma3", size="tiny", rule=None)
    reports = {model.name: exported(model, out / f"{model.name}-out") for model in (base, plain)}
    return {name: {item["format"]: item["bytes"] for item in made["artifacts"]} for name, made in reports.items()}


@pytest.mark.parametrize(("change", "touched"), [(noisy, None), (with_lora, 2)])
def test_every_linear_is_quantized_and_the_embedding_is_exact(
    change: Callable[..., Floats],
    touched: int | None,
    base: Path,
    sizes: dict[str, dict[str, int]],
    tmp_path: Path,
) -> None:
    tuned = fine_tune(base, tmp_path / "tuned", change)
    source = open_checkpoint(tuned)
    report = exported(tuned, tmp_path / "out")
    linears = [name for name in source.tensors if is_linear(name)]
    count = len(linears) if touched is None else touched * len(source.architecture.layers)
    assert f"{count} linears lie on no lattice where other matrices do" in report["model"]["notes"][-1]
    assert "the recipe default quantized them anew" in report["model"]["notes"][-1]
    assert [item["format"] for item in report["artifacts"]] == list(FORMATS)
    for item in report["artifacts"]:
        stored = TARGETS[item["format"]].reader().tensors(tmp_path / "out" / item["path"])
        for name in linears:
            assert stored[name].grid is not None, (item["format"], name)
            assert stored[name].grid.bits == 4
        kept = round_to(stored[EMBEDDING].numpy(), "bf16")  # as the lattice's makers round code times scale
        np.testing.assert_array_equal(kept, source.tensors[EMBEDDING].numpy())
        assert abs(item["bytes"] / sizes["base"][item["format"]] - 1) < 0.01
        assert item["bytes"] <= sizes["plain"][item["format"]]
    assert "% in 4 bits)" not in (tmp_path / "out" / "report.md").read_text().partition("compressed-tensors")[0]


def test_a_file_that_is_called_4_bit_and_is_not_says_so(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned, recipe = fine_tune(base, tmp_path / "tuned", noisy), tmp_path / "mine.toml"
    recipe.write_text("requantize_mixed = false\n")
    report = exported(tuned, tmp_path / "out", "--only", "gguf", "--recipe", str(recipe))
    item = report["artifacts"][0]
    share = item["widths"]["4 bit"] / sum(item["widths"].values())
    assert share < 0.5
    said = f"({100 * share:.0f} % in 4 bits)"
    assert f"gguf Q4_0 {said}" in capsys.readouterr().out
    for file in ("report.md", "report.html"):
        assert said in (tmp_path / "out" / file).read_text()
    assert item["notes"][-1].startswith(f"it is called 4-bit and holds {100 * share:.1f} % of its weights in that")


def test_a_recipe_decides_otherwise(base: Path, tmp_path: Path) -> None:
    tuned = fine_tune(base, tmp_path / "tuned", with_lora)
    recipe = tmp_path / "mine.toml"
    recipe.write_text("requantize_mixed = false\n")
    report = exported(tuned, tmp_path / "out", "--only", "gguf", "--recipe", str(recipe))
    assert "12 of them stay plain" in report["model"]["notes"][-1]
    stored = TARGETS["gguf"].reader().tensors(tmp_path / "out" / report["artifacts"][0]["path"])
    assert stored["model.layers.0.self_attn.q_proj.weight"].grid is None
