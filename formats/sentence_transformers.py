"""Folders of sentence-transformers: a decoder, and beside it a folder for each module that its output goes through.

https://sbert.net/docs/package_reference/sentence_transformer/models.html; `modules.json` lists them in order.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gemexport.formats.gemma.embedder import DENSE, REMEDY
from gemexport.formats.gemma.names import CANONICAL
from gemexport.formats.storage.errors import InputError
from gemexport.formats.storage.reading import JSON_BYTES, read_json, read_text
from gemexport.formats.storage.safetensors import MappedArray, read_folder

LIST = "modules.json"
POOLING = "pooling_mode"  # …_mean_tokens and its like, in releases before 6
IDENTITY = "torch.nn.modules.linear.Identity"
WEIGHT = "linear.weight"  # of a linear's folder


def described(folder: Path) -> dict[str, Any] | None:
    """What `modules.json` and the modules' own files say, in the fields of `Embedder`; None for another folder.

    Raises InputError for modules that are not known, or that say what is not done here.
    """
    if not (folder / LIST).is_file():
        return None
    pooling, dense, normalize = None, [], False
    for place, kind in _modules(folder):
        if kind == "Pooling":
            pooling = _pooling(place / "config.json")
        elif kind == "Dense":
            dense.append(_dense(place / "config.json"))
        elif kind == "Normalize":
            normalize = True
        elif kind != "Transformer":
            raise InputError(folder / LIST, f"names a module {kind}, which is not known", REMEDY)
    return {"pooling": pooling, "dense": dense, "normalize": normalize}


def arrays(folder: Path) -> Iterator[tuple[str, MappedArray]]:
    """The linears' weights under their canonical names, mapped; InputError for a file that is missing or broken."""
    if not (folder / LIST).is_file():
        return
    places = [place for place, kind in _modules(folder) if kind == "Dense"]
    for place, role in zip(places, DENSE, strict=False):
        for name, array in read_folder(place).items():
            yield CANONICAL.name(role) if name == WEIGHT else f"{place.name}.{name}", array


def files(folder: Path) -> list[Path]:
    """The files of the modules beside the decoder, with the list of them."""
    if not (folder / LIST).is_file():
        return []
    return [folder / LIST, *(file for place, _ in _modules(folder) if place != folder for file in _own(place))]


def entries(folder: Path) -> list[str]:
    """The names in the folder itself that are read: the list, and the modules' folders."""
    if not (folder / LIST).is_file():
        return []
    return [LIST, *(place.name for place, _ in _modules(folder) if place != folder)]


def _own(place: Path) -> list[Path]:
    return sorted(file for file in place.glob("*") if file.suffix in (".json", ".safetensors"))


def _modules(folder: Path) -> Iterator[tuple[Path, str]]:
    """The folder and the class of each module, in order."""
    try:
        listed = json.loads(read_text(folder / LIST, JSON_BYTES))
    except (ValueError, RecursionError) as error:
        raise InputError(folder / LIST, f"cannot be read as JSON ({error})", REMEDY) from error
    if not isinstance(listed, list):
        raise InputError(folder / LIST, "is no list of modules", REMEDY)
    for item in listed:
        path, kind = (item.get(key) if isinstance(item, dict) else None for key in ("path", "type"))
        if not isinstance(path, str) or not isinstance(kind, str) or "/" in path or path in (".", ".."):
            raise InputError(folder / LIST, f"has an entry that is no module: {item!r:.60}", REMEDY)
        yield folder / path, kind.rpartition(".")[2]


def _settings(file: Path) -> dict[str, Any]:
    try:
        return read_json(file)
    except FileNotFoundError as error:
        raise InputError(file, "is missing", REMEDY) from error


def _pooling(file: Path) -> Any:
    """How hidden states become one; `mean` where the file says so and nothing besides."""
    said = _settings(file)
    if POOLING in said:
        return said[POOLING]
    modes = sorted(key for key, value in said.items() if key.startswith(f"{POOLING}_") and value is True)
    return "mean" if modes == [f"{POOLING}_mean_tokens"] else ", ".join(modes)


def _dense(file: Path) -> tuple[Any, Any]:
    """Outputs and inputs of a linear."""
    said = _settings(file)
    if said.get("bias", True):
        raise InputError(file, "says that the linear has a bias, which is not supported", REMEDY)
    if said.get("activation_function") != IDENTITY:
        problem = f"says that {said.get('activation_function')} follows the linear, which is not supported"
        raise InputError(file, problem, REMEDY)
    return said.get("out_features"), said.get("in_features")
