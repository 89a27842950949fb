"""The parts of a verdict, each tried by itself: what one that cannot be judged leaves of the others."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest

from gemexport.engine import steps
from gemexport.formats.grids.recipe import load_recipe
from gemexport.formats.storage.errors import InputError, PlaceError
from gemexport.judge import validation
from gemexport.judge.attempts import Attempts
from gemexport.judge.verdict import bounds
from gemexport.outcomes import crashed, with_unfinished
from gemexport.registry import TARGETS, Target
from gemexport.report.schema import verdict
from gemexport.shared.measured import Validation
from gemexport.shared.node import Outcome
from gemexport.shared.place import Place
from gemexport.shared.unfinished import Unfinished
from gemexport.validators.checks.chat import Template
from gemexport.validators.runtimes.pytorch import whole

pytest.importorskip("torch")
pytest.importorskip("mlx_lm")


@pytest.fixture
def place(tiny_gemma3: Path, tmp_path: Path) -> Place:
    place = Place(tiny_gemma3, tmp_path / "work", 24)
    place.work.mkdir()
    steps.grids(place, load_recipe("default"), lambda _: None)
    return place


@pytest.fixture
def artifact(place: Place, tmp_path: Path) -> Path:
    return steps.export(place, "mlx", "4bit", tmp_path / "4bit", {}, lambda _: None).path


def program(place: Place, fault: BaseException | None = None) -> ModuleType:
    """The artefact's reference as its program, or one that fails to load."""
    checkpoint = place.open()

    def load(path: Path, *, threads: int, **_: Any) -> Any:
        if fault is not None:
            raise fault
        stored = TARGETS["mlx"].reader().tensors(path)
        return whole(checkpoint.text_config, {name: stored[name] for name in checkpoint.tensors}, threads)

    return cast("ModuleType", SimpleNamespace(load=load, __name__="runtimes.other", takes=lambda _: True))


def use(monkeypatch: pytest.MonkeyPatch, first: ModuleType, *seconds: ModuleType) -> None:
    monkeypatch.setattr(Target, "adapter", lambda _: first)
    monkeypatch.setattr(Target, "seconds", lambda *_: list(seconds))


def judge(place: Place, artifact: Path) -> tuple[Validation, tuple[str, str | None]]:
    found = validation.validate(place, "mlx", artifact, True, lambda _: None)
    return found, verdict(bounds(found, {}, load_recipe("default")), found.unjudged)


def test_a_second_program_that_fails_leaves_all_else(
    place: Place, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusal, crash = InputError("model.xml", "has no such operator", "export it again"), RuntimeError("out of tune\nhm")
    use(monkeypatch, program(place), program(place, refusal))
    found, (status, reason) = judge(place, artifact)
    assert found.logits is not None
    assert found.tokenizer is not None
    assert found.chat is not None
    assert found.more_logits == ()
    assert (status, str(reason).partition(" is ")[0]) == ("fail", "logits in other.refused")
    assert str(reason).endswith(": has no such operator; export it again")

    use(monkeypatch, program(place), program(place, crash), program(place))
    found, (status, reason) = judge(place, artifact)
    assert found.logits is not None
    assert len(found.more_logits) == 1
    assert (status, reason) == ("error", "logits in other not judged: RuntimeError: out of tune")


def test_its_own_program_that_fails_leaves_weights_tokenizer_and_chat(
    place: Place, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, program(place, RuntimeError("no")))
    found, (status, reason) = judge(place, artifact)
    assert found.weights.exact_fraction == 1
    assert found.logits is None
    assert found.tokenizer is not None
    assert found.tokenizer.equal == found.tokenizer.texts
    assert found.chat is not None
    assert (status, reason) == ("error", "logits not judged: RuntimeError: no")


def test_a_program_that_takes_the_process_along_leaves_what_was_found(
    place: Place, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = Outcome(failure="the process ended by a signal (Segmentation fault)")
    unfinished = Unfinished.of(place.work, artifact)
    for seconds, parts in (
        ((program(place, KeyboardInterrupt()),), ["logits in other"]),
        ((), ["tokenizer", "chat", "logits"]),
    ):
        use(monkeypatch, program(place) if seconds else program(place, KeyboardInterrupt()), *seconds)
        with pytest.raises(KeyboardInterrupt):
            judge(place, artifact)
        outcome = with_unfinished(ended, unfinished)
        assert isinstance(outcome.value, Validation)
        assert crashed(outcome)
        assert outcome.value.weights.exact_fraction == 1
        assert (outcome.value.logits is not None) == bool(seconds)
        assert [(item.part, item.because, item.reason) for item in outcome.value.unjudged] == [
            (part, "crashed", ended.failure) for part in parts
        ]
    assert with_unfinished(replace(ended, left_out=True), unfinished).value is None
    unfinished.forget()
    assert with_unfinished(ended, unfinished) == ended


def test_a_crash_in_the_tokenizer_or_the_template_leaves_the_logits(
    place: Place, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, program(place))

    def crash(*_: object) -> None:
        raise KeyError("content")

    monkeypatch.setattr(Template, "render", crash)
    found, (status, reason) = judge(place, artifact)
    assert found.logits is not None
    assert found.tokenizer is not None
    assert found.chat is None
    assert (status, reason) == ("error", "chat not judged: KeyError: 'content'")


def test_what_is_not_there_or_has_no_room_makes_it_partial(place: Place, artifact: Path) -> None:
    for file in artifact.glob("*token*"):
        file.unlink()
    shutil.rmtree(place.work / "reference", ignore_errors=True)
    found = validation.validate(place, "mlx", artifact, False, lambda _: None)
    status, reason = verdict((), found.unjudged)
    assert status == "partial"
    assert str(reason).split("; ") == [
        "logits not judged: the model does not fit into --memory",
        "tokenizer not judged: it has no tokenizer, and none lies beside it",
        "chat not judged: it has no tokenizer, and none lies beside it",
    ]


def test_attempts_keep_what_they_were_of() -> None:
    attempts = Attempts()
    assert attempts.make("weights", lambda: 3) == 3
    assert attempts.make("metadata", lambda: 1 / 0) is None
    attempts.leave_out("chat", "nothing there")

    def refused(error: InputError) -> None:
        raise error

    for kind in (InputError, PlaceError):  # what an artefact is to blame for, and what it is not
        attempts.make("tokenizer", partial(refused, kind("x", "is full", "free some")))
    assert [str(item) for item in attempts.unjudged] == [
        "metadata not judged: ZeroDivisionError: division by zero",
        "chat not judged: nothing there",
        "tokenizer not judged: is full; free some",
        "tokenizer not judged: is full; free some",
    ]
    assert [item.because for item in attempts.unjudged] == ["crashed", "left out", "refused", "crashed"]
