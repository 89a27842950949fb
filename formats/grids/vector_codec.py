"""How a vector codec is spelled, and what of a model it can code; `additive` computes with it.

`aqlm:MxB` or `aqlm:MxB:V` stands for M codebooks of 2**B vectors of V weights each (8 unless said).
"""

from __future__ import annotations

import math
import re
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from gemexport.formats.gemma.architecture import PerLayerEmbeddings
from gemexport.formats.storage.errors import InputError

VECTOR = 8
NONE = "none"  # in a list of codecs: the per-layer embeddings as they are
SPELLING = "write it as aqlm:MxB or aqlm:MxB:V, such as aqlm:2x8: M codebooks (1 to 8) of 2**B vectors (B 2 to 8)"


class Codec(BaseModel):
    """What was asked for: how many codebooks, how large, of vectors how long."""

    model_config = ConfigDict(frozen=True)

    codebooks: int
    bits: int  # of a code
    vector: int = VECTOR  # weights that a code stands for

    def __str__(self) -> str:
        return f"aqlm:{self.codebooks}x{self.bits}:{self.vector}"

    @property
    def label(self) -> str:
        """The codec in the name of a file."""
        return f"aqlm-{self.codebooks}x{self.bits}" + (f"-{self.vector}" if self.vector != VECTOR else "")

    @property
    def entries(self) -> int:
        """Vectors of a codebook."""
        return 1 << self.bits

    def nbytes(self, rows: int, width: int, block: int, scale_bytes: int = 2) -> int:
        """Bytes of a coded matrix: codes of B bits, codebooks in f16, and a scale a block."""
        codes = -(-rows * (width // self.vector) * self.codebooks * self.bits // 8)
        return codes + self.codebooks * self.entries * self.vector * 2 + rows * (width // block) * scale_bytes


def parse(text: str) -> Codec:
    """The codec that `aqlm:MxB` or `aqlm:MxB:V` spells; InputError for anything else."""
    match = re.fullmatch(r"aqlm:(\d{1,2})x(\d{1,2})(?::(\d{1,3}))?", text.strip())
    if match is None:
        raise InputError(text, "is no vector codec", SPELLING)
    codebooks, bits, vector = (int(part or VECTOR) for part in match.groups())
    if not (1 <= codebooks <= 8 and 2 <= bits <= 8 and 2 <= vector <= 64):
        raise InputError(text, "is out of range", f"{SPELLING} of V weights (2 to 64)")
    return Codec(codebooks=codebooks, bits=bits, vector=vector)


def parse_all(text: str) -> tuple[Codec | None, ...]:
    """The codecs that a list with commas spells, `none` for no codec; InputError for one that comes twice."""
    found = tuple(None if part.strip() == NONE else parse(part) for part in text.split(","))
    if len(set(found)) < len(found):
        raise InputError(text, "names a codec twice", "give each once")
    return found


def stated_rms(text: str | None, path: Path) -> float | None:
    """The error that an artefact states of its codec, if it states one; InputError for what is no error."""
    try:
        found = None if text is None else float(text)
    except ValueError:
        found = math.nan
    if found is not None and not 0 <= found < math.inf:
        raise InputError(path, f"states {str(text)[:40]!r} as the error of its vector codec", "export it again")
    return found


def check(codec: Codec, layers: PerLayerEmbeddings | None, path: Path) -> PerLayerEmbeddings:
    """The per-layer embeddings of the model at `path`; InputError where it has none, or the codec does not fit them."""
    if layers is None:
        raise InputError(path, "has no per-layer embeddings to code", "leave out --ple-codec")
    if layers.dim % codec.vector:
        problem = f"has {layers.dim} per-layer embeddings a layer, which vectors of {codec.vector} do not divide"
        raise InputError(path, problem, f"give another length, as in aqlm:{codec.codebooks}x{codec.bits}:4")
    return layers
