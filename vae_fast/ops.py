"""The torch ops of the two passes: schemas, fake kernels and autograd.

All ops live in the namespace ``vae_fast`` and are pure: noise comes in through a key, and only ops
whose name ends in an underscore write to an argument. Their device code is registered by the
backends (see :mod:`vae_fast.backends`): C++ for the CPU, Triton for CUDA and ROCm.

Conventions, for batch size B, K samples, N = K·B rows with row n = k·B + b:

* ``param`` and ``reduction`` are the indices of :data:`PARAMS` and :data:`REDUCTIONS`;
* ``lo`` and ``hi`` clamp the raw scale parameter (−inf and inf when unused);
* ``num_samples`` = 0 stands for one sample and no sample axis;
* ``scale`` = None means that ``mean`` is packed: its dimension 1 holds the mean, then the scale;
* an output that is not wanted is an empty tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

PARAMS = ("logvar", "logstd", "std", "var", "softplus")
REDUCTIONS = ("mean", "sum", "none")
NO_LOSS = len(REDUCTIONS)

_LIBRARY = torch.library.Library("vae_fast", "DEF")

_LIKELIHOOD_ARGS = (
    "Tensor? mask, Tensor? log_q, Tensor? log_p, float beta, int reduction, "
    "int param, float lo, float hi"
)
SCHEMAS = {
    "latent_forward": (
        "(Tensor mu, Tensor scale, Tensor key, int num_samples, int first_row, int param, "
        "float lo, float hi) -> (Tensor z, Tensor log_q, Tensor log_p)"
    ),
    "latent_backward": (
        "(Tensor? g_z, Tensor? g_log_q, Tensor? g_log_p, Tensor mu, Tensor scale, Tensor key, "
        "int num_samples, int first_row, int param, float lo, float hi) "
        "-> (Tensor g_mu, Tensor g_scale)"
    ),
    "likelihood_forward": (
        f"(Tensor x, Tensor mean, Tensor? scale, {_LIKELIHOOD_ARGS}) -> (Tensor nll, Tensor loss)"
    ),
    "likelihood_backward": (
        "(Tensor? g_nll, Tensor? g_loss, Tensor x, Tensor mean, Tensor? scale, Tensor? mask, "
        "float beta, int reduction, int param, float lo, float hi, bool need_x) "
        "-> (Tensor g_x, Tensor g_mean, Tensor g_scale, Tensor g_log_q, Tensor g_log_p)"
    ),
    # The forward that also writes the gradients for ∂loss = 1 into g_mean and a full g_scale, which
    # may be the memory of mean and scale themselves. A 0-dim scale's gradient comes back as per-row
    # shares (N,), which likelihood_rescale_ sums.
    "likelihood_forward_grad": (
        f"(Tensor x, Tensor mean, Tensor? scale, {_LIKELIHOOD_ARGS}, "
        "Tensor(a!) g_mean, Tensor(b!)? g_scale) -> (Tensor nll, Tensor loss, Tensor g_shared)"
    ),
    # Turns those gradients into the ones for the actual upstream gradients, row by row; free when
    # the upstream gradient is the one of a plain loss.backward().
    "likelihood_rescale_": (
        "(Tensor(a!) g_mean, Tensor(b!)? g_scale, Tensor? g_shared, Tensor? g_nll, "
        "Tensor? g_loss, float beta, int reduction, int num_samples, int batch) "
        "-> (Tensor g_log_q, Tensor g_log_p, Tensor g_scalar)"
    ),
}
for _name, _schema in SCHEMAS.items():
    _LIBRARY.define(_name + _schema, tags=(torch.Tag.needs_exact_strides,))

_OPS = torch.ops.vae_fast
latent_forward = _OPS.latent_forward.default
latent_backward = _OPS.latent_backward.default
likelihood_forward = _OPS.likelihood_forward.default
likelihood_backward = _OPS.likelihood_backward.default
likelihood_forward_grad = _OPS.likelihood_forward_grad.default
likelihood_rescale_ = _OPS.likelihood_rescale_.default


def accumulation_dtype(t: Tensor) -> torch.dtype:
    """The dtype of arithmetic and per-row results: fp64 for fp64 tensors, fp32 for all others."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


# ---- fake kernels --------------------------------------------------------------------------


@torch.library.register_fake("vae_fast::latent_forward", lib=_LIBRARY)
def _(mu, scale, key, num_samples, first_row, param, lo, hi):
    samples = (num_samples,) if num_samples else ()
    rows = mu.new_empty((*samples, mu.shape[0]), dtype=accumulation_dtype(mu))
    return mu.new_empty((*samples, *mu.shape)), rows, torch.empty_like(rows)


@torch.library.register_fake("vae_fast::latent_backward", lib=_LIBRARY)
def _(g_z, g_log_q, g_log_p, mu, scale, key, num_samples, first_row, param, lo, hi):
    return mu.new_empty(mu.shape), scale.new_empty(scale.shape)


def _fake_rows(x, mean, reduction):
    acc = accumulation_dtype(mean)
    nll = mean.new_empty((mean.shape[0],), dtype=acc)
    shape = {0: (), 1: (), 2: (x.shape[0],), NO_LOSS: (0,)}[reduction]
    return nll, mean.new_empty(shape, dtype=acc)


@torch.library.register_fake("vae_fast::likelihood_forward", lib=_LIBRARY)
def _(x, mean, scale, mask, log_q, log_p, beta, reduction, param, lo, hi):
    return _fake_rows(x, mean, reduction)


@torch.library.register_fake("vae_fast::likelihood_backward", lib=_LIBRARY)
def _(g_nll, g_loss, x, mean, scale, mask, beta, reduction, param, lo, hi, need_x):
    g_x = torch.empty_like(x) if need_x else x.new_empty((0,))
    if scale is None:
        g_scale = mean.new_empty((0,))
    else:
        g_scale = scale.new_empty(()) if scale.dim() == 0 else torch.empty_like(scale)
    rows = mean.new_empty((mean.shape[0],), dtype=accumulation_dtype(mean))
    return g_x, torch.empty_like(mean), g_scale, rows, torch.empty_like(rows)


@torch.library.register_fake("vae_fast::likelihood_forward_grad", lib=_LIBRARY)
def _(x, mean, scale, mask, log_q, log_p, beta, reduction, param, lo, hi, g_mean, g_scale):
    nll, loss = _fake_rows(x, mean, reduction)
    scalar = scale is not None and scale.dim() == 0
    return nll, loss, torch.empty_like(nll) if scalar else nll.new_empty((0,))


@torch.library.register_fake("vae_fast::likelihood_rescale_", lib=_LIBRARY)
def _(g_mean, g_scale, g_shared, g_nll, g_loss, beta, reduction, num_samples, batch):
    rows = g_mean.new_empty((num_samples * batch,), dtype=accumulation_dtype(g_mean))
    return rows, torch.empty_like(rows), rows.new_empty((0,) if g_shared is None else ())


# ---- autograd --------------------------------------------------------------------------------


def _setup_latent(ctx, inputs, output):
    mu, scale, key, *ctx.options = inputs
    ctx.save_for_backward(mu, scale, key)
    ctx.set_materialize_grads(False)


def _differentiate_latent(ctx, g_z, g_log_q, g_log_p):
    if g_z is None and g_log_q is None and g_log_p is None:
        return (None,) * 8
    mu, scale, key = ctx.saved_tensors
    g_mu, g_scale = latent_backward(g_z, g_log_q, g_log_p, mu, scale, key, *ctx.options)
    return g_mu, g_scale, None, None, None, None, None, None


def _setup_likelihood(ctx, inputs, output):
    x, mean, scale, mask, log_q, _, *ctx.options = inputs
    ctx.save_for_backward(x, mean, scale, mask)
    ctx.rows = None if log_q is None else log_q.shape
    ctx.set_materialize_grads(False)


def _differentiate_likelihood(ctx, g_nll, g_loss):
    if g_nll is None and g_loss is None:
        return (None,) * 11
    x, mean, scale, mask = ctx.saved_tensors
    g_x, g_mean, g_scale, g_log_q, g_log_p = likelihood_backward(
        g_nll, g_loss, x, mean, scale, mask, *ctx.options, ctx.needs_input_grad[0]
    )
    return (
        g_x if ctx.needs_input_grad[0] else None,
        g_mean,
        None if scale is None else g_scale,
        None,
        *_latent_terms(ctx.rows, g_log_q, g_log_p),
        *(None,) * 5,
    )


def _latent_terms(rows, g_log_q, g_log_p):
    if rows is None:
        return None, None
    return (g_log_q, g_log_p) if len(rows) == 1 else (g_log_q.view(rows), g_log_p.view(rows))


torch.library.register_autograd(
    "vae_fast::latent_forward", _differentiate_latent, setup_context=_setup_latent, lib=_LIBRARY
)
torch.library.register_autograd(
    "vae_fast::likelihood_forward",
    _differentiate_likelihood,
    setup_context=_setup_likelihood,
    lib=_LIBRARY,
)


def _refuse(name: str):
    def backward(ctx, *grads):
        raise NotImplementedError(
            f"vae_fast::{name} has no derivative: double backward is not supported by the fused "
            'kernels; differentiate the reference instead (vae_fast.use_backend("reference"))'
        )

    return backward


for _name in ("latent_backward", "likelihood_backward"):
    torch.library.register_autograd(f"vae_fast::{_name}", _refuse(_name), lib=_LIBRARY)
