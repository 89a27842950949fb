"""Runs a compressed-tensors folder, ours or anybody's, in transformers set to float32: logits, greedy, tokenizer.

transformers and the compressed-tensors package do the loading and unpacking; nothing of gemexport reads the folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming

from gemexport.formats.compressed_tensors import read_config
from gemexport.formats.compressed_tensors.activations import activations
from gemexport.formats.gemma.architecture import TensorSpec
from gemexport.formats.gemma.names import CANONICAL
from gemexport.formats.gemma.roles import Role
from gemexport.formats.gemma.stacks import by_expert
from gemexport.formats.storage.errors import InputError
from gemexport.validators.checks.chat import apply
from gemexport.validators.checks.habits import Habits
from gemexport.validators.reference.decoder import quiet
from gemexport.validators.runtimes.layerwise import Layerwise
from gemexport.validators.runtimes.protocol import Arithmetic, Layout
from gemexport.validators.runtimes.pytorch import PyTorch


def load(path: Path, *, threads: int, context: int, frugal: bool = False) -> CompressedTensors | Layered:
    """The folder at `path` in transformers, computing in f32; `context` is whatever is asked.

    `frugal` holds no more than a layer.

    Scales are cast to float32 before codes are multiplied by them, so that what is compared is the numbers in the
    file. Loaded in bf16, as users do, the products are rounded to the checkpoint's own values.

    Raises InputError when transformers cannot load the folder, or finds tensors missing in it.
    """
    config = read_config(Path(path))
    automatic: Any = transformers.AutoModelForCausalLM
    remedy = "export or download the model again"
    try:
        if frugal:
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(path), local_files_only=True)
            return Layered(Path(path), config, threads, tokenizer)
        _know_experts(str((config.get("text_config") or config).get("model_type")))
        with quiet(), _scales_in_f32():
            model, report = automatic.from_pretrained(
                str(path),
                dtype=torch.float32,
                attn_implementation="eager",
                experts_implementation="eager",
                local_files_only=True,
                output_loading_info=True,
            )
            _unpack(model)
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(path, f"transformers cannot load it ({reason})", remedy) from error
    # compressed-tensors makes a parameter of this buffer of quantized embeddings, which the class then sets itself.
    unset = [key for key in map(str, report["missing_keys"]) if not key.endswith(".embed_scale")]
    missing = sorted([*unset, *map(str, report["mismatched_keys"])])
    if missing:
        raise InputError(path, f"transformers finds no {missing[0]} in it", remedy)
    return CompressedTensors(model, tokenizer, threads, "static-activations" if activations(path) else "f32")


class _Worded:
    """The tokenizer beside a model, and how `generate` goes about it."""

    _tokenizer: Any
    _generation: Any

    def tokenize(self, text: str) -> list[int] | None:
        """The ids that AutoTokenizer gives, without BOS."""
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def habits(self) -> Habits:
        """What transformers puts before a text, where `generate` stops, how the tokenizer pads and decodes."""
        listed = self._generation.eos_token_id
        stops = [listed] if isinstance(listed, int) else listed or []
        return Habits(
            tuple(self._tokenizer.encode("")),
            frozenset(stops),
            self._tokenizer.pad_token_id,
            lambda ids: str(self._tokenizer.decode(list(ids))),
        )

    def chat(self, layouts: Sequence[Layout]) -> list[str] | None:
        """Conversations as its tokenizer's `apply_chat_template` lays them out."""
        return [apply(self._tokenizer.apply_chat_template, layout) for layout in layouts]


class Layered(_Worded, Layerwise):
    """A folder whose layers are unpacked one after the other, and its tokenizer."""

    def __init__(self, folder: Path, config: Mapping[str, Any], threads: int, tokenizer: Any) -> None:
        super().__init__(folder, config, threads, _scales_in_f32)
        self._tokenizer, self._generation = tokenizer, _generation(folder)


class CompressedTensors(_Worded, PyTorch):
    """The model as transformers loaded it, and the tokenizer beside it."""

    def __init__(self, model: Any, tokenizer: Any, threads: int, arithmetic: Arithmetic) -> None:
        name = f"transformers {transformers.__version__} (compressed-tensors, set to f32)"
        super().__init__(model, arithmetic, threads, name)
        self._tokenizer, self._generation = tokenizer, model.generation_config


def _generation(folder: Path) -> Any:
    """What `from_pretrained` gives a model for its `generation_config`: the file, or what config.json says."""
    if (folder / "generation_config.json").is_file():
        return transformers.GenerationConfig.from_pretrained(str(folder))
    return transformers.GenerationConfig.from_model_config(transformers.AutoConfig.from_pretrained(str(folder)))


def _know_experts(model_type: str) -> None:
    """Tell transformers of experts that are modules of their own, which 5.23 knows of other families than Gemma 4.

    The converters are those that it has for `qwen2_moe`; one that it has for the model is left as it is.
    """
    if get_checkpoint_conversion_mapping(model_type) is not None:
        return
    stacked: list[WeightConverter | WeightRenaming] = [
        WeightConverter(*_of_experts(Role.EXPERT_GATE_UP), [MergeModulelist(dim=0), Concatenate(dim=1)]),
        WeightConverter(*_of_experts(Role.EXPERT_DOWN), [MergeModulelist(dim=0)]),
    ]
    register_checkpoint_conversion_mapping(model_type, stacked)


def _of_experts(role: Role) -> tuple[list[str], str]:
    """Patterns of the modules that hold a stack of experts' matrices, and the stack's name within a layer."""
    spec = TensorSpec(CANONICAL.stem(role), (1, 2, 1), role, None)
    return [part.name.replace(".0.", ".*.") for part in by_expert(spec)], spec.name


@contextmanager
def _scales_in_f32() -> Iterator[None]:
    """Decompress in float32, also where that happens while loading, before transformers casts anything."""
    try:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.compressors.nvfp4 import base as fp4
    except ImportError:  # a plain bf16 folder needs no such package
        yield
        return
    kinds = _subclasses(BaseCompressor)
    originals = {kind: vars(kind)["decompress"] for kind in kinds if "decompress" in vars(kind)}
    unpack = fp4.unpack_fp4_from_uint8
    for kind, original in originals.items():
        kind.decompress = _widened(original)
    # Small floats are looked up in bfloat16, and the product with a scale is rounded to that.
    fp4.unpack_fp4_from_uint8 = partial(unpack, dtype=torch.float32)
    try:
        yield
    finally:
        fp4.unpack_fp4_from_uint8 = unpack
        for kind, original in originals.items():
            kind.decompress = original


def _unpack(model: Any) -> None:
    """Unpack now what transformers would unpack at the first forward pass, out of our sight."""
    if hasattr(model, "ct_decompress_hook"):
        model.hf_quantizer.compressor.decompress_model(model)


def _subclasses(kind: Any) -> set[Any]:
    return {kind, *(below for child in kind.__subclasses__() for below in _subclasses(child))}


def _widened(decompress: Any) -> Any:
    def in_f32(cls: Any, state: dict[str, torch.Tensor], scheme: Any) -> Any:
        scale = state["weight_scale"]
        # Scales of a byte are decoded by the library.
        wide = scale.float() if scale.dtype in (torch.bfloat16, torch.float16) else scale
        return decompress.__func__(cls, {**state, "weight_scale": wide}, scheme)

    return classmethod(in_f32)
