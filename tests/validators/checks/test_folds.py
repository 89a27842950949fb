"""Channel scales that AWQ folds into norms and linears are found, and hide nothing else that is wrong."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from gemexport import demo
from gemexport.engine import steps
from gemexport.faults.stored import like
from gemexport.formats.checkpoint import Checkpoint, open_checkpoint
from gemexport.formats.gemma.names import CANONICAL, canonical_name
from gemexport.formats.gemma.roles import Kind, Role
from gemexport.formats.grids.recipe import RECIPES
from gemexport.formats.storage.safetensors import Writer, read_file
from gemexport.formats.tensor import ArrayTensor, Floats, Grid, Tensor, evaluate, round_to
from gemexport.judge.validation import check_weights
from gemexport.judge.verdict import bounds
from gemexport.report.notes import judging_notes
from gemexport.shared.measured import TensorReport, Validation, WeightsReport
from gemexport.shared.place import Place
from gemexport.validators.checks.folds import INTO, folded
from gemexport.validators.checks.weights import compare

GRID = Grid(4, 32, "f16", True, "zero-point")
NORM, UP, DOWN = (CANONICAL.name(role, 1) for role in (Role.PRE_MLP_NORM, Role.UP, Role.DOWN))
Values = dict[str, Floats]


@pytest.fixture(scope="module", params=["gemma3", "gemma4"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Plain weights; the norms of one family have an offset, those of the other none."""
    folder: Path = tmp_path_factory.mktemp("folds") / request.param
    return open_checkpoint(demo.make(folder, family=request.param, size="tiny", rule=None))


def awq(checkpoint: Checkpoint) -> Values:
    """The model's values with factors folded in, from a half to two, not rounded yet."""
    stream, offset = np.random.default_rng(3), checkpoint.architecture.norm_offset
    values = {name: tensor.numpy() for name, tensor in checkpoint.tensors.items()}

    def factors(count: int) -> Floats:
        return np.exp(stream.uniform(-0.7, 0.7, count)).astype(np.float32)

    for layer in range(len(checkpoint.architecture.layers)):
        for role, linears in INTO.items():
            if (norm := CANONICAL.name(role, layer)) in values:
                by = factors(values[norm].size)
                values[norm] = round_to((values[norm] + np.float32(offset)) / by - np.float32(offset), "bf16")
                for linear in linears:
                    if (name := CANONICAL.name(linear, layer)) in values:
                        values[name] = values[name] * by
        by = factors(values[CANONICAL.name(Role.UP, layer)].shape[0])
        values[CANONICAL.name(Role.UP, layer)] = values[CANONICAL.name(Role.UP, layer)] / by[:, None]
        values[CANONICAL.name(Role.DOWN, layer)] = values[CANONICAL.name(Role.DOWN, layer)] * by
    return values


def rounded(checkpoint: Checkpoint, values: Values, halved: tuple[str, int, int] | None = None) -> dict[str, Tensor]:
    """The linears of layers in 4 bits, between each block's ends; of one the scale of a block halved."""
    stored: dict[str, Tensor] = {}
    for name, array in values.items():
        spec = checkpoint.model.specs[name]
        if spec.role.kind is not Kind.LINEAR or not spec.role.in_layer or array.shape[1] % GRID.block:
            stored[name] = ArrayTensor(name, array, checkpoint.tensors[name].dtype)
            continue
        blocks = array.reshape(len(array), -1, GRID.block)
        low, high = np.minimum(blocks.min(2), 0), np.maximum(blocks.max(2), 0)
        scales = round_to((high - low) / np.float32(15), "f16")
        shifts = np.rint(-low / scales)
        codes = np.clip(np.rint(blocks / scales[..., None]) + shifts[..., None], 0, 15).astype(np.uint8)
        if halved is not None and halved[0] == name:
            scales[halved[1:]] /= 2
        codes = codes.reshape(array.shape)
        found = evaluate(GRID, codes, scales, shifts).astype(np.float32)
        stored[name] = ArrayTensor(name, found, "f32", codes, scales, GRID, shifts)
    return stored


def said(checkpoint: Checkpoint, stored: dict[str, Tensor]) -> tuple[set[str], list[str]]:
    """What is found to be folded, and the bounds that are broken."""
    folds = folded(checkpoint.tensors, stored, checkpoint.model.specs, checkpoint.architecture.norm_offset)
    found = compare({**checkpoint.tensors, **folds}, stored, ours=False)
    tensors = tuple(TensorReport.model_validate(item, from_attributes=True) for item in found.tensors)
    weights = WeightsReport(compared=1, exact=0, exact_fraction=0.0, max_relative_error=0.0, tensors=tensors)
    held = bounds(Validation(weights), {}, RECIPES["default"])
    return set(folds), [f"{bound.metric}: {bound.where}" for bound in held if not bound.held]


def test_what_awq_folds_is_found_and_judged_as_equal(checkpoint: Checkpoint) -> None:
    folds, broken = said(checkpoint, rounded(checkpoint, awq(checkpoint)))
    assert broken == []
    wanted = {*INTO, *(linear for linears in INTO.values() for linear in linears), Role.UP, Role.DOWN}
    assert folds == {spec.name for spec in checkpoint.model.specs.values() if spec.role in wanted}


def test_a_file_that_somebody_made_so_is_the_checkpoint(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """It was written from a copy of the checkpoint whose bf16 weights have the factors in them."""
    scaled, own, file = tmp_path / "scaled", awq(checkpoint), "model.safetensors"
    shutil.copytree(checkpoint.path, scaled)
    arrays = read_file(checkpoint.path / file)
    with closing(Writer(scaled / file, [item.entry for item in arrays.values()], {"format": "pt"})) as out:
        for name, item in arrays.items():
            out.write(name, like(own[canonical_name(name)], np.array(item.array)))
    path, folders = tmp_path / "theirs.gguf", (scaled, checkpoint.path)
    places = [Place(folder, tmp_path / "work" / folder.name, 80) for folder in folders]
    for place in places:
        place.work.mkdir(parents=True)
        steps.grids(place, RECIPES["rtn"], lambda _: None)
    steps.export(places[0], "gguf", "Q4_0", path, {}, lambda _: None)
    report, _ = check_weights(places[1], "gguf", path, lambda _: None)
    assert NORM in report.folded
    assert [str(bound) for bound in bounds(Validation(report), {}, RECIPES["default"]) if not bound.held] == []
    assert judging_notes(report)[0].startswith("channel scales are folded into norms and linears, as AWQ does")


def test_without_it_nothing_is(checkpoint: Checkpoint) -> None:
    values = {name: tensor.numpy() for name, tensor in checkpoint.tensors.items()}
    assert said(checkpoint, rounded(checkpoint, values)) == (set(), [])


def _one_weight(values: Values) -> None:
    values[NORM][5] = values[NORM][5] * np.float32(1.5) + np.float32(0.5)


def _all_weights(values: Values) -> None:
    values[NORM] = values[NORM] * np.float32(1.3) + np.float32(0.3)


@pytest.mark.parametrize("change", [_one_weight, _all_weights])
@pytest.mark.parametrize("scaled", [True, False])
def test_a_norm_that_is_another_is_named(
    change: Callable[[Values], None], scaled: bool, checkpoint: Checkpoint
) -> None:
    values = awq(checkpoint) if scaled else {name: tensor.numpy() for name, tensor in checkpoint.tensors.items()}
    change(values)
    _, broken = said(checkpoint, rounded(checkpoint, values))
    assert any(f"vectors: {NORM}" in line for line in broken)


@pytest.mark.parametrize("name", [UP, DOWN])
def test_a_halved_scale_is_named_all_the_same(name: str, checkpoint: Checkpoint) -> None:
    """Of up without a place: a row has two blocks here, and no factor of it then agrees with down's."""
    folds, broken = said(checkpoint, rounded(checkpoint, awq(checkpoint), halved=(name, 3, 1)))
    assert name in folds
    assert any(f"{name}{' (row 3, from column 32' if name == DOWN else ''}" in line for line in broken)
