"""The README's table of families is the one that the exporters' answers make."""

from __future__ import annotations

from pathlib import Path

from gemexport.formats.gemma.families import FAMILIES
from gemexport.report import families


def test_the_readme_says_what_the_exporters_answer() -> None:
    readme = (Path(__file__).parents[3] / "README.md").read_text("utf-8")
    assert families.markdown() in readme, "put there what this prints: python -m gemexport.report.families"


def test_every_known_family_has_a_row() -> None:
    shown = {model.family.name for _, model in families.models()}
    assert shown == {family.name for family in FAMILIES}
