"""compressed-tensors: a checkpoint that `transformers.AutoModelForCausalLM` and vLLM load, its linears packed.

Codes, scales and zero points pass through unchanged. Decompressed in the dtype of the checkpoint they give its own
numbers back, bit for bit.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemexport.exporters.compressed_tensors import activations as rounding
from gemexport.exporters.compressed_tensors import experts
from gemexport.exporters.compressed_tensors.schemes import (
    Scheme,
    activation_args,
    codes,
    columns,
    constants,
    holds_scales,
    scheme_of,
)
from gemexport.exporters.fitting import Answer, Container, fitting, left_out
from gemexport.exporters.fitting import promises as fitted
from gemexport.exporters.result import Export, ignore
from gemexport.exporters.streaming import (
    Column,
    Rounding,
    decoder_config,
    rounding_note,
    settings_bytes,
    write_packed,
    write_plain,
    write_settings,
)
from gemexport.exporters.support import embeddings, require
from gemexport.formats.activations import Activations
from gemexport.formats.checkpoint import Checkpoint
from gemexport.formats.gemma.dtypes import stated_dtype
from gemexport.formats.gemma.model import Model
from gemexport.formats.gemma.names import EMBEDDING, EMBEDDINGS, FINAL_NORM, HEAD
from gemexport.formats.promise import Promise
from gemexport.formats.storage.files import atomic
from gemexport.formats.storage.safetensors import DTYPE_NAMES, Entry, ShardedWriter, nbytes
from gemexport.formats.tensor import DType, Grid, Plain, Tensor, round_to, slices

VARIANTS: tuple[str, ...] = ("w4a16", "bf16")
METADATA = {"format": "pt"}  # of the weights
NO_VLLM = "vLLM does not load that"  # in a note on embeddings


@dataclass
class _Plan:
    """What becomes of each tensor."""

    model: DType  # what the config tells loaders to compute in
    plain: dict[str, DType] = field(default_factory=dict)  # of the tensors that are not packed
    packed: dict[str, Scheme] = field(default_factory=dict)
    unpack_early: bool = False  # transformers is to unpack while it loads, not at the first forward pass
    rounded: dict[str, int] = field(default_factory=dict)  # scales of each tensor
    notes: list[str] = field(default_factory=list)
    activations: Activations = field(default_factory=Activations)  # those that transformers computes with


def export(
    checkpoint: Checkpoint,
    path: Path,
    *,
    variant: str = VARIANTS[0],
    pack_embeddings: bool | None = None,
    progress: Callable[[int], None] = ignore,
) -> Export:
    """Write `checkpoint` to the folder `path` for compressed-tensors; the decoder alone, if it came with towers.

    `w4a16` packs every linear that has a grid, with the grid's own bits and block; `bf16` packs nothing.
    Embeddings that were read from codes keep them, but for one that is the head too; those with 16-bit values of their
    own stay as they are. `pack_embeddings` has all of them as codes, or none.

    Loaders cast scales to the dtype of the model. Scales that this would change are stored as f32, and the config asks
    transformers to unpack while it loads, before it casts; or it says float32, where unpacking early would lose static
    activation scales or one of several schemes.

    Static activation scales, those of caches too, are written where transformers computes with them: not where it
    unpacks while it loads. A model whose scales its own dtype does not hold is then to be loaded in float32.
    """
    checkpoint, plan = _prepared(checkpoint, variant, pack_embeddings)
    with atomic(Path(path)) as folder:
        _write_weights(checkpoint, folder, plan, progress)
        write_settings(folder, _config(checkpoint, plan), checkpoint)
    files = sorted(file for file in Path(path).iterdir() if file.is_file())
    notes = [*plan.notes, *rounding_note(plan.rounded, plan.model)]
    return Export(Path(path), variant, _run(Path(path), notes), notes, files)


def size(checkpoint: Checkpoint, *, variant: str = VARIANTS[0], pack_embeddings: bool | None = None) -> int:
    """Bytes of what `export` writes; raises as it does."""
    checkpoint, plan = _prepared(checkpoint, variant, pack_embeddings)
    return nbytes(_layout(checkpoint, plan).entries, METADATA) + settings_bytes(_config(checkpoint, plan), checkpoint)


def _prepared(checkpoint: Checkpoint, variant: str, pack_embeddings: bool | None) -> tuple[Checkpoint, _Plan]:
    """The tensors as a variant holds them, and how."""
    require(checkpoint, supports(checkpoint.model, variant), "compressed-tensors")
    if variant == "bf16":
        return checkpoint, _Plan("bf16", dict.fromkeys(checkpoint.tensors, "bf16"))
    checkpoint, notes = experts.modules(checkpoint)
    checkpoint, plan = _plan(checkpoint, variant, pack_embeddings)
    plan.notes += notes
    return checkpoint, plan


def _run(path: Path, notes: list[str]) -> str:
    """The command that runs a folder, in a program that knows all of its modules."""
    if experts.TOLD in notes:
        return f"vllm serve {quote(str(path))}"
    call = f'pipeline("text-generation", {json.dumps(str(path))})("The capital of France is")[0]["generated_text"]'
    ours = f"python -c {quote(f'from transformers import pipeline; print({call})')}"
    return ours if any(NO_VLLM in note for note in notes) else f"{ours}  # or: vllm serve {quote(str(path))}"


def supports(model: Model, variant: str) -> str | None:
    """Why the format does not hold a model; None where it does."""
    found = embeddings(model)  # else it holds whatever tensors there are
    return None if found is None else f"no folder is made of this model: {found}"


def container(grid: Grid, width: int, variant: str) -> Answer:
    """What holds a grid in rows of `width` weights in a variant."""
    if variant == "bf16":
        return "the variant bf16 holds plain numbers"
    scheme = scheme_of(grid, width)
    if isinstance(scheme, str):
        return scheme
    strategy = f"group {scheme.group}" if scheme.group else "channel"
    zeros = "" if scheme.symmetric else " with zero points"
    return Container(f"{scheme.format} {scheme.bits} bit{zeros}, {strategy}", "f32")


def promises(
    checkpoint: Checkpoint, variant: str, *, pack_embeddings: bool | None = None, **_: Any
) -> dict[str, Promise]:
    """What a folder has to hold of each tensor, by canonical name.

    Scales of codes that were fitted have the dtype of the model, to which loaders cast them; all others are kept.
    """
    if variant == "bf16":
        return {name: Promise(Plain(tensor), plain="bf16") for name, tensor in checkpoint.tensors.items()}
    model = _plan(experts.modules(checkpoint)[0], variant, pack_embeddings)[1].model
    found = fitted(checkpoint, lambda grid, width: container(grid, width, variant))
    return {
        name: item if item.tensor.grid is None or item.tensor.grid.lossless else replace(item, scales=model)
        for name, item in found.items()
    }


def _plan(checkpoint: Checkpoint, variant: str, pack_embeddings: bool | None) -> tuple[Checkpoint, _Plan]:
    """The tensors as the format holds them, and how."""
    given = rounding.signed(checkpoint.activations or Activations())
    checkpoint = replace(checkpoint, activations=None)  # what is left out of them is known only at the end
    tensors, containers, notes = fitting(checkpoint, lambda grid, width: container(grid, width, variant))
    plan = _Plan(_computed(checkpoint), notes=notes)
    for name in containers:
        tensor = tensors[name]
        assert tensor.grid is not None
        scheme = scheme_of(tensor.grid, tensor.shape[1])
        assert isinstance(scheme, Scheme)  # `fitting` left grids that have a container
        if holds_scales(tensor, scheme):
            plan.packed[name] = scheme
        else:
            tensors[name] = Plain(tensor)
            plan.notes.append(f"{name} is written without its grid: a scale is none of the format {scheme.format}")
    others = _leave_embeddings(checkpoint, tensors, given, plan, pack_embeddings)
    if plan.packed:
        _unify(tensors, plan)
    others |= _fit_loader(checkpoint, tensors, given, plan)
    if not plan.unpack_early:
        plan.activations = rounding.placed(given, plan.packed, checkpoint.architecture)
        plan.packed = rounding.with_activations(plan.packed, plan.activations)
    plan.notes += left_out(given, plan.activations)
    plan.plain = {name: _plain_dtype(tensor, plan.model) for name, tensor in tensors.items() if name not in plan.packed}
    plan.notes += [f"{name} stays {plan.plain[name]}: {reason}" for name, reason in others.items()]
    return replace(checkpoint, tensors=tensors), plan


def _computed(checkpoint: Checkpoint) -> DType:
    """The dtype that loaders are to compute in: that of the weights.

    Of weights in f16 it is f32, which holds them, unless the checkpoint asks for f16 itself: hidden states of a Gemma
    do not fit into f16, and vLLM refuses it for most.
    """
    stored = checkpoint.tensors[FINAL_NORM].dtype
    asked = stated_dtype(checkpoint.text_config, checkpoint.config)
    return "f32" if stored == "f16" and asked != "float16" else stored


def _leave_embeddings(
    checkpoint: Checkpoint, tensors: dict[str, Tensor], given: Activations, plan: _Plan, asked: bool | None
) -> dict[str, str]:
    """Take out of the plan the embeddings, and the head, that stay floats; returns why, by name.

    Where nothing was `asked`, an embedding that was read from codes keeps them, but for one that is the head as well:
    vLLM has no head for those. What has 16-bit values of its own stays as it is in released files.
    """
    left = []
    for name in (*EMBEDDINGS, HEAD):
        if name not in plan.packed or asked or (name == HEAD and name in given.linears):
            continue  # a head that rounds what it reads is a linear like the others
        grid, tied = tensors[name].grid, name == EMBEDDING and checkpoint.architecture.tied
        coded = tensors[name].dtype == "f32" and grid is not None and grid.lossless
        if asked is not None or tied or not coded:
            left.append(name)
            del plan.packed[name]
    return dict.fromkeys(left, "embeddings are packed only when asked (pack_embeddings)")


def _fit_loader(checkpoint: Checkpoint, tensors: dict[str, Tensor], given: Activations, plan: _Plan) -> dict[str, str]:
    """Settle how transformers is to unpack the modules, and their schemes after that; returns why some stay floats.

    transformers 5.23 initialises modules after loading them, and an embedding without `weight` stops it there; told to
    unpack while it loads, it has one. So it reads zero points, and scales wider than the model's dtype. But then it
    knows one scheme, and rounds no activations. Where there are several or any, embeddings get a byte for each code,
    which is called `weight`, and wide scales a model in f32.
    """
    embeddings = [name for name in EMBEDDINGS if name in plan.packed]
    shifted = any(not scheme.symmetric for scheme in plan.packed.values())
    shared = EMBEDDING in embeddings and checkpoint.architecture.tied  # a head of bytes would stay one
    several = len(set(plan.packed.values())) > 1
    wanted = bool(embeddings) or _widened(tensors, plan)
    plan.unpack_early = shifted or shared or (wanted and not several and not given)
    if plan.unpack_early:
        left = _keep_one_scheme(tensors, plan)
        if shared and EMBEDDING in plan.packed:
            plan.notes.append(f"{EMBEDDING} is packed and the head too; {NO_VLLM} (--no-pack-embeddings)")
        return left
    others = {}
    for name in embeddings:
        scheme = plan.packed.pop(name)
        bytes_ = scheme.in_bytes()
        if bytes_ is None:
            others[name] = f"transformers loads no embedding in {scheme.format}"
        else:
            plan.packed[name] = bytes_
    written = [name for name in embeddings if name in plan.packed]
    if written:
        plan.notes.append(
            f"{' and '.join(written)}: a byte for each code, which transformers loads beside "
            f"{'several schemes' if several else 'static activations'}; {NO_VLLM} (--no-pack-embeddings)"
        )
    if _widened(tensors, plan) or not rounding.held(given, plan.model):
        why = "activations are static" if given else "modules have several schemes"
        plan.notes.append(f"config.json says float32: {plan.model} does not hold the scales, and {why}")
        plan.model = "f32"
    return others


def _widened(tensors: dict[str, Tensor], plan: _Plan) -> bool:
    """Whether scales are stored in a wider dtype than the model's, to which loaders cast them."""
    return any(_scale_dtype(tensors[name], scheme, plan) == "f32" != plan.model for name, scheme in plan.packed.items())


def _scale_dtype(tensor: Tensor, scheme: Scheme, plan: _Plan) -> DType:
    """What a tensor's scales are stored in: what loaders leave as it is, or f32 where the values depend on it."""
    assert tensor.grid is not None
    if scheme.byte_scales or plan.model in (tensor.grid.scale_dtype, "f32"):
        return tensor.grid.scale_dtype
    return "f32" if tensor.grid.lossless else plan.model


def _plain_dtype(tensor: Tensor, model: DType) -> DType:
    """The dtype of a tensor that is not packed: its own, or what holds every value that was read from codes."""
    if tensor.dtype != "f32" or model == "f32" or len(tensor.shape) < 2:
        return tensor.dtype
    left: list[DType] = ["bf16", "f16"]
    for start, stop in slices(tensor):
        values = tensor.rows(start, stop).values
        left = [dtype for dtype in left if np.array_equal(round_to(values, dtype), values)]
        if not left:
            return "f32"
    return left[0]


def _unify(tensors: dict[str, Tensor], plan: _Plan) -> None:
    """Give wider blocks the commonest block, by repeating their scales: kernels want one scheme."""
    usual = _usual(plan.packed)
    for name, scheme in plan.packed.items():
        if replace(scheme, group=usual.group) == usual and usual.holds(tensors[name]):
            plan.packed[name] = usual


def _keep_one_scheme(tensors: dict[str, Tensor], plan: _Plan) -> dict[str, str]:
    """Give every module the scheme that makes the smallest file, and leave unpacked what it does not hold.

    transformers 5.23, unpacking while it loads, reads every module by the first scheme of the config. Returns why a
    module stays unpacked, by name.
    """
    linears = {name: scheme for name, scheme in plan.packed.items() if name not in EMBEDDINGS} or plan.packed
    one = min(
        sorted(set(linears.values())), key=lambda scheme: _bytes_in(scheme, [tensors[name] for name in plan.packed])
    )
    others = {}
    for name, scheme in list(plan.packed.items()):
        if one.holds(tensors[name]):
            plan.packed[name] = one
        else:
            del plan.packed[name]
            others[name] = (
                "transformers, unpacking while it loads, knows one scheme, and this has "
                f"{scheme.bits} bits in blocks of {scheme.group or 'a row'}"
            )
    return others


def _bytes_in(scheme: Scheme, tensors: list[Tensor]) -> float:
    """About how large tensors are in a scheme; those that it does not hold stay floats of two bytes."""
    total = 0.0
    for tensor in tensors:
        out, width = tensor.shape
        scales = 2 * width / (scheme.group or width)
        total += out * (width * scheme.bits / 8 + scales if scheme.holds(tensor) else 2 * width)
    return total


def _config(checkpoint: Checkpoint, plan: _Plan) -> dict[str, Any]:
    """config.json of the decoder alone, in the spelling it came in."""
    kept = {key: value for key, value in decoder_config(checkpoint).items() if key != "torch_dtype"}
    dtypes = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
    config = {**kept, "dtype": dtypes[plan.model]}
    if plan.packed:
        config["quantization_config"] = _quantization(checkpoint, plan)
    return config


def _quantization(checkpoint: Checkpoint, plan: _Plan) -> dict[str, Any]:
    """`quantization_config`, as compressed_tensors.quantization.QuantizationConfig serialises it.

    The commonest scheme has every Linear for its target, the others the modules that differ, by name. It comes last:
    of a module that two targets match, the library warns that the later one found none.
    """
    schemes = plan.packed
    linears = [name for name in schemes if name not in EMBEDDINGS]
    usual = _usual(schemes)
    ordered = [*sorted(set(schemes.values()) - {usual}), usual]
    groups = {}
    for i, scheme in enumerate(ordered):
        named = [_module(name) for name, own in schemes.items() if own == scheme]
        if scheme == usual and linears:
            named = ["Linear", *(name for name in named if f"{name}.weight" in EMBEDDINGS)]
        groups[f"group_{i}"] = scheme.group_config(named)
    formats = {scheme.format for scheme in ordered}
    matrices = [name for name, tensor in checkpoint.tensors.items() if len(tensor.shape) == 2]
    left = [_module(name) for name in matrices if name not in schemes and name not in EMBEDDINGS]
    if checkpoint.architecture.tied:
        left.append(_module(HEAD))
    cached = rounding.cache_scheme(plan.activations)
    return {
        "config_groups": groups,
        "dequantize": plan.unpack_early,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "global_compression_ratio": None,
        "ignore": left,
        "kv_cache_scheme": activation_args(*cached) if cached else None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def _usual(schemes: dict[str, Scheme]) -> Scheme:
    """The commonest scheme of the linears, or of the embeddings when no linear is packed."""
    linears = [scheme for name, scheme in schemes.items() if name not in EMBEDDINGS]
    return Counter(linears or schemes.values()).most_common(1)[0][0]


def _module(name: str) -> str:
    return name.removesuffix(".weight")


@dataclass(frozen=True)
class _Layout:
    """The arrays of the file, what stands beside each packed tensor's codes, its rounding, and activations' scales."""

    entries: list[Entry]
    beside: dict[str, tuple[Column, ...]]
    roundings: dict[str, Rounding]
    scales: list[tuple[Entry, NDArray[Any]]]


def _layout(checkpoint: Checkpoint, plan: _Plan) -> _Layout:
    roundings = {
        name: Rounding(_scale_dtype(checkpoint.tensors[name], scheme, plan)) for name, scheme in plan.packed.items()
    }
    beside = {
        name: tuple(columns(checkpoint.tensors[name], scheme, roundings[name])) for name, scheme in plan.packed.items()
    }
    entries: list[Entry] = []
    for name, tensor in checkpoint.tensors.items():
        if name not in plan.packed:
            entries.append(Entry(name, DTYPE_NAMES[plan.plain[name]], tensor.shape))
            continue
        entries += [codes(tensor, plan.packed[name])[0], *(column.entry for column in beside[name])]
        entries += [entry for entry, _ in constants(tensor, plan.packed[name])]
    scales = list(rounding.arrays(plan.activations))
    entries += [entry for entry, _ in scales]
    return _Layout(entries, beside, roundings, scales)


def _write_weights(checkpoint: Checkpoint, folder: Path, plan: _Plan, progress: Callable[[int], None]) -> None:
    layout = _layout(checkpoint, plan)
    with ShardedWriter(folder, layout.entries, METADATA) as out:
        for name, tensor in checkpoint.tensors.items():
            if name not in plan.packed:
                write_plain(out, tensor, plan.plain[name], plan.notes, progress)
                continue
            entry, pack = codes(tensor, plan.packed[name])
            write_packed(out, folder, tensor, (entry.name, pack), layout.beside[name], progress)
            for constant, values in constants(tensor, plan.packed[name]):
                out.write(constant.name, values)
            plan.rounded[name] = layout.roundings[name].count
        for entry, number in layout.scales:
            out.write(entry.name, number)
