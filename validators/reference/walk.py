"""All sequences through a decoder, a layer at a time: no more than one layer is held, whatever the model's size.

transformers' own model says what a layer is given besides hidden states (masks, positions, per-layer inputs): it runs
with layers that only take note. Then each layer is filled in turn and all sequences go through it. Hidden states,
per-layer inputs, and the keys and values that later layers share wait on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from gemexport.formats.gemma.names import CANONICAL
from gemexport.formats.gemma.roles import Role
from gemexport.validators.reference.arithmetic import computing
from gemexport.validators.reference.decoder import Decoder, by_position
from gemexport.validators.reference.shelf import SharedStates, Shelf

Watcher = Callable[[str, torch.Tensor], None]  # a matrix's name, and what it is multiplied with, `[…, in]`
# Rows of the head are read so many bytes at a time, as f32. In multiples of 1024 rows its products are, bit for bit,
# those of the whole matrix: MKL takes the same kernels for them.
HEAD_BYTES, HEAD_ROWS = 64 << 20, 1024


class Walk:
    """`sequences` on their way through `decoder`, with `folder` to wait in, which is theirs alone.

    `layers()` comes first, `logits()` after it; each can be had once.
    """

    def __init__(
        self,
        decoder: Decoder,
        sequences: Sequence[Sequence[int]],
        folder: Path,
        arithmetic: str,
        threads: int,
        keeps: bool = False,
    ) -> None:
        self.decoder, self._arithmetic, self._threads = decoder, arithmetic, threads
        self.modules = list(decoder.text.layers)
        self.keeps = keeps  # what went into each layer, for who goes back
        self.sequences = [list(sequence) for sequence in sequences]
        self.shelf = Shelf(folder)
        self.given: dict[int, list[dict[str, Any]]] = {}  # to each layer, by the length of the sequence
        self._enter()

    def _enter(self) -> None:
        """What goes into the first layer, and what each layer is given beside what the one before gave."""
        text = self.decoder.text
        notes = [_Note(module) for module in self.modules]
        norm, text.norm, text.layers = text.norm, torch.nn.Identity(), torch.nn.ModuleList(notes)
        later = {*self.decoder.embeddings, *_LATER}
        with self.computing(), ExitStack() as held:
            for name, module in text.named_children():
                if name not in later:
                    held.enter_context(self.decoder.filled(module))
            for number, tokens in enumerate(self.sequences):
                ids, places = np.unique(tokens, return_inverse=True)
                for name in self.decoder.embeddings:
                    setattr(text, name, self.decoder.table(name, ids.tolist()))
                text(input_ids=torch.from_numpy(places)[None], use_cache=False)
                self.shelf.put(f"hidden-0-{number}", notes[0].hidden)
                for index, note in enumerate(notes):
                    self.shelf.put(f"inputs-{index}-{number}", *note.inputs)
                if len(tokens) not in self.given:
                    self.given[len(tokens)] = [note.options for note in notes]
        self.names = [note.names for note in notes]
        text.norm, text.layers = norm, torch.nn.ModuleList(self.modules)
        for name, module in self.decoder.embeddings.items():
            setattr(text, name, module)

    def layers(self) -> Iterator[Visit]:
        """Each layer in order, filled while it is the one; who asks for no outputs of it gets them computed anyhow."""
        for index in range(len(self.modules)):
            with self.layer(index) as visit:
                yield visit

    @contextmanager
    def layer(self, index: int, weights: Mapping[str, torch.Tensor] | None = None) -> Iterator[Visit]:
        """The layer of this index, the one after the last, filled as long as the block lasts; with these weights, if
        they were read already.
        """
        module = self.modules[index]
        with self.decoder.filled(module, weights):
            visit = Visit(self, index, module, self.decoder.name(module))
            yield visit
            visit.finish()

    def embedded(self) -> Iterator[torch.Tensor]:
        """What goes into the first layer, `[n, width]` of each sequence, until the first layer is done with."""
        for number in range(len(self.sequences)):
            yield by_position(self.shelf.get(f"hidden-0-{number}")[0])

    def logits(self) -> Iterator[tuple[int, int, int, torch.Tensor]]:
        """Slices of the vocabulary: (sequence, first token id, last and one, logits `[n, ids]` in f32)."""
        with self.head():
            for start, stop in head_slices(self.decoder.head.shape):
                weight = self.decoder.read(self.decoder.head, start, stop)
                for number, found in self.slice(weight):
                    yield number, start, stop, found

    def last(self) -> Iterator[torch.Tensor]:
        """What the head is multiplied with, `[n, hidden]` of each sequence in turn; `layers()` comes before it."""
        with self.filled(_Last(self.decoder.text)) as last:
            for number in range(len(self.sequences)):
                (hidden,) = self.shelf.get(f"hidden-{len(self.modules)}-{number}")
                with self.computing():
                    found = last.normed(hidden)
                yield found[0]

    def vectors(self) -> Iterator[torch.Tensor]:
        """What becomes of each sequence after the last layer: a vector `[size]` in f32, of length 1."""
        decoder, last = self.decoder, len(self.modules)
        with self.filled(_Last(decoder.text)) as end, ExitStack() as held:
            for module in decoder.dense:
                held.enter_context(decoder.filled(module))
            for number in range(len(self.sequences)):
                with self.computing():
                    (hidden,) = self.shelf.get(f"hidden-{last}-{number}")
                    found = end.normed(hidden)[0].mean(0, keepdim=True)
                    for linear in decoder.dense:
                        found = linear(found)
                    found = torch.nn.functional.normalize(found)[0].float()
                yield found

    @contextmanager
    def head(self) -> Iterator[None]:
        """What comes after the layers, ready for slices of the head's rows as long as the block lasts."""
        decoder, model = self.decoder, self.decoder.model
        with self.filled(_Last(decoder.text)) as last:
            model.model = last
            yield
            model.lm_head.to_empty(device="meta")
            model.model = decoder.text

    @contextmanager
    def filled(self, last: _Last) -> Iterator[_Last]:
        """What comes after the layers with its weights, as long as the block lasts."""
        with ExitStack() as held:
            for module in last.children():
                held.enter_context(self.decoder.filled(module))
            yield last

    def slice(self, weight: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """With these rows of the head `[ids, hidden]`: each sequence, and its logits `[n, ids]` in f32."""
        model, last = self.decoder.model, len(self.modules)
        model.lm_head.weight = torch.nn.Parameter(weight.to(self.decoder.dtype), requires_grad=False)
        for number in range(len(self.sequences)):
            with self.computing():
                (hidden,) = self.shelf.get(f"hidden-{last}-{number}")
                found = model(inputs_embeds=hidden, use_cache=False).logits[0].float()
            yield number, found

    @contextmanager
    def computing(self, gradients: bool = False) -> Iterator[None]:
        """Compute as the reference does, for as long as the block lasts, keeping things for gradients if asked."""
        with computing(self._arithmetic, self._threads, gradients):
            yield


def head_slices(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ranges of rows that cover a head `[vocab, hidden]`."""
    vocab, width = shape
    rows = max(HEAD_ROWS, HEAD_BYTES // (4 * width) // HEAD_ROWS * HEAD_ROWS)
    for start in range(0, vocab, rows):
        yield start, min(start + rows, vocab)


class Visit:
    """One layer with its weights: `index` from 0, `module`, transformers' own, and `matrices`, its linears by name."""

    def __init__(self, walk: Walk, index: int, module: torch.nn.Module, name: str) -> None:
        self.index, self.module = index, module
        self.matrices = {
            f"{name}.{inner}.weight": linear
            for inner, linear in module.named_modules()
            if isinstance(linear, torch.nn.Linear)
        }
        self._walk = walk
        self._done = False

    def outputs(self) -> Iterator[torch.Tensor]:
        """What the layer makes of each sequence in turn, `[n, width]`; the next layer is given what came last.

        Can be asked for again, with `watch` or after the weights of `module` were changed.
        """
        for number in range(len(self._walk.sequences)):
            output = self._output(number)
            self._walk.shelf.put(f"hidden-{self.index + 1}-{number}", output)
            yield by_position(output)
        self._done = True

    def inputs(self, name: str) -> Iterator[torch.Tensor]:
        """What the matrix `name` is multiplied with, `[n, in]` of each sequence in turn; nothing beyond is computed.

        ValueError for a matrix that the layer does not multiply with.
        """

        def stop(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            raise _Reached(inputs[0][0])

        for number in range(len(self._walk.sequences)):
            hook = self.matrices[name].register_forward_pre_hook(stop)
            try:
                self._output(number)
            except _Reached as reached:
                found = reached.found
            else:
                raise ValueError(f"{name} is multiplied with nothing")
            finally:
                hook.remove()
            yield found

    def together(self) -> list[list[str]]:
        """The names of the matrices in the order of use, those of one input together."""
        found: list[list[str]] = []
        last: list[torch.Tensor] = []

        def note(name: str, x: torch.Tensor) -> None:
            if last and last[0] is x:
                found[-1].append(name)
            else:
                found.append([name])
                last[:] = [x]

        with self.watch(note):
            self._output(0)
        return found

    def _output(self, number: int) -> torch.Tensor:
        """`[1, n, hidden]` of one sequence, or `[streams, 1, n, hidden]`."""
        walk = self._walk
        options = dict(walk.given[len(walk.sequences[number])][self.index])
        if "shared_kv_states" in options:
            options["shared_kv_states"] = SharedStates(walk.shelf, number)
        (hidden,) = walk.shelf.get(f"hidden-{self.index}-{number}")
        with walk.computing():
            inputs = zip(walk.names[self.index], walk.shelf.get(f"inputs-{self.index}-{number}"), strict=True)
            output: torch.Tensor = self.module(hidden, **dict(inputs), **options)
        return output

    @contextmanager
    def watch(self, watcher: Watcher) -> Iterator[None]:
        """Show `watcher` what each matrix of the layer is multiplied with, under the name of the matrix."""

        def hook(name: str) -> Any:
            return lambda _, inputs: watcher(name, inputs[0])

        hooks = [module.register_forward_pre_hook(hook(name)) for name, module in self.matrices.items()]
        try:
            yield
        finally:
            for installed in hooks:
                installed.remove()

    def finish(self) -> None:
        """See to it that the next layer has its inputs, and forget this one's, unless the walk keeps them."""
        if not self._done:
            for _ in self.outputs():
                pass
        if self._walk.keeps:
            return
        for number in range(len(self._walk.sequences)):
            self._walk.shelf.drop(f"hidden-{self.index}-{number}")
            self._walk.shelf.drop(f"inputs-{self.index}-{number}")


_GATHERINGS = CANONICAL.template(Role.FIRST_GATHERING).split(".")[1]
_LATER = ("layers", "norm", "rotary_emb")  # what of the model is not needed before the first layer


class _Reached(Exception):
    """A layer was computed as far as was asked: `found` is what was looked for."""

    def __init__(self, found: torch.Tensor) -> None:
        super().__init__()
        self.found = found


class _Note(torch.nn.Module):
    """In the place of the layer `module`: passes hidden states on, and keeps what else the layer would have been given.

    What is given by position (per-layer inputs) differs between sequences, what is given by name between lengths alone;
    so do angles, which are a pair of tensors wherever they are given. `names` are those of the `inputs`.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self._parameters_of_layer = list(signature(module.forward).parameters)[1:]

    def forward(self, hidden: torch.Tensor, *inputs: Any, **options: Any) -> torch.Tensor:
        given = dict(zip(self._parameters_of_layer, inputs, strict=False))
        angles = {name: value for name, value in given.items() if isinstance(value, tuple)}
        self.names = [name for name in given if name not in angles]
        self.hidden, self.inputs, self.options = hidden, [given[name] for name in self.names], options | angles
        return hidden


class _Last(torch.nn.Module):
    """In the model's place before its head: what went through all layers, its streams one again, and the last norm."""

    def __init__(self, text: Any) -> None:
        super().__init__()
        self.norm: torch.nn.Module = text.norm
        self.gatherings: Any = getattr(text, _GATHERINGS, torch.nn.ModuleList())

    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[1, n, hidden]`, which the head is multiplied with."""
        found: torch.Tensor = self.norm(self._gathered(hidden))
        return found

    def _gathered(self, hidden: torch.Tensor) -> torch.Tensor:
        """The mean of the streams, each as large as the first; what `Gemma3nTextModel.forward` ends with."""
        if not len(self.gatherings):
            return hidden
        wanted = torch.mean(hidden[0] ** 2, dim=-1, keepdim=True) ** 0.5
        streams = [hidden[0]]
        for stream, linear in zip(hidden[1:], self.gatherings, strict=True):
            projected = linear(stream)
            size = torch.sqrt(torch.mean(projected**2, dim=-1, keepdim=True).clamp(min=1e-5))
            streams.append(projected * wanted / size)
        return torch.mean(torch.stack(streams), dim=0)

    def forward(self, *, inputs_embeds: torch.Tensor, **_: Any) -> Any:
        rest = dict.fromkeys(("past_key_values", "hidden_states", "attentions", "shared_kv_states", "router_logits"))
        return SimpleNamespace(last_hidden_state=self.normed(inputs_embeds), **rest)
