"""Plain linears are rounded on what goes into them; every format then has those codes."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from gemexport import demo
from gemexport.cli import main
from gemexport.engine.dag import graph
from gemexport.engine.rounding import candidates, round_linears, rounded
from gemexport.engine.steps import grids
from gemexport.formats import compressed_tensors, coreml, gguf, mlx, onnx
from gemexport.formats.checkpoint import open_checkpoint
from gemexport.formats.gemma.names import EMBEDDING
from gemexport.formats.gemma.roles import Role
from gemexport.formats.grids.recipe import load_recipe
from gemexport.formats.grids.search import CODES, SCALES, attach, find_grids, read_index
from gemexport.formats.storage.errors import InputError
from gemexport.formats.tensor import Floats, Rows, Tensor, TensorBase, evaluate
from gemexport.registry import TARGETS
from gemexport.request import request, steps
from gemexport.shared.measured import Rounded
from gemexport.shared.node import Outcome
from gemexport.shared.place import Place
from gemexport.validators.reference import reference

pytest.importorskip("torch")


@pytest.fixture(scope="module", params=["gemma3", "gemma4"])
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / str(request.param)
    return demo.make(folder, family=request.param, size="tiny", rule=None)


def place_of(model: Path, work: Path) -> Place:
    place = Place(model, work, 64)
    grids(place, load_recipe("int4"), lambda _: None)
    return place


def choose(place: Place, text: Path | None = None) -> Rounded:
    return round_linears(place, load_recipe("int4"), text, lambda _: None)


class Stored(TensorBase):
    """A tensor as its grid has it."""

    grid = None

    def __init__(self, tensor: Tensor) -> None:
        self.name, self.shape, self.dtype = tensor.name, tensor.shape, tensor.dtype
        self._tensor = tensor

    def rows(self, start: int, stop: int) -> Rows:
        rows, grid = self._tensor.rows(start, stop), self._tensor.grid
        return Rows(rows.values if grid is None else evaluate(grid, *rows.grid()).astype(np.float32))


def loss(place: Place) -> float:
    """What the last layer gives for texts that calibration has not: its squared error, relative."""
    checkpoint = place.open()
    tokens = place.sequences(checkpoint)[0]

    def last(tensors: Mapping[str, Tensor]) -> Floats:
        return list(reference(checkpoint.text_config, tensors, 1).hidden(tokens))[-1]

    wanted = last(place.plain().tensors)
    found = last({name: Stored(tensor) for name, tensor in checkpoint.tensors.items()})
    return float(np.square(found - wanted).sum() / np.square(wanted).sum())


def test_less_is_lost_on_other_texts(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = place_of(plain, tmp_path / "work")
    before, one_by_one = loss(place), place.open().tensors
    done: list[int] = []
    # Which `claim` empties after a run that was killed.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    waiting: list[tuple[bool, bool]] = []

    def progress(amount: int) -> None:
        done.append(amount)
        waiting.append((any((tmp_path / "tmp").glob("walk-*")), any(place.work.glob("walk-*"))))

    found = round_linears(place, load_recipe("int4"), None, progress)
    assert set(waiting) == {(True, False)}, "what waits between layers lies with the temporary files"
    specs = place.open().model.specs
    assert sum(done) == sum(math.prod(specs[name].shape) for name in rounded(place.open().model))
    assert found.tokens > 1500
    assert loss(place) < 0.9 * before
    kinds = {name.rpartition(".layers.")[2].partition(".")[2] for name in found.chosen}
    assert {"self_attn.q_proj.weight", "self_attn.o_proj.weight", "mlp.down_proj.weight"} <= kinds
    assert "model.embed_tokens.weight" in found.chosen, "it is the head"
    assert {specs[name].role for name in found.nearest} <= {Role.PER_LAYER_EMBEDDING, Role.PER_LAYER_MODEL_PROJECTION}
    for name, tensor in place.open().tensors.items():
        same = tensor.grid is None or np.array_equal(tensor.rows(0, 8).codes, one_by_one[name].rows(0, 8).codes)
        assert same == (name not in found.chosen), name


def test_chosen_once_for_a_text(plain: Path, tmp_path: Path) -> None:
    place = place_of(plain, tmp_path / "work")
    first = choose(place)
    when = (place.grids / CODES).stat().st_mtime_ns
    index = grids(place, load_recipe("int4"), lambda _: None)
    assert choose(place) == first
    assert (place.grids / CODES).stat().st_mtime_ns == when, "chosen again"
    assert read_index(place.grids) == index
    size = (place.grids / CODES).stat().st_size
    text = tmp_path / "text.txt"
    text.write_text("Another text, of other letters: zyx wvu tsr.\n" * 40, "utf-8")
    before = (place.grids / CODES).read_bytes()
    choose(place, text)
    assert (place.grids / CODES).read_bytes() != before
    assert (place.grids / CODES).stat().st_size == size
    text.write_bytes(b"")
    with pytest.raises(InputError, match="has no text"):
        choose(place, text)


def test_the_same_again_is_the_same_bytes(plain: Path, tmp_path: Path) -> None:
    found = []
    for name in ("one", "two"):
        place = place_of(plain, tmp_path / name)
        choose(place)
        found.append([(place.grids / file).read_bytes() for file in (SCALES, CODES)])
    assert found[0] == found[1]


def test_every_format_has_the_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = demo.make(tmp_path / "model", family="gemma3", size="tiny", rule=None)
    out = tmp_path / "out"
    names = {"gguf": gguf, "mlx": mlx, "onnx": onnx, "coreml": coreml, "compressed-tensors": compressed_tensors}
    command = ["all", str(model), "-o", str(out), "--recipe", "int4", "--no-validate", "--jobs", "1"]
    first = [f"{name}:{TARGETS[name].variants[0]}" for name in names]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--variants", ",".join(first)])
    assert ended.value.code == 0
    checkpoint = attach(open_checkpoint(model), out / ".gemexport" / "grids")
    index = read_index(out / ".gemexport" / "grids")
    assert index is not None
    chosen = [record.name for record in index.tensors if record.codes is not None]
    assert len(chosen) == 7 * len(checkpoint.architecture.layers) + 1
    assert f"{len(chosen)} matrices were rounded on what goes into them" in capsys.readouterr().out
    for format_name, module in names.items():
        target = TARGETS[format_name]
        stored = module.tensors(target.path(out, "model", target.variants[0]))
        for name in chosen:
            if (name, format_name) == (EMBEDDING, "compressed-tensors"):  # plain, as vLLM loads it
                continue
            wanted, found = (tensors[name].rows(0, 8) for tensors in (checkpoint.tensors, stored))
            np.testing.assert_array_equal(found.codes, wanted.codes, f"{format_name}: {name}")
            np.testing.assert_array_equal(found.scales, wanted.scales, f"{format_name}: {name}")


@pytest.mark.parametrize(("recipe", "waited"), [("default", "round"), ("rtn", "grids"), ("lossless", "grids")])
def test_what_an_export_waits_for(recipe: str, waited: str, tiny_gemma3: Path) -> None:
    asked = request(model=tiny_gemma3, out="out", formats=["mlx"], recipe=recipe)
    checkpoint = asked.checkpoint()
    nodes = {node.name: node for node in graph(asked, checkpoint, Path("work"), steps(asked, checkpoint))}
    assert ("round" in nodes) == (waited == "round")
    assert nodes["export mlx:4bit"].needs == (waited,)


def test_a_lattice_leaves_nothing_to_round(tiny_gemma3: Path, tmp_path: Path) -> None:
    asked = request(model=tiny_gemma3, out="out", formats=["mlx"])
    checkpoint = asked.checkpoint()
    (node,) = [
        item for item in graph(asked, checkpoint, Path("work"), steps(asked, checkpoint)) if item.name == "round"
    ]
    index = find_grids(checkpoint, tmp_path / "lattice", load_recipe("default"))
    assert node.idle({"grids": Outcome(index)})
    plain = demo.make(tmp_path / "plain", family="gemma3", size="tiny", rule=None)
    index = find_grids(open_checkpoint(plain), tmp_path / "grids", load_recipe("default"))
    assert not node.idle({"grids": Outcome(index)})


def test_a_head_of_eight_bits_is_rounded_to_nearest(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(demo.make(tmp_path / "plain", family="gemma3", size="tiny", rule=None))
    found = {
        recipe: EMBEDDING
        in candidates(find_grids(checkpoint, tmp_path / recipe, load_recipe(recipe)), checkpoint.model)
        for recipe in ("default", "int4")
    }
    assert found == {"default": False, "int4": True}
