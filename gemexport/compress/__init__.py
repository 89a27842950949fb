"""The step before all others with `--compress`: llm-compressor quantizes a plain checkpoint's linears.

What it leaves in the work folder, a compressed-tensors checkpoint, is then the model that every format is made of; the
plain one stays what the loss is measured against. llm-compressor pins its own versions of transformers and
compressed-tensors, so it may live in an interpreter of its own.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemexport.exporters.result import ignore
from gemexport.exporters.streaming import write_plain as write_tensor
from gemexport.exporters.streaming import write_settings
from gemexport.formats.checkpoint import Checkpoint
from gemexport.formats.gemma.names import HEAD, module_of
from gemexport.formats.grids.recipe import Recipe, Scheme
from gemexport.formats.grids.search import fingerprint
from gemexport.formats.storage.errors import InputError
from gemexport.formats.storage.files import atomic
from gemexport.formats.storage.installing import install
from gemexport.formats.storage.safetensors import DTYPE_NAMES, Entry, MappedArray, ShardedWriter, read_folder
from gemexport.formats.tensor import DType
from gemexport.shared.scratch import keep_log

if TYPE_CHECKING:
    from gemexport.shared.place import Place

METHODS = ("gptq", "awq", "rtn")
FOLDER, MARK = "compressed", "compressed.json"
# Of a user's text: more than the widest row of E2B has weights (12,288), so that GPTQ knows every column of it from
# data; Gemma 3 270M takes a minute for a thousand tokens on two cores.
CALIBRATION_TOKENS = 1 << 14
PERCENT = 100
_SCRIPT = Path(__file__).with_name("llm_compressor.py")
_TORCH: dict[DType, str] = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}


@dataclass(frozen=True)
class Compression:
    """What `--compress` asks for."""

    method: str
    python: Path  # an interpreter that has llm-compressor
    calibration: Path | None = None  # a text file; none: the built-in ones for it


def compression(
    method: str | None, python: str | Path | None = None, calibration: str | Path | None = None
) -> Compression | None:
    """What was asked for, checked; None when nothing was. InputError for what cannot be done."""
    if method is None:
        return None
    if method not in METHODS:
        raise InputError(f"--compress {method}", "is not a method", f"use one of {', '.join(METHODS)}")
    interpreter = Path(python or sys.executable)
    found = "from importlib.util import find_spec; print(bool(find_spec('llmcompressor')))"
    try:
        done = subprocess.run([str(interpreter), "-P", "-c", found], capture_output=True, text=True, check=False)
    except OSError as error:
        raise InputError(interpreter, f"cannot be run ({error.strerror})", "give a Python interpreter") from error
    if done.stdout.strip() != "True":
        remedy = f"{install('compress')}, or name an interpreter that has it with --compress-python"
        raise InputError(f"--compress {method}", f"needs llmcompressor, which {interpreter} has not", remedy)
    return Compression(method, interpreter, None if calibration is None else Path(calibration))


def compress(place: Place, asked: Compression, recipe: Recipe, progress: Callable[[int], None]) -> str:
    """Leave the compressed checkpoint in the work folder and return llm-compressor's version; progress is in percent.

    What an earlier run left there is used when it was made from the same checkpoint in the same way. Raises InputError
    for a checkpoint that is compressed already, a text that cannot be read, and when llm-compressor gives up.
    """
    plain = place.plain()
    scheme = recipe.linear
    if scheme is None:
        raise InputError(recipe.name, "is a recipe without a scheme for linears", "take another for --compress")
    if any(tensor.grid for tensor in plain.tensors.values()):
        raise InputError(plain.path, "is compressed already", "leave --compress out")
    samples = _samples(plain, asked)
    mark = _mark(plain, asked, recipe, samples)
    target = place.compressed
    assert target is not None
    marker = target.with_name(MARK)
    try:
        known = json.loads(marker.read_text("utf-8"))
        if known["mark"] == mark and target.is_dir():
            progress(PERCENT)
            return str(known["version"])
    except (OSError, ValueError, KeyError):
        marker.unlink(missing_ok=True)
    scratch = place.work / f"{FOLDER}-scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        version = _run(plain, asked, scheme, samples, scratch, target, progress)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    with atomic(marker) as partial:
        partial.write_text(json.dumps({"mark": mark, "version": version}), "utf-8")
    return version


def _samples(plain: Checkpoint, asked: Compression) -> list[list[int]]:
    """Token sequences to calibrate on; none for a method that needs none. InputError for a text that cannot be read."""
    from gemexport.shared.texts import tokens_of
    from gemexport.validators.checks import prompts

    if asked.method == "rtn":
        return []
    ids = tokens_of(plain, asked.calibration)
    return prompts.sequences(ids, plain.architecture, min(sum(map(len, ids)), CALIBRATION_TOKENS) + 1)


def _mark(plain: Checkpoint, asked: Compression, recipe: Recipe, samples: list[list[int]]) -> str:
    """A digest of all that the compressed checkpoint depends on."""
    facts = [fingerprint(plain, recipe), asked.method, str(asked.python), samples]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _run(
    plain: Checkpoint,
    asked: Compression,
    scheme: Scheme,
    samples: list[list[int]],
    scratch: Path,
    target: Path,
    progress: Callable[[int], None],
) -> str:
    """Have llm-compressor do it in its interpreter; the result becomes the folder `target`. Returns its version."""
    source, out, task = scratch / "plain", scratch / "out", scratch / "task.json"
    # Norms of 1 + w become w in the model's dtype after AWQ has changed them: in bf16 that would round twice.
    dtype = write_plain(plain, source, "f32" if asked.method == "awq" else None)
    ignored = [
        module_of(name)
        for name, tensor in plain.tensors.items()
        if plain.model.specs[name].role.is_matrix and tensor.shape[1] % scheme.group_size
    ]
    ignored.insert(0, module_of(HEAD))
    facts = {
        "model": str(source.absolute()), "out": str(out.absolute()), "method": asked.method, "samples": samples,
        "bits": scheme.bits, "group_size": scheme.group_size, "dtype": _TORCH[dtype], "ignore": ignored,
    }  # fmt: skip
    task.write_text(json.dumps(facts), "utf-8")
    _call(asked, task, progress)
    config = json.loads((out / "config.json").read_text("utf-8"))
    with atomic(target) as folder:
        _assemble(plain, read_folder(out), asked.method == "awq", folder)
        settings = {**_config(plain), "quantization_config": config["quantization_config"]}
        write_settings(folder, settings, plain)
    return str(json.loads(task.with_name("done.json").read_text("utf-8"))["version"])


def _call(asked: Compression, task: Path, progress: Callable[[int], None]) -> None:
    """Run the script on a task. What it prints goes into the node's log as it comes, its layers into `progress`.

    Raises InputError with the script's last error. All that it printed is then left in a temporary file: a run that
    fails takes its new output folder away, and the logs in it.
    """
    command = [str(asked.python), "-P", str(_SCRIPT), str(task.absolute())]
    printed, done = [], 0
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", cwd=task.parent
    ) as process:  # text: bars, which end with a carriage return, are lines too
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            printed.append(line)
            reached = max(done, _reached(line))
            progress(reached - done)
            done = reached
    if process.returncode:
        errors = [line.strip() for line in printed if re.match(r"\w[\w.]*(Error|Exception)\b", line)]
        reason = errors[-1] if errors else f"status {process.returncode}"
        log = keep_log("compress", "".join(printed))
        raise InputError(f"--compress {asked.method}", f"llm-compressor gave up ({reason})", f"see {log}")
    progress(PERCENT - done)


def _reached(line: str) -> int:
    """Percent of the work that a bar of llm-compressor tells of: `(3/19): Calibrating:  25%|`; 0 of other lines.

    It goes through each layer twice: to calibrate it, and then, quantized, to give the next one its input.
    """
    found = re.match(r"\((\d+)/(\d+)\): (Calibrating|Propagating): +(\d+)%", line)
    if found is None:
        return 0
    layer, layers, passed, percent = int(found[1]), int(found[2]), found[3] == "Propagating", int(found[4])
    return int(PERCENT * (layer - 1 + (passed + percent / 100) / 2) / layers)


def _assemble(plain: Checkpoint, found: Mapping[str, MappedArray], smoothed: bool, folder: Path) -> None:
    """Write the codes and scales that llm-compressor `found`, and everything else as the plain checkpoint has it.

    llm-compressor turns norms of 1 + w into plain ones and back, and rounds on the way; only where AWQ has `smoothed`
    them are they taken from it.
    """
    own = {
        name: tensor
        for name, tensor in plain.tensors.items()
        if name in found and f"{name}_scale" not in found and not (smoothed and len(tensor.shape) < 2)
    }
    entries = [
        Entry(name, DTYPE_NAMES[own[name].dtype], own[name].shape) if name in own else array.entry
        for name, array in found.items()
    ]
    with ShardedWriter(folder, entries) as out:
        for name, array in found.items():
            if name in own:
                write_tensor(out, own[name], own[name].dtype, [], ignore)
            else:
                out.write(name, array.array)


def write_plain(checkpoint: Checkpoint, folder: Path, dtype: DType | None = None) -> DType:
    """Write a checkpoint's decoder as a folder that transformers reads, a slice of rows at a time; returns its dtype.

    That is `dtype`, or that of its matrices, f32 where they have several.
    """
    specs = checkpoint.model.specs
    dtypes = {tensor.dtype for name, tensor in checkpoint.tensors.items() if specs[name].role.is_matrix}
    chosen: DType = dtype or (dtypes.pop() if len(dtypes) == 1 else "f32")
    entries = [Entry(name, DTYPE_NAMES[chosen], tensor.shape) for name, tensor in checkpoint.tensors.items()]
    with ShardedWriter(folder, entries) as out:
        for tensor in checkpoint.tensors.values():
            write_tensor(out, tensor, chosen, [], ignore)
    write_settings(folder, _config(checkpoint), checkpoint)
    return chosen


def _config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The decoder's own config, under the name of its class alone."""
    return {**checkpoint.text_config, "architectures": [checkpoint.model.family.reference_class]}
