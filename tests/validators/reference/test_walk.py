"""A layer at a time is the whole model, bit for bit; and what a walk shows on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gemexport import demo
from gemexport.formats.activations import Activations, LinearActivations, Quantizer
from gemexport.formats.checkpoint import Checkpoint, open_checkpoint
from gemexport.formats.tensor import ArrayTensor, Floats, Rows, Tensor, row_count
from gemexport.validators.reference import Arithmetic, reference, walk, write_together
from gemexport.validators.reference.decoder import Decoder
from gemexport.validators.runtimes.protocol import Arithmetic as Computed
from gemexport.validators.runtimes.pytorch import PyTorch, whole

LENGTHS = (100, 7, 100)  # longer than the windows, and two alike


def _sequences(checkpoint: Checkpoint) -> list[list[int]]:
    stream = np.random.default_rng(3)
    return [stream.integers(0, checkpoint.architecture.vocab_size, length).tolist() for length in LENGTHS]


@pytest.fixture(scope="module", params=[(family, size) for family in ("gemma3", "gemma4") for size in demo.SIZES])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    family, size = request.param
    return open_checkpoint(demo.make(tmp_path_factory.mktemp("model") / "model", family=family, size=size))


def _written(checkpoint: Checkpoint, folder: Path, threads: int, **options: Any) -> list[Floats]:
    paths = [folder / f"{i}.npy" for i in range(len(LENGTHS))]
    layered = reference(checkpoint.text_config, checkpoint.tensors, threads, **options)
    layered.write_logits(_sequences(checkpoint), paths)
    assert sorted(folder.iterdir()) == paths  # and nothing else is left
    return [np.load(path) for path in paths]


@pytest.mark.parametrize("threads", [1, 2])
def test_all_sequences_at_once_are_the_whole_model(
    checkpoint: Checkpoint, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walk, "HEAD_BYTES", 1)  # as many slices of the head as there can be
    model = whole(checkpoint.text_config, checkpoint.tensors, threads)
    for found, sequence in zip(_written(checkpoint, tmp_path, threads), _sequences(checkpoint), strict=True):
        np.testing.assert_array_equal(found, model.logits(sequence))


@pytest.mark.parametrize("model", ["tiny_gemma3", "tiny_gemma4"])
@pytest.mark.parametrize(
    "arithmetic", ["bf16", "int8-activations", "f32-reordered", "f32-f16-gelu", "f32-f16-constants", "f64"]
)
def test_noises_go_the_same_way(
    arithmetic: Arithmetic, model: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(request.getfixturevalue(model))
    computed: Computed = "bf16" if arithmetic == "bf16" else "f32"
    held = PyTorch(Decoder(checkpoint.text_config, checkpoint.tensors, arithmetic).whole(), computed, 1)
    for found, sequence in zip(
        _written(checkpoint, tmp_path, 1, dtype=arithmetic), _sequences(checkpoint), strict=True
    ):
        np.testing.assert_array_equal(found, held.logits(sequence))


def test_static_activations_go_the_same_way(tiny_gemma4: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_gemma4)
    both = LinearActivations(Quantizer(0.05, bits=8), Quantizer(0.05, bits=8))
    linears = {name: both for name in checkpoint.tensors if name.endswith("_proj.weight")}
    scales = Activations(linears=linears)
    plain = _written(checkpoint, tmp_path, 1)
    model = PyTorch(Decoder(checkpoint.text_config, checkpoint.tensors, activations=scales).whole(), "f32", 1)
    for found, other, sequence in zip(
        _written(checkpoint, tmp_path, 1, activations=scales), plain, _sequences(checkpoint), strict=True
    ):
        np.testing.assert_array_equal(found, model.logits(sequence))
        assert not np.array_equal(found, other)


def test_hidden_states_are_those_of_the_whole_model(tiny_gemma4: Path) -> None:
    checkpoint = open_checkpoint(tiny_gemma4)
    tokens = _sequences(checkpoint)[0]
    expected = whole(checkpoint.text_config, checkpoint.tensors, 1).hidden(tokens)
    found = list(reference(checkpoint.text_config, checkpoint.tensors, 1).hidden(tokens))
    assert len(found) == len(checkpoint.architecture.layers) + 1
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_watcher_sees_what_each_matrix_is_multiplied_with(tiny_gemma4: Path) -> None:
    checkpoint = open_checkpoint(tiny_gemma4)
    sequences, shown = _sequences(checkpoint), dict[str, list[torch.Tensor]]()
    layered = reference(checkpoint.text_config, checkpoint.tensors, 1)
    with layered.walk(sequences) as way:
        for visit in way.layers():
            with visit.watch(lambda name, x: shown.setdefault(name, []).append(x)):
                outputs = list(visit.outputs())
            assert all(not torch.equal(a, b) for a, b in zip(outputs[:1], outputs[2:], strict=True))
    matrices = [name for name in checkpoint.tensors if ".layers." in name and len(checkpoint.tensors[name].shape) == 2]
    assert sorted(shown) == sorted(matrices)
    for name, seen in shown.items():
        assert [tuple(x.shape) for x in seen] == [(1, n, checkpoint.tensors[name].shape[1]) for n in LENGTHS]


def test_the_next_layer_is_given_what_the_changed_layer_gives(tiny_gemma3: Path, tmp_path: Path) -> None:
    """As a search for codes does it: look at the inputs, change the weights, go on with what these give."""
    checkpoint, name = open_checkpoint(tiny_gemma3), "model.layers.1.mlp.down_proj.weight"
    tokens = _sequences(checkpoint)[0]
    halved = ArrayTensor(name, checkpoint.tensors[name].numpy() / 2)
    changed: dict[str, Tensor] = {**checkpoint.tensors, name: halved}
    expected = reference(checkpoint.text_config, changed, 1).logits(tokens)
    with reference(checkpoint.text_config, checkpoint.tensors, 1).walk([tokens]) as way:
        for visit in way.layers():
            list(visit.outputs())
            if visit.index == 1:
                visit.module.get_parameter("mlp.down_proj.weight").data /= 2
                list(visit.outputs())
        found = torch.cat([part for _, _, _, part in way.logits()], dim=1).numpy()
    np.testing.assert_array_equal(found, expected)


class _Counted:
    """A tensor that says how many rows were asked for."""

    def __init__(self, base: Tensor) -> None:
        self.name, self.shape, self.dtype, self.grid = base.name, base.shape, base.dtype, base.grid
        self._base = base
        self.rows_read = 0

    def rows(self, start: int, stop: int) -> Rows:
        self.rows_read += stop - start
        return self._base.rows(start, stop)

    def numpy(self) -> Floats:
        return self._base.numpy()


def test_only_the_rows_of_used_ids_are_read_of_a_table(tiny_gemma4: Path) -> None:
    checkpoint = open_checkpoint(tiny_gemma4)
    counted = {name: _Counted(tensor) for name, tensor in checkpoint.tensors.items() if "embed_tokens" in name}
    with reference(checkpoint.text_config, {**checkpoint.tensors, **counted}, 1).walk([[5, 6, 7, 300, 5, 6]]):
        assert [tensor.rows_read for tensor in counted.values()] == [4, 4]


def test_layers_are_read_once_and_one_after_the_other(tiny_gemma4: Path) -> None:
    checkpoint = open_checkpoint(tiny_gemma4)
    counted = {name: _Counted(tensor) for name, tensor in checkpoint.tensors.items() if ".layers." in name}
    layered = reference(checkpoint.text_config, {**checkpoint.tensors, **counted}, 1)
    with layered.walk(_sequences(checkpoint)) as way:
        for visit in way.layers():
            list(visit.outputs())
            for name, tensor in counted.items():
                if len(tensor.shape) == 2:
                    read = tensor.shape[0] if int(name.split(".")[2]) <= visit.index else 0
                    assert tensor.rows_read == read, name
            held = {value.device.type for value in visit.module.state_dict().values()}
            assert held == {"cpu"}
        devices = {value.device.type for value in way.decoder.model.state_dict().values()}
    assert devices == {"meta"}


def test_several_arithmetics_together_read_once_and_give_what_each_gives_alone(
    tiny_gemma4: Path, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(tiny_gemma4)
    counted = {name: _Counted(tensor) for name, tensor in checkpoint.tensors.items() if "embed_tokens" not in name}
    kinds: tuple[Arithmetic, ...] = ("bf16", "f32", "f32-f16-gelu", "f32-f16-constants", "int8-activations")
    sequences, wanted = _sequences(checkpoint), []
    for kind in kinds:
        (tmp_path / kind).mkdir()
        way = reference(checkpoint.text_config, {**checkpoint.tensors, **counted}, 1, dtype=kind)
        wanted.append((way, sequences, [tmp_path / kind / f"{i}.npy" for i in range(len(sequences))]))
    write_together(wanted)
    layers = [tensor for name, tensor in counted.items() if ".layers." in name]
    assert [tensor.rows_read for tensor in layers] == [row_count(tensor.shape) for tensor in layers]
    (tmp_path / "alone").mkdir()
    for kind, (_, _, paths) in zip(kinds, wanted, strict=True):
        for path, alone in zip(paths, _written(checkpoint, tmp_path / "alone", 1, dtype=kind), strict=True):
            np.testing.assert_array_equal(np.load(path), alone)


def test_what_goes_into_a_matrix_and_which_have_the_same(checkpoint: Checkpoint, tmp_path: Path) -> None:
    sequences = _sequences(checkpoint)
    with reference(checkpoint.text_config, checkpoint.tensors, 1).walk(sequences, tmp_path) as walked:
        for visit in walked.layers():
            groups = [[name.split(".")[-2] for name in group] for group in visit.together()]
            assert ["o_proj"] in groups
            assert ["gate_proj", "up_proj"] in groups
            name = next(name for name in visit.matrices if name.endswith("down_proj.weight"))
            seen: list[tuple[str, torch.Tensor]] = []
            with visit.watch(lambda *shown: seen.append(shown)):  # noqa: B023 (called within the block)
                outputs = [output.clone() for output in visit.outputs()]
            found, wanted = list(visit.inputs(name)), [x[0] for shown, x in seen if shown == name]
            assert [len(x) for x in found] == list(LENGTHS)
            assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
            assert all(torch.equal(*pair) for pair in zip(outputs, visit.outputs(), strict=True))  # hooks are gone
