"""The model of a run and where its steps find each other's results, as every step is given it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from gemexport.formats.activations import Activations
from gemexport.formats.checkpoint import Checkpoint, open_checkpoint
from gemexport.formats.grids.search import attach
from gemexport.formats.grids.vector_codec import Codec
from gemexport.formats.stamps import NOTHING, Stamps
from gemexport.formats.tensor import Tensor
from gemexport.shared.probes import Probe, probe_of

if TYPE_CHECKING:
    from gemexport.validators.checks.prompts import Passage
    from gemexport.validators.reference import Reference
    from gemexport.validators.reference.arithmetic import Arithmetic
    from gemexport.validators.reference.store import ReferenceStore

Progress = Callable[[int], None]

# The folder for what is no artefact in an output folder, and in it those of steps.
WORK = ".gemexport"
GRIDS = "grids"
ALLOCATED = "grids-allocated"
RANGES = "ranges"
VECTORS = "ple-codec"  # of the vector codec's fit
PLAYED_TOKENS = 128  # of the first sequence, on which another f32 is played
PRECISE = "f64"
UNROUNDED = " without integers"  # behind the name of an f32 that is played without a checkpoint's static scales
FLOORS = "reference/floors.json"  # file in it of what other arithmetics are off by
SOURCE = "source"  # of what is unpacked from a model in one file
JUDGED = "judged"  # of what validators have found so far
FLEETING = ("reference", "logits", JUDGED)  # of one run, which no other may find


@dataclass(frozen=True)
class Place:
    """The model, and where a run keeps what is not an artefact."""

    model: Path
    work: Path
    tokens: int
    adapter: tuple[Path, ...] = ()  # folders of LoRA adapters that are merged into the model, in order
    compressed: Path | None = None  # what the node `compress` makes of it, and the formats are made of
    codec: Codec | None = None  # for the per-layer embeddings, where a format holds one
    allocated: bool = False  # whether widths were chosen for a size or a loss: those grids are others
    stamps: Stamps = NOTHING  # what the files of model and adapter have had since the run opened them

    @property
    def vectors(self) -> Path:
        """Folder of the vector codec's fit."""
        assert self.codec is not None
        return self.work / VECTORS / self.codec.label

    @property
    def grids(self) -> Path:
        """Folder of the scales that the lattice search found, or of those in the widths that were chosen."""
        return self.work / (ALLOCATED if self.allocated else GRIDS)

    def checkpoint(self) -> Checkpoint:
        """The checkpoint as it is; what its file has instead of a tokenizer.json is unpacked once for all steps."""
        return (
            self.plain()
            if self.compressed is None
            else open_checkpoint(self.compressed, self.work / f"{SOURCE}-compressed")
        )

    def plain(self) -> Checkpoint:
        """The checkpoint before it was compressed: what the loss is measured against.

        Raises ChangedError where its files are others by now.
        """
        found = open_checkpoint(self.model, self.work / SOURCE, adapter=self.adapter)
        self.stamps.check()
        return found

    def open(self) -> Checkpoint:
        """The checkpoint with its grids."""
        return attach(self.checkpoint(), self.grids)

    def sequences(self, checkpoint: Checkpoint) -> list[list[int]]:
        """The token sequences that every model is judged on."""
        return [passage.tokens for passage in self.passages(checkpoint)]

    def passages(self, checkpoint: Checkpoint) -> list[Passage]:
        """The same with what kind of text each is of."""
        from gemexport.shared.texts import encoded

        ids, probe = encoded(checkpoint, self.work), probe_of(checkpoint.model)
        return probe.passages(ids, checkpoint.architecture, self.tokens)

    def store(
        self,
        digest: str,
        checkpoint: Checkpoint,
        tensors: dict[str, Tensor],
        activations: Activations | None,
        arithmetic: str = "f32",
    ) -> ReferenceStore:
        """The reference's logits with these tensors and static scales of activations, known by their digests."""
        from gemexport.validators.reference.store import ReferenceStore

        def make() -> Reference:
            from gemexport.validators.reference import reference

            config, kind = checkpoint.text_config, cast("Arithmetic", arithmetic)
            embedder = checkpoint.model.embedder
            return reference(config, tensors, threads(), dtype=kind, activations=activations, embedder=embedder)

        parts = (digest, activations.digest() if activations else "", "" if arithmetic == "f32" else arithmetic)
        return ReferenceStore(self.work / "reference" / "-".join(filter(None, parts)), make)

    def floors(self, probe: Probe) -> dict[str, Any]:
        """What the reference's step has left here: by arithmetic, how far PyTorch is from its own f32."""
        path = self.work / FLOORS
        found: dict[str, Any] = json.loads(path.read_bytes()) if path.is_file() else {}
        return {name: probe.read(figures) for name, figures in found.items()}

    def source(self) -> ReferenceStore:
        """The reference's logits with what the checkpoint holds, before it was compressed."""
        checkpoint = self.plain()
        return self.store("source", checkpoint, dict(checkpoint.tensors), model_activations(checkpoint))


def model_activations(checkpoint: Checkpoint) -> Activations | None:
    """The static scales that transformers computes a checkpoint with: it keeps caches in floating point."""
    return checkpoint.activations.without_caches() if checkpoint.activations else None


def played_of(noises: Collection[str], checkpoint: Checkpoint) -> tuple[str, ...]:
    """What PyTorch plays: these arithmetics, and of a checkpoint with static scales some more.

    Those of f32 without the scales, for a program that leaves them out: integers made of f32 differ a thousand times as
    much. And f64 with them: where PyTorch's own f32 takes another integer, in norms and attention too, sums in another
    order take the same one, and every other program may not.
    """
    if not checkpoint.activations:
        return tuple(noises)
    return (*noises, PRECISE, *(f"{name}{UNROUNDED}" for name in noises if name.startswith("f32")))


def played_by(played: str, checkpoint: Checkpoint, stored: Activations | None) -> str:
    """The name of what a program's f32 is held to: `played`, without integers where the artefact makes none."""
    return f"{played}{UNROUNDED}" if checkpoint.activations and not stored else played


@dataclass(frozen=True)
class Asked:
    """What the exporter of an artefact was asked for."""

    variant: str
    options: dict[str, Any] = field(default_factory=dict)


def opened(place: Place, checkpoint: Checkpoint | None = None) -> tuple[Checkpoint, list[str]]:
    """The checkpoint with its grids, and its per-layer embeddings in the codec that was asked for, and notes.

    A `checkpoint` is one that `place.open` gave.
    """
    checkpoint = checkpoint or place.open()
    if place.codec is None:
        return checkpoint, []
    from gemexport.formats.grids.additive_fit import attach as attach_codec
    from gemexport.formats.grids.additive_fit import read_fit

    coded = read_fit(place.vectors)
    loss = f"its error is {coded.fitted_rms or 0.0:.4g} of its root mean square"
    note = f"{coded.name} is in the vector codec {coded.grid.codec}, as was asked: {loss}"
    return attach_codec(checkpoint, place.vectors), [note]


def threads() -> int:
    """The threads that a step may use."""
    return int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
