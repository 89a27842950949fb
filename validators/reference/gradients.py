"""How much a decoder's logits mind what is off inside it: the Fisher information of what passes, layer by layer back.

To second order the KL divergence of logits whose decoder is off by d somewhere is d F d' / 2, where F is the mean of
g g' over what the decoder holds likely, g being the gradient there (Amari 1998). One g a sequence stands for the mean:
the gradient of logits that are weighted at random as softmax is spread. All that waits is on the walk's shelf, and one
layer is held at a time.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from gemexport.formats.tensor import Floats
from gemexport.validators.reference.decoder import by_position
from gemexport.validators.reference.shelf import Shelf
from gemexport.validators.reference.walk import Visit, Walk, head_slices

SEED = 20_260
FEW = 4  # of so many positions one is looked at for what a rounding of the head costs
Rounding = Callable[[Floats], Floats]  # what becomes of rows of the head, `[rows, hidden]`
Watcher = Callable[[str, torch.Tensor, torch.Tensor], None]


class Backwards:
    """The way back through a `walk` that keeps what it passed and has been through all layers.

    `positions` are those of each sequence whose logits count: the gradients are of their mean divergence. `head()`
    comes first, then `layers()`, then `entered()`.
    """

    def __init__(self, walk: Walk, positions: Sequence[Sequence[int]]) -> None:
        self._walk, self._positions = walk, [torch.tensor(list(chosen), dtype=torch.long) for chosen in positions]
        self._count = sum(map(len, positions))

    def head(self, roundings: Mapping[str, Rounding], progress: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Nats a position that each rounding of the head's rows costs; leaves the gradients of the last layer's output.

        Two passes over the vocabulary, in slices.
        """
        walk, last = self._walk, len(self._walk.modules)
        states = [walk.shelf.get(f"hidden-{last}-{number}")[0] for number in range(len(walk.sequences))]
        rows = torch.cat([state[..., chosen, :] for state, chosen in zip(states, self._positions, strict=True)], -2)
        with walk.head():
            norms = self._log_sums(rows)
            progress()
            gradient, lost = self._noticed(rows, norms, roundings)
        parts = gradient.split([len(chosen) for chosen in self._positions], -2)
        for number, (state, chosen, part) in enumerate(zip(states, self._positions, parts, strict=True)):
            whole = torch.zeros_like(state)
            whole[..., chosen, :] = part
            walk.shelf.put(f"gradient-{number}", whole)
        return lost

    def _log_sums(self, rows: torch.Tensor) -> torch.Tensor:
        """log(sum(e^logits)) of each position, `[positions, 1]`."""
        total = torch.full((rows.shape[-2], 1), -torch.inf, dtype=torch.float64)
        for weight in self._slices():
            with self._walk.computing():
                part = self._logits(weight, rows).double().logsumexp(1, keepdim=True)
            total = torch.logaddexp(total, part)
        return total.float()

    def _noticed(
        self, rows: torch.Tensor, norms: torch.Tensor, roundings: Mapping[str, Rounding]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Gradients of the randomly weighted logits, shaped as `rows`, and what each rounding costs a position.

        With e = 1 or -1 at random, the weights s = sqrt(p) e - p sum(sqrt(p) e) have the covariance of softmax.
        """
        chance = torch.Generator().manual_seed(SEED)
        rows = rows.clone().requires_grad_()
        spread, mean = torch.zeros_like(rows), torch.zeros_like(rows)
        sums, few_rows = torch.zeros(rows.shape[-2], 1), rows.detach()[..., ::FEW, :]
        moments = {name: torch.zeros(2, few_rows.shape[-2], dtype=torch.float64) for name in roundings}
        for weight in self._slices():
            with self._walk.computing(gradients=True):
                logits = self._logits(weight, rows)
                share = (logits.detach() - norms).exp()
                signs = torch.randint(0, 2, share.shape, generator=chance, dtype=torch.int8).mul_(2).sub_(1)
                weighted = share.sqrt() * signs
                sums += weighted.sum(1, keepdim=True)
                spread += torch.autograd.grad(logits, rows, weighted, retain_graph=True)[0]
                mean += torch.autograd.grad(logits, rows, share)[0]
            for name, rounding in roundings.items():
                rounded = torch.from_numpy(rounding(weight.numpy()))
                with self._walk.computing():
                    off = self._logits(rounded, few_rows) - logits.detach()[::FEW]
                    few = share[::FEW]
                    moments[name] += torch.stack([(few * off).sum(1), (few * off * off).sum(1)])
        lost = {name: float((square - first * first).mean() / 2) for name, (first, square) in moments.items()}
        return (spread - sums * mean).detach(), lost

    def _slices(self) -> Iterator[torch.Tensor]:
        """The head, some rows at a time."""
        decoder = self._walk.decoder
        for start, stop in head_slices(decoder.head.shape):
            yield decoder.read(decoder.head, start, stop)

    def _logits(self, weight: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Logits `[positions, ids]` for rows of the head, of what the last layer gave, `[…, positions, hidden]`."""
        model = self._walk.decoder.model
        model.lm_head.weight = torch.nn.Parameter(weight, requires_grad=False)
        found: torch.Tensor = model(inputs_embeds=rows, use_cache=False).logits[0]
        return found

    def layers(self, watcher: Watcher, progress: Callable[[], None] = lambda: None) -> None:
        """Show `watcher` every matrix of the layers on the way back, once a sequence.

        Its name, what it was multiplied with `[n, in]`, and the gradient of what it gave `[n, out]`.
        """
        for index in reversed(range(len(self._walk.modules))):
            module = self._walk.modules[index]
            with self._walk.decoder.filled(module):
                visit = Visit(self._walk, index, module, self._walk.decoder.name(module))
                for number in range(len(self._walk.sequences)):
                    with _watched(visit, watcher):
                        self._back(visit, number)
            progress()

    def _back(self, visit: Visit, number: int) -> None:
        """Take a sequence's gradients through one layer, from what it gave to what it was given."""
        walk, shelf, index = self._walk, self._walk.shelf, visit.index
        (hidden,) = shelf.get(f"hidden-{index}-{number}")
        inputs = shelf.get(f"inputs-{index}-{number}")
        leaves = [hidden, *(item for item in inputs if item is not None)]
        for leaf in leaves:
            leaf.requires_grad_()
        options = _own(walk.given[len(walk.sequences[number])][index])
        states = _States(shelf, number)
        if "shared_kv_states" in options:
            options["shared_kv_states"] = states
        with self._walk.computing(gradients=True):
            output = visit.module(hidden, **dict(zip(walk.names[index], inputs, strict=True)), **options)
            (wanted,) = shelf.get(f"gradient-{number}")
            torch.autograd.backward(*states.targets(output, wanted))
        shelf.put(f"gradient-{number}", hidden.grad)
        if inputs:
            shelf.put(f"inputs-gradient-{index}-{number}", *(None if item is None else item.grad for item in inputs))
        states.keep()

    def entered(self, other: Walk) -> float:
        """Nats a position that it costs where what enters the layers is what enters those of `other`.

        What a token is off by is the same wherever it stands: its places are taken together.
        """
        total = 0.0
        for number, tokens in enumerate(self._walk.sequences):
            ids = torch.tensor(tokens)
            total += self._off(other, f"hidden-0-{number}", f"gradient-{number}", ids)
            for index in range(len(self._walk.modules)):
                total += self._off(other, f"inputs-{index}-{number}", f"inputs-gradient-{index}-{number}", ids)
        return total / (2 * self._count)

    def _off(self, other: Walk, name: str, gradient: str, ids: torch.Tensor) -> float:
        """The sum over tokens of (g d)^2 over what waits under a name, `[1, n, width]`."""
        total = 0.0
        mine, theirs, gradients = self._walk.shelf.get(name), other.shelf.get(name), self._walk.shelf.get(gradient)
        places = ids.unique(return_inverse=True)[1]
        for ours, rounded, found in zip(mine, theirs, gradients, strict=True):
            if ours is not None and found is not None:
                noticed = by_position((rounded - ours) * found).double()
                together = torch.zeros(int(places.max()) + 1, noticed.shape[-1], dtype=torch.float64)
                total += float(together.index_add_(0, places, noticed).square().sum())
        return total


class _States(UserDict[str, Any]):
    """The keys and values that layers share, on the way back: what is read is a leaf, what is written an output."""

    def __init__(self, shelf: Shelf, number: int) -> None:
        super().__init__()
        self._shelf, self._number = shelf, number
        self._read: dict[str, list[torch.Tensor]] = {}
        self._written: dict[str, tuple[torch.Tensor, ...]] = {}

    def __getitem__(self, kind: str) -> Any:
        if kind in self._written:
            return self._written[kind]
        if kind not in self._read:
            self._read[kind] = [state.requires_grad_() for state in self._shelf.get(f"states-{self._number}-{kind}")]
        return tuple(self._read[kind])

    def __setitem__(self, kind: str, states: Any) -> None:
        self._written[kind] = tuple(states)

    def targets(self, output: torch.Tensor, gradient: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """What the layer gave, keys and values too, and the gradient of each."""
        outputs, gradients = [output], [gradient]
        for kind, states in self._written.items():
            for state, found in zip(states, self._shelf.get(self._name(kind)), strict=False):
                outputs.append(state)
                gradients.append(found)
        return outputs, gradients

    def keep(self) -> None:
        """Add what those who read these keys and values mind of them."""
        for kind, states in self._read.items():
            before = self._shelf.get(self._name(kind)) or [0.0] * len(states)
            self._shelf.put(self._name(kind), *(s.grad + found for s, found in zip(states, before, strict=True)))

    def _name(self, kind: str) -> str:
        return f"states-gradient-{self._number}-{kind}"


@contextmanager
def _watched(visit: Visit, watcher: Watcher) -> Iterator[None]:
    """Show `watcher` the matrices of a layer, when gradients reach what they give."""

    def hook(name: str) -> Any:
        def note(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            x = inputs[0].detach().flatten(0, -2)
            output.register_hook(lambda gradient: watcher(name, x, gradient.flatten(0, -2)))

        return note

    with ExitStack() as held:
        for name, matrix in visit.matrices.items():
            held.callback(matrix.register_forward_hook(hook(name)).remove)
        yield


def _own(value: Any) -> Any:
    """Tensors that were made where nothing is kept for gradients, as ones that may be."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, (tuple, list)):
        return type(value)(_own(item) for item in value)
    return {name: _own(item) for name, item in value.items()} if type(value) is dict else value
