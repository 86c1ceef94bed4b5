"""KL(q‖p) of two diagonal Gaussians per row, and its gradient, as in ``reference.gaussian_kl``."""

import functools

import torch
from torch import Tensor

import triton
import triton.language as tl

from .config import latent_config
from .elementary import expm1_and_rest, widen
from .launch import (
    PLANS,
    Launch,
    Layout,
    Place,
    Plan,
    accumulation,
    alignment,
    approximation,
    as_rows,
    check_rows,
    copies,
    laid_out,
    layout,
    on_device,
    place,
)
from .scale import (
    bound,
    clamp_code,
    divide,
    log_scale_slope,
    log_variance_and_root,
    log_variance_and_scale,
    through_bound,
)
from .tile import along, clip_row, multiple, row_tile


@triton.jit
def _terms(mu, s, prior_mu_ptr, prior_scale_ptr, at_mu, at_scale, mask,
           PARAM: tl.constexpr, PRIOR_PARAM: tl.constexpr, APPROX: tl.constexpr):  # fmt: skip
    """Give t = log σ² - log σ_p², δ = (μ - μ_p)/σ_p, δ/σ_p, and the prior's raw scale.

    Of a standard normal prior, the last two are δ and s again.
    """
    t, _ = log_variance_and_scale(s, PARAM, APPROX)
    if prior_mu_ptr is None:
        return t, mu, mu, s
    else:
        prior_s = widen(tl.load(prior_scale_ptr + at_scale, mask), mu.dtype, APPROX)
        log_variance, root = log_variance_and_root(prior_s, PRIOR_PARAM, APPROX)
        delta = mu - widen(tl.load(prior_mu_ptr + at_mu, mask), mu.dtype, APPROX)
        delta = divide(delta, root)
        return t - log_variance, delta, divide(delta, root), prior_s


@triton.jit(do_not_specialize=["B"])
def kl_forward_kernel(
    mu_ptr, scale_ptr, prior_mu_ptr, prior_scale_ptr, kl_ptr,
    B, L, steps, mu_row, mu_col, scale_row, scale_col,
    prior_mu_row, prior_mu_col, prior_scale_row, prior_scale_col,
    lo: tl.float64, hi: tl.float64,
    PARAM: tl.constexpr, PRIOR_PARAM: tl.constexpr, CLAMP: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, TILES: tl.constexpr, ALIGN: tl.constexpr,
    EVEN: tl.constexpr, APPROX: tl.constexpr,
):  # fmt: skip
    """A program sums ROWS rows of ½(e^t - 1 - t + δ²)."""
    ACC: tl.constexpr = kl_ptr.dtype.element_ty
    lo, hi = tl.full((), lo, ACC), tl.full((), hi, ACC)
    L, mu_row, scale_row = multiple(L, ALIGN), multiple(mu_row, ALIGN), multiple(scale_row, ALIGN)
    prior_mu_row, prior_scale_row = multiple(prior_mu_row, ALIGN), multiple(prior_scale_row, ALIGN)
    row0 = tl.program_id(0).to(B.dtype) * ROWS
    total = tl.zeros([TILES * ROWS, COLS], ACC)
    for step in range(steps):
        n, cols = row_tile(row0, B, step, ROWS, COLS, TILES)
        mask = None if EVEN else cols < L
        mu = widen(tl.load(mu_ptr + n * mu_row + along(cols, mu_col), mask), ACC, APPROX)
        s = widen(tl.load(scale_ptr + n * scale_row + along(cols, scale_col), mask), ACC, APPROX)
        t, delta, _, _ = _terms(
            mu, bound(s, lo, hi, CLAMP, APPROX), prior_mu_ptr, prior_scale_ptr,
            n * prior_mu_row + along(cols, prior_mu_col),
            n * prior_scale_row + along(cols, prior_scale_col),
            mask, PARAM, PRIOR_PARAM, APPROX,
        )  # fmt: skip
        _, rest = expm1_and_rest(t, APPROX)
        term = 0.5 * (rest + delta * delta)
        total += term if EVEN else tl.where(mask, term, 0.0)
    sums = tl.sum(tl.sum(tl.reshape(total, (TILES, ROWS, COLS)), 0), 1)
    tl.store(kl_ptr + clip_row(row0, tl.arange(0, ROWS), B), sums)


@triton.jit(do_not_specialize=["B"])
def kl_backward_kernel(
    g_kl_ptr, mu_ptr, scale_ptr, prior_mu_ptr, prior_scale_ptr,
    g_mu_ptr, g_scale_ptr, g_prior_mu_ptr, g_prior_scale_ptr,
    B, L, steps, g_kl_row, mu_row, mu_col, scale_row, scale_col,
    prior_mu_row, prior_mu_col, prior_scale_row, prior_scale_col,
    lo: tl.float64, hi: tl.float64,
    PARAM: tl.constexpr, PRIOR_PARAM: tl.constexpr, CLAMP: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, TILES: tl.constexpr, ALIGN: tl.constexpr,
    EVEN: tl.constexpr, APPROX: tl.constexpr,
):  # fmt: skip
    """A program owns one step of the gradients.

    ∂μ = δ/σ_p = -∂μ_p, ∂(log σ) = e^t - 1 and ∂(log σ_p) = -(e^t - 1) - δ².
    """
    ACC: tl.constexpr = tl.float64 if mu_ptr.dtype.element_ty == tl.float64 else tl.float32
    lo, hi = tl.full((), lo, ACC), tl.full((), hi, ACC)
    L, mu_row, scale_row = multiple(L, ALIGN), multiple(mu_row, ALIGN), multiple(scale_row, ALIGN)
    prior_mu_row, prior_scale_row = multiple(prior_mu_row, ALIGN), multiple(prior_scale_row, ALIGN)
    pid = tl.program_id(0)
    row0 = (pid // steps).to(B.dtype) * ROWS
    n, cols = row_tile(row0, B, pid % steps, ROWS, COLS, TILES)
    mask = None if EVEN else cols < L
    g = tl.load(g_kl_ptr + n * g_kl_row).to(ACC)
    mu = widen(tl.load(mu_ptr + n * mu_row + along(cols, mu_col), mask), ACC, APPROX)
    raw = widen(tl.load(scale_ptr + n * scale_row + along(cols, scale_col), mask), ACC, APPROX)
    s = bound(raw, lo, hi, CLAMP, APPROX)
    t, delta, slope, prior_s = _terms(
        mu, s, prior_mu_ptr, prior_scale_ptr,
        n * prior_mu_row + along(cols, prior_mu_col),
        n * prior_scale_row + along(cols, prior_scale_col),
        mask, PARAM, PRIOR_PARAM, APPROX,
    )  # fmt: skip
    expm1, _ = expm1_and_rest(t, APPROX)
    g_s = g * expm1 * log_scale_slope(s, PARAM, APPROX)
    tl.store(g_mu_ptr + n * L + cols, g * slope, mask)
    tl.store(g_scale_ptr + n * L + cols, through_bound(g_s, raw, lo, hi, CLAMP, APPROX), mask)
    if prior_mu_ptr is not None:
        g_prior_s = -g * (expm1 + delta * delta) * log_scale_slope(prior_s, PRIOR_PARAM, APPROX)
        tl.store(g_prior_mu_ptr + n * L + cols, -g * slope, mask)
        tl.store(g_prior_scale_ptr + n * L + cols, g_prior_s, mask)


@functools.lru_cache(PLANS)
def _plan(
    where: Place, tensors: tuple[Layout | None, ...], g_kl: Layout | None, param: int,
    prior_param: int, clamp: int,
) -> Plan:  # fmt: skip
    """How the passes read (mu, scale, prior_mu, prior_scale); the backward pass has a g_kl."""
    given = [laid_out(t) for t in tensors]
    mu, g_kl = given[0], laid_out(g_kl)
    check_rows("mu", mu)
    batch, size = mu.shape[0], mu.numel() // mu.shape[0]
    reads, strides = [], []
    for t in given:
        t_in, row, col = (None, 0, 0) if t is None else as_rows(t)
        reads.append(t_in)
        strides += [row, col]
    itemsize = min(t.element_size() for t in given if t is not None)
    align = alignment(16 // itemsize, size, *strides[::2])
    config = latent_config(batch, size, itemsize, align, where.sms, where.warp)
    programs, g_kl_row = triton.cdiv(batch, config.rows), ()
    if g_kl is not None:
        programs, g_kl_row = programs * config.steps, g_kl.stride()
    launch = Launch(
        where,
        programs,
        (batch, size, config.steps, *g_kl_row, *strides),
        {
            "PARAM": param, "PRIOR_PARAM": prior_param, "CLAMP": clamp,
            "ROWS": config.rows, "COLS": config.cols, "TILES": config.tiles, "ALIGN": align,
            "EVEN": config.even, "APPROX": approximation(where, *given),
        },
        config.num_warps,
    )  # fmt: skip
    return Plan(launch, copies(given, reads))


def gaussian_kl_forward(
    mu: Tensor, scale: Tensor, prior_mu: Tensor | None, prior_scale: Tensor | None,
    param: int, prior_param: int, lo: float, hi: float, soft: bool,
) -> Tensor:  # fmt: skip
    """KL(q‖p) of each row (B,); p is a standard normal if no prior is given."""
    kl = mu.new_empty(mu.shape[0], dtype=accumulation(mu))
    if mu.numel() == 0:
        return kl.zero_()

    where, tensors = place(mu), (mu, scale, prior_mu, prior_scale)
    layouts, clamp = tuple(map(layout, tensors)), clamp_code(lo, hi, soft)
    plan = _plan(where, layouts, None, param, prior_param, clamp)
    with on_device(where, "kl forward"):
        plan.launch(kl_forward_kernel, (*plan.read(*tensors), kl), lo, hi)
    return kl


def gaussian_kl_backward(
    g_kl: Tensor, mu: Tensor, scale: Tensor, prior_mu: Tensor | None, prior_scale: Tensor | None,
    param: int, prior_param: int, lo: float, hi: float, soft: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """∂μ and ∂s of q and of p; empty for an absent prior."""
    tensors = mu, scale, prior_mu, prior_scale
    gradients = tuple(mu.new_empty(0) if t is None else t.new_empty(t.shape) for t in tensors)
    if mu.numel() == 0:
        return tuple(map(_ordered, gradients, tensors))

    where, layouts, clamp = place(mu), tuple(map(layout, tensors)), clamp_code(lo, hi, soft)
    plan = _plan(where, layouts, layout(g_kl), param, prior_param, clamp)
    with on_device(where, "kl backward"):
        reads = plan.read(*tensors)
        plan.launch(kl_backward_kernel, (g_kl, *reads, *gradients), lo, hi)
    return tuple(map(_ordered, gradients, tensors))


def _ordered(g: Tensor, t: Tensor | None) -> Tensor:
    """A contiguous gradient in the memory order of its tensor."""
    if t is None or t.is_contiguous():
        return g
    ordered = torch.empty_like(t)
    return g if ordered.stride() == g.stride() else ordered.copy_(g)
