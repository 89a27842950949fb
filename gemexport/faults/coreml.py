"""Faults of a Core ML package's program, written through coremltools' protobuf."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gemexport.faults import folders
from gemexport.faults.places import _blob, save_package
from gemexport.faults.stored import writable
from gemexport.faults.weights import Fault, Harmless, Make, Subject, name_of, wide
from gemexport.formats.coreml import constants, stored_name
from gemexport.formats.coreml.package import Package, open_package
from gemexport.formats.gemma.architecture import Layer, Rope
from gemexport.formats.gemma.names import EMBEDDING, HEAD, module_of
from gemexport.formats.gemma.roles import Role
from gemexport.formats.tensor import Floats

WINDOW = "co.huggingface.exporters.sliding_window"
NORM = 5  # which of the norms has another epsilon: the one behind the first attention
ATTENTION = "scaled_dot_product_attention"


def changed(edit: Callable[[Package, Subject], None], named: str = "departs at") -> Make:
    """A fault by `edit` of the program."""

    def fault(subject: Subject) -> str:
        package = open_package(subject.path)
        edit(package, subject)
        save_package(package)
        return named

    return fault


def _named(package: Package, name: str) -> Any:
    """The operation that gives `name`."""
    return next(item for item in package.operations if any(output.name == name for output in item.outputs))


def _ops(package: Package, kind: str) -> list[Any]:
    return [item for item in package.operations if item.type == kind]


def _argument(operation: Any, name: str) -> str:
    found: str = operation.inputs[name].arguments[0].name
    return found


def _floats(operation: Any) -> Any:
    """The numbers of a small f32 constant."""
    return operation.attributes["val"].immediateValue.tensor.floats.values


def rope(change: Callable[[Rope, Layer], Rope]) -> Make:
    """A fault of the tables of the full layers' angles."""

    def fault(subject: Subject) -> str:
        layer = subject.layer(sliding=False)
        order = list(dict.fromkeys((item.rope, item.head_dim) for item in subject.decoder.layers))
        number = order.index((layer.rope, layer.head_dim))
        frequencies = change(layer.rope, layer).inv_freq(layer.head_dim).astype(np.float32)
        tables = constants(open_package(subject.path))
        for kind, function in (("cos", np.cos), ("sin", np.sin)):
            stored: Any = tables[f"rope_{number}_{kind}"]
            table = writable(_blob(stored).data.view("<f4").reshape(stored.shape))
            table[:] = function(np.arange(len(table), dtype=np.float32)[:, None] * frequencies)
        return "RoPE"

    return fault


def window(package: Package, subject: Subject) -> None:
    """Whoever feeds the masks is told a window of one position less."""
    package.model.description.metadata.userDefined[WINDOW] = str(subject.decoder.sliding_window - 1)


def layers_exchanged(package: Package, subject: Subject) -> None:
    """The first full layer gets the sliding layers' mask, and the first sliding one that of the full ones."""
    kinds = [layer.sliding for layer in subject.decoder.layers]
    attention = _ops(package, ATTENTION)
    first, other = attention[kinds.index(True)], attention[kinds.index(False)]
    masks = {_argument(node, "attn_mask"): _named(package, _argument(node, "attn_mask")) for node in (first, other)}
    # A mask is made where it is first read, so what it is made of changes places, not its readers.
    ends = [_root(package, operation) for operation in masks.values()]
    names = [_argument(end, "x") for end in ends]
    sliding, full = names
    first_x, other_x = full, sliding
    for operation, source in zip(ends, (first_x, other_x), strict=True):
        operation.inputs["x"].arguments[0].name = source


def _root(package: Package, operation: Any) -> Any:
    """The first operation that a mask goes through."""
    while True:
        name = _argument(operation, "x")
        before = [item for item in package.operations if any(output.name == name for output in item.outputs)]
        if not before:
            return operation
        operation = before[0]


def softcap(package: Package, _: Subject) -> None:
    """Logits are not capped: the hyperbolic tangent gives what it is given."""
    _ops(package, "tanh")[-1].type = "identity"


def embedding_scale(package: Package, subject: Subject) -> None:
    """Embeddings are not multiplied by the root of their width."""
    for operation in _ops(package, "mul"):
        source = _named(package, _argument(operation, "y"))
        if source.type == "const" and list(_floats(source)) == [np.float32(subject.decoder.embed_scale)]:
            _floats(source)[:] = [1.0]
            return
    raise ValueError("the program has no embedding scale")


def donor(package: Package, subject: Subject) -> None:
    """A layer without keys of its own reads those of the first layer of its type."""
    layers = subject.decoder.layers
    shared = next(layer for layer in layers if not layer.owns_cache)
    wrong = next(layer for layer in layers if layer.sliding == shared.sliding and layer.index != shared.kv_source)
    attention = _ops(package, ATTENTION)
    for name in ("key", "value"):
        attention[shared.index].inputs[name].arguments[0].name = _argument(attention[wrong.index], name)


def cache_late(package: Package, _: Subject) -> None:
    """Keys and values are written one position after their own."""
    operations = package.operations
    place = next(i for i, item in enumerate(operations) if item.outputs and item.outputs[0].name == "past_position")
    for name, source in (("late_past", "past_position"), ("late_end", "end_position")):
        add = type(operations[0])()
        add.CopyFrom(operations[place])  # end_position - token_count: for the types
        add.type = "add"
        add.outputs[0].name = name
        add.attributes["name"].immediateValue.tensor.strings.values[0] = name
        add.inputs["x"].arguments[0].name = source
        one = add.inputs["y"].arguments[0]
        one.ClearField("binding")
        one.value.type.CopyFrom(operations[place].outputs[0].type)
        one.value.immediateValue.tensor.ints.values.append(1)
        operations.insert(place + 1, add)
    written = {_argument(update, side) for update in _ops(package, "slice_update") for side in ("begin", "end")}
    for item in operations:
        if item.type == "concat" and item.outputs[0].name in written:
            for argument in item.inputs["values"].arguments:
                renamed = {"past_position": "late_past", "end_position": "late_end"}.get(argument.name)
                if renamed:
                    argument.name = renamed


def head_untied(package: Package, subject: Subject) -> None:
    """The head reads a matrix of its own, the embedding with noise."""
    from gemexport.formats.coreml import tensors

    table = tensors(subject.path)[EMBEDDING].numpy()
    linear = next(item for item in _ops(package, "linear") if _argument(item, "weight") == stored_name(EMBEDDING))
    source = _named(package, stored_name(EMBEDDING))
    constant = type(source)()
    constant.type = "const"
    constant.outputs.add().CopyFrom(source.outputs[0])
    constant.outputs[0].name = stored_name(HEAD)
    constant.attributes["name"].CopyFrom(source.attributes["name"])
    constant.attributes["name"].immediateValue.tensor.strings.values[0] = stored_name(HEAD)
    value = constant.attributes["val"]
    value.type.CopyFrom(source.outputs[0].type)
    noisy = _noisy(table)
    if table.dtype == np.float32 and "FLOAT16" in str(source.outputs[0].type.tensorType):
        value.immediateValue.tensor.bytes.values = noisy.astype("<f2").tobytes()
    else:
        value.immediateValue.tensor.floats.values.extend(noisy.reshape(-1).tolist())
    if source.outputs[0].type.tensorType.dataType == 10:  # FLOAT16 in MIL.proto
        value.immediateValue.tensor.ClearField("floats")
        value.immediateValue.tensor.bytes.values = noisy.astype("<f2").tobytes()
    place = list(package.operations).index(source)
    package.operations.insert(place + 1, constant)
    linear.inputs["weight"].arguments[0].name = stored_name(HEAD)


def _constant(package: Package, operation: Any, name: str) -> Any:
    """The constant that an operation takes as `name`."""
    return _named(package, _argument(operation, name))


def erf(package: Package, _: Subject) -> None:
    """The first activation is the exact GELU."""
    mode = _constant(package, _ops(package, "gelu")[0], "mode")
    mode.attributes["val"].immediateValue.tensor.strings.values[0] = "EXACT"


def _epsilon(size: float, every: bool) -> Make:
    def edit(package: Package, _: Subject) -> None:
        norms = _ops(package, "rsqrt")
        for operation in norms if every else norms[NORM : NORM + 1]:
            _floats(_constant(package, operation, "epsilon"))[:] = [size]

    return changed(edit, "epsilon|departs at")


def attention_scale(package: Package, _: Subject) -> None:
    """The queries of the first layer are larger by 0.2 %."""
    operation = _ops(package, ATTENTION)[0]
    name = _argument(operation, "query")
    while operation.type != "mul" or _constant(package, operation, "y").type != "const":
        operation = _named(package, name)
        name = _argument(operation, "x")
    factor = _floats(_constant(package, operation, "y"))
    factor[:] = [factor[0] * 1.002]


def shape_turned(package: Package, subject: Subject) -> None:
    """A matrix [out, in] is stored as [in, out], the same bytes."""
    rows, width = subject.model.specs[wide(subject)].shape
    operation = _named(package, stored_name(wide(subject)))
    held = [output.type for output in operation.outputs]
    held += [value.type for value in operation.attributes.values()]
    held += [argument.value.type for value in operation.inputs.values() for argument in value.arguments]
    for kind in held:
        dimensions = kind.tensorType.dimensions
        if len(dimensions) == 2 and dimensions[0].constant.size == rows:
            columns = dimensions[1].constant.size * rows // width
            dimensions[0].constant.size, dimensions[1].constant.size = width, columns


def unknown_tensor(package: Package, subject: Subject) -> None:
    """A constant, called as a router of a layer, that no operation reads."""
    source = _named(package, stored_name(name_of(Role.FINAL_NORM)))
    constant = type(source)()
    constant.CopyFrom(source)
    name = stored_name(name_of(Role.ROUTER, 0))
    constant.outputs[0].name = name
    constant.attributes["name"].immediateValue.tensor.strings.values[0] = name
    package.operations.insert(list(package.operations).index(source) + 1, constant)


def top_k(package: Package, _: Subject) -> None:
    """The first router's best ones are one more."""
    source = _constant(package, _ops(package, "topk")[0], "k")
    source.attributes["val"].immediateValue.tensor.ints.values[0] += 1


def _noisy(table: Floats) -> Floats:
    from gemexport.faults.weights import NOISE

    noise = np.random.default_rng(0).normal(0, NOISE * float(table.std()), table.shape)
    return (table + noise).astype(np.float32)


def _scale_doubled(package: Package, _: Subject) -> None:
    """The first static scale of activations, on the way to integers and back."""
    there = _ops(package, "quantize")[0]
    back = next(item for item in _ops(package, "dequantize") if _argument(item, "input") == there.outputs[0].name)
    for operation in (there, back):
        _floats(_named(package, _argument(operation, "scale")))[0] *= 2


SIZES = "the program says every size"
UNUSED = "an operation that nothing reads is not computed"
ACTIVATIONS: dict[str, Fault | str] = {
    "activation scale doubled": changed(_scale_doubled, "activation quantizer"),
    "activation zero point off by one": folders.NO_ZERO_POINT,
}
FAULTS: dict[str, Fault | str] = {
    "RoPE base wrong": rope(lambda own, _: own.model_copy(update={"theta": 10_000.0})),
    "RoPE scaling wrong": rope(lambda own, _: own.model_copy(update={"factor": 8.0})),
    "RoPE partial factor wrong": rope(lambda own, _: own.model_copy(update={"rotary_dims": own.rotary_dims // 2})),
    "sliding window off by one": changed(window, "sliding_window"),
    "full and sliding layers exchanged": changed(layers_exchanged),
    "soft cap lost": changed(softcap, "logits"),
    "embedding scale lost": changed(embedding_scale),
    "shared KV layer reads the wrong donor": changed(donor),
    "tied head untied with noise": changed(head_untied, module_of(HEAD)),
    "KV cache written one position late": changed(cache_late),
    "metadata of another size": SIZES,
    "context length halved": "a package is exported for the context that is asked for",
    "truncated file": folders.truncated,
    "a matrix's shape the other way round": changed(shape_turned, "shape"),
    "a tensor that the decoder has not": Harmless(changed(unknown_tensor, "router"), UNUSED),
    "erf for tanh in one GELU": changed(erf, "tanh"),
    "attention soft cap 50 in one layer": "the operation for attention has none",
    "epsilon 1e-5 in one norm": _epsilon(1e-5, every=False),
    "epsilon 2e-6 in all norms": _epsilon(2e-6, every=True),
    "attention scale 0.2 % larger in one layer": changed(attention_scale, "scale"),
    "mask -20 for -inf": "whoever runs a package makes the masks",
    "general.file_type changed": folders.OF_GGUF,
    "context length 10": SIZES,
    "head size 1": SIZES,
    **dict.fromkeys(folders.SPECIAL, "a package has no config.json"),
    "a second safetensors file": "no program of the format reads such a file",
    "one expert more chosen": changed(top_k),
    **folders.TOKENIZER,
}
