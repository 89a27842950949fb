"""Runs a GGUF file in llama.cpp, ours or anybody's: logits of every position, greedy continuation, tokenizer.

llama.cpp rounds activations to 8 bits before quantized matrices (in blocks of 32, before K-quants of 256) and to bf16
before BF16 ones. That noise can hide a fault, so a file can also be run with its numbers evaluated to float32: then
only GELU, which llama.cpp looks up in a table of f16 numbers, is rounded. The key/value cache is float32 and flash
attention is off either way.
"""

from __future__ import annotations

import ctypes
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Type

from gemexport.formats.gguf import LOOKED_UP, write_f32
from gemexport.formats.gguf.metadata import Metadata
from gemexport.formats.gguf.parts import read_parts
from gemexport.formats.gguf.vocabulary import check_twice
from gemexport.formats.storage.errors import InputError
from gemexport.formats.tensor import Floats
from gemexport.validators.checks.habits import Habits
from gemexport.validators.runtimes.llama_cpp.api import FLASH_ATTENTION_OFF, TYPE_F32, EvalCallback, api
from gemexport.validators.runtimes.llama_cpp.chat import render
from gemexport.validators.runtimes.protocol import Arithmetic, Laps, Layout

PIECE = 1 << 10  # bytes of a token as a text
# What llama.cpp calls what goes into the first layer, of several streams and of one, and what a layer gives.
ENTERED, LEFT = ("inp_stacked", "inp_scaled"), re.compile(r"l_out-\d+")
BATCH = 128  # positions computed at once; their logits over 262,144 tokens take 134 MB

_ARITHMETIC: dict[Type, Arithmetic] = {Type.F32: "f32", Type.F16: "f16", Type.BF16: "bf16"}


def load(
    path: Path, *, threads: int, context: int, frugal: bool = False, arithmetic: Literal["f32"] | None = None
) -> LlamaCpp:
    """The GGUF file at `path` in llama.cpp, for sequences of at most `context` tokens.

    With `arithmetic` "f32" a copy whose matrices are float32 (4 bytes a weight, in the folder for temporary files, gone
    once it is mapped) is run instead. Files are mapped, `frugal` or not. Raises InputError for a file that is broken or
    that llama.cpp cannot load.
    """
    path = Path(path)
    if arithmetic is None:
        return LlamaCpp(path, threads, context)
    with tempfile.TemporaryDirectory(prefix="gemexport-") as folder:
        evaluated = Path(folder) / path.name
        write_f32(path, evaluated)
        return LlamaCpp(evaluated, threads, context, path)


def arithmetic_of(path: Path) -> Arithmetic:
    """What llama.cpp computes products of the file's matrices in; the coarsest one of them decides."""
    stored = read_parts(path).stored
    kinds = {tensor.type for name, (_, tensor) in stored.items() if len(tensor.shape) > 1 and name not in LOOKED_UP}
    found = {_ARITHMETIC.get(kind) or _rounded(kind) for kind in kinds}
    order: tuple[Arithmetic, ...] = ("int8-activations-256", "int8-activations", "bf16", "f16", "f32")
    return next(kind for kind in order if kind in found or kind == "f32")


def _rounded(kind: Type) -> Arithmetic:
    """Types in blocks of 256 are multiplied with Q8_K, the others with Q8_0 or Q8_1."""
    return "int8-activations-256" if GGML_QUANT_SIZES[kind][0] == 256 else "int8-activations"


def check_vocabulary(path: Path) -> None:
    """Raise InputError for a vocabulary at which llama.cpp would end this process."""
    parts = read_parts(path)
    check_twice(Metadata(parts.path, parts.metadata, ""))


class LlamaCpp:
    """One model and one context of llama.cpp."""

    def __init__(self, path: Path, threads: int, context: int, original: Path | None = None) -> None:
        check_vocabulary(path)
        self.arithmetic: Arithmetic = arithmetic_of(path)
        self._path = original or path  # that stays
        self._api = api()
        self.name = f"llama.cpp (xllamacpp {self._api.version})"
        self.laps = Laps()
        self._context_size = context
        self._api.messages.clear()
        self._model = self._api.llama_model_load_from_file(str(path).encode(), self._api.llama_model_default_params())
        if not self._model:
            raise self._refused(path)
        self._vocab = self._api.llama_model_get_vocab(self._model)
        self._vocab_size: int = self._api.llama_vocab_n_tokens(self._vocab)
        self._context = self._api.llama_init_from_model(self._model, self._params(threads, context))
        if not self._context:
            error = self._refused(path)
            self.close()
            raise error
        self._pools = self._api.llama_pooling_type(self._context) > 0
        if self._pools:  # a text's tokens are seen together
            self._api.llama_free(self._context)
            self._context = self._api.llama_init_from_model(self._model, self._params(threads, context, context))
            self._api.llama_set_embeddings(self._context, True)
        self._batch = self._api.llama_batch_init(context if self._pools else BATCH, 0, 1)
        self._seen: dict[str, list[Floats]] | None = None  # what layers give, while somebody asks for it

    def _params(self, threads: int, context: int, batch: int = BATCH) -> Any:
        params = self._api.llama_context_default_params()
        params.n_ctx = context
        params.n_batch = params.n_ubatch = batch
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = FLASH_ATTENTION_OFF
        params.type_k = params.type_v = TYPE_F32
        self._callback = EvalCallback(self._evaluated)  # lives as long as llama.cpp may call it
        params.cb_eval = ctypes.cast(self._callback, ctypes.c_void_p)
        return params

    def _refused(self, path: Path) -> InputError:
        said = next((message for message in reversed(self._api.messages) if "error" in message), None)
        reason = said or next(iter(self._api.messages), "it does not say why")
        return InputError(path, f"llama.cpp cannot load it ({reason})", "export it again, or update llama.cpp")

    def logits(self, tokens: Sequence[int]) -> Floats:
        """Teacher-forced logits `[len(tokens), vocab]`: row i is what follows tokens[: i + 1]."""
        self._clear()
        out = np.empty((len(tokens), self._vocab_size), np.float32)
        for start in range(0, len(tokens), BATCH):
            part = tokens[start : start + BATCH]
            out[start : start + len(part)] = self._decode(part, start)
        return out

    def vector(self, tokens: Sequence[int]) -> Floats:
        """A text's vector `[1, size]` as llama-server gives it: of length 1, which the model's own graph leaves out."""
        self._run(tokens, 0)
        size = self._api.llama_model_n_embd_out(self._model)
        found: Floats = np.ctypeslib.as_array(self._api.llama_get_embeddings_seq(self._context, 0), (1, size))
        return (found / np.linalg.norm(found.astype(np.float64))).astype(np.float32)

    def greedy(self, tokens: Sequence[int], count: int) -> list[int]:
        """The `count` most likely tokens after `tokens`, one at a time through llama.cpp's cache."""
        self._clear()
        row = self.logits(tokens)[-1]
        continuation: list[int] = []
        while True:
            continuation.append(int(row.argmax()))
            if len(continuation) >= count:
                return continuation[:count]
            row = self._decode(continuation[-1:], len(tokens) + len(continuation) - 1)[0]

    def hidden(self, tokens: Sequence[int]) -> list[Floats] | None:
        """What goes into the first layer and what each layer gives, `[layers + 1][n, hidden]`.

        By the names that llama.cpp gives to values of its graph; None when it calls them otherwise.
        """
        self._seen = {}
        try:
            _ = self.vector(tokens) if self._pools else self.logits(tokens)
            seen = {name: np.concatenate(parts) for name, parts in self._seen.items()}
        finally:
            self._seen = None
        layers = [seen[name] for i in range(len(seen)) if (name := f"l_out-{i}") in seen]
        first = next((seen[name] for name in ENTERED if name in seen), None)
        return [first, *layers] if first is not None and layers else None

    def _evaluated(self, tensor: int, asked: bool, _: int | None) -> bool:
        """llama.cpp's question whether a value is wanted, and then the value."""
        if self._seen is None:
            return not asked
        name = self._api.ggml_get_name(tensor).decode()
        wanted = name in ENTERED or LEFT.fullmatch(name) is not None  # views of these have names that go on
        if wanted and not asked:
            values = np.empty(self._api.ggml_nbytes(tensor) // 4, np.float32)
            self._api.ggml_backend_tensor_get(tensor, values.ctypes.data, 0, values.nbytes)
            # `[streams, n, hidden]` of several streams, which are shown beside each other.
            streams = values.reshape(-1, self._batch.n_tokens, self._api.llama_model_n_embd(self._model))
            self._seen.setdefault(name, []).append(streams.swapaxes(0, 1).reshape(self._batch.n_tokens, -1))
        return wanted or not asked

    def tokenize(self, text: str) -> list[int]:
        """The file's own tokenizer, without BOS, special tokens parsed."""
        return self._tokens(text, False)

    def _tokens(self, text: str, around: bool) -> list[int]:
        """The ids of a text, with BOS and EOS `around` it where the file asks for them."""
        data = text.encode("utf-8")
        room = len(data) + 8
        ids = (ctypes.c_int32 * room)()
        count = self._api.llama_tokenize(self._vocab, data, len(data), ids, room, around, True)
        if count < 0:
            raise RuntimeError(f"llama.cpp makes {-count} tokens of {len(data)} bytes")
        return list(ids[:count])

    def habits(self) -> Habits:
        """What llama.cpp puts before a text, at which tokens it stops, how it pads and decodes."""
        stops = (token for token in range(self._vocab_size) if self._api.llama_vocab_is_eog(self._vocab, token))
        pad: int = self._api.llama_vocab_pad(self._vocab)
        begins = tuple(self._tokens("", True))
        return Habits(begins, frozenset(stops), None if pad < 0 else pad, self._text)

    def _text(self, ids: Sequence[int]) -> str:
        """Ids as a text, piece by piece as llama.cpp's programs print them, special tokens written out."""
        room = ctypes.create_string_buffer(PIECE)
        pieces = []
        for token in ids:
            count = self._api.llama_token_to_piece(self._vocab, token, room, PIECE, 0, True)
            if count < 0:
                raise RuntimeError(f"llama.cpp makes {-count} bytes of the token {token}")
            pieces.append(room.raw[:count])
        return b"".join(pieces).decode("utf-8", "replace")

    def chat(self, layouts: Sequence[Layout]) -> list[str] | None:
        """Conversations as llama.cpp's server lays them out, with the BOS that it puts before them."""
        first = self._api.llama_vocab_bos(self._vocab)
        begins = self._api.llama_vocab_get_add_bos(self._vocab) and first >= 0
        bos = self._api.llama_vocab_get_text(self._vocab, first).decode("utf-8", "replace") if begins else ""
        return render(self._path, layouts, bos)

    def close(self) -> None:
        """Free the context and the model; further calls have no effect."""
        if self._context:
            self._api.llama_batch_free(self._batch)
            self._api.llama_free(self._context)
        if self._model:
            self._api.llama_model_free(self._model)
        self._context = self._model = None

    def _clear(self) -> None:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)

    def _decode(self, tokens: Sequence[int], position: int) -> Floats:
        """Logits `[len(tokens), vocab]` of at most BATCH tokens that follow the `position` tokens in the cache.

        The array is llama.cpp's own memory, valid until the next call. Raises ValueError past the context.
        """
        self._run(tokens, position)
        return np.ctypeslib.as_array(self._api.llama_get_logits(self._context), (len(tokens), self._vocab_size))

    def _run(self, tokens: Sequence[int], position: int) -> None:
        """Take the tokens, which follow so many in the cache, through the graph."""
        if position + len(tokens) > self._context_size:
            raise ValueError(f"{position + len(tokens)} tokens do not fit into a context of {self._context_size}")
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            if not 0 <= token < self._vocab_size:
                raise ValueError(f"token {token} is not in the vocabulary of {self._vocab_size}")
            batch.token[i] = token
            batch.pos[i] = position + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = 1
        with self.laps.lap(len(tokens)):
            status = self._api.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode returns {status}: {' '.join(self._api.messages)}")
