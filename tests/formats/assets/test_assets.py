"""What lies beside the weights: composed as transformers composes it, and nothing passed over without a word."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from gemexport.formats.checkpoint import Unpacked, open_checkpoint
from gemexport.formats.storage.errors import InputError
from gemexport.formats.storage.files import LOCK

TURN = 6  # <end_of_turn> of the tiny Gemma 3


@pytest.fixture
def model(tiny_gemma3: Path, tmp_path: Path) -> Path:
    """A copy to change: its configs say 1 ends an answer, its tokenizer <end_of_turn>."""
    return Path(shutil.copytree(tiny_gemma3, tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    given = json.loads(path.read_text("utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**given, **changes}, ensure_ascii=False), "utf-8")


def remove(path: Path, key: str) -> Any:
    content = json.loads(path.read_text("utf-8"))
    value = content.pop(key)
    path.write_text(json.dumps(content, ensure_ascii=False), "utf-8")
    return value


def unpacked(model: Path) -> Unpacked:
    return open_checkpoint(model).unpack()


def stops(found: Unpacked) -> Any:
    return json.loads((found.folder / "generation_config.json").read_text())["eos_token_id"]


def only(found: Unpacked, part: str) -> str:
    (note,) = [note for note in found.notes if part in note]
    return note


def test_files_that_say_all_are_taken_as_they_are(tiny_gemma4: Path, tmp_path: Path) -> None:
    found = unpacked(tiny_gemma4)
    assert found == Unpacked(tiny_gemma4, ())
    again = open_checkpoint(tiny_gemma4, tmp_path).unpack()
    assert again == found
    (kept,) = (path for path in tmp_path.iterdir() if path.name != LOCK)
    assert [file.name for file in kept.iterdir()] == ["notes.json"]


def test_settings_that_are_not_there_are_those_of_transformers(model: Path) -> None:
    """onnxruntime-genai reads no tokenizer without them, and llama.cpp has to be told of BOS."""
    given = json.loads((model / "tokenizer_config.json").read_text("utf-8"))
    (model / "tokenizer_config.json").unlink()
    found = unpacked(model)
    made = json.loads((found.folder / "tokenizer_config.json").read_text("utf-8"))
    assert only(found, "no tokenizer_config.json")
    wanted = ("add_bos_token", "bos_token", "pad_token", "tokenizer_class", "unk_token")
    assert {key: made[key] for key in wanted} == {key: given[key] for key in wanted}
    assert made["eos_token"] == "<eos>"  # as config.json has it


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("truncation", {"direction": "Right", "max_length": 64, "strategy": "LongestFirst", "stride": 0}),
        ("padding", {"strategy": "BatchLongest", "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0,
                     "pad_type_id": 0, "pad_token": "<pad>"}),
        ("padding", {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                     "pad_type_id": 0, "pad_token": "<pad>"}),
    ],
)  # fmt: skip
def test_what_a_trainer_left_is_taken_out(key: str, value: Mapping[str, Any], model: Path) -> None:
    before = json.loads((model / "tokenizer.json").read_text("utf-8"))
    edit(model / "tokenizer.json", **{key: value})
    found = unpacked(model)
    assert f"({key})" in only(found, "state of a trainer")
    assert json.loads((found.folder / "tokenizer.json").read_text("utf-8")) == before


def test_all_that_a_trainer_left_is_taken_out(model: Path) -> None:
    """With dropout the same text is other tokens each time."""
    before = json.loads((model / "tokenizer.json").read_text("utf-8"))
    cut = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    edit(model / "tokenizer.json", truncation=cut, model={**before["model"], "dropout": 0.1})
    found = unpacked(model)
    assert [note.partition(")")[0] for note in found.notes if "trainer" in note] == [
        f"tokenizer.json has the state of a trainer ({key}" for key in ("truncation", "dropout")
    ]
    assert json.loads((found.folder / "tokenizer.json").read_text("utf-8")) == before


@pytest.mark.parametrize("place", ["tokenizer", "template", "both"])
def test_the_end_of_a_turn_ends_an_answer(place: str, model: Path) -> None:
    """MLX stopped at 1 and 6, onnxruntime-genai at 1, llama.cpp at both."""
    if place == "tokenizer":
        remove(model / "tokenizer_config.json", "chat_template")
    if place == "template":
        edit(model / "tokenizer_config.json", eos_token="<eos>")
    found = unpacked(model)
    assert stops(found) == [1, TURN]
    assert "<end_of_turn>" in only(found, "an answer ends at")


def test_without_generation_settings_the_configs_hold(model: Path) -> None:
    (model / "generation_config.json").unlink()
    found = unpacked(model)
    assert json.loads((found.folder / "generation_config.json").read_text()) == {
        "bos_token_id": 2,
        "eos_token_id": [1, TURN],
        "pad_token_id": 0,
    }


def test_generation_settings_decide_over_the_config(model: Path) -> None:
    """As in transformers: the config's own ends are not looked at."""
    edit(model / "config.json", eos_token_id=[1, 3])
    edit(model / "generation_config.json", eos_token_id=[TURN, 1])
    found = unpacked(model)
    assert found.folder == model
    assert stops(found) == [TURN, 1]


def test_an_end_without_a_row_is_told(model: Path) -> None:
    edit(model / "generation_config.json", eos_token_id=[1, TURN, 513])
    found = unpacked(model)
    assert stops(found) == [1, TURN]
    assert "513" in only(found, "has no row")


def added(text: str) -> dict[str, Any]:
    return {
        "content": text,
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": True,
    }


@pytest.mark.parametrize("place", ["added_tokens_decoder", "added_tokens.json"])
def test_tokens_that_only_other_files_name(place: str, model: Path) -> None:
    transformers = pytest.importorskip("transformers")
    if place == "added_tokens.json":
        (model / place).write_text('{"<|end|>": 513, "<|start|>": 512}')
    else:
        edit(
            model / "tokenizer_config.json",
            added_tokens_decoder={"512": added("<|start|>"), "513": added("<|end|>")},
        )
    found = unpacked(model)
    assert "2 tokens that tokenizer.json lacks" in only(found, "lacks")
    assert "<|start|> (512), <|end|> (513)" in only(found, "no row")
    from tokenizers import Tokenizer

    composed = Tokenizer.from_file(str(found.folder / "tokenizer.json"))
    theirs = transformers.AutoTokenizer.from_pretrained(model)
    for text in ("<|start|>", "<|end|>", "a <|start|>b<|end|>"):
        assert composed.encode(text, add_special_tokens=False).ids == theirs.encode(text, add_special_tokens=False)
    assert composed.token_to_id("<|end|>") == 513


@pytest.mark.parametrize(
    ("place", "key", "given"),
    [
        ("tokenizer_config.json", "additional_special_tokens", ["<eos>", "<|b|>", "<|a|>"]),
        ("tokenizer_config.json", "extra_special_tokens", {"image_token": "<|b|>", "other_token": "<|a|>"}),
        ("special_tokens_map.json", "additional_special_tokens", ["<|b|>", "<|a|>"]),
    ],
)
def test_tokens_that_are_only_called_special(place: str, key: str, given: Any, model: Path) -> None:
    """transformers gives them the next ids, in the order in which they are called so."""
    transformers = pytest.importorskip("transformers")
    edit(model / place, **{key: given})
    found = unpacked(model)
    assert only(found, "2 tokens that tokenizer.json lacks").endswith("<|b|>, <|a|>")
    from tokenizers import Tokenizer

    composed = Tokenizer.from_file(str(found.folder / "tokenizer.json"))
    theirs = transformers.AutoTokenizer.from_pretrained(model)
    for text in ("<|a|>", "<|b|>", "a <|b|>b<|a|>"):
        assert composed.encode(text, add_special_tokens=False).ids == theirs.encode(text, add_special_tokens=False)
    edit(model / place, **{key: "<|a|>"})
    with pytest.raises(InputError, match=f"{key} is no list of tokens"):
        unpacked(model)


TEMPLATE = "{% for message in messages %}{{ message['role'] + message['content'] + '<end_of_turn>' }}{% endfor %}"


def test_a_template_where_only_processors_look(model: Path) -> None:
    remove(model / "tokenizer_config.json", "chat_template")
    (model / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    found = unpacked(model)
    assert (found.folder / "chat_template.jinja").read_text() == TEMPLATE
    assert "chat_template.json" in only(found, "chat templates come from")


@pytest.mark.parametrize("default", [True, False])
def test_templates_in_a_folder_of_their_own(default: bool, model: Path) -> None:
    transformers = pytest.importorskip("transformers")
    if default:
        (model / "chat_template.jinja").write_text(TEMPLATE)
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    found = unpacked(model)
    listed = json.loads((found.folder / "tokenizer_config.json").read_text("utf-8"))["chat_template"]
    expected = transformers.AutoTokenizer.from_pretrained(model).chat_template
    assert {item["name"]: item["template"] for item in listed} == expected
    assert not (found.folder / "chat_template.jinja").exists()
    assert only(found, "additional_chat_templates")


def test_tokens_without_a_row_are_told_in_every_format(model: Path) -> None:
    tokenizer = json.loads((model / "tokenizer.json").read_text("utf-8"))
    edit(model / "tokenizer.json", added_tokens=[*tokenizer["added_tokens"], {"id": 512, **added("<image>")}])
    assert "<image> (512)" in only(unpacked(model), "no row")


def test_files_that_nobody_reads_are_told(model: Path) -> None:
    for name in ("preprocessor_config.json", "optimizer.pt", "README.md", "LICENSE", ".gitattributes"):
        (model / name).write_text("{}")
    told = "2 files of the checkpoint's folder are not used: optimizer.pt, preprocessor_config.json"
    assert only(unpacked(model), "not used") == told


def test_a_template_that_takes_no_plain_text_is_no_fault(model: Path) -> None:
    """TranslateGemma's takes one typed item with language codes."""
    edit(model / "tokenizer_config.json", chat_template="{{ raise_exception('no plain text') }}")
    assert stops(unpacked(model)) == [1, TURN]
