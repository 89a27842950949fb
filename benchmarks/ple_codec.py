"""What settings of the vector codec cost and buy: `python benchmarks/ple_codec.py MODEL [--tokens N] [--rows N]`.

Of a model with per-layer embeddings their table is coded. Of one without, the token embeddings stand in for it: they
are coded where ids are looked up, and the head keeps its own. KL divergence is that of the reference model in f32, with
the coded rows in place of the source's, on the built-in texts. The errors are of rows spread evenly over the table.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gemexport.formats.checkpoint import Checkpoint, open_checkpoint
from gemexport.formats.gemma.names import PER_LAYER_EMBEDDING
from gemexport.formats.grids import additive_fit
from gemexport.formats.grids.additive import Encoder, evaluate
from gemexport.formats.grids.codebooks import fit as make_codebooks
from gemexport.formats.grids.lattice import encode
from gemexport.formats.grids.rounding import fit
from gemexport.formats.grids.vector_codec import Codec, parse
from gemexport.formats.tensor import Floats, Rows, Tensor, TensorBase, expand
from gemexport.validators.checks import prompts, tokenizer
from gemexport.validators.checks.divergence import Divergence
from gemexport.validators.reference import reference

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
CODECS = ("aqlm:1x8:16", "aqlm:1x8", "aqlm:2x8:16", "aqlm:3x8:16", "aqlm:2x8", "aqlm:3x8", "aqlm:4x8", "aqlm:2x8:4")
INTEGERS = (2, 4, 8)  # bits, in blocks of 32 with an f16 scale
BLOCK = 32
E2B = (262_144, 8960, 256)  # rows of its table, their width, what a layer has of one

Coder = Callable[[Floats], Floats]  # rows as they come back


@dataclass(frozen=True)
class Setting:
    """A way to store rows: what comes back, bits a weight in E2B's table, and seconds that the fit took."""

    name: str
    coder: Coder
    bits: float
    seconds: float = 0.0


class Replaced(TensorBase):
    """A tensor of which some rows are others."""

    grid = None

    def __init__(self, name: str, base: Tensor, rows: dict[int, Floats]) -> None:
        self.name, self.shape, self.dtype, self._base, self._rows = name, base.shape, base.dtype, base, rows

    def rows(self, start: int, stop: int) -> Rows:
        values = np.array(self._base.rows(start, stop).values)
        for row, new in self._rows.items():
            if start <= row < stop:
                values[row - start] = new
        return Rows(values)


def vectors(table: Tensor, codec: Codec, block: int) -> Setting:
    """The codec, fitted to a sample of the table."""
    started = time.process_time()
    codebooks = make_codebooks(additive_fit.sample(table, codec, block), codec).codebooks
    encoder, seconds = Encoder(codebooks), time.process_time() - started

    def coder(rows: Floats) -> Floats:
        codes, scales = additive_fit.encode(rows, codebooks, encoder, block)
        return evaluate(codes, codebooks, scales).astype(np.float32)

    coder(table.rows(0, 1).values)  # compiled, before anything is timed
    return Setting(str(codec), coder, 8 * codec.nbytes(*E2B) / (E2B[0] * E2B[1]), seconds)


def integers(bits: int) -> Setting:
    """Codes in blocks with least-squares scales, as exporters write plain tensors."""

    def coder(rows: Floats) -> Floats:
        scales = fit(rows, BLOCK, bits)
        return np.asarray(encode(rows, scales, bits) * expand(scales, BLOCK), np.float32)

    return Setting(f"int{bits} / {BLOCK}", coder, bits + 16 / BLOCK)


def sequences(checkpoint: Checkpoint, tokens: int) -> list[list[int]]:
    encode_text = tokenizer.load(checkpoint.assets / "tokenizer.json")
    return prompts.sequences([encode_text(text) for text in prompts.prompts()], checkpoint.architecture, tokens)


def logits(checkpoint: Checkpoint, table: Tensor, texts: Sequence[Sequence[int]]) -> list[Floats]:
    """The reference's logits with `table` where ids are looked up."""
    tensors, config = {**checkpoint.tensors, table.name: table}, dict(checkpoint.text_config)
    if table.name == EMBEDDING and checkpoint.architecture.tied:
        tensors[HEAD] = checkpoint.tensors[EMBEDDING]
        config["tie_word_embeddings"] = False
    model = reference(config, tensors)
    return [model.logits(text) for text in texts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rows", type=int, default=1024, help="rows that the error is measured on")
    parser.add_argument("--codecs", nargs="*", default=CODECS)
    arguments = parser.parse_args()
    checkpoint = open_checkpoint(arguments.model)
    layers = checkpoint.architecture.per_layer
    table = checkpoint.tensors[PER_LAYER_EMBEDDING if layers else EMBEDDING]
    block = layers.dim if layers else table.shape[1]
    # Between the rows that codebooks are made of, where there is room between them.
    chosen = np.linspace(0, table.shape[0] - 2, min(arguments.rows, table.shape[0])).astype(int) + 1
    rows = np.concatenate([table.rows(int(row), int(row) + 1).values for row in chosen])
    texts = sequences(checkpoint, arguments.tokens)
    used = sorted({token for text in texts for token in text})
    source = logits(checkpoint, table, texts)
    print(f"{table.name} {list(table.shape)}, {sum(map(len, texts))} tokens, {len(used)} different")
    print(
        "| setting | bits a weight | E2B's table, GB | relative error | mean KLD | same top-1 | fit, s | M weights/s |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    settings = [lambda text=text: vectors(table, parse(text), block) for text in arguments.codecs]
    for make in [*settings, *(lambda bits=bits: integers(bits) for bits in INTEGERS)]:
        setting = make()
        started = time.process_time()
        coded = setting.coder(rows)
        speed = rows.size / (time.process_time() - started) / 1e6
        error = np.sqrt(np.square(rows - coded, dtype=np.float64).sum() / np.square(rows, dtype=np.float64).sum())
        replaced = {row: setting.coder(table.rows(row, row + 1).values)[0] for row in used}
        total = Divergence()
        for text, wanted, found in zip(
            texts, source, logits(checkpoint, Replaced(table.name, table, replaced), texts), strict=True
        ):
            total.add(wanted, found, text)
        size = setting.bits * E2B[0] * E2B[1] / 8e9
        print(
            f"| {setting.name} | {setting.bits:.2f} | {size:.2f} | {error:.4f} | {total.kld_mean:.2e} | "
            f"{100 * total.top1_agreement:.1f} % | {setting.seconds:.1f} | {speed:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
