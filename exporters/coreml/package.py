"""Writes an .mlpackage: the program that coremltools built, and weights streamed into its weight file.

coremltools would hold every constant in memory and give the package random identifiers. Here its exporter only lays
out the weight file; the rows come afterwards, and the same program gives the same bytes.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from coremltools import _SPECIFICATION_VERSION_IOS_18 as SPECIFICATION
from coremltools.converters.mil.backend.mil.helper import create_file_value_tensor, types_to_proto_primitive
from coremltools.converters.mil.backend.mil.load import CoreMLProtoExporter, MILProtoExporter
from coremltools.converters.mil.mil import Program, types
from numpy.typing import NDArray

from gemexport.formats.coreml.blob import BlobLayout, BlobWriter, Entry
from gemexport.formats.coreml.package import MODEL, WEIGHTS

WEIGHT_FILE = "@model_path/weights/weight.bin"
Fill = Callable[[BlobWriter, Mapping[str, NDArray]], None]


class _Exporter(MILProtoExporter):
    """coremltools' translation of a program to protobuf, with constants given a place instead of being written."""

    def __init__(self, program: Program) -> None:
        super().__init__(program, weights_dir="", specification_version=SPECIFICATION)
        self.layout = BlobLayout()
        self.constants: dict[str, NDArray] = {}

    def create_file_value(self, var: Any) -> Any:
        if var.name not in self.constants:
            kind = types.builtin_to_string(var.dtype)
            self.layout.add(Entry(var.name, kind, int(np.prod(var.val.shape, dtype=np.int64))))
            self.constants[var.name] = var.val
        return create_file_value_tensor(
            file_name=WEIGHT_FILE,
            offset=self.layout.offsets[var.name],
            dim=var.val.shape,
            data_type=types_to_proto_primitive(var.sym_type.get_primitive()),
        )


def write_package(folder: Path, program: Program, metadata: Mapping[str, str], fill: Fill) -> None:
    """Write `program` as a package in the new folder `folder`; `fill` is given the weight file and its constants.

    `metadata` goes into the model's user-defined fields.
    """
    exporter, model = _translated(program, metadata)
    model_file = folder / "Data" / MODEL
    weights = folder / "Data" / WEIGHTS
    weights.mkdir(parents=True)
    # Maps of protobuf have no order of their own.
    model_file.write_bytes(model.SerializeToString(deterministic=True))
    with BlobWriter(weights / "weight.bin", exporter.layout) as writer:
        fill(writer, exporter.constants)
    (folder / "Manifest.json").write_text(_manifest(), "utf-8")


def package_bytes(program: Program, metadata: Mapping[str, str]) -> int:
    """Bytes of what `write_package` writes."""
    exporter, model = _translated(program, metadata)
    return int(model.ByteSize()) + exporter.layout.nbytes + len(_manifest())


def _translated(program: Program, metadata: Mapping[str, str]) -> tuple[_Exporter, Any]:
    """The program as protobuf, and what laid out its weights."""
    exporter = _Exporter(program)
    proto = exporter.export()
    model = CoreMLProtoExporter(
        program, proto, "", "", None, "mlprogram", "milinternal", specification_version=SPECIFICATION
    ).export(SPECIFICATION)
    model.description.metadata.userDefined.update(metadata)
    return exporter, model


def _manifest() -> str:
    """The package's table of contents; identifiers are made of the paths, so that they are always the same."""
    items = {}
    for path, description in ((MODEL, "CoreML Model Specification"), (WEIGHTS, "CoreML Model Weights")):
        identifier = str(uuid.uuid5(uuid.NAMESPACE_URL, str(path))).upper()
        items[identifier] = {
            "author": "com.apple.CoreML",
            "description": description,
            "name": path.name,
            "path": str(path),
        }
    manifest = {"fileFormatVersion": "1.0.0", "itemInfoEntries": items, "rootModelIdentifier": next(iter(items))}
    return json.dumps(manifest, indent=4) + "\n"
