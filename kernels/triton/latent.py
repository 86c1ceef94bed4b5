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
from .scale import clamp, log_scale_and_scale, scale_slopes

HALF_LOG_2PI = tl.constexpr(0.5 * math.log(2.0 * math.pi))


@triton.jit
def _noise_base(key_ptr, rows, K, k, first_row, L, PER_CALL: tl.constexpr):
    """Seed, and the Philox counter at which each row's noise starts: offset + r·Q (mod 2^64)."""
    seed, offset = tl.load(key_ptr), tl.load(key_ptr + 1)
    calls = (L + PER_CALL - 1) // PER_CALL
    r = (first_row + rows) * K + k
    return seed, offset + (r * calls).to(tl.uint64)


@triton.jit
def _load_scale(scale_ptr, offsets, mask, lo, hi, ACC: tl.constexpr, SCALAR: tl.constexpr,
                CLAMP: tl.constexpr):  # fmt: skip
    """The raw parameter, and the one σ is made from."""
    raw = tl.load(scale_ptr).to(ACC) if SCALAR else tl.load(scale_ptr + offsets, mask, 1.0).to(ACC)
    s = clamp(raw, tl.full((), lo, ACC), tl.full((), hi, ACC)) if CLAMP else raw
    return raw, s


@triton.jit
def _forward_tile(
    mu_ptr, scale_ptr, z_ptr, seed, base, rows, row_ok, n, chunk,
    L, mu_row, mu_col, scale_row, scale_col, lo, hi,
    ACC: tl.constexpr, PARAM: tl.constexpr, CLAMP: tl.constexpr, SCALAR: tl.constexpr,
    COLS: tl.constexpr, VEC: tl.constexpr, EVEN: tl.constexpr, APPROX: tl.constexpr,
):  # fmt: skip
    """Write one tile of z; return its rows' sums of ½ε² + log σ and ½z²."""
    FP64: tl.constexpr = ACC == tl.float64
    PER_CALL: tl.constexpr = 2 if FP64 else 4
    cols = (chunk * COLS + tl.arange(0, COLS))[None, :]
    mask = row_ok if EVEN else row_ok & (cols < L)
    eps = normal(seed, base + chunk * (COLS // PER_CALL), COLS, VEC, FP64, APPROX)
    mu = tl.load(mu_ptr + rows * mu_row + cols * mu_col, mask, 0.0).to(ACC)
    _, s = _load_scale(
        scale_ptr, rows * scale_row + cols * scale_col, mask, lo, hi, ACC, SCALAR, CLAMP
    )
    log_sigma, sigma = log_scale_and_scale(s, PARAM, APPROX)
    z = mu + sigma * eps
    tl.store(z_ptr + n * L + cols, z, mask)
    q_terms = 0.5 * eps * eps + log_sigma
    p_terms = 0.5 * z * z
    if not EVEN:
        q_terms = tl.where(cols < L, q_terms, 0.0)
        p_terms = tl.where(cols < L, p_terms, 0.0)
    return tl.sum(q_terms, 1, keep_dims=True), tl.sum(p_terms, 1, keep_dims=True)


@triton.jit(do_not_specialize=["B", "first_row"])
def latent_forward_kernel(
    mu_ptr, scale_ptr, key_ptr, z_ptr, log_q_ptr, log_p_ptr,
    B, K, L, first_row, chunks, mu_row, mu_col, scale_row, scale_col,
    lo: tl.float64, hi: tl.float64,
    PARAM: tl.constexpr, CLAMP: tl.constexpr, SCALAR: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, VEC: tl.constexpr, EVEN: tl.constexpr,
    APPROX: tl.constexpr,
):  # fmt: skip
    """A program makes sample k of ROWS batch elements; k runs fastest, so that μ is in cache."""
    ACC: tl.constexpr = tl.float64 if mu_ptr.dtype.element_ty == tl.float64 else tl.float32
    pid = tl.program_id(0)
    k = (pid % K).to(tl.int64)
    rows = (pid // K).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    row_ok = rows < B
    n = k * B + rows
    seed, base = _noise_base(key_ptr, rows, K, k, first_row, L, 2 if ACC == tl.float64 else 4)
    q = tl.zeros([ROWS, 1], ACC)
    p = tl.zeros([ROWS, 1], ACC)
    for chunk in range(chunks):
        q_sum, p_sum = _forward_tile(
            mu_ptr, scale_ptr, z_ptr, seed, base, rows, row_ok, n, chunk,
            L, mu_row, mu_col, scale_row, scale_col, lo, hi,
            ACC, PARAM, CLAMP, SCALAR, COLS, VEC, EVEN, APPROX,
        )  # fmt: skip
        q += q_sum
        p += p_sum
    constant = L * tl.full((), HALF_LOG_2PI, ACC)
    tl.store(log_q_ptr + n, -(q + constant), row_ok)
    tl.store(log_p_ptr + n, -(p + constant), row_ok)


@triton.jit(do_not_specialize=["B", "first_row"])
def latent_backward_kernel(
    g_z_ptr, g_log_q_ptr, g_log_p_ptr, mu_ptr, scale_ptr, key_ptr, g_mu_ptr, g_scale_ptr,
    counter_ptr, partial_ptr,
    B, K, L, first_row, chunks, g_z_row, g_z_col, g_log_q_row, g_log_p_row,
    mu_row, mu_col, scale_row, scale_col, g_mu_row, g_mu_col, g_scale_row, g_scale_col,
    lo: tl.float64, hi: tl.float64,
    PARAM: tl.constexpr, CLAMP: tl.constexpr, SCALAR: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, VEC: tl.constexpr, EVEN: tl.constexpr,
    APPROX: tl.constexpr,
):  # fmt: skip
    """A program owns a tile of ∂μ and ∂s, and sums it over the K samples.

    With h = g_z - g_p·z: ∂μ = Σ_k h and ∂s = dσ/ds·Σ_k ε·h - d(log σ)/ds·Σ_k g_q.
    """
    ACC: tl.constexpr = tl.float64 if mu_ptr.dtype.element_ty == tl.float64 else tl.float32
    FP64: tl.constexpr = ACC == tl.float64
    PER_CALL: tl.constexpr = 2 if FP64 else 4
    pid = tl.program_id(0)
    chunk = pid % chunks
    rows = (pid // chunks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    row_ok = rows < B
    cols = (chunk * COLS + tl.arange(0, COLS))[None, :]
    mask = row_ok if EVEN else row_ok & (cols < L)
    mu = tl.load(mu_ptr + rows * mu_row + cols * mu_col, mask, 0.0).to(ACC)
    raw, s = _load_scale(
        scale_ptr, rows * scale_row + cols * scale_col, mask, lo, hi, ACC, SCALAR, CLAMP
    )
    _, sigma = log_scale_and_scale(s, PARAM, APPROX)

    g_mu = tl.zeros([ROWS, COLS], ACC)
    eps_h = tl.zeros([ROWS, COLS], ACC)
    g_q = tl.zeros([ROWS, 1], ACC)
    for k in range(K):
        n = tl.full((), k, tl.int64) * B + rows
        if g_log_q_ptr is not None:
            g_q += tl.load(g_log_q_ptr + n * g_log_q_row, row_ok, 0.0).to(ACC)
        if g_z_ptr is not None or g_log_p_ptr is not None:
            seed, base = _noise_base(key_ptr, rows, K, k, first_row, L, PER_CALL)
            eps = normal(seed, base + chunk * (COLS // PER_CALL), COLS, VEC, FP64, APPROX)
            h = tl.zeros([ROWS, COLS], ACC)
            if g_z_ptr is not None:
                h += tl.load(g_z_ptr + n * g_z_row + cols * g_z_col, mask, 0.0).to(ACC)
            if g_log_p_ptr is not None:
                z = mu + sigma * eps
                h -= tl.load(g_log_p_ptr + n * g_log_p_row, row_ok, 0.0).to(ACC) * z
            g_mu += h
            eps_h += eps * h
    tl.store(g_mu_ptr + rows * g_mu_row + cols * g_mu_col, g_mu, mask)

    d_sigma, d_log_sigma = scale_slopes(s, sigma, PARAM, APPROX)
    g_s = d_sigma * eps_h
    if g_log_q_ptr is not None:
        g_s -= d_log_sigma * g_q
    if CLAMP:
        g_s = tl.where((raw < lo) | (raw > hi), 0.0, g_s)
    if SCALAR:
        # One number for the whole tensor: the last program to finish sums everyone's part.
        tl.store(partial_ptr + pid, tl.sum(tl.where(mask, g_s, 0.0)))
        if is_last_program(counter_ptr):
            tl.store(g_scale_ptr, sum_partials(partial_ptr, tl.num_programs(0), 2048))
    else:
        tl.store(g_scale_ptr + rows * g_scale_row + cols * g_scale_col, g_s, mask)


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
            batch, samples, size, first_row, config.chunks, mu_row, mu_col, scale_row, scale_col,
            lo, hi,
            PARAM=param, CLAMP=lo > -math.inf or hi < math.inf, SCALAR=scalar,
            ROWS=config.rows, COLS=config.cols, VEC=config.vec, EVEN=config.even,
            APPROX=use_approx(mu), num_warps=config.num_warps, num_stages=1,
        )  # fmt: skip
    return z, log_q, log_p


def latent_backward(
    g_z: Tensor | None, g_log_q: Tensor | None, g_log_p: Tensor | None,
    mu: Tensor, scale: Tensor, key: Tensor, num_samples: int, first_row: int, param: int,
    lo: float, hi: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """∂μ like ``mu`` and ∂s like ``scale``, from the gradients of latent_forward's results."""
    batch, samples = mu.shape[0], max(num_samples, 1)
    scalar = scale.dim() == 0
    g_mu, g_scale = torch.empty_like(mu), torch.empty_like(scale)
    if mu.numel() == 0:
        return g_mu, g_scale.zero_()

    size = mu.numel() // batch
    mu, mu_row, mu_col = as_rows(mu)
    scale, scale_row, scale_col = (scale, 0, 0) if scalar else as_rows(scale)
    out_mu, g_mu_row, g_mu_col = as_rows(g_mu)
    out_scale, g_scale_row, g_scale_col = (g_scale, 0, 0) if scalar else as_rows(g_scale)
    g_z_row = g_z_col = g_log_q_row = g_log_p_row = 0
    if g_z is not None:
        g_z, g_z_row, g_z_col = as_rows(g_z.flatten(0, 1) if num_samples else g_z)
    if g_log_q is not None:
        g_log_q, g_log_q_row = row_stride(g_log_q)
    if g_log_p is not None:
        g_log_p, g_log_p_row = row_stride(g_log_p)
    itemsize = min(mu.element_size(), scale.element_size())
    config = latent_config(batch, size, itemsize, multiprocessors(mu))
    programs = triton.cdiv(batch, config.rows) * config.chunks
    with on_device(mu):
        counter, partial = scratch(mu, accumulation(mu), programs) if scalar else (None, None)
        latent_backward_kernel[(programs,)](
            g_z, g_log_q, g_log_p, mu, scale, key, out_mu, out_scale, counter, partial,
            batch, samples, size, first_row, config.chunks,
            g_z_row, g_z_col, g_log_q_row, g_log_p_row,
            mu_row, mu_col, scale_row, scale_col, g_mu_row, g_mu_col, g_scale_row, g_scale_col,
            lo, hi,
            PARAM=param, CLAMP=lo > -math.inf or hi < math.inf, SCALAR=scalar,
            ROWS=config.rows, COLS=config.cols, VEC=config.vec, EVEN=config.even,
            APPROX=use_approx(mu), num_warps=config.num_warps, num_stages=1,
        )  # fmt: skip
    # Buffers in a layout that no single stride walks were written as contiguous copies.
    if out_mu is not g_mu:
        g_mu.copy_(out_mu)
    if out_scale is not g_scale:
        g_scale.copy_(out_scale)
    return g_mu, g_scale
