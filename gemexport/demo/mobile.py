"""Makes a small random checkpoint in the format of Gemma's mobile releases, out of transformers' own quantized layers.

The weights are random ones on grids of 2, 4 and 8 bits, of the sizes that training leaves; the scales of activations
and caches fit what the model shows on random tokens. Needs torch and transformers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers.integrations.gemma_quant import QuantizedEmbedding, QuantizedLinear, replace_with_quant_layers
from transformers.utils.quantization_config import GemmaQuantizationConfig

from gemexport import demo
from gemexport.demo import tokenizer as demo_tokenizer
from gemexport.formats.gemma.architecture import Architecture
from gemexport.formats.gemma.families.gemma4 import Gemma4
from gemexport.formats.gemma.fields import FULL, SLIDING
from gemexport.formats.gemma.model import architecture
from gemexport.formats.gemma.names import EMBEDDING, HEAD, attention_module, canonical_name
from gemexport.formats.gemma.roles import Role
from gemexport.formats.storage.bitpack import pack
from gemexport.formats.storage.files import atomic
from gemexport.formats.storage.safetensors import Entry, ShardedWriter
from gemexport.formats.tensor import Codes, Floats, round_to, to_bf16

# What the released E2B says: of its language model, two bits for embeddings and for the MLPs behind layer 14.
QUANTIZATION: dict[str, Any] = json.loads(Path(__file__).with_name("mobile-quantization.json").read_text("utf-8"))
# Three layers behind number 14 share keys and values, so that those have the doubled MLP in two bits, as in E2B.
LAYER_TYPES = [SLIDING, SLIDING, FULL] * 6
SHARED_LAYERS = 3
LARGEST_CODE = {2: 2.0, 4: 7.5, 8: 127.0}  # what a row's largest weight is divided by
# Of what the demo has: how far logits spread, how peaked attention is, and what each part of a layer adds.
SHARES = {
    Role.FINAL_NORM: 1 / 3,
    Role.K_NORM: 3.0,
    Role.POST_ATTENTION_NORM: 0.03,
    Role.POST_MLP_NORM: 0.03,
    Role.POST_PER_LAYER_NORM: 0.015,
}
RESEMBLANCE = 0.5  # of the head's rows to those of the embedding
QUIET = 0.25  # what is left of a head's row whose token is no text
SEQUENCES, TOKENS = 4, 64  # that activations are measured on
CLIPPED = np.linspace(0.2, 1.0, 17)  # shares of the largest magnitude that a scale may end at
SAMPLE = 16384  # values of an activation that a scale is fitted to


def config_json(size: demo.Size) -> dict[str, Any]:
    """The config.json: a multimodal Gemma 4 without towers."""
    text = demo.config_json(Gemma4.name, size)
    text |= {"layer_types": LAYER_TYPES, "num_hidden_layers": len(LAYER_TYPES), "num_kv_shared_layers": SHARED_LAYERS}
    del text["architectures"]
    # transformers cannot tie a packed embedding to the head: the released files hold both.
    untied = {"tie_word_embeddings": False}
    return {
        "architectures": [Gemma4.whole_class], "audio_config": None, "dtype": "bfloat16",
        "eos_token_id": text["eos_token_id"], "model_type": Gemma4.whole_type, "quantization_config": QUANTIZATION,
        "text_config": text | untied, "vision_config": None, **untied,
    }  # fmt: skip


def make(folder: Path, *, size: demo.Size | str = "demo", seed: int = 0, calibrated: bool = True) -> Path:
    """Write the checkpoint (config, weights, tokenizer) as a Hugging Face folder; returns `folder`.

    Not `calibrated`, its activation scales are 0, which stands for no rounding, and its caches have none.
    """
    dimensions = demo.SIZES[size] if isinstance(size, str) else size
    config = config_json(dimensions)
    with atomic(folder) as partial:
        partial.mkdir()
        tokens = demo_tokenizer.write(partial, dimensions.vocab, Gemma4.wording)
        model = _model(config, architecture(config, folder), demo_tokenizer.silent_ids(tokens), seed)
        caches = _calibrate(model, dimensions.vocab, seed) if calibrated else {}
        stored = {name: _stored(name, tensor) for name, tensor in model.state_dict().items()} | caches
        entries = [Entry(name, kind, array.shape) for name, (kind, array) in sorted(stored.items())]
        with ShardedWriter(partial, entries) as writer:
            for entry in entries:
                writer.write(entry.name, stored[entry.name][1])
        # Unsorted: the order of module_quant_configs says which pattern holds.
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        demo.write_generation_config(partial, config["text_config"])
    return folder


def _model(config: dict[str, Any], decoder: Architecture, silent: list[int], seed: int) -> Any:
    """The model in f32 with transformers' quantized layers, weights and scales set, activations as they are."""
    settings = GemmaQuantizationConfig(**config["quantization_config"])
    f32 = {"dtype": "float32"}
    wide = transformers.Gemma4Config.from_dict({**config, "text_config": config["text_config"] | f32, **f32})
    with torch.random.fork_rng():
        model = transformers.Gemma4ForConditionalGeneration(wide)
    replace_with_quant_layers(model, settings, settings.modules_to_not_convert)
    for name, module in model.named_modules():
        canonical = canonical_name(name)
        if isinstance(module, (QuantizedLinear, QuantizedEmbedding)):
            codes, scales = quantize(_values(f"{canonical}.weight", decoder, silent, seed), module.num_bits)
            _fill(module, codes, scales)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            canonical = canonical_name(name)
            if tensor.dtype == torch.float32 and not canonical.endswith("_scale"):
                values = round_to(_values(canonical, decoder, silent, seed), "bf16")
                tensor.copy_(torch.from_numpy(values))
    return model.eval()


def _values(name: str, decoder: Architecture, silent: list[int], seed: int) -> Floats:
    """The demo's weights, made to stand static rounding as trained ones do.

    Rounding moves a value that lies between two steps by a whole one, whoever computes it, and each step that moves
    makes others move. So two right programs differ by about half of what the rounding itself costs, and that is to be
    small where a model is to tell right programs from wrong ones. Layers here add little to what they read, and
    attention looks at few tokens: it would else leave its output far below the range that the first token needs.

    The head resembles the embedding and is not the same: with the same one the likeliest token was nearly always the
    one just read, at a probability so near 1 that 96 % of the positions could not differ whatever was rounded.
    """
    stream = np.random.Generator(np.random.PCG64([seed, *name.encode()]))
    specs = {spec.name: spec for spec in decoder.specs()}
    spec = specs[EMBEDDING if name == HEAD else name]
    values = demo.random_values(spec, decoder, [], stream)
    if name == HEAD:
        same = _values(EMBEDDING, decoder, silent, seed)
        values = np.float32(RESEMBLANCE) * same + np.float32((1 - RESEMBLANCE**2) ** 0.5) * values
        values[silent] *= np.float32(QUIET)
    if spec.role is Role.LAYER_SCALAR:
        return values * np.float32(0.25) + np.float32(0.775)  # 0.9 to 1 instead of 0.5 to 0.9
    return values * np.float32(SHARES.get(spec.role, 1.0))


def quantize(weights: Floats, bits: int) -> tuple[Codes, Floats]:
    """Signed codes `[out, in]` of 2, 4 or 8 bits and f32 scales `[out, 1]`."""
    scales = np.abs(weights).max(axis=1, keepdims=True) / np.float32(LARGEST_CODE[bits])
    scales[scales == 0] = 1
    low = -(1 << (bits - 1))
    return np.clip(np.rint(weights / scales), low, -low - 1).astype(np.int8), scales


def _fill(module: QuantizedLinear | QuantizedEmbedding, codes: Codes, scales: Floats) -> None:
    """Put codes and scales into a layer of transformers."""
    packed = codes
    if module.num_bits < 8:
        packed = pack(codes, module.num_bits).view(np.uint8)[:, : -(-codes.shape[1] * module.num_bits // 8)]
    linear = isinstance(module, QuantizedLinear)
    names = ("weight", "weight_scale") if linear else ("embedding_quantized", "embedding_scale")
    getattr(module, names[0]).copy_(torch.from_numpy(np.ascontiguousarray(packed)))
    getattr(module, names[1]).copy_(torch.from_numpy(scales))
    for name in ("input_activation_scale", "output_activation_scale") if linear else ():
        getattr(module, name).zero_()


def _calibrate(model: Any, vocabulary: int, seed: int) -> dict[str, tuple[str, Any]]:
    """Set the activation scales to what random tokens show; returns those of the caches, as they are stored."""
    ids = np.random.Generator(np.random.PCG64(seed)).integers(3, vocabulary, (SEQUENCES, TOKENS))
    ids[:, 0] = 2
    with _ends(model) as ends, torch.inference_mode():
        found = model(torch.from_numpy(ids), use_cache=True, past_key_values=transformers.DynamicCache())
    for module, (highest_input, highest_output) in ends.items():
        module.input_activation_scale.fill_(_scale(highest_input))
        # Logits stay as they are: a scale of 0.
        module.output_activation_scale.fill_(0.0 if module is model.lm_head else _scale(highest_output))
    caches = {}
    for index, layer in enumerate(found.past_key_values.layers):
        for kind, cached in (("k", layer.keys), ("v", layer.values)):
            name = f"model.language_model.{attention_module(index).removeprefix('model.')}.{kind}_cache_scale"
            caches[name] = "F32", np.array(_scale(_end(cached)), np.float32)
    return caches


def _scale(peak: float) -> float:
    """The int8 scale of activations up to `peak`: a bf16 number, so that another machine's rounding hardly shows."""
    return float(round_to(np.array([peak / 127], np.float32), "bf16")[0])


def _end(values: torch.Tensor) -> float:
    """Where the integers of an activation end: where their squared error is least, as it is after training with them.

    What a gate and its input multiply to has few large values, which would take most of the range.
    """
    flat = values.numpy().astype(np.float64).ravel()
    peak, sample = float(np.abs(flat).max()), flat[:: max(flat.size // SAMPLE, 1)]
    errors = []
    for share in CLIPPED:
        step = max(peak, 1e-30) * share / 127
        errors.append(float(np.square(np.clip(np.rint(sample / step), -128, 127) * step - sample).sum()))
    return peak * float(CLIPPED[int(np.argmin(errors))])


@contextmanager
def _ends(model: Any) -> Iterator[dict[QuantizedLinear, tuple[float, float]]]:
    """Collects where the integers of each linear's input and output are to end, in the one pass that runs meanwhile."""
    ends: dict[QuantizedLinear, tuple[float, float]] = {}

    def watch(module: QuantizedLinear, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        ends[module] = _end(inputs[0]), _end(output)

    hooks = [m.register_forward_hook(watch) for m in model.modules() if isinstance(m, QuantizedLinear)]
    try:
        yield ends
    finally:
        for hook in hooks:
            hook.remove()


def _stored(name: str, tensor: torch.Tensor) -> tuple[str, Any]:
    """The dtype that a tensor has in the file, and its NumPy array."""
    array = tensor.numpy()
    if array.dtype != np.float32:
        return ("U8" if array.dtype == np.uint8 else "I8"), array
    return ("F32", array) if name.endswith("_scale") else ("BF16", to_bf16(array))
