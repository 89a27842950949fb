"""The command line. Heavy imports happen inside the commands: `--help` answers at once."""

from __future__ import annotations

import gc
import os
import signal
import sys
from contextlib import suppress
from inspect import Parameter, Signature
from io import TextIOWrapper
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from gemexport._version import __version__
from gemexport.formats.storage.errors import InputError, shown
from gemexport.options import (
    Adapter,
    AllowPartial,
    Bits,
    Calibration,
    Compress,
    CompressPython,
    Fresh,
    Jobs,
    Json,
    MaxKld,
    Memory,
    Model,
    NoValidate,
    Out,
    PleCodec,
    RecipeName,
    Size,
    Tokens,
    Variants,
    Within,
    formats_option,
    path_argument,
    path_option,
    variant_option,
)
from gemexport.registry import TARGETS, Setting, Target, check_able, recognise, split, split_formats, split_variants
from gemexport.shared.node import StepError

if TYPE_CHECKING:
    from gemexport.report.schema import Report


class _Commands(TyperGroup):
    """The commands by name; those of formats in letters of any case, as formats are written elsewhere."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return super().get_command(ctx, cmd_name) or super().get_command(ctx, cmd_name.lower())


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="One Gemma checkpoint in; GGUF, MLX, ONNX, Core ML and compressed-tensors out, each with the numbers that "
    "prove how close it is. Exit status: 0 all well, 1 an artefact failed its validator or was not judged as asked, "
    "2 the request or the input is at fault.",
)


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
    only: Annotated[str | None, formats_option("Formats to write, such as gguf,mlx.")] = None,
    skip: Annotated[str | None, formats_option("Formats to leave out.")] = None,
    variants: Variants = None,
    adapter: Adapter = None,
    compress: Compress = None,
    compress_python: CompressPython = None,
    calibration: Calibration = None,
    recipe: RecipeName = "default",
    jobs: Jobs = None,
    memory: Memory = None,
    tokens: Tokens = 512,
    no_validate: NoValidate = False,
    allow_partial: AllowPartial = False,
    max_kld: Within = None,
    size: Size = None,
    bits: Bits = None,
    fresh: Fresh = False,
    ple_codec: PleCodec = None,
    as_json: Json = False,
) -> None:
    """Export MODEL into every format and validate each."""
    _run(
        as_json, model=model, out=out, formats=split_formats(only), skip=split_formats(skip),
        variants=split_variants(variants), adapter=adapter, compress=compress, compress_python=compress_python,
        calibration=calibration, recipe=recipe, jobs=jobs, memory=memory, tokens=tokens, validate=not no_validate,
        allow_partial=allow_partial, max_kld=max_kld, size=size, bits=bits, fresh=fresh, ple_codec=ple_codec,
    )  # fmt: skip


# What the command of every format takes besides MODEL and its own settings.
_COMMON: dict[str, tuple[Any, Any]] = {
    "out": (Out, None), "adapter": (Adapter, None), "compress": (Compress, None),
    "compress_python": (CompressPython, None), "calibration": (Calibration, None), "recipe": (RecipeName, "default"),
    "memory": (Memory, None), "tokens": (Tokens, 512), "no_validate": (NoValidate, False),
    "allow_partial": (AllowPartial, False), "max_kld": (Within, None),
    "size": (Size, None), "bits": (Bits, None), "fresh": (Fresh, False),
    "as_json": (Json, False),
}  # fmt: skip


def _add_format(target: Target) -> None:
    """The command that exports into one format, with the settings of its exporter as options."""

    def export(variant: str | None, as_json: bool, no_validate: bool, **given: Any) -> None:
        options = {setting.name: given.pop(setting.name) for setting in target.settings}
        _run(
            as_json,
            formats=[target.name],
            variants=None if variant is None else {target.name: split(variant)},
            validate=not no_validate,
            options={target.name: {name: value for name, value in options.items() if value is not None}},
            **given,
        )

    taken: dict[str, tuple[Any, Any]] = {"variant": (Annotated[str | None, variant_option(target)], None)}
    taken |= {setting.name: _option(setting) for setting in target.settings}
    if target.codec_variants:
        taken["ple_codec"] = (PleCodec, None)
    parameters = [Parameter("model", Parameter.KEYWORD_ONLY, annotation=Model)]
    for name, (annotation, default) in {**taken, **_COMMON}.items():
        parameters.append(Parameter(name, Parameter.KEYWORD_ONLY, annotation=annotation, default=default))
    export.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    export.__annotations__ = {}
    app.command(target.name, help=f"Export MODEL to {target.title}, for {target.users}.")(export)


def _option(setting: Setting) -> tuple[Any, Any]:
    """A setting as typer's annotation and default; a flag has its contrary, for what is neither is the default."""
    name = setting.name.replace("_", "-")
    spelt = f"--{name}/--no-{name}" if setting.kind is bool else f"--{name}"
    made = path_option if setting.kind is Path else typer.Option
    option = made(spelt, metavar=setting.metavar, help=setting.help, show_default=False)
    return Annotated[setting.kind | None, option], None


for _target in TARGETS.values():
    _add_format(_target)


@app.command()
def validate(
    model: Model,
    artifact: Annotated[Path, path_argument("ARTIFACT", help="A file or folder of any of the formats.")],
    adapter: Adapter = None,
    recipe: RecipeName = "default",
    memory: Memory = None,
    tokens: Tokens = 512,
    allow_partial: AllowPartial = False,
    max_kld: MaxKld = None,
    out: Annotated[
        Path | None, path_option("-o", "--out", metavar="DIR", help="Folder for reports; default: none.")
    ] = None,
    qnn_context: Annotated[
        Path | None,
        path_option(metavar="DIR", help="Compile an NPU variant for Qualcomm's HTP; its context binaries go here."),
    ] = None,
    qnn_arch: Annotated[
        str | None, typer.Option(help="The HTP's architecture, such as 73 (the default), 75, 81.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Judge ARTIFACT, whoever made it, against the checkpoint it was made from."""
    from gemexport.report.console import watching
    from gemexport.request import request
    from gemexport.run import validate as judge

    target = recognise(artifact)
    asked = request(
        model=model, recipe=recipe, memory=memory, adapter=adapter, tokens=tokens, max_kld=max_kld,
        allow_partial=allow_partial,
    )  # fmt: skip
    with watching(as_json) as events:
        report = judge(artifact, target, asked, events, out=out, qnn_context=qnn_context, qnn_arch=qnn_arch)
    if as_json:
        _print_json(report.to_json())
    else:
        from gemexport.report.describe import print_verdict

        print_verdict(report)
    raise typer.Exit(0 if report.well(allow_partial) else 1)


@app.command()
def inspect(
    path: Annotated[Path, path_argument("PATH", help="A checkpoint, an artefact or an output folder.")],
    adapter: Adapter = None,
    as_json: Json = False,
) -> None:
    """Tell what PATH holds: architecture, sizes, quantization, lattice."""
    from gemexport.report.describe import inspect_path

    inspect_path(path, as_json, adapter)


@app.command()
def plan(
    model: Model, out: Out = None, only: Annotated[str | None, formats_option("Formats to write.")] = None,
    skip: Annotated[str | None, formats_option("Formats to leave out.")] = None,
    variants: Variants = None, ple_codec: PleCodec = None, adapter: Adapter = None, compress: Compress = None,
    compress_python: CompressPython = None, calibration: Calibration = None, recipe: RecipeName = "default",
    jobs: Jobs = None, memory: Memory = None, tokens: Tokens = 512, no_validate: NoValidate = False,
    variant: Annotated[str | None, typer.Option(help="Variants of the one format in --only.")] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Show the steps that `all` would run, with bytes and memory, running nothing."""
    from gemexport.plan import print_plan
    from gemexport.request import request

    formats = split_formats(only)
    if variant is not None and len(formats) != 1:
        raise InputError("--variant", "is of one format", "name it with --only")
    chosen = split_variants(variants) | ({} if variant is None else {formats[0]: split(variant)})
    asked = request(
        model=model, out=out, formats=formats, skip=split_formats(skip), variants=chosen, adapter=adapter,
        compress=compress, compress_python=compress_python, calibration=calibration, recipe=recipe, jobs=jobs,
        memory=memory, tokens=tokens, validate=not no_validate, ple_codec=ple_codec,
    )  # fmt: skip
    print_plan(asked, as_json)


@app.command()
def sweep(
    model: Model, out: Out = None, only: Annotated[str | None, formats_option("Formats to look at.")] = None,
    skip: Annotated[str | None, formats_option("Formats to leave out.")] = None,
    variants: Variants = None, adapter: Adapter = None, calibration: Calibration = None,
    recipe: RecipeName = "default", jobs: Jobs = None, memory: Memory = None, fresh: Fresh = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Tell what a plain MODEL would lose at which size in each format, before any artefact is written."""
    from gemexport.report.console import watching
    from gemexport.request import request
    from gemexport.sweep import as_json as spelt
    from gemexport.sweep import print_sweep
    from gemexport.sweep import sweep as run_sweep

    asked = request(
        model=model, out=out, formats=split_formats(only), skip=split_formats(skip), variants=split_variants(variants),
        adapter=adapter, calibration=calibration, recipe=recipe, jobs=jobs, memory=memory, fresh=fresh,
    )  # fmt: skip
    with watching(as_json) as events:
        found = run_sweep(asked, events)
    if as_json:
        _print_json(spelt(found))
    else:
        print_sweep(asked, found)


@app.command()
def demo(
    out: Annotated[Path, path_argument("OUT", help="Folder for the model and its artefacts.")] = Path("gemexport-demo"),
    as_json: Json = False,
) -> None:
    """Make a small Gemma 4 on the spot and run it through the whole DAG."""
    from gemexport.demo import make

    check_able(TARGETS.values(), judged=True)
    model = out / "model"
    if not (model / "config.json").is_file():
        make(model)
    _run(as_json, model=model, out=out / "artifacts")


def _run(as_json: bool, **asked: Any) -> None:
    """Run a request of these arguments, show the table, and leave with its exit status."""
    from gemexport.engine.processes import prepared

    with prepared(asked.get("jobs")) as workers:  # one imports while this process does
        from gemexport.report.console import watching
        from gemexport.request import request
        from gemexport.run import run

        made = request(**asked)
        try:
            with watching(as_json) as events:
                report = run(made, events, workers)
        except BaseException as error:  # a Ctrl-C too
            for note in getattr(error, "__notes__", ()):
                print(shown(note), file=sys.stderr)
            raise
    if as_json:
        _print_json(report.to_json())
    else:
        _table(report, made.out)
    raise typer.Exit(0 if report.ok else 1)


def _table(report: Report, out: Path) -> None:
    from rich.console import Console

    from gemexport.report.render import print_table
    from gemexport.report.summary import closing

    console = Console(highlight=False, markup=False)
    print_table(report, console, out)
    for note in report.model.notes:
        console.print(shown(f"note: {note}"), style="yellow", soft_wrap=True)
    console.print(f"\n{shown(closing(report))}", soft_wrap=True)
    console.print(f"{shown(str(out / 'report.html'))} has the details", style="dim", soft_wrap=True)


def _print_json(text: str) -> None:
    """Print JSON, which is UTF-8 whatever the terminal's encoding is."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")
    print(text, end="")


# 128 and the number of the signal, as shells say it.
_INTERRUPTED = 128 + signal.SIGINT
_TERMINATED = 128 + signal.SIGTERM


def _terminate(number: int, frame: FrameType | None) -> None:
    """Leave as a Ctrl-C does, so that steps are ended and what is half written goes; another one changes nothing."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(_TERMINATED)


def _system_error(error: OSError) -> InputError:
    """What the system refused, in a line: a name that is too long, or a full disk behind the output."""
    reason = (error.strerror or type(error).__name__).lower()
    if error.filename is not None:
        return InputError(error.filename, f"cannot be used ({reason})", "choose another path")
    with suppress(OSError, ValueError), Path(os.devnull).open("wb") as nowhere:  # else it is tried again on leaving
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
    return InputError("standard output or a file", f"cannot be written ({reason})", "see where the output goes")


# What click raises for a command line that it cannot read; newer versions of typer have a click of their own.
_UNREADABLE: type[Exception] = typer.BadParameter.mro()[2]


def _usage(error: Any) -> str:
    """What is wrong with a command line, and where it is told what it may be, in a line; "" where help was shown."""
    said = " ".join(error.format_message().split()).rstrip(".")
    context = getattr(error, "ctx", None)
    command = "gemexport" if context is None else context.command_path
    return said and shown(f"{said}; see {command} --help")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; an InputError becomes one line and exit status 2, a step that did not succeed one and 1."""
    # Until a step runs, the time goes into imports: they make many objects, and no garbage worth looking for.
    gc.set_threshold(100_000)
    if isinstance(sys.stdout, TextIOWrapper):  # a path that the terminal's encoding lacks is shown escaped
        sys.stdout.reconfigure(errors="backslashreplace")
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        try:
            status = app(arguments, standalone_mode=False) or 0
        finally:
            sys.stdout.flush()  # here, where that it cannot be written becomes a line
    except OSError as error:
        told = _system_error(error)
        if isinstance(error, BrokenPipeError):
            sys.exit(1)  # as click does where it meets it: whoever reads has enough, and no line is for them
        print(f"gemexport: {told}", file=sys.stderr)
        sys.exit(2)
    except _UNREADABLE as error:
        if usage := _usage(error):
            print(f"gemexport: {usage}", file=sys.stderr)
        sys.exit(2)
    except InputError as error:
        print(f"gemexport: {error}", file=sys.stderr)
        sys.exit(2)
    except StepError as error:
        print(f"gemexport: {error}", file=sys.stderr)
        sys.exit(1)
    except (KeyboardInterrupt, SystemExit) as ended:
        status = ended.code if isinstance(ended, SystemExit) else _INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)
    if status in (_INTERRUPTED, _TERMINATED):
        print("gemexport: interrupted", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
