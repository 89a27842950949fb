"""Faults of folders in Hugging Face layout (MLX, compressed-tensors): config.json, weights, and the tokenizer's files.

The tokenizer's faults serve ONNX folders as well, which have the same files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemexport.faults.stored import floats, like, writable
from gemexport.faults.weights import NOISE, ONE_EPSILON, Fault, Harmless, Inapplicable, Make, Subject, name_of, wide
from gemexport.formats.gemma.names import EMBEDDING, HEAD, canonical_name, module_of
from gemexport.formats.gemma.roles import Role
from gemexport.formats.storage.safetensors import Entry, Writer, read_folder

Json = dict[str, Any]
FULL = "full_attention"
FINAL_NORM = name_of(Role.FINAL_NORM)
# Layers of another kind have other sizes: then the layer's tensor is named, whose shape is not what config.json says.
DISAGREES = "where config.json says"


def edited(file: str, edit: Callable[[Json, Subject], str]) -> Make:
    """A fault that changes a JSON file of the folder; `edit` returns what a verdict must name."""

    def fault(subject: Subject) -> str:
        # A Core ML package has these files beside it.
        places = (folder / file for folder in (subject.path, subject.path.parent))
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            raise Inapplicable(f"it has no {file}")
        content = json.loads(path.read_text("utf-8"))
        named = edit(content, subject)
        path.write_text(json.dumps(content, ensure_ascii=False, indent=1), "utf-8")
        return named

    return fault


def _text(config: Json) -> Json:
    text: Json = config.get("text_config", config)
    return text


def rope_base(config: Json, _: Subject) -> str:
    """The full layers' base is the sliding ones'."""
    _flat(_text(config))["rope_theta"] = 10_000.0
    return "rope_theta"


def _flat(text: Json) -> Json:
    """Where the settings of full layers are: newer configs have them in a dictionary of their own."""
    found: Json = (text.get("rope_parameters") or {}).get(FULL, text)
    return found


def rope_scaling(config: Json, subject: Subject) -> str:
    """The angles of the full layers eight times too small."""
    text = _text(config)
    if subject.model.family.partial_rope:
        text["rope_parameters"][FULL]["factor"] = 8.0
    elif FULL in (text.get("rope_parameters") or {}):
        text["rope_parameters"][FULL] |= {"rope_type": "linear", "factor": 8.0}
    else:
        text["rope_scaling"] = {"rope_type": "linear", "factor": 8.0}
    return "factor"


def rope_part(config: Json, _: Subject) -> str:
    """Twice as many pairs of a head rotate."""
    own = _text(config)["rope_parameters"][FULL]
    own["partial_rotary_factor"] *= 2
    return "partial_rotary_factor"


def window(config: Json, _: Subject) -> str:
    """Sliding layers see one position less."""
    _text(config)["sliding_window"] -= 1
    return "sliding_window"


def layers_exchanged(config: Json, _: Subject) -> str:
    """The first full layer slides, and the first sliding one sees everything."""
    text = _text(config)
    if "layer_types" not in text:
        text["sliding_window_pattern"] = text.get("sliding_window_pattern", 6) - 1
        return "layer_types"
    types = text["layer_types"]
    other = types.index(FULL)
    types[0], types[other] = types[other], types[0]
    return f"layer_types|layers.(0|{other})[.].*{DISAGREES}"


def softcap(config: Json, _: Subject) -> str:
    """Logits are not capped."""
    _text(config)["final_logit_softcapping"] = None
    return "final_logit_softcapping"


def donor(config: Json, _: Subject) -> str:
    """One more layer reads another's keys and values."""
    text = _text(config)
    text["num_kv_shared_layers"] += 1
    first = text["num_hidden_layers"] - text["num_kv_shared_layers"]
    return f"num_kv_shared_layers|layers.{first}[.].*{DISAGREES}"


def size(config: Json, _: Subject) -> str:
    """An MLP that is wider than its weights."""
    _text(config)["intermediate_size"] += 32
    return "intermediate_size|shape|config.json says"


def erf(config: Json, _: Subject) -> str:
    """The exact GELU."""
    _text(config)["hidden_activation"] = "gelu"
    return "hidden_activation|gelu"


def attention_softcap(config: Json, _: Subject) -> str:
    """Scores of attention are capped."""
    _text(config)["attn_logit_softcapping"] = 50.0
    return "attn_logit_softcapping"


def epsilon(config: Json, _: Subject) -> str:
    """Twice what the norms add to the mean square."""
    _text(config)["rms_norm_eps"] = 2e-6
    return "rms_norm_eps"


def attention_scale(config: Json, subject: Subject) -> str:
    """Scores of attention are larger by 0.2 %."""
    if "query_pre_attn_scalar" not in _text(config):
        raise Inapplicable("the scale is 1, and no file says so")
    _text(config)["query_pre_attn_scalar"] /= 1.002**2
    return "query_pre_attn_scalar"


def short(config: Json, _: Subject) -> str:
    """Ten positions."""
    _text(config)["max_position_embeddings"] = 10
    return "max_position_embeddings"


def narrow(config: Json, _: Subject) -> str:
    """Heads of one number."""
    _text(config)["head_dim"] = 1
    return "head_dim|shape|config.json says"


def top_k(config: Json, _: Subject) -> str:
    """A token goes through one expert more."""
    _text(config)["top_k_experts"] += 1
    return "top_k_experts"


def _token(key: str) -> Callable[[Json, Subject], str]:
    """A special token of config.json, and of the decoder's part of it, is another."""

    def edit(config: Json, _: Subject) -> str:
        for part in (config, _text(config)):
            if key in part:
                part[key] = 5
        return key

    return edit


def dtype(config: Json, _: Subject) -> str:
    """The dtype that programs compute in is f16, in which Gemma's hidden states do not fit."""
    if not any(_text(config).get(key) or config.get(key) for key in ("dtype", "torch_dtype")):
        raise Inapplicable("it says none: programs take the tensors'")
    for part in (config, _text(config)):
        for key in ("dtype", "torch_dtype"):
            if key in part:
                part[key] = "float16"
    return "dtype"


def context(config: Json, _: Subject) -> str:
    """Half as many positions."""
    _text(config)["max_position_embeddings"] //= 2
    return "max_position_embeddings"


def head_untied(subject: Subject) -> str:
    """A head of its own, which is the embedding with noise."""
    from gemexport.registry import TARGETS

    arrays = _arrays(subject)
    table = TARGETS[subject.target].reader().tensors(subject.path)[EMBEDDING].numpy()
    noise = np.random.default_rng(0).normal(0, NOISE * float(table.std()), table.shape).astype(np.float32)
    stored = like(table + noise, np.empty(0, np.uint16))
    wrapped = any(name.startswith("language_model.") for name in arrays)
    name = f"language_model.{HEAD}" if wrapped else HEAD
    arrays[name] = Entry(name, "BF16", table.shape), stored
    _save(subject, arrays)
    config = json.loads((subject.path / "config.json").read_text("utf-8"))
    config["tie_word_embeddings"] = _text(config)["tie_word_embeddings"] = False
    (subject.path / "config.json").write_text(json.dumps(config), "utf-8")
    return f"tie_word_embeddings|{module_of(HEAD)}"


def _arrays(subject: Subject) -> dict[str, tuple[Entry, NDArray[Any]]]:
    return {name: (item.entry, np.array(item.array)) for name, item in read_folder(subject.path).items()}


def _save(subject: Subject, arrays: Mapping[str, tuple[Entry, NDArray[Any]]], file: str = "model.safetensors") -> None:
    kind = {"format": "mlx" if subject.target == "mlx" else "pt"}
    writer = Writer(subject.path / file, [entry for entry, _ in arrays.values()], kind)
    for entry, array in arrays.values():
        writer.write(entry.name, array)
    writer.close()


def shape_turned(subject: Subject) -> str:
    """A matrix [out, in] is stored as [in, out], the same bytes; one scale a row stays so."""
    stem, arrays = wide(subject).removesuffix(".weight"), _arrays(subject)
    rows, width = subject.model.specs[wide(subject)].shape
    for name, (entry, array) in arrays.items():
        if canonical_name(name).startswith(f"{stem}.") and len(entry.shape) == 2 and entry.shape[1] * rows % width == 0:
            arrays[name] = Entry(name, entry.dtype, (width, entry.shape[1] * rows // width)), array
    _save(subject, arrays)
    return stem


def unknown_tensor(subject: Subject) -> str:
    """A layer has a router besides, which no part of the decoder reads."""
    arrays = _arrays(subject)
    prefix = next(name for name in arrays if canonical_name(name) == EMBEDDING).removesuffix(EMBEDDING)
    name, shape = prefix + name_of(Role.ROUTER, 0), (4, subject.decoder.hidden_size)
    _save(subject, {**arrays, name: (Entry(name, "BF16", shape), np.full(shape, 0x3F80, np.uint16))})
    return "router"


def second_file(subject: Subject) -> str:
    """Another file of weights beside the model's, with a norm of all ones."""
    name, (entry, array) = next(item for item in _arrays(subject).items() if canonical_name(item[0]) == FINAL_NORM)
    other = {name: (entry, like(np.ones(array.shape, np.float32), array))}
    _save(subject, other, "model-of-before.safetensors")
    return f"model-of-before|{FINAL_NORM}"


def truncated(subject: Subject) -> str:
    """The last kilobyte of the largest file is missing."""
    file = max((item for item in subject.path.rglob("*") if item.is_file()), key=lambda item: item.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1024])
    return file.name


# The tokenizer.


def _insert(tokenizer: Json, _: Subject) -> str:
    vocab = tokenizer["model"]["vocab"]
    last = max(vocab.values())
    shifted = {text: index + (index >= 300) for text, index in vocab.items() if index < last}
    tokenizer["model"]["vocab"] = {**shifted, "zzzz": 300}
    merges = tokenizer["model"]["merges"]
    whole = shifted.keys()
    tokenizer["model"]["merges"] = [
        pair for pair in merges if "".join(_pair(pair)) in whole and {*_pair(pair)} <= whole
    ]
    return "text"


def _pair(merge: Any) -> list[str]:
    return merge.split(" ", 1) if isinstance(merge, str) else list(merge)


def _exchange(tokenizer: Json, _: Subject) -> str:
    vocab = tokenizer["model"]["vocab"]
    vocab["e"], vocab["t"] = vocab["t"], vocab["e"]
    return "text"


def _lose_merge(tokenizer: Json, _: Subject) -> str:
    merges = tokenizer["model"]["merges"]
    made = next("".join(_pair(pair)) for pair in merges if "".join(_pair(pair)).isalpha())
    tokenizer["model"]["merges"] = [pair for pair in merges if "".join(_pair(pair)) != made]
    return "text"


def _no_decoder(tokenizer: Json, _: Subject) -> str:
    if tokenizer.get("decoder") is None:
        raise Inapplicable("it has none")
    tokenizer["decoder"] = None
    return "decod"


def _turn_goes_on(generation: Json, _: Subject) -> str:
    listed = generation["eos_token_id"]
    if not isinstance(listed, list):
        raise Inapplicable("one token ends an answer")
    generation["eos_token_id"] = listed[:1]
    return "does not end at"


def _no_bos(tokenizer: Json, _: Subject) -> str:
    tokenizer["post_processor"] = None
    return "(?i)bos"


def _retype(tokenizer: Json, _: Subject) -> str:
    item = next(item for item in tokenizer["added_tokens"] if item["content"] in ("<|turn>", "<start_of_turn>"))
    item["special"] = False
    return "turn"


def _relabel(settings: Json, _: Subject) -> str:
    settings["chat_template"] = settings["chat_template"].replace("'model'", "'assistant'")
    return "template"


def _scale_doubled(subject: Subject) -> str:
    """The first static scale of activations of a compressed-tensors folder."""
    arrays = read_folder(subject.path)
    stored = writable(next(array.array for name, array in arrays.items() if name.endswith(".input_scale")))
    stored[:] = like(floats(stored) * np.float32(2), stored)
    return "activation quantizer"


NO_ZERO_POINT = "the integers are signed, and zero stands for zero: no zero point is stored"
ACTIVATIONS: dict[str, Fault | str] = {
    "activation scale doubled": _scale_doubled,
    "activation zero point off by one": NO_ZERO_POINT,
}
NO_SCORES = "its tokenizer joins by merges, and has no scores"
NO_SUCH_SETTING = "the programs' classes for a Gemma of this generation read no such setting"
OF_GGUF = "GGUF alone has the key"
BUILT_IN = "the runtime computes it, no file says so"
TOKENIZER: dict[str, Fault | str] = {
    "a token inserted": edited("tokenizer.json", _insert),
    "two tokens exchanged": edited("tokenizer.json", _exchange),
    "a merge lost": edited("tokenizer.json", _lose_merge),
    "BOS not added": edited("tokenizer.json", _no_bos),
    "special token typed as normal": edited("tokenizer.json", _retype),
    "role marker of the chat template changed": edited("tokenizer_config.json", _relabel),
    "decoder of the tokenizer removed": edited("tokenizer.json", _no_decoder),
    "end of a turn removed": edited("generation_config.json", _turn_goes_on),
    "tokenizer scores swapped": NO_SCORES,
    "tokenizer scores zeroed": NO_SCORES,
}
SPECIAL: dict[str, Fault | str] = {
    "EOS of config.json changed": edited("config.json", _token("eos_token_id")),
    "BOS of config.json changed": edited("config.json", _token("bos_token_id")),
    "dtype of config.json changed": edited("config.json", dtype),
}
FAULTS: dict[str, Fault | str] = {
    "RoPE base wrong": edited("config.json", rope_base),
    "RoPE scaling wrong": edited("config.json", rope_scaling),
    "RoPE partial factor wrong": edited("config.json", rope_part),
    "sliding window off by one": edited("config.json", window),
    "full and sliding layers exchanged": edited("config.json", layers_exchanged),
    "soft cap lost": edited("config.json", softcap),
    "embedding scale lost": BUILT_IN,
    "shared KV layer reads the wrong donor": edited("config.json", donor),
    "tied head untied with noise": head_untied,
    "KV cache written one position late": BUILT_IN,
    "metadata of another size": edited("config.json", size),
    "context length halved": edited("config.json", context),
    "truncated file": truncated,
    "a matrix's shape the other way round": shape_turned,
    "a tensor that the decoder has not": unknown_tensor,
    "erf for tanh in one GELU": edited("config.json", erf),
    "attention soft cap 50 in one layer": Harmless(edited("config.json", attention_softcap), NO_SUCH_SETTING),
    "epsilon 1e-5 in one norm": ONE_EPSILON,
    "epsilon 2e-6 in all norms": edited("config.json", epsilon),
    "attention scale 0.2 % larger in one layer": edited("config.json", attention_scale),
    "mask -20 for -inf": BUILT_IN,
    "general.file_type changed": OF_GGUF,
    "context length 10": edited("config.json", short),
    "head size 1": edited("config.json", narrow),
    **SPECIAL,
    "a second safetensors file": second_file,
    "one expert more chosen": edited("config.json", top_k),
    **TOKENIZER,
}
