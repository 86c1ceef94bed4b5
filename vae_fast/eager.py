"""Eager calls: the ops' derivatives without the generic machinery.

The autograd registered with the ops (:mod:`vae_fast.ops`) serves torch.compile, functorch and
direct calls. What stands here is its twin for plain eager calls, where the generic Python wrappers
cost more than a small batch's arithmetic: the same set-up and backward as
``torch.autograd.Function``. The ops run below autograd, but saved tensors are read above it, where
checkpointing may have to compute them anew; a second differentiation is refused.

Even that is too much for small batches: ``eager.cpp`` does the same in C++, for the plain cases,
where it can be built.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._ops import _len_torch_dispatch_stack_pre_dispatch
from torch.autograd import forward_ad

from vae_fast import buffers, ops

_shortcut: ModuleType | None = None  # eager.cpp, while fused kernels serve

_PLAIN = Tensor, torch.nn.Parameter
_keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph


def use_shortcut(module: ModuleType | None) -> None:
    """Let plain calls go to ``module`` (``eager.cpp``); ``None`` stops that."""
    global _shortcut
    _shortcut = module


def shortcut() -> ModuleType | None:
    """``eager.cpp``, for plain calls outside of torch.compile."""
    return None if torch.compiler.is_dynamo_compiling() else _shortcut


def suffices() -> bool:
    """Whether a call may go through the functions below, not the ops' registered autograd.

    That alone knows transforms, and forward mode, which it refuses.
    """
    return not (
        torch.compiler.is_compiling()
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_tracing()
    )


def _run(op: Callable[..., Any], *args: object) -> Any:
    """Call an op below autograd; or as it is, where a compiler traces a backward pass."""
    if torch.compiler.is_compiling():
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def writes(*tensors: object) -> bool:
    """Whether a pass may write to these tensors' own memory: nobody else would make sense of it.

    Not for a compiler or a transform, nor where somebody sees, and may change, what PyTorch's
    dispatcher does: a mode, or a tensor of another class; nor where the memory holds the negatives.
    """
    if not suffices():
        return False
    if torch._C._len_torch_dispatch_stack() or _len_torch_dispatch_stack_pre_dispatch():
        return False
    return not any(isinstance(t, Tensor) and (type(t) not in _PLAIN or t.is_neg()) for t in tensors)


def _batched(g: Tensor | None) -> bool:
    """Whether ``torch.autograd.grad(is_grads_batched=True)`` made this gradient."""
    return g is not None and torch._C._functorch.is_legacy_batchedtensor(g)


# ---- autograd ------------------------------------------------------------------------------
#
# The options of an op travel as one tuple: every argument of a Function costs.


def _first_order(backward):
    """Refuse to record a graph of the derivative, which would be wrong: it cannot be complete."""

    def checked(*args):
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "vae_fast: double backward (create_graph=True) is not supported by the fused "
                'kernels; differentiate the reference instead (vae_fast.use_backend("reference"))'
            )
        return backward(*args)

    return checked


class Latent(torch.autograd.Function):
    """``latent_forward`` with its derivative."""

    @staticmethod
    def forward(ctx, mu, scale, key, options):
        ctx.save_for_backward(mu, scale, key)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return _run(ops.latent_forward, mu, scale, key, *options)

    @staticmethod
    @_first_order
    def backward(ctx, g_z, g_log_q, g_log_p):
        if g_z is None and g_log_q is None and g_log_p is None:
            return None, None, None, None
        grads = g_z, g_log_q, g_log_p
        g_mu, g_scale = _run(ops.latent_backward, *grads, *ctx.saved_tensors, *ctx.options)
        return g_mu, g_scale, None, None


class Likelihood(torch.autograd.Function):
    """``likelihood_forward`` with its derivative."""

    @staticmethod
    def forward(ctx, x, mean, scale, mask, log_q, log_p, options):
        args = (x, mean, scale, mask, log_q, log_p, *options)
        output = _run(ops.likelihood_forward, *args)
        ops._setup_likelihood(ctx, args, output)
        return output

    @staticmethod
    @_first_order
    def backward(ctx, *grads):
        saved = ctx.saved_tensors
        return *_run(ops._differentiate_likelihood, ctx, *grads, saved)[:6], None


class LikelihoodGrad(torch.autograd.Function):
    """``likelihood_forward_grad_``: the gradients are written by the forward pass.

    Five data-sized streams instead of eight, and the two gradients are all that is saved. Only for
    losses with one row weight known in advance: reduction mean or sum.
    """

    @staticmethod
    def forward(ctx, x, mean, scale, mask, log_q, log_p, options, inplace):
        full = scale is not None and scale.dim() > 0 and scale.requires_grad
        args = x, mean, scale, mask, log_q, log_p, *options
        if not writes(x, mean, scale, mask, log_q, log_p):
            nll, loss, g_shared, g_mean, g_scale = _run(ops.likelihood_forward_grad, *args, full)
            g_scale = g_scale if full else None
        else:
            if inplace:
                # Detached: autograd refuses to hand back a chunk that was written to.
                with torch._C._AutoDispatchBelowAutograd():
                    g_mean, g_scale = mean.detach(), scale.detach() if full else None
                torch.autograd.graph.increment_version((mean, scale) if full else mean)
            else:
                g_mean = buffers.empty_like(mean)
                g_scale = buffers.empty_like(scale) if full else None
            nll, loss, g_shared = _run(ops.likelihood_forward_grad_, *args, g_mean, g_scale)
        scalar = scale is not None and scale.dim() == 0 and scale.requires_grad
        ctx.save_for_backward(g_mean, g_scale, g_shared if scalar else None)
        ctx.set_materialize_grads(False)
        scale_dtype = scale.dtype if scalar else None
        ctx.state = options[:2], log_q.shape, x.shape[0], scale_dtype, log_p is not None
        return nll, loss

    @staticmethod
    @_first_order
    def backward(ctx, g_nll, g_loss):
        if g_nll is None and g_loss is None:
            return (None,) * 8
        g_mean, g_scale, g_shared = ctx.saved_tensors
        options, rows, batch, scale_dtype, has_log_p = ctx.state
        samples = 1 if len(rows) == 1 else rows[0]
        how = g_nll, g_loss, *options, samples, batch
        if not writes(g_mean, g_scale, g_nll, g_loss) or _batched(g_nll) or _batched(g_loss):
            wanted = g_scale is not None
            g_mean, g_scale, g_log_q, g_log_p, g_scalar = ops.likelihood_rescale(
                g_mean, g_scale, g_shared, *how
            )
            g_scale = g_scale if wanted else None
        else:
            if _keeps_graph():  # which may be walked again: leave what it saved as it is
                g_mean = g_mean.clone()
                g_scale = None if g_scale is None else g_scale.clone()
            saved = g_mean, g_scale, g_shared
            g_log_q, g_log_p, g_scalar = _run(ops.likelihood_rescale_, *saved, *how)
        if g_shared is not None:
            g_scale = g_scalar.to(scale_dtype)
        if len(rows) == 2:
            g_log_q, g_log_p = g_log_q.view(rows), g_log_p.view(rows)
        return None, g_mean, g_scale, None, g_log_q, g_log_p if has_log_p else None, None, None


class GaussianKL(torch.autograd.Function):
    """``gaussian_kl_forward`` with its derivative."""

    @staticmethod
    def forward(ctx, mu, scale, prior_mu, prior_scale, options):
        args = (mu, scale, prior_mu, prior_scale, *options)
        kl = _run(ops.gaussian_kl_forward, *args)
        ops._setup_kl(ctx, args, kl)
        return kl

    @staticmethod
    @_first_order
    def backward(ctx, g_kl):
        saved = ctx.saved_tensors
        return *_run(ops._differentiate_kl, ctx, g_kl, saved)[:4], None


class Importance(torch.autograd.Function):
    """``importance_forward`` with its derivative."""

    @staticmethod
    def forward(ctx, nll, log_q, log_p, beta):
        output = _run(ops.importance_forward, nll, log_q, log_p, beta)
        ops._setup_importance(ctx, (nll, log_q, log_p, beta), output)
        return output

    @staticmethod
    @_first_order
    def backward(ctx, *grads):
        saved = ctx.saved_tensors
        return _run(ops._differentiate_importance, ctx, *grads, saved)


# The engine's own apply: torch.autograd.Function.apply first looks for functorch transforms, which
# suffices() has ruled out.
latent = super(torch.autograd.Function, Latent).apply
likelihood = super(torch.autograd.Function, Likelihood).apply
likelihood_grad = super(torch.autograd.Function, LikelihoodGrad).apply
gaussian_kl = super(torch.autograd.Function, GaussianKL).apply
importance = super(torch.autograd.Function, Importance).apply
