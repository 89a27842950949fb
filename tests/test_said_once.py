"""What is known of a Gemma is said in `formats/gemma`: nothing else asks for a family, a model type or a name."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from gemexport.formats.checkpoint import READERS
from gemexport.formats.gemma.families import FAMILIES
from gemexport.formats.gemma.names import CANONICAL
from gemexport.formats.gemma.roles import Role

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path
    for folder in ("formats", "exporters", "validators", "gemexport", "examples")
    for path in (ROOT / folder).rglob("*.py")
    if not path.is_relative_to(ROOT / "formats" / "gemma")
)
TYPES = {
    kind
    for family in FAMILIES
    for kind in (family.name, family.text_type, family.whole_type, family.reference_type, family.gguf, family.mlx_type)
    if kind
} - READERS.keys()  # "gemma" is a way to quantize as well
# What tensors are called: each whole name, and the words of which they are made, where these are nobody else's.
WORDS = {word for role in Role for word in re.split(r"[.{}]+", CANONICAL.stem(role)) if "_" in word}
NAMES = re.compile(rf"(^|[^a-z_])({'|'.join(sorted(WORDS))}|model\.norm|model\.layers|norm\.weight)($|[^a-z_])")
ASKING = {"startswith", "endswith", "removeprefix", "removesuffix", "get"}


def strings(tree: ast.AST) -> Iterator[ast.Constant]:
    """The strings of a module but for its docstrings."""
    prose = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            prose.add(node.value)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in prose:
            yield node


def compared(tree: ast.AST) -> Iterator[ast.Constant]:
    """The strings that something is compared with, looked up by, or matched against."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            yield from (part for part in ast.walk(node) if isinstance(part, ast.Constant))
        elif isinstance(node, ast.Dict):
            yield from (key for key in node.keys if isinstance(key, ast.Constant))
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            yield node.slice
        elif isinstance(node, ast.match_case):
            yield from (part for part in ast.walk(node.pattern) if isinstance(part, ast.Constant))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ASKING:
            yield from (part for argument in node.args for part in ast.walk(argument) if isinstance(part, ast.Constant))


def faults(path: Path) -> list[str]:
    tree = ast.parse(path.read_text("utf-8"))
    found = [f"{node.lineno}: asks for {node.value}" for node in compared(tree) if node.value in TYPES]
    found += [
        f"{node.lineno}: the name {node.value}"
        for node in strings(tree)
        if NAMES.search(str(node.value).replace("\\.", "."))
    ]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_else_knows_names_or_families(path: Path) -> None:
    assert faults(path) == []


def test_what_is_looked_for_is_found(tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text(
        '"""About model.embed_tokens and gemma3."""\n'
        'if family == "gemma3" or kind in ("a", "gemma4_text"):\n'
        '    x = tensors["model.embed_tokens.weight"]\n'
        'y = name.endswith("q_proj.weight")\n'
        'z = {"gemma4": 1}\n'
        'w = f"model.layers.{i}.mlp.gate_proj"\n'
    )
    assert sorted(fault.split(":")[0] for fault in faults(tmp_path / "wrong.py")) == [*"2234566"]
