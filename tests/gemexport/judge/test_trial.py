"""An artefact in its runtime: how many models are held at a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gemexport.engine import steps
from gemexport.formats.grids.recipe import load_recipe
from gemexport.judge.speed import Stopwatch
from gemexport.judge.trial import Trial
from gemexport.judge.validation import check_weights
from gemexport.registry import TARGETS
from gemexport.shared import place as places
from gemexport.shared.place import Place

pytest.importorskip("torch")
pytest.importorskip("gguf")


class Counted:
    """A model that counts itself while it is loaded."""

    loaded = 0
    most = 0
    made = 0

    def __init__(self, model: Any) -> None:
        self._model = model
        Counted.made += 1
        Counted.loaded += 1
        Counted.most = max(Counted.most, Counted.loaded)

    def close(self) -> None:
        Counted.loaded -= 1
        self._model.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def test_one_model_is_loaded_at_a_time(tiny_gemma3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With two arithmetics, neither reference known before, and a walk through the layers."""
    place = Place(tiny_gemma3, tmp_path, 24)
    steps.grids(place, load_recipe("default"), lambda _: None)
    path = steps.export(place, "gguf", "Q4_0", tmp_path / "model.gguf", {}, lambda _: None).path
    _, digest = check_weights(place, "gguf", path, lambda _: None)
    make = places.reference_model
    checkpoint = place.open()
    monkeypatch.setattr(places, "reference_model", lambda *given, **named: Counted(make(*given, **named)))

    def load(path: Path, *, arithmetic: str, **_: Any) -> Counted:
        # In bf16 the runtime departs from the reference, so that it is walked through.
        runtime = make(checkpoint, dict(checkpoint.tensors), arithmetic)
        monkeypatch.setattr(runtime, "arithmetic", "f32", raising=False)
        return Counted(runtime)

    target = replace(TARGETS["gguf"], arithmetics=("bf16", "f32"))
    monkeypatch.setattr(type(target), "adapter", lambda _: SimpleNamespace(load=load))
    trial = Trial(place, checkpoint, target, path, digest, Stopwatch())
    for arithmetic in target.arithmetics:
        trial.logits(arithmetic, lambda _: None)
    trial.close()
    assert trial.departs is not None
    assert Counted.made >= 5
    assert Counted.most == 1
    assert Counted.loaded == 0
