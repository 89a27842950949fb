"""What becomes of tensors that lie on no lattice: a recipe says how many bits each kind of tensor gets.

Tensors on a lattice keep their codes whatever the recipe says.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from gemexport.formats.gemma.names import role_of
from gemexport.formats.gemma.roles import Kind, Role
from gemexport.formats.storage.errors import InputError
from gemexport.formats.storage.reading import read_text

WIDTHS = (2, 3, 4, 5, 6, 8)  # of codes


class Scheme(BaseModel):
    """Signed integer codes with one scale a block."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: int = 4
    group_size: int = Field(default=32, gt=0)

    @field_validator("bits")
    @classmethod
    def _known(cls, bits: int) -> int:
        if bits not in WIDTHS:
            raise ValueError(f"bits must be one of {', '.join(map(str, WIDTHS))}")
        return bits


class Recipe(BaseModel):
    """Schemes by kind of tensor (none: it stays as it is), and what the compression may cost."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    description: str = ""
    linear: Scheme | None = Scheme()
    embedding: Scheme | None = Scheme(bits=8)  # the head too, tied or not
    per_layer_embedding: Scheme | None = Scheme()
    rounding: Literal["data", "nearest"] = "data"  # of linears and the head: on their inputs, or each weight by itself
    # Beside matrices on a lattice: linears, which fine-tuning takes off it, all that is off it (True), or nothing.
    requantize_mixed: bool | Literal["linears"] = "linears"
    max_kld: float | None = None  # nats; budget of the mean loss

    def scheme(self, tensor: str) -> Scheme | None:
        """The scheme for a matrix by its canonical name; None for one that stays as it is."""
        role = role_of(tensor)
        if role is Role.PER_LAYER_EMBEDDING:
            return self.per_layer_embedding
        if role is not None and role.kind in (Kind.EMBEDDING, Kind.HEAD):
            return self.embedding
        return None if role is not None and role.kind is Kind.MIXER else self.linear

    def chosen(self, lattices: Mapping[str, bool | None], left: Container[str] = frozenset()) -> dict[str, Scheme]:
        """The matrices that are to be quantized, by canonical name, each with its scheme.

        `lattices` says of every matrix whether it lies on a lattice that was found in its values; None of one whose
        file has codes. What quantization-aware training leaves off its lattice is embeddings, head and router; a linear
        off it beside others on it was tuned afterwards. Who made a file with codes left the rest as it is on purpose.
        `left` are those that an adapter took off what they lay on: these are quantized in any case.
        """
        beside = any(on is not False or name in left for name, on in lattices.items())
        coded = None in lattices.values()
        tuned, asked = any(lattices.values()) and not coded, self.requantize_mixed
        schemes = {}
        for name, on in lattices.items():
            mixed = tuned and is_linear(name) if asked == "linears" else asked
            scheme = self.scheme(name)
            if on is False and scheme is not None and (name in left or not beside or mixed):
                schemes[name] = scheme
        return schemes


def is_linear(tensor: str) -> bool:
    """Whether the tensor of this canonical name is a linear, or one of each expert; heads and routers are not meant."""
    role = role_of(tensor)
    return role is not None and role.kind in (Kind.LINEAR, Kind.EXPERT)


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(name="default", description="lattices pass through; plain models: 4 bit, embeddings 8 bit"),
        Recipe(name="rtn", description="as default, each weight rounded by itself: fast", rounding="nearest"),
        Recipe(name="int4", description="plain tensors 4 bit, embedding and head too", embedding=Scheme()),
        Recipe(
            name="int8",
            description="plain tensors 8 bit",
            linear=Scheme(bits=8),
            per_layer_embedding=Scheme(bits=8),
        ),
        Recipe(
            name="lossless",
            description="lattices pass through, everything else stays as it is",
            linear=None,
            embedding=None,
            per_layer_embedding=None,
        ),
    )
}


def load_recipe(name_or_path: str) -> Recipe:
    """A built-in recipe by name, or one from a TOML or JSON file; InputError when it is neither."""
    if name_or_path in RECIPES:
        return RECIPES[name_or_path]
    path = Path(name_or_path)
    known = ", ".join(RECIPES)
    if not path.is_file():
        raise InputError(
            name_or_path or "an empty name", "is neither a recipe nor a file", f"use one of {known}, or a TOML file"
        )
    try:
        text = read_text(path)
        fields = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
        return Recipe.model_validate({"name": path.stem, **fields})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(path, f"{where}: {first['msg'].lower()}", "see docs/recipes.md for the fields") from error
    except (ValueError, OSError, TypeError) as error:
        raise InputError(path, f"cannot be read ({error})", "write it as TOML or JSON") from error
