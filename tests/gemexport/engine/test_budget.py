"""Widths are chosen for a size, a mean width or a loss, before anything is written, and the artefacts are so large."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import gemexport
from gemexport import demo
from gemexport.cli import main
from gemexport.engine.artefact import Artefact
from gemexport.engine.budget import SWEPT, allocate_widths, sweep_widths
from gemexport.engine.dag import graph
from gemexport.engine.settling import TRIES, lost, settled
from gemexport.engine.steps import export, grids
from gemexport.formats.checkpoint import open_checkpoint
from gemexport.formats.grids.allocation import Choice, Goal
from gemexport.formats.grids.recipe import load_recipe
from gemexport.formats.grids.search import SCALES, read_index
from gemexport.formats.storage.errors import InputError
from gemexport.registry import TARGETS
from gemexport.report.curves import draw_curves
from gemexport.request import request, steps
from gemexport.shared.measured import Allocated
from gemexport.shared.place import ALLOCATED, Place
from gemexport.sweep import as_json

pytest.importorskip("torch")
RECIPE = load_recipe("rtn")  # whose rounding needs no inputs: what is tried here is the choice
MLX, GGUF = Artefact("mlx", "4bit"), Artefact("gguf", "Q4_0")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A plain model, measured once for all tests."""
    folder = tmp_path_factory.mktemp("plain")
    model = demo.make(folder / "model", family="gemma3", size="tiny", rule=None)
    found = Place(model, folder / "work", 64, allocated=True)
    grids(replace(found, allocated=False), RECIPE, lambda _: None)
    return found


def chosen(place: Place, kind: str, most: float, *artefacts: Artefact) -> Allocated:
    goal = Goal.model_validate({"kind": kind, "most": most})
    return allocate_widths(place, RECIPE, goal, artefacts, None, lambda _: None)


@pytest.mark.parametrize("artefacts", [(MLX,), (GGUF,), (MLX, GGUF)], ids=["mlx", "gguf", "both"])
@pytest.mark.parametrize("share", [0.7, 0.8, 0.95])
def test_a_size_is_met_and_never_passed(
    share: float, artefacts: tuple[Artefact, ...], place: Place, tmp_path: Path
) -> None:
    most = int(share * max(item.size(place.plain()) for item in artefacts))
    found = chosen(place, "size", most, *artefacts)
    assert all(size <= most for size in found.sizes.values())
    assert max(found.sizes.values()) >= 0.97 * most  # a tiny model's matrices are coarse steps
    held = set.intersection(*(set(item.widths) for item in artefacts))
    records = read_index(place.grids)
    assert records is not None
    assert {record.bits for record in records.tensors} <= held | {None}
    for item in artefacts:
        path = tmp_path / item.target
        export(place, item.target, item.variant, path, {}, lambda _: None)
        written = [file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path])]
        assert sum(written) == found.sizes[str(item)]


def test_more_room_loses_less_and_the_choice_is_always_the_same(place: Place) -> None:
    whole = MLX.size(place.plain())
    losses = []
    for share in (0.45, 0.6, 0.8):
        losses.append(chosen(place, "size", share * whole, MLX).loss)
    assert losses == sorted(losses, reverse=True)
    before = read_index(place.grids), (place.grids / SCALES).read_bytes()
    chosen(place, "bits", 4.5, MLX)
    assert read_index(place.grids) != before[0]
    chosen(place, "size", 0.8 * whole, MLX)
    assert (read_index(place.grids), (place.grids / SCALES).read_bytes()) == before


def test_bits_count_codes(place: Place) -> None:
    found = chosen(place, "bits", 4.5, MLX)
    bits = {name: 16 if name == "as it is" else int(name.split()[0]) for name in found.weights}
    mean = sum(bits[name] * count for name, count in found.weights.items()) / sum(found.weights.values())
    assert 4.3 < mean <= 4.5


def test_a_loss_takes_the_smallest_that_is_within_it(place: Place) -> None:
    """What was predicted is measured, on what verdicts are about, and the widths are others where that was off."""
    found = [chosen(place, "max_kld", nats, MLX) for nats in (0.05, 0.5)]
    for item, nats in zip(found, (0.05, 0.5), strict=True):
        assert item.measured is not None
        assert 0.8 * nats < item.measured <= nats  # a tiny model's matrices are coarse steps
    assert found[1].measured == lost(place, "again")
    assert found[0].sizes["mlx:4bit"] > found[1].sizes["mlx:4bit"]
    size = chosen(place, "size", found[1].sizes["mlx:4bit"], MLX)
    assert size.measured is None
    assert size.loss == pytest.approx(found[1].loss, rel=0.1)


@pytest.mark.parametrize("factor", [0.1, 0.5, 1.0, 1.03, 3.0, 40.0])
def test_a_curve_is_moved_by_what_was_measured(factor: float) -> None:
    """Whatever the prediction is off by, a choice near the loss is found, and was measured last."""
    made: list[Choice] = []

    def within(nats: float) -> Choice:
        return Choice((round(nats * 1e4),), round(nats * 1e4) / 1e4)

    def measured(choice: Choice) -> float:
        made.append(choice)
        return factor * float(choice.loss**1.2)

    done: list[int] = []
    choice, loss = settled(within, measured, 0.02, done.append)
    assert choice == made[-1]
    assert 0.018 <= loss == measured(choice) <= 0.02
    assert sum(done) == TRIES


def test_none_near_enough_takes_what_is_below() -> None:
    """Where one step of a table is all there is between too much and far too little."""
    few, many = Choice((4,), 0.02), Choice((8,), 0.001)
    tried: list[Choice] = []

    def measured(choice: Choice) -> float:
        tried.append(choice)
        return 2 * float(choice.loss)

    def within(nats: float) -> Choice:
        return few if nats >= few.loss else many

    assert settled(within, measured, 0.03, lambda _: None) == (many, 0.002)
    assert tried == [few, many]
    assert settled(lambda _: few, measured, 0.03, lambda _: None) == (few, 0.04), "the least there is"


def test_what_cannot_be_met_is_told_before_anything_is_measured(place: Place, tmp_path: Path) -> None:
    bare = replace(place, work=tmp_path)
    grids(replace(bare, allocated=False), RECIPE, lambda _: None)
    with pytest.raises(InputError, match="--size 1000: is too small: mlx:4bit takes "):
        chosen(bare, "size", 1000, MLX)
    with pytest.raises(InputError, match="--bits 3: cannot be had: codes have 4, 5, 8 bits in gguf:Q4_0"):
        chosen(bare, "bits", 3, GGUF)
    assert not (tmp_path / ALLOCATED).exists()


def test_a_lattice_is_not_ours_to_choose(tiny_gemma3: Path, tmp_path: Path) -> None:
    place = Place(tiny_gemma3, tmp_path, 64, allocated=True)
    before = grids(replace(place, allocated=False), RECIPE, lambda _: None)
    with pytest.raises(InputError, match=r"no matrix whose width is to choose.*leave out --size"):
        chosen(place, "size", 10**6, MLX)
    found = chosen(place, "max_kld", 0.5, MLX)
    assert found.loss is None
    assert found.index.tensors == before.tensors


@pytest.mark.parametrize("target", TARGETS)
def test_widths_are_held_as_narrow_as_they_are(target: str, place: Place) -> None:
    """What the registry says of a variant's widths, its exporter's sizes say too: a bit more takes more."""
    from gemexport.engine.budget import on_schemes
    from gemexport.formats.gemma.roles import Kind
    from gemexport.formats.grids.recipe import Scheme

    pytest.importorskip(TARGETS[target].packages[0])
    found, plain = replace(place, allocated=False).open(), place.plain()
    linears = [name for name, spec in plain.model.specs.items() if spec.role.kind is Kind.LINEAR]
    for variant, widths in TARGETS[target].code_widths:
        item = Artefact(target, variant)
        sizes = [item.size(on_schemes(plain, found, dict.fromkeys(linears, Scheme(bits=bits)))) for bits in widths]
        sizes.append(item.size(on_schemes(plain, found, dict.fromkeys(linears, None))))
        assert sizes == sorted(set(sizes)), variant


def test_a_sweep_is_the_curve_that_sizes_are_on(place: Place, tiny_gemma3: Path, tmp_path: Path) -> None:
    found = sweep_widths(replace(place, allocated=False), RECIPE, [MLX, GGUF], None, lambda _: None)
    for item in (MLX, GGUF):
        own = [point for point in found if point.artefact == str(item)]
        assert SWEPT // 2 < len(own) <= SWEPT  # a tiny model's matrices are coarse steps
        assert [point.bytes for point in own] == sorted({point.bytes for point in own})
        assert [point.loss for point in own] == sorted({point.loss for point in own}, reverse=True)
        # The last may have some matrices as they are, for others in fewer bits.
        assert own[0].bits == min(item.widths)
        assert max(item.widths) - 0.5 < own[-1].bits <= max(item.widths)
        again = chosen(place, "size", own[5].bytes, item)
        assert (again.loss, again.sizes[str(item)]) == (own[5].loss, own[5].bytes)
    assert draw_curves(found) == draw_curves(found)
    assert as_json(found).count('"artefact"') == len(found)
    lattice = Place(tiny_gemma3, tmp_path, 64)
    grids(lattice, RECIPE, lambda _: None)
    with pytest.raises(InputError, match="no matrix whose width is to choose"):
        sweep_widths(lattice, RECIPE, [MLX], None, lambda _: None)


@pytest.mark.slow
def test_the_command(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as ended:
        main(["sweep", str(place.model), "-o", str(out), "--only", "mlx", "--recipe", "rtn"])
    assert ended.value.code == 0
    points = json.loads((out / "sweep.json").read_text())
    assert capsys.readouterr().out.count("mlx:4bit") == len(points) > SWEPT // 2
    assert (out / "sweep.svg").read_text().startswith("<?xml")
    # A run in the folder is one of its points.
    gemexport.export(place.model, out, formats=["mlx"], recipe="rtn", size=points[4]["bytes"], validate=False)
    assert json.loads((out / "report.json").read_text())["artifacts"][0]["bytes"] == points[4]["bytes"]


def names_of(place: Place, **asked: object) -> list[str]:
    made = request(model=place.model, out=place.work / "out", **asked)  # type: ignore[arg-type]
    checkpoint = open_checkpoint(place.model)
    return [node.name for node in graph(made, checkpoint, place.work, steps(made, checkpoint))]


def test_the_node_stands_where_something_is_asked(place: Place) -> None:
    assert "allocate" not in names_of(place, formats=["mlx"])
    for asked in ({"size": "300kB"}, {"bits": 4.5}, {"max_kld": 0.1}):
        assert names_of(place, formats=["mlx"], **asked)[:3] == ["grids", "allocate", "round"]
    # A loss is but judged where there is nothing to choose, a size is refused.
    assert "allocate" not in names_of(place, variants={"mlx": ["bf16"]}, formats=["mlx"], max_kld=0.1)
    with pytest.raises(InputError, match="--size: chooses widths, and those of mlx:bf16 are given already"):
        names_of(place, variants={"mlx": ["bf16"]}, formats=["mlx"], size="300kB")


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        ({"size": "large"}, "--size large: is not a size; write it like 2.6GB"),
        ({"bits": 0}, "--bits 0.0: is no mean width of codes"),
        ({"size": "1GB", "bits": 4.5}, "ask for two things"),
    ],
)
def test_what_is_asked_wrongly(asked: dict[str, object], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        request(model="model", **asked)  # type: ignore[arg-type]
