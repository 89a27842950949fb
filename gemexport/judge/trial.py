"""One artefact in its runtime: logits against both references, tokenizer, chat, and where it departs if it does."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from gemexport.formats.checkpoint import Checkpoint
from gemexport.formats.gemma.model import EMBEDDING, LOGITS
from gemexport.judge.attempts import Attempts
from gemexport.judge.bounds import LAYER_ERROR, LAYER_ERRORS, f32_limit, tie
from gemexport.judge.speed import Speedometer, Stopwatch
from gemexport.judge.vectors import vector_limit
from gemexport.judge.wording import Wordings, check_wording
from gemexport.registry import Target
from gemexport.shared.measured import (
    DepartureReport,
    GreedyReport,
    LogitsReport,
    SpeedReport,
)
from gemexport.shared.place import Place, Progress, played_by, threads
from gemexport.shared.probes import Sums, probe_of
from gemexport.shared.vectors import VectorDistance, VectorsReport
from gemexport.validators.checks.layers import departure
from gemexport.validators.reference.store import ReferenceStore
from gemexport.validators.runtimes.protocol import Logits, Runtime, TopLogits

Run = LogitsReport | VectorsReport
LIMITS = {LOGITS: f32_limit, EMBEDDING: vector_limit}  # of a runtime in f32, by what a model gives
GREEDY_TOKENS = 32
GREEDY_PROMPT = 48
NO_CACHE = "within --memory the program computes every token anew, and tries neither its cache nor how it loads a model"


@dataclass
class Try:
    """What the runtime gave in one arithmetic: compared already, or kept for the references that are not there yet."""

    adapter: ModuleType
    arithmetic: str | None  # that was asked for
    runtime: Runtime  # closed
    conversion: Any
    loss: Any
    later: list[tuple[Sums, ReferenceStore]] = field(default_factory=list)
    kept: list[Logits] = field(default_factory=list)  # by sequence, if anything is compared later
    top_k: int | None = None
    continuation: list[int] = field(default_factory=list)
    speed: SpeedReport | None = None


class Trial:
    """One artefact in its runtime."""

    def __init__(
        self,
        place: Place,
        checkpoint: Checkpoint,
        target: Target,
        path: Path,
        digest: str,
        watch: Stopwatch,
        attempts: Attempts,
        frugal: bool = False,
    ) -> None:
        self._watch, self._attempts, self._frugal = watch, attempts, frugal
        self._checkpoint, self._target, self._path = checkpoint, target, path
        self._place = place
        self._probe, activations = probe_of(checkpoint.model), target.activations(path)
        self.played = played_by(target.played, checkpoint, activations)
        played = place.floors(self._probe).get(self.played)
        self._limit = LIMITS[self._probe.name](None if played is None else played.mean)
        self._tie = tie(played) if self._probe.continues else 0.0
        self._scratch = place.work / "logits" / f"{target.name}-{path.name}"
        passages = place.passages(checkpoint)
        self._sequences = [passage.tokens for passage in passages]
        self._kinds = [(passage.kind, len(passage.tokens)) for passage in passages]
        self._prompt = self._sequences[0][:GREEDY_PROMPT]
        stored = dict(target.reader().tensors(path))
        read_back = {name: stored[name] for name in checkpoint.tensors}
        self.wording: Wordings | None = None  # in the first arithmetic
        self.departs: DepartureReport | None = None  # of the first runtime that does, in f32
        self._source = place.source()
        self._read_back = place.store(digest, checkpoint, read_back, activations)

    def _load(self, adapter: ModuleType, arithmetic: str | None) -> Runtime:
        context = max(map(len, self._sequences)) + GREEDY_TOKENS
        options = {} if arithmetic is None else {"arithmetic": arithmetic}
        runtime: Runtime = adapter.load(self._path, threads=threads(), context=context, frugal=self._frugal, **options)
        return runtime

    def run(self, adapter: ModuleType, arithmetic: str | None, progress: Progress) -> Try:
        """Every sequence in the program of `adapter`, and what it goes on with after a prompt.

        What a reference has said already is compared at once, for the other the logits are kept. The program is closed
        when this ends, and no reference was held beside it: a machine that can hold the program can do this.
        """
        watch, speed = self._watch, Speedometer(threads())
        with watch.time("load"):
            runtime = self._load(adapter, arithmetic)
        speed.loaded()
        with watch.time("tokenizer"):
            if self.wording is None:
                self.wording = check_wording(self._attempts, self._place.work, self._checkpoint, self._path, runtime)
        found = Try(adapter, arithmetic, runtime, self._probe.sums(self._tie), self._probe.sums())
        now: list[tuple[Sums, ReferenceStore]] = []
        for pair in ((found.conversion, self._read_back), (found.loss, self._source)):
            (now if pair[1].holds(self._sequences) else found.later).append(pair)
        computed = self._probe.ask(runtime, self._sequences)
        for sequence in self._sequences:
            with watch.time("run"):
                output = next(computed)
            found.top_k = output.ids.shape[1] if isinstance(output, TopLogits) else None
            for total, store in now:
                with watch.time("compare"):
                    total.add(store.logits(sequence), output, sequence)
            if found.later:
                with watch.time("keep"):
                    found.kept.append(self._keep(output))
            del output  # as large as a model, and not the runtime's memory
            progress(self._share(sequence))
        if self._probe.continues:
            with watch.time("run"), speed.generating(runtime):
                found.continuation = runtime.greedy(self._prompt, GREEDY_TOKENS)
        if self._probe.continues and not found.continuation:
            self._attempts.leave_out("greedy", NO_CACHE)
        found.speed = speed.report(runtime.laps)
        runtime.close()
        return found

    def judge(self, tries: Sequence[Try]) -> list[Run]:
        """What was run, against both references, which take what is asked of them through their layers in one go."""
        judged = [[*self._prompt, *each.continuation] if each.continuation else [] for each in tries]
        with self._watch.time("reference"):
            self._source.compute(self._sequences)
            self._read_back.compute([*self._sequences, *filter(None, judged)])
        return [self._report(each, tokens) for each, tokens in zip(tries, judged, strict=True)]

    def _report(self, found: Try, judged: list[int]) -> Run:
        """What a runtime gave against both references, which have their logits of it all by now."""
        for total, store in found.later:
            for sequence, output in zip(self._sequences, found.kept, strict=True):
                with self._watch.time("compare"):
                    total.add(store.logits(sequence), output, sequence)
        runtime, conversion = found.runtime, self._probe.figures(found.conversion)
        loss = self._probe.figures(found.loss, self._kinds)
        if self.departs is None and runtime.arithmetic == "f32" and not conversion.mean <= self._limit:
            with self._watch.time("walk"):
                self.departs = self._walk(found)
        if isinstance(conversion, VectorDistance):
            return VectorsReport(
                runtime=runtime.name, arithmetic=runtime.arithmetic, texts=conversion.texts,
                tokens=sum(map(len, self._sequences)), conversion=conversion, loss=loss, speed=found.speed,
            )  # fmt: skip
        return LogitsReport(
            runtime=runtime.name,
            arithmetic=runtime.arithmetic,
            tokens=found.conversion.positions,
            top_k=found.top_k,
            conversion=conversion,
            loss=loss,
            greedy=self._greedy(judged, len(found.continuation)),
            speed=found.speed,
        )

    def _walk(self, departing: Try) -> DepartureReport:
        """The first layer whose output is not the reference's, on the first sequence."""
        tokens, layers = self._sequences[0], len(self._checkpoint.architecture.layers)
        limit = LAYER_ERRORS.get(self._target.name, LAYER_ERROR)
        runtime = self._load(departing.adapter, departing.arithmetic)
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

    def _keep(self, output: Logits) -> Logits:
        """Whole distributions go to the disk, from where they are mapped: they are as large as a model."""
        if isinstance(output, TopLogits):
            return output
        self._scratch.mkdir(parents=True, exist_ok=True)
        path = self._scratch / f"{len(list(self._scratch.iterdir()))}.npy"
        np.save(path, output)
        mapped: Logits = np.load(path, mmap_mode="r")
        return mapped

    def _greedy(self, judged: list[int], count: int) -> GreedyReport | None:
        """How many of the last `count` tokens the reference would have chosen after the same ones before, if any."""
        if not count:
            return None
        expected = self._read_back.logits(judged)[-count - 1 : -1]
        chosen = expected[np.arange(count), judged[-count:]]
        return GreedyReport(tokens=count, equal=int((expected.max(axis=1) - chosen <= self._tie).sum()))

    def close(self) -> None:
        """Free the scratch files."""
        shutil.rmtree(self._scratch, ignore_errors=True)
