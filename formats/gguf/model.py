"""A GGUF file as a whole checkpoint: config, tensors, and the tokenizer's files, unpacked when they are asked for."""

from __future__ import annotations

import hashlib
from pathlib import Path

from gemexport.formats.checkpoint import Checkpoint, checkpoint_name, unpacking
from gemexport.formats.gemma.model import Model, text_config
from gemexport.formats.gguf import family_of, joined_tensors, left_out, stored_tensors
from gemexport.formats.gguf.config import config_json, model_of
from gemexport.formats.gguf.container import MENDED
from gemexport.formats.gguf.metadata import Metadata
from gemexport.formats.gguf.parts import Parts, read_parts
from gemexport.formats.gguf.vocabulary import check, write
from gemexport.formats.storage.errors import InputError
from gemexport.formats.tensor import Tensor

UNPACKED = "2"  # of what `write` makes; another one makes it anew


def checkpoint(path: Path, scratch: Path | None) -> Checkpoint:
    """The model in the GGUF file `path` and its other parts; reads headers only.

    The tokenizer's files are written to a folder in `scratch`, or to a temporary one, when `assets` is first asked for.
    Raises InputError for what is damaged, contradictory, or not a whole Gemma decoder.
    """
    parts = read_parts(path)
    facts = Metadata(parts.path, parts.metadata, family_of(parts).gguf)
    config = config_json(parts)
    model = model_of(facts, config)
    check(facts, model.decoder.vocab_size)
    tensors, others = _tensors(parts, model)
    return Checkpoint(
        name=checkpoint_name(path),
        path=path,
        config=config,
        text_config=text_config(config, parts.path),
        model=model,
        tensors=tensors,
        unpack=unpacking(lambda folder: write(facts, config, folder), lambda: _mark(parts), scratch),
        files=tuple(container.path for container in parts.containers),
        left_out=others,
    )


def _tensors(parts: Parts, model: Model) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The decoder's tensors in its order, and the names of those in the file that it does not have."""
    whole, joined = stored_tensors(parts), joined_tensors(parts)
    tensors: dict[str, Tensor] = {}
    for name, spec in model.specs.items():
        tensor: Tensor | None = whole.get(name) or joined.get(name, (None, ()))[0]
        if tensor is None:
            raise InputError(parts.path, f"the tensor {name} is missing", "give the file of a whole model")
        if tensor.shape != spec.shape:
            problem = f"tensor {name} has the shape {list(tensor.shape)} where the metadata say {list(spec.shape)}"
            raise InputError(parts.path, problem, MENDED)
        tensors[name] = tensor
    claimed = {name: whole[name] for name in tensors if name in whole}
    return tensors, left_out(parts, claimed, joined)


def _mark(parts: Parts) -> str:
    """What the files depend on, as a name: sizes and times of the model's files."""
    digest = hashlib.sha256(UNPACKED.encode())
    for container in parts.containers:
        status = container.path.stat()
        digest.update(f"{container.path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]
