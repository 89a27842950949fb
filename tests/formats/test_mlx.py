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
from gemexport.formats.storage.errors import InputError
from gemexport.formats.storage.safetensors import Entry, ShardedWriter, read_folder
from gemexport.formats.tensor import round_to
from gemexport.validators.checks.weights import compare

mx = pytest.importorskip("mlx.core")

QUANTIZED = "model.layers.1.mlp.down_proj.weight"
OTHER = "model.layers.0.mlp.up_proj.weight"


def _convert(
    source: Path, folder: Path, *, prefix: str = "model.", dtype: str = "float32", **layouts: dict[str, Any]
) -> dict[str, np.ndarray]:
    """A folder as mlx_lm.convert makes it of a model in `dtype`; returns what mx.dequantize makes of it in f32.

    `layouts` say how QUANTIZED ("first") and OTHER ("second") are quantized.
    """
    folder.mkdir()
    checkpoint, arrays, expected = open_checkpoint(source), {}, {}
    chosen = {name: layouts.get(key) for name, key in ((QUANTIZED, "first"), (OTHER, "second"))}
    for name, tensor in checkpoint.tensors.items():
        own, layout = prefix + name.removeprefix("model."), chosen.get(name)
        values = mx.array(tensor.numpy()).astype(getattr(mx, dtype))
        if layout:
            packed, *beside = mx.quantize(values, **layout)
            module = own.removesuffix(".weight")
            arrays |= {own: packed, f"{module}.scales": beside[0]}
            if len(beside) > 1:
                arrays[f"{module}.biases"] = beside[1]
            values = mx.dequantize(packed, *beside, dtype=mx.float32, **layout)
        else:
            arrays[own] = values.astype(mx.bfloat16)
        expected[name] = np.array(values.astype(mx.float32))
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, {"format": "mlx"})
    modules = {name.removesuffix(".weight"): layout for name, layout in chosen.items() if layout}
    config = {**checkpoint.config, "quantization": {"group_size": 64, "bits": 4, **modules}}
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copyfile(source / "tokenizer.json", folder / "tokenizer.json")
    return expected


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_affine_grids_of_other_tools(tiny_gemma3: Path, tmp_path: Path, bits: int) -> None:
    expected = _convert(tiny_gemma3, tmp_path / "mlx", first={"group_size": 32, "bits": bits})
    tensors = mlx.tensors(tmp_path / "mlx")
    assert list(tensors) == list(expected)
    tensor = tensors[QUANTIZED]
    assert tensor.grid is not None
    assert (tensor.grid.bits, tensor.grid.block) == (bits, 32)
    if bits != 2:  # MLX rounds to the extremes of a block, which for 2 bits can come out as a signed grid
        assert tensor.grid.kind == "affine"
        scales, biases = (read_folder(tmp_path / "mlx")[QUANTIZED[:-6] + key].array for key in ("scales", "biases"))
        codes, found, shifts = tensor.rows(3, 9).shifted()
        np.testing.assert_array_equal(found, scales[3:9])
        np.testing.assert_array_equal(shifts, biases[3:9])
        assert codes.max() < 1 << bits
    # MLX adds and multiplies in float32, and fuses the two where the processor can.
    np.testing.assert_allclose(tensor.numpy(), expected[QUANTIZED], atol=1e-6)
    np.testing.assert_array_equal(tensors["model.norm.weight"].numpy(), expected["model.norm.weight"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_mlx_makes_of_the_numbers(tiny_gemma3: Path, tmp_path: Path, dtype: str) -> None:
    """`as_it_runs` is mx.dequantize, bit for bit, and what the validator counts."""
    _convert(tiny_gemma3, tmp_path / "mlx", first={"group_size": 32, "bits": 4}, dtype=dtype)
    loaded = mx.load(str(tmp_path / "mlx" / "model.safetensors"))
    parts = [loaded[QUANTIZED[:-6] + key] for key in ("weight", "scales", "biases")]
    expected = np.array(mx.dequantize(*parts, group_size=32, bits=4).astype(mx.float32))
    tensor = mlx.tensors(tmp_path / "mlx")[QUANTIZED]
    np.testing.assert_array_equal(tensor.as_it_runs(0, len(expected)), expected)
    source = open_checkpoint(tiny_gemma3).tensors[QUANTIZED]
    found = compare({QUANTIZED: source}, {QUANTIZED: tensor}).tensors[0]
    assert found.exact_as_run == np.count_nonzero(round_to(expected, source.dtype) == source.numpy())
    assert 0 < found.exact_as_run < found.compared


@pytest.mark.parametrize(("mode", "bits", "block"), [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)])
def test_small_floats(tiny_gemma3: Path, tmp_path: Path, mode: str, bits: int, block: int) -> None:
    layout = {"group_size": block, "bits": bits, "mode": mode}
    expected = _convert(tiny_gemma3, tmp_path / "mlx", first=layout, second={"group_size": 32, "bits": 6})
    tensors = open_checkpoint(tmp_path / "mlx").tensors
    grid = tensors[QUANTIZED].grid
    assert grid is not None
    assert (grid.kind, grid.bits, grid.block, grid.scale_dtype) == ("codebook", bits, block, "bf16")
    np.testing.assert_array_equal(tensors[QUANTIZED].numpy(), expected[QUANTIZED])
    np.testing.assert_array_equal(tensors[QUANTIZED].rows(2, 7).values, expected[QUANTIZED][2:7])
    assert tensors[OTHER].grid is not None
    assert tensors[OTHER].grid.bits == 6


def test_biases_that_are_whole_multiples_are_zero_points(tiny_gemma3: Path, tmp_path: Path) -> None:
    _convert(tiny_gemma3, tmp_path / "mlx", first={"group_size": 32, "bits": 4})
    scales = np.array(read_folder(tmp_path / "mlx")[QUANTIZED[:-6] + "scales"].array)
    zeros = np.random.default_rng(0).integers(0, 16, scales.shape)
    narrow = (scales.view(np.uint32) & 0xFFFF0000).view(np.float32)
    narrow[0, 0] = 0.0
    for zero, kind in ((zeros, "zero-point"), (np.full_like(zeros, 8), "symmetric"), (zeros + 0.5, "affine")):
        _rewrite(tmp_path / "mlx", replaced={"scales": narrow, "biases": (-zero * narrow).astype(np.float32)})
        tensor = mlx.tensors(tmp_path / "mlx")[QUANTIZED]
        assert tensor.grid is not None
        assert tensor.grid.kind == kind
        rows = tensor.rows(0, 64)
        codes = rows.grid()[0].astype(float).reshape(64, 3, 32) + (8 if kind == "symmetric" else 0)
        expected = ((codes - zero[..., None]) * narrow[..., None].astype(float)).reshape(64, 96)
        np.testing.assert_array_equal(rows.values, expected.astype(np.float32))
        if kind == "zero-point":
            assert rows.shifts is not None
            np.testing.assert_array_equal(rows.shifts[1:], zeros[1:])


def test_decoder_of_a_multimodal_folder(tiny_gemma3: Path, tmp_path: Path) -> None:
    layout = {"group_size": 32, "bits": 4}
    expected = _convert(tiny_gemma3, tmp_path / "mlx", first=layout, prefix="language_model.model.")
    tensors = mlx.tensors(tmp_path / "mlx")
    np.testing.assert_allclose(tensors[QUANTIZED].numpy(), expected[QUANTIZED], atol=1e-6)


def _rewrite(folder: Path, drop: str = "", reshape: str = "", replaced: dict[str, np.ndarray] | None = None) -> None:
    """The folder's weights again, with a tensor missing, flat, or other numbers in the arrays of QUANTIZED."""
    own = {QUANTIZED[:-6] + key: array for key, array in (replaced or {}).items()}
    arrays = {name: np.array(own.get(name, stored.array)) for name, stored in read_folder(folder).items()}
    arrays.pop(drop, None)
    entries = []
    for name, stored in read_folder(folder).items():
        if name in arrays:
            shape = (arrays[name].size,) if name == reshape else stored.entry.shape
            entries.append(Entry(name, stored.entry.dtype, shape))
    with ShardedWriter(folder, entries) as out:
        for entry in entries:
            out.write(entry.name, arrays[entry.name])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"drop": "model.norm.weight"}, r"model\.norm\.weight is missing"),
        ({"drop": QUANTIZED}, r"down_proj\.weight is missing"),
        ({"drop": "model.layers.1.mlp.down_proj.scales"}, "without scales"),
        ({"drop": "model.layers.1.mlp.down_proj.biases"}, "4-bit codes in groups of 32, F32 scales and no biases"),
        ({"reshape": "model.layers.1.mlp.down_proj.scales"}, "words, scales and biases"),
        ({"reshape": QUANTIZED}, "words, scales and biases"),
        ({"reshape": OTHER}, "has the shape"),
    ],
)
def test_broken_folders(tiny_gemma3: Path, tmp_path: Path, damage: dict[str, str], message: str) -> None:
    _convert(tiny_gemma3, tmp_path / "mlx", first={"group_size": 32, "bits": 4})
    _rewrite(tmp_path / "mlx", **damage)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=message):
        mlx.tensors(tmp_path / "mlx")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "there is no config.json"),
        ("{", "cannot be read"),
        ({"quantization": {"mode": "fp3", "bits": 4}}, "mode fp3 is not known"),
        ({"quantization": {"bits": 4, "model.norm": {"mode": "int5"}}}, "mode int5 is not known"),
        ({"quantization": {"bits": 4, "model.norm": {"mode": ["x"]}}}, "is not known"),
        ({"quantization": [4]}, "no JSON object"),
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
