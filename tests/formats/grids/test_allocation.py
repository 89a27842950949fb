"""Choices of widths stay within what they are given, and are as good as the best there is on small cases."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemexport.formats.grids.allocation import LINEARS, OPTIONS, PLAIN, Choice, Price, Unit, choose
from gemexport.formats.grids.recipe import WIDTHS

BITS = [scheme.bits + 16 / scheme.group_size for scheme in OPTIONS] + [16.0]


def units_of(sizes: list[tuple[int, float, bool]]) -> list[Unit]:
    """Units of so many weights and nats at two bits; a bit more is a quarter of that, a wider group a tenth more."""
    found = []
    for number, (weights, nats, table) in enumerate(sizes):
        lost = tuple(nats * 4.0 ** (2 - scheme.bits) * (1.1 if scheme.group_size > 32 else 1) for scheme in OPTIONS)
        found.append(Unit(names=(f"matrix {number}",), weights=weights, table=table, lost=lost))
    return found


def price_of(units: list[Unit], fixed: float = 100.0) -> Price:
    return Price(fixed, {unit.group: [bits / 8 for bits in BITS] for unit in units})


def taken(units: list[Unit], price: Price, choice: Choice) -> float:
    return price.fixed + sum(price.of(unit, option) for unit, option in zip(units, choice.options, strict=True))


sizes = st.lists(st.tuples(st.integers(1, 999).map(lambda n: 64 * n), st.floats(1e-6, 9), st.just(False)), min_size=1)
table = st.tuples(st.integers(1, 99_999).map(lambda n: 64 * n), st.floats(1e-6, 9), st.just(True))
widths = st.sets(st.sampled_from(WIDTHS), min_size=1).map(sorted)


@given(sizes, table, widths, st.floats(0, 17))
def test_no_artefact_is_above_its_limit(
    linears: list[tuple[int, float, bool]], one: tuple[int, float, bool], widths: list[int], bits: float
) -> None:
    units = units_of([*linears, one])
    prices = [price_of(units), price_of(units, fixed=7.0)]
    limits = [100 + sum(unit.weights for unit in units) * bits / 8] * 2
    choice = choose(units, widths, prices, limits)
    least = min(BITS[n] for n in range(len(BITS)) if n == PLAIN or OPTIONS[n].bits in widths)
    if choice is None:
        assert bits < least + 1e-6
        return
    assert all(taken(units, price, choice) <= limit + 1e-6 for price, limit in zip(prices, limits, strict=True))
    assert all(option == PLAIN or OPTIONS[option].bits in widths for option in choice.options)
    assert choice.loss == pytest.approx(sum(unit.loss(o) for unit, o in zip(units, choice.options, strict=True)))
    assert choice == choose(units, widths, prices, limits)


@given(sizes, table, widths, st.floats(0, 2))
def test_a_loss_is_reached(
    linears: list[tuple[int, float, bool]], one: tuple[int, float, bool], widths: list[int], nats: float
) -> None:
    units = units_of([*linears, one])
    choice = choose(units, widths, [price_of(units)], loss=nats)
    assert choice is not None  # what stays as it is loses nothing
    assert choice.loss <= nats


@given(st.lists(st.tuples(st.just(64), st.floats(1e-3, 9), st.just(False)), min_size=2, max_size=3), st.floats(2.6, 9))
def test_it_is_near_the_best(linears: list[tuple[int, float, bool]], bits: float) -> None:
    units = units_of(linears)
    price, widths = price_of(units), (2, 4, 8)
    limit = 100 + sum(unit.weights for unit in units) * bits / 8
    found = choose(units, widths, [price], [limit])
    allowed = [n for n, scheme in enumerate(OPTIONS) if scheme.bits in widths] + [PLAIN]

    def loss(options: tuple[int, ...]) -> float:
        return sum(unit.loss(option) for unit, option in zip(units, options, strict=True))

    fitting = [o for o in product(allowed, repeat=len(units)) if taken(units, price, Choice(o, 0)) <= limit + 1e-9]
    assert found is not None
    # What the steps leave is less than one of them: the best with the largest step less is no better.
    largest = max(price.of(units[0], b) - price.of(units[0], a) for a in allowed for b in allowed)
    smaller = [o for o in fitting if taken(units, price, Choice(o, 0)) <= limit - largest]
    assert not smaller or found.loss <= min(map(loss, smaller)) * (1 + 1e-9)


def test_the_table_is_not_what_the_greedy_order_makes_of_it() -> None:
    """A large table whose next step does not fit leaves room that linears take; both ways are looked at."""
    units = units_of([(640, 1.0, False), (64_000, 60.0, True)])
    price = price_of(units, fixed=0)
    narrow, wide = ([BITS[n] / 8 for n in (i, j)] for i, j in ((2, 3), (3, 3)))
    choice = choose(units, WIDTHS, [price], [64_000 * narrow[1] + 640 * wide[0]])
    assert choice is not None
    assert OPTIONS[choice.options[1]].bits == 5
    assert units[0].group == LINEARS


def test_rows_that_groups_do_not_divide_have_no_such_option() -> None:
    unit = Unit(names=("matrix",), weights=96, table=False, lost=(*([1.0] * 6), None, None))
    choice = choose([unit], (3,), [price_of([unit], fixed=0)], [96 * 3.5 / 8])
    assert choice is not None
    assert OPTIONS[choice.options[0]].group_size == 32
    assert choose([unit], (3,), [price_of([unit], fixed=0)], [96 * 3.25 / 8]) is None
