"""A tokenizer's tables: faults in a folder and in a GGUF file are named, and right artefacts have none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemexport.exporters import gguf
from gemexport.formats.checkpoint import open_checkpoint
from gemexport.formats.storage.errors import InputError
from gemexport.validators.checks.vocabulary import compare, read, settings_differ

Change = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module", params=["gemma3", "gemma4"])
def model(request: pytest.FixtureRequest) -> Path:
    return Path(request.getfixturevalue(f"tiny_{request.param}"))


@pytest.fixture(scope="module")
def file(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf.export(open_checkpoint(model), tmp_path_factory.mktemp("gguf") / "m.gguf", variant="BF16").path


def changed(model: Path, folder: Path, change: Change) -> Path:
    """A copy of a checkpoint with another tokenizer.json."""
    shutil.copytree(model, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    change(tokenizer)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), "utf-8")
    return folder


def exchange(tokenizer: dict[str, Any]) -> None:
    """Two pieces, each with the other's id."""
    vocab = tokenizer["model"]["vocab"]
    first, second = [text for text in vocab if text.isalpha()][-2:]
    vocab[first], vocab[second] = vocab[second], vocab[first]


def insert(tokenizer: dict[str, Any]) -> None:
    vocab = tokenizer["model"]["vocab"]
    last = max(vocab, key=vocab.__getitem__)
    middle = len(vocab) // 2
    del vocab[last]
    tokenizer["model"]["vocab"] = {text: index + (index >= middle) for text, index in vocab.items()} | {
        "extra!": middle
    }
    tokenizer["model"]["merges"] = [pair for pair in tokenizer["model"]["merges"] if last not in ("".join(pair), *pair)]
    tokenizer["added_tokens"] = [
        {**item, "id": item["id"] + (item["id"] >= middle)}
        for item in tokenizer["added_tokens"]
        if item["content"] != last
    ]


def lose_a_merge(tokenizer: dict[str, Any]) -> None:
    """The last pair that makes a text of different characters, as every longer one would do without it."""
    merges = tokenizer["model"]["merges"]
    merges.remove(next(pair for pair in reversed(merges) if len(set("".join(pair))) > 2))


def reorder(tokenizer: dict[str, Any]) -> None:
    tokenizer["model"]["merges"].reverse()


def no_bos(tokenizer: dict[str, Any]) -> None:
    tokenizer["post_processor"]["single"].pop(0)


def plain_turn(tokenizer: dict[str, Any]) -> None:
    """The end of a turn as a token like any other."""
    own = next(item for item in tokenizer["added_tokens"] if item["content"] in ("<end_of_turn>", "<turn|>"))
    own["special"] = False


FAULTS = (
    (exchange, "2 ids stand for other tokens"),
    (insert, "'extra!'"),
    (no_bos, "BOS is put before a text by the checkpoint and not by the artefact"),
    (plain_turn, "is of another kind"),
)


def problems(model: Path, artifact: Path) -> tuple[str, ...]:
    return compare(read(model), read(artifact), open_checkpoint(model).architecture.vocab_size)


def test_the_checkpoints_own_tables_have_no_differences(model: Path, file: Path) -> None:
    assert problems(model, model) == () == problems(model, file)


@pytest.mark.parametrize(("fault", "named"), FAULTS)
def test_a_fault_is_named_in_a_folder(model: Path, tmp_path: Path, fault: Change, named: str) -> None:
    found = problems(model, changed(model, tmp_path / "copy", fault))
    assert any(named in sentence for sentence in found), found


@pytest.mark.parametrize(("fault", "named"), FAULTS)
def test_a_fault_is_named_in_a_gguf_file(model: Path, tmp_path: Path, fault: Change, named: str) -> None:
    source = open_checkpoint(changed(model, tmp_path / "copy", fault))
    found = problems(model, gguf.export(source, tmp_path / "m.gguf", variant="BF16").path)
    assert any(named in sentence for sentence in found), found


@pytest.mark.parametrize("fault", [lose_a_merge, reorder])
def test_other_merges_are_named(model: Path, tmp_path: Path, fault: Change) -> None:
    """Also where the file has merges and no scores, which is what becomes of merges that no scores can stand for."""
    copy = changed(model, tmp_path / "copy", fault)
    file = gguf.export(open_checkpoint(copy), tmp_path / "m.gguf", variant="BF16").path
    for artifact in (copy, file):
        found = problems(model, artifact)
        assert len(found) == 1, found
        assert "merge" in found[0] or "score" in found[0]


def test_a_lost_score_is_named(tiny_gemma3: Path, tmp_path: Path) -> None:
    file = gguf.export(open_checkpoint(tiny_gemma3), tmp_path / "m.gguf", variant="BF16").path
    found = read(file)
    assert found.scores is not None
    scores = found.scores.copy()
    scores[np.argsort(-scores, kind="stable")[40]] = -1e6
    (sentence,) = compare(read(tiny_gemma3), replace(found, scores=scores), len(scores))
    assert "out of order" in sentence


def test_ends_and_ids_are_compared(model: Path) -> None:
    own = read(model)
    size = len(own.pieces)
    stop = max(own.stops)
    assert "does not end at" in compare(own, replace(own, stops=frozenset({stop + 1})), size)[0]
    assert "does not say" in compare(own, replace(own, stops=frozenset()), size)[0]
    assert "BOS is 2" in compare(own, replace(own, ids={**own.ids, "bos": 7}), size)[0]
    assert "EOS is put behind" in compare(own, replace(own, add_eos=True), size)[0]
    assert "not set" in compare(own, replace(own, ids={**own.ids, "bos": None}), size)[0]


def test_how_tokens_are_chosen_is_compared_where_both_say_it(model: Path, file: Path, tmp_path: Path) -> None:
    own = read(model)
    size = len(own.pieces)
    assert own.sampling == read(file).sampling == {"top_k": 64, "top_p": pytest.approx(0.95)}
    assert compare(own, replace(own, sampling={"temperature": 1.0}), size) == ()
    wrong = "top_k is 64 in the checkpoint, 1 in the artefact"
    assert compare(own, replace(own, sampling={"top_k": 1}), size) == (wrong,)
    other = tmp_path / "other"
    shutil.copytree(model, other)
    (other / "genai_config.json").write_text(json.dumps({"search": {"do_sample": True, "top_k": 1}}))
    assert settings_differ(model, other)
    assert compare(own, read(other), size) == (wrong,)
    (other / "genai_config.json").write_text(json.dumps({"search": {"do_sample": False, "top_k": 1}}))
    assert not settings_differ(model, other)


def test_a_byte_that_is_text_is_named(model: Path, file: Path) -> None:
    found = read(file)
    place = found.pieces.index("<0x41>")
    kinds = [*found.kinds[:place], "normal", *found.kinds[place + 1 :]]
    (sentence,) = compare(read(model), replace(found, kinds=kinds), len(kinds))
    assert (
        sentence == f"id {place} is of another kind: '<0x41>', byte in the checkpoint, '<0x41>', normal in the artefact"
    )


def test_an_impossible_id_is_an_input_error(tiny_gemma4: Path, tmp_path: Path) -> None:
    def far(tokenizer: dict[str, Any]) -> None:
        tokenizer["model"]["vocab"]["far"] = 10**12

    with pytest.raises(InputError, match="token id 1000000000000"):
        read(changed(tiny_gemma4, tmp_path / "copy", far))


def test_a_broken_tokenizer_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        read(tmp_path)
