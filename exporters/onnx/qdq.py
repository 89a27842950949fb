"""A graph whose activations are integers: QuantizeLinear and DequantizeLinear after every operator on activations.

Built without measured ranges the same graph computes in floating point and says what there is to measure, so the keys
of a measurement fit the graph that is quantized with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from gemexport.exporters.onnx.graph import GraphBuilder
from gemexport.formats.activations.ranges import Activations, Bits, Encoding, affine, widened

# They move numbers and change none, so what comes out has the encoding of what went in.
MOVES = frozenset(("Concat", "Gather", "Reshape", "Slice", "Split", "Transpose", "Unsqueeze", "Where"))
DTYPES: dict[str, ir.DataType] = {
    "uint8": ir.DataType.UINT8,
    "uint16": ir.DataType.UINT16,
    "int16": ir.DataType.INT16,
}


def fixed(kind: str, bits: Bits) -> Encoding | None:
    """The encoding of an operator whose range is known: that of QNN where it prescribes one, as for 16-bit Tanh."""
    half = 1 << (bits - 1)
    if kind == "Tanh":
        return Encoding(bits=bits, signed=False, scale=1 / half, zero_point=half)
    if kind == "Softmax":
        return Encoding(bits=bits, signed=False, scale=0.5 / half, zero_point=0)
    return None


class QdqGraph(GraphBuilder):
    """A graph that tells activations from other values by where they come from: inputs and constants named so here."""

    def __init__(self, name: str, activations: Activations) -> None:
        super().__init__(name)
        self.activations = activations
        self.watched: dict[str, ir.Value] = {}  # what there is to measure, by key
        self.watched_scores: dict[str, tuple[ir.Value, float]] = {}  # rows to measure by their maxima, and a margin
        self._encodings: dict[ir.Value, Encoding | None] = {}  # of activations; None while they are not quantized
        self._integers: dict[tuple[Encoding, tuple[int, ...], bytes], int] = {}
        self._recoded: dict[tuple[ir.Value, Encoding], ir.Value] = {}

    @property
    def measuring(self) -> bool:
        """Whether the graph is one to measure with."""
        return self.activations.ranges is None

    def ops(
        self,
        kind: str,
        outputs: int,
        inputs: Iterable[ir.Value | None],
        domain: str = "",
        *,
        key: str | None = None,
        bits: Bits | None = None,
        watch: bool = True,
        **attributes: Any,
    ) -> list[ir.Value]:
        """The outputs of an operator, quantized if it reads activations.

        `key` names the only output among the measured ranges, `bits` is the width of its integers, and what is not to
        be watched is measured by other means.
        """
        read = list(inputs)
        values = super().ops(kind, outputs, read, domain, **attributes)
        sources = [self._encodings[value] for value in read if value in self._encodings]
        if not sources:
            return values
        if kind in MOVES:
            return [self._as(value, sources[0]) for value in values]
        known = fixed(kind, bits or self.activations.bits)
        if known is not None:
            return [self._as(value, None if self.measuring else known) for value in values]
        return [self.activation(value, key or str(value.name), bits, watch) for value in values]

    def activation(self, value: ir.Value, key: str, bits: Bits | None = None, watch: bool = True) -> ir.Value:
        """A floating-point value as an activation with a range of its own."""
        if not self.measuring:
            return self._as(value, self.activations.encoding(key, bits))
        if watch:
            self.watched[key] = value
        return self._as(value, None)

    def recoded(self, value: ir.Value, key: str, encoding: Encoding | None) -> ir.Value:
        """An activation in another encoding; None while measuring, when it is watched under `key`."""
        if encoding is None:
            self.watched[key] = value
            return value
        if self._encodings[value] == encoding:
            return value
        if (value, encoding) not in self._recoded:
            self._recoded[value, encoding] = self._as(value, encoding)
        return self._recoded[value, encoding]

    def wide(self, value: ir.Value) -> ir.Value:
        """The same numbers in 16 bits: not one changes."""
        encoding = self._encodings[value]
        return value if encoding is None or encoding.bits == 16 else self._as(value, widened(encoding))

    def constant_activation(self, values: NDArray[np.floating], bits: Bits | None = None) -> ir.Value:
        """A constant that operators on activations take."""
        array = np.asarray(values, np.float32)
        encoding = constant_encoding(array, bits or self.activations.bits)
        return self.integers(encoding.encode(array), encoding)

    def integers(self, codes: NDArray[np.integer], encoding: Encoding) -> ir.Value:
        """Constant integers as an activation.

        Equal integers with another scale are another initializer: QNN's provider knows a tensor by its name alone, and
        would give all of them the first one's scale.
        """
        array = np.asarray(codes, encoding.numpy)
        number = self._integers.setdefault((encoding, array.shape, array.tobytes()), len(self._integers))
        name = f"/integers/{number}"
        return self.dequantized(self.initializer(name, ir.Tensor(array, name=name)), encoding)

    def dequantized(self, stored: ir.Value, encoding: Encoding) -> ir.Value:
        """An input or an initializer of integers as an activation."""
        value = super().ops("DequantizeLinear", 1, [stored, *self._parameters(encoding)])[0]
        self._encodings[value] = encoding
        return value

    def quantized(self, value: ir.Value, encoding: Encoding) -> ir.Value:
        """The integers of a floating-point value."""
        return super().ops("QuantizeLinear", 1, [value, *self._parameters(encoding)])[0]

    def raw(self, kind: str, inputs: Iterable[ir.Value | None], **attributes: Any) -> ir.Value:
        """The output of an operator as it is."""
        return self.raws(kind, 1, inputs, **attributes)[0]

    def raws(self, kind: str, outputs: int, inputs: Iterable[ir.Value | None], **attributes: Any) -> list[ir.Value]:
        """The outputs of an operator as they are."""
        return super().ops(kind, outputs, inputs, **attributes)

    def encoding(self, value: ir.Value) -> Encoding | None:
        """The encoding of an activation; None while measuring."""
        return self._encodings[value]

    def _as(self, value: ir.Value, encoding: Encoding | None) -> ir.Value:
        """A value quantized and dequantized; as it is while measuring."""
        if encoding is None:
            self._encodings[value] = None
            return value
        return self.dequantized(self.quantized(value, encoding), encoding)

    def _parameters(self, encoding: Encoding) -> tuple[ir.Value, ir.Value]:
        return self.constant(encoding.scale, np.float32), self.constant(encoding.zero_point, encoding.numpy)


def constant_encoding(values: NDArray[np.float32], bits: Bits) -> Encoding:
    """The integers of a constant."""
    return affine(float(values.min()), float(values.max()), bits)
