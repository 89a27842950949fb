"""One artefact in its runtime: logits against both references, tokenizer, chat, and where it departs if it does."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import ModuleType

import numpy as np

from gemexport.formats.checkpoint import Checkpoint
from gemexport.judge.bounds import F32_KLD, LAYER_ERROR, LAYER_ERRORS, TIE_NATS, TIES
from gemexport.judge.speed import Speedometer, Stopwatch
from gemexport.judge.wording import check_wording
from gemexport.registry import Target
from gemexport.shared.measured import (
    ChatReport,
    DepartureReport,
    GreedyReport,
    LogitsReport,
    TokenizerReport,
)
from gemexport.shared.measured import Divergence as Figures
from gemexport.shared.place import Place, Progress, threads
from gemexport.validators.checks.divergence import Divergence
from gemexport.validators.checks.layers import departure
from gemexport.validators.reference.store import ReferenceStore
from gemexport.validators.runtimes.protocol import Logits, Runtime, TopLogits

GREEDY_TOKENS = 32
GREEDY_PROMPT = 48


class Trial:
    """One artefact in its runtime."""

    def __init__(
        self, place: Place, checkpoint: Checkpoint, target: Target, path: Path, digest: str, watch: Stopwatch
    ) -> None:
        self._watch = watch
        self._checkpoint, self._target, self._path = checkpoint, target, path
        self._place = place
        self._tie = TIES.get(target.name, TIE_NATS)
        self._scratch = place.work / "logits" / f"{target.name}-{path.name}"
        self._sequences = place.sequences(checkpoint)
        stored = dict(target.reader().tensors(path))
        read_back = {name: stored[name] for name in checkpoint.tensors}
        self.wording: tuple[TokenizerReport | None, ChatReport | None] | None = None  # in the first arithmetic
        self.departs: DepartureReport | None = None  # of the first runtime that does, in f32
        self._source = place.source()
        self._read_back = place.store(digest, checkpoint, read_back, target.activations(path))

    def _load(self, adapter: ModuleType, arithmetic: str | None) -> Runtime:
        """The artefact's runtime; no reference is held beside it: a machine that can hold one model can do this."""
        self._free_references()
        context = max(map(len, self._sequences)) + GREEDY_TOKENS
        options = {} if arithmetic is None else {"arithmetic": arithmetic}
        runtime: Runtime = adapter.load(self._path, threads=threads(), context=context, **options)
        return runtime

    def logits(self, adapter: ModuleType, arithmetic: str | None, progress: Progress) -> LogitsReport:
        """Run every sequence in the program of `adapter` and compare with both references.

        One model is loaded at a time, a reference or the runtime. So what a reference has said already is compared at
        once, and for the other the runtime's logits are kept.
        """
        watch, speed = self._watch, Speedometer(threads())
        with watch.time("load"):
            runtime = self._load(adapter, arithmetic)
        speed.loaded()
        with watch.time("tokenizer"):
            self.wording = self.wording or check_wording(self._place.work, self._checkpoint, self._path, runtime)
        conversion, loss = Divergence(tie=self._tie), Divergence()
        judged = ((loss, self._source), (conversion, self._read_back))  # which then judges the continuation too
        now: list[tuple[Divergence, ReferenceStore]] = []
        later: list[tuple[Divergence, ReferenceStore]] = []
        for pair in judged:
            (now if pair[1].holds(self._sequences) else later).append(pair)
        kept: list[tuple[list[int], Logits]] = []
        top_k = None
        for i, sequence in enumerate(self._sequences):
            with watch.time("run"):
                output = runtime.logits(sequence)
            top_k = output.ids.shape[1] if isinstance(output, TopLogits) else None
            for total, store in now:
                with watch.time("compare"):
                    total.add(store.logits(sequence), output, sequence)
            if later:
                with watch.time("keep"):
                    kept.append((sequence, self._keep(i, output)))
            del output  # as large as a model, and not the runtime's memory
            progress(self._share(sequence))
        prompt = self._sequences[0][:GREEDY_PROMPT]
        with watch.time("run"), speed.generating(runtime):
            continuation = runtime.greedy(prompt, GREEDY_TOKENS)
        runtime.close()
        for total, store in later:
            self._free_references()
            for sequence, output in kept:
                with watch.time("reference"):
                    expected = store.logits(sequence)
                with watch.time("compare"):
                    total.add(expected, output, sequence)
        with watch.time("reference"):
            greedy = self._greedy(prompt, continuation)
        if self.departs is None and runtime.arithmetic == "f32" and not conversion.kld_mean <= F32_KLD:
            with watch.time("walk"):
                self.departs = self._walk(adapter, arithmetic)
        return LogitsReport(
            runtime=runtime.name,
            arithmetic=runtime.arithmetic,
            tokens=conversion.positions,
            top_k=top_k,
            conversion=Figures.of(conversion),
            loss=Figures.of(loss),
            greedy=greedy,
            speed=speed.report(runtime.laps),
        )

    def _walk(self, adapter: ModuleType, arithmetic: str | None) -> DepartureReport:
        """The first layer whose output is not the reference's, on the first sequence."""
        tokens, layers = self._sequences[0], len(self._checkpoint.architecture.layers)
        limit = LAYER_ERRORS.get(self._target.name, LAYER_ERROR)
        runtime = self._load(adapter, arithmetic)
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
        return GreedyReport(tokens=len(continuation), equal=int((judged.max(axis=1) - chosen <= self._tie).sum()))

    def _free_references(self) -> None:
        self._source.close()
        self._read_back.close()

    def close(self) -> None:
        """Free the references and the scratch files."""
        self._free_references()
        shutil.rmtree(self._scratch, ignore_errors=True)
