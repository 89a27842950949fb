"""How onnxruntime-genai reads a text: by its own tokenizer, out of the folder that it runs.

It puts BOS before a text only where it is told to, whatever tokenizer_config.json says.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from gemexport.formats.storage.errors import InputError
from gemexport.validators.checks.habits import Habits

PACKAGE, CONFIG = "onnxruntime_genai", "genai_config.json"
BOS_OPTION = {"add_special_tokens": "true"}  # of `Tokenizer.update_options`


def runs(folder: Path) -> bool:
    """Whether onnxruntime-genai is here and the folder is one for it."""
    return find_spec(PACKAGE) is not None and (folder / CONFIG).is_file()


def name() -> str:
    """The program and its version."""
    return f"onnxruntime-genai {version('onnxruntime-genai')}"


def _tokenizer(folder: Path, **options: str) -> Any:
    """Its tokenizer; InputError for a folder of which it reads none."""
    import onnxruntime_genai

    try:
        tokenizer = onnxruntime_genai.Tokenizer(onnxruntime_genai.Config(str(folder)))
        if options:
            tokenizer.update_options(**options)
    except Exception as error:
        problem = f"onnxruntime-genai does not read its tokenizer ({str(error).splitlines()[0]})"
        raise InputError(folder, problem, "give the checkpoint its tokenizer.json and tokenizer_config.json") from error
    return tokenizer


def habits(folder: Path) -> Habits:
    """What it puts before a text, as a client calls it that sets no option, where it stops, how it pads and decodes."""
    tokenizer = _tokenizer(folder)
    return Habits(
        tuple(int(token) for token in tokenizer.encode("")),
        frozenset(int(token) for token in tokenizer.eos_token_ids),
        int(tokenizer.pad_token_id),
        lambda ids: str(tokenizer.decode(np.array(ids, np.int32))),
        told='call tokenizer.update_options(add_special_tokens="true"), or begin with a template that writes it',
    )


def encoder(folder: Path) -> Callable[[str], list[int]]:
    """Texts as token ids, without the BOS that it puts before them.

    Raises InputError for a folder whose tokenizer it does not read, or in which it finds another BOS than the model's.
    """
    tokenizer = _tokenizer(folder, **BOS_OPTION)

    def encode(text: str) -> list[int]:
        return [int(token) for token in tokenizer.encode(text)]

    bos, found = json.loads((folder / CONFIG).read_text("utf-8"))["model"]["bos_token_id"], encode("")
    if found != [bos]:
        problem = f"onnxruntime-genai begins a text with {found}, and the model with BOS, {bos}"
        raise InputError(folder, problem, "name bos_token and tokenizer_class in tokenizer_config.json")
    return lambda text: encode(text)[1:]
