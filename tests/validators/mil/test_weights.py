"""Weights that stay in their file are read a part at a time, and give what the whole would."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gemexport.formats.coreml.arrays import Stored
from gemexport.validators.mil.math import matmul
from gemexport.validators.mil.registry import Weight, as_tensor


class Counting(Stored):
    """A constant that remembers how many of its matrices were asked for at a time."""

    def __init__(self, values: np.ndarray) -> None:
        super().__init__("fp32", values.shape, values)
        self.read: list[int] = []

    def rows(self, start: int, stop: int) -> np.ndarray:
        self.read.append(stop - start)
        return super().rows(start, stop)


@pytest.mark.parametrize("stack", [1, 5])
def test_a_stack_of_matrices_is_read_one_matrix_at_a_time(stack: int) -> None:
    stream = np.random.default_rng(0)
    x, y = (stream.standard_normal(shape).astype(np.float32) for shape in ((stack, 3, 8), (5, 6, 8)))
    constant = Counting(y)
    found = matmul(as_tensor(x), Weight(constant, half=False), transpose_y=True)
    torch.testing.assert_close(found, as_tensor(x) @ as_tensor(y).transpose(-1, -2))
    assert constant.read == [1] * 5


def test_a_stack_that_is_held_is_not_read_again() -> None:
    values = np.random.default_rng(0).standard_normal((5, 8, 6)).astype(np.float32)
    constant = Counting(values)
    weight = Weight(constant, half=False)
    weight.hold()
    constant.read.clear()
    x = torch.ones(1, 2, 8)
    torch.testing.assert_close(matmul(x, weight), x @ as_tensor(values))
    assert constant.read == []
