"""What went into an exporter comes out: in every container, on checkpoints that lie on no lattice or on one in part."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemexport import demo
from gemexport.engine import steps
from gemexport.faults.places import PLACES
from gemexport.faults.stored import Numbers, floats, like, writable
from gemexport.formats.gemma.names import CANONICAL, EMBEDDING, HEAD
from gemexport.formats.gemma.roles import Role
from gemexport.formats.grids.recipe import RECIPES
from gemexport.formats.tensor import from_bf16, to_bf16
from gemexport.judge.validation import check_weights
from gemexport.judge.verdict import bounds
from gemexport.registry import TARGETS
from gemexport.report.notes import judging_notes
from gemexport.shared.measured import Validation, WeightsReport
from gemexport.shared.place import Asked, Place

CONTAINERS = (
    ("gguf", "Q4_0"), ("mlx", "4bit"), ("onnx", "int4"), ("onnx", "npu"), ("coreml", "int4"),
    ("compressed-tensors", "w4a16"),
)  # fmt: skip
FITTED, NORM = CANONICAL.name(Role.UP, 1), CANONICAL.name(Role.POST_MLP_NORM, 1)
SIZE = demo.Size(vocab=512, hidden=64, intermediate=96, heads=2, kv_heads=1, head_dim=32, per_layer=32, window=8)


@dataclass
class Artefacts:
    """Artefacts of one checkpoint, each written once, and broken copies of them."""

    model: Path
    work: Path
    recipe: str = "default"
    written: set[Path] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.place = Place(self.model, self.work, 80)
        self.work.mkdir()
        recipe = RECIPES[self.recipe].model_copy(update={"requantize_mixed": True})
        steps.grids(self.place, recipe, lambda _: None)

    def clean(self, target: str, variant: str) -> Path:
        path = TARGETS[target].path(self.work / "clean", "model", variant)
        if path not in self.written:
            path.parent.mkdir(parents=True, exist_ok=True)
            steps.export(self.place, target, variant, path, {}, lambda _: None)
            self.written.add(path)
        return path

    def broken(self, target: str, variant: str, name: str, edit: Callable[[Numbers], None]) -> Path:
        clean = self.clean(target, variant)
        path = self.work / "broken" / target / variant / clean.name
        shutil.rmtree(path.parent, ignore_errors=True)
        path.parent.mkdir(parents=True)
        (shutil.copytree if clean.is_dir() else shutil.copyfile)(clean, path)
        place = PLACES[target](path, name)
        numbers = place.read()
        edit(numbers)
        place.write(numbers)
        return path

    def report(self, target: str, variant: str, path: Path, known: bool = True) -> WeightsReport:
        return check_weights(self.place, target, path, lambda _: None, Asked(variant) if known else None)[0]


@pytest.fixture(scope="module", params=["plain", "partly"])
def artefacts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artefacts:
    folder = tmp_path_factory.mktemp(request.param)
    plain = (Role.UP, Role.K, Role.EMBEDDING) if request.param == "partly" else ()
    rule = "f16" if request.param == "partly" else None
    model = demo.make(folder / "model", family="gemma3", size=SIZE, rule=rule, plain=plain)
    return Artefacts(model, folder / "work")


def said(report: WeightsReport) -> list[str]:
    """The bounds that do not hold, and where."""
    held = bounds(Validation(report), {}, RECIPES["default"])
    return [f"{bound.metric}: {bound.where}" for bound in held if not bound.held]


def code_by_one(row: int, column: int) -> Callable[[Numbers], None]:
    def edit(numbers: Numbers) -> None:
        numbers.codes[row % numbers.codes.shape[0], column % numbers.codes.shape[1]] ^= 1

    return edit


def scale_by_one_ulp(row: int, block: int) -> Callable[[Numbers], None]:
    def edit(numbers: Numbers) -> None:
        for array in numbers.scales:  # in MLX the biases too, as if the scale had been another from the first
            at = row % array.shape[0], block % array.shape[1]
            patterns = array.view(np.uint16 if array.dtype.itemsize == 2 else np.uint32)
            patterns[at] += 1

    return edit


def scales_to_bf16(numbers: Numbers) -> None:
    numbers.scales = [like(from_bf16(to_bf16(floats(array))), array) for array in numbers.scales]


def every_scale_times(numbers: Numbers) -> None:
    numbers.scales = [like(floats(array) * np.float32(1.7), array) for array in numbers.scales]


@pytest.mark.parametrize(("target", "variant"), CONTAINERS)
@pytest.mark.parametrize("known", [True, False])
def test_without_a_fault_every_number_is_what_was_promised(
    artefacts: Artefacts, target: str, variant: str, known: bool
) -> None:
    report = artefacts.report(target, variant, artefacts.clean(target, variant), known)
    assert said(report) == []
    assert all(item.kept == item.compared for item in report.tensors)


@pytest.mark.parametrize(("target", "variant"), CONTAINERS)
@given(row=st.integers(0, 4000), column=st.integers(0, 4000), known=st.booleans())
@settings(max_examples=6)
def test_one_code_changed_by_one_is_named(
    artefacts: Artefacts, target: str, variant: str, row: int, column: int, known: bool
) -> None:
    path = artefacts.broken(target, variant, FITTED, code_by_one(row, column))
    (found,) = said(artefacts.report(target, variant, path, known))
    height, width = artefacts.place.open().tensors[FITTED].shape
    assert found.startswith("weights.kept")
    assert f"{FITTED} (from row {row % height}, column {column % width})" in found


@pytest.mark.parametrize(("target", "variant"), CONTAINERS)
@given(row=st.integers(0, 4000), block=st.integers(0, 4000), known=st.booleans())
@settings(max_examples=6)
def test_one_scale_changed_by_one_unit_in_its_last_place_is_named(
    artefacts: Artefacts, target: str, variant: str, row: int, block: int, known: bool
) -> None:
    path = artefacts.broken(target, variant, FITTED, scale_by_one_ulp(row, block))
    (found,) = said(artefacts.report(target, variant, path, known))
    assert found.startswith("weights.kept")
    assert f"{FITTED} (from row {row % artefacts.place.open().tensors[FITTED].shape[0]}" in found


@pytest.mark.parametrize(("target", "variant"), CONTAINERS)
@pytest.mark.parametrize("edit", [scales_to_bf16, every_scale_times])
@pytest.mark.parametrize("known", [True, False])
def test_scales_in_a_narrower_dtype_or_all_too_large_are_named(
    artefacts: Artefacts, target: str, variant: str, edit: Callable[[Numbers], None], known: bool
) -> None:
    clean = PLACES[target](artefacts.clean(target, variant), FITTED).read()
    path = artefacts.broken(target, variant, FITTED, edit)
    changed = PLACES[target](path, FITTED).read()
    found = said(artefacts.report(target, variant, path, known))
    if all(np.array_equal(a, b) for a, b in zip(clean.scales, changed.scales, strict=True)):
        assert edit is scales_to_bf16  # MLX and compressed-tensors prescribe the dtype of a bf16 model
        assert found == []
    else:
        assert [line.partition(":")[0] for line in found] == ["weights.kept"]
        assert FITTED in found[0]


@pytest.mark.parametrize(("target", "variant"), CONTAINERS)
def test_a_norm_is_what_it_was_to_the_last_bit(artefacts: Artefacts, target: str, variant: str) -> None:
    def edit(numbers: Numbers) -> None:
        flat = numbers.codes.reshape(-1)
        flat[3] = np.nextafter(flat[3], np.float32(9)) if flat.dtype == np.float32 else flat[3] + 1

    path = artefacts.broken(target, variant, NORM, edit)
    (found,) = said(artefacts.report(target, variant, path))
    assert f"{NORM} (from row 0, column 3)" in found


@pytest.mark.parametrize("said_type", [15, 18, 0])
def test_what_a_file_says_of_itself_excuses_nothing(artefacts: Artefacts, said_type: int) -> None:
    """A file type of K-quants loosened every bound of a matrix."""
    from gguf import GGUFReader

    path = artefacts.broken("gguf", "Q4_0", FITTED, code_by_one(1, 2))
    reader = GGUFReader(path, "r+")
    reader.fields["general.file_type"].parts[-1][0] = said_type
    reader.data.flush()
    (found,) = said(artefacts.report("gguf", "Q4_0", path))
    assert FITTED in found


@pytest.mark.parametrize("variant", ["Q8_0", "BF16", "F32", "Q4_K_M", "Q6_K"])
def test_codes_and_roundings_that_a_variant_asks_for_are_promised_too(artefacts: Artefacts, variant: str) -> None:
    if "K" in variant:
        pytest.importorskip("libggml")
    clean = artefacts.clean("gguf", variant)
    report = artefacts.report("gguf", variant, clean)
    assert said(report) == []
    assert all(item.kept == item.compared for item in report.tensors)
    found = said(artefacts.report("gguf", "Q4_0", clean))  # what was not asked for; but the source's values are as good
    assert [line.partition(":")[0] for line in found] == ([] if variant in ("BF16", "F32") else ["weights.kept"])


def test_a_head_on_a_grid_of_its_own_is_held_to_the_embedding(artefacts: Artefacts, tmp_path: Path) -> None:
    """An NPU's integers need one scale a row, and the embedding has blocks: the head is a second, coarser one."""
    onnx = pytest.importorskip("gemexport.formats.onnx")
    options = {"calibration": [list(range(3, 67))], "context": 64, "prefill": 8}
    path, place = TARGETS["onnx"].path(tmp_path, "model", "npu-a8"), artefacts.place
    path.parent.mkdir(parents=True, exist_ok=True)
    steps.export(place, "onnx", "npu-a8", path, options, lambda _: None)

    def report() -> WeightsReport:
        return check_weights(place, "onnx", path, lambda _: None, Asked("npu-a8", options))[0]

    before = report()
    assert said(before) == []
    head = next(item for item in before.tensors if item.name == HEAD)
    assert head.kept == head.compared
    original, tensor = onnx.derived(path)[HEAD]
    assert original == EMBEDDING
    writable(tensor.packed)[5, 7] ^= 1
    (broken,) = said(report())
    assert f"{HEAD} (from row 7, column 5)" in broken


def ggml_blocks(artefacts: Artefacts, path: Path) -> None:
    """Put llama-quantize's own Q4_0 in the place of ours."""
    from gguf.constants import GGMLQuantizationType

    from gemexport.formats.gguf import stored_tensors
    from gemexport.formats.gguf.parts import read_parts
    from gemexport.formats.gguf.quantizer import quantize

    source = artefacts.place.plain().tensors
    for name, tensor in stored_tensors(read_parts(path)).items():
        if tensor.type == GGMLQuantizationType.Q4_0:
            rows = tensor.shape[0]
            writable(tensor.blocks(0, rows))[:] = quantize(tensor.type, source[name].rows(0, rows).values)


def mlx_blocks(artefacts: Artefacts, path: Path) -> None:
    """Put mlx's own 4 bits in groups of 32 in the place of ours."""
    import mlx.core as mx

    source = artefacts.place.plain()
    for name in source.tensors:
        if source.model.specs[name].role.is_matrix and name != CANONICAL.name(Role.EMBEDDING):  # which has 8 bits
            values = mx.array(source.tensors[name].numpy()).astype(mx.bfloat16)
            packed, *beside = (np.array(a) for a in _mlx(mx, values))
            place = PLACES["mlx"](path, name)
            numbers = place.read()
            fields = packed.view(np.uint8)
            numbers.codes = np.stack([fields & 15, fields >> 4], axis=2).reshape(numbers.codes.shape)
            numbers.scales = [like(a, b) for a, b in zip(beside, numbers.scales, strict=True)]
            place.write(numbers)


def _mlx(mx: Any, values: Any) -> list[Any]:
    packed, scales, biases = mx.quantize(values, group_size=32, bits=4)
    return [packed, scales.astype(mx.float32), biases.astype(mx.float32)]


def test_codes_that_nothing_was_promised_of_are_told(artefacts: Artefacts) -> None:
    """As those of a run that rounds on inputs, which is not done again to judge one artefact."""
    clean = artefacts.report("gguf", "Q4_0", artefacts.clean("gguf", "Q4_0"), known=False)
    assert judging_notes(clean) == ()

    def others(numbers: Numbers) -> None:
        numbers.codes = numbers.codes ^ 1

    (note,) = judging_notes(artefacts.report("gguf", "Q4_0", artefacts.broken("gguf", "Q4_0", FITTED, others), False))
    assert note.startswith("1 matrix has codes that are neither the checkpoint's nor what rounding to nearest gives")


@pytest.mark.parametrize("recode", [("gguf", "Q4_0", ggml_blocks), ("mlx", "4bit", mlx_blocks)])
def test_one_scale_in_somebody_elses_file_is_named(artefacts: Artefacts, recode: tuple[str, str, Any]) -> None:
    target, variant, put = recode
    pytest.importorskip("libggml" if target == "gguf" else "mlx.core")
    path = artefacts.broken(target, variant, FITTED, lambda numbers: None)
    put(artefacts, path)
    before = said(artefacts.report(target, variant, path, known=False))

    def halve(numbers: Numbers) -> None:
        numbers.scales[0][3, 1] = like(floats(numbers.scales[0][3:4, 1]) / np.float32(2), numbers.scales[0])[0]

    place = PLACES[target](path, FITTED)
    numbers = place.read()
    halve(numbers)
    place.write(numbers)
    after = said(artefacts.report(target, variant, path, known=False))
    found, *_ = [line for line in after if line not in before]
    assert f"{FITTED} (row 3, from column 32" in found
    # On a lattice another program's codes are no codes of the checkpoint's; off it there is nothing to say.
    assert {line.partition(":")[0] for line in before} <= {"weights.exact_fraction"}


def test_one_scale_in_a_file_of_k_quants_is_named(artefacts: Artefacts) -> None:
    pytest.importorskip("libggml")
    from gemexport.formats.gguf import stored_tensors
    from gemexport.formats.gguf.parts import read_parts

    path = artefacts.broken("gguf", "Q4_K_M", NORM, lambda numbers: None)
    assert said(artefacts.report("gguf", "Q4_K_M", path, known=False)) == []
    tensor = stored_tensors(read_parts(path))[FITTED]
    assert tensor.type.name == "Q5_0"  # rows of 64 weights are no K-quants
    blocks = writable(tensor.blocks(0, tensor.shape[0]))
    blocks[3, 22:24] = (blocks[3, 22:24].copy().view("<f2") / np.float16(2)).view(np.uint8)
    found, *_ = said(artefacts.report("gguf", "Q4_K_M", path, known=False))
    assert f"{FITTED} (row 3, from column 32" in found
