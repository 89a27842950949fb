"""Tables of embeddings that an adapter brings along: the base's own, trained ones, or those of a larger vocabulary."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np

from gemexport.formats import assets
from gemexport.formats.assets import reading
from gemexport.formats.checkpoint import Checkpoint, Unpacked, asked_of_tokens, unpacking
from gemexport.formats.gemma.model import Model, describe, text_config
from gemexport.formats.gemma.names import CANONICAL, EMBEDDING, HEAD, module_of
from gemexport.formats.gemma.roles import Role
from gemexport.formats.lora.folder import MERGE, WEIGHTS, Adapter
from gemexport.formats.storage.errors import InputError
from gemexport.formats.storage.safetensors import MappedTensor
from gemexport.formats.tensor import Tensor, slices

UNTIE = f"give the base a head of its own (copy {module_of(EMBEDDING)} to {module_of(HEAD)}, tie_word_embeddings false)"


def with_tables(base: Checkpoint, adapter: Adapter, scratch: Path | None) -> Checkpoint:
    """The checkpoint with the tables that the adapter brings along and that are not the base's.

    Raises InputError for weights that are neither the base's nor trained ones nor those of a larger vocabulary, and
    for a head of its own where the base's is its embedding table.
    """
    path, new = adapter.path / WEIGHTS, dict[str, MappedTensor]()
    for module, stored in adapter.copies.items():
        name, copy = f"{module}.weight", MappedTensor(stored, f"{module}.weight")
        if is_shared(base, module) or _is_base(base, module, copy):
            continue
        tensor = base.tensors.get(_of_base(base, module))
        wider = tensor is not None and copy.shape[1:] == tensor.shape[1:] and copy.shape[0] > tensor.shape[0]
        if tensor is None or not (wider or (module in adapter.trained and copy.shape == tensor.shape)):
            raise InputError(path, f"the adapter brings {name} along, and it is not the base's", MERGE)
        new[name] = copy
    if not new:
        return base
    if base.architecture.tied and (head := new.pop(HEAD, None)) is not None:
        table = new.get(EMBEDDING)
        if table is None or not _same(head, table):
            raise InputError(path, "the adapter brings a head along that is not its embedding table", UNTIE)
    rows = {table.shape[0] for table in new.values()}
    return _resized(base, adapter, new, rows.pop() if len(rows) == 1 else 0, scratch)


def _of_base(base: Checkpoint, module: str) -> str:
    """The tensor of the base that a module computes with."""
    return EMBEDDING if module == module_of(HEAD) and base.architecture.tied else f"{module}.weight"


def _is_base(base: Checkpoint, module: str, copy: Tensor) -> bool:
    tensor = base.tensors.get(_of_base(base, module))
    return tensor is not None and _same(tensor, copy)


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two matrices have the same values."""
    return one.shape == other.shape and all(
        np.array_equal(one.rows(*part).values, other.rows(*part).values) for part in slices(other)
    )


def _resized(
    base: Checkpoint, adapter: Adapter, new: dict[str, MappedTensor], rows: int, scratch: Path | None
) -> Checkpoint:
    """The checkpoint with these tables of `rows` rows, and the tokenizer that came with them."""
    path, config, old = adapter.path / WEIGHTS, deepcopy(base.config), base.architecture
    if rows != old.vocab_size:
        inner = config.get("text_config")
        (inner if isinstance(inner, dict) else config)["vocab_size"] = rows
    model = describe(config, path)
    tensors = {**base.tensors, **new}
    wrong = next((name for name, spec in model.specs.items() if tensors[name].shape != spec.shape), None)
    if wrong is not None:
        problem = f"the adapter brings tables of other sizes along, and {wrong} does not go with them"
        raise InputError(path, problem, MERGE)
    if rows > old.vocab_size and old.per_layer is not None and rows > old.per_layer.vocab_size:
        problem = f"the adapter's vocabulary has {rows} tokens, {rows - old.per_layer.vocab_size} without a row of"
        raise InputError(path, f"{problem} per-layer embeddings", "train it without new tokens")
    names = ", ".join(module_of(name) for name in new)
    grown = f", of {rows} rows instead of {old.vocab_size}" if rows != old.vocab_size else ""
    notes = [f"{names} came with the adapter {adapter.path.resolve().name}{grown}"]
    own = (adapter.path / assets.TOKENIZER).is_file()
    if own:
        notes.append("so did the tokenizer")
    return replace(
        base,
        config=config,
        text_config=text_config(config, path),
        model=model,
        tensors={name: tensors[name] for name in model.specs},
        unpack=_unpack(base, adapter, model, scratch) if own else base.unpack,
        notes=(*base.notes, "; ".join(notes)),
        bases={**{name: base.tensors[name] for name in new}, **base.bases},
    )


def _unpack(base: Checkpoint, adapter: Adapter, model: Model, scratch: Path | None) -> Callable[[], Unpacked]:
    """A function that composes the base's settings with the adapter's in their place, once."""

    def fill(target: Path, own: Path) -> None:
        for source in (own, adapter.path):
            for name in assets.FILES:
                if (source / name).is_file():
                    shutil.copyfile(source / name, target / name)
        with reading.uncollected():
            tokenizer = reading.read_tokenizer(target / assets.TOKENIZER)
            composed = assets.compose(target, tokenizer, asked_of_tokens(model))
        for name, text in composed.files.items():
            if text:
                (target / name).write_text(text, "utf-8")
            else:  # its content is in another file now
                (target / name).unlink(missing_ok=True)
        assets.write_notes(composed, target)

    mark = hashlib.sha256(f"{base.facts()}{adapter.digest()}".encode()).hexdigest()[:16]

    @cache
    def unpack() -> Unpacked:
        own = base.assets  # made before the place is locked for this
        return unpacking(lambda target: fill(target, own), lambda: mark, scratch)()

    return unpack


def is_shared(base: Checkpoint, module: str) -> bool:
    """Whether a module would make keys or values in a layer that reads those of another one: no program calls it."""
    role, layer = CANONICAL.find(f"{module}.weight") or (None, None)
    layers = base.architecture.layers
    return role in (Role.K, Role.V) and layer is not None and layer < len(layers) and not layers[layer].owns_cache
