"""A checkpoint that is replaced while a run reads it: the run stops, says so, and leaves nothing that is of both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import gemexport
from gemexport import Advance, cli, demo
from gemexport.formats.stamps import ChangedError

Models = tuple[Path, Path]


@pytest.fixture
def models(tmp_path: Path) -> Models:
    """A model, and one of the same name and shapes that is to take its place."""
    first = demo.make(tmp_path / "first" / "model", family="gemma3", size="tiny", seed=1)
    return first, demo.make(tmp_path / "second" / "model", family="gemma3", size="tiny", seed=2)


def exchange(models: Models) -> None:
    first, second = models
    first.rename(first.with_name("old"))
    second.rename(first)


def swapping(step: str, ended: bool, models: Models) -> Callable[[Advance], None]:
    """A listener that exchanges the models once, when a step begins or ends."""

    def listen(heard: Advance) -> None:
        if heard.step == step and heard.ended == ended and models[1].exists():
            exchange(models)

    return listen


def left(out: Path) -> list[str]:
    """What is in an output folder but for how the model is called, the lock and the steps' logs."""
    kept = ("model.json", "lock", "logs")
    files = (file.relative_to(out) for file in out.rglob("*") if file.is_file())
    return sorted(str(file) for file in files if not set(file.parts) & {*kept})


@pytest.mark.parametrize(("step", "ended"), [("grids", False), ("grids", True), ("export gguf:Q4_0", True)])
def test_a_run_whose_checkpoint_changes_stops_and_leaves_nothing(
    step: str, ended: bool, models: Models, tmp_path: Path
) -> None:
    with pytest.raises(ChangedError, match="was replaced while it was read"):
        gemexport.export(
            models[0], tmp_path / "out", formats=["gguf"], validate=False, progress=swapping(step, ended, models)
        )
    assert not (tmp_path / "out").exists()


def test_what_an_earlier_run_wrote_stays_and_the_grids_go(models: Models, tmp_path: Path) -> None:
    out = tmp_path / "out"
    gemexport.export(models[0], out, formats=["gguf"], validate=False)
    before = left(out)
    with pytest.raises(ChangedError):
        gemexport.export(
            models[0], out, formats=["mlx"], validate=False, progress=swapping("export mlx:4bit", True, models)
        )
    assert left(out) == [name for name in before if ".gemexport" not in name]
    report = gemexport.export(models[0], out, formats=["gguf"], validate=False)
    assert [artifact.reason for artifact in report.artifacts] == ["not validated (--no-validate)"]


def test_the_command_says_it_in_a_line(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gemexport.report.console._line", lambda *_: models[1].exists() and exchange(models))
    with pytest.raises(SystemExit) as ended:
        cli.main(["gguf", str(models[0]), "-o", str(tmp_path / "out"), "--no-validate"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.endswith("while it was read; leave the checkpoint as it is, and start again\n")
    assert said.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(("ended", "formats"), [(False, None), (True, ("gguf", "compressed-tensors"))])
def test_in_every_step(ended: bool, formats: tuple[str, ...] | None, models: Models, tmp_path: Path) -> None:
    """Steps run side by side, so each is a run of its own. At their end all are looked at in one place."""
    steps: list[str] = []
    given = {"tokens": 64, "formats": formats}
    gemexport.export(models[0], tmp_path / "seen", progress=lambda heard: steps.append(heard.step), **given)
    for step in dict.fromkeys(steps):
        out = tmp_path / "out"
        with pytest.raises(ChangedError):
            gemexport.export(models[0], out, progress=swapping(step, ended, models), **given)
        assert not out.exists(), step
        models[0].rename(models[1])
        models[0].with_name("old").rename(models[0])


@pytest.mark.slow
@pytest.mark.parametrize("step", ["grids", "reference", "validate gguf:model"])
def test_validate_stops_too(step: str, models: Models, tmp_path: Path) -> None:
    report = gemexport.export(models[0], tmp_path / "out", formats=["gguf"], validate=False)
    artifact = tmp_path / "out" / str(report.artifacts[0].path)
    steps: list[str] = []
    gemexport.validate(models[0], artifact, tokens=64, progress=lambda heard: steps.append(heard.step))
    found = next(name for name in steps if name.startswith(step.partition(":")[0]))
    with pytest.raises(ChangedError):
        gemexport.validate(models[0], artifact, tokens=64, progress=swapping(found, False, models))
