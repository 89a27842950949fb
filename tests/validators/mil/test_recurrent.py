"""lstm, gru and rnn against PyTorch's modules and against plain loops over what the documentation says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

import gemexport.validators.mil.evaluator  # noqa: F401  (registers the operations)
from gemexport.validators.mil.registry import OPERATIONS, Unsupported

STEPS, BATCH, WIDTH, HIDDEN = 5, 2, 3, 4


def sigmoid(x: NDArray[Any]) -> NDArray[Any]:
    return 1 / (1 + np.exp(-x))


def gates(module: nn.RNNBase, order: list[int], suffix: str = "") -> dict[str, torch.Tensor]:
    """PyTorch's weights and the sum of its biases, with the gates in MIL's order."""

    def reordered(kind: str) -> torch.Tensor:
        parts = getattr(module, f"{kind}_l0{suffix}").detach().chunk(len(order))
        return torch.cat([parts[i] for i in order])

    bias = reordered("bias_ih") + reordered("bias_hh")
    return {"weight_ih": reordered("weight_ih"), "weight_hh": reordered("weight_hh"), "bias": bias}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(5)


@pytest.mark.parametrize("output_sequence", [True, False])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_rnn(direction: str, output_sequence: bool) -> None:
    module, x, h = nn.RNN(WIDTH, HIDDEN), torch.randn(STEPS, BATCH, WIDTH), torch.randn(BATCH, HIDDEN)
    backwards = direction == "reverse"
    wanted, last = module(x.flip(0) if backwards else x, h[None])
    got, state = OPERATIONS["rnn"](
        x=x, initial_h=h, direction=direction, output_sequence=output_sequence, **gates(module, [0])
    )
    torch.testing.assert_close(state, last[0])
    torch.testing.assert_close(got, wanted if output_sequence else last)


def test_gru_with_its_reset_after_the_product_is_pytorchs() -> None:
    module, x, h = nn.GRU(WIDTH, HIDDEN), torch.randn(STEPS, BATCH, WIDTH), torch.randn(BATCH, HIDDEN)
    wanted, last = module(x, h[None])
    order = [0, 2, 1]
    weights = gates(module, order)
    for name, kind in (("input_bias", "bias_ih_l0"), ("bias", "bias_hh_l0")):
        parts = getattr(module, kind).detach().chunk(3)
        weights[name] = torch.cat([parts[i] for i in order])
    got, state = OPERATIONS["gru"](x=x, initial_h=h, output_sequence=True, reset_after=True, **weights)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(state, last[0])


def test_gru_with_its_reset_before_the_product() -> None:
    rng = np.random.default_rng(3)
    x, h = (rng.normal(size=shape).astype(np.float32) for shape in ((STEPS, 1, WIDTH), (1, HIDDEN)))
    w, u, b = (rng.normal(size=(3, HIDDEN, n)).astype(np.float32) for n in (WIDTH, HIDDEN, 1))
    state = h[0]
    for one in x[:, 0]:
        r, z = (sigmoid(w[i] @ one + u[i] @ state + b[i, :, 0]) for i in (0, 2))
        state = (1 - z) * np.tanh(w[1] @ one + u[1] @ (r * state) + b[1, :, 0]) + z * state
    given = {"weight_ih": w.reshape(-1, WIDTH), "weight_hh": u.reshape(-1, HIDDEN), "bias": b.reshape(-1)}
    tensors = {name: torch.from_numpy(value) for name, value in given.items()}
    got, last = OPERATIONS["gru"](x=torch.from_numpy(x), initial_h=torch.from_numpy(h), **tensors)
    np.testing.assert_allclose(last[0].numpy(), state, rtol=1e-4)
    assert got.shape == (1, 1, HIDDEN)


@pytest.mark.parametrize("output_sequence", [True, False])
def test_lstm_in_both_directions(output_sequence: bool) -> None:
    module, x = nn.LSTM(WIDTH, HIDDEN, bidirectional=True), torch.randn(STEPS, BATCH, WIDTH)
    h, c = torch.randn(2, BATCH, HIDDEN), torch.randn(2, BATCH, HIDDEN)
    wanted, (last_h, last_c) = module(x, (h, c))
    order = [0, 1, 3, 2]
    back = {f"{name}_back": value for name, value in gates(module, order, "_reverse").items()}
    both = {"initial_h": torch.cat([*h], -1), "initial_c": torch.cat([*c], -1), "direction": "bidirectional"}
    got, state, cell = OPERATIONS["lstm"](x=x, output_sequence=output_sequence, **both, **gates(module, order), **back)
    torch.testing.assert_close(state, torch.cat([*last_h], -1))
    torch.testing.assert_close(cell, torch.cat([*last_c], -1))
    torch.testing.assert_close(got, wanted if output_sequence else torch.cat([*last_h], -1)[None])


def test_lstm_with_peepholes_and_a_clipped_cell() -> None:
    rng = np.random.default_rng(4)
    x, h, c = (rng.normal(size=shape).astype(np.float32) for shape in ((STEPS, 1, WIDTH), (1, HIDDEN), (1, HIDDEN)))
    w, u = (rng.normal(size=(4, HIDDEN, n)).astype(np.float32) for n in (WIDTH, HIDDEN))
    peep, clip = rng.normal(size=(3, HIDDEN)).astype(np.float32), 0.3
    state, cell = h[0], c[0]
    for one in x[:, 0][::-1]:
        i, f, o, z = (w[gate] @ one + u[gate] @ state for gate in range(4))
        hard = np.clip(0.2 * (f + peep[1] * cell) + 0.5, 0, 1), np.clip(0.2 * (i + peep[0] * cell) + 0.5, 0, 1)
        cell = np.clip(hard[0] * cell + hard[1] * np.maximum(z, 0), -clip, clip)
        state = np.clip(0.2 * (o + peep[2] * cell) + 0.5, 0, 1) * cell
    given = {"initial_h": h, "initial_c": c, "weight_ih": w.reshape(-1, WIDTH), "weight_hh": u.reshape(-1, HIDDEN)}
    tensors = {name: torch.from_numpy(value) for name, value in given.items()}
    _, last, kept = OPERATIONS["lstm"](
        x=torch.from_numpy(x),
        peephole=torch.from_numpy(peep.reshape(-1)),
        direction="reverse",
        clip=clip,
        recurrent_activation="hard_sigmoid",
        cell_activation="relu",
        activation="linear",
        **tensors,
    )
    np.testing.assert_allclose(last[0].numpy(), state, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(kept[0].numpy(), cell, rtol=1e-4, atol=1e-6)


def test_an_activation_that_is_not_documented_is_refused() -> None:
    module, x, h = nn.RNN(WIDTH, HIDDEN), torch.randn(STEPS, BATCH, WIDTH), torch.randn(BATCH, HIDDEN)
    with pytest.raises(Unsupported, match="mish"):
        OPERATIONS["rnn"](x=x, initial_h=h, activation="mish", **gates(module, [0]))
