"""The formats: which modules write, read and run each, and where its artefacts lie. A new format is one entry here.

The command line is made from it, so it imports nothing that takes long.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from gemexport.formats.hub import download
from gemexport.formats.storage.errors import InputError
from gemexport.formats.storage.files import PARTIAL
from gemexport.formats.storage.installing import install
from gemexport.formats.storage.reading import JSON_BYTES, read_text

if TYPE_CHECKING:
    from gemexport.formats.activations import Activations
    from gemexport.formats.checkpoint import Checkpoint
    from gemexport.formats.gemma.model import Model
    from gemexport.formats.promise import Promise
    from gemexport.formats.tensor import DType, Grid, Tensor


@dataclass(frozen=True)
class Setting:
    """An argument of a format's `export` besides the variant, and an option of its command; not given: None."""

    name: str
    help: str
    kind: type = str  # bool makes a flag
    metavar: str | None = None


@dataclass(frozen=True)
class Target:
    """One format."""

    name: str
    title: str
    users: str  # who takes it
    variants: tuple[str, ...]  # written by default
    known_variants: tuple[str, ...]
    pattern: str  # of an artefact's path under the output folder
    module: str  # of gemexport.exporters and gemexport.formats
    runtime: str  # of gemexport.validators.runtimes
    extra: str  # what to install
    packages: tuple[str, ...]  # import names that the extra brings
    arithmetics: tuple[str | None, ...] = (None,)  # what its runtime is tried in; None: the one way it has
    played: str = "f32-reordered"  # the arithmetic of PyTorch that its runtime's f32 is held to
    noises: tuple[str, ...] = ()  # arithmetics of PyTorch that a runtime which does not compute in f32 is held to
    codec_variants: tuple[str, ...] = ()  # those that hold per-layer embeddings in a vector codec
    variant_noises: tuple[tuple[str, tuple[str, ...]], ...] = ()  # more of them, and the variants that they are for
    code_widths: tuple[tuple[str, tuple[int, ...]], ...] = ()  # variants that hold a matrix in any of so many bits
    calibrated: tuple[str, ...] = ()  # variants that want ranges of activations, of which they make integers
    second_runtimes: tuple[str, ...] = ()  # of gemexport.validators.runtimes: programs that run what they take besides
    second_variants: tuple[str, ...] = ()  # that these take
    variant_users: tuple[tuple[str, tuple[str, ...]], ...] = ()  # who takes some variants, where not all take all
    copies: int = 0  # bytes of a weight in the copy that its runtime maps to compute in another arithmetic
    stand_in: str | None = None  # what runs an artefact here in place of the program that users have
    computes_with_scales: bool = False  # of activations: there is formats.MODULE.activations to read them back
    settings: tuple[Setting, ...] = ()

    def users_of(self, label: str) -> str:
        """Who takes a variant, by itself or with a vector codec (`int4-aqlm-2x8`)."""
        variant = label.partition("-aqlm")[0]
        return next((who for who, variants in self.variant_users if variant in variants), self.users)

    def path(self, out: Path, model: str, variant: str) -> Path:
        """Where the artefact of this variant lies."""
        return out / self.pattern.format(name=model, variant=variant)

    def exporter(self) -> ModuleType:
        """The module with `export`."""
        return import_module(f"gemexport.exporters.{self.module}")

    def reader(self) -> ModuleType:
        """The module with `tensors`."""
        return import_module(f"gemexport.formats.{self.module}")

    def activations(self, path: Path) -> Activations | None:
        """The static scales of activations that an artefact computes with; None in formats without any."""
        found: Activations | None = None
        if self.computes_with_scales:
            found = import_module(f"gemexport.formats.{self.module}.activations").activations(path)
        return found

    def derived(self, path: Path) -> dict[str, tuple[str, Tensor]]:
        """What an artefact holds once more on a coarser grid, by name, with the name of what it is made of."""
        found: dict[str, tuple[str, Tensor]] = self.reader().derived(path) if self.calibrated else {}
        return found

    def adapter(self) -> ModuleType:
        """The module with `load`."""
        return import_module(f"gemexport.validators.runtimes.{self.runtime}")

    def seconds(self, path: Path) -> list[ModuleType]:
        """The modules with `load` of further programs that are installed and take the artefact at `path`."""
        modules = [import_module(f"gemexport.validators.runtimes.{name}") for name in self.second_runtimes]
        return [module for module in modules if module.takes(path)]

    def programs(self, variant: str, static: bool = False) -> tuple[str, ...]:
        """Of gemexport.validators.runtimes, those that may judge a variant here, all of them where that is not known.

        Further programs, each called as its package is, compute in f32: not with `static` scales of activations.
        """
        known = variant in self.known_variants and variant not in self.second_variants
        seconds = () if known or static else tuple(name for name in self.second_runtimes if _installed(name))
        return (self.runtime, *seconds)

    def holds(self, variant: str) -> Callable[[Grid, int], bool]:
        """Whether a variant has a container for a grid in rows of so many weights; as the default one for others."""
        container = self.exporter().container
        known = variant if variant in self.known_variants else self.variants[0]
        return lambda grid, width: not isinstance(container(grid, width, known), str)

    def promises(self, checkpoint: Checkpoint, variant: str, options: Mapping[str, Any]) -> dict[str, Promise]:
        """What an artefact of a variant, written with these options of its exporter, has to hold of each tensor."""
        from gemexport.exporters.fitting import promises

        exporter = self.exporter()
        if hasattr(exporter, "promises"):
            own: dict[str, Promise] = exporter.promises(checkpoint, variant, **options)
            return own
        return promises(checkpoint, lambda grid, width: exporter.container(grid, width, variant))

    def supports(self, model: Model, variant: str) -> str | None:
        """Why the format's program does not run a model, or its artefact does not hold it; None where all is well."""
        reason: str | None = self.exporter().supports(model, variant)
        return reason

    def plain(self, variant: str) -> DType | None:
        """The dtype that a variant of plain numbers is called by; None for one of codes."""
        from gemexport.formats.tensor import ITEM_BYTES

        return next((dtype for dtype in ITEM_BYTES if dtype == variant.lower()), None)

    def noises_of(self, variant: str) -> tuple[str, ...]:
        """The noises that an artefact of this variant is held to; somebody else's may need any."""
        foreign = variant not in self.known_variants
        return (
            self.played,
            *self.noises,
            *(noise for noise, variants in self.variant_noises if foreign or variant in variants),
        )

    def widths(self, variant: str) -> tuple[int, ...]:
        """The bits of codes that a variant holds as narrow as they are, matrix by matrix; none of those made anew."""
        return next((widths for name, widths in self.code_widths if name == variant), ())

    def missing(self) -> list[str]:
        """Packages of the extra that are not installed."""
        return [package for package in self.packages if not _installed(package)]

    def install_hint(self) -> str:
        """The command that installs what is missing."""
        return install(self.extra, "reference")


REFERENCE = ("torch", "transformers")  # import names of what every validator compares with


def check_able(targets: Iterable[Target], judged: bool) -> None:
    """InputError where not one of the targets could be written here, or where nothing could judge what is `judged`."""
    if all(target.missing() for target in targets):
        raise InputError(
            "this environment", "nothing is installed that could write any of these formats", install("all")
        )
    missing = [package for package in REFERENCE if not _installed(package)]
    if judged and missing:
        problem = f"judging needs {' and '.join(missing)}, not installed here"
        raise InputError("this environment", problem, f"{install('reference')}, or export with --no-validate")


@cache
def _installed(package: str) -> bool:
    return find_spec(package) is not None


# The evaluator runs everywhere; Core ML itself only on a Mac.
_CORE_ML = ("f32", "f16", *(["device"] if platform.system() == "Darwin" else []))
_NO_CORE_ML = "judged in gemexport's evaluator of ML programs; Core ML itself was not tried: it runs on macOS alone"

# Fitted to the values by ggml's quantizer, which the extra `kquants` brings.
_K_QUANTS = ("Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K")

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            "gguf", "GGUF", "llama.cpp and Ollama", ("Q4_0",), ("Q4_0", "Q8_0", "BF16", "F32", *_K_QUANTS),
            "gguf/{name}-{variant}.gguf",
            "gguf", "llama_cpp", "llama", ("gguf", "xllamacpp"),
            arithmetics=(None, "f32"), noises=("bf16", "int8-activations"), copies=4,
            played="f32-f16-gelu", code_widths=(("Q4_0", (4, 5, 8)),),
            variant_noises=(("int8-activations-256", _K_QUANTS),),
            settings=(
                Setting("imatrix", "Importances for K-quants, from llama-imatrix; docs/kquants.md.", Path, "FILE"),
            ),
        ),
        Target(
            "mlx", "MLX", "Macs", ("4bit",), ("4bit", "bf16", "f32"), "mlx/{variant}",
            "mlx", "mlx", "mlx", ("mlx", "mlx_lm"), code_widths=(("4bit", (2, 3, 4, 5, 6, 8)),),
            settings=(Setting("scales", "f16, bf16 or f32; see docs/mlx-scales.md."),),
        ),
        Target(
            "onnx", "ONNX", "ONNX Runtime and NPUs", ("int4", "npu"), ("int4", "npu", "npu-a8", "npu-a16", "f32"),
            "onnx/{variant}",
            "onnx", "onnxruntime", "onnx", ("onnx", "onnx_ir", "onnxruntime"), calibrated=("npu-a8", "npu-a16"),
            codec_variants=("int4", "npu", "npu-a8", "npu-a16"), code_widths=(("int4", (2, 4, 8)), ("npu", (4, 8))),
            variant_users=(("ONNX Runtime", ("int4", "f32")), ("NPUs", ("npu", "npu-a8", "npu-a16"))),
            variant_noises=(("bf16", ()), ("int8-activations", ())),  # somebody else's compute in f16, or round to int8
            computes_with_scales=True, second_runtimes=("openvino",), second_variants=("npu",),
            settings=(
                Setting("ranges", "The activations.json of an earlier npu-a8 or npu-a16.", Path, "FILE"),
                Setting("range_method", "minmax or percentile, for npu-a8 and npu-a16."),
                Setting("layout", "flat, or transformers.js: int4 or f32 as it looks for them; docs/onnx.md."),
            ),
        ),
        Target(
            "coreml", "Core ML", "iPhones, iPads and Macs", ("int4",), ("int4", "f16", "f32"),
            "coreml/{variant}.mlpackage",
            "coreml", "coreml", "coreml", ("coremltools", "torch"), arithmetics=_CORE_ML, noises=("bf16",),
            played="f32-f16-constants", stand_in=None if platform.system() == "Darwin" else _NO_CORE_ML,
            computes_with_scales=True,
            codec_variants=("int4",), code_widths=(("int4", (2, 4, 8)),),
        ),
        Target(
            "compressed-tensors", "compressed-tensors", "vLLM and transformers", ("w4a16",), ("w4a16", "bf16"),
            "compressed-tensors/{variant}",
            "compressed_tensors", "compressed_tensors", "compressed-tensors", ("compressed_tensors", "transformers"),
            computes_with_scales=True, code_widths=(("w4a16", (4, 8)),),  # vLLM has kernels for these
            settings=(
                Setting(
                    "pack_embeddings",
                    "Embeddings as codes, or as floats; default: codes where they were read from codes.",
                    bool,
                ),
            ),
        ),
    )
}  # fmt: skip


def target(name: str) -> Target:
    """The target called `name`, in letters of any case; InputError when there is none."""
    try:
        return TARGETS[name.lower()]
    except KeyError:
        raise InputError(name, "is not a format", f"use some of {', '.join(TARGETS)}") from None


def split(text: str) -> tuple[str, ...]:
    """What a comma-separated option names, each once, in the order that it was given in."""
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def split_formats(text: str | None) -> list[str]:
    """Names out of a comma-separated option, checked, in the registry's order."""
    if text is None:
        return []
    asked = [target(part).name for part in split(text)]
    if not asked:
        raise InputError(text or "an empty list", "names no format", f"use some of {', '.join(TARGETS)}")
    return [name for name in TARGETS if name in asked]


_NO_VARIANT = ("names no variant of a format", "write FORMAT:VARIANT, such as gguf:Q8_0")


def split_variants(text: str | None) -> dict[str, tuple[str, ...]]:
    """Variants by format out of an option such as `gguf:Q4_0,gguf:Q8_0,mlx:4bit`; InputError for what is none."""
    found: dict[str, tuple[str, ...]] = {}
    spelling = "write FORMAT:VARIANT, such as gguf:Q8_0"
    if text is not None and not split(text):
        raise InputError(text or "an empty list", "names no variant of a format", spelling)
    for part in split(text or ""):
        name, colon, variant = (piece.strip() for piece in part.partition(":"))
        if not (colon and variant):
            raise InputError(part, "names no variant of a format", spelling)
        found[target(name).name] = (*found.get(target(name).name, ()), variant)
    return found


KNOWN = "a .gguf file, an MLX, ONNX or compressed-tensors folder, or an .mlpackage"


def recognise(path: Path) -> Target:
    """The format of an artefact on disk, by what lies there; InputError when it is none that is known."""
    if not path.exists():
        raise InputError(path, "there is no such file or folder", download(path) or "give the path of an artefact")
    found = _kind(path)
    if found is not None:
        return found
    if inside := artifacts(path):
        several = ", ".join(file.relative_to(path).as_posix() for file, _ in inside)
        raise InputError(path, f"holds {several}", "give the path of one artefact")
    raise InputError(path, "is no artefact of a format that is known", f"give {KNOWN}")


def _kind(path: Path) -> Target | None:
    """The format of what is an artefact itself; None of what is none, and of a folder of some."""
    if path.suffix == ".gguf":
        return TARGETS["gguf"]
    if path.suffix == ".mlpackage" or (path / "Manifest.json").is_file():
        return TARGETS["coreml"]
    if path.is_dir() and any((*path.glob("*.onnx"), *path.glob("onnx/*.onnx"))):
        return TARGETS["onnx"]
    config = path / "config.json"
    if not config.is_file():
        return None
    text = read_text(config, JSON_BYTES)
    if '"quantization_config"' in text and "compressed-tensors" in text:
        return TARGETS["compressed-tensors"]
    return TARGETS["mlx" if '"quantization"' in text or _is_mlx(path) else "compressed-tensors"]


def artifacts(out: Path) -> list[tuple[Path, Target]]:
    """The artefacts in an output folder, in the registry's order, or those that lie beside each other in one."""
    if not out.is_dir() or (out / "config.json").is_file():
        return []
    places = [(target, target.path(Path(), "*", "*").as_posix()) for target in TARGETS.values()]
    found = [(path, target) for target, place in places for path in sorted(out.glob(place)) if path.suffix != PARTIAL]
    beside = (path for path in sorted(out.iterdir()) if path.suffix != PARTIAL)
    return found or [(path, target) for path in beside if (target := _readable_kind(path)) is not None]


def _readable_kind(path: Path) -> Target | None:
    """As `_kind`; None also of what cannot be read as what it looks like."""
    try:
        return _kind(path)
    except InputError:
        return None


def _is_mlx(folder: Path) -> bool:
    """Whether the weights say that MLX wrote them."""
    from gemexport.formats.storage.safetensors import read_metadata

    return any(read_metadata(file).get("format") == "mlx" for file in sorted(folder.glob("*.safetensors"))[:1])
