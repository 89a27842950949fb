"""What a run is asked for, and which artefacts that means."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemexport.compress import FOLDER, Compression, compression
from gemexport.formats.checkpoint import TOKENIZER, Checkpoint, check_tokenizer, checkpoint_name, open_checkpoint
from gemexport.formats.grids.recipe import Recipe, load_recipe
from gemexport.formats.grids.vector_codec import Codec, parse_all
from gemexport.formats.storage.errors import InputError
from gemexport.registry import TARGETS, Target, target
from gemexport.shared.memory import available_memory
from gemexport.shared.place import Place

DEFAULT_TOKENS = 512


@dataclass(frozen=True)
class Request:
    """What a run was asked for."""

    model: Path
    out: Path
    variants: dict[str, tuple[str, ...]]  # by format
    recipe: Recipe
    jobs: int
    memory: int
    tokens: int = DEFAULT_TOKENS
    validate: bool = True
    fresh: bool = False
    options: dict[str, dict[str, Any]] = field(default_factory=dict)  # of exporters, by format
    ple_codecs: tuple[Codec | None, ...] = (None,)  # for the per-layer embeddings, an artefact each
    asked_for: frozenset[str] = frozenset()  # formats named by the user: one that is not installed is an error
    adapter: Path | None = None  # the folder of a LoRA that is merged into the model
    compression: Compression | None = None
    calibration: Path | None = None  # a text file to measure activations on; None: the built-in prompts

    def place(self, work: Path, name: str) -> Place:
        """Where the steps of a run of the model `name` find each other's results."""
        compressed = work / FOLDER / name if self.compression else None
        return Place(self.model, work, self.tokens, self.adapter, compressed)

    def checkpoint(self) -> Checkpoint:
        """The model, with its adapter merged in; its tokenizer is known to be one."""
        checkpoint = open_checkpoint(self.model, adapter=self.adapter)
        if checkpoint.path.is_dir():  # of a model in one file it is made when it is wanted
            check_tokenizer(checkpoint.path / TOKENIZER)
        return checkpoint


def request(
    model: str | Path,
    out: str | Path | None = None,
    formats: list[str] | None = None,
    skip: list[str] | None = None,
    variants: dict[str, tuple[str, ...]] | None = None,
    recipe: str | Recipe = "default",
    jobs: int | None = None,
    memory: int | None = None,
    adapter: str | Path | None = None,
    compress: str | None = None,
    compress_python: str | Path | None = None,
    calibration: str | Path | None = None,
    ple_codec: str | None = None,
    **settings: Any,
) -> Request:
    """A request with what was not said filled in; InputError for what cannot be done."""
    path = Path(model)
    chosen = {name: target(name).variants for name in formats or TARGETS if name not in (skip or [])}
    for name, asked in (variants or {}).items():
        chosen[name] = _checked(target(name), asked)
    if not chosen:
        raise InputError(f"--skip {','.join(skip or [])}", "leaves no format to write", "skip fewer")
    _check_numbers(jobs=(jobs, 1), memory=(memory, 1), tokens=(settings.get("tokens"), 2))
    if calibration is not None and not Path(calibration).is_file():
        raise InputError(calibration, "there is no such file", "give a text file in UTF-8")
    merged = None if adapter is None else Path(adapter)
    names = [checkpoint_name(path), *([] if merged is None else [merged.resolve().name])]
    return Request(
        model=path,
        out=Path(out) if out else Path(f"{'-'.join(names)}-gemexport"),
        variants=chosen,
        recipe=recipe if isinstance(recipe, Recipe) else load_recipe(recipe),
        jobs=jobs or os.cpu_count() or 1,
        memory=memory or int(available_memory() * 0.8),
        ple_codecs=(None,) if ple_codec is None else parse_all(ple_codec),
        asked_for=frozenset(formats or ()),
        adapter=merged,
        compression=compression(compress, compress_python, calibration),
        calibration=None if calibration is None else Path(calibration),
        **settings,
    )


def _checked(chosen: Target, asked: Sequence[str]) -> tuple[str, ...]:
    """The variants asked for, each once; InputError for one that the format does not have, and for none."""
    unknown = [variant for variant in asked if variant not in chosen.known_variants]
    if unknown or not asked:
        problem = f"there is no variant {unknown[0]}" if unknown else "no variant is named"
        raise InputError(chosen.name, problem, f"use some of {', '.join(chosen.known_variants)}")
    return tuple(dict.fromkeys(asked))


def _check_numbers(**given: tuple[int | None, int]) -> None:
    """InputError for an option that is below its least value; None is an option that was not given."""
    for name, (value, least) in given.items():
        if value is not None and value < least:
            raise InputError(f"--{name} {value}", "is too small", f"give {least} or more, or leave it out")


@dataclass(frozen=True)
class Step:
    """One artefact of a request."""

    target: Target
    variant: str
    path: Path
    codec: Codec | None = None  # of its per-layer embeddings

    @property
    def label(self) -> str:
        """What it is called in the report: the variant, and its codec."""
        return labelled(self.variant, self.codec)

    @property
    def key(self) -> str:
        """Its name in the DAG."""
        return f"{self.target.name}:{self.label}"

    @property
    def export_node(self) -> str:
        """The node of the DAG that writes it."""
        return f"export {self.key}"

    @property
    def validate_node(self) -> str:
        """The node of the DAG that judges it."""
        return f"validate {self.key}"


def labelled(variant: str, codec: Codec | None) -> str:
    """A variant with its codec: `int4-aqlm-2x8`."""
    return variant if codec is None else f"{variant}-{codec.label}"


def steps(asked: Request, checkpoint: Checkpoint) -> list[Step]:
    """The artefacts of a request, in the registry's order."""
    return [
        Step(target, variant, target.path(asked.out, checkpoint.name, labelled(variant, codec)), codec)
        for target, variants in ((TARGETS[name], variants) for name, variants in asked.variants.items())
        for variant in variants
        for codec in (asked.ple_codecs if variant in target.codec_variants else (None,))
    ]
