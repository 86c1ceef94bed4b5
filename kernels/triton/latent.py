"""The latent pass: z = μ + σ·ε with log q(z|x) and log p(z), and its gradient.

ε is made in registers from the key, in both directions; nothing is stored for the backward pass.
The element formulas are those of ``reference.reparameterize``.
"""

import functools
import math

import torch
from torch import Tensor

import triton
import triton.language as tl

from .config import latent_config
from .elementary import minus_zeros, widen
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
    is_wide,
    laid_out,
    layout,
    on_device,
    place,
    row_stride,
)
from .philox import normal
from .reduce import is_last_program, sum_partials
from .scale import bound, clamp_code, log_variance_and_scale, scale_slopes, through_bound
from .tile import along, clip_row, multiple, row_tile

LOG_2PI = tl.constexpr(math.log(2.0 * math.pi))


@triton.jit
def _noise(seed, offset, row, K, k, first_row, L, step, COLS: tl.constexpr, TILES: tl.constexpr,
           VEC: tl.constexpr, FP64: tl.constexpr, APPROX: tl.constexpr):  # fmt: skip
    """What ``normal`` gives of sample k for the elements of ``row_tile``."""
    PER_CALL: tl.constexpr = 2 if FP64 else 4
    # Row R = (first_row + row)·K + k starts at Philox counter offset + R·Q (mod 2^64).
    # Q is unsigned in one product and signed in the other, or LLVM would add rows in 64 bits first.
    calls = tl.cast((L + PER_CALL - 1) >> PER_CALL // 2, tl.int32)
    start = offset + (first_row.to(tl.int64) * K + k).to(tl.uint64) * calls.to(tl.uint32)
    first = start + (row * (calls.to(tl.int64) * K)).to(tl.uint64)
    group = tl.arange(0, COLS // VEC)[None, :] * (VEC // PER_CALL)
    tile = step * TILES + tl.arange(0, row.shape[0])[:, None] // (row.shape[0] // TILES)
    index = first + group.to(tl.uint64) + (tile * (COLS // PER_CALL)).to(tl.uint64)
    return normal(seed, index, VEC, FP64, APPROX)


@triton.jit
def _sum_tiles(x, ROWS: tl.constexpr):
    """Sum of the tiles side by side in [TILES·ROWS, COLS], each thread's own."""
    return tl.sum(tl.reshape(x, (x.shape[0] // ROWS, ROWS, x.shape[1])), 0)


@triton.jit(do_not_specialize=["B", "first_row"])
def latent_forward_kernel(
    mu_ptr, scale_ptr, key_ptr, z_ptr, log_q_ptr, log_p_ptr,
    B, K, L, steps, mu_row, mu_col, scale_row, scale_col,
    first_row, lo: tl.float64, hi: tl.float64,
    PARAM: tl.constexpr, CLAMP: tl.constexpr, SCALAR: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, TILES: tl.constexpr, VEC: tl.constexpr,
    ALIGN: tl.constexpr, EVEN: tl.constexpr, APPROX: tl.constexpr,
):  # fmt: skip
    """A program makes sample k of ROWS batch elements; k runs fastest, so that μ is in cache.

    log q = -½ Σ(ε² + log σ² + log 2π) and log p = -½ Σ(z² + log 2π).
    """
    FP64: tl.constexpr = mu_ptr.dtype.element_ty == tl.float64
    ACC: tl.constexpr = tl.float64 if FP64 else tl.float32
    lo, hi = tl.full((), lo, ACC), tl.full((), hi, ACC)
    L, mu_row = multiple(L, ALIGN), multiple(mu_row, ALIGN)
    scale_row = multiple(scale_row, ALIGN)
    pid = tl.program_id(0)
    k = (pid % K).to(tl.int64)
    row0 = (pid // K).to(B.dtype) * ROWS
    # A loop's stores might change the key, for all that a compiler knows, so it is read before one;
    # without one it is read late, and leaves registers to what comes first.
    LOOP: tl.constexpr = not isinstance(steps, int)
    if LOOP:
        seed, offset = tl.load(key_ptr), tl.load(key_ptr + 1)
    q = minus_zeros([ROWS, COLS], ACC)
    p = q
    for step in range(steps):
        row, cols = row_tile(row0, B, step, ROWS, COLS, TILES)
        mask = None if EVEN else cols < L
        mu = widen(tl.load(mu_ptr + along(cols, mu_col) + row * mu_row, mask), ACC, APPROX)
        if SCALAR:
            s = tl.load(scale_ptr).to(ACC)
        else:
            s = tl.load(scale_ptr + along(cols, scale_col) + row * scale_row, mask)
            s = widen(s, ACC, APPROX)
        s = bound(s, lo, hi, CLAMP, APPROX)
        log_variance, sigma = log_variance_and_scale(s, PARAM, APPROX)
        if not LOOP:
            seed, offset = tl.load(key_ptr), tl.load(key_ptr + 1)
        eps, squares = _noise(
            seed, offset, row, K, k, first_row, L, step, COLS, TILES, VEC, FP64, APPROX
        )
        z = mu + sigma * eps
        tl.store(z_ptr + cols + (k * B + row) * L, z, mask)
        q_term, p_term = squares + log_variance, z * z
        if not EVEN:  # the row may end within a pair
            q_term = tl.where(mask, eps * eps + log_variance, 0.0)
            p_term = tl.where(mask, p_term, 0.0)
        q += _sum_tiles(q_term, ROWS)
        p += _sum_tiles(p_term, ROWS)
    constant = L * tl.full((), 0.5 * LOG_2PI, ACC)
    n = k * B + clip_row(row0, tl.arange(0, ROWS), B)
    q_sum, p_sum = tl.split(tl.sum(tl.join(q, p), 1))
    tl.store(log_q_ptr + n, -0.5 * q_sum - constant)
    tl.store(log_p_ptr + n, -0.5 * p_sum - constant)


@triton.jit(do_not_specialize=["B", "first_row"])
def latent_backward_kernel(
    g_z_ptr, g_log_q_ptr, g_log_p_ptr, mu_ptr, scale_ptr, key_ptr, g_mu_ptr, g_scale_ptr,
    counter_ptr, partial_ptr,
    B, K, L, steps, g_z_row, g_z_col, g_log_q_row, g_log_p_row,
    mu_row, mu_col, scale_row, scale_col,
    first_row, lo: tl.float64, hi: tl.float64,
    PARAM: tl.constexpr, CLAMP: tl.constexpr, PATH: tl.constexpr, SCALAR: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, TILES: tl.constexpr, VEC: tl.constexpr,
    ALIGN: tl.constexpr, EVEN: tl.constexpr, APPROX: tl.constexpr,
):  # fmt: skip
    """A program owns one step of ∂μ and ∂s, and sums it over the K samples.

    With h = g_z - g_p·z: ∂μ = Σ_k h and ∂s = dσ/ds·Σ_k ε·h - d(log σ)/ds·Σ_k g_q. With PATH, log q
    depends on the parameters through z alone (Roeder et al. 2017, "Sticking the Landing"):
    ∂μ = Σ_k (h - g_q·ε/σ) and g_q·ε² takes the place of g_q in ∂s.
    """
    FP64: tl.constexpr = mu_ptr.dtype.element_ty == tl.float64
    ACC: tl.constexpr = tl.float64 if FP64 else tl.float32
    lo, hi = tl.full((), lo, ACC), tl.full((), hi, ACC)
    L, g_z_row = multiple(L, ALIGN), multiple(g_z_row, ALIGN)
    mu_row, scale_row = multiple(mu_row, ALIGN), multiple(scale_row, ALIGN)
    pid = tl.program_id(0)
    step = pid % steps
    row0 = (pid // steps).to(B.dtype) * ROWS
    row, cols = row_tile(row0, B, step, ROWS, COLS, TILES)
    mask = None if EVEN else cols < L
    mu = widen(tl.load(mu_ptr + along(cols, mu_col) + row * mu_row, mask), ACC, APPROX)
    if SCALAR:
        raw = tl.load(scale_ptr).to(ACC)
    else:
        raw = tl.load(scale_ptr + along(cols, scale_col) + row * scale_row, mask)
        raw = widen(raw, ACC, APPROX)
    s = bound(raw, lo, hi, CLAMP, APPROX)
    _, sigma = log_variance_and_scale(s, PARAM, APPROX)

    seed, offset = tl.load(key_ptr), tl.load(key_ptr + 1)
    g_mu = minus_zeros([TILES * ROWS, COLS], ACC)
    eps_h = g_mu
    PATH_Q: tl.constexpr = PATH and g_log_q_ptr is not None
    g_q = tl.zeros([TILES * ROWS, COLS if PATH_Q else 1], ACC)
    for k in range(K):
        n = tl.full((), k, tl.int64) * B + row
        if g_log_q_ptr is not None:
            row_g_q = tl.load(g_log_q_ptr + n * g_log_q_row)
            if not PATH_Q:
                g_q += row_g_q
        if g_z_ptr is not None or g_log_p_ptr is not None or PATH_Q:
            if g_z_ptr is not None:
                h = widen(tl.load(g_z_ptr + along(cols, g_z_col) + n * g_z_row, mask), ACC, APPROX)
            else:
                h = tl.zeros([TILES * ROWS, COLS], ACC)
            eps, _squares = _noise(
                seed, offset, row, K, k, first_row, L, step, COLS, TILES, VEC, FP64, APPROX
            )
            if g_log_p_ptr is not None:
                z = mu + sigma * eps
                h -= tl.load(g_log_p_ptr + n * g_log_p_row) * z
            g_mu += h
            eps_h += eps * h
            if PATH_Q:
                g_mu -= row_g_q * eps / sigma
                g_q += row_g_q * (eps * eps)
    tl.store(g_mu_ptr + cols + row * L, g_mu, mask)

    d_sigma, d_log_sigma = scale_slopes(s, sigma, PARAM, APPROX)
    g_s = d_sigma * eps_h
    if g_log_q_ptr is not None:
        g_s -= d_log_sigma * g_q
    g_s = through_bound(g_s, raw, lo, hi, CLAMP, APPROX)
    if SCALAR:
        # One number for the whole tensor: the last program to finish sums everyone's part.
        keep = tl.arange(0, TILES * ROWS)[:, None] % ROWS < B - row0
        part = tl.where(keep if EVEN else keep & mask, g_s, 0.0)
        tl.store(partial_ptr + pid, tl.sum(part))
        if is_last_program(counter_ptr):
            tl.store(g_scale_ptr, sum_partials(partial_ptr, tl.num_programs(0), 512))
    else:
        tl.store(g_scale_ptr + cols + row * L, g_s, mask)


@functools.lru_cache(PLANS)
def _forward_plan(
    where: Place, mu: Layout, scale: Layout, samples: int, wide: bool, param: int, clamp: int
) -> Plan:
    """How latent_forward reads (mu, scale). ``wide``: first_row needs 64 bits."""
    mu, scale = laid_out(mu), laid_out(scale)
    check_rows("mu", mu)
    batch, size = mu.shape[0], mu.numel() // mu.shape[0]
    scalar = scale.dim() == 0
    mu_in, mu_row, mu_col = as_rows(mu)
    scale_in, scale_row, scale_col = (scale, 0, 0) if scalar else as_rows(scale)
    itemsize = min(mu.element_size(), scale.element_size())
    align = alignment(16 // itemsize, size, mu_row, scale_row)
    config = latent_config(batch, size, itemsize, align, where.sms, where.warp)
    launch = Launch(
        where,
        triton.cdiv(batch, config.rows) * samples,
        (batch, samples, size, config.steps, mu_row, mu_col, scale_row, scale_col),
        {
            "PARAM": param, "CLAMP": clamp, "SCALAR": scalar,
            "ROWS": config.rows, "COLS": config.cols, "TILES": config.tiles, "VEC": config.vec,
            "ALIGN": align, "EVEN": config.even, "APPROX": approximation(where, mu, scale),
        },
        config.num_warps,
    )  # fmt: skip
    return Plan(launch, copies((mu, scale), (mu_in, scale_in)))


@functools.lru_cache(PLANS)
def _backward_plan(
    where: Place, g_z: Layout | None, g_log_q: Layout | None, g_log_p: Layout | None,
    mu: Layout, scale: Layout, samples: int, wide: bool, param: int, clamp: int, path: bool,
) -> Plan:  # fmt: skip
    """How latent_backward reads (g_z, g_log_q, g_log_p, mu, scale); g_z of K·B rows."""
    g_z, g_log_q, g_log_p, mu, scale = map(laid_out, (g_z, g_log_q, g_log_p, mu, scale))
    check_rows("mu", mu)
    batch, size = mu.shape[0], mu.numel() // mu.shape[0]
    scalar = scale.dim() == 0
    mu_in, mu_row, mu_col = as_rows(mu)
    scale_in, scale_row, scale_col = (scale, 0, 0) if scalar else as_rows(scale)
    g_z_in, g_z_row, g_z_col = (None, 0, 0) if g_z is None else as_rows(g_z)
    g_log_q_in, g_log_q_row = (None, 0) if g_log_q is None else row_stride(g_log_q)
    g_log_p_in, g_log_p_row = (None, 0) if g_log_p is None else row_stride(g_log_p)
    itemsize = min(mu.element_size(), scale.element_size())
    align = alignment(16 // itemsize, size, g_z_row, mu_row, scale_row)
    config = latent_config(batch, size, itemsize, align, where.sms, where.warp)
    programs = triton.cdiv(batch, config.rows) * config.steps
    launch = Launch(
        where,
        programs,
        (
            batch, samples, size, config.steps, g_z_row, g_z_col, g_log_q_row, g_log_p_row,
            mu_row, mu_col, scale_row, scale_col,
        ),
        {
            "PARAM": param, "CLAMP": clamp, "PATH": path, "SCALAR": scalar,
            "ROWS": config.rows, "COLS": config.cols, "TILES": config.tiles, "VEC": config.vec,
            "ALIGN": align, "EVEN": config.even, "APPROX": approximation(where, mu, scale),
        },
        config.num_warps,
    )  # fmt: skip
    copied = copies(
        (g_z, g_log_q, g_log_p, mu, scale), (g_z_in, g_log_q_in, g_log_p_in, mu_in, scale_in)
    )
    return Plan(launch, copied, programs if scalar else None)


def latent_forward(
    mu: Tensor, scale: Tensor, key: Tensor, num_samples: int, first_row: int, param: int,
    lo: float, hi: float, soft: bool, path: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Draw z ([K,] B, *latent), with log q(z|x) and log p(z) ([K,] B)."""
    lead = (num_samples, mu.shape[0]) if num_samples else mu.shape[:1]
    z = mu.new_empty((*lead, *mu.shape[1:]))
    log_q = mu.new_empty(lead, dtype=accumulation(mu))
    log_p = torch.empty_like(log_q)
    if mu.numel() == 0:
        return z, log_q.zero_(), log_p.zero_()

    where, clamp = place(mu), clamp_code(lo, hi, soft)
    samples, wide = max(num_samples, 1), is_wide(first_row)
    plan = _forward_plan(where, layout(mu), layout(scale), samples, wide, param, clamp)
    with on_device(where, "latent forward"):
        tensors = *plan.read(mu, scale), key.contiguous(), z, log_q, log_p
        plan.launch(latent_forward_kernel, tensors, first_row, lo, hi)
    return z, log_q, log_p


def latent_backward(
    g_z: Tensor | None, g_log_q: Tensor | None, g_log_p: Tensor | None,
    mu: Tensor, scale: Tensor, key: Tensor, num_samples: int, first_row: int, param: int,
    lo: float, hi: float, soft: bool, path: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """∂μ and ∂s, contiguous, from the gradients of latent_forward's results."""
    g_mu, g_scale = mu.new_empty(mu.shape), scale.new_empty(scale.shape)
    if mu.numel() == 0:
        return g_mu, g_scale.zero_()

    if g_z is not None and num_samples:
        g_z = g_z.flatten(0, 1)
    where, clamp = place(mu), clamp_code(lo, hi, soft)
    reads = g_z, g_log_q, g_log_p, mu, scale
    samples, wide = max(num_samples, 1), is_wide(first_row)
    plan = _backward_plan(where, *map(layout, reads), samples, wide, param, clamp, path)
    with on_device(where, "latent backward"):
        tensors = *plan.read(*reads), key.contiguous(), g_mu, g_scale, *plan.scratch(mu)
        plan.launch(latent_backward_kernel, tensors, first_row, lo, hi)
    return g_mu, g_scale
