"""Artefacts without a fault, over seeds, shapes and formats: the validator must say nothing about any of them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gemexport import demo
from gemexport.demo.qat import RULES
from gemexport.faults.matrix import COLUMNS, Bench
from gemexport.shared.measured import LogitsReport

RULED = (*sorted(RULES), None)  # None: weights on no grid, which every format has to quantize


@dataclass(frozen=True)
class Clean:
    """A fault-free artefact and what the validator said of it."""

    seed: int
    model: str
    target: str
    variant: str
    status: str
    reason: str
    logits: tuple[LogitsReport, ...] = ()


def random_size(stream: np.random.Generator) -> demo.Size:
    """A small decoder: widths, heads, head size and window drawn; every row is a whole number of blocks."""
    kv_heads = int(stream.integers(1, 3))
    vocab, hidden = int(stream.choice([512, 544, 640])), int(stream.choice([64, 96, 128]))
    intermediate, group = int(stream.choice([96, 128, 160])), int(stream.integers(1, 4))
    # transformers wants a whole number of heads in the width, although heads have a size of their own.
    while hidden % (kv_heads * group):
        group -= 1
    return demo.Size(
        vocab=vocab,
        hidden=hidden,
        intermediate=intermediate,
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=int(stream.choice([32, 64])),
        per_layer=32,
        window=int(stream.integers(4, 24)),
    )


def fault_free(
    work: Path, seeds: range, tokens: int = 80, columns: tuple[tuple[str, str], ...] = COLUMNS
) -> Iterator[Clean]:
    """Make a model for each seed, export it into every column, judge each; `work` is left empty."""
    for seed in seeds:
        stream = np.random.default_rng(seed)
        family: demo.FamilyName = "gemma4" if seed % 2 == 0 else "gemma3"
        size, rule = random_size(stream), RULED[seed % len(RULED)]
        folder = work / f"seed-{seed}"
        model = demo.make(folder / "model", family=family, size=size, seed=seed, rule=rule)
        bench = Bench(model, folder / "work", tokens)
        heads = f"{size.heads}:{size.kv_heads} × {size.head_dim}"
        label = f"{family} {size.hidden}/{size.intermediate}, {heads}, {rule}"
        for target, variant in columns:
            found, status, reason = bench.measure(target, variant, bench.clean(target, variant))
            logits = (found.logits, *found.more_logits) if found is not None and found.logits is not None else ()
            yield Clean(seed, label, target, variant, status, reason, logits)
        shutil.rmtree(folder)
