"""What settings were composed to is kept, by all that it was made of, and by nothing else."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gemexport.formats import assets
from gemexport.formats.assets import kept
from gemexport.formats.checkpoint import asked_of_tokens, open_checkpoint, weight_files
from gemexport.formats.storage.errors import InputError


@pytest.fixture
def model(tiny_gemma3: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_gemma3, tmp_path / "model"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own for what is kept."""
    monkeypatch.setenv(kept.WHERE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "settings"


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The tokenizers that were read and judged, one after the other."""
    found: list[Path] = []
    check = assets.tables.check

    def noted(path: Path, source: dict[str, object]) -> None:
        found.append(path)
        check(path, source)

    monkeypatch.setattr(assets.tables, "check", noted)
    return found


def composed(model: Path) -> assets.Composed:
    return kept.composed(model, asked_of_tokens(open_checkpoint(model).model), weight_files(model))


def test_the_same_files_are_judged_once(model: Path, cache: Path, judged: list[Path]) -> None:
    first = composed(model)
    os.utime(model / "tokenizer.json")
    assert composed(model) == first
    assert len(judged) == len(list(cache.iterdir())) == 1


def _edit(name: str, key: str, value: object) -> Callable[[Path], object]:
    def edit(model: Path) -> None:
        path = model / name
        content = json.loads(path.read_text("utf-8")) if path.exists() else {}
        path.write_text(json.dumps({**content, key: value}), "utf-8")

    return edit


CHANGES: dict[str, Callable[[Path], object]] = {
    "tokenizer": _edit("tokenizer.json", "comment", 1),
    "settings": _edit("tokenizer_config.json", "comment", 1),
    "stop tokens": _edit("generation_config.json", "eos_token_id", [1, 5]),
    "end token of the config": _edit("config.json", "eos_token_id", [1, 5]),
    "an old template": _edit("chat_template.json", "chat_template", "{{ messages }}"),
    "a template": lambda model: (model / "chat_template.jinja").write_text("{{ messages[0] }}"),
    "a template without a special purpose": lambda model: (
        (model / "additional_chat_templates").mkdir(),
        (model / "additional_chat_templates" / "default.jinja").write_text("{{ messages[0] }}"),
    ),
    "a file that nothing reads": lambda model: (model / "trainer_state.json").write_text("{}"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_whatever_is_changed_is_judged_again(
    change: Callable[[Path], object], model: Path, cache: Path, judged: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    composed(model)
    change(model)
    found = composed(model)
    assert len(judged) == 2
    monkeypatch.setenv(kept.WHERE, "")
    assert composed(model) == found


def test_what_is_refused_is_refused_again(model: Path, cache: Path) -> None:
    path = model / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    content["model"]["merges"].append(["a", "no token"])
    path.write_text(json.dumps(content), "utf-8")
    for _ in range(2):
        with pytest.raises(InputError, match="not two tokens that make a third"):
            composed(model)
    assert not cache.exists()


@pytest.mark.parametrize("damage", [b"", b"{", b'{"files": [], "notes": 1}', b" " * (kept.BYTES + 1)])
def test_what_was_damaged_is_made_again(damage: bytes, model: Path, cache: Path) -> None:
    first = composed(model)
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage)
    assert composed(model) == first
    assert path.read_bytes() == whole


def test_a_tokenizer_is_never_kept(model: Path, cache: Path) -> None:
    _edit("tokenizer.json", "truncation", {"max_length": 8, "strategy": "LongestFirst", "stride": 0})(model)
    assert assets.TOKENIZER in composed(model).files
    assert not cache.exists()


def test_without_a_place_nothing_is_kept(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that cannot be made is no error; neither is the wish for none."""
    (tmp_path / "file").write_bytes(b"")
    for place in (str(tmp_path / "file"), ""):
        monkeypatch.setenv(kept.WHERE, place)
        assert composed(model).notes == composed(model).notes
    assert (tmp_path / "file").read_bytes() == b""
