"""The fused functions: arguments are checked here, and each is one op call underneath."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from vae_fast import eager, noise, ops, reference
from vae_fast.backends import backend_for

__all__ = ["fused_elbo", "gaussian_nll", "reparameterize", "validate"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_PARAM_CODE = {name: code for code, name in enumerate(ops.PARAMS)}
_REDUCTION_CODE = {name: code for code, name in enumerate(ops.REDUCTIONS)}
_UNCLAMPED = (-math.inf, math.inf)

_validate = False


def validate(enabled: bool = True) -> None:
    """Turn checks of tensor *values* on or off; they are off by default.

    When on, NaN and infinite inputs, and standard deviations and variances that are not positive,
    raise a ``ValueError`` that names the argument. Each check waits for the device.
    """
    global _validate
    _validate = bool(enabled)


def reparameterize(
    mu: Tensor,
    scale: Tensor,
    param: str = "logvar",
    num_samples: int | None = None,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
    first_row: int = 0,
    clamp: tuple[float, float] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample z ~ q(z|x) and evaluate log q(z|x) and log p(z), in one pass.

    z = μ + σ·ε with ε ~ N(0, 1), log q = −Σ(½ε² + log σ + ½log 2π) and
    log p = −Σ(½z² + ½log 2π) (Kingma and Welling 2014, "Auto-Encoding Variational Bayes",
    section 2.4 and appendix B). Gradients flow to ``mu`` and ``scale`` through all three results; ε
    is a function of ``key`` (:func:`vae_fast.noise.normal`) and is never stored.

    Args:
        mu: posterior means, (B, *latent), floating point.
        scale: raw scale parameters, broadcastable to ``mu``, or 0-dim.
        param: what ``scale`` means: ``"logvar"`` σ = e^{s/2}, ``"logstd"`` σ = e^s, ``"std"``
            σ = s, ``"var"`` σ = √s, ``"softplus"`` σ = log(1 + e^s).
        num_samples: K samples per row; ``None`` for one, without a sample axis.
        key: noise key, ``uint64`` of shape (2,); a fresh one is drawn if ``None``.
        generator: where a fresh key is drawn from; the device's default generator if ``None``.
        first_row: global index of row 0, so that shards of a batch with one key draw what the whole
            batch would.
        clamp: (lo, hi), clamps the raw ``scale`` as ``torch.clamp`` does, gradient included.

    Returns:
        ``z`` of shape (B, *latent) or (K, B, *latent) in ``mu``'s dtype, and ``log_q`` and
        ``log_p`` in nats, (B,) or (K, B), fp32 (fp64 for fp64).

    Raises:
        TypeError: an argument is not a tensor, or has an unsupported dtype.
        ValueError: shapes, devices, ``param``, ``num_samples``, ``clamp`` or ``key`` do not fit.
    """
    if has_torch_function((mu, scale)):
        return handle_torch_function(
            reparameterize,
            (mu, scale),
            mu,
            scale,
            param=param,
            num_samples=num_samples,
            key=key,
            generator=generator,
            first_row=first_row,
            clamp=clamp,
        )
    code = _check_choice("param", param, _PARAM_CODE)
    lo, hi = _UNCLAMPED if clamp is None else _check_clamp("clamp", clamp)
    if num_samples is not None:
        _check_count("num_samples", num_samples)
    options = (num_samples or 0, first_row, code, lo, hi)
    if generator is None and not _validate and (shortcut := eager.shortcut()):
        results = shortcut.latent(mu, scale, key, *options)
        if results is not None:
            return results

    _check_tensor("mu", mu)
    _check_tensor("scale", scale, like=mu)
    _check_batched("mu", mu)
    if key is None:
        key = noise.make_key(mu.device, generator)
    else:
        noise.check_key(key)
        if key.device != mu.device:
            raise ValueError(f"key is on {key.device}, but mu is on {mu.device}")
    scale = _broadcast("scale", scale, mu)
    if _validate:
        _check_values(param, mu=mu, scale=scale)

    if backend_for(mu.device.type) == "reference":
        return reference.reparameterize(
            mu, scale, param, num_samples, key, None, first_row, clamp=clamp
        )
    if eager.suffices():
        return eager.latent(mu, scale, key, options)
    return ops.latent_forward(mu, scale, key, *options)


def gaussian_nll(
    x: Tensor,
    mean: Tensor,
    scale: Tensor | None,
    param: str = "logvar",
    clamp: tuple[float, float] | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Gaussian negative log-likelihood −log p(x|z) of each row, in one pass.

    Σ(½((x − m)/τ)² + log τ + ½log 2π) over the event, constants included (Kingma and Welling 2014,
    appendix C.2). Gradients flow to ``x``, ``mean`` and ``scale``.

    Args:
        x: data, (B, *event), floating point.
        mean: decoder means, (B, *event), or (K, B, *event) for K samples per row of x. With
            ``scale=None`` it is packed: twice as long along dimension 1 of (B, *event), mean first.
        scale: raw scale parameters, broadcastable to ``mean`` or 0-dim; ``None`` if packed.
        param: what ``scale`` means, as in :func:`reparameterize`.
        clamp: (lo, hi), clamps the raw ``scale`` as ``torch.clamp`` does, gradient included.
        mask: bool, broadcastable to ``x``; elements where it is False contribute nothing, in value
            and gradient, whatever they hold.

    Returns:
        The negative log-likelihood in nats, (B,) or (K, B), fp32 (fp64 for fp64).

    Raises:
        TypeError: an argument is not a tensor, or has an unsupported dtype.
        ValueError: shapes, devices, ``param`` or ``clamp`` do not fit.
    """
    if has_torch_function((x, mean, scale, mask)):
        return handle_torch_function(
            gaussian_nll,
            (x, mean, scale, mask),
            x,
            mean,
            scale,
            param=param,
            clamp=clamp,
            mask=mask,
        )
    sampled = isinstance(mean, Tensor) and isinstance(x, Tensor) and mean.dim() == x.dim() + 1
    code = _check_choice("param", param, _PARAM_CODE)
    lo, hi = _UNCLAMPED if clamp is None else _check_clamp("clamp", clamp)
    mask = _check_likelihood(x, mean, scale, mask, sampled)
    if scale is not None:
        scale = _broadcast("scale", scale, mean)
    if _validate:
        _check_values(param, x=x, mean=mean, scale=scale, mask=mask)

    if backend_for(x.device.type) == "reference":
        return reference.gaussian_nll(x, mean, scale, param, clamp, mask)
    if sampled:
        rows = mean.shape[:2]
        mean = mean.flatten(0, 1)
        scale = scale.flatten(0, 1) if scale is not None and scale.dim() > 0 else scale
    tensors, options = (x, mean, scale, mask, None, None), (0.0, ops.NO_LOSS, code, lo, hi)
    if eager.suffices():
        nll, _ = eager.likelihood(*tensors, options)
    else:
        nll, _ = ops.likelihood_forward(*tensors, *options)
    return nll.view(rows) if sampled else nll


def fused_elbo(
    x: Tensor,
    mean: Tensor,
    scale: Tensor | None,
    log_q: Tensor,
    log_p: Tensor,
    beta: float = 1.0,
    reduction: str = "mean",
    param: str = "logvar",
    clamp: tuple[float, float] | None = None,
    mask: Tensor | None = None,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """The negative ELBO of a Gaussian decoder, from the latent pass's terms, in one pass.

    loss = mean over samples of nll + β(log q − log p), then ``reduction`` over the batch (Kingma
    and Welling 2014, eq. 3, by Monte Carlo; β as in Higgins et al. 2017, eq. 4). For reductions
    ``"mean"`` and ``"sum"`` the forward pass also writes the gradients, which the backward pass
    then only hands on.

    Args:
        x: data, (B, *event), floating point.
        mean: decoder means, (K·B, *event) with row k·B + b for sample k of x[b]; packed along
            dimension 1, mean first, if ``scale`` is ``None``.
        scale: raw scale parameters, broadcastable to ``mean`` or 0-dim; ``None`` if packed.
        log_q: log q(z|x), (B,) or (K, B), from :func:`reparameterize`.
        log_p: log p(z), the same shape.
        beta: weight of the KL term.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` over the batch.
        param: what ``scale`` means, as in :func:`reparameterize`.
        clamp: (lo, hi), clamps the raw ``scale`` as ``torch.clamp`` does, gradient included.
        mask: bool, broadcastable to ``x``, as in :func:`gaussian_nll`.
        inplace: overwrite the memory of ``mean`` and ``scale`` with their gradients when these are
            needed, so that nothing of the data's size is allocated. Both must be results of the
            decoder's computation that nothing else reads afterwards; autograd raises an error if
            the decoder's own backward pass still needs one. Has no effect for fp16 (a gradient
            divided by the batch size would underflow before a loss scale reaches it), when x needs
            a gradient, on the reference backend, and under ``torch.compile``.

    Returns:
        ``loss``, 0-dim, or (B,) for ``reduction="none"``, and the rows' ``nll`` in the shape of
        ``log_q``; in nats, fp32 (fp64 for fp64).

    Raises:
        TypeError: an argument is not a tensor, or has an unsupported dtype.
        ValueError: shapes, devices, ``param``, ``reduction`` or ``clamp`` do not fit, or
            ``inplace`` would overwrite something that is not the decoder's to give.
    """
    if has_torch_function((x, mean, scale, log_q, log_p, mask)):
        return handle_torch_function(
            fused_elbo,
            (x, mean, scale, log_q, log_p, mask),
            x,
            mean,
            scale,
            log_q,
            log_p,
            beta=beta,
            reduction=reduction,
            param=param,
            clamp=clamp,
            mask=mask,
            inplace=inplace,
        )
    code = _check_choice("param", param, _PARAM_CODE)
    lo, hi = _UNCLAMPED if clamp is None else _check_clamp("clamp", clamp)
    reduction_code = _check_choice("reduction", reduction, _REDUCTION_CODE)
    if not isinstance(beta, (int, float)):
        raise TypeError(f"beta must be a float, got {type(beta).__name__}")
    options = (float(beta), reduction_code, code, lo, hi)
    if mask is None and not _validate and (shortcut := eager.shortcut()):
        check = _check_inplace if inplace else None
        results = shortcut.elbo(x, mean, scale, log_q, log_p, *options, check)
        if results is not None:
            nll, loss = results
            return loss, nll

    mask = _check_likelihood(x, mean, scale, mask, rows_of=log_q)
    _check_rows("log_q", log_q, mean, x)
    _check_rows("log_p", log_p, mean, x)
    if log_p.shape != log_q.shape:
        raise ValueError(
            f"log_p must have the shape of log_q, {tuple(log_q.shape)}; got {tuple(log_p.shape)}"
        )
    if scale is not None:
        scale = _broadcast("scale", scale, mean)
    if _validate:
        _check_values(param, x=x, mean=mean, scale=scale, mask=mask)

    if backend_for(x.device.type) == "reference":
        if log_q.dim() == 2:
            mean = mean.unflatten(0, log_q.shape)
            scale = scale if scale is None or scale.dim() == 0 else scale.unflatten(0, log_q.shape)
        nll = reference.gaussian_nll(x, mean, scale, param, clamp, mask)
        return reference.elbo_loss(nll, log_q, log_p, beta, reduction), nll
    if eager.suffices():
        loss, nll = _run_elbo(x, mean, scale, mask, log_q, log_p, options, inplace)
    else:
        nll, loss = ops.likelihood_forward(x, mean, scale, mask, log_q, log_p, *options)
    return loss, nll.view(log_q.shape) if log_q.dim() == 2 else nll


def _run_elbo(x, mean, scale, mask, log_q, log_p, options, inplace) -> tuple[Tensor, Tensor]:
    """The op whose derivative suits the arguments."""
    if _gradient_in_forward(x, mean, scale, options[1], inplace):
        if inplace:
            _check_inplace(x, mean, scale)
        nll, loss = eager.likelihood_grad(x, mean, scale, mask, log_q, log_p, options, inplace)
    else:
        nll, loss = eager.likelihood(x, mean, scale, mask, log_q, log_p, options)
    return loss, nll


def _gradient_in_forward(
    x: Tensor, mean: Tensor, scale: Tensor | None, reduction: int, inplace: bool
) -> bool:
    """Whether to write the gradients in the forward pass: five data-sized streams, not eight.

    Not where the row's weight is unknown until the backward pass and rescaling would cost what was
    saved ("none"), nor in fp16, where the unscaled gradient may underflow.
    """
    if not torch.is_grad_enabled() or x.requires_grad:
        return False
    if not (mean.requires_grad or (scale is not None and scale.requires_grad)):
        return False
    if mean.dtype == torch.float16 or (scale is not None and scale.dtype == torch.float16):
        return False
    return inplace or reduction != _REDUCTION_CODE["none"]


# ---- argument checks -----------------------------------------------------------------------


def _check_tensor(name: str, t: object, like: Tensor | None = None) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
    if t.dtype not in _DTYPES:
        raise TypeError(
            f"{name} must be float16, bfloat16, float32 or float64; got {t.dtype}".replace(
                "torch.", ""
            )
        )
    if like is None:
        return
    if t.device != like.device:
        raise ValueError(f"{name} is on {t.device}, but the other tensors are on {like.device}")
    if t.dtype != like.dtype and torch.float64 in (t.dtype, like.dtype):
        raise TypeError(
            f"{name} is {t.dtype}, but the other tensors are {like.dtype}: float64 does not mix "
            "with other dtypes".replace("torch.", "")
        )


def _check_batched(name: str, t: Tensor) -> None:
    if t.dim() == 0:
        raise ValueError(f"{name} must have a batch dimension, got a 0-dim tensor")


def _check_choice(name: str, value: object, codes: dict[str, int]) -> int:
    code = codes.get(value) if isinstance(value, str) else None
    if code is None:
        raise ValueError(f"{name} must be one of {', '.join(codes)}; got {value!r}")
    return code


def _check_param(name: str, param: object) -> int:
    return _check_choice(name, param, _PARAM_CODE)


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def _check_clamp(name: str, clamp: object) -> tuple[float, float]:
    if clamp is None:
        return _UNCLAMPED
    try:
        lo, hi = clamp
        lo, hi = float(lo), float(hi)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be a pair of numbers (lo, hi), got {clamp!r}") from error
    if not lo <= hi:
        raise ValueError(f"{name} must have lo <= hi, got ({lo}, {hi})")
    return lo, hi


def _broadcast(name: str, t: Tensor, to: Tensor) -> Tensor:
    """``t`` itself if 0-dim or of the right shape, else expanded to ``to``'s shape."""
    if t.dim() == 0 or t.shape == to.shape:
        return t
    try:
        return t.expand(to.shape)
    except RuntimeError:
        raise ValueError(
            f"{name} of shape {tuple(t.shape)} does not broadcast to {tuple(to.shape)}"
        ) from None


def _check_likelihood(
    x: Tensor,
    mean: Tensor,
    scale: Tensor | None,
    mask: Tensor | None,
    sampled: bool = False,
    rows_of: Tensor | None = None,
) -> Tensor | None:
    """Checks the tensors that the likelihood functions share; returns the mask in x's shape.

    ``sampled``: mean has a leading sample dimension. ``rows_of``: the rows of mean are a multiple
    of x's.
    """
    _check_tensor("x", x)
    _check_tensor("mean", mean, like=x)
    _check_batched("x", x)
    if scale is not None:
        _check_tensor("scale", scale, like=x)

    event = tuple(x.shape[1:])
    if scale is None:
        if sampled or not event:
            raise ValueError(
                "scale=None means that mean is packed along dimension 1, (B, 2C, ...) against x of "
                f"shape (B, C, ...); got mean {tuple(mean.shape)} and x {tuple(x.shape)}"
            )
        event = (2 * event[0], *event[1:])
    lead = 2 if sampled else 1
    rows_fit = rows_of is not None or mean.shape[lead - 1 : lead] == x.shape[:1]
    if mean.dim() != lead + len(event) or tuple(mean.shape[lead:]) != event or not rows_fit:
        expected = f"(B, {', '.join(map(str, event))})" if event else "(B,)"
        raise ValueError(
            f"mean of shape {tuple(mean.shape)} does not fit x of shape {tuple(x.shape)}: expected "
            f"{expected}"
            + (" packed mean and scale" if scale is None else "")
            + (", or a leading sample dimension" if scale is not None else "")
        )
    if mask is not None:
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask must be a torch.Tensor, got {type(mask).__name__}")
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool, got {mask.dtype}".replace("torch.", ""))
        if mask.device != x.device:
            raise ValueError(f"mask is on {mask.device}, but the other tensors are on {x.device}")
        if mask.shape != x.shape:
            mask = _broadcast("mask", mask, x).expand(x.shape)
    return mask


def _check_rows(name: str, t: Tensor, mean: Tensor, x: Tensor) -> None:
    """A per-row latent term: (B,) or (K, B), in the accumulation dtype."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
    if t.dtype != ops.accumulation_dtype(mean):
        raise TypeError(
            f"{name} must be {ops.accumulation_dtype(mean)}, got {t.dtype}".replace("torch.", "")
        )
    if t.device != x.device:
        raise ValueError(f"{name} is on {t.device}, but the other tensors are on {x.device}")
    if t.dim() not in (1, 2) or t.shape[-1:] != x.shape[:1] or t.numel() != mean.shape[0]:
        raise ValueError(
            f"{name} must have shape (B,) or (K, B) with B = {x.shape[0]} rows of x and K·B = "
            f"{mean.shape[0]} rows of mean; got {tuple(t.shape)}"
        )


def _check_inplace(x: Tensor, mean: Tensor, scale: Tensor | None) -> None:
    """Refuse to overwrite anything that is not the decoder's own, freshly computed output."""
    full = [("mean", mean)]
    if scale is not None and scale.dim() > 0:
        full.append(("scale", scale))
    for name, t in full:
        base = t._base if t._base is not None else t
        if t.grad_fn is None or (base.is_leaf and base.requires_grad):
            raise ValueError(
                f"inplace=True would overwrite {name}, which is a leaf or a view of one, not a "
                "result of the decoder's computation"
            )
        if _overlaps_itself(t):
            raise ValueError(
                f"inplace=True needs every element of {name} in memory of its own, but its strides "
                f"{t.stride()} for shape {tuple(t.shape)} share some"
            )
        if _same_storage(t, x):
            raise ValueError(f"inplace=True would overwrite x, whose memory {name} shares")
    if len(full) == 2 and _same_storage(mean, scale) and not _halves(mean, scale):
        raise ValueError("inplace=True needs mean and scale in memory of their own")


def _same_storage(a: Tensor, b: Tensor) -> bool:
    # Empty storages all have the same address.
    return a.numel() > 0 and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _overlaps_itself(t: Tensor) -> bool:
    reach = 1
    for stride, size in sorted(
        (st, sz) for st, sz in zip(t.stride(), t.shape, strict=True) if sz > 1
    ):
        if stride < reach:
            return True
        reach += stride * (size - 1)
    return False


def _halves(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are disjoint, equally strided parts of one: a chunk's two halves, say."""
    if a.shape != b.shape or a.stride() != b.stride():
        return False
    first, second = sorted((a, b), key=Tensor.storage_offset)
    gap = second.storage_offset() - first.storage_offset()
    both = torch.as_strided(first, (2, *a.shape), (gap, *a.stride()), first.storage_offset())
    return gap > 0 and not _overlaps_itself(both)


def _check_values(param: str, mask: Tensor | None = None, **tensors: Tensor | None) -> None:
    for name, t in tensors.items():
        if t is None:
            continue
        bad = ~torch.isfinite(t)
        positive = name == "scale" and param in ("std", "var")
        if positive:
            bad = bad | (t <= 0)
        if mask is not None and t.dim() >= mask.dim():
            bad = bad & mask
        if bool(bad.any()):
            what = "finite and positive" if positive else "finite"
            raise ValueError(f"{name} must be {what}, but {int(bad.sum())} elements are not")
