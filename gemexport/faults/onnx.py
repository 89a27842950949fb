"""Faults of an ONNX artefact's graphs, written with onnx-ir: operators, attributes and constants.

A folder has one graph, or the three for an NPU; a fault goes into every graph that has what it breaks.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from gemexport.faults import arithmetic, folders
from gemexport.faults.operators import changed, graphs, replace
from gemexport.faults.stored import writable
from gemexport.faults.weights import Fault, Harmless, Make, Subject, name_of, wide
from gemexport.formats.gemma.architecture import Layer, Rope
from gemexport.formats.gemma.names import HEAD, module_of
from gemexport.formats.gemma.roles import Role
from gemexport.formats.onnx import COPY
from gemexport.formats.onnx.stored import array

NOISE_EVERY = 7  # of the head's packed codes, one in so many is another


def rope(change: Callable[[Rope, Layer], Rope]) -> Make:
    """A fault of the full layers' angles: frequencies in the graph, or tables beside it."""

    def fault(subject: Subject) -> str:
        layer = subject.layer(sliding=False)
        frequencies = change(layer.rope, layer).inv_freq(layer.head_dim).astype(np.float32)
        found = False
        for file, model in graphs(subject):
            number = _rope_number(subject)
            row = model.graph.initializers.get(f"/rope_{number}/inv_freq")
            if row is not None:
                row.const_value = ir.Tensor(frequencies[None, :], name=row.name)
                found = True
            for kind, function in (("cos", np.cos), ("sin", np.sin)):
                value = model.graph.initializers.get(f"/rope_{number}/{kind}")
                if value is not None:
                    table = writable(array(value, file))
                    table[:] = function(np.arange(len(table), dtype=np.float32)[:, None] * frequencies)
                    found = True
        if not found:
            raise ValueError("the graphs have no angles")
        return "departs at|RoPE"  # tables are compared, frequencies show in the logits

    return fault


def _rope_number(subject: Subject) -> int:
    """Which of the rotations the full layers have: they are numbered in the order of the layers."""
    order = list(dict.fromkeys((layer.rope, layer.head_dim) for layer in subject.decoder.layers))
    full = subject.layer(sliding=False)
    return order.index((full.rope, full.head_dim))


def window(graph: ir.Graph, subject: Subject) -> bool:
    """Sliding layers see one position less."""
    found = False
    for node in graph:
        if node.attributes.get_int("local_window_size", -1) > 0:
            node.attributes["local_window_size"] = ir.AttrInt64("local_window_size", subject.decoder.sliding_window - 1)
            found = True
        if node.op_type == "Less":
            # The constant may serve others as well.
            replace(graph, node, 1, np.array(subject.decoder.sliding_window - 1, np.int32))
            found = True
    return found


def layers_exchanged(graph: ir.Graph, subject: Subject) -> bool:
    """The first full layer slides, and the first sliding one sees everything."""
    kinds = [layer.sliding for layer in subject.decoder.layers]
    pair = kinds.index(True), kinds.index(False)
    attention = [node for node in graph if node.op_type == "GroupQueryAttention"]
    if attention:
        first, other = (attention[i] for i in pair)
        sizes = [node.attributes.get_int("local_window_size", -1) for node in (first, other)]
        for node, value in zip((first, other), reversed(sizes), strict=True):
            node.attributes["local_window_size"] = ir.AttrInt64("local_window_size", value)
        return True
    # The masks of an NPU's graph are as long as the caches, which differ: the sliding ones lose their window instead.
    near = [node for node in graph if node.op_type == "Less"]
    for node in near:
        replace(graph, node, 1, np.array(1 << 20, np.int32))
    return bool(near)


def softcap(graph: ir.Graph, _: Subject) -> bool:
    """Logits are not capped: the hyperbolic tangent gives what it is given."""
    last = [node for node in graph if node.op_type == "Tanh"]
    for node in last[-1:]:
        node.op_type = "Identity"
    return bool(last)


def embedding_scale(graph: ir.Graph, subject: Subject) -> bool:
    """Embeddings are not multiplied by the root of their width."""
    for node in graph:
        stored = node.inputs[1].const_value if node.op_type == "Mul" and node.inputs[1] is not None else None
        if stored is not None and stored.shape.numpy() == () and float(stored.numpy()) == subject.decoder.embed_scale:
            replace(graph, node, 1, np.array(1, np.float32))
            return True
    return False


def donor(graph: ir.Graph, subject: Subject) -> bool:
    """A layer without keys of its own reads those of the first layer of its type."""
    layers = subject.decoder.layers
    shared = next(layer for layer in layers if not layer.owns_cache)
    wrong = next(layer for layer in layers if layer.sliding == shared.sliding and layer.index != shared.kv_source)
    attention = [node for node in graph if node.op_type == "GroupQueryAttention"]
    if attention:
        for index in (0, 1):
            attention[shared.index].replace_input_with(3 + index, attention[wrong.index].outputs[1 + index])
        return True
    caches = {value.name: value for value in graph.inputs}
    for kind in ("key", "value"):
        names = [f"past_key_values.{index}.{kind}" for index in (shared.kv_source, wrong.index)]
        if not all(name in caches for name in names):
            return False
        right, other = (next(iter(caches[name].uses()))[0].outputs[0] for name in names)
        # The donor's own use of what it remembers comes first; then the layers that share it.
        readers = [(node, index) for node, index in right.uses() if node.op_type in ("Transpose", "MatMul")]
        order = {node: place for place, node in enumerate(graph)}
        node, index = sorted(readers, key=lambda use: order[use[0]])[1]
        node.replace_input_with(index, other)
    return True


def cache_late(graph: ir.Graph, _: Subject) -> bool:
    """A cache ends one position before the newest one."""
    found = False
    for value in graph.outputs:
        node = value.producer()
        if (value.name or "").startswith("present.") and node is not None and node.op_type == "Slice":
            for index in (1, 2):
                stored = node.inputs[index]
                assert stored is not None
                assert stored.const_value is not None
                replace(graph, node, index, stored.const_value.numpy() - 1)
            found = True
    return found


def head_untied(subject: Subject) -> str:
    """The head's codes are the embedding's with noise: a copy of them, where both read the same bytes."""
    done: set[tuple[str, int]] = set()  # the two graphs for an NPU read the same bytes
    for file, model in graphs(subject):
        head = model.graph.initializers.get(HEAD)
        stored = None if head is None else head.const_value
        if head is None or not isinstance(stored, ir.ExternalTensor):
            continue
        place = str(stored.location), int(stored.offset or 0)
        if COPY in stored.metadata_props:
            if place in done:
                continue
            done.add(place)
            codes = writable(array(head, file)).reshape(-1)
            codes[::NOISE_EVERY] ^= 1
            continue
        data = file.parent / str(stored.location)
        codes = np.array(array(head, file)).view(np.uint8).reshape(-1)
        codes[::NOISE_EVERY] ^= 1
        whole = data.read_bytes()
        start = -(-len(whole) // 64) * 64
        data.write_bytes(whole + bytes(start - len(whole)) + codes.tobytes())
        head.const_value = ir.ExternalTensor(
            str(stored.location), start, len(codes), stored.dtype, shape=stored.shape, name=HEAD, base_dir=file.parent
        )
    return module_of(HEAD)


def shape_turned(subject: Subject) -> str:
    """A matrix [out, in] is stored as [in, out], the same bytes."""
    name, found = wide(subject), False
    rows, width = subject.model.specs[name].shape
    for _, model in graphs(subject):
        for key in (name, f"{name}.scales"):
            value = model.graph.initializers.get(key)
            stored = None if value is None else value.const_value
            if value is None or not isinstance(stored, ir.ExternalTensor):
                continue
            first, *inner = stored.shape.numpy()
            # Rows first in the operators for 4 bits, columns first, or blocks of them, in the standard's.
            other = width if first == rows else rows if first == width else first * rows // width
            total = int(np.prod([first, *inner]))
            shape = (
                (other, *inner[:-2], total // other // inner[-1], inner[-1])
                if len(inner) > 1
                else (other, total // other)
            )
            new = ir.ExternalTensor(str(stored.location), stored.offset, stored.length, stored.dtype,
                                    shape=ir.Shape(shape), name=key, base_dir=stored.base_dir)  # fmt: skip
            new.metadata_props.update(stored.metadata_props)
            value.const_value, value.shape = new, ir.Shape(shape)
            found = True
            for node, _index in value.uses():
                if node.op_type == "MatMulNBits":
                    node.attributes["N"], node.attributes["K"] = ir.AttrInt64("N", width), ir.AttrInt64("K", rows)
    if not found:
        raise ValueError(f"no graph has {name}")
    return name


def unknown_tensor(graph: ir.Graph, subject: Subject) -> bool:
    """A constant, called as a router of a layer, that no operator reads."""
    name = name_of(Role.ROUTER, 0)
    array = np.ones((4, subject.decoder.hidden_size), np.float32)
    graph.initializers[name] = ir.Value(
        name=name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.FLOAT),
        const_value=ir.Tensor(array, name=name),
    )  # fmt: skip
    return True


def activation(edit: Callable[[ir.Graph, ir.Node], None]) -> Make:
    """A fault of the first static scale of activations."""

    def change(graph: ir.Graph, _: Subject) -> bool:
        for node in graph:
            if node.op_type == "QuantizeLinear":
                edit(graph, node)
                return True
        return False

    return changed(change, "activation quantizer|reads back other integers")


def _scale_doubled(graph: ir.Graph, node: ir.Node) -> None:
    for user in [node, *(use for use, _ in node.outputs[0].uses() if use.op_type == "DequantizeLinear")]:
        stored = user.inputs[1]
        assert stored is not None
        assert stored.const_value is not None
        replace(graph, user, 1, stored.const_value.numpy() * np.float32(2))


def _zero_moved(graph: ir.Graph, node: ir.Node) -> None:
    stored = node.inputs[2]
    assert stored is not None
    assert stored.const_value is not None
    replace(graph, node, 2, stored.const_value.numpy() + stored.const_value.numpy().dtype.type(1))


def _short(settings: folders.Json, _: Subject) -> str:
    settings["model"]["context_length"] = 10
    return "context_length"


def _narrow(settings: folders.Json, _: Subject) -> str:
    settings["model"]["decoder"]["head_size"] = 1
    return "head_size"


def _fewer(settings: folders.Json, _: Subject) -> str:
    settings["model"]["eos_token_id"] = settings["model"]["eos_token_id"][:1]
    return "does not end at"


def _turn_goes_on(subject: Subject) -> str:
    """Of the files that say where an answer ends, the one that the program reads has an end less."""
    genai = (subject.path / "genai_config.json").is_file()
    fault = folders.edited("genai_config.json", _fewer) if genai else folders.TOKENIZER["end of a turn removed"]
    assert callable(fault)
    return str(fault(subject))


UNUSED = "ONNX Runtime takes a constant that no operator reads out of the graph when it loads it"
ACTIVATIONS: dict[str, Fault | str] = {
    "activation scale doubled": activation(_scale_doubled),
    "activation zero point off by one": activation(_zero_moved),
}
FAULTS: dict[str, Fault | str] = {
    "RoPE base wrong": rope(lambda own, _: own.model_copy(update={"theta": 10_000.0})),
    "RoPE scaling wrong": rope(lambda own, _: own.model_copy(update={"factor": 8.0})),
    "RoPE partial factor wrong": rope(lambda own, _: own.model_copy(update={"rotary_dims": own.rotary_dims // 2})),
    "sliding window off by one": changed(window),
    "full and sliding layers exchanged": changed(layers_exchanged),
    "soft cap lost": changed(softcap, "logits"),
    "embedding scale lost": changed(embedding_scale),
    "shared KV layer reads the wrong donor": changed(donor),
    "tied head untied with noise": head_untied,
    "KV cache written one position late": changed(cache_late),
    "metadata of another size": "the graph says every size, and does not load with another",
    "context length halved": "a graph with free sizes has none",
    "truncated file": folders.truncated,
    "a matrix's shape the other way round": shape_turned,
    "a tensor that the decoder has not": Harmless(changed(unknown_tensor, "router"), UNUSED),
    "erf for tanh in one GELU": changed(arithmetic.erf, "tanh"),
    "attention soft cap 50 in one layer": changed(arithmetic.attention_softcap, "softcap"),
    "epsilon 1e-5 in one norm": arithmetic.epsilon(1e-5, every=False),
    "epsilon 2e-6 in all norms": arithmetic.epsilon(2e-6, every=True),
    "attention scale 0.2 % larger in one layer": changed(arithmetic.attention_scale, "scale"),
    "mask -20 for -inf": changed(arithmetic.mask, "adds to scores"),
    "general.file_type changed": folders.OF_GGUF,
    "context length 10": folders.edited("genai_config.json", _short),
    "head size 1": folders.edited("genai_config.json", _narrow),
    **folders.SPECIAL,
    "a second safetensors file": "no program of the format reads such a file",
    "one expert more chosen": changed(arithmetic.top_k),
    **folders.TOKENIZER,
    "end of a turn removed": _turn_goes_on,
}
