"""The line that installs what is missing, by where gemexport itself came from (PEP 610)."""

from __future__ import annotations

from typing import Any

import pytest
from packaging.requirements import Requirement

from gemexport.formats.storage.installing import requirement


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        ({"url": "file:///home/me/my%20clone", "dir_info": {"editable": True}}, "/home/me/my clone[mlx,reference]"),
        ({"url": "file:///tmp/gemexport-0.1.0-py3-none-any.whl", "archive_info": {}},
         "gemexport[mlx,reference] @ file:///tmp/gemexport-0.1.0-py3-none-any.whl"),
        ({"url": "https://github.com/o/gemexport", "vcs_info": {"vcs": "git", "commit_id": "abc"}},
         "gemexport[mlx,reference] @ git+https://github.com/o/gemexport@abc"),
        ({}, "gemexport[mlx,reference]"),
    ],
)  # fmt: skip
def test_what_is_asked_of_pip(origin: dict[str, Any], expected: str) -> None:
    asked = requirement(origin, "mlx,reference")
    assert asked == expected
    if not asked.startswith("/"):
        assert Requirement(asked).extras == {"mlx", "reference"}
