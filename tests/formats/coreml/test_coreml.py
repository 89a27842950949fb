"""Packages of coremltools' own making, read back; and what is no package, refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemexport.formats import coreml
from gemexport.formats.coreml.package import open_package
from gemexport.formats.storage.errors import InputError

ct = pytest.importorskip("coremltools")

from coremltools.converters.mil.mil import Builder as mb  # noqa: E402
from coremltools.converters.mil.mil import types  # noqa: E402

RNG = np.random.default_rng(3)
CODES = RNG.integers(-8, 8, (6, 64)).astype(np.int8)
SCALES = RNG.uniform(0.01, 1, (6, 2)).astype(np.float16)
UP, GATE, DOWN = ("model_layers_7_mlp_up_proj_weight", "layers_0_mlp_gate_proj_weight", "model_norm_weight")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program with weights in the forms that converters use, saved by coremltools."""

    def narrow(values: np.ndarray, kind: Any) -> np.ndarray:
        return values.astype(types.nptype_from_builtin(kind))

    @mb.program(input_specs=[mb.TensorSpec((1, 64), types.fp16)], opset_version=ct.target.iOS18)
    def program(x: Any) -> Any:
        up = mb.constexpr_blockwise_shift_scale(data=narrow(CODES, types.int4), scale=SCALES, name=f"{UP}_quantized")
        eights = narrow(np.full((6, 2), 8), types.uint4)
        gate = mb.constexpr_blockwise_shift_scale(
            data=narrow(CODES + 8, types.uint4), scale=SCALES, offset=eights, name=GATE
        )
        twos = narrow(np.full((6, 2), 2), types.uint4)
        other = mb.constexpr_blockwise_shift_scale(
            data=narrow(CODES + 8, types.uint4), scale=SCALES, offset=twos, name="model_layers_1_mlp_up_proj_weight"
        )
        lut = RNG.normal(size=(1, 1, 4, 1)).astype(np.float16)
        palette = mb.constexpr_lut_to_dense(
            indices=narrow(CODES & 3, types.uint2), lut=lut, name="model_layers_2_mlp_up_proj_weight_palettized"
        )
        norm = mb.const(val=np.arange(64, dtype=np.float16), name=f"{DOWN}_to_fp16")
        y = mb.mul(x=x, y=norm)
        total = mb.linear(x=y, weight=up)
        for weight in (gate, other, palette):
            total = mb.add(x=total, y=mb.linear(x=y, weight=weight))
        return total

    path = tmp_path_factory.mktemp("coreml") / "made.mlpackage"
    ct.convert(program, minimum_deployment_target=ct.target.iOS18, skip_model_load=True).save(str(path))
    return path


def test_names_of_converters_are_understood() -> None:
    names = {
        "model_layers_3_mlp_up_proj_weight_to_fp16": "model.layers.3.mlp.up_proj.weight",
        "layers_0_layer_scalar": "model.layers.0.layer_scalar",
        "model_embed_tokens_weight_to_fp16_quantized": "model.embed_tokens.weight",
        "embed_tokens_weight_palettized": "model.embed_tokens.weight",
        "model_language_model_layers_1_self_attn_q_norm_weight": "model.layers.1.self_attn.q_norm.weight",
        "lm_head_weight": "lm_head.weight",
        "norm_weight": "model.norm.weight",
        "rope_0_cos": None,
        "model_layers_1_embed_tokens_weight": None,
        "zeros_640": None,
    }
    assert {name: coreml.canonical_name(name) for name in names} == names
    assert coreml.canonical_name(coreml.stored_name("model.layers.12.mlp.down_proj.weight")) == (
        "model.layers.12.mlp.down_proj.weight"
    )


def test_signed_and_unsigned_codes_are_one_grid(package: Path) -> None:
    tensors = coreml.tensors(package)
    for name in ("model.layers.7.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight"):
        tensor = tensors[name]
        assert tensor.grid is not None
        assert (tensor.grid.bits, tensor.grid.block, tensor.grid.scale_dtype) == (4, 32, "f16")
        codes, scales = tensor.rows(1, 4).grid()
        assert (codes == CODES[1:4]).all()
        assert (scales == SCALES[1:4]).all()
        wanted = CODES.astype(np.float32) * np.repeat(SCALES.astype(np.float32), 32, axis=1)
        assert (tensor.rows(0, 6).values == wanted).all()
        assert (tensor.numpy() == wanted).all()


def test_other_offsets_are_zero_points_and_a_palette_has_values_only(package: Path) -> None:
    tensors = coreml.tensors(package)
    shifted = tensors["model.layers.1.mlp.up_proj.weight"]
    assert shifted.grid is not None
    assert (shifted.grid.bits, shifted.grid.kind) == (4, "zero-point")
    codes, scales, zeros = shifted.rows(2, 6).shifted()
    assert (codes == CODES[2:] + 8).all()
    assert (scales == SCALES[2:]).all()
    assert (zeros == 2).all()
    wanted = (CODES + 6).astype(np.float32) * np.repeat(SCALES.astype(np.float32), 32, axis=1)
    np.testing.assert_array_equal(shifted.rows(0, 6).values, wanted)
    palette = tensors["model.layers.2.mlp.up_proj.weight"]
    assert palette.grid is None
    assert len(np.unique(palette.rows(0, 6).values)) == 4
    assert (tensors["model.norm.weight"].numpy() == np.arange(64)).all()


def narrow(values: np.ndarray, kind: str) -> np.ndarray:
    return values.astype(types.nptype_from_builtin(types.string_to_builtin(kind)))


@pytest.mark.parametrize(
    ("kind", "shift", "offset", "wanted", "zero"),
    [
        ("int4", 0, None, "symmetric", None),
        ("int8", 0, np.zeros((6, 2), np.int8), "symmetric", None),
        ("int4", 0, narrow(np.full((6, 2), -3), "int4"), "zero-point", 5),
        ("uint4", 8, None, "zero-point", 0),
        ("uint4", 8, np.full((6, 2), 8, np.float16), "symmetric", None),
        ("uint4", 8, np.full((6, 2), 16, np.float32), "zero-point", 16),
        ("uint8", 8, narrow(np.full((6, 2), 200), "uint8"), "zero-point", 200),
        ("uint4", 8, np.full((6, 2), 7.5, np.float16), None, None),
    ],
)
def test_codes_however_they_are_stored(
    kind: str, shift: int, offset: np.ndarray | None, wanted: str | None, zero: int | None, tmp_path: Path
) -> None:
    @mb.program(input_specs=[mb.TensorSpec((1, 64), types.fp16)], opset_version=ct.target.iOS18)
    def program(x: Any) -> Any:
        beside = {} if offset is None else {"offset": offset}
        data = narrow(CODES + shift, kind)
        return mb.linear(x=x, weight=mb.constexpr_blockwise_shift_scale(data=data, scale=SCALES, **beside, name=UP))

    path = tmp_path / "a.mlpackage"
    as_it_is = {"minimum_deployment_target": ct.target.iOS18, "pass_pipeline": ct.PassPipeline.EMPTY}
    ct.convert(program, skip_model_load=True, **as_it_is).save(str(path))
    (tensor,) = coreml.tensors(path).values()
    offsets = 0 if offset is None else np.repeat(offset.astype(np.float32), 32, axis=1)
    values = (CODES + shift - offsets) * np.repeat(SCALES.astype(np.float32), 32, axis=1)
    np.testing.assert_array_equal(tensor.numpy(), values)
    assert (None if tensor.grid is None else tensor.grid.kind) == wanted
    if zero is not None:
        codes, _, zeros = tensor.rows(0, 6).shifted()
        assert (zeros == zero).all()
        assert (codes == CODES + shift + (0 if kind[0] == "u" else 8)).all()
    elif wanted:
        assert (tensor.rows(0, 6).grid()[0] == CODES).all()


def test_forms_of_older_systems(tmp_path: Path) -> None:
    data = RNG.integers(-128, 128, (6, 64)).astype(np.int8)
    scale, zero = RNG.uniform(0.1, 1, 6).astype(np.float32), np.zeros(6, np.int8)
    indices = RNG.integers(0, 4, 6 * 64).astype(np.uint8)
    table = np.array([0.5, -1, 2, 3], np.float32)
    mask = RNG.integers(0, 2, 6 * 64).astype(np.uint8)
    nonzero, bits = RNG.normal(size=int(mask.sum())).astype(np.float32), np.packbits(mask, bitorder="little")
    packed = np.packbits(np.unpackbits(indices[:, None], axis=1, count=2, bitorder="little"), bitorder="little")

    @mb.program(input_specs=[mb.TensorSpec((1, 64))], opset_version=ct.target.iOS16)
    def program(x: Any) -> Any:
        affine = mb.constexpr_affine_dequantize(
            quantized_data=data, zero_point=zero, scale=scale, axis=0, name="layers_0_mlp_up_proj_weight"
        )
        palette = mb.constexpr_lut_to_dense(
            indices=packed, lut=table, shape=np.array([6, 64], np.uint32), name="layers_0_mlp_gate_proj_weight"
        )
        pruned = mb.constexpr_sparse_to_dense(
            nonzero_data=nonzero, mask=bits, shape=np.array([6, 64], np.uint32), name="layers_0_mlp_down_proj_weight"
        )
        total = mb.add(x=mb.linear(x=x, weight=affine), y=mb.linear(x=x, weight=palette))
        return mb.add(x=total, y=mb.linear(x=x, weight=pruned))

    path = tmp_path / "old.mlpackage"
    ct.convert(
        program,
        minimum_deployment_target=ct.target.iOS16,
        compute_precision=ct.precision.FLOAT32,
        skip_model_load=True,
    ).save(str(path))
    tensors = coreml.tensors(path)
    wanted = data.astype(np.float32) * scale[:, None]
    np.testing.assert_array_equal(tensors["model.layers.0.mlp.up_proj.weight"].rows(0, 6).values, wanted)
    found = tensors["model.layers.0.mlp.gate_proj.weight"].rows(0, 6).values
    np.testing.assert_array_equal(found, table[indices].reshape(6, 64))
    pruned = np.zeros(6 * 64, np.float32)
    pruned[mask == 1] = nonzero
    found = tensors["model.layers.0.mlp.down_proj.weight"].rows(0, 6).values
    np.testing.assert_array_equal(found, pruned.reshape(6, 64))


def test_sparse_forms(tmp_path: Path) -> None:
    mask = RNG.integers(0, 2, (6, 64)).astype(np.uint8)
    count = int(mask.sum())
    codes, places = RNG.integers(-8, 8, count).astype(np.int8), RNG.integers(0, 4, count).astype(np.uint8)
    lut = RNG.normal(size=(1, 1, 4, 1)).astype(np.float16)

    @mb.program(input_specs=[mb.TensorSpec((1, 64), types.fp16)], opset_version=ct.target.iOS18)
    def program(x: Any) -> Any:
        ones = narrow(mask, "uint1")
        scaled = mb.constexpr_sparse_blockwise_shift_scale(
            data_mask=ones, nonzero_data=narrow(codes, "int4"), scale=SCALES
        )
        looked_up = mb.constexpr_lut_to_sparse(indices_mask=ones, indices_nonzero_data=narrow(places, "uint2"), lut=lut)
        total = x
        for name, (there, values) in ((UP, scaled), (GATE, looked_up)):
            weight = mb.constexpr_sparse_to_dense(nonzero_data=values, mask=there, name=name)
            total = mb.concat(values=[mb.linear(x=x, weight=weight), total], axis=1)
        return total

    path = tmp_path / "a.mlpackage"
    as_it_is = {"minimum_deployment_target": ct.target.iOS18, "pass_pipeline": ct.PassPipeline.EMPTY}
    ct.convert(program, skip_model_load=True, **as_it_is).save(str(path))
    tensors = coreml.tensors(path)
    for name, values in ((UP, codes * np.repeat(SCALES, 32, axis=1)[mask == 1]), (GATE, lut.reshape(-1)[places])):
        wanted = np.zeros((6, 64), np.float32)
        wanted[mask == 1] = values
        canonical = coreml.canonical_name(name)
        assert canonical is not None
        np.testing.assert_allclose(tensors[canonical].numpy(), wanted, rtol=1e-3)


@pytest.fixture
def damaged(package: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(package, tmp_path / "damaged.mlpackage"))


def test_no_package(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no Manifest\.json"):
        open_package(tmp_path)


def test_a_manifest_that_is_none(damaged: Path) -> None:
    (damaged / "Manifest.json").write_text("[]")
    with pytest.raises(InputError, match=r"Manifest\.json: is not a JSON object"):
        open_package(damaged)


def test_a_manifest_that_leads_outside(damaged: Path) -> None:
    manifest = json.loads((damaged / "Manifest.json").read_text())
    manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"] = "../../secret"
    (damaged / "Manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="outside the package"):
        open_package(damaged)


def test_a_model_that_is_damaged_or_missing(damaged: Path) -> None:
    model = next(damaged.rglob("*.mlmodel"))
    model.write_bytes(b"\xff" * 100)
    with pytest.raises(InputError, match="cannot be read as a Core ML model"):
        open_package(damaged)
    model.write_bytes(b"")
    with pytest.raises(InputError, match="not an ML program"):
        open_package(damaged)
    model.unlink()
    with pytest.raises(InputError, match="cannot be read as a Core ML model"):
        open_package(damaged)


def test_a_program_that_reads_outside(damaged: Path) -> None:
    model_file = next(damaged.rglob("*.mlmodel"))
    package = open_package(damaged)
    changed = package.model.SerializeToString().replace(b"@model_path/weights/", b"@model_path/../../../")
    model_file.write_bytes(changed)
    with pytest.raises(InputError):
        coreml.tensors(damaged)


def test_truncated_weights(damaged: Path) -> None:
    weights = next(damaged.rglob("weight.bin"))
    weights.write_bytes(weights.read_bytes()[:300])
    with pytest.raises(InputError, match=r"weight\.bin"):
        coreml.tensors(damaged)
