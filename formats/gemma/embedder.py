"""What makes one vector of a text out of a decoder's hidden states: pooling, projections, a norm.

sentence-transformers has these as modules of their own beside the decoder, each in a folder (`modules.json`); a reader
brings what these say as `MODULES` of the config that it gives.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gemexport.formats.gemma.architecture import Shape, TensorSpec
from gemexport.formats.gemma.fields import Size
from gemexport.formats.gemma.names import CANONICAL
from gemexport.formats.gemma.roles import Role
from gemexport.formats.storage.errors import InputError

MODULES = "sentence_transformers"  # key of a config for what modules.json says
DENSE = (Role.FIRST_DENSE, Role.SECOND_DENSE)
REMEDY = "use the folder that came with the model, with modules.json and the folders that it names"
Pair = Annotated[tuple[Size, Size], Field(description="outputs and inputs")]


class Embedder(BaseModel):
    """Mean of the last hidden states over a text's tokens, linears without bias one after the other, length 1."""

    model_config = ConfigDict(frozen=True)

    pooling: Literal["mean"]
    dense: tuple[Pair, ...] = Field(max_length=len(DENSE))  # outputs and inputs of each
    normalize: Literal[True]

    def size(self, hidden: int) -> int:
        """Numbers of the vector, out of hidden states of so many."""
        return self.dense[-1][0] if self.dense else hidden

    def specs(self) -> tuple[TensorSpec, ...]:
        """The linears' weights `[out, in]`, in the order of use."""
        shapes: list[Shape] = [tuple(pair) for pair in self.dense]
        return tuple(
            TensorSpec(CANONICAL.name(role), shape, role, None) for role, shape in zip(DENSE, shapes, strict=False)
        )


def embedder(config: dict[str, Any], hidden: int, path: str | Path) -> Embedder:
    """The embedder of a config whose decoder has hidden states of so many numbers.

    Raises InputError where there is none, or one that is not done here.
    """
    given = config.get(MODULES)
    if given is None:
        problem = "attends both ways, as an encoder such as EmbeddingGemma does, and no modules.json says what follows"
        raise InputError(path, problem, REMEDY)
    try:
        found = Embedder.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        done = "a mean, two linears at most and a length of 1 are what is done"
        problem = f"modules.json: {where} is {first['input']!s:.60}; {done}"
        raise InputError(path, problem, REMEDY) from error
    width = hidden
    for out, inside in found.dense:
        if inside != width:
            raise InputError(path, f"a linear after the pooling takes {inside} numbers and is given {width}", REMEDY)
        width = out
    return found
