"""Schedules of the KL term's weight β, or of the capacity C, over the steps of a training run.

A schedule is a function of the step that returns a float::

    beta = vae_fast.schedules.linear(warmup=1000)
    for step, x in enumerate(data):
        elbo.beta = beta(step)

Under ``torch.compile`` hold β in a 0-dim tensor and ``fill_`` it, so that nothing is compiled anew.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass

__all__ = ["cyclical", "linear", "sigmoid"]


@dataclass(frozen=True)
class linear:
    """From ``start`` to ``end`` in a straight line over ``warmup`` steps, and ``end`` after that.

    Sønderby et al. 2016, "Ladder Variational Autoencoders" (warm-up).
    """

    warmup: int
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        _check_steps("warmup", self.warmup)

    def __call__(self, step: float) -> float:
        """The value at a step, counted from 0."""
        return self.start + (self.end - self.start) * _fraction(step, self.warmup)


@dataclass(frozen=True)
class sigmoid:
    """From ``start`` to ``end`` along a logistic curve over ``warmup`` steps.

    start + (end − start)·s(w(2t − 1)), t = step/warmup, where s is the logistic function rescaled
    to reach 0 and 1 at the ends; w is the ``steepness`` (KL annealing of Bowman et al. 2016,
    "Generating Sentences from a Continuous Space").
    """

    warmup: int
    start: float = 0.0
    end: float = 1.0
    steepness: float = 6.0

    def __post_init__(self) -> None:
        _check_steps("warmup", self.warmup)
        if not 0.0 < self.steepness < math.inf:
            raise ValueError(f"steepness must be positive, got {self.steepness}")

    def __call__(self, step: float) -> float:
        """The value at a step, counted from 0."""
        t = 2.0 * _fraction(step, self.warmup) - 1.0
        # (1/(1 + e^(−wt)) rescaled) = ½(1 + tanh(wt/2)/tanh(w/2))
        rise = 0.5 * (1.0 + math.tanh(0.5 * self.steepness * t) / math.tanh(0.5 * self.steepness))
        return self.start + (self.end - self.start) * rise


@dataclass(frozen=True)
class cyclical:
    """``cycles`` equal cycles over ``total`` steps, each a linear rise and then a plateau.

    The first ``ratio`` of a cycle rises from ``start`` to ``end``, the rest stays there; after the
    last cycle the value is ``end`` (Fu et al. 2019, "Cyclical Annealing Schedule: A Simple Approach
    to Mitigating KL Vanishing").
    """

    total: int
    cycles: int = 4
    ratio: float = 0.5
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        _check_steps("total", self.total)
        _check_steps("cycles", self.cycles)
        if not 0.0 < self.ratio <= 1.0:
            raise ValueError(f"ratio must be in (0, 1], got {self.ratio}")

    def __call__(self, step: float) -> float:
        """The value at a step, counted from 0."""
        if step >= self.total:
            return self.end
        period = self.total / self.cycles
        rise = _fraction(max(step, 0) % period, period * self.ratio)
        return self.start + (self.end - self.start) * rise


def _fraction(step: float, steps: float) -> float:
    return min(max(step / steps, 0.0), 1.0)


def _check_steps(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
