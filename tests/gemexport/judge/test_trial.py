"""An artefact in its runtime: how many models are held at a time."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest

from gemexport.engine import steps
from gemexport.formats.grids.recipe import load_recipe
from gemexport.judge.attempts import Attempts
from gemexport.judge.speed import Stopwatch
from gemexport.judge.trial import Trial
from gemexport.judge.validation import check_weights
from gemexport.registry import TARGETS
from gemexport.shared.place import Place
from gemexport.validators.reference import Reference
from gemexport.validators.reference.decoder import Decoder
from gemexport.validators.runtimes.pytorch import PyTorch

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


def test_a_trial_holds_one_runtime_at_a_time_and_walks_once(
    tiny_gemma3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two arithmetics, neither reference known before, and a walk to where the runtimes depart."""
    place = Place(tiny_gemma3, tmp_path, 24)
    steps.grids(place, load_recipe("default"), lambda _: None)
    path = steps.export(place, "gguf", "Q4_0", tmp_path / "model.gguf", {}, lambda _: None).path
    _, digest = check_weights(place, "gguf", path, lambda _: None)
    checkpoint = place.open()

    def load(path: Path, *, arithmetic: Any, **_: Any) -> Counted:
        # In bf16 the runtime departs from the reference, so that it is walked through.
        decoder = Decoder(checkpoint.text_config, checkpoint.tensors, arithmetic)
        runtime = PyTorch(decoder.whole(), "bf16" if arithmetic == "bf16" else "f32", 1)
        found = Counted(runtime)
        found.arithmetic = "f32"
        return found

    walked: list[int] = []
    walk = Reference.walk

    def counted(self: Reference, sequences: list[list[int]], *where: Path) -> Any:
        walked.append(len(sequences))
        return walk(self, sequences, *where)

    monkeypatch.setattr(Reference, "walk", counted)
    trial = Trial(place, checkpoint, TARGETS["gguf"], path, digest, Stopwatch(), Attempts())
    adapter = cast("ModuleType", SimpleNamespace(load=load))
    trial.judge([trial.run(adapter, arithmetic, lambda _: None) for arithmetic in ("bf16", "int8-activations")])
    trial.close()
    assert trial.departs is not None
    assert Counted.made == 3  # both arithmetics, and the walk through the first one's layers
    assert (Counted.loaded, Counted.most) == (0, 1)
    # The source's sequence; that of the weights read back with what is judged of both continuations; the departure's.
    assert walked == [1, 3, 1]
