"""The importance-weighted bound of each row, as in ``reference.importance_bound``."""

import functools
import math

from torch import Tensor

import triton
import triton.language as tl

from .elementary import exp
from .launch import (
    PLANS,
    Launch,
    Layout,
    Place,
    Plan,
    approximation,
    copies,
    laid_out,
    layout,
    on_device,
    place,
)

# A tile of samples and rows. Rows lie next to each other; a warp reads a line of them.
_SAMPLES, _ROWS = 8, 64


@triton.jit
def _log_weights(nll_ptr, log_q_ptr, log_p_ptr, K, B, k, b, beta):
    """-t of a tile, -inf beyond its end, where t = nll + β(log q - log p)."""
    at, ok = k.to(tl.int64) * B + b, (k < K) & (b < B)
    t = tl.load(log_q_ptr + at, ok, 0.0)
    if log_p_ptr is not None:
        t -= tl.load(log_p_ptr + at, ok, 0.0)
    return tl.where(ok, -(tl.load(nll_ptr + at, ok, 0.0) + beta * t), -float("inf"))


@triton.jit
def _finite(x):
    """x, or 0 if it is infinite: what may be subtracted from an infinity."""
    return tl.where(tl.abs(x) == float("inf"), 0.0, x)


@triton.jit(do_not_specialize=["K", "B"])
def importance_kernel(
    nll_ptr, log_q_ptr, log_p_ptr, bound_ptr, weights_ptr, K, B,
    beta: tl.float64, log_k: tl.float64,
    SAMPLES: tl.constexpr, ROWS: tl.constexpr, APPROX: tl.constexpr,
):  # fmt: skip
    """A program goes over the samples of ROWS rows twice: for their sum, and for the weights.

    bound = log K - log Σ_k e^(-t), and weights = softmax_k(-t), from the largest -t so far.
    """
    ACC: tl.constexpr = bound_ptr.dtype.element_ty
    beta = tl.full((), beta, ACC)
    i = tl.arange(0, SAMPLES)[:, None]
    b = tl.program_id(0).to(B.dtype) * ROWS + tl.arange(0, ROWS)
    most = tl.full([ROWS], -float("inf"), ACC)
    total = tl.zeros([ROWS], ACC)
    for k in range(0, K, SAMPLES):
        log_w = _log_weights(nll_ptr, log_q_ptr, log_p_ptr, K, B, k + i, b[None, :], beta)
        more = tl.maximum(most, tl.max(log_w, 0))
        # Without a finite weight so far, nothing is to be scaled.
        total *= exp(most - _finite(more), APPROX)
        total += tl.sum(exp(log_w - _finite(more)[None, :], APPROX), 0)
        most = more
    most = _finite(most)
    tl.store(bound_ptr + b, tl.full((), log_k, ACC) - (most + tl.log(total)), b < B)
    for k in range(0, K, SAMPLES):
        log_w = _log_weights(nll_ptr, log_q_ptr, log_p_ptr, K, B, k + i, b[None, :], beta)
        weights = exp(log_w - most[None, :], APPROX) / total[None, :]
        at = (k + i).to(tl.int64) * B + b[None, :]
        tl.store(weights_ptr + at, weights, (k + i < K) & (b < B)[None, :])


@functools.lru_cache(PLANS)
def _plan(where: Place, nll: Layout, log_q: Layout, log_p: Layout | None) -> Plan:
    """How importance_forward reads (nll, log_q, log_p): contiguous."""
    reads = [laid_out(t) for t in (nll, log_q, log_p)]
    samples, batch = reads[1].shape
    launch = Launch(
        where,
        triton.cdiv(batch, _ROWS),
        (samples, batch),
        {"SAMPLES": _SAMPLES, "ROWS": _ROWS, "APPROX": approximation(where, *reads)},
        num_warps=4,
    )
    return Plan(launch, copies(reads, [None if t is None else t.contiguous() for t in reads]))


def importance_forward(
    nll: Tensor, log_q: Tensor, log_p: Tensor | None, beta: float
) -> tuple[Tensor, Tensor]:
    """The bound (B,) and the weights (K, B) of nll (N,), log q and log p (K, B)."""
    samples, batch = log_q.shape
    bound, weights = nll.new_empty(batch), nll.new_empty((samples, batch))
    if batch == 0:
        return bound, weights
    where, reads = place(nll), (nll, log_q, log_p)
    plan = _plan(where, *map(layout, reads))
    with on_device(where, "importance forward"):
        tensors = *plan.read(*reads), bound, weights
        plan.launch(importance_kernel, tensors, beta, math.log(samples))
    return bound, weights
