"""The likelihood pass: -log p(x|z) per row, the finished loss, and the gradients.

One kernel body serves the forward pass (FORWARD), the backward pass (GRAD), and both at once, for
every likelihood and every shape of the scale (family.py, SCALE). The element formulas are those of
``reference.likelihood_nll``; the loss is ``reference.elbo_loss``.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import triton
import triton.language as tl
from vae_fast.reference import student_t_constant

from .config import likelihood_config
from .elementary import widen
from .family import HEAVY, WITHOUT_SCALE, element_gradients, element_nll
from .launch import (
    PLANS,
    Launch,
    Layout,
    Place,
    Plan,
    accumulation,
    alignment,
    approximation,
    check_rows,
    collapse,
    copies,
    is_wide,
    laid_out,
    layout,
    on_device,
    place,
    row_stride,
)
from .philox import uniform
from .reduce import is_last_program, sum_partials
from .scale import (
    LOGSTD,
    LOGVAR,
    SOFT,
    bound,
    clamp_code,
    log_scale_slope,
    log_variance_and_root,
    through_bound,
    times_slope,
)
from .tile import along, byte_offsets, multiple

# Codes of ``SCALE``: one for each element (or packed), for all, for each row, for each element of
# the event (the forward pass takes it for a full one whose rows are one and the same), or none.
FULL, SCALAR, ROW, EVENT, ABSENT = map(tl.constexpr, range(5))

# Codes of ``reduction``.
MEAN, SUM, NONE, NO_LOSS = 0, 1, 2, 3


@triton.jit
def _finish_rows(nll_ptr, loss_ptr, log_q_ptr, log_p_ptr, n, ok, nll, beta, ROW_LOSS: tl.constexpr):
    """Write the rows' nll, and return their terms of the loss, nll + β(log q - log p)."""
    tl.store(nll_ptr + n, nll, ok)
    term = nll
    if log_q_ptr is not None:
        term += beta * tl.load(log_q_ptr + n, ok, 0.0)
    if log_p_ptr is not None:
        term -= beta * tl.load(log_p_ptr + n, ok, 0.0)
    if ROW_LOSS:
        tl.store(loss_ptr + n, term, ok)
    return tl.where(ok, term, 0.0)


@triton.jit
def _row_sum(x, ROWS: tl.constexpr):
    """Sum a [TILES·ROWS, COLS] tile over its rows: first in each thread, then across threads."""
    return tl.sum(tl.sum(tl.reshape(x, (x.shape[0] // ROWS, ROWS, x.shape[1])), 0), 1)


@triton.jit
def _divisor(raw, lo, hi, PARAM: tl.constexpr, CLAMP: tl.constexpr, APPROX: tl.constexpr):
    """The parameter that τ is made from, and ``log_variance_and_root`` of it."""
    s = bound(raw, lo, hi, CLAMP, APPROX)
    log_variance, root = log_variance_and_root(s, PARAM, APPROX)
    return s, log_variance, root


@triton.jit
def _uniform(seed, offset, row, tile, D, COLS: tl.constexpr, VEC: tl.constexpr,
             APPROX: tl.constexpr):  # fmt: skip
    """The noise that dequantizes the elements of ``tile`` of each row (both int, [.., 1])."""
    group = tile * (COLS // 4) + tl.arange(0, COLS // VEC)[None, :] * (VEC // 4)
    index = offset + row.to(tl.uint64) * tl.cast((D + 3) // 4, tl.uint64) + group.to(tl.uint64)
    return uniform(seed, index, VEC, APPROX)


@triton.jit(do_not_specialize=["N", "B", "first_row"])
def likelihood_kernel(
    x_ptr, mean_ptr, scale_ptr, mask_ptr, log_q_ptr, log_p_ptr, g_nll_ptr, g_loss_ptr, key_ptr,
    nll_ptr, loss_ptr, g_x_ptr, g_mean_ptr, g_scale_ptr, g_log_q_ptr, g_log_p_ptr,
    counter_ptr, partial_ptr,
    N, B, D, steps, passes, x_row, x_col, mean_row, mean_col, scale_row, scale_col, mask_row,
    mask_col, g_x_row, g_x_col, g_mean_row, g_mean_col, g_scale_row, g_scale_col, g_nll_row,
    g_loss_row, packed, g_packed, first_row,
    beta: tl.float64, weight: tl.float64, lo: tl.float64, hi: tl.float64, df: tl.float64,
    constant: tl.float64, x_mul: tl.float64, x_add: tl.float64,
    LIKELIHOOD: tl.constexpr, PARAM: tl.constexpr, CLAMP: tl.constexpr, SCALE: tl.constexpr,
    GROUP: tl.constexpr, SAMPLES: tl.constexpr, FORWARD: tl.constexpr, GRAD: tl.constexpr,
    ROW_LOSS: tl.constexpr, SUM_LOSS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    TILES: tl.constexpr, VEC: tl.constexpr, ALIGN: tl.constexpr, SPLIT: tl.constexpr,
    EVEN: tl.constexpr, APPROX: tl.constexpr,
):  # fmt: skip
    """A program owns ROWS rows in each of ``passes``; or SPLIT programs share each row.

    It walks its part of a row in ``steps`` of TILES tiles. ``weight`` is c, a row's weight in the
    loss. ``packed`` is the offset of the scale's half in a packed row, else 0; with GROUP, the
    halves alternate by that many elements (channels_last). The gradient of a scale of each row is
    left in SPLIT parts a row, that of an event's in one row of sums for each block of rows.
    """
    ACC: tl.constexpr = tl.float64 if mean_ptr.dtype.element_ty == tl.float64 else tl.float32
    LEVELS: tl.constexpr = x_ptr.dtype.element_ty == tl.uint8
    # Partial sums that are read at once: 16 a thread, for more would spill.
    PARTIALS: tl.constexpr = max(512, 16 * ROWS * COLS // VEC)
    beta = tl.full((), beta, ACC)
    weight = tl.full((), weight, ACC)
    lo, hi = tl.full((), lo, ACC), tl.full((), hi, ACC)
    df, constant = tl.full((), df, ACC), tl.full((), constant, ACC)
    x_mul, x_add = tl.full((), x_mul, ACC), tl.full((), x_add, ACC)
    D, x_row, mask_row = multiple(D, ALIGN), multiple(x_row, ALIGN), multiple(mask_row, ALIGN)
    mean_row = multiple(mean_row, ALIGN)
    if SCALE != ROW:  # of which the row's stride is no tile's
        scale_row = multiple(scale_row, ALIGN)
    g_mean_row, g_scale_row = multiple(g_mean_row, ALIGN), multiple(g_scale_row, ALIGN)
    g_x_row, packed = multiple(g_x_row, ALIGN), multiple(packed, ALIGN)
    g_packed = multiple(g_packed, ALIGN)
    pid = tl.program_id(0)
    part = pid % SPLIT
    # Element (i, j) of a step is in row i % ROWS, and in column j of tile i // ROWS.
    i = tl.arange(0, TILES * ROWS)[:, None]
    # As in latent_forward_kernel: a loop's stores might change the key, so it is read before one.
    LOOP: tl.constexpr = not (isinstance(steps, int) and isinstance(passes, int))
    if LOOP and key_ptr is not None:
        seed, offset = tl.load(key_ptr), tl.load(key_ptr + 1)
    loss = tl.zeros([ROWS], ACC)
    g_tau_sum = tl.zeros([ROWS], ACC)
    if SCALE == ABSENT:
        log_variance, root = 0.0, 1.0
    if SCALE == SCALAR or SCALE == EVENT:  # noqa: SIM109
        if SCALE == SCALAR:
            raw = tl.load(scale_ptr).to(ACC)
        else:
            # The one step of columns that this program sums.
            cols = (part * TILES + i // ROWS) * COLS + tl.arange(0, COLS)[None, :]
            raw = tl.load(scale_ptr + along(cols, scale_col), cols < D, 1.0).to(ACC)
            g_tau = tl.zeros([TILES * ROWS, COLS], ACC)
        s, log_variance, root = _divisor(raw, lo, hi, PARAM, CLAMP, APPROX)
        slope = log_scale_slope(s, PARAM, APPROX)
        slope = through_bound(slope, raw, lo, hi, CLAMP, APPROX)

    for trip in range(passes):
        row0 = ((pid // SPLIT).to(N.dtype) * passes + trip) * ROWS
        row = row0 + i % ROWS
        ok = i % ROWS < N - row0  # a row far past the last would wrap around
        n = row.to(tl.int64)
        b = (row % B).to(tl.int64) if SAMPLES else n
        if GRAD:
            if FORWARD:
                w = weight
            else:
                w = tl.zeros([TILES * ROWS, 1], ACC)
                if g_loss_ptr is not None:
                    w += weight * tl.load(g_loss_ptr + b * g_loss_row, ok, 0.0)
                if part == 0:
                    tl.store(g_log_q_ptr + n, beta * w, ok & (i < ROWS))
                    tl.store(g_log_p_ptr + n, -beta * w, ok & (i < ROWS))
                if g_nll_ptr is not None:
                    w += tl.load(g_nll_ptr + n * g_nll_row, ok, 0.0)
        if SCALE == ROW:
            raw = tl.load(scale_ptr + n * scale_row, ok, 1.0).to(ACC)
            s, log_variance, root = _divisor(raw, lo, hi, PARAM, CLAMP, APPROX)

        nll_sum = tl.zeros([TILES * ROWS, COLS], ACC)
        if SCALE != EVENT:
            g_tau = tl.zeros([TILES * ROWS, COLS], ACC)
        for step in range(steps):
            tile = (part * steps + step) * TILES + i // ROWS
            cols = tile * COLS + tl.arange(0, COLS)[None, :]
            mask = ok if EVEN else ok & (cols < D)
            keep = mask
            if mask_ptr is not None:
                seen = tl.load(mask_ptr + byte_offsets(b * mask_row, cols, mask_col, VEC), mask, 0)
                keep = mask & seen.to(tl.int1)
            half = cols + cols // GROUP * GROUP if GROUP else cols
            if LEVELS:
                x = tl.load(x_ptr + byte_offsets(b * x_row, cols, x_col, VEC), mask, 0).to(ACC)
                if key_ptr is not None:
                    if not LOOP:
                        seed, offset = tl.load(key_ptr), tl.load(key_ptr + 1)
                    u = _uniform(seed, offset, b + first_row, tile, D, COLS, VEC, APPROX)
                    x += u.to(ACC)
                x = x_mul * x + x_add
            else:
                x = tl.load(x_ptr + b * x_row + along(cols, x_col), mask, 0.0)
                x = widen(x, ACC, APPROX)
            mean = tl.load(mean_ptr + n * mean_row + along(half, mean_col), mask, 0.0)
            mean = widen(mean, ACC, APPROX)
            if SCALE == FULL:
                raw = scale_ptr + packed + n * scale_row + along(half, scale_col)
                raw = widen(tl.load(raw, mask, 1.0), ACC, APPROX)
                s, log_variance, root = _divisor(raw, lo, hi, PARAM, CLAMP, APPROX)
            if FORWARD:
                value = element_nll(
                    x, mean, log_variance, root, df, constant, x_mul, x_add,
                    LIKELIHOOD, APPROX,
                )  # fmt: skip
                nll_sum += value if EVEN and mask_ptr is None else tl.where(keep, value, 0.0)
            if GRAD:
                g_x, fall, g_log_tau = element_gradients(
                    w, x, mean, root, df, x_mul, x_add, LIKELIHOOD, APPROX
                )  # fmt: skip
                if mask_ptr is not None:
                    g_x, fall = tl.where(keep, g_x, 0.0), tl.where(keep, fall, 0.0)
                    g_log_tau = tl.where(keep, g_log_tau, 0.0)
                if g_x_ptr is not None:
                    tl.store(g_x_ptr + n * g_x_row + along(cols, g_x_col), g_x, mask)
                if g_mean_ptr is not None:
                    tl.store(g_mean_ptr + n * g_mean_row + along(half, g_mean_col), -fall, mask)
                if SCALE == FULL and g_scale_ptr is not None:
                    g_s = g_log_tau * log_scale_slope(s, PARAM, APPROX)
                    g_s = through_bound(g_s, raw, lo, hi, CLAMP, APPROX)
                    if mask_ptr is not None:
                        g_s = tl.where(keep, g_s, 0.0)
                    g_scale = g_scale_ptr + g_packed + n * g_scale_row + along(half, g_scale_col)
                    tl.store(g_scale, g_s, mask)
                elif SCALE == EVENT:
                    g_tau += tl.where(mask, g_log_tau, 0.0)
                elif SCALE == SCALAR or SCALE == ROW:  # noqa: SIM109
                    g_tau += g_log_tau if EVEN else tl.where(mask, g_log_tau, 0.0)

        if GRAD and SCALE == ROW and g_scale_ptr is not None:
            row_slope = log_scale_slope(s, PARAM, APPROX)
            row_slope = through_bound(row_slope, raw, lo, hi, CLAMP, APPROX)
            g_tau = times_slope(g_tau, row_slope)
        ok = tl.arange(0, ROWS) < N - row0
        n = (row0 + tl.arange(0, ROWS)).to(tl.int64)
        if FORWARD:
            row_nll = _row_sum(nll_sum, ROWS)
            if SPLIT == 1:
                loss += _finish_rows(
                    nll_ptr, loss_ptr, log_q_ptr, log_p_ptr, n, ok, row_nll, beta, ROW_LOSS
                )
            else:
                tl.store(partial_ptr + n * SPLIT + part, row_nll, ok)
        if GRAD and SCALE == ROW and g_scale_ptr is not None:
            tl.store(g_scale_ptr + n * SPLIT + part, _row_sum(g_tau, ROWS), ok)
        if GRAD and SCALE == SCALAR:
            row_g_tau = times_slope(_row_sum(g_tau, ROWS), slope)
            if FORWARD and SPLIT == 1:
                tl.store(g_scale_ptr + n, row_g_tau, ok)
            elif FORWARD:
                tl.store(partial_ptr + (N + n) * SPLIT + part, row_g_tau, ok)
            else:
                g_tau_sum += tl.where(ok, row_g_tau, 0.0)

    if SCALE == EVENT:
        sums = tl.sum(tl.reshape(times_slope(g_tau, slope), (TILES, ROWS, COLS)), 1)
        cols = (part * TILES + tl.arange(0, TILES)[:, None]) * COLS + tl.arange(0, COLS)[None, :]
        tl.store(g_scale_ptr + (pid // SPLIT).to(tl.int64) * D + cols, sums, cols < D)
    if FORWARD and SPLIT > 1:
        # The last program to finish sums every row from its parts.
        if is_last_program(counter_ptr):
            total = tl.zeros([2048 // SPLIT], ACC)
            for start in range(0, N, 2048 // SPLIT):
                n = start + tl.arange(0, 2048 // SPLIT)
                ok = n < N
                parts = n[:, None] * SPLIT + tl.arange(0, SPLIT)[None, :]
                row = tl.load(partial_ptr + parts, ok[:, None], 0.0, cache_modifier=".cg")
                row_nll = tl.sum(row, 1)
                total += _finish_rows(
                    nll_ptr, loss_ptr, log_q_ptr, log_p_ptr, n, ok, row_nll, beta, ROW_LOSS
                )
                if GRAD and SCALE == SCALAR:
                    parts += N * SPLIT
                    row = tl.load(partial_ptr + parts, ok[:, None], 0.0, cache_modifier=".cg")
                    tl.store(g_scale_ptr + n, tl.sum(row, 1), ok)
            if SUM_LOSS:
                tl.store(loss_ptr, weight * tl.sum(total))
    elif FORWARD and SUM_LOSS:
        tl.store(partial_ptr + pid, tl.sum(loss))
        if is_last_program(counter_ptr):
            tl.store(loss_ptr, weight * sum_partials(partial_ptr, tl.num_programs(0), PARTIALS))
    elif not FORWARD and SCALE == SCALAR:
        tl.store(partial_ptr + pid, tl.sum(g_tau_sum))
        if is_last_program(counter_ptr):
            tl.store(g_scale_ptr, sum_partials(partial_ptr, tl.num_programs(0), PARTIALS))


@triton.jit
def _rescale_factor(g_nll_ptr, g_loss_ptr, n, ok, B, g_nll_row, g_loss_row, weight,
                    SAMPLES: tl.constexpr):  # fmt: skip
    """f[n] = g_loss + g_nll/c, by which gradients made for g_loss = 1 grow; and g_loss."""
    g_loss = tl.zeros(n.shape, weight.dtype)
    if g_loss_ptr is not None:
        b = n % B if SAMPLES else n
        g_loss += tl.load(g_loss_ptr + b * g_loss_row, ok, 0.0).to(weight.dtype)
    factor = g_loss
    if g_nll_ptr is not None:
        factor += tl.load(g_nll_ptr + n * g_nll_row, ok, 0.0).to(weight.dtype) / weight
    return factor, g_loss


@triton.jit(do_not_specialize=["N", "B"])
def rescale_kernel(
    g_mean_ptr, g_scale_ptr, g_nll_ptr, g_loss_ptr, g_log_q_ptr, g_log_p_ptr, total_ptr,
    N, B, D, steps, passes, g_mean_row, g_mean_col, g_scale_row, g_scale_col, g_nll_row,
    g_loss_row, beta: tl.float64, weight: tl.float64,
    SHARED: tl.constexpr, SAMPLES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    TILES: tl.constexpr, ALIGN: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Multiply row n of the gradients by f[n] in place; where f = 1 it costs no memory traffic."""
    ACC: tl.constexpr = g_log_q_ptr.dtype.element_ty
    beta = tl.full((), beta, ACC)
    weight = tl.full((), weight, ACC)
    D, g_mean_row = multiple(D, ALIGN), multiple(g_mean_row, ALIGN)
    g_scale_row = multiple(g_scale_row, ALIGN)
    pid = tl.program_id(0)
    part = pid % SPLIT
    i = tl.arange(0, TILES * ROWS)[:, None]
    for trip in range(passes):
        n = ((pid // SPLIT).to(tl.int64) * passes + trip) * ROWS + i % ROWS
        ok = n < N
        factor, g_loss = _rescale_factor(
            g_nll_ptr, g_loss_ptr, n, ok, B, g_nll_row, g_loss_row, weight, SAMPLES
        )
        if part == 0:
            tl.store(g_log_q_ptr + n, beta * weight * g_loss, ok & (i < ROWS))
            tl.store(g_log_p_ptr + n, -beta * weight * g_loss, ok & (i < ROWS))
        if tl.max((ok & (factor != 1.0)).to(tl.int32)) != 0:
            for step in range(steps):
                tile = (part * steps + step) * TILES + i // ROWS
                cols = tile * COLS + tl.arange(0, COLS)[None, :]
                mask = ok & (cols < D)
                address = g_mean_ptr + n * g_mean_row + along(cols, g_mean_col)
                tl.store(address, tl.load(address, mask, 0.0).to(ACC) * factor, mask)
                if g_scale_ptr is not None and not SHARED:
                    address = g_scale_ptr + n * g_scale_row + along(cols, g_scale_col)
                    tl.store(address, tl.load(address, mask, 0.0).to(ACC) * factor, mask)
    # N numbers: not worth a second launch, nor more than one program.
    if SHARED and pid == 0:
        total = tl.zeros([2048], ACC)
        for start in range(0, N, 2048):
            row = start + tl.arange(0, 2048).to(tl.int64)
            row_ok = row < N
            row_factor, _ = _rescale_factor(
                g_nll_ptr, g_loss_ptr, row, row_ok, B, g_nll_row, g_loss_row, weight, SAMPLES
            )
            total += row_factor * tl.load(g_scale_ptr + row, row_ok, 0.0)
        tl.store(total_ptr, tl.sum(total))


def _row_weight(reduction: int, samples: int, batch: int) -> float:
    """c, the weight of one row in the loss."""
    return 1.0 / (samples * batch if reduction == MEAN else samples)


class _Walk:
    """The order in which the event elements of ``mean`` are walked, and of the tensors beside it.

    That order does not matter to a sum, so a channels_last tensor is read as it lies, provided that
    all agree; a tensor that does not is copied into the order of ``mean``.

    Attributes:
        dims: event dimensions from the slowest to the fastest.
        group: channels per half where the two halves of a packed tensor alternate, else 0.
    """

    def __init__(self, mean: Tensor, packed: bool, in_order: bool = False) -> None:
        """``in_order``: the walk is to be the order of the event's elements, as noise is."""
        logical = self.dims = tuple(range(1, mean.dim()))
        self.group = 0
        if in_order or mean.is_contiguous() or self.col(mean, packed) is not None:
            return
        self.dims = tuple(sorted(logical, key=lambda d: -mean.stride(d)))
        if self.col(mean, packed) is not None:
            return
        if packed and self.dims[-1] == 1:
            self.group = mean.shape[1] // 2
            if self.col(mean, packed) is not None:
                return
        # Nothing fits: mean will be copied.
        self.dims, self.group = logical, 0

    def col(self, t: Tensor, packed: bool = False) -> int | None:
        """The one stride that walks the event of ``t`` (a half of it, if packed), or None."""
        halved = 1 if packed and not self.group else None
        sizes = [t.shape[d] // 2 if d == halved else t.shape[d] for d in self.dims]
        return collapse(sizes, [t.stride(d) for d in self.dims])

    @property
    def order(self) -> tuple[int, ...]:
        """All dimensions as they are walked, rows first."""
        return 0, *self.dims

    def rows(self, t: Tensor, packed: bool = False) -> tuple[Tensor, int, int]:
        """``t``, or a copy in place of it, with its row and column strides."""
        col = self.col(t, packed)
        if col is None:
            t = t.permute(self.order).contiguous()
            return t, math.prod(t.shape[1:]), 1
        return t, t.stride(0), col

    def half(self, t: Tensor, given: Tensor) -> int:
        """Offset of the second half of a packed tensor ``t`` that ``rows`` gave for ``given``."""
        d = 1 if t is given else 1 + self.dims.index(1)
        return t.shape[d] // 2 * t.stride(d)


def _loss(
    nll: Tensor, log_q: Tensor | None, log_p: Tensor | None, beta: float, reduction: int, batch: int
) -> Tensor:
    """The loss from finished rows, for the cases that the kernel leaves to PyTorch."""
    if reduction == NO_LOSS:
        return nll.new_empty(0)
    rows = nll.clone()
    if log_q is not None:
        rows += beta * log_q.reshape(-1)
    if log_p is not None:
        rows -= beta * log_p.reshape(-1)
    if batch == 0:
        return {MEAN: rows.mean(), SUM: rows.sum()}.get(reduction, rows)
    rows = rows.view(-1, batch).mean(0)
    return {MEAN: rows.mean(), SUM: rows.sum()}.get(reduction, rows)


def _kind(scale: Tensor | None, mean: Tensor, likelihood: int) -> int:
    """The ``SCALE`` of a tensor: see the schemas for the shapes."""
    if scale is None:
        return ABSENT.value if likelihood in WITHOUT_SCALE else FULL.value
    if scale.dim() == 0:
        return SCALAR.value
    if scale.shape == mean.shape:
        return FULL.value
    return EVENT.value if scale.shape[1:] == mean.shape[1:] else ROW.value


def heaviness(likelihood: int, param: int, clamp: int) -> int:
    """How often a thread's elements must be halved, for the registers that they need."""
    if likelihood in WITHOUT_SCALE:
        return 0
    # A logarithm, an inverse root or a soft clamp of the scale needs as many as all else.
    exponential = param in (LOGVAR.value, LOGSTD.value) and clamp != SOFT.value
    return HEAVY.get(likelihood, 0) + (not exponential)


Spare = tuple[tuple[int, ...], torch.dtype] | None


@dataclass(frozen=True)
class _LikelihoodPlan(Plan):
    """How the kernel reads (x, mean, scale, mask, log_q, log_p, g_nll, g_loss), and what it writes.

    Attributes:
        order: of the dimensions of mean, as they are walked.
        spares: shape and dtype of what ∂x, ∂mean and ∂scale are written to if not to themselves.
    """

    order: tuple[int, ...] = ()
    spares: tuple[Spare, Spare, Spare] = (None, None, None)

    def write(self, *gradients: Tensor | None) -> Sequence[Tensor | None]:
        """Where the kernel writes (∂x, ∂mean, ∂scale)."""
        if not any(self.spares):
            return gradients
        pairs = zip(gradients, self.spares, strict=True)
        return [g if spare is None else g.new_empty(spare[0], dtype=spare[1]) for g, spare in pairs]


def sums_and_most(forward: bool, kind: int, reduction: int) -> tuple[bool, int | None]:
    """``sums`` and ``most`` of ``likelihood_config``: of a pass, a scale and a reduction.

    ``most`` is None where programs leave no parts of a sum.
    """
    scalar = kind == SCALAR.value
    # A loop over rows costs some 3 % on an H200; tens of thousands of parts to sum cost more.
    parts = reduction in (MEAN, SUM) if forward else scalar
    return forward or scalar or kind == ROW.value, 128 if parts else None


@functools.lru_cache(PLANS)
def _plan(
    where: Place, x: Layout, mean: Layout, scale: Layout | None, mask: Layout | None,
    log_q: Layout | None, log_p: Layout | None, g_nll: Layout | None, g_loss: Layout | None,
    g_x: Layout | None, g_mean: Layout | None, g_scale: Layout | None,
    dequantize: bool, wide: bool, reduction: int, likelihood: int, param: int, clamp: int,
    forward: bool, grad: bool, need_scale: bool,
) -> _LikelihoodPlan:  # fmt: skip
    reads = x, mean, scale, mask, log_q, log_p, g_nll, g_loss = tuple(
        map(laid_out, (x, mean, scale, mask, log_q, log_p, g_nll, g_loss))
    )
    g_x, g_mean, g_scale = map(laid_out, (g_x, g_mean, g_scale))
    check_rows("mean", mean)
    n, batch, size = mean.shape[0], x.shape[0], math.prod(x.shape[1:])
    samples = n // batch
    kind = _kind(scale, mean, likelihood)
    packed = scale is None and kind == FULL.value
    full = kind == FULL.value and not packed
    row, event = kind == ROW.value, kind == EVENT.value
    summed = event and grad and need_scale  # else an event is read as a full scale of equal rows
    acc = accumulation(mean)

    walk = _Walk(mean, packed, in_order=dequantize)
    x_in, x_row, x_col = walk.rows(x)
    mean_in, mean_row, mean_col = walk.rows(mean, packed)
    offset = g_offset = scale_row = scale_col = 0
    scale_in = scale
    if packed:
        scale_row, scale_col = mean_row, mean_col
        offset = walk.half(mean_in, mean)
    elif full:
        scale_in, scale_row, scale_col = walk.rows(scale)
    elif event:
        scale_in, _, scale_col = walk.rows(scale)
    elif row:
        scale_row = scale.stride(0)
    mask_in, mask_row, mask_col = (None, 0, 0) if mask is None else walk.rows(mask)
    g_nll_in, g_nll_row = (None, 0) if g_nll is None else row_stride(g_nll)
    by_row = g_loss is not None and reduction == NONE
    g_loss_in, g_loss_row = row_stride(g_loss) if by_row else (g_loss, 0)
    # Per-row terms may be one sample's, expanded.
    log_q_in, log_p_in = (None if t is None else t.contiguous() for t in (log_q, log_p))

    # Levels of one byte do not make the vectors longer; noise comes in quads at the least.
    floats = [t for t in (x, mean, scale) if t is not None and t.is_floating_point()]
    itemsize = min(t.element_size() for t in floats)
    heavy = heaviness(likelihood, param, clamp)
    rows = [x_row, mean_row, mask_row, offset, 0 if row else scale_row]
    if dequantize and itemsize == 8:
        itemsize, heavy = 4, heavy + 1
    align = alignment(16 // itemsize, size, *rows)
    sums, most = sums_and_most(forward, kind, reduction)
    config = likelihood_config(
        n, size, itemsize, align, where.sms, where.warp, heavy, summed, sums, most, grad
    )
    split = config.split

    spare_x = spare_mean = spare_scale = None
    g_x_row = g_x_col = g_mean_row = g_mean_col = g_scale_row = g_scale_col = 0
    if g_mean is not None:
        to, g_mean_row, g_mean_col = walk.rows(g_mean, packed)
        spare_mean = None if to is g_mean else (tuple(to.shape), to.dtype)
        if packed:
            g_scale_row, g_scale_col = g_mean_row, g_mean_col
            g_offset = walk.half(to, g_mean)
    if full and g_scale is not None:
        to, g_scale_row, g_scale_col = walk.rows(g_scale)
        spare_scale = None if to is g_scale else (tuple(to.shape), to.dtype)
    elif row and split > 1 and g_scale is not None:
        spare_scale = (n, split), acc
    elif summed:
        spare_scale = (config.programs // split, size), acc
    if g_x is not None:
        to, g_x_row, g_x_col = walk.rows(g_x)
        spare_x = None if to is g_x else (tuple(to.shape), to.dtype)
        if samples > 1:  # each sample's on its own; their sum follows
            spare_x, g_x_row, g_x_col = ((n, size), acc), size, 1

    # With several samples and no reduction, the mean over k is taken from the finished rows.
    row_loss = forward and reduction == NONE and samples == 1
    partials = None
    if most or (forward and split > 1):
        partials = max(config.programs, 2 * n * split if split > 1 else 0)
    launch = Launch(
        where,
        config.programs,
        (
            n, batch, size, config.steps, config.passes, x_row, x_col, mean_row, mean_col,
            scale_row, scale_col, mask_row, mask_col, g_x_row, g_x_col, g_mean_row, g_mean_col,
            g_scale_row, g_scale_col, g_nll_row, g_loss_row, offset, g_offset,
        ),
        {
            "LIKELIHOOD": likelihood, "PARAM": param, "CLAMP": clamp,
            "SCALE": FULL.value if event and not summed else kind, "GROUP": walk.group,
            "SAMPLES": samples > 1, "FORWARD": forward, "GRAD": grad, "ROW_LOSS": row_loss,
            "SUM_LOSS": forward and reduction in (MEAN, SUM),
            "ROWS": config.rows, "COLS": config.cols, "TILES": config.tiles, "VEC": config.vec,
            "ALIGN": math.gcd(align, g_x_row, g_mean_row, g_scale_row, g_offset),
            "SPLIT": split, "EVEN": config.even, "APPROX": approximation(where, mean, scale),
        },
        config.num_warps,
        registers=128,
    )  # fmt: skip
    taken = x_in, mean_in, scale_in, mask_in, log_q_in, log_p_in, g_nll_in, g_loss_in
    copied = copies(reads, taken, [walk.order] * 4 + [None] * 4)
    spares = spare_x, spare_mean, spare_scale
    return _LikelihoodPlan(launch, copied, partials, walk.order, spares)


def _launch(
    x: Tensor, mean: Tensor, scale: Tensor | None, mask: Tensor | None,
    log_q: Tensor | None, log_p: Tensor | None, g_nll: Tensor | None, g_loss: Tensor | None,
    beta: float, reduction: int, likelihood: int, param: int, lo: float, hi: float, soft: bool,
    df: float, x_mul: float, x_add: float, key: Tensor | None, first_row: int,
    *, forward: bool, grad: bool, need_x: bool = False, need_mean: bool = True,
    need_scale: bool = True, g_mean: Tensor | None = None, g_scale: Tensor | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Run the kernel; returns nll, loss, g_x, g_mean, g_scale, g_log_q, g_log_p."""
    n, batch = mean.shape[0], x.shape[0]
    samples = n // batch if batch else 1
    kind = _kind(scale, mean, likelihood)
    acc = accumulation(mean)
    nll = loss = g_x = g_log_q = g_log_p = None
    if forward:
        nll = mean.new_empty(n, dtype=acc)
        if reduction in (MEAN, SUM):
            loss = mean.new_empty((), dtype=acc)
        elif reduction == NONE and samples == 1:
            loss = torch.empty_like(nll)
    else:
        g_log_q = mean.new_empty(n, dtype=acc)
        g_log_p = torch.empty_like(g_log_q)
    if grad:
        if need_mean and g_mean is None:
            g_mean = torch.empty_like(mean)
        g_x = torch.empty_like(x) if need_x else None
        if kind == SCALAR.value:
            g_scale = torch.empty_like(nll if forward else scale)
        elif scale is not None and need_scale and g_scale is None:
            g_scale = torch.empty_like(scale)
    if n == 0:
        loss = _loss(nll, log_q, log_p, beta, reduction, batch) if forward else None
        if g_scale is not None:
            g_scale.zero_()
        return nll, loss, g_x, g_mean, g_scale, g_log_q, g_log_p

    where = place(mean)
    reads = x, mean, scale, mask, log_q, log_p, g_nll, None if reduction == NO_LOSS else g_loss
    gradients = g_x, g_mean, g_scale
    clamp, dequantize = clamp_code(lo, hi, soft), key is not None
    plan = _plan(
        where, *map(layout, reads), *map(layout, gradients), dequantize, is_wide(first_row),
        reduction, likelihood, param, clamp, forward, grad, need_scale,
    )  # fmt: skip
    name = "forward with gradients" if forward and grad else "forward" if forward else "backward"
    with on_device(where, f"likelihood {name}"):
        x_in, mean_in, scale_in, *others = plan.read(*reads)
        out_x, out_mean, out_scale = plan.write(*gradients)
        if scale is None and kind == FULL.value:  # packed
            scale_in, out_scale = mean_in, out_mean
        tensors = (
            x_in, mean_in, scale_in, *others, key.contiguous() if dequantize else None,
            nll, loss, out_x, out_mean, out_scale, g_log_q, g_log_p, *plan.scratch(mean),
        )  # fmt: skip
        plan.launch(
            likelihood_kernel, tensors, first_row, beta, _row_weight(reduction, samples, batch),
            lo, hi, df, student_t_constant(df), x_mul, x_add,
        )  # fmt: skip
    if any(plan.spares):
        spare_x, spare_mean, spare_scale = plan.spares
        event = [x.shape[d] for d in plan.order[1:]]
        if spare_mean:
            g_mean.permute(plan.order).copy_(out_mean)
        if spare_scale and kind == ROW.value:
            g_scale.copy_(out_scale.sum(1).view(g_scale.shape))
        elif spare_scale:
            if kind != FULL.value:
                out_scale = out_scale.sum(0).view(1, *event)
            g_scale.permute(plan.order).copy_(out_scale)
        if spare_x:
            if samples > 1:
                out_x = out_x.view(samples, batch, *event).sum(0)
            g_x.permute(plan.order).copy_(out_x)
    if forward and loss is None:
        loss = _loss(nll, log_q, log_p, beta, reduction, batch)
    return nll, loss, g_x, g_mean, g_scale, g_log_q, g_log_p


def likelihood_forward(
    x: Tensor, mean: Tensor, scale: Tensor | None, mask: Tensor | None,
    log_q: Tensor | None, log_p: Tensor | None, beta: float, reduction: int, *model: object,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Give nll (N,), and the finished loss of the rows nll + β(log q - log p)."""
    nll, loss, *_ = _launch(
        x, mean, scale, mask, log_q, log_p, None, None, beta, reduction, *model,
        forward=True, grad=False,
    )  # fmt: skip
    return nll, loss


def likelihood_backward(
    g_nll: Tensor | None, g_loss: Tensor | None,
    x: Tensor, mean: Tensor, scale: Tensor | None, mask: Tensor | None,
    beta: float, reduction: int, *model_and_needs: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """∂x, ∂mean and ∂scale (each empty unless needed), ∂log q and ∂log p (N,)."""
    *model, need_x, need_mean, need_scale = model_and_needs
    _, _, g_x, g_mean, g_scale, g_log_q, g_log_p = _launch(
        x, mean, scale, mask, None, None, g_nll, g_loss, beta, reduction, *model,
        forward=False, grad=True, need_x=need_x, need_mean=need_mean, need_scale=need_scale,
    )  # fmt: skip
    g_mean = mean.new_empty(0) if g_mean is None else g_mean
    if g_scale is None or not need_scale:
        g_scale = (mean if scale is None else scale).new_empty(0)
    return x.new_empty(0) if g_x is None else g_x, g_mean, g_scale, g_log_q, g_log_p


def likelihood_forward_grad_(
    x: Tensor, mean: Tensor, scale: Tensor | None, mask: Tensor | None,
    log_q: Tensor | None, log_p: Tensor | None, beta: float, reduction: int,
    *model_and_gradients: object,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Give nll and loss, and write ∂mean and ∂scale, perhaps over ``mean`` and ``scale``.

    Without ``g_scale``, ∂scale is not wanted; but of a scalar scale, each row's part of it is
    returned (else empty).
    """
    *model, g_mean, g_scale = model_and_gradients
    nll, loss, _, _, g_scale, _, _ = _launch(
        x, mean, scale, mask, log_q, log_p, None, None, beta, reduction, *model,
        forward=True, grad=True, need_scale=g_scale is not None, g_mean=g_mean, g_scale=g_scale,
    )  # fmt: skip
    scalar = scale is not None and scale.dim() == 0
    return nll, loss, g_scale if scalar else nll.new_empty(0)


@functools.lru_cache(PLANS)
def _rescale_plan(
    where: Place, g_mean: Layout, g_scale: Layout | None, g_shared: Layout | None,
    g_nll: Layout | None, g_loss: Layout | None, reduction: int, samples: int, batch: int,
) -> Plan:  # fmt: skip
    """How likelihood_rescale_ reads (g_mean, g_scale, g_shared, g_nll, g_loss)."""
    reads = g_mean, g_scale, g_shared, g_nll, g_loss = tuple(
        map(laid_out, (g_mean, g_scale, g_shared, g_nll, g_loss))
    )
    check_rows("mean", g_mean)
    n, size = g_mean.shape[0], math.prod(g_mean.shape[1:])
    walks = [None if g is None else _Walk(g, False) for g in (g_mean, g_scale)]
    (mean_in, g_mean_row, g_mean_col), (scale_in, g_scale_row, g_scale_col) = (
        (None, 0, 0) if walk is None else walk.rows(g)
        for g, walk in zip((g_mean, g_scale), walks, strict=True)
    )
    g_nll_in, g_nll_row = (None, 0) if g_nll is None else row_stride(g_nll)
    by_row = g_loss is not None and reduction == NONE
    g_loss_in, g_loss_row = row_stride(g_loss) if by_row else (g_loss, 0)
    itemsize = g_mean.element_size()
    align = alignment(16 // itemsize, size, g_mean_row, g_scale_row)
    config = likelihood_config(n, size, itemsize, align, where.sms, where.warp, grad=True)
    launch = Launch(
        where,
        config.programs,
        (
            n, batch, size, config.steps, config.passes, g_mean_row, g_mean_col, g_scale_row,
            g_scale_col, g_nll_row, g_loss_row,
        ),
        {
            "SHARED": g_shared is not None, "SAMPLES": samples > 1, "ROWS": config.rows,
            "COLS": config.cols, "TILES": config.tiles, "ALIGN": align, "SPLIT": config.split,
        },
        config.num_warps,
    )  # fmt: skip
    taken = mean_in, scale_in, g_shared, g_nll_in, g_loss_in
    orders = [None if walk is None else walk.order for walk in walks] + [None] * 3
    return Plan(launch, copies(reads, taken, orders))


def likelihood_rescale_(
    g_mean: Tensor, g_scale: Tensor | None, g_shared: Tensor | None,
    g_nll: Tensor | None, g_loss: Tensor | None,
    beta: float, reduction: int, num_samples: int, batch: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Scale gradients made for ∂loss = 1 by the true ones, in place; free where that is 1.

    Returns ∂log q and ∂log p (N,), and the summed gradient of a scalar scale (else empty).
    """
    n, acc = g_mean.shape[0], accumulation(g_mean)
    g_log_q = g_mean.new_empty(n, dtype=acc)
    g_log_p = torch.empty_like(g_log_q)
    total = g_mean.new_empty(0 if g_shared is None else (), dtype=acc)
    if n == 0:
        return g_log_q, g_log_p, total.zero_()

    where = place(g_mean)
    reads = g_mean, g_scale, g_shared, g_nll, None if reduction == NO_LOSS else g_loss
    plan = _rescale_plan(where, *map(layout, reads), reduction, num_samples, batch)
    with on_device(where, "likelihood rescale"):
        out_mean, out_scale, _, g_nll, g_loss = plan.read(*reads)
        scales = out_scale if g_shared is None else g_shared
        tensors = out_mean, scales, g_nll, g_loss, g_log_q, g_log_p, total
        plan.launch(rescale_kernel, tensors, beta, _row_weight(reduction, num_samples, batch))
    for g, out, i in ((g_mean, out_mean, 0), (g_scale, out_scale, 1)):
        if i in plan.copied:
            g.permute(plan.copied[i]).copy_(out)
    return g_log_q, g_log_p, total
