"""Codes survive any way through the formats: what was compressed once is never compressed again."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from samples import with_grids

from gemexport.demo import mobile as demo_mobile
from gemexport.exporters import compressed_tensors, gguf, mlx
from gemexport.formats.checkpoint import Checkpoint, open_checkpoint
from gemexport.formats.gguf.container import read
from gemexport.registry import TARGETS
from gemexport.validators.checks.weights import compare


def opened(model: Path, work: Path) -> Checkpoint:
    """A checkpoint with the grids of its tensors."""
    return with_grids(open_checkpoint(model, work / "source"), work / "grids", "lossless")


def blocks(path: Path) -> dict[str, tuple[str, bytes]]:
    """The type and the bytes of every tensor of a GGUF file."""
    file = read(path)
    return {
        name: (item.type.name, file.rows(item, 0, item.nbytes // item.row_bytes).tobytes())
        for name, item in file.tensors.items()
    }


@pytest.mark.parametrize("family", ["tiny_gemma3", "tiny_gemma4"])
def test_gguf_to_mlx_to_compressed_tensors_to_gguf(family: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    source = opened(request.getfixturevalue(family), tmp_path / "0")
    first = gguf.export(source, tmp_path / "first.gguf").path
    folder = mlx.export(opened(first, tmp_path / "1"), tmp_path / "mlx").path
    packed = compressed_tensors.export(opened(folder, tmp_path / "2"), tmp_path / "ct", pack_embeddings=True).path
    last = gguf.export(opened(packed, tmp_path / "3"), tmp_path / "last.gguf").path
    wanted, found = blocks(first), blocks(last)
    assert {kind for kind, _ in wanted.values()} >= {"Q4_0", "F32"}
    assert {name: kind for name, (kind, _) in found.items()} == {name: kind for name, (kind, _) in wanted.items()}
    assert found == wanted


@pytest.mark.parametrize(
    ("target", "variant", "exact"),
    [
        ("mlx", "4bit", True),
        ("onnx", "int4", True),
        ("onnx", "npu", True),
        ("coreml", "int4", True),
        ("compressed-tensors", "w4a16", True),
        ("gguf", "Q4_0", False),  # f32 scales become f16, the codes stay
    ],
)
def test_a_mobile_checkpoint_keeps_its_codes(target: str, variant: str, exact: bool, tmp_path: Path) -> None:
    checkpoint = opened(demo_mobile.make(tmp_path / "model", size="tiny", calibrated=False), tmp_path / "work")
    quantized = {name: tensor for name, tensor in checkpoint.tensors.items() if tensor.grid is not None}
    assert {tensor.grid.bits for tensor in quantized.values() if tensor.grid} == {2, 4, 8}
    path = TARGETS[target].exporter().export(checkpoint, tmp_path / TARGETS[target].path(Path(), "m", variant)).path
    if variant == "npu":
        path = (
            TARGETS[target].exporter().export(checkpoint, tmp_path / "npu", variant="npu", context=64, prefill=8).path
        )
    found = compare(quantized, TARGETS[target].reader().tensors(path))
    assert found.missing == ()
    for item in found.tensors:
        assert item.scale_rounded or item.grid is None, f"{item.name} has other codes"
        assert item.exact == item.compared or not exact, item.name
        assert np.isfinite(item.max_relative_error)


@pytest.mark.parametrize(
    "name",
    ["gptq", "gptq-v2", "awq", "llm-compressor-w4a16", "llm-compressor-w4a16-asym", "llm-compressor-w8a8-static"],
)
def test_what_other_libraries_compressed_reaches_every_format(
    name: str, golden: Path, tiny_gemma3: Path, tmp_path: Path
) -> None:
    """Checkpoints of gptqmodel, AutoAWQ and llm-compressor: codes pass through where a format has a container."""
    model = Path(shutil.copytree(golden / name, tmp_path / "model"))
    shutil.copyfile(tiny_gemma3 / "tokenizer.json", model / "tokenizer.json")
    checkpoint = opened(model, tmp_path / "work")
    quantized = {name: tensor for name, tensor in checkpoint.tensors.items() if tensor.grid is not None}
    assert len(quantized) > 10
    held = 0
    for target in TARGETS.values():
        variant = target.variants[0]
        place = target.path(tmp_path / "out", "model", variant)
        path = target.exporter().export(checkpoint, place, variant=variant).path
        holds = target.holds(variant)
        for item in compare(quantized, target.reader().tensors(path)).tensors:
            assert item.source_grid is not None
            if holds(item.source_grid, item.shape[-1]):
                held += 1
                assert item.scale_rounded or item.exact == item.compared, f"{target.name}: {item.name}"
    assert held > 3 * len(quantized), "no more than two formats hold what was compressed"
