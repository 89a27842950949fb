"""Hostile inputs by kind, each given to a command: status 2, one line, under 5 s and 1 GB, and nothing left.

Every input is made of a small model with one fault, whose place and value a seeded generator chooses. Seconds are the
processor's, of the command and all processes that it started; one that only waits ends after a minute of the clock.

    python benchmarks/hostile.py [--inputs 500] [--seed 0] [--kind KIND] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemexport import demo

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
SECONDS, MEMORY, WALL = 5.0, 1 << 30, 60.0
SIZES = (-1, 0, -4096, 10**12, 10**30, 1e30, 8.5, True, "8", [8], {"8": 8}, float("nan"), float("inf"))
REALS = (-1.0, 0, float("nan"), float("inf"), 1e300, "1e-6", [1.0], True)
IDS = (-2, 10**12, 1.5, "1", [[1]], {"1": 1}, [1, -1], True)
LOOP, END = "{% for i in range(99999) %}", "{% endfor %}"


@dataclass(frozen=True)
class Bases:
    """Whole models and adapters to take copies of."""

    gemma3: Path
    gemma4: Path
    mlx: Path
    gguf: Path

    @classmethod
    def make(cls, folder: Path) -> Bases:
        """Tiny ones, in `folder`."""
        models = [demo.make(folder / family, family=family, size="tiny") for family in ("gemma3", "gemma4")]
        for name in ("mlx", "gguf"):
            run(["all", models[0], "-o", folder / "out", "--only", name, "--no-validate"], WALL * 10)
        return cls(*models, folder / "out" / "mlx" / "4bit", next((folder / "out" / "gguf").glob("*.gguf")))


def edited(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file in place."""
    content = json.loads(path.read_text("utf-8")) if path.exists() else {}
    change(content)
    path.write_text(json.dumps(content, ensure_ascii=False), "utf-8")


def copied(base: Path, folder: Path) -> Path:
    return Path(shutil.copytree(base, folder / "model"))


def exported(model: Path, choose: random.Random, *formats: str) -> list[str]:
    """An export without a validator: the tokenizer is judged on the way, and no verdict waits."""
    return [choose.choice(formats or ("gguf", "mlx")), str(model), "-o", str(model.parent / "out"), "--no-validate"]


def config(choose: random.Random, bases: Bases, folder: Path) -> list[str]:
    """A setting of config.json that is absurd."""
    sizes = (
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
        *("head_dim", "sliding_window", "max_position_embeddings", "global_head_dim", "vocab_size_per_layer_input"),
    )
    reals, ids = ("rms_norm_eps", "final_logit_softcapping"), ("bos_token_id", "eos_token_id")
    key = choose.choice((*sizes, *reals, *ids))
    value = choose.choice(SIZES if key in sizes else REALS if key in reals else IDS)
    if key in ids and value == [1, -1]:
        key = "eos_token_id"
    model = copied(bases.gemma4, folder)
    edited(model / "config.json", lambda content: content.update({key: value}))
    return [choose.choice(("plan", "inspect")), str(model)]


def positions(choose: random.Random, bases: Bases, folder: Path) -> list[str]:
    """RoPE that is absurd, or of a kind that is not done."""
    rope = {"rope_theta": 1e6, "rope_type": choose.choice(("yarn", "dynamic", "llama3", "longrope", "su", "x"))}
    if choose.random() < 0.5:
        rope = {"rope_theta": choose.choice((0, -1.0, float("nan"), float("inf"), "1e4", [1e4], None)), "factor": 8.0}
    model = copied(bases.gemma4, folder)
    edited(model / "config.json", lambda content: content["rope_parameters"].update(full_attention=rope))
    return ["plan", str(model)]


def quantization(choose: random.Random, bases: Bases, folder: Path) -> list[str]:
    """Settings of quantization that are absurd, or that the arrays contradict."""
    source = choose.choice(("gptq", "awq", "mlx"))
    model = copied(bases.mlx if source == "mlx" else GOLDEN / source, folder)
    shutil.copyfile(bases.gemma3 / "tokenizer.json", model / "tokenizer.json")
    key, values = choose.choice((("bits", (3, 0, -4, 10**12, "x", 2.5)), ("group_size", (0, 10**12, "x", -2, 4, 31))))
    where = "quantization" if source == "mlx" else "quantization_config"
    edited(model / "config.json", lambda content: content[where].update({key: choose.choice(values)}))
    return ["plan", str(model)]


def generation(choose: random.Random, bases: Bases, folder: Path) -> list[str]:
    """Generation settings that are absurd."""
    key = choose.choice(("eos_token_id", "top_p", "top_k", "temperature", "min_p"))
    value = choose.choice(IDS if key == "eos_token_id" else (-1.0, float("nan"), float("inf"), 1e30, "x", [1], True))
    model = copied(bases.gemma3, folder)
    edited(model / "generation_config.json", lambda content: content.update({key: value}))
    return ["plan", str(model)]


def no_file(choose: random.Random, bases: Bases, folder: Path) -> list[str]:
    """A FIFO, a device, a folder or a link to nothing in place of a file."""
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors")
    model = copied(bases.gemma3, folder)
    path = model / choose.choice(names)
    path.unlink()
    kind = choose.choice(("fifo", "device", "folder", "nothing", "endless"))
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "endless":
        path.touch()
        os.truncate(path, 1 << 40)
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "nowhere")
    return exported(model, choose)


def header(choose: random.Random, bases: Bases, folder: Path) -> list[str]:
    """A safetensors header that lies, has no end, or names a tensor twice or without a place."""
    model = copied(bases.gemma3, folder)
    path = model / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    names = json.loads(data[8 : 8 + length])
    name = choose.choice([name for name in names if name != "__metadata__"])
    kind = choose.choice(("offset", "shape", "gone", "many", "length", "dtype", "place", "brackets"))
    if kind == "offset":
        names[name]["data_offsets"][1] += choose.choice((2, -2, 1 << 40))
    elif kind == "shape":
        names[name]["shape"] = [*names[name]["shape"], 3]
    elif kind == "gone":
        del names[name]
    elif kind == "many":
        names = {f"tensor.{i}": {"dtype": "BF16", "shape": [0], "data_offsets": [0, 0]} for i in range(1 << 18)}
    elif kind == "dtype":
        names[name]["dtype"] = choose.choice(("F64", "I4", "nought", ""))
    elif kind == "place":
        names[f"model.layers.0.{choose.choice(('router.proj', 'mlp.fourth', 'self_attn.q_proj.lora'))}.weight"] = (
            names.pop(name)
        )
    text = b"[" * 10**6 if kind == "brackets" else json.dumps(names).encode()
    size = choose.choice((1 << 62, 1 << 30, 0)) if kind == "length" else len(text)
    path.write_bytes(size.to_bytes(8, "little") + text + data[8 + length :])
    return ["plan", str(model)]


def tokenizer(choose: random.Random, bases: Bases, folder: Path) -> list[str]:
    """A tokenizer.json that is none."""

    def split(text: str) -> dict[str, Any]:
        return {"type": "Split", "pattern": {"Regex": text}, "behavior": "Isolated", "invert": False}

    ten = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
    faults: Sequence[Callable[[dict[str, Any]], object]] = (
        lambda t: t["model"].update(vocab=choose.choice(([], "x", {"a": "1"}, {"a": None}, {"a": [1]}, {"a": 1.5}))),
        lambda t: t["model"].update(merges=choose.choice(({"a": "b"}, [["a"]], [1], "ab", [["a", "b", "c"]]))),
        lambda t: t["model"]["merges"].append(choose.choice((["zq", "qz"], "zq qz", ["<0x00>", "<0x01>"]))),
        lambda t: t.update(
            added_tokens=choose.choice((["<x>"], [{"id": 1}], {"id": 1}, [{"id": "1", "content": "x"}]))
        ),
        lambda t: t["model"]["vocab"].update(x=choose.choice((-1, 1 << 40, 300, 10**30, True))),
        lambda t: t["model"]["vocab"].pop(f"<0x{choose.randrange(256):02X}>"),
        lambda t: t["model"].update(unk_token=choose.choice((None, "<nought>", 3, ["<unk>"]))),
        lambda t: t.update(pre_tokenizer=split(choose.choice(("(", "(?:a|aa)+!b", "[z-a]", "(a+)+b", "\\")))),
        lambda t: t.update(normalizer={"type": "Sequence", "normalizers": [ten] * choose.randrange(3, 12)}),
        lambda t: t.update(normalizer=choose.choice(({"type": "Magic"}, [1], "x", {"type": None}))),
        lambda t: t.update(added_tokens=[{"id": 600 + i, "content": f"<{i}>"} for i in range(1 << 17)]),
    )
    model = copied(bases.gemma3, folder)
    edited(model / "tokenizer.json", choose.choice(faults))
    return exported(model, choose)


def template(choose: random.Random, bases: Bases, folder: Path) -> list[str]:
    """A chat template without end."""
    count = choose.randrange(3, 9)
    texts = (
        LOOP * count + END * count,
        f"{{{{ 'a' * 10**{choose.randrange(10, 14)} }}}}",
        "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x * 10 %}{% endfor %}{{ n.x }}",
        f"{LOOP}{LOOP}{{% set x = 'a' * 999 %}}{END}{END}",
        "{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}"
        + f"{LOOP}{{{{ range(99999) | list | length }}}}{END}",
    )
    model = copied(choose.choice((bases.gemma3, bases.gemma4)), folder)
    (model / "chat_template.jinja").write_text(choose.choice(texts))
    return exported(model, choose)


def adapter(choose: random.Random, bases: Bases, folder: Path) -> list[str]:
    """Settings of an adapter that never end, or are absurd."""
    lora = Path(shutil.copytree(GOLDEN / "lora", folder / "lora"))
    patterns = ("(?R)", "(", "(a{1000}){1000}", r"(\w|\w\w|.)+(?<==)", "x" * 10**5, "a{99999999999}")
    faults: Sequence[dict[str, Any]] = (
        {"rank_pattern": {choose.choice(patterns): 4}},
        {"alpha_pattern": {choose.choice(patterns): 4.0}},
        {"r": choose.choice((0, -1, 10**30, "x", 3))},
        {"lora_alpha": choose.choice((float("nan"), float("inf"), "x", [1]))},
        {"rank_pattern": choose.choice(({".*": 0}, {".*": -1}, [1], {".*": "x"}))},
        {"peft_type": choose.choice(("LOHA", None, 3, "lora"))},
    )
    edited(lora / "adapter_config.json", lambda content: content.update(choose.choice(faults)))
    return ["inspect", str(bases.gemma3), "--adapter", str(lora)]


def gguf(choose: random.Random, bases: Bases, folder: Path) -> list[str]:
    """A GGUF file whose header lies."""
    data, path = bytearray(bases.gguf.read_bytes()), folder / "model.gguf"
    kind = choose.choice(("count", "keys", "length", "version", "cut", "fifo", "device"))
    if kind in ("fifo", "device"):
        os.mkfifo(path) if kind == "fifo" else path.symlink_to("/dev/zero")
        return ["plan", str(path)]
    start = {"version": 4, "count": 8, "keys": 16, "length": 24}.get(kind, 0)
    if kind == "cut":
        data = data[: choose.randrange(4, len(data) // 2)]
    else:
        data[start : start + 4] = choose.choice((1 << 31, (1 << 32) - 1, 1 << 20, 7777)).to_bytes(4, "little")
    path.write_bytes(data)
    return ["plan", str(path)]


KINDS = (config, positions, quantization, generation, no_file, header, tokenizer, template, adapter, gguf)


def run(arguments: Sequence[str | Path], wall: float = WALL) -> tuple[int | None, str, float, int]:
    """Status (None: it waited for ever), what it said on stderr, seconds of computing, bytes of the largest process."""
    with tempfile.TemporaryDirectory() as folder:
        counted = Path(folder) / "used"
        command = [sys.executable, "-P", __file__, "--measured", str(counted), *map(str, arguments)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=wall, check=False)
        except subprocess.TimeoutExpired:
            return None, "", wall, 0
        seconds, peak = json.loads(counted.read_text())
        return done.returncode, done.stderr, seconds, peak


def measured(counted: Path, arguments: Sequence[str]) -> int:
    """Run the command line in a process, and write what it and its children used."""
    status = subprocess.run(
        [sys.executable, "-P", "-c", "from gemexport.cli import main; main()", *arguments], check=False
    )
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    counted.write_text(json.dumps([used.ru_utime + used.ru_stime, peak]))
    return status.returncode


def verdict(arguments: Sequence[str], folder: Path) -> tuple[str | None, float, int]:
    """What is wrong with how a command met an input (None: nothing), its seconds and bytes."""
    before = sorted(folder.rglob("*"))
    status, printed, seconds, peak = run(arguments)
    lines = [line for line in printed.splitlines() if line.startswith("gemexport: ")]
    problems = {
        "it waits for ever": status is None,
        f"status {status}": status not in (2, None),
        f"{len(lines)} lines": status is not None and len(lines) != 1,
        "a traceback": "Traceback" in printed,
        f"{seconds:.1f} s": seconds > SECONDS,
        f"{peak >> 20} MB": peak > MEMORY,
        "something is left": sorted(folder.rglob("*")) != before,
    }
    found = [problem for problem, present in problems.items() if present]
    return (", ".join(found) if found else None), seconds, peak


def main() -> int:
    """Parse the command line; returns the exit status: 1 when any input was met otherwise."""
    if sys.argv[1:2] == ["--measured"]:
        return measured(Path(sys.argv[2]), sys.argv[3:])
    names = {kind.__name__: kind for kind in KINDS}
    parser = argparse.ArgumentParser(description="Give hostile inputs to commands.")
    parser.add_argument("--inputs", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=sorted(names))
    parser.add_argument("--json", type=Path, help="file for the numbers")
    options = parser.parse_args()
    kinds = [names[options.kind]] if options.kind else KINDS
    met, failed = Counter[str](), list[str]()
    slowest, largest = 0.0, 0
    with tempfile.TemporaryDirectory(prefix="gemexport-hostile-") as temporary:
        bases = Bases.make(Path(temporary) / "bases")
        for number in range(options.inputs):
            kind, folder = kinds[number % len(kinds)], Path(temporary) / "input"
            folder.mkdir()
            arguments = kind(random.Random(f"{options.seed} {number}"), bases, folder)
            problem, seconds, peak = verdict(arguments, folder)
            met[kind.__name__] += problem is None
            slowest, largest = max(slowest, seconds), max(largest, peak)
            if problem:
                failed.append(f"{number} {kind.__name__}: {problem} ({' '.join(arguments)})")
                print(failed[-1], file=sys.stderr)
            shutil.rmtree(folder)
    result = {
        "inputs": options.inputs, "seed": options.seed, "met": dict(met), "failed": failed,
        "slowest_seconds": slowest, "largest_bytes": largest,
    }  # fmt: skip
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
