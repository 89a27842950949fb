"""Activations are measured once, in a step of its own, for every variant that computes in integers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gemexport.engine.calibration import calibrate, ranges_file, samples
from gemexport.engine.dag import graph
from gemexport.engine.steps import grids
from gemexport.formats.activations.ranges import read_ranges
from gemexport.formats.grids.recipe import load_recipe
from gemexport.formats.storage.errors import InputError
from gemexport.request import request, steps
from gemexport.shared.place import Place
from gemexport.shared.texts import tokens_of

pytest.importorskip("onnxruntime")

SIZES = {"context": 64, "prefill": 16}


def plan(model: Path, **options: Any) -> dict[str, Any]:
    """The steps of a run that writes ONNX for NPUs, by name."""
    variants = {"onnx": ("npu-a8", "npu-a16", "int4")}
    asked = request(
        model=model, out="out", formats=["onnx"], variants=variants, validate=False, options={"onnx": options}
    )
    checkpoint = asked.checkpoint()
    return {node.name: node for node in graph(asked, checkpoint, Path("work"), steps(asked, checkpoint))}


def test_one_step_serves_all_variants(tiny_gemma4: Path) -> None:
    nodes = plan(tiny_gemma4, context=64)
    assert [name for name in nodes if name.startswith("calibrate")] == ["calibrate"]
    assert nodes["calibrate"].needs == ("round",)
    assert nodes["calibrate"].call.arguments["sizes"] == {"context": 64}
    for variant in ("npu-a8", "npu-a16"):
        node = nodes[f"export onnx:{variant}"]
        assert node.needs == ("round", "calibrate")
        assert node.call.arguments["options"]["ranges"] == ranges_file(node.call.arguments["place"])
    assert nodes["export onnx:int4"].needs == ("round",)


@pytest.mark.parametrize("options", [{"ranges": Path("activations.json")}, {"calibration": [[2, 5, 7]]}])
def test_nothing_is_measured_where_ranges_or_tokens_are_given(options: dict[str, Any], tiny_gemma4: Path) -> None:
    nodes = plan(tiny_gemma4, **options)
    assert "calibrate" not in nodes
    assert nodes["export onnx:npu-a8"].needs == ("round",)
    assert nodes["export onnx:npu-a8"].call.arguments["options"] == options


def test_measured_once(tiny_gemma4: Path, tmp_path: Path) -> None:
    place, recipe = Place(tiny_gemma4, tmp_path, 48), load_recipe("default")
    grids(place, recipe, lambda _: None)
    done: list[int] = []
    assert calibrate(place, recipe, None, SIZES, done.append) == 48
    file = ranges_file(place)
    first, when = file.read_bytes(), file.stat().st_mtime_ns
    assert read_ranges(file).tokens == 48
    assert sum(done) > 0
    assert [item.name for item in sorted(file.parent.iterdir())] == ["plain.json", "plain.mark"]
    calibrate(place, recipe, None, SIZES, done.append)
    assert file.stat().st_mtime_ns == when, "measured again"
    text = tmp_path / "text.txt"
    text.write_text("Another text, of other letters: zyx wvu tsr.\n" * 3, "utf-8")
    calibrate(place, recipe, text, SIZES, done.append)
    assert file.read_bytes() != first


def test_ranges_are_of_texts_that_no_loss_is_measured_on(tiny_gemma4: Path, tmp_path: Path) -> None:
    place = Place(tiny_gemma4, tmp_path, 512)
    checkpoint = place.checkpoint()
    (first, *_), judged = samples(place, checkpoint, None), place.sequences(checkpoint)
    pieces = {tuple(ids[i : i + 24]) for ids in judged for i in range(len(ids) - 23)}
    assert not any(tuple(first[i : i + 24]) in pieces for i in range(len(first) - 23))
    assert sum(map(len, samples(place, checkpoint, None))) == 512
    assert tuple(first[1:25]) in {tuple(ids[:24]) for ids in tokens_of(checkpoint, None)}


def test_texts_that_cannot_be_read(tiny_gemma4: Path, tmp_path: Path) -> None:
    place, recipe = Place(tiny_gemma4, tmp_path, 32), load_recipe("default")
    grids(place, recipe, lambda _: None)
    for content, message in ((b"\xff\xfe\x00", "is no text in UTF-8"), (b"", "has no text")):
        (tmp_path / "text.txt").write_bytes(content)
        with pytest.raises(InputError, match=message):
            calibrate(place, recipe, tmp_path / "text.txt", SIZES, lambda _: None)
    with pytest.raises(InputError, match="cannot be read as text"):
        calibrate(place, recipe, tmp_path / "nothing.txt", SIZES, lambda _: None)
