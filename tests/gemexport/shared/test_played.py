"""What PyTorch plays for an f32: with a checkpoint's static scales for who computes with them, else without."""

from __future__ import annotations

from pathlib import Path

from gemexport.faults.sources import SOURCES
from gemexport.formats.checkpoint import Checkpoint, open_checkpoint
from gemexport.shared.place import played_by, played_of


def test_static_scales_are_played_both_ways(gemma4: Checkpoint, tmp_path: Path) -> None:
    noises = ("bf16", "f32-reordered")
    assert played_of(noises, gemma4) == noises
    assert played_by("f32-reordered", gemma4, None) == "f32-reordered"
    mobile = open_checkpoint(SOURCES["mobile"](tmp_path / "mobile"))
    assert played_of(noises, mobile) == (*noises, "f64", "f32-reordered without integers")
    assert played_by("f32-reordered", mobile, None) == "f32-reordered without integers"
    assert played_by("f32-reordered", mobile, mobile.activations) == "f32-reordered"
