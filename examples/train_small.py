"""Trains a small Gemma 3 of 20 million weights on documentation that this machine has.

Rounding is best measured on weights that nobody ever rounded, and released ones that can be had without the Hub are
not: examples/real_model.py's come out of a quantized file. The text is what Python and the packages beside it ship
(sources with their docstrings, README files, licences), and Debian's /usr/share/doc where there is one; --text FOLDER
takes other folders. The tokenizer is learned on it. What comes out is a checkpoint like any other.

    python examples/train_small.py models/small --minutes 60
    gemexport plan models/small
    gemexport all models/small

It needs the `reference` extra. With --steps and without --minutes, the same texts and threads give the same weights.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import math
import random
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gemexport.demo import Size, config_json, write_generation_config
from gemexport.demo import tokenizer as small_tokenizer
from gemexport.formats.gemma.families import named
from gemexport.formats.gemma.model import describe
from gemexport.formats.storage.errors import InputError
from gemexport.formats.storage.files import atomic
from gemexport.formats.storage.safetensors import Entry, ShardedWriter
from gemexport.formats.tensor import to_bf16

if TYPE_CHECKING:
    import torch

FAMILY = "gemma3"
# Rows are multiples of 256, as K-quants want them.
SIZE = Size(vocab=8192, hidden=512, intermediate=1280, heads=4, kv_heads=1, head_dim=128, per_layer=0, window=128)
ENDINGS = (".py", ".rst", ".md", ".txt")
NAMES = ("copyright", "changelog", "NEWS", "README")  # as Debian calls them, compressed or not
FILE_CHARACTERS = 1 << 16  # of one file, so that no changelog is most of what there is
PIECE_CHARACTERS = 2000  # that are tokenized at once
TOKENIZER_CHARACTERS = 4 << 20  # that the tokenizer is learned on
LENGTH = 256  # tokens of a sequence: twice the sliding window
WARM_UP = 0.05  # of the training, in which the learning rate rises
HELD_OUT = 32  # sequences that the loss is measured on, and nothing is trained on
TOLD = 20  # seconds between two lines


def default_folders() -> list[Path]:
    """Where text lies: Python's library with the packages in it, and Debian's documentation."""
    paths = sysconfig.get_paths()
    folders = [Path(paths["stdlib"]), Path(paths["purelib"]), Path("/usr/share/doc")]
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def texts(folders: Sequence[Path], characters: int, seed: int) -> list[str]:
    """So many characters of the folders' texts in all, the files in an order by chance, each text once.

    Raises InputError where there are none.
    """
    files = sorted({path for folder in folders for path in folder.rglob("*") if _is_text(path)})
    random.Random(seed).shuffle(files)
    found: list[str] = []
    seen: set[bytes] = set()
    for path in files:
        text = _read(path)
        digest = hashlib.sha256(text.encode()).digest()
        if text and digest not in seen:
            seen.add(digest)
            found.append(text)
            characters -= len(text)
        if characters <= 0:
            return found
    if not found:
        raise InputError(", ".join(map(str, folders)), f"no text in {', '.join(ENDINGS)}", "name others with --text")
    return found


def _is_text(path: Path) -> bool:
    name = path.name.removesuffix(".gz")
    return path.is_file() and (name.endswith(ENDINGS) or name.split(".")[0] in NAMES)


def _read(path: Path) -> str:
    """What a file begins with, to the end of a line; nothing of one that is no UTF-8 text."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            text = file.read(FILE_CHARACTERS).decode("utf-8", "strict")
    except (OSError, EOFError, UnicodeDecodeError):  # many a package ships files in other encodings, to test with
        return ""
    return text if len(text) < FILE_CHARACTERS else text[: text.rfind("\n") + 1]


def pieces(found: Sequence[str]) -> Iterator[str]:
    """The texts in pieces of whole lines."""
    for text in found:
        piece = ""
        for line in text.splitlines(keepends=True):
            if piece and len(piece) + len(line) > PIECE_CHARACTERS:
                yield piece
                piece = ""
            piece += line
        yield piece


def sequences(folder: Path, found: Sequence[str], config: dict[str, Any]) -> NDArray[np.int32]:
    """The texts as sequences of token ids, `[n, LENGTH]`, each begun by BOS; texts end with EOS."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    stream: list[int] = []
    for text in found:
        for encoding in tokenizer.encode_batch(list(pieces([text])), add_special_tokens=False):
            stream += encoding.ids
        stream.append(config["eos_token_id"])
    count = len(stream) // (LENGTH - 1)
    if count <= HELD_OUT:
        raise InputError("the texts", f"make {count} sequences of {LENGTH} tokens", f"give more than {HELD_OUT}")
    body = np.array(stream[: count * (LENGTH - 1)], np.int32).reshape(count, LENGTH - 1)
    return np.insert(body, 0, config["bos_token_id"], axis=1)


class Training(NamedTuple):
    """How long, and how: what ends first ends it."""

    steps: int
    minutes: float
    batch: int
    rate: float
    seed: int

    def done(self, step: int, seconds: float) -> float:
        """The share of the training that is behind, from 0 to 1."""
        return min(1.0, max(step / self.steps, seconds / 60 / self.minutes))

    def rate_at(self, done: float) -> float:
        """The learning rate: up in a line, then down as half a cosine to a tenth."""
        if done < WARM_UP:
            return self.rate * max(done, WARM_UP / 20) / WARM_UP
        return self.rate * (0.55 + 0.45 * math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP)))


def train(config: dict[str, Any], ids: NDArray[np.int32], how: Training) -> torch.nn.Module:
    """A decoder that was trained on `ids` `[n, LENGTH]`, all but the last HELD_OUT of them."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(how.seed)
    model = Gemma3ForCausalLM(Gemma3TextConfig(**config)).float()
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    rest = [weight for weight in model.parameters() if weight.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=how.rate, betas=(0.9, 0.95))
    trained, held_out = torch.from_numpy(ids[:-HELD_OUT]).long(), torch.from_numpy(ids[-HELD_OUT:]).long()
    count = sum(weight.numel() for weight in model.parameters())
    print(f"{count / 1e6:.1f} million weights, {trained.numel() / 1e6:.1f} million tokens", flush=True)
    order = torch.Generator().manual_seed(how.seed)
    start, told, step = time.monotonic(), 0.0, 0
    while (done := how.done(step, time.monotonic() - start)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = how.rate_at(done)
        chosen = trained[torch.randint(len(trained), (how.batch,), generator=order)]
        loss = model(input_ids=chosen, labels=chosen, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if time.monotonic() - told > TOLD:
            told = time.monotonic()
            print(f"step {step}, {told - start:.0f} s: loss {float(loss.detach()):.2f} nats a token", flush=True)
    print(f"{step} steps, {time.monotonic() - start:.0f} s: {lost(model, held_out):.3f} nats a token on held-out text")
    return model


def lost(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """The mean loss in nats a token."""
    import torch

    with torch.no_grad():
        losses = [model(input_ids=part, labels=part, use_cache=False).loss for part in ids.split(4)]
    return float(torch.stack(losses).mean())


def write(folder: Path, config: dict[str, Any], model: torch.nn.Module) -> None:
    """The checkpoint's weights in bfloat16, with its configuration."""
    weights = model.state_dict()
    specs = describe(config, folder).specs
    with ShardedWriter(folder, [Entry(name, "BF16", spec.shape) for name, spec in specs.items()]) as writer:
        for name in specs:
            writer.write(name, to_bf16(weights[name].numpy()))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    write_generation_config(folder, config)


def make(out: Path, folders: Sequence[Path], characters: int, how: Training) -> None:
    """Read, learn the tokenizer, train, and write the checkpoint to `out`."""
    found = texts(folders, characters, how.seed)
    read = sum(map(len, found))
    print(f"{read / 1e6:.1f} million characters from {len(found)} files in {', '.join(map(str, folders))}", flush=True)
    config = config_json(FAMILY, SIZE)
    with atomic(out) as folder:
        folder.mkdir()
        small_tokenizer.write(folder, SIZE.vocab, named(FAMILY).wording, "".join(found)[:TOKENIZER_CHARACTERS])
        write(folder, config, train(config, sequences(folder, found, config), how))
    print(f"{out}: a Gemma 3 in bfloat16")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Train a small Gemma 3 on documentation that this machine has.")
    parser.add_argument("out", type=Path, help="folder to write the checkpoint to")
    parser.add_argument("--minutes", type=float, default=math.inf, help="of training at most; default: no limit")
    parser.add_argument("--steps", type=int, default=2000, help="of training at most")
    parser.add_argument("--batch", type=int, default=8, help=f"sequences of {LENGTH} tokens a step")
    parser.add_argument("--rate", type=float, default=1e-3, help="the highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", type=Path, action="append", help="a folder with texts; again for another")
    parser.add_argument("--characters", type=float, default=24e6, help="of text at most")
    options = parser.parse_args(arguments)
    how = Training(options.steps, options.minutes, options.batch, options.rate, options.seed)
    try:
        make(options.out, options.text or default_folders(), int(options.characters), how)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
