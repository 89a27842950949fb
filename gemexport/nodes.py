"""The steps of a run, each a function that a process of its own calls with plain values."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gemexport.exporters.result import Export
from gemexport.facts import activation_differences, differences
from gemexport.formats.activations import Activations
from gemexport.formats.checkpoint import Checkpoint, open_checkpoint
from gemexport.formats.grids import GridIndex, attach, find_grids
from gemexport.formats.recipe import Recipe
from gemexport.formats.tensor import Tensor
from gemexport.formats.vector_codec import Codec
from gemexport.noise import F32_KLD, LAYER_ERROR, LAYER_ERRORS, TIE_NATS, TIES
from gemexport.registry import TARGETS, Target
from gemexport.report import (
    ChatReport,
    DepartureReport,
    Divergence,
    FactReport,
    GreedyReport,
    GridReport,
    LogitsReport,
    TensorReport,
    TokenizerReport,
    WeightsReport,
)
from gemexport.speed import Speedometer, Stopwatch
from gemexport.validators import prompts, tokenizer
from gemexport.validators.reference_store import ReferenceStore
from gemexport.validators.runtime import Logits, Runtime, TopLogits
from gemexport.workspace import SOURCE, VECTORS

if TYPE_CHECKING:
    from gemexport.formats.additive_fit import Record
    from gemexport.validators import divergence
    from gemexport.validators.weights import TensorComparison

Progress = Callable[[int], None]
GREEDY_TOKENS = 32
GREEDY_PROMPT = 48


@dataclass(frozen=True)
class Workplace:
    """The model, and where a run keeps what is not an artefact."""

    model: Path
    work: Path
    tokens: int
    adapter: Path | None = None  # the folder of a LoRA that is merged into the model
    compressed: Path | None = None  # what the node `compress` makes of it, and the formats are made of
    codec: Codec | None = None  # for the per-layer embeddings, where a format holds one

    @property
    def vectors(self) -> Path:
        """Folder of the vector codec's fit."""
        assert self.codec is not None
        return self.work / VECTORS / self.codec.label

    @property
    def grids(self) -> Path:
        """Folder of the scales that the lattice search found."""
        return self.work / "grids"

    def checkpoint(self) -> Checkpoint:
        """The checkpoint as it is; what its file has instead of a tokenizer.json is unpacked once for all steps."""
        return self.plain() if self.compressed is None else open_checkpoint(self.compressed)

    def plain(self) -> Checkpoint:
        """The checkpoint before it was compressed: what the loss is measured against."""
        return open_checkpoint(self.model, self.work / SOURCE, adapter=self.adapter)

    def open(self) -> Checkpoint:
        """The checkpoint with its grids."""
        return attach(self.checkpoint(), self.grids)

    def sequences(self, checkpoint: Checkpoint) -> list[list[int]]:
        """The token sequences that every model is judged on."""
        encode = tokenizer.load(checkpoint.assets / "tokenizer.json")
        return prompts.sequences([encode(text) for text in prompts.prompts()], checkpoint.architecture, self.tokens)

    def store(
        self, digest: str, checkpoint: Checkpoint, tensors: dict[str, Tensor], activations: Activations | None
    ) -> ReferenceStore:
        """The reference's logits with these tensors and static scales of activations, known by their digests."""
        name = f"{digest}-{activations.digest()}" if activations else digest
        return ReferenceStore(
            self.work / "reference" / name, lambda: _reference(checkpoint, tensors, activations=activations)
        )

    def source(self) -> ReferenceStore:
        """The reference's logits with what the checkpoint holds, before it was compressed."""
        checkpoint = self.plain()
        return self.store("source", checkpoint, dict(checkpoint.tensors), model_activations(checkpoint))


def model_activations(checkpoint: Checkpoint) -> Activations | None:
    """The static scales that transformers computes a checkpoint with: it keeps caches in floating point."""
    return checkpoint.activations.without_caches() if checkpoint.activations else None


def prepare() -> None:
    """Load what finding grids and exporting take, before there is a model: mostly the compiled loops."""
    from gemexport.formats import lattice

    lattice.load()


def grids(place: Workplace, recipe: Recipe, progress: Progress) -> GridIndex:
    """Find the grid of every tensor; progress in weights."""
    checkpoint = place.checkpoint()
    checkpoint.unpack()  # before the exports, which would all do it at once
    return find_grids(checkpoint, place.grids, recipe, progress)


def fit_codec(place: Workplace, progress: Progress) -> Record:
    """Fit the vector codec to the per-layer embeddings; progress in weights."""
    from gemexport.formats.additive_fit import find_codec

    assert place.codec is not None
    return find_codec(place.checkpoint(), place.vectors, place.codec, progress)


def export(
    place: Workplace, target: str, variant: str, path: Path, options: dict[str, Any], progress: Progress
) -> Export:
    """Write one artefact; progress in bytes of the source."""
    exporter, (checkpoint, notes) = TARGETS[target].exporter(), opened(place)
    result: Export = exporter.export(checkpoint, path, variant=variant, progress=progress, **options)
    return replace(result, notes=[*notes, *result.notes])


def opened(place: Workplace) -> tuple[Checkpoint, list[str]]:
    """The checkpoint with its grids, and its per-layer embeddings in the codec that was asked for, and notes."""
    checkpoint = place.open()
    if place.codec is None:
        return checkpoint, []
    from gemexport.formats.additive_fit import attach as attach_codec
    from gemexport.formats.additive_fit import read_fit

    coded = read_fit(place.vectors)
    loss = f"its error is {coded.fitted_rms or 0.0:.4g} of its root mean square"
    note = f"{coded.name} is in the vector codec {coded.codec}, as was asked: {loss}"
    return attach_codec(checkpoint, place.vectors), [note]


def reference(place: Workplace, noises: tuple[str, ...], progress: Progress) -> dict[str, Divergence]:
    """Logits of the source's weights in f32, and how far the same weights are from them in other arithmetics.

    Progress in tokens, once for f32 and once for each of `noises`.
    """
    from gemexport.validators import divergence

    checkpoint = place.plain()
    tensors = dict(checkpoint.tensors)
    sequences = place.sequences(checkpoint)
    store = place.source()
    for sequence in sequences:
        store.logits(sequence)
        progress(len(sequence))
    store.close()
    floors = {}
    for arithmetic in noises:
        # Rounding to integers makes two right programs differ, that of caches too, which transformers leaves out.
        rounded = checkpoint.activations if arithmetic == "f32-reordered" else model_activations(checkpoint)
        exact = place.store("source", checkpoint, tensors, rounded)
        noisy = _reference(checkpoint, tensors, arithmetic, rounded)
        total = divergence.Divergence()
        for sequence in sequences:
            total.add(exact.logits(sequence), noisy.logits(sequence), sequence)
            progress(len(sequence))
        noisy.close()
        exact.close()
        floors[arithmetic] = figures(total)
    return floors


def _reference(
    checkpoint: Checkpoint, tensors: dict[str, Tensor], dtype: str = "f32", activations: Activations | None = None
) -> Runtime:
    module = import_module("gemexport.validators.reference")
    runtime: Runtime = module.reference(
        checkpoint.text_config, tensors, _threads(), dtype=dtype, activations=activations
    )
    return runtime


def _threads() -> int:
    return int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))


def check_weights(place: Workplace, target: str, path: Path, progress: Progress) -> tuple[WeightsReport, str]:
    """The weights of an artefact against the source's, and the digest of the values read back; in weights."""
    from gemexport.validators import weights

    stored = TARGETS[target].reader().tensors(path)
    found = weights.compare(place.open().tensors, stored, progress)
    tensors = tuple(_tensor_report(item) for item in found.tensors)
    compared, exact = sum(item.compared for item in tensors), sum(item.exact for item in tensors)
    report = WeightsReport(
        compared=compared,
        exact=exact,
        exact_fraction=exact / max(compared, 1),
        max_relative_error=max((item.max_relative_error for item in tensors), default=0.0),
        missing=found.missing,
        unexpected=found.unexpected,
        tensors=tensors,
    )
    return report, found.digest


def _tensor_report(item: TensorComparison) -> TensorReport:
    return TensorReport(
        name=item.name,
        shape=item.shape,
        dtype=item.dtype,
        source_dtype=item.source_dtype,
        grid=GridReport.of(item.grid),
        source_grid=GridReport.of(item.source_grid),
        compared=item.compared,
        exact=item.exact,
        exact_fraction=item.exact_fraction,
        max_relative_error=item.max_relative_error,
        rms_relative_error=item.rms_relative_error,
        scale_rounded=item.scale_rounded,
        same_scales=item.same_scales,
        requantized=item.requantized,
        codec=item.codec,
        fitted_rms=item.fitted_rms,
    )


@dataclass(frozen=True)
class Validation:
    """What the validator of one artefact measured."""

    weights: WeightsReport
    tokenizer: TokenizerReport | None = None
    chat: ChatReport | None = None
    logits: LogitsReport | None = None
    more_logits: tuple[LogitsReport, ...] = ()
    departs: DepartureReport | None = None  # where the runtime leaves the reference, if it does
    facts: tuple[FactReport, ...] = ()  # that the artefact states otherwise than the checkpoint
    steps: dict[str, float] = field(default_factory=dict)  # seconds by what they were spent on


def validate(place: Workplace, target: str, path: Path, run_logits: bool, progress: Progress) -> Validation:
    """Weights, tokenizer and logits of one artefact; progress in weights, and as many for all sequences."""
    watch = Stopwatch()
    with watch.time("weights"):
        report, digest = check_weights(place, target, path, progress)
    checkpoint = place.open()
    facts = check_facts(checkpoint, target, path)
    if not run_logits or report.missing:
        with watch.time("tokenizer"):
            wording = check_wording(place, checkpoint, path, None)
        return Validation(report, *wording, facts=facts, steps=watch.seconds)
    trial = _Trial(place, checkpoint, TARGETS[target], path, digest, watch)
    try:
        first, *more = [trial.logits(arithmetic, progress) for arithmetic in TARGETS[target].arithmetics]
    finally:
        trial.close()
    tokenizer_report, chat = trial.wording or (None, None)
    return Validation(report, tokenizer_report, chat, first, tuple(more), trial.departs, facts, watch.seconds)


def check_wording(
    place: Workplace, checkpoint: Checkpoint, path: Path, runtime: Runtime | None
) -> tuple[TokenizerReport | None, ChatReport | None]:
    """Tokenizer and chat template of an artefact in its runtime, or read back where there is none."""
    from gemexport.wording import Artifact, Wording

    artifact = Artifact.of(path, place.work)
    if artifact is None:
        return None, None
    wording = Wording(checkpoint)
    return wording.tokenizer(artifact, runtime), wording.chat(artifact, runtime)


def check_facts(checkpoint: Checkpoint, target: str, path: Path) -> tuple[FactReport, ...]:
    """What the artefact states of the decoder and of its static activation scales otherwise than the checkpoint."""
    stated = differences(target, path, checkpoint.architecture)
    return stated + activation_differences(checkpoint.activations, TARGETS[target].activations(path))


class _Trial:
    """One artefact in its runtime."""

    def __init__(
        self, place: Workplace, checkpoint: Checkpoint, target: Target, path: Path, digest: str, watch: Stopwatch
    ) -> None:
        self._watch = watch
        self._checkpoint, self._target, self._path = checkpoint, target, path
        self._place = place
        self._scratch = place.work / "logits" / f"{target.name}-{path.stem}"
        self._sequences = place.sequences(checkpoint)
        stored = dict(target.reader().tensors(path))
        read_back = {name: stored[name] for name in checkpoint.tensors}
        self.wording: tuple[TokenizerReport | None, ChatReport | None] | None = None  # in the first arithmetic
        self.departs: DepartureReport | None = None  # of the first runtime that does, in f32
        self._source = place.source()
        self._read_back = place.store(digest, checkpoint, read_back, target.activations(path))

    def _load(self, arithmetic: str | None) -> Runtime:
        context = max(map(len, self._sequences)) + GREEDY_TOKENS
        options = {} if arithmetic is None else {"arithmetic": arithmetic}
        runtime: Runtime = self._target.adapter().load(self._path, threads=_threads(), context=context, **options)
        return runtime

    def logits(self, arithmetic: str | None, progress: Progress) -> LogitsReport:
        """Run every sequence, then compare with both references.

        The runtime is closed before a reference is loaded: a machine that can hold one model can do this.
        """
        from gemexport.validators import divergence

        watch, speed = self._watch, Speedometer(_threads())
        with watch.time("load"):
            runtime = self._load(arithmetic)
        speed.loaded()
        with watch.time("tokenizer"):
            self.wording = self.wording or check_wording(self._place, self._checkpoint, self._path, runtime)
        outputs = []
        for i, sequence in enumerate(self._sequences):
            with watch.time("run"):
                output = runtime.logits(sequence)
            with watch.time("keep"):
                outputs.append(self._keep(i, output))
            del output  # as large as a model, and not the runtime's memory
            progress(self._share(sequence))
        prompt = self._sequences[0][:GREEDY_PROMPT]
        with watch.time("run"), speed.generating(runtime):
            continuation = runtime.greedy(prompt, GREEDY_TOKENS)
        runtime.close()
        conversion, loss = divergence.Divergence(), divergence.Divergence()
        for sequence, output in zip(self._sequences, outputs, strict=True):
            with watch.time("reference"):
                references = self._read_back.logits(sequence), self._source.logits(sequence)
            with watch.time("compare"):
                conversion.add(references[0], output, sequence)
                loss.add(references[1], output, sequence)
        with watch.time("reference"):
            greedy = self._greedy(prompt, continuation)
        if self.departs is None and runtime.arithmetic == "f32" and not conversion.kld_mean <= F32_KLD:
            with watch.time("walk"):
                self.departs = self._walk(arithmetic)
        return LogitsReport(
            runtime=runtime.name,
            arithmetic=runtime.arithmetic,
            tokens=conversion.positions,
            top_k=outputs[0].ids.shape[1] if isinstance(outputs[0], TopLogits) else None,
            conversion=figures(conversion),
            loss=figures(loss),
            greedy=greedy,
            speed=speed.report(runtime.laps),
        )

    def _walk(self, arithmetic: str | None) -> DepartureReport:
        """The first layer whose output is not the reference's, on the first sequence."""
        from gemexport.validators.layers import departure

        tokens, layers = self._sequences[0], len(self._checkpoint.architecture.layers)
        limit = LAYER_ERRORS.get(self._target.name, LAYER_ERROR)
        runtime = self._load(arithmetic)
        found = runtime.hidden(tokens)
        runtime.close()
        if found is None:
            return DepartureReport(
                layer=None, name="an unknown place: the runtime does not show its layers", limit=limit
            )
        first = departure(found, self._read_back.hidden(tokens), limit)
        if first is None:
            return DepartureReport(layer=layers, name="the logits: after the last layer, which agrees", limit=limit)
        return DepartureReport(layer=first.layer, name=first.name, relative_error=first.relative_error, limit=limit)

    def _share(self, sequence: list[int]) -> int:
        """A sequence's part of the work, in the unit of progress: all sequences weigh as much as all weights."""
        return self._checkpoint.architecture.parameters() * len(sequence) // sum(map(len, self._sequences))

    def _keep(self, index: int, output: Logits) -> Logits:
        """Whole distributions go to the disk, from where they are mapped: they are as large as a model."""
        if isinstance(output, TopLogits):
            return output
        self._scratch.mkdir(parents=True, exist_ok=True)
        path = self._scratch / f"{index}.npy"
        np.save(path, output)
        mapped: Logits = np.load(path, mmap_mode="r")
        return mapped

    def _greedy(self, prompt: list[int], continuation: list[int]) -> GreedyReport:
        """How many of the runtime's tokens the reference would have chosen after the same ones before."""
        judged = self._read_back.logits([*prompt, *continuation])[len(prompt) - 1 : -1]
        chosen = judged[np.arange(len(continuation)), continuation]
        tie = TIES.get(self._target.name, TIE_NATS)
        return GreedyReport(tokens=len(continuation), equal=int((judged.max(axis=1) - chosen <= tie).sum()))

    def close(self) -> None:
        """Free the references and the scratch files."""
        self._source.close()
        self._read_back.close()
        shutil.rmtree(self._scratch, ignore_errors=True)


def figures(total: divergence.Divergence) -> Divergence:
    """A divergence as the report has it."""
    return Divergence(
        kld_mean=total.kld_mean,
        kld_max=total.kld_max,
        top1_agreement=total.top1_agreement,
        perplexity_ratio=total.perplexity_ratio,
    )
