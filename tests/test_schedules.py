"""Schedules of β: their ends, their middles, their shapes."""

import math

import numpy as np
import pytest

from vae_fast.schedules import cyclical, linear, sigmoid


def test_linear():
    beta = linear(warmup=10)
    assert [beta(step) for step in (0, 5, 10, 11, 10_000)] == [0.0, 0.5, 1.0, 1.0, 1.0]
    assert beta(-3) == 0.0
    assert linear(4, start=2.0, end=-2.0)(1) == 1.0
    assert linear(4, start=2.0, end=-2.0)(4) == -2.0
    assert isinstance(beta(3), float)


@pytest.mark.parametrize("steepness", [0.1, 6.0, 30.0])
def test_sigmoid(steepness):
    beta = sigmoid(warmup=10, steepness=steepness)
    for step, value in ((0, 0.0), (5, 0.5), (10, 1.0), (10_000, 1.0), (-1, 0.0)):
        assert beta(step) == pytest.approx(value, abs=1e-12)

    def logistic(step):
        return 1.0 / (1.0 + math.exp(-steepness * (2.0 * step / 10 - 1.0)))

    lo, hi = logistic(0), logistic(10)
    for step in (1, 3, 8):
        assert beta(step) == pytest.approx((logistic(step) - lo) / (hi - lo), rel=1e-9)
        assert beta(step) == pytest.approx(1.0 - beta(10 - step))
    assert sigmoid(10, 3.0, 1.0, steepness)(0) == pytest.approx(3.0)
    assert sigmoid(10, 3.0, 1.0, steepness)(10) == pytest.approx(1.0)


def test_cyclical():
    beta = cyclical(total=80, cycles=2, ratio=0.5)
    # Two cycles of 40 steps, each a rise over 20 and a plateau of 20.
    for start in (0, 40):
        assert [beta(start + step) for step in (0, 10, 20, 30, 39)] == [0.0, 0.5, 1.0, 1.0, 1.0]
    assert [beta(step) for step in (80, 81, 10_000)] == [1.0, 1.0, 1.0]
    assert beta(-1) == 0.0
    # Without a plateau, between other ends, with cycles that are no whole number of steps.
    beta = cyclical(total=10, cycles=4, ratio=1.0, start=1.0, end=3.0)
    assert [beta(step) for step in (0, 1, 2, 2.5, 5)] == pytest.approx([1.0, 1.8, 2.6, 1.0, 1.0])
    assert beta(10) == 3.0


@pytest.mark.parametrize(
    "beta", [linear(37), sigmoid(37), sigmoid(37, steepness=50.0), cyclical(37, 1, 0.7)]
)
def test_a_rise_never_falls_nor_leaves_its_ends(beta):
    values = [beta(step / 3) for step in range(-5, 3 * 45)]
    assert values == sorted(values)
    assert values[0] == pytest.approx(0.0, abs=1e-12)
    assert values[-1] == pytest.approx(1.0)
    assert len(set(values)) > 30


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: linear(0), "warmup must be a positive integer, got 0"),
        (lambda: linear(True), "warmup must be a positive integer, got True"),
        (lambda: linear(2.5), "warmup must be a positive integer, got 2.5"),
        (lambda: sigmoid(-1), "warmup must be a positive integer"),
        (lambda: sigmoid(5, steepness=0.0), "steepness must be positive, got 0.0"),
        (lambda: sigmoid(5, steepness=math.inf), "steepness must be positive"),
        (lambda: sigmoid(5, steepness=math.nan), "steepness must be positive"),
        (lambda: cyclical(0), "total must be a positive integer"),
        (lambda: cyclical(8, cycles=0), "cycles must be a positive integer"),
        (lambda: cyclical(8, ratio=0.0), r"ratio must be in \(0, 1\], got 0.0"),
        (lambda: cyclical(8, ratio=1.5), r"ratio must be in \(0, 1\], got 1.5"),
    ],
)
def test_wrong_schedules_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_steps_of_numpy():
    assert linear(np.int64(4))(np.int64(1)) == cyclical(np.int64(8), np.int32(1))(1) == 0.25
