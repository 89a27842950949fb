"""Texts with the checkpoint's ids: those that tokenizers are compared on and models judged on, made once a run.

Others are to calibrate on, and nothing is judged on them.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

from gemexport._version import __version__
from gemexport.formats.assets import TOKENIZER
from gemexport.formats.checkpoint import Checkpoint
from gemexport.formats.storage.errors import InputError
from gemexport.formats.storage.files import atomic, locked
from gemexport.formats.storage.reading import read_text
from gemexport.validators.checks import chat, corpus, prompts, tokenizer, vocabulary

TEXT_BYTES = 64 << 20  # of a calibration text
KEPT = "reference/wording"  # folder in the work folder of the checkpoint's texts and ids


def encoded(checkpoint: Checkpoint, work: Path) -> dict[str, tuple[int, ...]]:
    """Every text that tokenizers are compared on, the built-in prompts among them, with the checkpoint's ids.

    Kept in the folder `work` under what they are made of, for the validators beside this one: making them takes longer
    than all that is done with them.
    """
    assets, size = checkpoint.assets, checkpoint.architecture.vocab_size
    return _encoded(work / KEPT / f"{_mark(assets / TOKENIZER, size)}.json", assets, size)


@lru_cache(maxsize=1)
def _encoded(path: Path, assets: Path, size: int) -> dict[str, tuple[int, ...]]:
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.parent / "lock"):  # whoever comes second waits here, and then finds the file
            if not path.is_file():
                with atomic(path) as partial:
                    partial.write_text(json.dumps(_encode(assets, size)), "ascii")
    return {text: tuple(ids) for text, ids in json.loads(path.read_bytes()).items()}


def _mark(file: Path, size: int) -> str:
    """A digest of what the texts and their ids follow from."""
    programs = (unicodedata.unidata_version, version("tokenizers"), __version__, str(size))
    content = file.read_bytes() if file.is_file() else b""  # that there is none is told by who reads it
    return hashlib.sha256("\n".join(programs).encode() + content).hexdigest()[:32]


def _encode(assets: Path, size: int) -> dict[str, list[int]]:
    tables = vocabulary_of(assets)
    encode = tokenizer.load(assets / TOKENIZER)
    listed = (vocabulary.ADDED, vocabulary.SPECIAL)
    added = [piece for piece, kind in zip(tables.pieces, tables.kinds, strict=True) if kind in listed]
    texts = [*prompts.prompts(), *prompts.HARD_TEXTS, *corpus.corpus(tables.pieces[:size], added)]
    return {text: encode(text) for text in texts}


@lru_cache(maxsize=1)
def vocabulary_of(assets: Path) -> vocabulary.Vocabulary:
    """The tables of the tokenizer in a folder."""
    return vocabulary.read(assets)


def tokens_of(checkpoint: Checkpoint, text: Path | None) -> list[list[int]]:
    """The token ids of a text file, or of each of the built-in calibration texts, which no loss is measured on.

    Conversations are laid out by the checkpoint's chat template, where it has one that takes them.
    Raises InputError for a file that cannot be read, or is empty.
    """
    encode = tokenizer.load(checkpoint.assets / TOKENIZER)
    if text is None:
        talks = [item for item in prompts.calibration() if not isinstance(item, str)]
        made = iter(chat.laid_out(chat.template(checkpoint.assets), talks))
        return [encode(item if isinstance(item, str) else next(made)) for item in prompts.calibration()]
    try:
        ids = encode(read_text(text, TEXT_BYTES))
    except OSError as error:
        raise InputError(text, f"cannot be read as text ({error})", "give a UTF-8 file") from error
    if not ids:
        raise InputError(text, "has no text", "give a file with some")
    return [ids]
