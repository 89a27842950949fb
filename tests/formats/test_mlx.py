"""MLX folders of other tools are read too, and broken ones are refused with the reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemexport.formats import mlx
from gemexport.formats.checkpoint import open_checkpoint
from gemexport.formats.errors import InputError
from gemexport.formats.safetensors import Entry, ShardedWriter, read_folder

mx = pytest.importorskip("mlx.core")

QUANTIZED = "model.layers.1.mlp.down_proj.weight"


def _convert(source: Path, folder: Path, bits: int, group: int, prefix: str = "model.") -> dict[str, np.ndarray]:
    """A folder as mlx_lm.convert makes it, one tensor quantized; returns what mx.dequantize makes of it in f32."""
    folder.mkdir()
    checkpoint, arrays, expected = open_checkpoint(source), {}, {}
    for name, tensor in checkpoint.tensors.items():
        own = prefix + name.removeprefix("model.")
        values = mx.array(tensor.numpy())
        if name == QUANTIZED:
            packed, scales, biases = mx.quantize(values, group_size=group, bits=bits)
            module = own.removesuffix(".weight")
            arrays |= {own: packed, f"{module}.scales": scales, f"{module}.biases": biases}
            values = mx.dequantize(packed, scales, biases, group_size=group, bits=bits)
        else:
            arrays[own] = values.astype(mx.bfloat16)
        expected[name] = np.array(values)
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, {"format": "mlx"})
    config = {**checkpoint.config, "quantization": {"group_size": group, "bits": bits}}
    (folder / "config.json").write_text(json.dumps(config))
    return expected


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_affine_grids_of_other_tools(tiny_gemma3: Path, tmp_path: Path, bits: int) -> None:
    expected = _convert(tiny_gemma3, tmp_path / "mlx", bits, 32)
    tensors = mlx.tensors(tmp_path / "mlx")
    assert list(tensors) == list(expected)
    grid = tensors[QUANTIZED].grid
    assert grid is not None
    assert (grid.bits, grid.block) == (bits, 32)
    if bits != 2:  # MLX rounds to the extremes of a block, which for 2 bits can come out as a signed grid
        assert grid.kind == "affine"
    np.testing.assert_allclose(tensors[QUANTIZED].numpy(), expected[QUANTIZED], atol=1e-6)
    np.testing.assert_array_equal(tensors["model.norm.weight"].numpy(), expected["model.norm.weight"])


def test_decoder_of_a_multimodal_folder(tiny_gemma3: Path, tmp_path: Path) -> None:
    expected = _convert(tiny_gemma3, tmp_path / "mlx", 4, 32, prefix="language_model.model.")
    tensors = mlx.tensors(tmp_path / "mlx")
    np.testing.assert_allclose(tensors[QUANTIZED].numpy(), expected[QUANTIZED], atol=1e-6)


def _rewrite(folder: Path, drop: str = "", reshape: str = "") -> None:
    """The folder's weights again, with a tensor missing or flat."""
    arrays = {name: stored.array for name, stored in read_folder(folder).items() if name != drop}
    entries = []
    for name, stored in read_folder(folder).items():
        if name in arrays:
            shape = (arrays[name].size,) if name == reshape else stored.entry.shape
            entries.append(Entry(name, stored.entry.dtype, shape))
    arrays = {name: np.array(array) for name, array in arrays.items()}
    with ShardedWriter(folder, entries) as out:
        for entry in entries:
            out.write(entry.name, arrays[entry.name])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"drop": "model.norm.weight"}, r"model\.norm\.weight is missing"),
        ({"drop": "model.layers.1.mlp.down_proj.scales"}, "without scales"),
        ({"reshape": "model.layers.1.mlp.down_proj.scales"}, "words, scales and biases"),
        ({"reshape": "model.layers.0.mlp.up_proj.weight"}, "has the shape"),
    ],
)
def test_broken_folders(tiny_gemma3: Path, tmp_path: Path, damage: dict[str, str], message: str) -> None:
    _convert(tiny_gemma3, tmp_path / "mlx", 4, 32)
    _rewrite(tmp_path / "mlx", **damage)
    with pytest.raises(InputError, match=message):
        mlx.tensors(tmp_path / "mlx")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "there is no config.json"),
        ("{", "cannot be read"),
        ({"quantization": {"mode": "trellis", "bits": 4}}, "trellis is not known"),
        ({"quantization": {"bits": 4, "model.norm": {"mode": "trellis"}}}, "trellis is not known"),
    ],
)
def test_configs_that_are_refused(tiny_gemma3: Path, tmp_path: Path, config: Any, message: str) -> None:
    shutil.copytree(tiny_gemma3, tmp_path / "mlx")
    path = tmp_path / "mlx" / "config.json"
    if config is None:
        path.unlink()
    else:
        path.write_text(config if isinstance(config, str) else json.dumps(config))
    with pytest.raises(InputError, match=message):
        mlx.tensors(tmp_path / "mlx")
