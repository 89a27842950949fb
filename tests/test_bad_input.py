"""Whatever is wrong with a request or a checkpoint: exit status 2, one line that names it, and nothing left behind."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gemexport
from gemexport import demo
from gemexport.cli import main
from gemexport.formats.checkpoint import open_checkpoint
from gemexport.formats.storage.files import locked
from gemexport.formats.storage.safetensors import INDEX_NAME, ShardedWriter, read_folder
from gemexport.registry import split, split_formats, split_variants
from gemexport.request import request


@pytest.fixture
def model(tiny_gemma4: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(tiny_gemma4, tmp_path / "model"))


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line that a command prints before it ends with status 2."""
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments)])
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("gemexport: ")]
    assert ended.value.code == 2
    assert len(lines) == 1
    assert captured.out == ""
    return lines[0]


def edit_config(model: Path, **changes: object) -> None:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_header(model: Path, change: Callable[[dict[str, dict[str, list[int]]]], None]) -> None:
    path = model / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def poison(model: Path, name: str, value: float) -> None:
    """Write one bf16 value into a tensor."""
    path = model / "model.safetensors"
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    start = 8 + length + json.loads(data[8 : 8 + length])[name]["data_offsets"][0]
    data[start : start + 2] = (np.array([value], np.float32).view(np.uint32) >> 16).astype("<u2").tobytes()
    path.write_bytes(data)


def truncate(model: Path) -> None:
    os.truncate(model / "model.safetensors", 100_000)


def overlap(model: Path) -> None:
    def change(header: dict[str, dict[str, list[int]]]) -> None:
        first, second = [name for name in header if name != "__metadata__"][:2]
        size = header[second]["data_offsets"][1] - header[second]["data_offsets"][0]
        start = header[first]["data_offsets"][0]
        header[second]["data_offsets"] = [start, start + size]

    edit_header(model, change)


def exceed(model: Path) -> None:
    def change(header: dict[str, dict[str, list[int]]]) -> None:
        last = list(header)[-1]
        header[last]["data_offsets"][1] += 1 << 40

    edit_header(model, change)


def point_outside(model: Path) -> None:
    (model / "model.safetensors").rename(model.parent / "outside.safetensors")
    (model / INDEX_NAME).write_text(json.dumps({"weight_map": {"model.norm.weight": "../outside.safetensors"}}))


def lose_shard(model: Path) -> None:
    (model / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (model / INDEX_NAME).write_text(json.dumps(index))


NORM = "model.layers.0.input_layernorm.weight"
QUERY = "model.layers.1.self_attn.q_proj.weight"

DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda model: (model / "config.json").unlink(), "there is no config.json"),
    "config is no JSON": (lambda model: (model / "config.json").write_text("{"), "config.json: cannot be read as JSON"),
    "truncated": (truncate, "model.safetensors: is not a whole safetensors file"),
    "overlapping offsets": (overlap, "model.safetensors: is not a whole safetensors file"),
    "offsets past the end": (exceed, "model.safetensors: is not a whole safetensors file"),
    "missing shard": (lose_shard, "names the shard model-00001-of-00002.safetensors, which is missing"),
    "shard outside": (point_outside, "names a shard outside the folder"),
    "NaN": (lambda model: poison(model, QUERY, float("nan")), f"tensor {QUERY} has NaN weights"),
    "infinite": (lambda model: poison(model, NORM, float("inf")), f"tensor {NORM} has infinite weights"),
    "wrong shape": (lambda model: edit_config(model, intermediate_size=128), "has the shape"),
    "unknown architecture": (lambda model: edit_config(model, model_type="llama"), "the architecture 'llama'"),
    "unknown quantization": (
        lambda model: edit_config(model, quantization_config={"quant_method": "nought"}),
        "the weights are quantized in a way that is not known here (nought)",
    ),
    "no tokenizer": (lambda model: (model / "tokenizer.json").unlink(), "there is no tokenizer.json"),
    "broken tokenizer": (
        lambda model: (model / "tokenizer.json").write_text("[]"),
        "tokenizer.json: is not a tokenizer",
    ),
    "no weights": (lambda model: (model / "model.safetensors").unlink(), "there is no model.safetensors"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint(damage: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, problem = DAMAGES[damage]
    change(model)
    out = tmp_path / "deep" / "out"
    assert problem in complaint(capsys, "all", model, "-o", out, "--only", "gguf")
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["all", "nowhere"], "nowhere: there is no such file or folder"),
        (["all", "google/gemma-3-270m-it"], "hf download google/gemma-3-270m-it --local-dir gemma-3-270m-it, and give"),
        (["inspect", "google/gemma"], "google/gemma: there is no such file or folder; if it is a model of the Hub, hf"),
        (["plan", "google/gemma@v2"], "hf download google/gemma --revision v2 --local-dir gemma, and give gemma"),
        (["plan", "hf.co/google/gemma"], "hf download google/gemma --local-dir gemma, and give gemma"),
        (["plan", "https://huggingface.co/a/b/tree/main"], "hf download a/b --revision main --local-dir b, and give b"),
        (["validate", "MODEL", "someone/x-GGUF"], "hf download someone/x-GGUF --local-dir x-GGUF, and give x-GGUF"),
        (["plan", "MODEL", "--adapter", "hf://someone/lora"], "hf download someone/lora --local-dir lora"),
        (["inspect", ""], "Invalid value for 'PATH': it is empty"),
        (["all", ""], "Invalid value for 'MODEL': it is empty"),
        (["all", "MODEL", "-o", ""], "Invalid value for '-o' / '--out': it is empty"),
        (["gguf", "MODEL", "--imatrix", ""], "Invalid value for '--imatrix': it is empty"),
        (["all", "MODEL", "--only", ""], "an empty list: names no format"),
        (["all", "MODEL", "--variants", ""], "an empty list: names no variant of a format"),
        (["gguf", "MODEL", "--variant", ""], "gguf: no variant is named"),
        (["all", "MODEL", "--recipe", ""], "an empty name: is neither a recipe nor a file"),
        (["all", "MODEL", "--only", "gguf,tflite"], "tflite: is not a format"),
        (["all", "MODEL", "--memory", "lots"], "--memory lots: is not a size"),
        (["all", "MODEL", "--recipe", "magic"], "magic: is neither a recipe nor a file"),
        (["all", "MODEL", "--memory", "0"], "--memory 0: is too small"),
        (["all", "MODEL", "--memory", "0GB"], "--memory 0: is too small"),
        (["all", "MODEL", "--memory", "8"], "--memory 8: is too small for bytes; write a unit, such as 8GB"),
        (["plan", "MODEL", "--memory", "999999"], "--memory 999999: is too small for bytes"),
        (["all", "MODEL", "--memory", "-8GB"], "--memory -8GB: is not a size"),
        (["all", "MODEL", "--memory", "8 gigabytes"], "--memory 8 gigabytes: is not a size"),
        (["all", "MODEL", "--only", ","], ",: names no format"),
        (["all", "MODEL", "--only", "gguf", "--skip", "gguf"], "--skip gguf: leaves no format to write"),
        (["all", "MODEL", "--calibration", "nothing.txt"], "nothing.txt: there is no such file"),
        (["onnx", "MODEL", "--no-validate", "--range-method", "max"], "there is no range method max"),
        (["gguf", "MODEL", "--variant", "Q9"], "gguf: there is no variant Q9"),
        (["gguf", "MODEL", "--variant", ","], "gguf: no variant is named"),
        (["all", "MODEL", "--variants", "gguf"], "gguf: names no variant of a format; write FORMAT:VARIANT"),
        (["all", "MODEL", "--variants", "gguf:Q8_0,:"], ":: names no variant of a format"),
        (["all", "MODEL", "--variants", "tflite:int8"], "tflite: is not a format"),
        (["plan", "MODEL", "--variants", "mlx:8bit"], "mlx: there is no variant 8bit"),
        (["validate", "MODEL", "nothing.gguf"], "nothing.gguf: there is no such file"),
        (["validate", "MODEL", "."], "is no artefact of a format that is known"),
        (["validate", "MODEL", "MODEL", "--qnn-arch", "81"], "--qnn-arch 81: is for --qnn-context"),
        (["validate", "MODEL", "MODEL", "--qnn-context", "q"], "which the NPU's compiler does not take"),
        (["inspect", "nothing"], "nothing: there is no such file"),
        (["inspect", "."], "or the folder of a checkpoint"),
    ],
)
def test_impossible_request(
    arguments: list[str],
    problem: str,
    tiny_gemma4: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [str(tiny_gemma4) if argument == "MODEL" else argument for argument in arguments]
    assert problem in complaint(capsys, *given)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "asked",
    [
        {"formats": ["tflite"]},
        {"variants": {"tflite": ("x",)}},
        {"jobs": 0},
        {"jobs": -1},
        {"memory": 0},
        {"memory": 8},
        {"tokens": 1},
    ],
)
def test_impossible_request_from_python(asked: dict[str, Any], tiny_gemma4: Path, tmp_path: Path) -> None:
    with pytest.raises(gemexport.InputError, match=r"is not a format|is too small"):
        gemexport.export(tiny_gemma4, tmp_path / "out", **asked)
    assert not (tmp_path / "out").exists()


def test_variants_are_told_apart_by_commas_and_made_once(tiny_gemma4: Path) -> None:
    variants = split(" Q4_0, Q8_0,Q4_0,")
    assert variants == ("Q4_0", "Q8_0")
    asked = request(model=tiny_gemma4, formats=["gguf"], variants={"gguf": ("Q4_0", "Q8_0", "Q4_0")})
    assert asked.variants == {"gguf": variants}


def test_formats_and_variants_are_known_in_letters_of_any_case(tiny_gemma4: Path) -> None:
    assert split_formats("GGUF, CoreML") == ["gguf", "coreml"]
    assert split_variants("GGUF:q8_0, gguf:bf16,MLX:4BIT") == {"gguf": ("q8_0", "bf16"), "mlx": ("4BIT",)}
    variants = {"GGUF": ("q8_0", "Q8_0", "bf16"), "mlx": ("4BIT",)}
    asked = request(model=tiny_gemma4, formats=["GGUF", "Onnx"], variants=variants)
    assert asked.formats == {"gguf", "onnx"}
    assert asked.variants == {"gguf": ("Q8_0", "BF16"), "onnx": ("int4", "npu"), "mlx": ("4bit",)}
    assert "onnx" not in request(model=tiny_gemma4, skip=["ONNX"]).variants


def test_variants_of_all(tiny_gemma4: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main_ends_well("plan", tiny_gemma4, "--only", "GGUF,mlx", "--variants", "gguf:q8_0,gguf:F32", "--no-validate")
    shown = capsys.readouterr().out
    assert all(step in shown for step in ("export gguf:Q8_0", "export gguf:F32", "export mlx:4bit"))
    assert "gguf:Q4_0" not in shown


@pytest.mark.parametrize(
    ("command", "lacking", "problem", "extra"),
    [
        (("all", "MODEL"), "everything", "nothing is installed that could write any of these formats", "all"),
        (("demo",), "everything", "nothing is installed that could write any of these formats", "all"),
        (("gguf", "MODEL"), "everything", "gguf: needs gguf, xllamacpp, which is not installed", "llama,reference"),
        (("all", "MODEL"), "torch", "judging needs torch, not installed here", "reference"),
        (("demo",), "torch", "judging needs torch, not installed here", "reference"),
        (("validate", "MODEL", "MODEL"), "torch", "judging needs torch, not installed here", "reference"),
    ],
)
def test_what_is_not_installed(
    command: tuple[str, ...],
    lacking: str,
    problem: str,
    extra: str,
    tiny_gemma4: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The line installs from the clone that this one came from, into the environment that runs it."""
    monkeypatch.setattr("gemexport.registry._installed", lambda name: lacking not in ("everything", name))
    monkeypatch.chdir(tmp_path)
    line = complaint(capsys, *(str(tiny_gemma4) if word == "MODEL" else word for word in command))
    assert problem in line
    origin = distribution("gemexport").read_text("direct_url.json")
    source = Path(__file__).parents[1] if origin and "dir_info" in origin else "gemexport"
    assert f"{sys.executable} -m pip install '{source}[{extra}]'" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [(), *((name,) for name in ("all", "validate", "inspect", "plan", "demo", "gguf"))])
def test_help_is_short_too(command: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    main_ends_well(*command, "-h")
    short = capsys.readouterr().out
    main_ends_well(*command, "--help")
    assert short == capsys.readouterr().out != ""


def test_brackets_in_a_path_are_shown(tiny_gemma4: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rich takes [x] for markup: the folder that was named was not the one that was written."""
    model = Path(shutil.copytree(tiny_gemma4, tmp_path / "model [x] [y]"))
    main_ends_well("plan", model, "--only", "gguf")
    assert "model [x] [y]-gemexport" in capsys.readouterr().out
    main_ends_well("inspect", model)
    assert "model [x] [y]" in capsys.readouterr().out


def test_a_terminal_that_lacks_letters(tiny_gemma4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A traceback, and the exit status of a failed verdict, was what a path with an umlaut gave."""
    model = Path(shutil.copytree(tiny_gemma4, tmp_path / "Mödell"))
    shown = io.BytesIO()
    terminal = io.TextIOWrapper(shown, encoding="ascii")
    monkeypatch.setattr("sys.stdout", terminal)
    main_ends_well("plan", model, "--only", "gguf")
    terminal.flush()
    assert b"M\\xf6dell-gemexport" in shown.getvalue()


def test_an_interrupted_run_says_so(
    tiny_gemma4: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gemexport.plan.print_plan", interrupt)
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(tiny_gemma4)])
    assert ended.value.code == 130
    assert capsys.readouterr().err == "gemexport: interrupted\n"


def main_ends_well(*arguments: str | Path) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments)])
    assert ended.value.code == 0


def test_output_of_another_run(tiny_gemma4: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two runs into one folder would remove what the other one writes."""
    out = tmp_path / "out"
    main_ends_well("gguf", tiny_gemma4, "-o", out, "--no-validate")
    before = {path: path.stat().st_mtime_ns for path in (out / "gguf").iterdir()}
    capsys.readouterr()
    with locked(out / ".gemexport" / "lock"):
        assert f"{out}: another run is writing there" in complaint(capsys, "mlx", tiny_gemma4, "-o", out, "--fresh")
    assert before == {path: path.stat().st_mtime_ns for path in (out / "gguf").iterdir()}
    assert not (out / "mlx").exists()
    main_ends_well("mlx", tiny_gemma4, "-o", out, "--no-validate")


def test_output_of_another_model(tiny_gemma4: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = demo.make(tmp_path / "other", family="gemma3", size="tiny")
    out = tmp_path / "out"
    with pytest.raises(SystemExit):
        main(["gguf", str(tiny_gemma4), "-o", str(out), "--no-validate"])
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    capsys.readouterr()
    assert "holds the artefacts of another model (tiny-gemma4)" in complaint(capsys, "gguf", other, "-o", out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_output_folder_with_something_else_in_it(
    tiny_gemma4: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert "is not empty and not an output folder" in complaint(capsys, "all", tiny_gemma4, "-o", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("place", ["file/out", "/proc/out"])
def test_output_that_cannot_be_written(
    place: str, tiny_gemma4: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    line = complaint(capsys, "all", tiny_gemma4, "-o", tmp_path / place)
    assert "cannot be written" in line
    assert "choose another folder with -o" in line


def test_names_that_are_too_long_or_no_utf8(
    tiny_gemma4: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "(file name too long)" in complaint(capsys, "all", tiny_gemma4, "-o", tmp_path / ("x" * 300))
    assert "(file name too long)" in complaint(capsys, "all", tmp_path / ("x" * 300))
    assert "\\udcff: has a name that is no UTF-8" in complaint(capsys, "all", tiny_gemma4, "-o", tmp_path / "\udcff")
    assert not list(tmp_path.iterdir())


def test_output_that_nobody_takes(tiny_gemma4: Path) -> None:
    """A full device is a line; a pipe whose reader has gone is nothing to talk about."""
    said = (
        "gemexport: standard output or a file: cannot be written (no space left on device); see where the output goes\n"
    )
    reader, closed = os.pipe()
    os.close(reader)
    full = os.open("/dev/full", os.O_WRONLY)
    for place, expected in ((full, (2, said)), (closed, (1, ""))):
        command = [sys.executable, "-m", "gemexport.cli", "inspect", str(tiny_gemma4), "--json"]
        done = subprocess.run(command, stdout=place, stderr=subprocess.PIPE, text=True, check=False)
        os.close(place)
        assert (done.returncode, done.stderr) == expected


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 400 kB, where the system lets us mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", place], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("this user cannot mount a tmpfs")
    yield place
    subprocess.run(["umount", place], check=True)


def test_full_disk(
    tiny_gemma4: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It fills up while the run writes: there was room when it started."""
    monkeypatch.setattr("gemexport.run.check_room", lambda *_: None)
    line = complaint(capsys, "all", tiny_gemma4, "-o", small_disk / "out", "--only", "gguf,mlx", "--no-validate")
    assert "the disk is full; free some space" in line
    assert not list(small_disk.iterdir())


def test_a_disk_that_fills_up_in_the_middle_of_judging_keeps_the_artefact(
    tiny_gemma3: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was the artefact that a full disk was blamed on: `do not use it`."""
    monkeypatch.setattr("gemexport.run.check_room", lambda *_: None)
    out = small_disk / "out"
    with pytest.raises(SystemExit) as ended:
        main(["gguf", str(tiny_gemma3), "-o", str(out)])
    shown = capsys.readouterr()
    assert ended.value.code == 2
    assert shown.err.splitlines()[-1].endswith("the disk is full; free some space, or choose another folder with -o")
    assert "do not use" not in shown.out
    assert [path.name for path in (out / "gguf").iterdir()] == ["tiny-gemma3-Q4_0.gguf"]


DOWN = "model.layers.1.mlp.down_proj"


def turn(key: str) -> Callable[[dict[str, dict[str, list[int]]]], None]:
    """Swap the two sizes of an array, which keeps its bytes and is another shape."""

    def change(header: dict[str, dict[str, list[int]]]) -> None:
        header[f"{DOWN}.{key}"]["shape"].reverse()

    return change


def lose(key: str) -> Callable[[dict[str, dict[str, list[int]]]], None]:
    """Call an array something else."""

    def change(header: dict[str, dict[str, list[int]]]) -> None:
        header[f"{DOWN}.{key}s_of_another_module"] = header.pop(f"{DOWN}.{key}")

    return change


@pytest.mark.parametrize(
    ("source", "change", "problem"),
    [
        ("llm-compressor-w4a16", turn("weight_packed"), f"{DOWN}.weight"),
        ("llm-compressor-w4a16", lose("weight_scale"), f"tensor {DOWN}.weight is I32 without scales"),
        ("gptq", turn("qweight"), f"{DOWN}.weight"),
        ("gptq", lose("scales"), f"{DOWN}.scales is missing"),
        ("awq", turn("qweight"), f"{DOWN}.weight"),
        ("awq", lose("scales"), f"{DOWN}.scales is missing"),
    ],
)
def test_compressed_checkpoint_that_lies(
    source: str,
    change: Callable[[dict[str, dict[str, list[int]]]], None],
    problem: str,
    golden: Path,
    tiny_gemma3: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = Path(shutil.copytree(golden / source, tmp_path / source))
    shutil.copyfile(tiny_gemma3 / "tokenizer.json", model / "tokenizer.json")
    edit_header(model, change)
    assert problem in complaint(capsys, "all", model, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def after_name(data: bytes, name: bytes) -> int:
    """Where a tensor's entry in a GGUF header goes on behind its name."""
    return data.index(len(name).to_bytes(8, "little") + name) + 8 + len(name)


def tensor_count(data: bytearray) -> None:
    data[8:16] = (int.from_bytes(data[8:16], "little") + 1).to_bytes(8, "little")


def offset(data: bytearray) -> None:
    # The number of dimensions, two of them, the type, and then the offset (gguf.md of ggml).
    place = after_name(data, b"blk.0.attn_q.weight") + 4 + 2 * 8 + 4
    data[place : place + 8] = (1 << 40).to_bytes(8, "little")


def string_length(data: bytearray) -> None:
    data[24:32] = (1 << 50).to_bytes(8, "little")


@pytest.mark.parametrize("lie", [tensor_count, offset, string_length])
@pytest.mark.parametrize("command", ["all", "inspect"])
def test_gguf_that_lies(
    lie: Callable[[bytearray], None], command: str, mixed_gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "lies.gguf"
    data = bytearray(mixed_gguf.read_bytes())
    lie(data)
    path.write_bytes(data)
    line = complaint(capsys, command, path, *(["-o", tmp_path / "out"] if command == "all" else []))
    assert line.startswith(f"gemexport: {path}: ")
    assert not (tmp_path / "out").exists()


def fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def device(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [fifo, device])
@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("config.json", "gguf"),
        ("config.json", "inspect"),
        ("config.json", "plan"),
        ("tokenizer_config.json", "gguf"),
        ("tokenizer.json", "plan"),
        ("generation_config.json", "plan"),
        ("chat_template.jinja", "plan"),
        ("model.safetensors", "inspect"),
        (INDEX_NAME, "inspect"),
    ],
)
def test_a_pipe_or_a_device_is_no_file(
    make: Callable[[Path], None],
    name: str,
    command: str,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make(model / name)
    if name == INDEX_NAME:
        (model / "model.safetensors").unlink()
    out = ["--no-validate", "-o", tmp_path / "out"] if command == "gguf" else []
    assert str(model) in complaint(capsys, command, model, *out)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("make", [fifo, device])
@pytest.mark.parametrize("name", ["model", "model.gguf"])
def test_a_pipe_or_a_device_is_no_model(
    make: Callable[[Path], None], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / name)
    assert "and should be a file" in complaint(capsys, "gguf", tmp_path / name, "-o", tmp_path / "out")
    assert str(tmp_path / name) in complaint(capsys, "inspect", tmp_path / name)


@pytest.mark.parametrize("make", [fifo, device])
def test_a_pipe_or_a_device_in_an_artefact(
    make: Callable[[Path], None], tiny_gemma3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main_ends_well("all", tiny_gemma3, "-o", tmp_path, "--only", "mlx,coreml,onnx", "--no-validate")
    capsys.readouterr()
    for file in (
        "coreml/*/Data/*/*/weight.bin",
        "coreml/*/Manifest.json",
        "onnx/int4/*.data",
        "mlx/4bit/*.safetensors",
    ):
        path = next(tmp_path.glob(file))
        make(path)
        folder = next(parent for parent in path.parents if parent.parent.name in ("coreml", "onnx", "mlx"))
        assert str(path.parent) in complaint(capsys, "validate", tiny_gemma3, folder)


def test_headers_without_end(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A million tensors took 34 s and 1.6 GB, in each step that opened the checkpoint."""
    empty = {"dtype": "BF16", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"tensor.{i}": empty for i in range(1 << 18)}).encode()
    (model / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert "tensors or more in a header of" in complaint(capsys, "gguf", model, "-o", tmp_path / "out")
    (model / "model.safetensors").write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    assert "is not a whole safetensors file" in complaint(capsys, "gguf", model, "-o", tmp_path / "out")


SETTINGS: list[tuple[str, object]] = [
    *[("sliding_window", value) for value in (-1, 0, 10**30, True, "8", [8], 8.5)],
    *[("max_position_embeddings", value) for value in (1e30, 10**30, 0, -4096, None, float("inf"))],
    *[("rms_norm_eps", value) for value in (float("nan"), float("inf"), -1e-6, 0, "1e-6", 1e30)],
    *[("final_logit_softcapping", value) for value in (-30.0, 0, float("nan"), True)],
    *[("eos_token_id", value) for value in (10**12, -1, [1, -2], "1", [[1]], True, 1.5)],
    ("bos_token_id", -2),
    ("pad_token_id", [0]),
    ("num_hidden_layers", 10**9),
    ("head_dim", 10**30),
    ("global_head_dim", -64),
    ("num_kv_shared_layers", -1),
    ("per_layer_config", {"2": {"head_dim": 10**30}}),
]


@pytest.mark.parametrize(("key", "value"), SETTINGS)
def test_a_setting_that_is_absurd(
    key: str, value: object, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_config(model, **{key: value})
    line = complaint(capsys, "plan", model)
    assert line.startswith(f"gemexport: {model / 'config.json'}: {key}")
    if value in (-1, -30.0, 1e30):
        assert line == complaint(capsys, "all", model, "-o", tmp_path / "out", "--no-validate")
        assert line == complaint(capsys, "inspect", model)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 0},
        {"rope_theta": -1.0},
        {"rope_theta": float("nan")},
        {"rope_theta": 1e4, "rope_type": "linear", "factor": 0},
        {"rope_theta": 1e4, "rope_type": "proportional", "partial_rotary_factor": 3.0},
        {"rope_theta": "1e4"},
    ],
)
def test_positions_that_are_absurd(rope: dict[str, Any], model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_config(model, rope_parameters={"full_attention": rope, "sliding_attention": rope})
    assert any(f"config.json: {key}" in complaint(capsys, "plan", model) for key in rope)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}}, "rope_parameters"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "llama3", "rope_theta": 1e6}}},
            "rope_parameters.full_attention",
        ),
    ],
)
def test_positions_scaled_in_a_way_that_is_not_done(
    changes: dict[str, Any], key: str, tiny_gemma3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(tiny_gemma3, tmp_path / "model"))
    edit_config(model, **changes)
    line = complaint(capsys, "plan", model)
    assert f"{key}: positions are scaled by" in line
    assert f"take {key} out" in line


def test_the_whole_model_without_the_decoders_config(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / "config.json").write_text('{"model_type": "gemma4"}')
    assert "has no text_config for the decoder" in complaint(capsys, "plan", model)


def test_the_decoders_fields_under_the_name_of_the_whole(model: Path, tmp_path: Path) -> None:
    expected = open_checkpoint(model)
    edit_config(model, model_type="gemma4")
    found = open_checkpoint(model)
    assert found.model == expected.model
    assert found.text_config == expected.text_config


def settings_of(method: str) -> list[tuple[str, object]]:
    wrong = [("bits", 3), ("bits", 0), ("bits", -4), ("bits", True), ("group_size", 0), ("group_size", 10**12)]
    return [*wrong, ("group_size", "x"), ("group_size", -2), ("group_size", 4), ("group_size", 32.5)]


@pytest.mark.parametrize("source", ["gptq", "awq", "mlx", "llm-compressor-w4a16"])
def test_settings_of_quantization_that_are_absurd(
    source: str, golden: Path, tiny_gemma3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if source == "mlx":
        main_ends_well("mlx", tiny_gemma3, "-o", tmp_path, "--no-validate")
        capsys.readouterr()
    model = tmp_path / "mlx" / "4bit" if source == "mlx" else Path(shutil.copytree(golden / source, tmp_path / source))
    shutil.copyfile(tiny_gemma3 / "tokenizer.json", model / "tokenizer.json")
    open_checkpoint(model)
    path = model / "config.json"
    config = path.read_text()
    for key, value in settings_of(source):
        changed = json.loads(config)
        given = changed["quantization" if source == "mlx" else "quantization_config"]
        if source.startswith("llm"):
            given = given["config_groups"]["group_0"]["weights"]
            key = "num_bits" if key == "bits" else key
        given[key] = value
        path.write_text(json.dumps(changed))
        line = complaint(capsys, "plan", model)
        assert str(model) in line
        assert key in line or (source.startswith("llm") and (key, value) == ("num_bits", 3)) or source == "mlx"


def rename(model: Path, names: dict[str, str], folder: Path) -> Path:
    """The checkpoint in `model` with some of its tensors a second time, as zeros, under other names."""
    stored = read_folder(model)
    twice = {other: stored[name].entry for name, other in names.items()}
    entries = [array.entry for array in stored.values()]
    entries += [replace(entry, name=name) for name, entry in twice.items()]
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    with ShardedWriter(folder, entries) as out:
        for name, array in stored.items():
            out.write(name, array.array)
        for name in twice:
            out.write(name, np.zeros_like(stored[next(k for k, v in names.items() if v == name)].array))
    return folder


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model.", "language_model."])
def test_one_tensor_under_two_names(
    prefix: str, tiny_gemma3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last one read was exported, and passed."""
    name = "layers.1.mlp.up_proj.weight"
    model = rename(tiny_gemma3, {f"model.{name}": f"{prefix}{name}"}, tmp_path / "model")
    line = complaint(capsys, "plan", model)
    assert f"model.{name}" in line
    assert f"{prefix}{name}" in line


def test_one_tensor_under_two_names_and_in_codes(
    golden: Path, tiny_gemma3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(golden / "gptq", tmp_path / "gptq"))
    shutil.copyfile(tiny_gemma3 / "tokenizer.json", model / "tokenizer.json")
    stem = "layers.1.mlp.up_proj.qweight"
    again = rename(model, {f"model.{stem}": f"model.language_model.{stem}"}, tmp_path / "again")
    assert "twice" in complaint(capsys, "plan", again)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("model.layers.0.mlp.gate_proj.weight", "model.layers.0.router.proj.weight"),
        ("model.layers.0.input_layernorm.weight", "model.layers.0.self_attn.q_proj.bias"),
        ("model.layers.0.mlp.gate_proj.weight", "model.layers.6.mlp.gate_proj.weight"),
        ("model.norm.weight", "model.layers.0.self_attn.k_proj.bias"),
        ("model.norm.weight", "model.layers.0.self_attn.q_proj.scale"),
        ("model.norm.weight", "model.per_layer_model_projection.weight"),
        ("model.norm.weight", "lm_head.bias"),
    ],
)
def test_a_tensor_that_the_decoder_has_no_place_for(
    name: str, other: str, tiny_gemma3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = rename(tiny_gemma3, {name: other}, tmp_path / "model")
    assert f"has no place for the tensor {other}" in complaint(capsys, "plan", model)


@pytest.mark.parametrize(
    "other",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.0.self_attn.k_scale",
        "model.layers.0.mlp.up_proj.input_scale",
        "model.vision_tower.patches.weight",
        "multi_modal_projector.weight",
        "v_head.weight",
    ],
)
def test_tensors_that_programs_leave_unused_as_well(other: str, tiny_gemma3: Path, tmp_path: Path) -> None:
    model = rename(tiny_gemma3, {"model.norm.weight": other}, tmp_path / "model")
    assert open_checkpoint(model).left_out == (other,)


def edit_tokenizer(model: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = model / "tokenizer.json"
    tokenizer = json.loads(path.read_text("utf-8"))
    change(tokenizer)
    path.write_text(json.dumps(tokenizer, ensure_ascii=False), "utf-8")


def regular_expression(text: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": text}, "behavior": "Isolated", "invert": False}
    return {"pre_tokenizer": split}


TENFOLD = {
    "type": "Sequence",
    "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}] * 9,
}
TOKENIZERS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "vocab is a list": (lambda t: t["model"].update(vocab=[]), "model.vocab is no object of ids"),
    "vocab of texts": (lambda t: t["model"].update(vocab={"a": "1"}), "model.vocab is no object of ids"),
    "vocab of truth values": (lambda t: t["model"]["vocab"].update(x=True), "model.vocab is no object of ids"),
    "merges are an object": (lambda t: t["model"].update(merges={"a": "b"}), "model.merges is no list of pairs"),
    "merges of three": (lambda t: t["model"].update(merges=[["a", "b", "c"]]), "model.merges is no list of pairs"),
    "merges of what is none": (lambda t: t["model"]["merges"].append(["zq", "qz"]), "which are not two tokens"),
    "added tokens of texts": (lambda t: t.update(added_tokens=["<x>"]), "added_tokens is no list of objects"),
    "added token without an id": (lambda t: t["added_tokens"][0].pop("id"), "added_tokens is no list of objects"),
    "negative id": (lambda t: t["model"]["vocab"].update(x=-1), "has the token id -1"),
    "id without end": (lambda t: t["model"]["vocab"].update(x=1 << 40), "has the token id 1099511627776"),
    "id twice": (lambda t: t["model"]["vocab"].update(x=300), "model.vocab has the id 300 twice"),
    "id of two": (lambda t: t["added_tokens"][0].update(content="<x>"), "is of two tokens"),
    "no bytes": (lambda t: t["model"]["vocab"].pop("<0x7F>"), "has no token for 1 of them (<0x7F>"),
    "no unknown": (lambda t: t["model"].update(unk_token=None), "model.unk_token is None"),
    "unknown is none": (lambda t: t["model"].update(unk_token="<what>"), "model.unk_token is '<what>'"),
    "no regular expression": (lambda t: t.update(regular_expression("(")), "cannot be read by the tokenizers library"),
    "unknown step": (lambda t: t.update(normalizer={"type": "Magic"}), "cannot be read by the tokenizers library"),
    "step is a list": (lambda t: t.update(decoder=[1]), "decoder is no object"),
    "ever longer": (lambda t: t.update(normalizer=TENFOLD), "its normalizer makes a text up to 1e+09 times as long"),
    "regular expression without end": (
        lambda t: t.update(regular_expression("(?:a|aa)+!b")),
        "cannot be read by the tokenizers library (Onig: Regex search error: retry-limit-in-match over)",
    ),
    "a million added tokens": (
        lambda t: t.update(added_tokens=[{"id": 600 + i, "content": f"<{i}>"} for i in range(1 << 17)]),
        "added_tokens has 131072 tokens",
    ),
}


@pytest.mark.parametrize("damage", TOKENIZERS)
def test_a_tokenizer_that_is_none(damage: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, problem = TOKENIZERS[damage]
    edit_tokenizer(model, change)
    line = complaint(capsys, "mlx", model, "-o", tmp_path / "out", "--no-validate")
    assert f"{model / 'tokenizer.json'}: " in line
    assert problem in line
    assert not (tmp_path / "out").exists()


LOOP = "{% for i in range(99999) %}"
TEMPLATES = {
    "loops": LOOP * 4 + "{% endfor %}" * 4,
    "a long text": "{{ 'a' * 10**10 }}",
    "longer and longer": "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x * 10 %}{% endfor %}",
}


@pytest.mark.parametrize("text", TEMPLATES)
def test_a_template_without_end(text: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model / "chat_template.jinja").write_text(TEMPLATES[text])
    line = complaint(capsys, "gguf", model, "-o", tmp_path / "out", "--no-validate")
    assert line.startswith(f"gemexport: {model / 'chat_template.jinja'}: the chat template takes more than")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [("eos_token_id", 10**12), ("eos_token_id", "x"), ("top_p", 3.0), ("temperature", float("nan")), ("top_k", True)],
)
def test_generation_settings_that_are_absurd(
    key: str, value: object, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = model / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    assert f"{path}: {key}" in complaint(capsys, "plan", model)
