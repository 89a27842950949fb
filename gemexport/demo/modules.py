"""The modules of sentence-transformers beside a demo checkpoint of an embedding model, in the layout of releases."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from gemexport.formats.gemma.architecture import TensorSpec
from gemexport.formats.gemma.embedder import Embedder
from gemexport.formats.sentence_transformers import IDENTITY, LIST, POOLING, WEIGHT
from gemexport.formats.storage.safetensors import Entry, ShardedWriter

KIND = "sentence_transformers.models."
PROMPTS = {"query": "task: search result | query: ", "document": "title: none | text: "}


def write(folder: Path, embedder: Embedder, dtype: str, made: Callable[[TensorSpec], NDArray[Any]]) -> None:
    """Write `modules.json`, what it lists, and the prompts of a query and of a document."""
    specs = embedder.specs()
    listed = ["", "1_Pooling", *(spec.name.partition(".")[0] for spec in specs), f"{len(specs) + 2}_Normalize"]
    kinds = ["Transformer", *(place.partition("_")[2] for place in listed[1:])]
    _json(
        folder / LIST,
        [
            {"idx": index, "name": str(index), "path": place, "type": KIND + kind}
            for index, (place, kind) in enumerate(zip(listed, kinds, strict=True))
        ],
    )
    _json(folder / "config_sentence_transformers.json", {"prompts": PROMPTS, "similarity_fn_name": "cosine"})
    for name in listed[1:]:
        (folder / name).mkdir()
    _json(folder / "1_Pooling" / "config.json", {f"{POOLING}_mean_tokens": True, f"{POOLING}_cls_token": False})
    for spec in specs:
        place, (out, inside) = folder / spec.name.partition(".")[0], spec.shape
        said = {"in_features": inside, "out_features": out, "bias": False, "activation_function": IDENTITY}
        _json(place / "config.json", said)
        with ShardedWriter(place, [Entry(WEIGHT, dtype, spec.shape)]) as writer:
            writer.write(WEIGHT, made(spec))


def _json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")
