"""Core ML packages: exact weights, the decoder's arithmetic, states, bytes that repeat, and coremltools' opinion."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemexport.exporters import coreml
from gemexport.exporters.coreml.weights import placeholder
from gemexport.formats.checkpoint import Checkpoint
from gemexport.formats.coreml import tensors
from gemexport.formats.coreml.package import open_package
from gemexport.formats.storage.errors import InputError
from gemexport.formats.tensor import ArrayTensor, Floats, round_to
from gemexport.validators.checks.divergence import Divergence
from gemexport.validators.reference import reference
from gemexport.validators.runtimes.coreml import Program, load
from gemexport.validators.runtimes.pytorch import whole

ct = pytest.importorskip("coremltools")

TOKENS = [2, *np.random.default_rng(5).integers(3, 200, 70).tolist()]


@pytest.fixture(scope="module")
def checkpoints(gemma3: Checkpoint, gemma4: Checkpoint) -> dict[str, Checkpoint]:
    """Both families with their grids."""
    return {"gemma3": gemma3, "gemma4": gemma4}


@pytest.fixture(scope="module")
def packages(checkpoints: dict[str, Checkpoint], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`family-variant` -> a package of it."""
    folder = tmp_path_factory.mktemp("packages")
    made = {}
    for family, variant in (("gemma3", "int4"), ("gemma4", "int4"), ("gemma4", "f32"), ("gemma4", "f16")):
        path = folder / family / f"{variant}.mlpackage"
        made[f"{family}-{variant}"] = coreml.export(checkpoints[family], path, variant=variant, context=128).path
    return made


def divergence(logits: Floats, wanted: Floats) -> Divergence:
    total = Divergence()
    total.add(wanted, logits, TOKENS)
    return total


@pytest.mark.parametrize("name", ["gemma3-int4", "gemma4-int4", "gemma4-f32"])
def test_no_weight_changes(name: str, packages: dict[str, Path], checkpoints: dict[str, Checkpoint]) -> None:
    checkpoint, stored = checkpoints[name.split("-")[0]], tensors(packages[name])
    assert set(stored) == set(checkpoint.tensors)
    for key, tensor in checkpoint.tensors.items():
        assert stored[key].shape == tensor.shape
        np.testing.assert_array_equal(round_to(stored[key].numpy(), tensor.dtype), tensor.numpy(), err_msg=key)
        if name.endswith("int4") and len(tensor.shape) == 2:
            assert tensor.grid is not None
            found = stored[key].grid
            assert found is not None
            assert (found.bits, found.block) == (tensor.grid.bits, tensor.grid.block)
            assert (stored[key].rows(0, 5).grid()[0] == tensor.rows(0, 5).grid()[0]).all()


def test_float16_rounds_what_it_cannot_hold_and_says_so(gemma3: Checkpoint, tmp_path: Path) -> None:
    """Of weights of the demo f16 holds all; in one matrix a few become bf16 numbers that it does not hold."""
    name = "model.layers.0.mlp.up_proj.weight"
    values = gemma3.tensors[name].numpy().copy()
    values[3, :5] = np.float32(2.0**-20 * (1 + 2.0**-7))
    odd = dataclasses.replace(gemma3, tensors={**gemma3.tensors, name: ArrayTensor(name, values, "bf16")})
    made = coreml.export(odd, tmp_path / "f16.mlpackage", variant="f16", context=128)
    assert "5 weights of 1 tensors are no f16 numbers and were rounded" in made.notes
    stored = tensors(made.path)
    for key, tensor in odd.tensors.items():
        if len(tensor.shape) == 2:
            wanted = tensor.numpy().astype(np.float16).astype(np.float32)
            np.testing.assert_array_equal(stored[key].numpy(), wanted)
    assert np.count_nonzero(stored[name].numpy() != values) == 5


@pytest.mark.parametrize("name", ["gemma3-int4", "gemma4-int4", "gemma4-f32", "gemma4-f16"])
def test_the_program_is_the_model(name: str, packages: dict[str, Path], checkpoints: dict[str, Checkpoint]) -> None:
    checkpoint = checkpoints[name.split("-")[0]]
    judge = whole(checkpoint.text_config, tensors(packages[name]), threads=1)
    wanted = judge.logits(TOKENS)
    runtime = load(packages[name], threads=1, context=100)
    found = divergence(runtime.logits(TOKENS), wanted)
    assert found.kld_mean < 1e-7
    assert found.top1_agreement == 1
    assert runtime.greedy(TOKENS[:20], 32) == judge.greedy(TOKENS[:20], 32)
    half = load(packages[name], threads=1, context=100, arithmetic="f16").logits(TOKENS)
    assert np.isfinite(half).all()
    assert divergence(half, wanted).kld_mean < 2e-3


def test_the_same_input_gives_the_same_bytes(
    packages: dict[str, Path], checkpoints: dict[str, Checkpoint], tmp_path: Path
) -> None:
    again = coreml.export(checkpoints["gemma4"], tmp_path / "again.mlpackage", context=128)
    first = packages["gemma4-int4"]
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert len(files) == 3
    for file in files:
        assert (first / file).read_bytes() == (again.path / file).read_bytes(), file


def test_only_layers_with_keys_of_their_own_have_states(
    packages: dict[str, Path], checkpoints: dict[str, Checkpoint]
) -> None:
    decoder = checkpoints["gemma4"].architecture
    own = [layer for layer in decoder.layers if layer.owns_cache]
    assert len(own) < len(decoder.layers)
    states = Program(packages["gemma4-int4"]).states
    assert {"keyCache", "valueCache"} <= set(states)
    keys = [kind for name, kind in states.items() if name.startswith("keyCache")]
    assert sum(kind.shape[0] for kind in keys) == len(own)
    assert {kind.shape[3] for kind in keys} == {128}
    assert {(kind.shape[2], kind.shape[4]) for kind in keys} == {(layer.kv_heads, layer.head_dim) for layer in own}


def test_the_tied_head_is_stored_once(packages: dict[str, Path], checkpoints: dict[str, Checkpoint]) -> None:
    package = open_package(packages["gemma4-int4"])
    table = "model_embed_tokens_weight"
    readers = [
        operation.type
        for operation in package.operations
        if any(binding.name == table for argument in operation.inputs.values() for binding in argument.arguments)
    ]
    assert sorted(readers) == ["gather", "linear"]
    weights = sum(path.stat().st_size for path in package.path.rglob("weight.bin"))
    assert weights < 0.75 * checkpoints["gemma4"].architecture.parameters()  # 4.5 bits each, and tables


def test_what_the_package_says_of_itself(packages: dict[str, Path], checkpoints: dict[str, Checkpoint]) -> None:
    metadata = open_package(packages["gemma3-int4"]).metadata
    assert metadata["gemexport.source"] == checkpoints["gemma3"].name
    assert metadata["gemexport.norm_offset"] == "1.0"
    window = checkpoints["gemma3"].architecture.sliding_window
    assert metadata["co.huggingface.exporters.sliding_window"] == str(window)
    assert (packages["gemma3-int4"].parent / "tokenizer.json").is_file()
    manifest = json.loads((packages["gemma3-int4"] / "Manifest.json").read_text())
    assert manifest["rootModelIdentifier"] in manifest["itemInfoEntries"]


def test_coremltools_loads_the_package(packages: dict[str, Path]) -> None:
    _loaded(packages["gemma3-int4"])[0].validate()


def _loaded(package: Path) -> tuple[Any, Any]:
    """The program as coremltools reads it, types inferred anew, and the package's specification."""
    from coremltools.converters.mil.frontend.milproto import load as milproto

    model = ct.models.MLModel(str(package), skip_model_load=True)
    specification = model.get_spec()
    version = specification.specificationVersion
    program = milproto.load(specification, specification_version=version, file_weights_dir=model.weights_dir)
    return program, specification


@pytest.mark.slow
def test_coremltools_may_optimise_the_package(packages: dict[str, Path], tmp_path: Path) -> None:
    program, specification = _loaded(packages["gemma4-int4"])
    optimised = ct.convert(
        program,
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.precision.FLOAT32,  # no further casts: only what must not change anything
        skip_model_load=True,
        inputs=_described(specification),
    )
    optimised.save(str(tmp_path / "optimised.mlpackage"))
    feeds = _step(16)
    before = Program(packages["gemma4-int4"]).predict(feeds)["logits"]
    after = Program(tmp_path / "optimised.mlpackage").predict(feeds)["logits"]
    np.testing.assert_allclose(after, before, atol=1e-3)


def _described(specification: Any) -> list[Any]:
    described = []
    for feature in specification.description.input:
        array = feature.type.multiArrayType
        shape = [
            size.lowerBound if size.lowerBound == size.upperBound else ct.RangeDim(size.lowerBound, size.upperBound)
            for size in array.shapeRange.sizeRanges
        ]
        dtype = np.int32 if feature.name == "inputIds" else np.float16
        described.append(ct.TensorType(feature.name, shape, dtype))
    return described


def _step(count: int) -> dict[str, np.ndarray]:
    mask = np.where(np.tri(count, dtype=bool), 0, -65504).astype(np.float16)[None, None]
    return {"inputIds": np.array([TOKENS[:count]], np.int32), "fullAttentionMask": mask, "slidingAttentionMask": mask}


def test_progress_is_the_source_bytes_of_the_matrices(checkpoints: dict[str, Checkpoint], tmp_path: Path) -> None:
    told: list[int] = []
    coreml.export(checkpoints["gemma3"], tmp_path / "a.mlpackage", progress=told.append, context=16)
    matrices = [tensor for tensor in checkpoints["gemma3"].tensors.values() if len(tensor.shape) == 2]
    assert sum(told) == sum(2 * tensor.shape[0] * tensor.shape[1] for tensor in matrices)


def replaced(checkpoint: Checkpoint, name: str, tensor: Any) -> Checkpoint:
    return dataclasses.replace(checkpoint, tensors=dict(checkpoint.tensors) | {name: tensor})


def test_numbers_beyond_float16_are_refused_and_nothing_is_left(
    checkpoints: dict[str, Checkpoint], tmp_path: Path
) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    checkpoint = checkpoints["gemma3"]
    huge = ArrayTensor(name, np.full(checkpoint.tensors[name].shape, np.float32(1e5)))
    with pytest.raises(InputError, match=rf"{name} has numbers beyond 65504"):
        coreml.export(replaced(checkpoint, name, huge), tmp_path / "out" / "a.mlpackage", variant="f16", context=16)
    assert list((tmp_path / "out").iterdir()) == []
    coreml.export(replaced(checkpoint, name, huge), tmp_path / "out" / "a.mlpackage", variant="f32", context=16)


def test_beside_codes_a_plain_matrix_is_held_as_it_is(checkpoints: dict[str, Checkpoint], tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    checkpoint = checkpoints["gemma3"]
    small = round_to(np.full(checkpoint.tensors[name].shape, np.float32(1.2e-7)), "bf16")
    path = coreml.export(
        replaced(checkpoint, name, ArrayTensor(name, small, "bf16")), tmp_path / "a.mlpackage", context=16
    ).path
    assert np.array_equal(tensors(path)[name].numpy(), small)


def test_requests_that_cannot_be_met(checkpoints: dict[str, Checkpoint], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no Core ML variant 'int3'"):
        coreml.export(checkpoints["gemma3"], tmp_path / "a.mlpackage", variant="int3")
    longest = checkpoints["gemma3"].architecture.max_positions
    with pytest.raises(InputError, match=f"give 1 to {longest}"):
        coreml.export(checkpoints["gemma3"], tmp_path / "a.mlpackage", context=longest + 1)


def test_attention_scores_are_capped_where_the_model_says_so(
    checkpoints: dict[str, Checkpoint], tmp_path: Path
) -> None:
    checkpoint = checkpoints["gemma3"]
    found = {}
    # transformers knows no cap for Gemma 3's scores: one that is never reached must change nothing.
    for cap in (1e4, 0.5):
        decoder = checkpoint.architecture.model_copy(update={"attention_softcap": cap})
        capped = dataclasses.replace(checkpoint, model=dataclasses.replace(checkpoint.model, decoder=decoder))
        path = coreml.export(capped, tmp_path / f"{cap}.mlpackage", context=128).path
        assert "softmax" in {operation.type for operation in open_package(path).operations}
        wanted = reference(checkpoint.text_config, tensors(path), threads=1).logits(TOKENS)
        found[cap] = divergence(load(path, threads=1, context=100).logits(TOKENS), wanted).kld_mean
    assert found[1e4] < 1e-7
    assert found[0.5] > 1e-3


def test_a_placeholder_takes_no_memory() -> None:
    assert placeholder((1 << 20, 1 << 20), np.float16).base.nbytes <= 2
