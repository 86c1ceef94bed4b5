"""The latent pass: z = μ + σ·ε with log q(z|x) and log p(z), and its gradient.

ε is made in registers from the key, in both directions; nothing is stored for the backward pass.
The element formulas are those of ``reference.reparameterize``.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import latent_config
from .launch import (
    accumulation,
    as_rows,
    multiprocessors,
    on_device,
    row_stride,
    scratch,
    use_approx,
)
from .philox import normal
from .reduce import is_last_program, sum_partials
from .scale import clamp, log_variance_and_scale, scale_slopes

LOG_2PI = tl.constexpr(math.log(2.0 * math.pi))


@triton.jit
def _noise_base(key_ptr, row0, r, K, k, first_row, L, PER_CALL: tl.constexpr):
    """Seed, and the Philox counter at which each row's noise starts: offset + row·Q (mod 2^64)."""
    seed, offset = tl.load(key_ptr), tl.load(key_ptr + 1)
    calls = ((L + PER_CALL - 1) // PER_CALL).to(tl.uint64)
    row = ((first_row + row0) * K + k).to(tl.uint64)
    return seed, offset + row * calls + r.to(tl.uint64) * (calls * K)


@triton.jit
def _tile_rows(left, ROWS: tl.constexpr):
    """Rows of a tile with ``left`` rows of the batch still to come, as int64 [ROWS, 1].

    Rows past the end are the last one over again: they store the same values to the same place,
    which costs less than masking every load and store.
    """
    last = (tl.minimum(left, ROWS) - 1).to(tl.int32)
    return tl.minimum(tl.arange(0, ROWS)[:, None], last).to(tl.int64)


@triton.jit
def _scale(raw, lo, hi, CLAMP: tl.constexpr):
    """The parameter that σ is made from."""
    return clamp(raw, tl.full((), lo, raw.dtype), tl.full((), hi, raw.dtype)) if CLAMP else raw


@triton.jit(do_not_specialize=["B", "first_row"])
def latent_forward_kernel(
    mu_ptr, scale_ptr, key_ptr, z_ptr, log_q_ptr, log_p_ptr,
    B, K, L, first_row, steps, mu_row, mu_col, scale_row, scale_col,
    lo: tl.float64, hi: tl.float64,
    PARAM: tl.constexpr, CLAMP: tl.constexpr, SCALAR: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr,
    EVEN: tl.constexpr, APPROX: tl.constexpr,
):  # fmt: skip
    """A program makes sample k of ROWS batch elements; k runs fastest, so that μ is in cache.

    log q = -½ Σ(ε² + log σ² + log 2π) and log p = -½ Σ(z² + log 2π).
    """
    ACC: tl.constexpr = tl.float64 if mu_ptr.dtype.element_ty == tl.float64 else tl.float32
    FP64: tl.constexpr = ACC == tl.float64
    PER_CALL: tl.constexpr = 2 if FP64 else 4
    pid = tl.program_id(0)
    k = (pid % K).to(tl.int64)
    row0 = (pid // K).to(tl.int64) * ROWS
    n0 = k * B + row0
    r = _tile_rows(B - row0, ROWS)
    seed, base = _noise_base(key_ptr, row0, r, K, k, first_row, L, PER_CALL)
    if SCALAR:
        s = _scale(tl.load(scale_ptr).to(ACC), lo, hi, CLAMP)

    q = tl.zeros([ROWS, COLS], ACC)
    p = tl.zeros([ROWS, COLS], ACC)
    for step in range(steps):
        for part in tl.static_range(UNROLL):
            col0 = (step * UNROLL + part) * COLS
            cols = (col0 + tl.arange(0, COLS))[None, :]
            mask = None if EVEN else cols < L
            mu = tl.load(mu_ptr + row0 * mu_row + (r * mu_row + cols * mu_col), mask).to(ACC)
            if not SCALAR:
                raw = tl.load(scale_ptr + row0 * scale_row + (r * scale_row + cols * scale_col), mask)
                s = _scale(raw.to(ACC), lo, hi, CLAMP)
            log_variance, sigma = log_variance_and_scale(s, PARAM, APPROX)
            eps = normal(seed, base + col0 // PER_CALL, COLS, VEC, FP64, APPROX)
            z = mu + sigma * eps
            tl.store(z_ptr + n0 * L + (r * L + cols), z, mask)
            if EVEN:
                q = q + eps * eps + log_variance
                p = p + z * z
            else:
                q = tl.where(cols < L, q + eps * eps + log_variance, q)
                p = tl.where(cols < L, p + z * z, p)
    constant = L * tl.full((), LOG_2PI, ACC)
    tl.store(log_q_ptr + n0 + r, -0.5 * (tl.sum(q, 1, keep_dims=True) + constant))
    tl.store(log_p_ptr + n0 + r, -0.5 * (tl.sum(p, 1, keep_dims=True) + constant))


@triton.jit(do_not_specialize=["B", "first_row"])
def latent_backward_kernel(
    g_z_ptr, g_log_q_ptr, g_log_p_ptr, mu_ptr, scale_ptr, key_ptr, g_mu_ptr, g_scale_ptr,
    counter_ptr, partial_ptr,
    B, K, L, first_row, steps, g_z_row, g_z_col, g_log_q_row, g_log_p_row,
    mu_row, mu_col, scale_row, scale_col,
    lo: tl.float64, hi: tl.float64,
    PARAM: tl.constexpr, CLAMP: tl.constexpr, SCALAR: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr,
    EVEN: tl.constexpr, APPROX: tl.constexpr,
):  # fmt: skip
    """A program owns UNROLL tiles of ∂μ and ∂s, and sums them over the K samples.

    With h = g_z - g_p·z: ∂μ = Σ_k h and ∂s = dσ/ds·Σ_k ε·h - d(log σ)/ds·Σ_k g_q.
    """
    ACC: tl.constexpr = tl.float64 if mu_ptr.dtype.element_ty == tl.float64 else tl.float32
    FP64: tl.constexpr = ACC == tl.float64
    PER_CALL: tl.constexpr = 2 if FP64 else 4
    pid = tl.program_id(0)
    step = pid % steps
    row0 = (pid // steps).to(tl.int64) * ROWS
    r = _tile_rows(B - row0, ROWS)
    if SCALAR:
        raw = tl.load(scale_ptr).to(ACC)
        g_s_sum = tl.zeros([ROWS, COLS], ACC)
    for part in tl.static_range(UNROLL):
        col0 = (step * UNROLL + part) * COLS
        cols = (col0 + tl.arange(0, COLS))[None, :]
        mask = None if EVEN else cols < L
        mu = tl.load(mu_ptr + row0 * mu_row + (r * mu_row + cols * mu_col), mask).to(ACC)
        if not SCALAR:
            raw = tl.load(scale_ptr + row0 * scale_row + (r * scale_row + cols * scale_col), mask)
            raw = raw.to(ACC)
        s = _scale(raw, lo, hi, CLAMP)
        _, sigma = log_variance_and_scale(s, PARAM, APPROX)

        g_mu = tl.zeros([ROWS, COLS], ACC)
        eps_h = tl.zeros([ROWS, COLS], ACC)
        g_q = tl.zeros([ROWS, 1], ACC)
        for k in range(K):
            n0 = row0 + tl.full((), k, tl.int64) * B
            if g_log_q_ptr is not None:
                g_q += tl.load(g_log_q_ptr + (n0 + r) * g_log_q_row)
            if g_z_ptr is not None or g_log_p_ptr is not None:
                seed, base = _noise_base(key_ptr, row0, r, K, k, first_row, L, PER_CALL)
                eps = normal(seed, base + col0 // PER_CALL, COLS, VEC, FP64, APPROX)
                h = tl.zeros([ROWS, COLS], ACC)
                if g_z_ptr is not None:
                    g_z = g_z_ptr + n0 * g_z_row + (r * g_z_row + cols * g_z_col)
                    h += tl.load(g_z, mask).to(ACC)
                if g_log_p_ptr is not None:
                    z = mu + sigma * eps
                    h -= tl.load(g_log_p_ptr + (n0 + r) * g_log_p_row) * z
                g_mu += h
                eps_h += eps * h
        tl.store(g_mu_ptr + row0 * L + (r * L + cols), g_mu, mask)

        d_sigma, d_log_sigma = scale_slopes(s, sigma, PARAM, APPROX)
        g_s = d_sigma * eps_h
        if g_log_q_ptr is not None:
            g_s -= d_log_sigma * g_q
        if CLAMP:
            g_s = tl.where((raw < lo) | (raw > hi), 0.0, g_s)
        if SCALAR:
            keep = tl.arange(0, ROWS)[:, None] < B - row0
            g_s_sum += tl.where(keep if EVEN else keep & (cols < L), g_s, 0.0)
        else:
            tl.store(g_scale_ptr + row0 * L + (r * L + cols), g_s, mask)

    if SCALAR:
        # One number for the whole tensor: the last program to finish sums everyone's part.
        tl.store(partial_ptr + pid, tl.sum(g_s_sum))
        if is_last_program(counter_ptr):
            tl.store(g_scale_ptr, sum_partials(partial_ptr, tl.num_programs(0), 2048))


def latent_forward(
    mu: Tensor, scale: Tensor, key: Tensor, num_samples: int, first_row: int, param: int,
    lo: float, hi: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """z ([K,] B, *latent), log q(z|x) and log p(z) ([K,] B)."""
    batch, samples = mu.shape[0], max(num_samples, 1)
    lead = (num_samples, batch) if num_samples else (batch,)
    z = torch.empty((*lead, *mu.shape[1:]), dtype=mu.dtype, device=mu.device)
    log_q = torch.empty(lead, dtype=accumulation(mu), device=mu.device)
    log_p = torch.empty_like(log_q)
    if mu.numel() == 0:
        return z, log_q.zero_(), log_p.zero_()

    size = mu.numel() // batch
    scalar = scale.dim() == 0
    mu, mu_row, mu_col = as_rows(mu)
    scale, scale_row, scale_col = (scale, 0, 0) if scalar else as_rows(scale)
    itemsize = min(mu.element_size(), scale.element_size())
    config = latent_config(batch, size, itemsize, multiprocessors(mu))
    with on_device(mu):
        latent_forward_kernel[(triton.cdiv(batch, config.rows) * samples,)](
            mu, scale, key, z, log_q, log_p,
            batch, samples, size, first_row, config.steps, mu_row, mu_col, scale_row, scale_col,
            lo, hi,
            PARAM=param, CLAMP=lo > -math.inf or hi < math.inf, SCALAR=scalar,
            ROWS=config.rows, COLS=config.cols, VEC=config.vec, UNROLL=config.unroll,
            EVEN=config.even, APPROX=use_approx(mu), num_warps=config.num_warps, num_stages=1,
            enable_fp_fusion=True,
        )  # fmt: skip
    return z, log_q, log_p


def latent_backward(
    g_z: Tensor | None, g_log_q: Tensor | None, g_log_p: Tensor | None,
    mu: Tensor, scale: Tensor, key: Tensor, num_samples: int, first_row: int, param: int,
    lo: float, hi: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """∂μ and ∂s, contiguous, from the gradients of latent_forward's results."""
    batch, samples = mu.shape[0], max(num_samples, 1)
    scalar = scale.dim() == 0
    g_mu, g_scale = mu.new_empty(mu.shape), scale.new_empty(scale.shape)
    if mu.numel() == 0:
        return g_mu, g_scale.zero_()

    size = mu.numel() // batch
    mu, mu_row, mu_col = as_rows(mu)
    scale, scale_row, scale_col = (scale, 0, 0) if scalar else as_rows(scale)
    g_z_row = g_z_col = g_log_q_row = g_log_p_row = 0
    if g_z is not None:
        g_z, g_z_row, g_z_col = as_rows(g_z.flatten(0, 1) if num_samples else g_z)
    if g_log_q is not None:
        g_log_q, g_log_q_row = row_stride(g_log_q)
    if g_log_p is not None:
        g_log_p, g_log_p_row = row_stride(g_log_p)
    itemsize = min(mu.element_size(), scale.element_size())
    config = latent_config(batch, size, itemsize, multiprocessors(mu))
    programs = triton.cdiv(batch, config.rows) * config.steps
    with on_device(mu):
        counter, partial = scratch(mu, accumulation(mu), programs) if scalar else (None, None)
        latent_backward_kernel[(programs,)](
            g_z, g_log_q, g_log_p, mu, scale, key, g_mu, g_scale, counter, partial,
            batch, samples, size, first_row, config.steps,
            g_z_row, g_z_col, g_log_q_row, g_log_p_row,
            mu_row, mu_col, scale_row, scale_col, lo, hi,
            PARAM=param, CLAMP=lo > -math.inf or hi < math.inf, SCALAR=scalar,
            ROWS=config.rows, COLS=config.cols, VEC=config.vec, UNROLL=config.unroll,
            EVEN=config.even, APPROX=use_approx(mu), num_warps=config.num_warps, num_stages=1,
            enable_fp_fusion=True,
        )  # fmt: skip
    return g_mu, g_scale
