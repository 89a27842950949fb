"""What lies beside a checkpoint's weights (tokenizer, chat template, settings) as every format and validator reads it.

Mostly these are the checkpoint's own files. Where programs would make different things of them, they are composed once
as transformers composes them, into a folder of their own, and a note says what was done.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemexport.formats.assets import stops, tables, templates
from gemexport.formats.storage.errors import InputError
from gemexport.formats.storage.reading import copy, read_optional_json

TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"
ADDED, SPECIAL_TOKENS = "added_tokens.json", "special_tokens_map.json"
FILES = (TOKENIZER, SETTINGS, SPECIAL_TOKENS, ADDED, templates.FILE, "tokenizer.model", stops.GENERATION)
NOTES = "notes.json"  # in a folder of composed files
VERSION = "3"  # of what is composed; another one makes it anew
# Of the checkpoint's folder: read elsewhere, or nothing that a program needs.
_READ = ("config.json", templates.OLD_FILE)
_PLAIN = (".md", ".txt", ".pdf", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".gitattributes", ".gitignore", ".log")
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "mask_token")
_USUAL = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
_FURTHER = ("additional_special_tokens", "extra_special_tokens")  # lists of more of them, or objects by name


@dataclass(frozen=True)
class Composed:
    """Files that are not the checkpoint's own, by name, and a sentence for each thing that is worth one."""

    files: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Decoder:
    """As much of the decoder as concerns its tokens."""

    rows: int  # of the embedding
    eos: tuple[int, ...]  # of config.json
    bos: int | None
    pad: int | None


def beside(artifact: Path) -> list[Path]:
    """The files that a Core ML package is used with, which lie in its folder; none for what has its own."""
    if artifact.suffix != ".mlpackage":
        return []
    return [file for name in FILES if (file := artifact.with_name(name)).is_file()]


def text_of(token: Any) -> str | None:
    """The text of a special token in settings: a string, or an object with `content`."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None


def compose(folder: Path, source: Mapping[str, Any], decoder: Decoder, read: Sequence[str] = ()) -> Composed:
    """What a checkpoint's files are made into; `source` is its tokenizer.json, `read` are files with weights.

    Raises InputError for settings that are absurd, contradict each other or cannot be computed in bounded time.
    """
    path = folder / TOKENIZER
    tables.check(path, source)
    settings = read_optional_json(folder / SETTINGS, "save the tokenizer again")
    generation = read_optional_json(folder / stops.GENERATION)
    said = stops.check(folder / stops.GENERATION, generation)
    tokenizer, files, notes = dict(source), dict[str, str](), list[str]()
    if not settings:
        settings = _usual_settings(folder, source, decoder)
        files[SETTINGS] = _dumped(settings)
        notes.append(f"there is no {SETTINGS}, which programs read: one is made of the configs, as transformers has it")
    ids = {**source["model"]["vocab"], **{item["content"]: item["id"] for item in source.get("added_tokens") or ()}}
    notes += _leftovers(tokenizer)
    notes += _composed_tokens(folder, tokenizer, settings, ids)
    if tokenizer != source:
        files[TOKENIZER] = _dumped(tokenizer)
    notes += _surplus(ids, decoder.rows)
    found = templates.find(folder, settings)
    notes += _placed(found, settings, files)
    named = {name: text for name in _NAMED if (text := text_of(settings.get(name))) is not None}
    specials = [item["content"] for item in tokenizer.get("added_tokens") or () if item.get("special")]
    turn = templates.turn_end(found, named, specials)
    eos = named.get("eos_token")
    ends = stops.effective(
        said, decoder.eos, None if eos is None else ids.get(eos), None if turn is None else ids[turn], decoder.rows
    )
    notes += _stopped(ends, said, decoder, generation, files, {index: text for text, index in ids.items()})
    return Composed(files, (*notes, *_unread(folder, (*FILES, *_READ, *read))))


def _usual_settings(folder: Path, source: Mapping[str, Any], decoder: Decoder) -> dict[str, Any]:
    """What transformers takes for a Gemma's tokenizer_config.json where there is none."""
    texts = {index: text for text, index in source["model"]["vocab"].items()}
    texts |= {item["id"]: item["content"] for item in source.get("added_tokens") or ()}
    ids = {"bos_token": decoder.bos, "eos_token": next(iter(decoder.eos), None), "pad_token": decoder.pad}
    named = {name: texts.get(index) for name, index in ids.items()} | {"unk_token": source["model"].get("unk_token")}
    listed = read_optional_json(folder / SPECIAL_TOKENS)
    named |= {name: text_of(listed[name]) for name in _NAMED if name in listed}
    return {
        "add_bos_token": True,
        "tokenizer_class": "GemmaTokenizer",
        **{name: text for name, text in named.items() if text is not None},
    }


def _dumped(content: Mapping[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False, indent=2) + "\n"


def _leftovers(tokenizer: dict[str, Any]) -> Iterator[str]:
    """Take out what a trainer left: programs that read tokenizer.json would cut texts, or fill them up."""
    for key, does in (("truncation", "cuts texts"), ("padding", "fills texts up")):
        if tokenizer.get(key):
            tokenizer[key] = None
            yield f"tokenizer.json has the state of a trainer ({key}), which {does}: it is taken out"
    if tokenizer["model"].get("dropout"):
        tokenizer["model"] = {**tokenizer["model"], "dropout": None}
        yield "tokenizer.json has the state of a trainer (dropout), which splits texts by chance: it is taken out"


def _composed_tokens(
    folder: Path, tokenizer: dict[str, Any], settings: Mapping[str, Any], known: dict[str, int]
) -> Iterator[str]:
    """Add the tokens that only the files beside tokenizer.json name, as transformers does when it loads them.

    They join the ids by text in `known`, too.
    """
    wanted = {text: item for text, item in _beside(folder, settings) if text not in known}
    following = max([*known.values(), *(item["id"] for item in wanted.values())], default=-1) + 1
    new = [text for text in _special(folder, settings) if text not in known and text not in wanted]
    wanted |= {
        text: {"id": index, "content": text, **_USUAL, "special": True} for index, text in enumerate(new, following)
    }
    if not wanted:
        return
    path, following = folder / TOKENIZER, max(known.values(), default=-1) + 1
    for index, (text, item) in enumerate(sorted(wanted.items(), key=lambda pair: pair[1]["id"]), following):
        if item["id"] != index:
            problem = f"has no token {text!r}, which another file gives the id {item['id']}; it would get {index}"
            raise InputError(path, problem, "save the tokenizer again")
    added = sorted(wanted.values(), key=lambda item: item["id"])
    tokenizer["added_tokens"] = [*(tokenizer.get("added_tokens") or ()), *added]
    known |= {item["content"]: item["id"] for item in added}
    yield f"{len(wanted)} tokens that tokenizer.json lacks come from the files beside it: {_some(list(wanted))}"


def _beside(folder: Path, settings: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Tokens in `added_tokens_decoder` of tokenizer_config.json, or else in added_tokens.json."""
    decoder = settings.get("added_tokens_decoder")
    if decoder is not None:
        items = decoder.items() if isinstance(decoder, dict) else [("", None)]
        for index, item in items:
            if not (isinstance(item, dict) and isinstance(item.get("content"), str) and str(index).isdecimal()):
                problem = "added_tokens_decoder is no object of tokens by id"
                raise InputError(folder / SETTINGS, problem, "save the tokenizer again")
            flags = {key: bool(item.get(key, _USUAL[key])) for key in _USUAL}
            yield item["content"], {"id": int(index), "content": item["content"], **flags}
        return
    for text, index in read_optional_json(folder / ADDED).items():
        if type(index) is not int or not 0 <= index < tables.MAX_ID:
            raise InputError(folder / ADDED, f"the id of {text!r} is {index!r:.40}", "save the tokenizer again")
        yield text, {"id": index, "content": text, **_USUAL}


def _special(folder: Path, settings: Mapping[str, Any]) -> list[str]:
    """Texts that are called special tokens, each once, in the order in which transformers gives new ones their ids."""
    given = {**read_optional_json(folder / SPECIAL_TOKENS), **settings}
    found = [text_of(given.get(name)) for name in _NAMED]
    for key in _FURTHER:
        items = given.get(key) or ()
        if not isinstance(items, list | tuple | dict):
            raise InputError(folder / SETTINGS, f"{key} is no list of tokens", "save the tokenizer again")
        found += [text_of(item) for item in (items.values() if isinstance(items, dict) else items)]
    return list(dict.fromkeys(text for text in found if text))


def _surplus(ids: Mapping[str, int], rows: int) -> Iterator[str]:
    if max(ids.values(), default=-1) >= rows:
        beyond = sorted((index, text) for text, index in ids.items() if index >= rows)
        shown = _some([f"{text} ({index})" for index, text in beyond])
        yield f"{len(beyond)} tokens have no row in the embedding, so no text with one of them is computed: {shown}"


def _placed(found: templates.Templates, settings: Mapping[str, Any], files: dict[str, str]) -> Iterator[str]:
    """Put templates where every program looks, if they lie where only some do."""
    moved = sorted({path.name if path.name == templates.OLD_FILE else templates.FOLDER for path in found.places.values()
                    if path.name == templates.OLD_FILE or path.parent.name == templates.FOLDER})  # fmt: skip
    if not moved:
        return
    if set(found.texts) != {templates.DEFAULT}:
        named = [{"name": name, "template": text} for name, text in found.texts.items()]
        files[SETTINGS] = _dumped({**settings, templates.KEY: named})
        files[templates.FILE] = ""
    else:
        files[templates.FILE] = found.texts[templates.DEFAULT]
    yield f"chat templates come from {' and '.join(moved)}, where not every program looks"


def _stopped(
    ends: Sequence[int],
    said: stops.Generation,
    decoder: Decoder,
    generation: Mapping[str, Any],
    files: dict[str, str],
    texts: Mapping[int, str],
) -> Iterator[str]:
    """Say in generation_config.json where an answer ends, if that or config.json leaves one out."""
    listed = said.eos_token_id
    own = [*decoder.eos] if listed is None else [listed] if isinstance(listed, int) else listed
    if set(ends) != set(own):
        ids = {"bos_token_id": decoder.bos, "pad_token_id": decoder.pad} if not generation else {}
        given = {key: value for key, value in ids.items() if value is not None}
        files[stops.GENERATION] = (
            json.dumps({**given, **generation, "eos_token_id": stops.named(ends)}, indent=2, sort_keys=True) + "\n"
        )
    if new := [texts.get(index, str(index)) for index in ends if index not in own]:
        yield f"an answer ends at {_some(new)} too: the tokenizer or its chat template says so, and the configs do not"
    if gone := [str(index) for index in own if index >= decoder.rows]:
        yield f"eos_token_id names {_some(gone)}, for which the embedding has no row"


def _unread(folder: Path, read: Sequence[str]) -> Iterator[str]:
    """A sentence about the files of a checkpoint that nothing here reads."""
    names = [
        entry.name
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name)
        if entry.name not in read
        and not entry.name.startswith(".")
        and not entry.name.lower().endswith(_PLAIN)
        and not entry.name.upper().startswith(("LICENSE", "NOTICE", "README"))
        and not (entry.name == templates.FOLDER and entry.is_dir())
    ]
    if names:
        yield f"{len(names)} files of the checkpoint's folder are not used: {_some(names)}"


def _some(items: Sequence[str], limit: int = 5) -> str:
    return ", ".join(items[:limit]) + (f" and {len(items) - limit} more" if len(items) > limit else "")


def mark(folder: Path, decoder: Decoder) -> str:
    """What composed files depend on, as a name: sizes and times of the folder's files, and the decoder's tokens."""
    digest = hashlib.sha256(f"{VERSION} {decoder}\n".encode())
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        status = entry.stat()
        digest.update(f"{entry.name} {status.st_size} {status.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def write(composed: Composed, folder: Path, target: Path) -> None:
    """Write the notes into `target`, and all files where any of them is not the checkpoint's own."""
    if composed.files:
        for name in FILES:
            if name in composed.files:
                if composed.files[name]:  # else its content is in another file now
                    (target / name).write_text(composed.files[name], "utf-8")
            elif (folder / name).exists():
                copy(folder / name, target / name)
    write_notes(composed, target)


def write_notes(composed: Composed, target: Path) -> None:
    """Write the notes into `target`."""
    (target / NOTES).write_text(json.dumps(composed.notes) + "\n", "ascii")
