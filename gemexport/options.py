"""The options and arguments of the command line, and what a shell completes of their values.

An empty path is one that a script left out (`"$MODEL"`), and never meant as the folder that the shell is in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from gemexport.registry import TARGETS, Target


def _path(given: str | Path) -> Path:
    if not str(given):
        raise typer.BadParameter("it is empty")
    return Path(given)


def path_option(*names: str, **said: Any) -> Any:
    """An option that takes a path."""
    return typer.Option(*names, parser=_path, **said)


def path_argument(metavar: str, **said: Any) -> Any:
    """An argument that is a path."""
    return typer.Argument(metavar=metavar, parser=_path, **said)


def one_of(words: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """Completes a word as it is spelt; typer leaves out what begins in letters of another case."""

    def complete(incomplete: str) -> list[str]:
        return [word for word in words() if word.startswith(incomplete)]

    return complete


def some_of(words: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """Completes the last of several words between commas, with one that is not there yet."""

    def complete(incomplete: str) -> list[str]:
        *before, last = incomplete.split(",")
        there = {word.lower() for word in before}
        return [",".join((*before, word)) for word in one_of(words)(last) if word.lower() not in there]

    return complete


def _recipes() -> Iterable[str]:
    from gemexport.formats.grids.recipe import RECIPES

    return RECIPES


def _methods() -> Iterable[str]:
    from gemexport.compress import METHODS

    return METHODS


def variant_option(target: Target) -> Any:
    """What a format's own command has for its variants."""
    known = target.known_variants
    return typer.Option("--variant", help=f"Some of {', '.join(known)}.", autocompletion=some_of(lambda: known))


def formats_option(help: str) -> Any:
    """An option that names formats."""
    return typer.Option(metavar="FORMATS", help=help, autocompletion=some_of(lambda: TARGETS))


Model = Annotated[
    Path,
    path_argument("MODEL", help="A checkpoint: a folder in Hugging Face layout, an MLX folder or a .gguf file."),
]
Out = Annotated[Path | None, path_option("-o", "--out", metavar="DIR", help="Output folder; default: NAME-gemexport.")]
RecipeName = Annotated[
    str,
    typer.Option(
        "--recipe",
        metavar="NAME|FILE",
        help="A built-in recipe or a TOML or JSON file (docs/recipes.md).",
        autocompletion=one_of(_recipes),
    ),
]
Jobs = Annotated[int | None, typer.Option(min=1, help="Steps that run side by side; default: one a core.")]
Memory = Annotated[
    str | None, typer.Option(help="What the steps may take together, such as 8GB; default: most of what is free.")
]
Tokens = Annotated[int, typer.Option(min=2, help="Tokens that logits are compared on.")]
AllowPartial = Annotated[
    bool, typer.Option("--allow-partial", help="Exit status 0 also where something was not judged, and nothing failed.")
]
MaxKld = Annotated[
    float | None,
    typer.Option(metavar="NATS", help="The mean loss that may be; default: the recipe's, or what is not called poor."),
]
Within = Annotated[
    float | None,
    typer.Option(
        metavar="NATS",
        help="The mean loss that may be: of a plain model the smallest artefacts within it, and the verdict's limit.",
    ),
]
Size = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE", help="Bytes of an artefact at most, such as 2.6GB: widths are chosen, matrix by matrix."
    ),
]
Bits = Annotated[float | None, typer.Option(metavar="BITS", help="The same for the mean width of codes, such as 4.5.")]
NoValidate = Annotated[bool, typer.Option("--no-validate", help="Write the artefacts and judge nothing.")]
Fresh = Annotated[
    bool,
    typer.Option(
        "--fresh/--resume",
        help="Start anew, also in another model's folder, or use the grids that an earlier run found.",
    ),
]
Adapter = Annotated[
    list[Path] | None,
    path_option(metavar="DIR", help="Merge the LoRA adapter (PEFT) in this folder into MODEL; again for another."),
]
Variants = Annotated[
    str | None,
    typer.Option(metavar="FORMAT:VARIANT,…", help="Variants instead of a format's usual ones: gguf:Q8_0,mlx:bf16."),
]
PleCodec = Annotated[
    str | None,
    typer.Option(
        metavar="aqlm:MxB,…",
        help="Vector codecs for per-layer embeddings, an artefact each, in ONNX and Core ML; docs/ple-codec.md.",
    ),
]
Compress = Annotated[
    str | None,
    typer.Option(
        metavar="METHOD",
        help="Quantize the linears with llm-compressor first: gptq, awq or rtn; docs/compress.md.",
        autocompletion=one_of(_methods),
    ),
]
CompressPython = Annotated[
    Path | None, path_option(metavar="PYTHON", help="An interpreter that has llm-compressor; default: this one.")
]
Calibration = Annotated[
    Path | None,
    path_option(metavar="FILE", help="Text to round on, and for the ranges of npu-a8 and npu-a16; default: built-in."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON on standard output, and nothing else.")]
