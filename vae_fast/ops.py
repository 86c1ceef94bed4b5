"""The torch ops of the passes: schemas, fake kernels and autograd.

All ops live in the namespace ``vae_fast`` and are pure: noise comes in through a key, and only ops
whose name ends in an underscore write to an argument. Their device code is registered by the
backends (see :mod:`vae_fast.backends`): C++ for the CPU, Triton for CUDA and ROCm.

Conventions, for batch size B, K samples, N = K·B rows with row n = k·B + b:

* ``param``, ``reduction`` and ``likelihood`` are the indices of :data:`PARAMS`,
  :data:`REDUCTIONS` and :data:`LIKELIHOODS`;
* ``lo`` and ``hi`` clamp the raw scale parameter (−inf and inf when unused), smoothly if ``soft``;
* ``num_samples`` = 0 stands for one sample and no sample axis;
* the latent's ``scale`` is 0-dim or of mu's shape; the likelihood's also (N, 1, ...), one value a
  row, or (1, *event), one event shared by the rows. Its gradient has its shape;
* ``scale`` = None means that ``mean`` is packed: its dimension 1 holds the mean, then the scale; or
  that the likelihood has no scale (:data:`WITHOUT_SCALE`);
* ``df`` are Student's degrees of freedom; a uint8 ``x`` stands for x_mul·x + x_add, and for
  x_mul·(x + u) + x_add with a dequantization ``key``, u its uniform noise for row first_row + b;
* an output that is not wanted is an empty tensor.

torch.compile keeps compiled graphs on disk, and they know an op by its name: an op whose arguments
or meaning change after a release gets a new one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

PARAMS = ("logvar", "logstd", "std", "var", "softplus")
REDUCTIONS = ("mean", "sum", "none")
NO_LOSS = len(REDUCTIONS)
# squared_error, ½(x − m)², is what the maximum-likelihood variance is made from.
LIKELIHOODS = ("gaussian", "laplace", "bernoulli", "logistic", "student_t", "squared_error")
WITHOUT_SCALE = tuple(map(LIKELIHOODS.index, ("bernoulli", "squared_error")))

_LIBRARY = torch.library.Library("vae_fast", "DEF")

_LATENT_ARGS = (
    "SymInt num_samples, SymInt first_row, int param, float lo, float hi, bool soft, bool path"
)
_MODEL_ARGS = (
    "int likelihood, int param, float lo, float hi, bool soft, float df, float x_mul, float x_add, "
    "Tensor? key, SymInt first_row"
)
_LIKELIHOOD_ARGS = (
    f"Tensor? mask, Tensor? log_q, Tensor? log_p, float beta, int reduction, {_MODEL_ARGS}"
)
_KL_ARGS = (
    "Tensor mu, Tensor scale, Tensor? prior_mu, Tensor? prior_scale, int param, int prior_param, "
    "float lo, float hi, bool soft"
)
SCHEMAS = {
    # With ``path``, log q depends on mu and scale through z alone: its derivative leaves out the
    # score function.
    "latent_forward": (
        f"(Tensor mu, Tensor scale, Tensor key, {_LATENT_ARGS}) "
        "-> (Tensor z, Tensor log_q, Tensor log_p)"
    ),
    "latent_backward": (
        "(Tensor? g_z, Tensor? g_log_q, Tensor? g_log_p, Tensor mu, Tensor scale, Tensor key, "
        f"{_LATENT_ARGS}) -> (Tensor g_mu, Tensor g_scale)"
    ),
    "likelihood_forward": (
        f"(Tensor x, Tensor mean, Tensor? scale, {_LIKELIHOOD_ARGS}) -> (Tensor nll, Tensor loss)"
    ),
    "likelihood_backward": (
        "(Tensor? g_nll, Tensor? g_loss, Tensor x, Tensor mean, Tensor? scale, Tensor? mask, "
        f"float beta, int reduction, {_MODEL_ARGS}, bool need_x, bool need_mean, bool need_scale) "
        "-> (Tensor g_x, Tensor g_mean, Tensor g_scale, Tensor g_log_q, Tensor g_log_p)"
    ),
    # The forward that also writes the gradients for ∂loss = 1 into g_mean and a full g_scale, which
    # may be the memory of mean and scale themselves; without g_scale, a full scale's is not wanted.
    # A 0-dim scale's gradient comes back as per-row shares (N,), which likelihood_rescale_ sums.
    "likelihood_forward_grad_": (
        f"(Tensor x, Tensor mean, Tensor? scale, {_LIKELIHOOD_ARGS}, "
        "Tensor(a!) g_mean, Tensor(b!)? g_scale) -> (Tensor nll, Tensor loss, Tensor g_shared)"
    ),
    # The same without writing to an argument: where somebody watches the dispatcher, selective
    # checkpointing say, who may keep an op's results and not run it again.
    "likelihood_forward_grad": (
        f"(Tensor x, Tensor mean, Tensor? scale, {_LIKELIHOOD_ARGS}, bool need_scale) "
        "-> (Tensor nll, Tensor loss, Tensor g_shared, Tensor g_mean, Tensor g_scale)"
    ),
    # Turns those gradients into the ones for the actual upstream gradients, row by row; free when
    # the upstream gradient is the one of a plain loss.backward().
    "likelihood_rescale_": (
        "(Tensor(a!) g_mean, Tensor(b!)? g_scale, Tensor? g_shared, Tensor? g_nll, "
        "Tensor? g_loss, float beta, int reduction, SymInt num_samples, SymInt batch) "
        "-> (Tensor g_log_q, Tensor g_log_p, Tensor g_scalar)"
    ),
    # The same without writing to an argument, and for batched gradients, which no kernel takes.
    "likelihood_rescale": (
        "(Tensor g_mean, Tensor? g_scale, Tensor? g_shared, Tensor? g_nll, Tensor? g_loss, "
        "float beta, int reduction, SymInt num_samples, SymInt batch) "
        "-> (Tensor g_mean, Tensor g_scale, Tensor g_log_q, Tensor g_log_p, Tensor g_scalar)"
    ),
    # KL(q‖p) of two diagonal Gaussians, per row; a standard normal prior if none is given. All
    # tensors have mu's shape, and so have the gradients (empty for an absent prior), each in its
    # tensor's memory order.
    "gaussian_kl_forward": f"({_KL_ARGS}) -> Tensor kl",
    "gaussian_kl_backward": (
        f"(Tensor g_kl, {_KL_ARGS}) "
        "-> (Tensor g_mu, Tensor g_scale, Tensor g_prior_mu, Tensor g_prior_scale)"
    ),
    # From nll (N,), and log_q and log_p (K, B), the rows' importance-weighted bound
    # −log mean_k e^(−t) of t = nll + β(log q − log p), (B,), and the weights softmax_k(−t), (K, B).
    "importance_forward": (
        "(Tensor nll, Tensor log_q, Tensor? log_p, float beta) -> (Tensor bound, Tensor weights)"
    ),
    "importance_backward": (
        "(Tensor g_bound, Tensor weights, float beta) "
        "-> (Tensor g_nll, Tensor g_log_q, Tensor g_log_p)"
    ),
    # Raises that this op has no derivative; a 0-dim tensor like ``like``, for who only traces.
    "no_derivative": "(Tensor like, str op) -> Tensor",
}
for _name, _schema in SCHEMAS.items():
    _LIBRARY.define(_name + _schema, tags=(torch.Tag.needs_exact_strides,))

_OPS = torch.ops.vae_fast
latent_forward = _OPS.latent_forward.default
latent_backward = _OPS.latent_backward.default
likelihood_forward = _OPS.likelihood_forward.default
likelihood_backward = _OPS.likelihood_backward.default
likelihood_forward_grad = _OPS.likelihood_forward_grad.default
likelihood_forward_grad_ = _OPS.likelihood_forward_grad_.default
likelihood_rescale_ = _OPS.likelihood_rescale_.default
likelihood_rescale = _OPS.likelihood_rescale.default
gaussian_kl_forward = _OPS.gaussian_kl_forward.default
gaussian_kl_backward = _OPS.gaussian_kl_backward.default
importance_forward = _OPS.importance_forward.default
importance_backward = _OPS.importance_backward.default
no_derivative = _OPS.no_derivative.default


def accumulation_dtype(t: Tensor) -> torch.dtype:
    """The dtype of arithmetic and per-row results: fp64 for fp64 tensors, fp32 for all others."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


# ---- fake kernels --------------------------------------------------------------------------


@torch.library.register_fake("vae_fast::latent_forward", lib=_LIBRARY)
def _(mu, scale, key, num_samples, *options):
    samples = (num_samples,) if num_samples else ()
    rows = mu.new_empty((*samples, mu.shape[0]), dtype=accumulation_dtype(mu))
    return mu.new_empty((*samples, *mu.shape)), rows, torch.empty_like(rows)


@torch.library.register_fake("vae_fast::latent_backward", lib=_LIBRARY)
def _(g_z, g_log_q, g_log_p, mu, scale, *options):
    return mu.new_empty(mu.shape), scale.new_empty(scale.shape)


def _fake_rows(x, mean, reduction):
    acc = accumulation_dtype(mean)
    nll = mean.new_empty((mean.shape[0],), dtype=acc)
    shape = {0: (), 1: (), 2: (x.shape[0],), NO_LOSS: (0,)}[reduction]
    return nll, mean.new_empty(shape, dtype=acc)


def _fake_shares(mean, scale):
    rows = mean.shape[0] if scale is not None and scale.dim() == 0 else 0
    return (mean.new_empty((rows,), dtype=accumulation_dtype(mean)),)


@torch.library.register_fake("vae_fast::likelihood_forward", lib=_LIBRARY)
def _(x, mean, scale, mask, log_q, log_p, beta, reduction, *model):
    return _fake_rows(x, mean, reduction)


@torch.library.register_fake("vae_fast::likelihood_backward", lib=_LIBRARY)
def _(g_nll, g_loss, x, mean, scale, mask, beta, reduction, *model_and_needs):
    def gradient(needed, t):
        return torch.empty_like(t) if needed else t.new_empty((0,))

    *_, need_x, need_mean, need_scale = model_and_needs
    g_scale = mean.new_empty((0,)) if scale is None else gradient(need_scale, scale)
    rows = mean.new_empty((mean.shape[0],), dtype=accumulation_dtype(mean))
    return gradient(need_x, x), gradient(need_mean, mean), g_scale, rows, torch.empty_like(rows)


@torch.library.register_fake("vae_fast::likelihood_forward_grad_", lib=_LIBRARY)
def _(x, mean, scale, mask, log_q, log_p, beta, reduction, *model_and_gradients):
    return _fake_rows(x, mean, reduction) + _fake_shares(mean, scale)


@torch.library.register_fake("vae_fast::likelihood_forward_grad", lib=_LIBRARY)
def _(x, mean, scale, mask, log_q, log_p, beta, reduction, *model_and_need):
    g_scale = torch.empty_like(scale) if model_and_need[-1] else mean.new_empty((0,))
    rows = _fake_rows(x, mean, reduction) + _fake_shares(mean, scale)
    return *rows, torch.empty_like(mean), g_scale


@torch.library.register_fake("vae_fast::likelihood_rescale_", lib=_LIBRARY)
def _(g_mean, g_scale, g_shared, g_nll, g_loss, beta, reduction, num_samples, batch):
    rows = g_mean.new_empty((num_samples * batch,), dtype=accumulation_dtype(g_mean))
    return rows, torch.empty_like(rows), rows.new_empty((0,) if g_shared is None else ())


@torch.library.register_fake("vae_fast::gaussian_kl_forward", lib=_LIBRARY)
def _(mu, *args):
    return mu.new_empty((mu.shape[0],), dtype=accumulation_dtype(mu))


@torch.library.register_fake("vae_fast::gaussian_kl_backward", lib=_LIBRARY)
def _(g_kl, mu, scale, prior_mu, prior_scale, *options):
    def gradient(t):
        return mu.new_empty((0,)) if t is None else torch.empty_like(t)

    return gradient(mu), gradient(scale), gradient(prior_mu), gradient(prior_scale)


@torch.library.register_fake("vae_fast::importance_forward", lib=_LIBRARY)
def _(nll, log_q, log_p, beta):
    return nll.new_empty((log_q.shape[1],)), nll.new_empty(log_q.shape)


@torch.library.register_fake("vae_fast::importance_backward", lib=_LIBRARY)
def _(g_bound, weights, beta):
    g_nll = weights.new_empty((weights.shape[0] * weights.shape[1],))
    return g_nll, weights.new_empty(weights.shape), weights.new_empty(weights.shape)


def _likelihood_forward_grad(x, mean, scale, *args):
    *args, need_scale = args
    g_mean, g_scale = torch.empty_like(mean), torch.empty_like(scale) if need_scale else None
    rows = likelihood_forward_grad_(x, mean, scale, *args, g_mean, g_scale)
    return *rows, g_mean, g_scale if need_scale else mean.new_empty((0,))


def _likelihood_rescale(
    g_mean, g_scale, g_shared, g_nll, g_loss, beta, reduction, num_samples, batch
):
    rows = num_samples * batch
    weight = 1.0 / max(rows if REDUCTIONS[reduction] == "mean" else num_samples, 1)
    acc = accumulation_dtype(g_mean)
    if g_loss is None:
        g_loss = g_mean.new_zeros((), dtype=acc)
    g_loss = g_loss.expand(num_samples, batch).reshape(rows)
    factor = g_loss if g_nll is None else g_loss + g_nll / weight

    def rescaled(g):
        if g is None:
            return g_mean.new_empty((0,))
        return (g.to(acc) * factor.view(rows, *(1,) * (g.dim() - 1))).to(g.dtype)

    g_log_q = beta * weight * g_loss
    g_scalar = g_mean.new_empty((0,)) if g_shared is None else (factor * g_shared).sum()
    return rescaled(g_mean), rescaled(g_scale), g_log_q, -g_log_q, g_scalar


_LIBRARY.impl("likelihood_forward_grad", _likelihood_forward_grad, "CompositeExplicitAutograd")
_LIBRARY.impl("likelihood_rescale", _likelihood_rescale, "CompositeImplicitAutograd")


def _importance_backward(g_bound, weights, beta):
    g = weights * g_bound
    g_log_q = g * beta
    return g.flatten(), g_log_q, -g_log_q


# A handful of values a row: plain PyTorch, the same for every backend.
_LIBRARY.impl("importance_backward", _importance_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("vae_fast::no_derivative", lib=_LIBRARY)
def _(like, op):
    return like.new_empty(())


def _no_derivative(like, op):
    raise NotImplementedError(
        f"vae_fast::{op} has no derivative: double backward is not supported by the fused kernels; "
        'differentiate the reference instead (vae_fast.use_backend("reference"))'
    )


_LIBRARY.impl("no_derivative", _no_derivative, "CompositeExplicitAutograd")


# ---- autograd --------------------------------------------------------------------------------


def _setup_latent(ctx, inputs, output):
    mu, scale, key, *ctx.options = inputs
    ctx.save_for_backward(mu, scale, key)
    ctx.set_materialize_grads(False)


def _differentiate_latent(ctx, g_z, g_log_q, g_log_p):
    if g_z is None and g_log_q is None and g_log_p is None:
        return (None,) * 10
    mu, scale, key = ctx.saved_tensors
    g_mu, g_scale = latent_backward(g_z, g_log_q, g_log_p, mu, scale, key, *ctx.options)
    return g_mu, g_scale, *(None,) * 8


def _setup_likelihood(ctx, inputs, output):
    x, mean, scale, mask, log_q, log_p, *options = inputs
    *head, key, first_row = options
    ctx.save_for_backward(x, mean, scale, mask, key)
    ctx.options = head, first_row
    ctx.rows = None if log_q is None else log_q.shape
    ctx.has_log_p = log_p is not None
    ctx.set_materialize_grads(False)


def _differentiate_likelihood(ctx, g_nll, g_loss, saved=None):
    if g_nll is None and g_loss is None:
        return (None,) * 18
    x, mean, scale, mask, key = ctx.saved_tensors if saved is None else saved
    head, first_row = ctx.options
    needs = need_x, need_mean, need_scale = ctx.needs_input_grad[:3]
    g_x, g_mean, g_scale, g_log_q, g_log_p = likelihood_backward(
        g_nll, g_loss, x, mean, scale, mask, *head, key, first_row, *needs
    )
    return (
        g_x if need_x else None,
        g_mean if need_mean else None,
        g_scale if need_scale else None,
        None,
        None if ctx.rows is None else g_log_q.view(ctx.rows),
        g_log_p.view(ctx.rows) if ctx.has_log_p else None,
        *(None,) * 12,
    )


def _setup_kl(ctx, inputs, output):
    *tensors, ctx.param, ctx.prior_param, ctx.lo, ctx.hi, ctx.soft = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_kl(ctx, g_kl, saved=None):
    tensors = ctx.saved_tensors if saved is None else saved
    options = ctx.param, ctx.prior_param, ctx.lo, ctx.hi, ctx.soft
    gradients = gaussian_kl_backward(g_kl, *tensors, *options)
    given = (None if t is None else g for t, g in zip(tensors, gradients, strict=True))
    return *given, *(None,) * 5


def _setup_importance(ctx, inputs, output):
    ctx.beta, ctx.has_log_p = inputs[3], inputs[2] is not None
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # zeros for the weights, which have none


def _differentiate_importance(ctx, g_bound, _, saved=None):
    if g_bound is None:
        return (None,) * 4
    (weights,) = ctx.saved_tensors if saved is None else saved
    g_nll, g_log_q, g_log_p = importance_backward(g_bound, weights, ctx.beta)
    return g_nll, g_log_q, g_log_p if ctx.has_log_p else None, None


#: The kernels below by op, for eager.cpp, which takes their place where there is nothing to record.
#: A set of dispatch keys is a number there.
AUTOGRAD: dict[str, Callable] = {}
_KeySet = torch._C.DispatchKeySet


def _register_autograd(name: str, setup: Callable, differentiate: Callable) -> None:
    """``torch.library.register_autograd``, for the transforms of ``torch.func`` as well.

    They call an op's autograd kernel once for each level, as they do a built-in op's. The public
    registration makes the same kernel out of a Function that refuses to be called within them; here
    it is what the transforms themselves make of a Function, of a single level.
    """
    op = getattr(_OPS, name).default
    below, after = torch._C._AutoDispatchBelowAutograd, torch._C._after_autograd_keyset

    def forward(ctx, *args):
        *args, keyset = args
        # A Function's forward is without gradients, but the next level of a transform has its own.
        with below(), torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            output = op.redispatch(keyset & after, *args)
        setup(ctx, args, output)
        return output

    def backward(ctx, *grads):
        return *differentiate(ctx, *grads), None

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    apply = type(f"vae_fast_{name}", (_SingleLevelFunction,), members).apply

    def autograd(keyset, *args):
        if forward_ad._current_level >= 0:
            _refuse_tangents(name, args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            with enable_single_level_autograd_function():
                return apply(*args, keyset)
        with below():
            return op.redispatch(keyset & after, *args)

    _LIBRARY.impl(name, autograd, "Autograd", with_keyset=True)
    AUTOGRAD[name] = lambda keys, *args: autograd(_KeySet.from_raw_repr(keys), *args)


def _refuse_tangents(name: str, args: tuple) -> None:
    tensors = (a for a in args if isinstance(a, Tensor) and a.is_floating_point())
    if any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(
            f"vae_fast::{name} has no forward-mode derivative (torch.func.jvp, jacfwd, hessian): "
            'differentiate the reference instead (vae_fast.use_backend("reference"))'
        )


def _setup_refusal(ctx, inputs, output):
    ctx.shapes = [a.shape if isinstance(a, Tensor) else None for a in inputs]
    ctx.set_materialize_grads(False)


def _refuse(name, ctx, *grads):
    given = [g for g in grads if g is not None]
    if not given:
        return (None,) * len(ctx.shapes)
    nothing = no_derivative(given[0], name)
    return tuple(None if s is None else nothing.expand(s) for s in ctx.shapes)


_register_autograd("latent_forward", _setup_latent, _differentiate_latent)
_register_autograd("likelihood_forward", _setup_likelihood, _differentiate_likelihood)
_register_autograd("gaussian_kl_forward", _setup_kl, _differentiate_kl)
_register_autograd("importance_forward", _setup_importance, _differentiate_importance)


# A derivative of a derivative is refused when it is computed, not when it is recorded:
# torch.compile records it whether or not it is wanted.
for _name in (
    "latent_backward",
    "likelihood_backward",
    "gaussian_kl_backward",
    "importance_backward",
):
    _register_autograd(_name, _setup_refusal, functools.partial(_refuse, _name))


# ---- vmap ------------------------------------------------------------------------------------


def _register_vmap(name: str) -> None:
    """One call for each element of the batch dimension: every pass is bound by its own memory."""
    op = getattr(_OPS, name).default

    def loop(info, in_dims, *args):
        def element(i):
            return [a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)]

        def batch(outputs):
            return torch.stack(outputs)[: info.batch_size]

        if info.batch_size == 0:  # one element of zeros, for the shapes
            args = [
                a if d is None else a.new_zeros((*a.shape[:d], 1, *a.shape[d + 1 :]))
                for a, d in zip(args, in_dims, strict=True)
            ]
        outputs = [op(*element(i)) for i in range(max(info.batch_size, 1))]
        if isinstance(outputs[0], Tensor):
            return batch(outputs), 0
        return tuple(map(batch, zip(*outputs, strict=True))), (0,) * len(outputs[0])

    torch.library.register_vmap(f"vae_fast::{name}", loop, lib=_LIBRARY)


for _name in SCHEMAS:
    if not _name.endswith("_"):
        _register_vmap(_name)
