"""LoRA adapters of PEFT beside a base checkpoint, merged row by row as it is read: w + scaling * B @ A, in float32.

Several are merged one into what the other made, in the order in which they are given.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from gemexport.formats.checkpoint import Checkpoint
from gemexport.formats.gemma.names import EMBEDDING, HEAD, module_of
from gemexport.formats.lora.folder import CONFIG, WEIGHTS, open_adapter
from gemexport.formats.lora.product import Factors, MergedTensor
from gemexport.formats.lora.tables import UNTIE, is_shared, with_tables
from gemexport.formats.storage.errors import InputError
from gemexport.formats.tensor import Tensor

__all__ = ["CONFIG", "WEIGHTS", "adapted"]

_TOWER = re.compile(r"vision|audio|projector")


def adapted(found: Checkpoint, folder: Path, scratch: Path | None) -> Checkpoint:
    """The checkpoint `found` with the adapter in `folder` merged in, and notes that say so.

    A tokenizer that comes with other tables of embeddings is composed in `scratch`.

    Raises InputError for what `open_adapter` refuses, and for an adapter of another base: one that changes what the
    base does not have, in other shapes, or that brings other embeddings along.
    """
    adapter = open_adapter(folder, found.model.family)
    base = with_tables(found, adapter, scratch)
    merged: dict[str, Tensor] = {}
    towers, shared = 0, list[str]()
    for module, factors in adapter.modules.items():
        tensor = base.tensors.get(f"{module}.weight")
        if tensor is None and _TOWER.search(module):
            towers += 1
        elif is_shared(base, module):
            shared.append(module)
        else:
            merged[f"{module}.weight"] = MergedTensor(_fitting(base, module, tensor, factors, folder), factors)
    name = folder.resolve().name
    notes = [f"the adapter {name} is merged into {len(merged)} matrices, in f32"]
    if towers:
        notes.append(f"the adapter's changes to {towers} modules of towers are left out")
    if shared:
        unused = "whose layers read the keys and values of another one and never compute them"
        notes.append(f"the adapter's changes to {len(shared)} modules are left out, {unused}: {', '.join(shared[:4])}")
    if base.architecture.tied and module_of(EMBEDDING) in adapter.modules:
        notes.append("the output head is the embedding table, and changes with it as in peft's merge_and_unload")
    return replace(
        base,
        name=f"{base.name}-{name}",
        tensors={**base.tensors, **merged},
        notes=(*base.notes, *notes),
        adapter="-".join(filter(None, (found.adapter, adapter.digest()))),
        bases={**{name: base.tensors[name] for name in merged}, **base.bases},
    )


def _fitting(base: Checkpoint, module: str, tensor: Tensor | None, factors: Factors, folder: Path) -> Tensor:
    """The base's tensor that a module's product is added to; InputError when there is none of that shape."""
    remedy = "give the base that the adapter was made for"
    if tensor is None:
        problem = "which the base does not have"
        if module == module_of(HEAD) and base.architecture.tied:
            problem = "which is the embedding table here: the embedding would change with it"
            remedy = UNTIE
        raise InputError(folder / WEIGHTS, f"the adapter changes {module}, {problem}", remedy)
    if factors.shape != tensor.shape:
        problem = f"the factors of {module} make {list(factors.shape)}, the base has {list(tensor.shape)}"
        raise InputError(folder / WEIGHTS, problem, remedy)
    return tensor
