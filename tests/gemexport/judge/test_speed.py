"""Speed and memory from the passes of a runtime: what counts as prefill, what as decoding, and what is nobody's."""

from __future__ import annotations

from typing import Any, cast

import pytest

from gemexport.judge import speed
from gemexport.validators.runtimes.protocol import Laps, Runtime


class Computing:
    """A runtime as far as its laps go."""

    def __init__(self) -> None:
        self.laps = Laps()


def test_prefill_is_of_the_sequences_and_decoding_of_single_tokens() -> None:
    runtime = Computing()
    meter = speed.Speedometer(threads=3)
    meter.loaded()
    runtime.laps.laps += [(256, 1.0), (128, 1.0), (1, 0.5)]
    with meter.generating(cast(Runtime, cast(Any, runtime))):
        runtime.laps.laps += [(48, 100.0), (1, 0.25), (1, 0.25)]
    found = meter.report(runtime.laps)
    assert found.threads == 3
    assert found.tokens == 435
    assert found.seconds == pytest.approx(103.0)
    assert found.prefill is not None
    assert (found.prefill.tokens, found.prefill.pieces, found.prefill.median) == (384, 2, 192)
    assert (found.prefill.lower, found.prefill.upper) == (160, 224)
    assert found.decode is not None
    assert (found.decode.tokens, found.decode.pieces, found.decode.median) == (3, 3, 4)


def test_nothing_measured_is_nothing_told() -> None:
    assert speed.pace([]) is None
    once = speed.pace([(10, 2.0)])
    assert once is not None
    assert once.lower == once.median == once.upper == 5


def test_a_lap_is_what_the_block_takes_and_none_when_it_fails() -> None:
    laps = Laps()
    with laps.lap(7):
        sum(range(1000))
    with pytest.raises(RuntimeError), laps.lap(8):
        raise RuntimeError
    ((tokens, seconds),) = laps.laps
    assert tokens == 7
    assert 0 < seconds < 1


def test_a_stopwatch_adds_up_by_what_was_done() -> None:
    watch = speed.Stopwatch()
    for what in ("run", "compare", "run"):
        with watch.time(what):
            pass
    assert list(watch.seconds) == ["run", "compare"]


def test_the_machine_is_told_in_a_line() -> None:
    assert "core" in speed.machine()
    assert "\n" not in speed.machine()
