"""MIL operations that carry a state along a sequence: lstm, gru, rnn.

Each says what coremltools' reference of its name says (coremltools.converters.mil.mil.ops.defs, iOS15/recurrent.py and
iOS18/recurrent.py). `x` is `[steps, batch, in]`, states are `[batch, hidden]`, weights `[gates * hidden, …]`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gemexport.validators.mil.registry import Unsupported, flag, number, op

Step = Callable[
    [Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]
]  # an input and the states before it -> states after it
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: x,
    "relu": torch.relu,
    "tanh": torch.tanh,
    "scaled_tanh": torch.tanh,  # both of its factors are 1 where none can be given
    "sigmoid": torch.sigmoid,
    "hard_sigmoid": lambda x: torch.clamp(0.2 * x + 0.5, 0, 1),
    "sigmoid_hard": lambda x: torch.clamp(0.2 * x + 0.5, 0, 1),
}


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    if name.lower() not in _ACTIVATIONS:
        raise Unsupported(f"the activation {name} is not documented")
    return _ACTIVATIONS[name.lower()]


def _along(x: Tensor, states: tuple[Tensor, ...], step: Step, direction: str) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The first state after each step, `[steps, batch, hidden]` in the order of the steps, and all after the last one.

    Backwards the last of `x` comes first, in what comes out as well (coremltools' tests, iOS14/test_recurrent.py).
    """
    outputs = []
    for one in x.flip(0) if direction == "reverse" else x:
        states = step(one, states)
        outputs.append(states[0])
    return torch.stack(outputs), states


def _sequence(whole: Tensor, last: Tensor, output_sequence: Any) -> Tensor:
    return whole if flag(output_sequence) else last.unsqueeze(0)


@op("rnn")
def rnn(
    x: Tensor,
    initial_h: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    direction: str = "forward",
    output_sequence: Any = False,
    activation: str = "tanh",
) -> tuple[Tensor, Tensor]:
    activate = _activation(activation)

    def step(one: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (activate(F.linear(one, weight_ih, bias) + F.linear(states[0], weight_hh)),)

    whole, (h,) = _along(x, (initial_h,), step, direction)
    return _sequence(whole, h, output_sequence), h


@op("gru")
def gru(
    x: Tensor,
    initial_h: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    direction: str = "forward",
    output_sequence: Any = False,
    recurrent_activation: str = "sigmoid",
    activation: str = "tanh",
    reset_after: Any = False,
    input_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gates in the order reset, output, update; `bias` belongs to the hidden state where an `input_bias` is given.

    With `reset_after` the reset gate scales what the hidden weights and their bias make of the state; otherwise the
    state that they see.
    """
    recurrent, activate = _activation(recurrent_activation), _activation(activation)
    hidden = weight_hh.shape[1]
    input_r, input_o, input_z = weight_ih.split(hidden)
    hidden_r, hidden_o, hidden_z = weight_hh.split(hidden)
    zeros = torch.zeros(3 * hidden)
    b_r, b_o, b_z = (zeros if bias is None else bias).split(hidden)
    i_r, i_o, i_z = (zeros if input_bias is None else input_bias).split(hidden)

    def step(one: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (h,) = states
        r = recurrent(F.linear(one, input_r, i_r) + F.linear(h, hidden_r, b_r))
        z = recurrent(F.linear(one, input_z, i_z) + F.linear(h, hidden_z, b_z))
        seen = r * F.linear(h, hidden_o, b_o) if flag(reset_after) else F.linear(r * h, hidden_o, b_o)
        return ((1 - z) * activate(F.linear(one, input_o, i_o) + seen) + z * h,)

    whole, (h,) = _along(x, (initial_h,), step, direction)
    return _sequence(whole, h, output_sequence), h


def _lstm_step(
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    peephole: Tensor | None,
    activations: tuple[str, str, str],
    clip: Any,
) -> Step:
    """One step of one direction: the states are `(h, c)`; gates in the order input, forget, output, cell."""
    recurrent, cell, output = (_activation(name) for name in activations)
    hidden = weight_hh.shape[1]
    peeps = torch.zeros(3 * hidden) if peephole is None else peephole
    peep_i, peep_f, peep_o = peeps.split(hidden)

    def step(one: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        h, c = states
        i, f, o, z = (F.linear(one, weight_ih, bias) + F.linear(h, weight_hh)).split(hidden, -1)
        c = recurrent(f + c * peep_f) * c + recurrent(i + c * peep_i) * cell(z)
        if clip is not None:
            c = c.clamp(-number(clip), number(clip))
        return recurrent(o + c * peep_o) * output(c), c

    return step


@op("lstm")
def lstm(
    x: Tensor,
    initial_h: Tensor,
    initial_c: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    peephole: Tensor | None = None,
    weight_ih_back: Tensor | None = None,
    weight_hh_back: Tensor | None = None,
    bias_back: Tensor | None = None,
    peephole_back: Tensor | None = None,
    direction: str = "forward",
    output_sequence: Any = False,
    recurrent_activation: str = "sigmoid",
    cell_activation: str = "tanh",
    activation: str = "tanh",
    clip: Any = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Both directions side by side where `direction` says so: `[…, 2 * hidden]`, forward first, in the order of `x`."""
    activations = recurrent_activation, cell_activation, activation
    step = _lstm_step(weight_ih, weight_hh, bias, peephole, activations, clip)
    if direction != "bidirectional":
        whole, (h, c) = _along(x, (initial_h, initial_c), step, direction)
        return _sequence(whole, h, output_sequence), h, c
    if weight_ih_back is None or weight_hh_back is None:
        raise Unsupported("a bidirectional lstm needs the weights of both directions")
    hidden = weight_hh.shape[1]
    (h, h_back), (c, c_back) = initial_h.split(hidden, -1), initial_c.split(hidden, -1)
    back = _lstm_step(weight_ih_back, weight_hh_back, bias_back, peephole_back, activations, clip)
    whole, (h, c) = _along(x, (h, c), step, "forward")
    whole_back, (h_back, c_back) = _along(x, (h_back, c_back), back, "reverse")
    last = torch.cat([h, h_back], -1)
    both = torch.cat([whole, whole_back.flip(0)], -1)
    return _sequence(both, last, output_sequence), last, torch.cat([c, c_back], -1)
