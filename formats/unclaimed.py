"""Tensors that a model's files hold and its decoder's description does not: which may be left out, and which may not.

A decoder with a tensor that nobody computed with is another decoder. Towers and heads of other modalities are parts of
their own, and what every program leaves unused says nothing about the decoder.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from gemexport.formats.gemma.names import CANONICAL, HEAD, LAYERS, module_of
from gemexport.formats.gemma.roles import Role
from gemexport.formats.storage.errors import InputError

_TOP = LAYERS.partition(".")[0]
_DECODER = re.compile(rf"(?:{_TOP}|{re.escape(module_of(HEAD))}|blk|token_embd|per_layer_\w+|output(?:_norm)?)\.")
# Under the same module as the decoder's layers in transformers' multimodal models.
_TOWER = re.compile(rf"{_TOP}\.(?:embed_)?(?:vision|audio|image|video|speech|multi_?modal|mm)(?:[._]|$)")
# Keys and values of a layer that reads those of another one, or has keys for values.
_ATTENTION = CANONICAL.stem(Role.K).partition(".")[0]
_KEYS = re.compile(rf"\.(?:{_ATTENTION}\.[kv]_(?:proj|norm)|attn_[kv](?:_norm)?)\.")
# A head beside a tied table is known to be its copy, and has no bias. Scales are those of activations and caches.
_UNUSED = re.compile(
    rf"^{re.escape(module_of(HEAD))}\.(?!bias$)|(?:^|\.)rotary_emb\."
    r"|[._](?:[qkv]|prob|input|output|activation|cache)(?:_global)?_(?:scale|zero_point)$"
)


def check_unclaimed(path: Path, names: Iterable[str], claimed: Iterable[str]) -> None:
    """Raise InputError for a tensor of the decoder, by its canonical or its GGUF name, that no part of it claims.

    `claimed` are the tensors that the decoder has. Not for those that programs leave unused as well.
    """
    modules = {name.rpartition(".")[0] for name in claimed}
    for name in names:
        unused = _KEYS.search(name) and name.rpartition(".")[0] not in modules
        if _DECODER.match(name) and not (unused or _TOWER.match(name) or _UNUSED.search(name)):
            problem = f"the decoder of the config has no place for the tensor {name}, and would be another without it"
            raise InputError(path, problem, "use the config.json that came with the model")
