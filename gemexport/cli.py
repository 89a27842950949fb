"""The command line. Heavy imports happen inside the commands: `--help` answers at once."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemexport._version import __version__
from gemexport.formats.errors import InputError

if TYPE_CHECKING:
    from gemexport.report import Report
    from gemexport.request import Request

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="One Gemma checkpoint in; GGUF, MLX, ONNX, Core ML and compressed-tensors out, each with the numbers that "
    "prove how close it is. Exit status: 0 all well, 1 an artefact failed its validator, 2 the request or the input is "
    "at fault.",
)

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a checkpoint in Hugging Face layout.")]
Out = Annotated[Path | None, typer.Option("-o", "--out", help="Output folder; default: NAME-gemexport.")]
RecipeName = Annotated[
    str, typer.Option("--recipe", help="A built-in recipe or a TOML or JSON file (docs/recipes.md).")
]
Jobs = Annotated[int | None, typer.Option(min=1, help="Steps that run side by side; default: one a core.")]
Memory = Annotated[
    str | None, typer.Option(help="What they may take together, such as 8GB; default: most of what is free.")
]
Tokens = Annotated[int, typer.Option(min=2, help="Tokens that logits are compared on.")]
NoValidate = Annotated[bool, typer.Option("--no-validate", help="Write the artefacts and judge nothing.")]
Fresh = Annotated[
    bool, typer.Option("--fresh/--resume", help="Start anew, or use the grids that an earlier run found.")
]
Adapter = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Merge the LoRA adapter (PEFT) in this folder into MODEL.")
]
PleCodec = Annotated[
    str | None,
    typer.Option(
        metavar="aqlm:MxB,…",
        help="Vector codecs for per-layer embeddings, an artefact each, in ONNX and Core ML; docs/ple-codec.md.",
    ),
]
Compress = Annotated[
    str | None, typer.Option(help="Quantize the linears with llm-compressor first: gptq, awq or rtn; docs/compress.md.")
]
CompressPython = Annotated[
    Path | None, typer.Option(metavar="PYTHON", help="An interpreter that has llm-compressor; default: this one.")
]
Calibration = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Text for gptq, awq and the ranges of npu-a8 and npu-a16; default: built-in."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON on standard output, and nothing else.")]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"gemexport {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options that every command shares."""


@app.command("all")
def export_all(
    model: Model,
    out: Out = None,
    only: Annotated[str | None, typer.Option(help="Formats to write, such as gguf,mlx.")] = None,
    skip: Annotated[str | None, typer.Option(help="Formats to leave out.")] = None,
    adapter: Adapter = None,
    compress: Compress = None,
    compress_python: CompressPython = None,
    calibration: Calibration = None,
    recipe: RecipeName = "default",
    jobs: Jobs = None,
    memory: Memory = None,
    tokens: Tokens = 512,
    no_validate: NoValidate = False,
    fresh: Fresh = False,
    ple_codec: PleCodec = None,
    as_json: Json = False,
) -> None:
    """Export MODEL into every format and validate each."""
    from gemexport.registry import split_formats
    from gemexport.request import request

    asked = request(
        model, out, split_formats(only), split_formats(skip), None, recipe, jobs, parse_bytes(memory),
        adapter, compress, compress_python, calibration, ple_codec,
        tokens=tokens, validate=not no_validate, fresh=fresh,
    )  # fmt: skip
    _run(asked, as_json)


def _single(name: str, model: Path, variant: str | None, options: dict[str, Any], common: dict[str, Any]) -> None:
    """Export into one format."""
    from gemexport.request import request

    variants = {name: tuple(variant.split(","))} if variant else None
    as_json = common.pop("as_json")
    given = {key: value for key, value in options.items() if value is not None}
    _run(request(model, formats=[name], variants=variants, options={name: given}, **common), as_json)


def _common(
    out: Path | None, adapter: Path | None, compress: str | None, compress_python: Path | None,
    calibration: Path | None, recipe: str, memory: str | None, tokens: int, no_validate: bool, fresh: bool,
    as_json: bool,
) -> dict[str, Any]:  # fmt: skip
    return {
        "out": out, "adapter": adapter, "compress": compress, "compress_python": compress_python,
        "calibration": calibration, "recipe": recipe, "memory": parse_bytes(memory), "tokens": tokens,
        "validate": not no_validate, "fresh": fresh, "as_json": as_json,
    }  # fmt: skip


def _variant(known: str) -> Any:
    return typer.Option("--variant", help=f"Some of {known}.")


@app.command()
def gguf(
    model: Model, out: Out = None,
    variant: Annotated[
        str | None, _variant("Q4_0, Q8_0, BF16, F32, Q4_K_S, Q4_K_M, Q5_K_S, Q5_K_M, Q6_K")
    ] = None,
    imatrix: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Importances for K-quants, from llama-imatrix; docs/kquants.md.")
    ] = None,
    adapter: Adapter = None, compress: Compress = None, compress_python: CompressPython = None,
    calibration: Calibration = None, recipe: RecipeName = "default", memory: Memory = None, tokens: Tokens = 512,
    no_validate: NoValidate = False, fresh: Fresh = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Export MODEL to GGUF, for llama.cpp and Ollama."""
    common = _common(
        out, adapter, compress, compress_python, calibration, recipe, memory, tokens, no_validate, fresh, as_json
    )
    _single("gguf", model, variant, {"imatrix": imatrix}, common)


@app.command()
def mlx(
    model: Model, out: Out = None, variant: Annotated[str | None, _variant("4bit, bf16, f32")] = None,
    scales: Annotated[str | None, typer.Option(help="f16, bf16 or f32; see docs/mlx-scales.md.")] = None,
    adapter: Adapter = None, compress: Compress = None, compress_python: CompressPython = None,
    calibration: Calibration = None, recipe: RecipeName = "default", memory: Memory = None, tokens: Tokens = 512,
    no_validate: NoValidate = False, fresh: Fresh = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Export MODEL to MLX, for Macs."""
    common = _common(
        out, adapter, compress, compress_python, calibration, recipe, memory, tokens, no_validate, fresh, as_json
    )
    _single("mlx", model, variant, {"scales": scales}, common)


@app.command()
def onnx(
    model: Model, out: Out = None,
    variant: Annotated[str | None, _variant("int4, npu, npu-a8, npu-a16, f32")] = None,
    ranges: Annotated[Path | None, typer.Option(help="The activations.json of an earlier npu-a8 or npu-a16.")] = None,
    range_method: Annotated[str | None, typer.Option(help="minmax or percentile, for npu-a8 and npu-a16.")] = None,
    ple_codec: PleCodec = None, adapter: Adapter = None, compress: Compress = None,
    compress_python: CompressPython = None, calibration: Calibration = None, recipe: RecipeName = "default",
    memory: Memory = None, tokens: Tokens = 512, no_validate: NoValidate = False, fresh: Fresh = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Export MODEL to ONNX, for ONNX Runtime and NPUs."""
    options = {"ranges": ranges, "range_method": range_method}
    common = _common(
        out, adapter, compress, compress_python, calibration, recipe, memory, tokens, no_validate, fresh, as_json
    )
    _single("onnx", model, variant, options, common | {"ple_codec": ple_codec})


@app.command()
def coreml(
    model: Model, out: Out = None, variant: Annotated[str | None, _variant("int4, f16, f32")] = None,
    ple_codec: PleCodec = None, adapter: Adapter = None, compress: Compress = None,
    compress_python: CompressPython = None, calibration: Calibration = None, recipe: RecipeName = "default",
    memory: Memory = None, tokens: Tokens = 512, no_validate: NoValidate = False, fresh: Fresh = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Export MODEL to Core ML, for iPhones, iPads and Macs."""
    common = _common(
        out, adapter, compress, compress_python, calibration, recipe, memory, tokens, no_validate, fresh, as_json
    )
    _single("coreml", model, variant, {}, common | {"ple_codec": ple_codec})


@app.command("compressed-tensors")
def compressed_tensors(
    model: Model, out: Out = None, variant: Annotated[str | None, _variant("w4a16, bf16")] = None,
    pack_embeddings: Annotated[
        bool | None,
        typer.Option(
            "--pack-embeddings/--no-pack-embeddings",
            help="Embeddings as codes, or as floats; by default as codes where they were read from codes.",
            show_default=False,
        ),
    ] = None,
    adapter: Adapter = None, compress: Compress = None, compress_python: CompressPython = None,
    calibration: Calibration = None, recipe: RecipeName = "default", memory: Memory = None, tokens: Tokens = 512,
    no_validate: NoValidate = False, fresh: Fresh = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Export MODEL to compressed-tensors, for vLLM and transformers."""
    common = _common(
        out, adapter, compress, compress_python, calibration, recipe, memory, tokens, no_validate, fresh, as_json
    )
    _single("compressed-tensors", model, variant, {"pack_embeddings": pack_embeddings}, common)


@app.command()
def validate(
    model: Model,
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="A file or folder of any of the formats.")],
    adapter: Adapter = None,
    recipe: RecipeName = "default",
    memory: Memory = None,
    tokens: Tokens = 512,
    qnn_context: Annotated[
        Path | None,
        typer.Option(help="Compile an NPU variant for Qualcomm's HTP, write its context binaries to this folder."),
    ] = None,
    qnn_arch: Annotated[
        str | None, typer.Option(help="The HTP's architecture, such as 73 (the default), 75, 81.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Judge ARTIFACT, whoever made it, against the checkpoint it was made from."""
    from gemexport.console import watching
    from gemexport.registry import recognise
    from gemexport.request import request
    from gemexport.run import validate as judge

    target = recognise(artifact)
    asked = request(model, None, [], recipe=recipe, memory=parse_bytes(memory), adapter=adapter, tokens=tokens)
    with watching(as_json) as events:
        report = judge(
            artifact, target, replace(asked, variants={}), events, qnn_context=qnn_context, qnn_arch=qnn_arch
        )
    if as_json:
        print(report.to_json(), end="")
    else:
        from gemexport.describe import print_verdict

        print_verdict(report)
    raise typer.Exit(0 if report.status in ("pass", "skipped") else 1)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A checkpoint or an artefact.")],
    adapter: Adapter = None,
    as_json: Json = False,
) -> None:
    """Tell what PATH holds: architecture, sizes, quantization, lattice."""
    from gemexport.describe import inspect_path

    inspect_path(path, as_json, adapter)


@app.command()
def plan(
    model: Model, out: Out = None, only: Annotated[str | None, typer.Option(help="Formats to write.")] = None,
    skip: Annotated[str | None, typer.Option(help="Formats to leave out.")] = None,
    ple_codec: PleCodec = None, adapter: Adapter = None, compress: Compress = None,
    compress_python: CompressPython = None, calibration: Calibration = None, recipe: RecipeName = "default",
    jobs: Jobs = None, memory: Memory = None, tokens: Tokens = 512, no_validate: NoValidate = False,
    variant: Annotated[str | None, typer.Option(help="Variants of the one format in --only.")] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Show the steps that `all` would run, with bytes and memory, running nothing."""
    from gemexport.describe import print_plan
    from gemexport.registry import split_formats
    from gemexport.request import request

    formats = split_formats(only)
    if variant is not None and len(formats) != 1:
        raise InputError("--variant", "is of one format", "name it with --only")
    variants = {formats[0]: tuple(variant.split(","))} if variant else None
    asked = request(
        model, out, formats, split_formats(skip), variants, recipe, jobs,
        parse_bytes(memory), adapter, compress, compress_python, calibration, ple_codec,
        tokens=tokens, validate=not no_validate,
    )  # fmt: skip
    print_plan(asked, as_json)


@app.command()
def demo(
    out: Annotated[Path, typer.Argument(metavar="[OUT]", help="Folder for the model and its artefacts.")] = Path(
        "gemexport-demo"
    ),
    as_json: Json = False,
) -> None:
    """Make a small Gemma 4 on the spot and run it through the whole DAG."""
    from gemexport.demo import make
    from gemexport.request import request

    model = out / "model"
    if not (model / "config.json").is_file():
        make(model)
    _run(request(model, out / "artifacts"), as_json)


def _run(asked: Request, as_json: bool) -> None:
    """Run a request, show the table, and leave with its exit status."""
    from gemexport.console import watching
    from gemexport.run import run

    with watching(as_json) as events:
        report = run(asked, events)
    if as_json:
        print(report.to_json(), end="")
    else:
        _table(report, asked.out)
    raise typer.Exit(0 if report.ok else 1)


def _table(report: Report, out: Path) -> None:
    from rich.console import Console

    from gemexport.render import print_table

    console = Console(highlight=False)
    print_table(report, console, out)
    for note in report.model.notes:
        console.print(f"note: {note}", style="yellow", soft_wrap=True)
    console.print(f"\n{out / 'report.html'} has the details", style="dim", soft_wrap=True)


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30}


def parse_bytes(text: str | None) -> int | None:
    """Bytes of a size such as 8GB, 500MB or 8GiB; InputError for anything else."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?)B?", text.strip().upper())
    if match is None or match[2] not in _UNITS:
        raise InputError(f"--memory {text}", "is not a size", "write it like 8GB")
    return int(float(match[1]) * _UNITS[match[2]])


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; an InputError becomes one line and exit status 2."""
    try:
        app(arguments)
    except InputError as error:
        print(f"gemexport: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("gemexport: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
