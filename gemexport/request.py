"""What a run is asked for, and which artefacts that means."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
)
from pydantic.dataclasses import dataclass as checked_dataclass

from gemexport.compress import FOLDER, Compression, compression
from gemexport.formats.checkpoint import Adapters, Checkpoint, adapter_folders, checkpoint_name, open_checkpoint
from gemexport.formats.grids.allocation import Goal
from gemexport.formats.grids.recipe import RECIPES, Recipe, load_recipe
from gemexport.formats.grids.vector_codec import Codec, parse_all
from gemexport.formats.storage.errors import InputError
from gemexport.registry import TARGETS, Target, target
from gemexport.shared.memory import available_memory
from gemexport.shared.place import Place

DEFAULT_TOKENS = 512
MEGABYTE = 10**6


def _recipe(given: Any) -> Any:
    return load_recipe(given) if isinstance(given, str) else given


def _codecs(given: Any) -> Any:
    return parse_all(given) if isinstance(given, str) else given


def _memory(given: Any) -> Any:
    """Bytes of a size such as 8GB, 500 MB or 8GiB; InputError for anything else, and for a unit that was forgotten."""
    text = str(given).strip()
    try:
        size = TypeAdapter(ByteSize).validate_python(text)
    except ValidationError as error:
        raise InputError(f"--memory {text}", "is not a size", "write it like 8GB") from error
    if size < MEGABYTE and not text[-1].isalpha():
        raise InputError(f"--memory {text}", "is too small for bytes", "write a unit, such as 8GB")
    return size


def _size(given: Any) -> Any:
    """Bytes of a size such as 2.6GB or 2.6GiB; InputError for anything else."""
    if given is None or isinstance(given, int):
        return given
    try:
        return TypeAdapter(ByteSize).validate_python(str(given).strip())
    except ValidationError as error:
        raise InputError(f"--size {given}", "is not a size", "write it like 2.6GB") from error


def _mean_bits(bits: float | None) -> float | None:
    if bits is not None and not 0 < bits <= 16:
        raise InputError(f"--bits {bits}", "is no mean width of codes", "give bits, such as 4.5")
    return bits


def _budget(nats: float | None) -> float | None:
    if nats is not None and not nats >= 0:
        raise InputError(f"--max-kld {nats}", "is no divergence", "give nats, 0 or more, such as 0.02")
    return nats


def _there(calibration: Path) -> Path:
    if not calibration.is_file():
        raise InputError(calibration, "there is no such file", "give a text file in UTF-8")
    return calibration


def _at_least(least: int) -> Callable[[int, ValidationInfo], int]:
    """A check of an option's least value; InputError for one below."""

    def check(value: int, info: ValidationInfo) -> int:
        if value < least:
            raise InputError(f"--{info.field_name} {value}", "is too small", f"give {least} or more, or leave it out")
        return value

    return check


@checked_dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Request:
    """What a run is asked for, complete and checked: InputError for what cannot be done.

    Built with keywords; `request` makes it of what somebody said, for the command line and for `gemexport.export`.
    """

    model: Path
    out: Path
    variants: dict[str, tuple[str, ...]]  # by format, all that will be written
    formats: frozenset[str] = frozenset()  # named by the user: one that is not installed is an error
    recipe: Annotated[Recipe, BeforeValidator(_recipe)] = RECIPES["default"]
    jobs: Annotated[int, AfterValidator(_at_least(1))] = Field(default_factory=lambda: os.cpu_count() or 1)
    memory: Annotated[int, BeforeValidator(_memory), AfterValidator(_at_least(1))] = Field(
        default_factory=lambda: int(available_memory() * 0.8)
    )  # bytes
    tokens: Annotated[int, AfterValidator(_at_least(2))] = DEFAULT_TOKENS
    validate: bool = True
    max_kld: Annotated[float | None, AfterValidator(_budget)] = None  # nats, in place of the recipe's
    size: Annotated[int | None, BeforeValidator(_size)] = None  # bytes of an artefact at most: widths are chosen for it
    bits: Annotated[float | None, AfterValidator(_mean_bits)] = None  # of a code, in the mean: likewise
    allow_partial: bool = False  # whether all is well where something was not judged, and nothing is known to be wrong
    fresh: bool = False
    options: dict[str, dict[str, Any]] = Field(default_factory=dict)  # of exporters, by format
    ple_codec: Annotated[tuple[Codec | None, ...], BeforeValidator(_codecs)] = (None,)  # an artefact each
    adapter: tuple[Path, ...] = ()  # folders of LoRA adapters that are merged into the model, in order
    compression: Compression | None = None  # what llm-compressor is to do before all else
    calibration: Annotated[Path, AfterValidator(_there)] | None = None  # text to calibrate on; None: built-in

    def place(self, work: Path, checkpoint: Checkpoint) -> Place:
        """Where the steps of a run of the model, which was opened as `checkpoint`, find each other's results."""
        compressed = work / FOLDER / checkpoint.name if self.compression else None
        return Place(self.model, work, self.tokens, self.adapter, compressed, stamps=checkpoint.stamps)

    @property
    def budget(self) -> Recipe:
        """The recipe with the loss that may be."""
        return self.recipe if self.max_kld is None else self.recipe.model_copy(update={"max_kld": self.max_kld})

    @property
    def goal(self) -> Goal | None:
        """What widths are chosen for; beside a size or bits, a loss is but judged."""
        if self.size is not None:
            return Goal(kind="size", most=self.size)
        if self.bits is not None:
            return Goal(kind="bits", most=self.bits)
        return None if self.max_kld is None else Goal(kind="max_kld", most=self.max_kld)

    def checkpoint(self) -> Checkpoint:
        """The model, with its adapter merged in; what lies beside its weights is judged when it is wanted."""
        return open_checkpoint(self.model, adapter=self.adapter)


def request(
    *,
    model: str | Path,
    out: str | Path | None = None,
    formats: Sequence[str] | None = None,
    skip: Sequence[str] | None = None,
    variants: Mapping[str, Sequence[str]] | None = None,
    adapter: Adapters = None,
    compress: str | None = None,
    compress_python: str | Path | None = None,
    calibration: str | Path | None = None,
    **further: Any,
) -> Request:
    """What these words come to, with what was not said (None) filled in; InputError for what cannot be done.

    `further` are fields of a Request as they are, or as they are spelt: `recipe` by its name, `memory` as 8GB.
    """
    said = {name: value for name, value in further.items() if value is not None}
    chosen = [target(name).name for name in formats or ()]
    for path in (model, out or "."):
        _check_name(path)
    if "size" in said and "bits" in said:
        raise InputError(f"--size {said['size']} --bits {said['bits']}", "ask for two things", "give one of them")
    try:
        return Request(
            model=Path(model),
            out=Path(_folder(model, adapter) if out is None else out),
            variants=_chosen(chosen, [target(name).name for name in skip or ()], variants or {}),
            formats=frozenset(chosen),
            adapter=adapter_folders(adapter),
            calibration=None if calibration is None else Path(calibration),
            compression=compression(compress, compress_python, calibration),
            **said,
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(str(first["loc"][0]), first["msg"], "see help(gemexport.export)") from error


def _check_name(path: str | Path) -> None:
    """InputError for a path that is no UTF-8: reports and the formats' own files have no way to hold it."""
    try:
        os.path.abspath(path).encode()
    except UnicodeEncodeError as error:
        raise InputError(path, "has a name that is no UTF-8", "rename it, or choose another") from error


def _folder(model: str | Path, adapter: Adapters) -> str:
    """The output folder of nobody's choice."""
    names = [checkpoint_name(Path(model)), *(folder.resolve().name for folder in adapter_folders(adapter))]
    return f"{'-'.join(names)}-gemexport"


def _chosen(
    formats: Sequence[str], skip: Sequence[str], variants: Mapping[str, Sequence[str]]
) -> dict[str, tuple[str, ...]]:
    """All variants that will be written: those that were named, and the defaults of the other formats."""
    chosen = {name: target(name).variants for name in formats or TARGETS if name not in skip}
    chosen |= {target(name).name: _checked(target(name), asked) for name, asked in variants.items()}
    if not chosen:
        raise InputError(f"--skip {','.join(skip)}", "leaves no format to write", "skip fewer")
    return chosen


def _checked(chosen: Target, asked: Sequence[str]) -> tuple[str, ...]:
    """The variants asked for, in letters of any case, each once; InputError for one that there is not, and for none."""
    known = {variant.lower(): variant for variant in chosen.known_variants}
    unknown = [variant for variant in asked if variant.lower() not in known]
    if unknown or not asked:
        problem = f"there is no variant {unknown[0]}" if unknown else "no variant is named"
        raise InputError(chosen.name, problem, f"use some of {', '.join(chosen.known_variants)}")
    return tuple(dict.fromkeys(known[variant.lower()] for variant in asked))


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
    def open_node(self) -> str:
        """The node of the DAG that opens it, where it lies there already."""
        return f"open {self.key}"

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
        for codec in (asked.ple_codec if variant in target.codec_variants else (None,))
    ]


def refusals(checkpoint: Checkpoint, wanted: Sequence[Step]) -> dict[Step, str]:
    """The artefacts that no run will write of this model, each with the reason, before anything is searched."""
    reasons = {step: step.target.supports(checkpoint.model, step.variant) for step in wanted}
    return {step: reason for step, reason in reasons.items() if reason is not None}
