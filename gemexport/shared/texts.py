"""The texts that tokenizers are compared on and models judged on, with the checkpoint's ids: made once a run."""

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
from gemexport.formats.storage.files import atomic, locked
from gemexport.validators.checks import corpus, prompts, tokenizer, vocabulary

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
