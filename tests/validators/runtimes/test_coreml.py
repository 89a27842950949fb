"""The evaluator on programs of coremltools' making: states, float16, what it does not know; and its command."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemexport.exporters import coreml as exporter
from gemexport.formats.checkpoint import open_checkpoint
from gemexport.formats.coreml.package import open_package
from gemexport.formats.storage.errors import InputError
from gemexport.validators.mil.registry import OPERATIONS
from gemexport.validators.runtimes import coreml
from gemexport.validators.runtimes.coreml import Program
from gemexport.validators.runtimes.coreml.feeds import feeds, mask

ct = pytest.importorskip("coremltools")

from coremltools.converters.mil.mil import Builder as mb  # noqa: E402
from coremltools.converters.mil.mil import types  # noqa: E402


def save(program: Any, path: Path, **options: Any) -> Path:
    options = {"minimum_deployment_target": ct.target.iOS18, "pass_pipeline": ct.PassPipeline.EMPTY} | options
    ct.convert(program, skip_model_load=True, **options).save(str(path))
    return path


@pytest.fixture(scope="module")
def model(tiny_gemma3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model, exported plain."""
    path = tmp_path_factory.mktemp("model") / "f16.mlpackage"
    return exporter.export(open_checkpoint(tiny_gemma3), path, variant="f16", context=64).path


def test_states_are_written_and_read(tmp_path: Path) -> None:
    @mb.program(
        input_specs=[mb.TensorSpec((1, 2), types.fp16), mb.StateTensorSpec((2, 2), types.fp16)],
        opset_version=ct.target.iOS18,
    )
    def program(x: Any, memory: Any) -> Any:
        before = mb.read_state(input=memory)
        updated = mb.slice_update(x=before, update=x, begin=[1, 0], end=[2, 2])
        after = mb.coreml_update_state(state=memory, value=updated)
        return mb.add(x=mb.reduce_sum(x=after, axes=[0], keep_dims=True), y=x)

    found = Program(save(program, tmp_path / "a.mlpackage"))
    state = found.make_state()
    (name,) = state
    out = found.predict({"x": np.array([[1, 2]])}, state)
    assert next(iter(out.values())).tolist() == [[2, 4]]
    assert state[name].tolist() == [[0, 0], [1, 2]]
    found.predict({"x": np.array([[5, 6]])}, state)
    assert state[name].tolist() == [[0, 0], [5, 6]]


def test_what_was_read_from_a_state_does_not_change_when_it_is_written(tmp_path: Path) -> None:
    @mb.program(
        input_specs=[mb.TensorSpec((1, 2), types.fp16), mb.StateTensorSpec((2, 2), types.fp16)],
        opset_version=ct.target.iOS18,
    )
    def program(x: Any, memory: Any) -> Any:
        before = mb.read_state(input=memory)
        old = mb.read_state(input=memory)
        updated = mb.slice_update(x=before, update=x, begin=[1, 0], end=[2, 2])
        after = mb.coreml_update_state(state=memory, value=updated)
        return mb.sub(x=after, y=old), mb.reshape(x=old, shape=[4])

    found = Program(save(program, tmp_path / "a.mlpackage"))
    state = found.make_state()
    for x in ([[1, 2]], [[4, 8]]):
        first = found.predict({"x": np.array(x)}, state)
    difference, old = first.values()
    assert difference.tolist() == [[0, 0], [3, 6]]
    assert old.tolist() == [0, 0, 1, 2]


def test_float16_overflows_where_the_program_declares_it(tmp_path: Path) -> None:
    @mb.program(input_specs=[mb.TensorSpec((1, 2), types.fp16)], opset_version=ct.target.iOS18)
    def program(x: Any) -> Any:
        narrow = mb.square(x=x, name="narrow")
        wide = mb.square(x=mb.cast(x=x, dtype="fp32"), name="wide")
        return narrow, wide

    path = save(program, tmp_path / "a.mlpackage")
    x = {"x": np.array([[300.0, 0.1]], np.float32)}
    half, full = Program(path, "f16").predict(x), Program(path, "f32").predict(x)
    assert half["narrow"].tolist() == [[np.inf, np.float16(np.float16(0.1) ** 2)]]
    assert half["wide"][0, 0] == 90_000
    assert full["narrow"][0, 0] == 90_000
    assert full["narrow"][0, 1] == np.float32(0.1) ** 2


def test_weights_may_stay_in_the_file(model: Path) -> None:
    inputs = feeds(open_package(model)).at(list(range(3, 13)), 0)
    lazy, held = Program(model, hold=0), Program(model, hold=1 << 30)
    np.testing.assert_allclose(lazy.predict(inputs)["logits"], held.predict(inputs)["logits"], atol=1e-4)


def test_rows_of_vector_palettes_are_looked_up(tmp_path: Path) -> None:
    """A table of embeddings as the sum of two codebooks of vectors along the row, read a row at a time."""
    rng = np.random.default_rng(2)
    places = [rng.integers(0, 256, (300, 8)).astype(np.uint8) for _ in range(2)]
    vectors = [rng.normal(size=(1, 1, 256, 4)).astype(np.float16) for _ in range(2)]

    @mb.program(input_specs=[mb.TensorSpec((1, 3), types.int32)], opset_version=ct.target.iOS18)
    def program(ids: Any) -> Any:
        parts = []
        for index, table in zip(places, vectors, strict=True):
            narrow = index.astype(types.nptype_from_builtin(types.uint8))
            whole = mb.constexpr_lut_to_dense(indices=narrow, lut=table, vector_axis=np.int32(-1))
            parts.append(mb.gather(x=whole, indices=ids, axis=0))
        return mb.add(x=parts[0], y=parts[1])

    path = save(program, tmp_path / "a.mlpackage")
    (got,) = Program(path).predict({"ids": np.array([[299, 0, 7]])}).values()
    rows = [table[0, 0][index[[299, 0, 7]]].reshape(1, 3, 32) for index, table in zip(places, vectors, strict=True)]
    np.testing.assert_array_equal(got, rows[0].astype(np.float32) + rows[1].astype(np.float32))


def test_what_is_not_known_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @mb.program(input_specs=[mb.TensorSpec((1, 6, 4))], opset_version=ct.target.iOS18)
    def program(boxes: Any) -> Any:
        scores = mb.reduce_sum(x=boxes, axes=[2], keep_dims=True)
        return mb.non_maximum_suppression(boxes=boxes, scores=scores, iou_threshold=0.5, max_boxes=3)[0]

    path = save(program, tmp_path / "a.mlpackage")
    with pytest.raises(
        InputError, match="the operation non_maximum_suppression is not known to the evaluator"
    ) as raised:
        Program(path)
    assert "\n" not in str(raised.value)
    monkeypatch.setitem(OPERATIONS, "non_maximum_suppression", lambda boxes, scores: boxes)
    with pytest.raises(InputError, match=r"the input .*max_boxes.* of non_maximum_suppression is not known"):
        Program(path)


def test_what_is_known_but_not_so_is_named(tmp_path: Path) -> None:
    @mb.program(input_specs=[mb.TensorSpec((1, 3, 8, 8))], opset_version=ct.target.iOS18)
    def program(x: Any) -> Any:
        return mb.avg_pool(x=x, kernel_sizes=[3, 3], strides=[2, 2], pad_type="valid", ceil_mode=True, name="means")

    loaded = Program(save(program, tmp_path / "a.mlpackage"))
    with pytest.raises(InputError, match="avg_pool means: what counts beyond the padding"):
        loaded.predict({"x": np.zeros((1, 3, 8, 8), np.float32)})


def test_inputs_are_checked(model: Path) -> None:
    with pytest.raises(InputError, match="its inputs are fullAttentionMask, inputIds, slidingAttentionMask"):
        Program(model).predict({"ids": np.zeros((1, 1))})


def test_shapes_of_inputs_are_checked(tmp_path: Path) -> None:
    @mb.program(input_specs=[mb.TensorSpec((1, 2))], opset_version=ct.target.iOS18)
    def program(x: Any) -> Any:
        return mb.relu(x=x)

    loaded = Program(save(program, tmp_path / "a.mlpackage"))
    for shape in ((2, 2), (2,), (1, 2, 1)):
        with pytest.raises(InputError, match=r"was given x .*; its shape is \[1, 2\]"):
            loaded.predict({"x": np.zeros(shape, np.float32)})


def test_masks_are_causal_and_slide() -> None:
    whole = mask(3, 2, None)[0, 0] == 0
    assert whole.tolist() == np.tri(5, dtype=bool)[2:].tolist()
    slid = mask(3, 2, 2)[0, 0] == 0
    assert slid.tolist() == [[0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]
    assert mask(1, 1, 1).dtype == np.float16
    assert mask(1, 1, 1).min() == -65504


def test_chunks_and_single_steps_agree(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = list(range(3, 43))
    runtime = coreml.load(model, threads=1, context=64)
    assert (runtime.name.split()[0], runtime.arithmetic, runtime.tokenize("a")) == ("MIL", "f32", None)
    usual = runtime.logits(tokens)
    monkeypatch.setattr(coreml, "CHUNK", 7)
    np.testing.assert_allclose(runtime.logits(tokens), usual, atol=1e-4)
    assert runtime.logits(tokens[:3]).shape == (3, usual.shape[1])
    monkeypatch.setattr(coreml, "SINGLE", 0)
    np.testing.assert_allclose(runtime.logits(tokens), usual, atol=1e-4)
    assert runtime.greedy(tokens, 1) == [int(usual[-1].argmax())]
    runtime.close()


def test_more_context_than_there_is(model: Path) -> None:
    with pytest.raises(InputError, match="its cache holds 64 tokens, 65 are needed"):
        coreml.load(model, threads=1, context=65)


def test_a_package_that_is_no_language_model(tmp_path: Path) -> None:
    @mb.program(input_specs=[mb.TensorSpec((1, 2))], opset_version=ct.target.iOS18)
    def program(x: Any) -> Any:
        return mb.relu(x=x)

    with pytest.raises(InputError, match="is no language model"):
        coreml.load(save(program, tmp_path / "a.mlpackage"), threads=1, context=8)


def test_a_description_of_another_program_is_refused(model: Path, tmp_path: Path) -> None:
    """The evaluator would run the program; Core ML does not load the package."""

    def version(spec: Any) -> None:
        spec.specificationVersion = 7

    def name(spec: Any) -> None:
        spec.description.input[0].name = "other"

    def kind(spec: Any) -> None:
        spec.description.output[0].type.multiArrayType.dataType = ct.proto.FeatureTypes_pb2.ArrayFeatureType.INT32

    def state(spec: Any) -> None:
        spec.description.state[0].type.stateType.arrayType.shape[-1] += 1

    file = Path("Data/com.apple.CoreML/model.mlmodel")
    for number, (change, said) in enumerate(
        ((version, "says version 7"), (name, "describes other"), (kind, "as int32"), (state, "describes the state"))
    ):
        path = tmp_path / f"{number}.mlpackage"
        shutil.copytree(model, path)
        spec = ct.proto.Model_pb2.Model.FromString((path / file).read_bytes())
        change(spec)
        (path / file).write_bytes(spec.SerializeToString())
        with pytest.raises(InputError, match=said):
            coreml.load(path, threads=1, context=8)


def test_ranges_name_the_largest_values(model: Path) -> None:
    found = coreml.ranges(model, [3, 4, 5])
    assert [item.largest for item in found] == sorted((item.largest for item in found), reverse=True)
    assert {"linear", "mul", "scaled_dot_product_attention"} <= {item.kind for item in found}
    assert {item.declared for item in found} == {"fp16", "fp32"}


def test_core_ml_itself_needs_a_mac(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coreml, "on_mac", lambda: False)
    with pytest.raises(InputError, match="runs on macOS only"):
        coreml.load(model, threads=1, context=8, arithmetic="device")


def test_core_ml_is_driven_like_the_evaluator(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLModel's interface, played by the evaluator: what the adapter calls is what coremltools documents."""

    class Played:
        def __init__(self, path: str, compute_units: Any) -> None:
            self._program = Program(path)

        def get_spec(self) -> Any:
            return self._program.package.model

        def make_state(self) -> Any:
            return self._program.make_state()

        def predict(self, data: dict[str, np.ndarray], state: Any = None) -> dict[str, np.ndarray]:
            return self._program.predict(data, state)

    monkeypatch.setattr(coreml, "on_mac", lambda: True)
    monkeypatch.setattr(ct.models, "MLModel", Played)
    device = coreml.load(model, threads=1, context=32, arithmetic="device")
    assert device.arithmetic == "f16"
    assert device.name.startswith("Core ML")
    tokens = list(range(3, 30))
    evaluated = coreml.load(model, threads=1, context=32)
    np.testing.assert_allclose(device.logits(tokens), evaluated.logits(tokens), atol=1e-4)
    assert device.greedy(tokens, 3) == evaluated.greedy(tokens, 3)
    device.close()


def test_the_command_continues_a_text(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coreml, "on_mac", lambda: False)
    assert coreml.main([str(model), "hello", "--tokens", "2"]) == 0
    assert capsys.readouterr().out.startswith("hello")
    assert coreml.main([str(model), "hello", "--tokens", "500"]) == 2
    assert "its cache holds 64 tokens" in capsys.readouterr().err
    (model.parent / "tokenizer.json").unlink()
    assert coreml.main([str(model), "hello"]) == 2
    assert "no tokenizer beside the package" in capsys.readouterr().err
