"""Names with bits in them, and artefacts that do not hold what their names say."""

from __future__ import annotations

import pytest
from samples import random_tensor

from gemexport.shared.widths import called, short, width_note, widths


@pytest.mark.parametrize(
    ("variant", "bits"),
    [
        ("Q4_0", 4), ("gemma-3-270m-q4_k_m", 4), ("IQ3_XS", 3), ("Q8_0", 8), ("4bit", 4), ("int4", 4), ("w4a16", 4),
        ("int4-aqlm-2x8", 4), ("model-8bit", 8), ("BF16", None), ("gemma-4", None), ("npu-a16", None), ("f32", None),
    ],
)  # fmt: skip
def test_the_bits_that_a_variant_is_called_by(variant: str, bits: int | None) -> None:
    assert called(variant) == bits


def test_less_than_most_of_the_weights_is_said() -> None:
    tensors = [random_tensor((9, 64)), random_tensor((1, 64), bits=8)]
    assert widths(tensors) == {"4 bit": 576, "8 bit": 64}
    assert short("Q4_0", widths(tensors)) is None
    more = widths([*tensors, random_tensor((2, 64), bits=8)])
    assert short("Q4_0", more) == 0.75
    assert short("Q8_0", more) is None
    assert short("F32", more) is None
    assert width_note("Q4_0", more) == [
        "it is called 4-bit and holds 75.0 % of its weights in that: 75.0 % in 4 bit, 25.0 % in 8 bit"
    ]
