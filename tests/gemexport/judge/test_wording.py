"""Tokenizer and chat template of an artefact: whose fault a difference is, and what the verdict makes of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from gemexport.exporters import gguf
from gemexport.formats.checkpoint import open_checkpoint
from gemexport.formats.grids.recipe import RECIPES
from gemexport.judge.verdict import bounds
from gemexport.judge.wording import Artifact, Wording
from gemexport.report.notes import wording_notes
from gemexport.shared import texts
from gemexport.shared.measured import ChatReport, TokenizerReport, Validation, WeightsReport
from gemexport.validators.checks import tokenizer
from gemexport.validators.checks.habits import Habits
from gemexport.validators.checks.prompts import prompts
from gemexport.validators.runtimes.protocol import Layout, Runtime

CAFE = "Café déjà vu — 123 😊"


class Reader:
    """A runtime that only reads: as the tokenizer says, but for some texts."""

    name = "a runtime"

    def __init__(self, encode: Callable[[str], list[int]], wrong: Sequence[str] = ()) -> None:
        self._encode, self._wrong = encode, wrong

    def tokenize(self, text: str) -> list[int]:
        return [0] if text in self._wrong else self._encode(text)

    def habits(self) -> Habits | None:
        return None

    def chat(self, layouts: Sequence[Layout]) -> list[str] | None:
        return None


def reader(folder: Path, *wrong: str) -> Runtime:
    return cast(Runtime, Reader(tokenizer.load(folder / "tokenizer.json"), wrong))


def judged(found: TokenizerReport, talked: ChatReport | None) -> list[str]:
    weights = WeightsReport(compared=1, exact=1, exact_fraction=1.0, max_relative_error=0.0)
    held = bounds(Validation(weights, found, talked), {}, RECIPES["default"])
    return [str(bound) for bound in held if not bound.held]


def compared(model: Path, path: Path, scratch: Path, runtime: Runtime | None) -> tuple[TokenizerReport, ChatReport]:
    artifact = Artifact.of(path, scratch)
    assert artifact is not None
    words = Wording(open_checkpoint(model), scratch)
    talked = words.chat(artifact, runtime)
    assert talked is not None
    return words.tokenizer(artifact, runtime), talked


@pytest.fixture(scope="module")
def file(tiny_gemma4: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf.export(open_checkpoint(tiny_gemma4), tmp_path_factory.mktemp("gguf") / "m.gguf", variant="BF16").path


def test_a_copy_is_equal_in_everything(tiny_gemma4: Path, tmp_path: Path) -> None:
    found, talked = compared(tiny_gemma4, tiny_gemma4, tmp_path, reader(tiny_gemma4))
    assert found.texts == found.equal > 4000
    assert talked.conversations == talked.equal > 10
    assert judged(found, talked) == []
    assert wording_notes(found, talked) == ()


def test_a_gguf_file_without_a_runtime_is_read_back(tiny_gemma4: Path, file: Path, tmp_path: Path) -> None:
    found, talked = compared(tiny_gemma4, file, tmp_path, None)
    assert (found.texts, found.vocabulary) == (found.equal, ())
    assert talked.equal == talked.conversations
    assert talked.engine.startswith("transformers")


@pytest.mark.parametrize(
    ("source", "refusal", "fails"),
    [
        ("{% if false %}x{% endif %}", "it lays out nothing", True),
        ("{{ raise_exception('never') }}", "never", True),
        ("{{ messages[0].content[0].text }}{{ messages[0].content + [] and '' }}", None, False),
    ],
)
def test_a_template_that_takes_no_plain_text_is_judged_as_such(
    source: str, refusal: str | None, fails: bool, tiny_gemma4: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_gemma4, tmp_path / "model")
    (model / "chat_template.jinja").write_text(source)
    artifact = Artifact.of(model, tmp_path)
    assert artifact is not None
    talked = Wording(open_checkpoint(model), tmp_path).chat(artifact, None)
    assert talked is not None
    assert refusal in (None, talked.refusal)
    broken = judged(TokenizerReport(texts=1, equal=1), talked)
    notes = wording_notes(None, talked)
    if fails:
        assert broken == [
            "chat.conversations is 0, not >= 1 (a chat template lays out some conversation, if only of contents in "
            f"parts): {refusal}"
        ]
        assert notes == ()
    else:
        assert broken == []
        assert talked.conversations == talked.equal > 5
        assert str(talked.refusal).startswith("can only concatenate str")
        assert notes[0].startswith("the chat template takes no plain text (can only concatenate str")


@pytest.mark.parametrize("format_", ["gguf", "folder"])
def test_a_runtimes_own_fault_is_named_and_no_failure(
    tiny_gemma4: Path, file: Path, tmp_path: Path, format_: str
) -> None:
    path = file if format_ == "gguf" else tiny_gemma4
    found, talked = compared(tiny_gemma4, path, tmp_path, reader(tiny_gemma4, CAFE))
    assert (found.texts - found.equal, found.runtime_only, found.ordinary) == (1, 1, 0)
    assert judged(found, talked) == []
    assert CAFE in wording_notes(found, talked)[0]


def test_an_ordinary_text_fails_whoever_is_at_fault(tiny_gemma4: Path, tmp_path: Path) -> None:
    found, talked = compared(tiny_gemma4, tiny_gemma4, tmp_path, reader(tiny_gemma4, prompts()[3]))
    assert [line.split()[0] for line in judged(found, talked)] == ["tokenizer.ordinary"]


def test_a_runtime_that_errs_often_fails(tiny_gemma4: Path) -> None:
    often = TokenizerReport(texts=1000, equal=970, runtime_only=30)
    assert [line.split()[0] for line in judged(often, None)] == ["tokenizer.runtime_only"]


def test_the_artefacts_fault_is_a_failure_that_names_the_text(tiny_gemma4: Path, tmp_path: Path) -> None:
    """Without the merges of a text, and with a changed role marker."""
    folder = tmp_path / "copy"
    shutil.copytree(tiny_gemma4, folder)
    content: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    content["model"]["merges"] = content["model"]["merges"][:-40]
    (folder / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    settings = (folder / "tokenizer_config.json").read_text("utf-8")
    (folder / "tokenizer_config.json").write_text(settings.replace("'model' if", "'assistant' if"), "utf-8")
    found, talked = compared(tiny_gemma4, folder, tmp_path, reader(folder))
    assert found.runtime_only == 0 < found.texts - found.equal
    broken = judged(found, talked)
    assert f"the text {found.differences[0].text!r}" in broken[1]
    assert "40 merges are missing" in broken[0]
    assert "the conversation 'finished'" in broken[2]
    assert 0 < talked.equal < talked.conversations
    assert not any(difference.runtime for difference in talked.differences)


def driven(model: Path, folder: Path, ends: object) -> Path:
    """The model's folder as onnxruntime-genai has it."""
    shutil.copytree(model, folder)
    (folder / "genai_config.json").write_text(json.dumps({"model": {"eos_token_id": ends}}))
    return folder


def test_where_an_answer_ends_is_told_by_the_file_that_the_program_reads(tiny_gemma4: Path, tmp_path: Path) -> None:
    """onnxruntime-genai does not read generation_config.json, a copy here; nor may an answer end at a plain word."""
    eos, turn = open_checkpoint(tiny_gemma4).architecture.eos_token_ids
    for number, (ends, said) in enumerate(
        (([eos, turn], ()), (eos, ("does not end at",)), ([eos, turn, 300], ("ends at 300",)), (None, ()))
    ):
        found, _ = compared(tiny_gemma4, driven(tiny_gemma4, tmp_path / str(number), ends), tmp_path, None)
        assert len(found.vocabulary) == len(said)
        assert all(text in sentence for text, sentence in zip(said, found.vocabulary, strict=True))


def test_config_json_says_where_an_answer_ends_where_nothing_else_does(tiny_gemma4: Path, tmp_path: Path) -> None:
    model, other = tmp_path / "model", tmp_path / "other"
    shutil.copytree(tiny_gemma4, model)
    (model / "generation_config.json").unlink()
    shutil.copytree(model, other)
    assert compared(model, other, tmp_path, None)[0].vocabulary == ()
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"eos_token_id": 1}))
    (sentence,) = compared(model, other, tmp_path, None)[0].vocabulary
    assert "does not end at" in sentence


def test_onnxruntime_genai_wants_a_tokenizer(tiny_gemma4: Path, tmp_path: Path) -> None:
    folder = driven(tiny_gemma4, tmp_path / "onnx", [1])
    (folder / "tokenizer.json").unlink()
    found, talked = compared(tiny_gemma4, folder, tmp_path, None)
    assert found.equal == 0
    assert judged(found, talked)


def test_what_has_no_tokenizer_is_not_compared(tmp_path: Path) -> None:
    package = tmp_path / "m.mlpackage"
    package.mkdir()
    assert Artifact.of(package, tmp_path) is None
    (tmp_path / "tokenizer.json").write_text("{}")
    found = Artifact.of(package, tmp_path)
    assert found is not None
    assert found.path == tmp_path


def test_the_checkpoints_ids_are_made_once_and_again_for_another_tokenizer(
    tiny_gemma4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tiny_gemma4, folder)
    first = texts.encoded(open_checkpoint(folder), tmp_path)
    assert first[CAFE] == tuple(tokenizer.load(folder / "tokenizer.json")(CAFE))
    texts._encoded.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(tokenizer, "load", lambda path: pytest.fail("tokenized again"))
        assert texts.encoded(open_checkpoint(folder), tmp_path) == first
    path = folder / "tokenizer.json"
    with path.open("a") as file:
        file.write("\n")
    texts.encoded(open_checkpoint(folder), tmp_path)
    assert len(list((tmp_path / texts.KEPT).glob("*.json"))) == 2
