"""The graphs of fixed size in OpenVINO on the CPU: what Intel's NPUs and GPUs are programmed with.

It is told to compute in f32: left to itself it rounds activations to 8 bits before packed weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemexport.formats.onnx import read_model
from gemexport.formats.storage.errors import InputError
from gemexport.validators.runtimes.onnx_traits import traits
from gemexport.validators.runtimes.onnxruntime import NPU_GRAPHS, NUMPY_TYPES, NpuModel

PACKAGE = "openvino"
ONNX_TYPES = {np.dtype(dtype): name for name, dtype in NUMPY_TYPES.items()}
UNKNOWN = ("INT2", "UINT2")  # to version 2026.4
SETTINGS = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


def takes(path: Path) -> bool:
    """Whether OpenVINO is here, and `path` a folder of an NPU's graphs that compute in f32, of types that it knows."""
    files = [path / f"{name}.onnx" for name in NPU_GRAPHS]
    if find_spec(PACKAGE) is None or not all(map(Path.is_file, files)) or traits(files).arithmetic != "f32":
        return False
    stored = (value.dtype for file in files for value in read_model(file).graph.initializers.values())
    return not any(dtype is not None and dtype.name in UNKNOWN for dtype in stored)


def load(path: Path, *, threads: int, context: int, frugal: bool = False) -> OpenVinoModel:
    """The artefact in the folder `path`, all of its graphs at once, `frugal` or not.

    Raises InputError when OpenVINO cannot load it, or when it holds fewer than `context` positions.
    """
    return OpenVinoModel(Path(path), threads, context)


class OpenVinoModel(NpuModel):
    """Lookup, decoder for a chunk of a prompt and decoder for one token, each compiled by OpenVINO."""

    def __init__(self, folder: Path, threads: int, context: int) -> None:
        files = {name: folder / f"{name}.onnx" for name in NPU_GRAPHS}
        super().__init__(folder, files, context, lambda _, file: OpenVinoSession(file, threads))
        self.name = f"OpenVINO {version(PACKAGE)}"

    def hidden(self, tokens: Sequence[int]) -> None:
        """None: it is not asked for what lies between the layers."""


@dataclass(frozen=True)
class Port:
    """An input or output of a graph, its type as ONNX Runtime calls it."""

    name: str
    shape: tuple[int | str, ...]
    type: str


class OpenVinoSession:
    """One graph, compiled for the CPU."""

    def __init__(self, file: Path, threads: int) -> None:
        import openvino

        settings = {**SETTINGS, "INFERENCE_NUM_THREADS": str(threads)}
        try:
            self._compiled = openvino.Core().compile_model(str(file), "CPU", settings)
        except RuntimeError as error:
            reason = next((line for line in reversed(str(error).splitlines()) if line.strip()), "it does not say why")
            raise InputError(file, f"OpenVINO does not load it ({reason.strip()})", "export it again") from error
        self._request = self._compiled.create_infer_request()
        graph = read_model(file).graph
        self._inputs = [_port(value.name, self._compiled.inputs) for value in graph.inputs]
        self._outputs = [_port(value.name, self._compiled.outputs) for value in graph.outputs]

    def get_inputs(self) -> list[Port]:
        """What goes into the graph."""
        return self._inputs

    def get_outputs(self) -> list[Port]:
        """What comes out of it, in the graph's order."""
        return self._outputs

    def run(self, names: Sequence[str] | None, feeds: Mapping[str, NDArray[Any]], /) -> list[NDArray[Any]]:
        """The outputs of these names, or all of them; arrays of their own."""
        found = self._request.infer(dict(feeds))
        wanted = [port.name for port in self._outputs] if names is None else names
        return [np.array(found[name]) for name in wanted]


def _port(name: str | None, ports: Sequence[Any]) -> Port:
    """The port that has `name`; it may have those of values inside the graph as well."""
    port = next(port for port in ports if name in port.names)
    sizes = tuple(size.get_length() if size.is_static else str(size) for size in port.partial_shape)
    dtype = port.element_type.to_dtype()
    return Port(str(name), sizes, ONNX_TYPES.get(np.dtype(dtype), f"tensor({np.dtype(dtype).name})"))
