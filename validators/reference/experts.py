"""A mixture of experts in a transformers model, its products taken in another way than PyTorch takes them.

transformers keeps experts in tensors of three axes, `gate_up_proj` and `down_proj`, that no linear module holds:
whoever changes how linears compute has to change these beside them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from gemexport.formats.gemma.names import CANONICAL
from gemexport.formats.gemma.roles import Role

_STACKED = CANONICAL.stem(Role.EXPERT_GATE_UP).rpartition(".")[2]  # how a module of experts is known
Linear = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # `x` `[…, in]` and `weight` `[out, in]` to `[…, out]`


def install(model: torch.nn.Module, linear: Linear) -> None:
    """Let every module of experts in `model` compute with `linear` from now on."""
    for module in model.modules():
        if isinstance(getattr(module, _STACKED, None), torch.nn.Parameter):
            module.forward = partial(computed, module, linear)


def computed(module: Any, linear: Linear, x: torch.Tensor, ids: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """`[tokens, hidden]`: what the experts `ids` `[tokens, k]` make of `x` `[tokens, hidden]`, each times its share.

    The loop of transformers' `Gemma4TextExperts.forward`.
    """
    total = torch.zeros_like(x)
    for expert in ids.unique().tolist():
        rows, place = torch.where(ids == expert)
        gate, up = linear(x[rows], module.gate_up_proj[expert]).chunk(2, dim=-1)
        made = linear(module.act_fn(gate) * up, module.down_proj[expert])
        total.index_add_(0, rows, (made * shares[rows, place, None]).to(total.dtype))
    return total
