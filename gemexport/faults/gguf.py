"""Faults of a GGUF file's metadata and tokenizer, written with the `gguf` package's own reader and writer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFValueType, GGUFWriter, TokenType

from gemexport.faults.stored import floats
from gemexport.faults.weights import NOISE, ONE_EPSILON, Fault, Harmless, Inapplicable, Make, Subject, wide
from gemexport.formats.gemma import names

TOKENS, TYPES, MERGES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.merges"
EOT = "tokenizer.ggml.eot_token_id"
SCORES, TEMPLATE, ADD_BOS = "tokenizer.ggml.scores", "tokenizer.chat_template", "tokenizer.ggml.add_bos_token"
FREQUENCIES, HEAD = "rope_freqs.weight", "output.weight"

Fields = dict[str, tuple[Any, GGUFValueType, GGUFValueType | None]]
Tensors = dict[str, np.ndarray]


def rewrite(path: Path, edit: Callable[[Fields, Tensors], None]) -> None:
    """Write the file anew with other metadata; tensors that `edit` puts into the second dictionary are new, in f32."""
    reader = GGUFReader(path)
    fields: Fields = {}
    for name, field in reader.fields.items():
        if not name.startswith("GGUF."):
            inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            fields[name] = (field.contents(), field.types[0], inner)
    new: Tensors = {}
    edit(fields, new)
    architecture = fields.pop("general.architecture")[0]
    beside = path.with_suffix(".rewritten")
    writer = GGUFWriter(beside, architecture)
    for name, (value, kind, inner) in fields.items():
        writer.add_key_value(name, value, kind, inner)
    for tensor in reader.tensors:
        if tensor.name not in new:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    for name, values in new.items():
        writer.add_tensor(name, np.ascontiguousarray(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    del reader
    beside.replace(path)


def _set(key: str, value: Any, kind: GGUFValueType = GGUFValueType.FLOAT32, named: str | None = None) -> Make:
    """A fault that gives one key another value; `value` may be a function of the old one."""

    def fault(subject: Subject) -> str:
        name = key.format(arch=subject.model.family.gguf)

        def edit(fields: Fields, _: Tensors) -> None:
            old = fields.get(name, (None, kind, None))
            fields[name] = (value(old[0]) if callable(value) else value, old[1], old[2])

        rewrite(subject.path, edit)
        return named or name

    return fault


def rope_scaling(subject: Subject) -> str:
    """The angles of the full layers eight times too small."""
    if subject.model.family.partial_rope:
        return _frequencies(subject, lambda divisors: np.where(divisors < 2, np.float32(8), divisors))

    def edit(fields: Fields, _: Tensors) -> None:
        arch = subject.model.family.gguf
        fields[f"{arch}.rope.scaling.type"] = ("linear", GGUFValueType.STRING, None)
        fields[f"{arch}.rope.scaling.factor"] = (8.0, GGUFValueType.FLOAT32, None)

    rewrite(subject.path, edit)
    return "rope.scaling.factor"


def rope_part(subject: Subject) -> str:
    """Twice as many pairs of a head rotate."""
    turned = 2 * (subject.layer(sliding=False).rope.rotary_dims // 2)
    return _frequencies(subject, lambda divisors: np.where(np.arange(divisors.size) < turned, np.float32(1), divisors))


def _frequencies(subject: Subject, change: Callable[[np.ndarray], np.ndarray]) -> str:
    stored = next(tensor for tensor in GGUFReader(subject.path).tensors if tensor.name == FREQUENCIES)
    values = change(np.array(stored.data, np.float32))

    def edit(_: Fields, tensors: Tensors) -> None:
        tensors[FREQUENCIES] = values

    rewrite(subject.path, edit)
    return FREQUENCIES


def layers_exchanged(subject: Subject) -> str:
    """The first full layer slides, and the first sliding one sees everything."""
    kinds = [layer.sliding for layer in subject.decoder.layers]
    first, other = kinds.index(True), kinds.index(False)
    kinds[first], kinds[other] = False, True
    key = f"{subject.model.family.gguf}.attention.sliding_window_pattern"

    def edit(fields: Fields, _: Tensors) -> None:
        fields[key] = (kinds, GGUFValueType.ARRAY, GGUFValueType.BOOL)

    rewrite(subject.path, edit)
    return "sliding_window_pattern"


def head_untied(subject: Subject) -> str:
    """A head of its own, which is the embedding with noise."""
    from gemexport.formats.gguf import tensors

    table = tensors(subject.path)[names.EMBEDDING].numpy()
    noise = np.random.default_rng(0).normal(0, NOISE * float(floats(table).std()), table.shape)

    def edit(_: Fields, new: Tensors) -> None:
        new[HEAD] = table + noise

    rewrite(subject.path, edit)
    return names.HEAD


def unknown_tensor(subject: Subject) -> str:
    """A layer has a router besides, which no part of the decoder reads."""

    def edit(_: Fields, new: Tensors) -> None:
        new["blk.0.ffn_gate_inp.weight"] = np.ones((4, subject.decoder.hidden_size), np.float32)

    rewrite(subject.path, edit)
    return "router|ffn_gate_inp"


def shape_turned(subject: Subject) -> str:
    """A matrix [out, in] is stored as [in, out], the same bytes."""
    from gemexport.formats.gguf import stored_tensors
    from gemexport.formats.gguf.parts import read_parts

    name = wide(subject)
    stored = stored_tensors(read_parts(subject.path))[name].stored_name
    shape, data = subject.model.specs[name].shape, bytearray(subject.path.read_bytes())
    # Behind a tensor's name: the number of its dimensions (u32), and these, the last first (u64).
    label = len(stored).to_bytes(8, "little") + stored.encode() + (2).to_bytes(4, "little")
    start = data.index(label) + len(label)
    turned = b"".join(size.to_bytes(8, "little") for size in shape)
    data[start : start + len(turned)] = turned
    subject.path.write_bytes(data)
    return name


def _tokens(change: Callable[[Fields], None], named: str) -> Make:
    def fault(subject: Subject) -> str:
        rewrite(subject.path, lambda fields, _: change(fields))
        return named

    return fault


def _values(fields: Fields, key: str, values: Any) -> None:
    fields[key] = (values, *fields[key][1:])


def _insert(fields: Fields) -> None:
    tokens = fields[TOKENS][0]
    _values(fields, TOKENS, [*tokens[:300], "zzzz", *tokens[300:-1]])


def _exchange(fields: Fields) -> None:
    tokens = list(fields[TOKENS][0])
    first, second = (tokens.index(text) for text in ("e", "t"))
    tokens[first], tokens[second] = tokens[second], tokens[first]
    _values(fields, TOKENS, tokens)


def _lose_merge(fields: Fields) -> None:
    if MERGES in fields:
        merges = fields[MERGES][0]
        # The token must not be reachable by another pair.
        made = "".join(next(pair for pair in merges if pair.replace(" ", "").isalpha()).split(" "))
        _values(fields, MERGES, [pair for pair in merges if pair.replace(" ", "") != made])
        return
    tokens, scores = fields[TOKENS][0], list(fields[SCORES][0])
    place = next(i for i, text in enumerate(tokens) if len(text) == 2 and text.isalpha())
    scores[place] = -1e6
    _values(fields, SCORES, scores)


def _retype(fields: Fields) -> None:
    types = list(fields[TYPES][0])
    place = next(i for i, text in enumerate(fields[TOKENS][0]) if text in ("<|turn>", "<start_of_turn>"))
    types[place] = int(TokenType.NORMAL)
    _values(fields, TYPES, types)


def _relabel(fields: Fields) -> None:
    _values(fields, TEMPLATE, fields[TEMPLATE][0].replace("'model'", "'assistant'"))


def _swap_scores(fields: Fields) -> None:
    scores = list(fields[_scores(fields)][0])
    places = [i for i, text in enumerate(fields[TOKENS][0]) if len(text) == 2 and text.isalpha()]
    first, second = min(places, key=scores.__getitem__), max(places, key=scores.__getitem__)
    scores[first], scores[second] = scores[second], scores[first]
    _values(fields, SCORES, scores)


def _zero_scores(fields: Fields) -> None:
    _values(fields, SCORES, [0.0] * len(fields[_scores(fields)][0]))


def _scores(fields: Fields) -> str:
    if SCORES not in fields or fields["tokenizer.ggml.model"][0] != "llama":
        raise Inapplicable("its tokenizer joins by merges, and no scores are read")
    return SCORES


def _remove_turn(fields: Fields) -> None:
    if fields.pop(EOT, None) is None:
        raise Inapplicable("the file has none")


def truncated(subject: Subject) -> str:
    """The last kilobyte is missing."""
    data = subject.path.read_bytes()
    subject.path.write_bytes(data[:-1024])
    return subject.path.name


Q4_K_M = 15  # of llama.h's file types
READ_BY_NAME = (
    "where the key is missing, llama.cpp looks for the token by its text, and ends an answer at it all the same"
    " (src/llama-vocab.cpp)"
)
NOT_READ = "llama.cpp prints it and computes nothing by it (src/llama-model-loader.cpp)"
NO_SUCH_KEY = "llama.cpp reads no such key for a Gemma of this generation"
BUILT_IN = "llama.cpp computes it, no file says so"
FAULTS: dict[str, Fault | str] = {
    "RoPE base wrong": _set("{arch}.rope.freq_base", 10_000.0),
    "RoPE scaling wrong": rope_scaling,
    "RoPE partial factor wrong": rope_part,
    "sliding window off by one": _set("{arch}.attention.sliding_window", lambda old: old - 1, GGUFValueType.UINT32),
    "full and sliding layers exchanged": layers_exchanged,
    "soft cap lost": _set("{arch}.final_logit_softcapping", 0.0),
    "embedding scale lost": BUILT_IN,
    "shared KV layer reads the wrong donor": _set(
        "{arch}.attention.shared_kv_layers", lambda old: old + 1, GGUFValueType.UINT32, "attention.shared_kv_layers"
    ),
    "tied head untied with noise": head_untied,
    "KV cache written one position late": BUILT_IN,
    "metadata of another size": _set("{arch}.block_count", lambda old: old - 1, GGUFValueType.UINT32, "block_count"),
    "context length halved": _set("{arch}.context_length", lambda old: old // 2, GGUFValueType.UINT32),
    "truncated file": truncated,
    "a matrix's shape the other way round": shape_turned,
    "a tensor that the decoder has not": unknown_tensor,
    "erf for tanh in one GELU": BUILT_IN,
    "attention soft cap 50 in one layer": Harmless(_set("{arch}.attn_logit_softcapping", 50.0), NO_SUCH_KEY),
    "epsilon 1e-5 in one norm": ONE_EPSILON,
    "epsilon 2e-6 in all norms": _set("{arch}.attention.layer_norm_rms_epsilon", 2e-6),
    "attention scale 0.2 % larger in one layer": Harmless(_set("{arch}.attention.scale", 1.002), NO_SUCH_KEY),
    "mask -20 for -inf": BUILT_IN,
    "general.file_type changed": Harmless(_set("general.file_type", Q4_K_M, GGUFValueType.UINT32), NOT_READ),
    "context length 10": _set("{arch}.context_length", 10, GGUFValueType.UINT32),
    "head size 1": _set("{arch}.attention.key_length", 1, GGUFValueType.UINT32, "key_length|value_length|shape"),
    "EOS of config.json changed": _set("tokenizer.ggml.eos_token_id", 5, GGUFValueType.UINT32, "EOS|ends"),
    "BOS of config.json changed": _set("tokenizer.ggml.bos_token_id", 5, GGUFValueType.UINT32, "BOS"),
    "dtype of config.json changed": "each tensor says its own type",
    "end of a turn removed": Harmless(_tokens(_remove_turn, "ends"), READ_BY_NAME),
    "decoder of the tokenizer removed": "llama.cpp has the decoder built in",
    "tokenizer scores swapped": _tokens(_swap_scores, "scores"),
    "tokenizer scores zeroed": _tokens(_zero_scores, "scores"),
    "a second safetensors file": "the model is in one file",
    "one expert more chosen": _set(
        "{arch}.expert_used_count", lambda old: old + 1, GGUFValueType.UINT32, "expert_used_count"
    ),
    "a token inserted": _tokens(_insert, "text"),
    "two tokens exchanged": _tokens(_exchange, "text"),
    "a merge lost": _tokens(_lose_merge, "text"),
    "BOS not added": _set(ADD_BOS, False, GGUFValueType.BOOL, "(?i)bos"),
    "special token typed as normal": _tokens(_retype, "turn"),
    "role marker of the chat template changed": _tokens(_relabel, "template"),
}
