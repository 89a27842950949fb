"""The peers: how each is installed in an environment of its own, and the commands that convert a checkpoint.

Versions are pinned, because a number belongs to a version. `torch==2.13.0` is named everywhere: it is a build without
CUDA on machines whose index has one, and every peer is to run on the same.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

TORCH = "torch==2.13.0"
LLAMA = "llama-cpp-python==0.3.36"  # its source distribution carries llama.cpp
BUILD_TOOLS = ["cmake==4.*", "ninja==1.*"]


@dataclass(frozen=True)
class Peer:
    """Another program that converts checkpoints."""

    name: str
    format: str  # the format of ours that it is compared with
    requirements: list[str]
    commands: Callable[[Path, Path, Path], list[list[str]]]  # (home, model, output) -> commands, one after the other
    output: str  # the artefact's name in the output folder
    build: Callable[[Path], None] | None = None

    def python(self, work: Path) -> Path:
        """The interpreter of its environment."""
        return work / self.name / "env" / "bin" / "python"

    def install(self, work: Path) -> None:
        """Make its environment under `work`, once for a set of requirements."""
        home = work / self.name
        mark = home / "installed.json"
        if mark.is_file() and json.loads(mark.read_text("utf-8")) == self.requirements:
            return
        home.mkdir(parents=True, exist_ok=True)
        print(f"installing {self.name}: {', '.join(self.requirements)}", file=sys.stderr)
        if not self.python(work).exists():
            subprocess.run([sys.executable, "-m", "venv", str(home / "env")], check=True)
        subprocess.run([str(self.python(work)), "-m", "pip", "install", "--quiet", *self.requirements], check=True)
        if self.build:
            self.build(home)
        mark.write_text(json.dumps(self.requirements) + "\n", "utf-8")

    def versions(self, work: Path) -> dict[str, str]:
        """The versions that matter, as its environment reports them."""
        names = [re.split(r"[^\w.-]", requirement)[0] for requirement in self.requirements]
        code = "import sys, json, importlib.metadata as m; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
        done = subprocess.run([str(self.python(work)), "-c", code, *names], check=True, capture_output=True, text=True)
        found: dict[str, str] = json.loads(done.stdout)
        return found | ({"llama-cpp-python (source)": LLAMA.partition("==")[2]} if self.build else {})


def _source(home: Path) -> Path:
    """llama.cpp's sources, unpacked."""
    return home / f"llama_cpp_python-{LLAMA.partition('==')[2]}" / "vendor" / "llama.cpp"


def _build_llama_cpp(home: Path) -> None:
    """Fetch the sources and build `llama-quantize`; some minutes."""
    python = home / "env" / "bin" / "python"
    if not _source(home).is_dir():
        download = ["-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", "--dest", str(home), LLAMA]
        subprocess.run([str(python), *download], check=True)
        with tarfile.open(next(home.glob("llama_cpp_python-*.tar.gz"))) as archive:
            archive.extractall(home, filter="data")
    tools = home / "env" / "bin"
    configure = [
        str(tools / "cmake"), "-S", str(_source(home)), "-B", str(home / "build"), "-G", "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}", "-DCMAKE_BUILD_TYPE=Release", "-DLLAMA_CURL=OFF",
        "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_SERVER=OFF",
    ]  # fmt: skip
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    jobs = str(os.cpu_count() or 1)
    build = [str(tools / "cmake"), "--build", str(home / "build"), "-j", jobs, "--target", "llama-quantize"]
    subprocess.run(build, check=True, stdout=subprocess.DEVNULL)


def _llama_cpp(home: Path, model: Path, output: Path) -> list[list[str]]:
    python, whole, small = home / "env/bin/python", output / "model-BF16.gguf", output / "model-Q4_0.gguf"
    convert = [str(python), str(_source(home) / "convert_hf_to_gguf.py"), str(model), "--outtype", "bf16"]
    # --pure: every matrix in Q4_0, the embeddings too, as in our file.
    quantize = [str(home / "build/bin/llama-quantize"), "--pure", str(whole), str(small), "Q4_0"]
    return [[*convert, "--outfile", str(whole)], quantize]


def _mlx_lm(home: Path, model: Path, output: Path) -> list[list[str]]:
    target = str(output / "mlx")
    convert = [str(home / "env/bin/python"), "-m", "mlx_lm", "convert", "--hf-path", str(model), "--mlx-path", target]
    return [[*convert, "-q", "--q-bits", "4", "--q-group-size", "32"]]


def _llm_compressor(home: Path, model: Path, output: Path) -> list[list[str]]:
    script = Path(__file__).with_name("llm_compressor_rtn.py")
    return [[str(home / "env/bin/python"), str(script), str(model), str(output / "w4a16")]]


PEERS = [
    Peer(
        "llama.cpp", "gguf",
        [TORCH, "transformers==5.23.0", "sentencepiece==0.2.*", "protobuf>=5", *BUILD_TOOLS],
        _llama_cpp, "model-Q4_0.gguf", _build_llama_cpp,
    ),
    Peer("mlx-lm", "mlx", ["mlx[cpu]==0.32.4", "mlx-lm==0.32.2"], _mlx_lm, "mlx"),
    Peer("llm-compressor", "compressed-tensors", [TORCH, "llmcompressor==0.14.*"], _llm_compressor, "w4a16"),
]  # fmt: skip
