"""What a stateful language model in Core ML is fed at each step: token ids and the masks that say what they see.

The contract is that of Apple's examples and of Hugging Face's swift-transformers: `inputIds` `[1, n]`, additive masks
`[1, 1, n, end]` whose last axis ends with the newest token (so that its length tells the position), `logits` out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemexport.formats.coreml.package import Package, typed
from gemexport.formats.storage.errors import InputError

SLIDING_WINDOW = "co.huggingface.exporters.sliding_window"
MASKED = -65504.0  # the lowest float16: beyond it, a mask added to a score would be infinite
LOGITS = "logits"
_BROKEN = "export it again"
_REMEDY = "give a language model with token ids, additive masks and a state, as docs/coreml.md describes it"


@dataclass(frozen=True)
class Feeds:
    """How to feed one package."""

    ids: str
    masks: Mapping[str, int | None]  # input name -> sliding window, None for full attention
    context: int  # tokens that its cache holds

    def at(self, tokens: Sequence[int], past: int) -> dict[str, NDArray]:
        """Inputs for `tokens` after `past` tokens that the state holds."""
        inputs: dict[str, NDArray] = {self.ids: np.array([tokens], np.int32)}
        for name, window in self.masks.items():
            inputs[name] = mask(len(tokens), past, window)
        return inputs


def mask(count: int, past: int, window: int | None) -> NDArray[np.float16]:
    """`[1, 1, count, past + count]`: 0 where a query sees a key, causally and within its window, else -65504."""
    queries = np.arange(past, past + count)[:, None]
    keys = np.arange(past + count)[None]
    seen = keys <= queries
    if window is not None:
        seen &= keys > queries - window
    return np.where(seen, np.float16(0), np.float16(MASKED))[None, None]


def check_description(package: Package) -> None:
    """Raise InputError where the model's description is not of its program: Core ML refuses such a package.

    The evaluator reads the program alone. The operations CoreML5 of iOS 15 came with version 6 of the specification,
    and so on.
    """
    from coremltools.proto.FeatureTypes_pb2 import ArrayFeatureType as Kind

    kinds = {Kind.FLOAT16: "fp16", Kind.FLOAT32: "fp32", Kind.INT32: "int32"}
    description, function = package.model.description, package.function
    given = {item.name: typed(item.type) for item in function.inputs}
    made = {output.name: typed(output.type) for operation in package.operations for output in operation.outputs}
    told = [*((given, item) for item in (*description.input, *description.state))]
    told += [({name: made[name] for name in package.outputs if name in made}, item) for item in description.output]
    for known, feature in told:
        kind, own = feature.type.WhichOneof("Type"), known.get(feature.name)
        if own is None:
            raise InputError(package.path, f"describes {feature.name}, which its program does not have", _BROKEN)
        array = feature.type.stateType.arrayType if kind == "stateType" else feature.type.multiArrayType
        stored = kinds.get(array.dataType)
        if kind in ("stateType", "multiArrayType") and stored is not None and stored != own.kind:
            problem = f"describes {feature.name} as {stored}, its program has it as {own.kind}"
            raise InputError(package.path, problem, _BROKEN)
        if kind == "stateType" and tuple(array.shape) != own.shape:
            problem = f"describes the state {feature.name} as {list(array.shape)}, its program as {list(own.shape)}"
            raise InputError(package.path, problem, _BROKEN)
    operations = function.opset.removeprefix("CoreML")
    if operations.isdigit() and package.model.specificationVersion <= int(operations):
        problem = f"says version {package.model.specificationVersion}, which has no operations of {function.opset}"
        raise InputError(package.path, problem, _BROKEN)


def feeds(package: Package) -> Feeds:
    """How to feed `package`; InputError when it is no language model of the kind that is known here, or broken."""
    check_description(package)
    ids, masks, context = None, {}, 0
    for feature in package.model.description.input:
        array = feature.type.multiArrayType
        sizes = [size.upperBound for size in array.shapeRange.sizeRanges] or list(array.shape)
        if len(sizes) == 2:
            ids, context = feature.name, int(sizes[1])
        elif len(sizes) == 4 and feature.name.lower().endswith("mask"):
            masks[feature.name] = _window(package, feature.name)
        else:
            raise InputError(package.path, f"the input {feature.name} is not known", _REMEDY)
    if ids is None or not masks or not len(package.model.description.state):
        raise InputError(package.path, "is no language model that keeps its cache in states", _REMEDY)
    if LOGITS not in {feature.name for feature in package.model.description.output}:
        raise InputError(package.path, "has no output called logits", _REMEDY)
    return Feeds(ids, masks, context)


def _window(package: Package, name: str) -> int | None:
    if "sliding" not in name.lower():
        return None
    try:
        return int(package.metadata[SLIDING_WINDOW])
    except (KeyError, ValueError) as error:
        problem = f"does not say how long the window of {name} is"
        raise InputError(package.path, problem, f"set its metadata {SLIDING_WINDOW}") from error
