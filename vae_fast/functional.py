"""The fused functions: arguments are checked here, and each is one op call underneath."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from vae_fast import eager, noise, ops, reference
from vae_fast.backends import backend_for

__all__ = [
    "fused_elbo",
    "gaussian_kl",
    "gaussian_nll",
    "importance_bound",
    "likelihood_nll",
    "optimal_gaussian_nll",
    "reparameterize",
    "validate",
]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_PARAM_CODE = {name: code for code, name in enumerate(ops.PARAMS)}
_REDUCTION_CODE = {name: code for code, name in enumerate(ops.REDUCTIONS)}
_LIKELIHOOD_CODE = {name: code for code, name in enumerate(ops.LIKELIHOODS)}
_DISCRETE = ("bernoulli", "logistic")  # probabilities of x itself, not densities
_CLAMP_MODES = ("hard", "soft")
_OPTIMAL_OVER = ("batch", "sample", "channel")
_UNCLAMPED = (-math.inf, math.inf)

_validate = False


def validate(enabled: bool = True) -> contextlib.AbstractContextManager[None]:
    """Turn checks of tensor *values* on or off, in all threads; they are off by default.

    When on, NaN and infinite values of data, of the parameters of distributions and of the terms of
    a loss, standard deviations and variances that are not positive within their bounds, and data of
    a Bernoulli likelihood outside of [0, 1] raise a ``ValueError`` that names the argument. What a
    mask hides may hold anything. Each check waits for the device.

    Returns:
        A context manager, for who wants it: at the end of ``with validate():`` all is as before.
    """
    global _validate
    before, _validate = _validate, bool(enabled)
    return _restore_validate(before)


@contextlib.contextmanager
def _restore_validate(before: bool) -> Iterator[None]:
    global _validate
    try:
        yield
    finally:
        _validate = before


def reparameterize(
    mu: Tensor,
    scale: Tensor,
    param: str = "logvar",
    num_samples: int | None = None,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
    first_row: int = 0,
    clamp: tuple[float, float] | None = None,
    clamp_mode: str = "hard",
    path_gradient: bool = False,
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
        clamp: (lo, hi), keeps the raw ``scale`` within these bounds.
        clamp_mode: ``"hard"``: as ``torch.clamp`` does, with no gradient outside; ``"soft"``:
            m + c·tanh((s − m)/c) with the middle m and c half the width, smooth and with a
            gradient everywhere.
        path_gradient: let log q depend on ``mu`` and ``scale`` through z alone in the backward
            pass, so that the score function, whose expectation is zero, is left out (Roeder et al.
            2017, "Sticking the Landing").

    Returns:
        ``z`` of shape (B, *latent) or (K, B, *latent) in ``mu``'s dtype, and ``log_q`` and
        ``log_p`` in nats, (B,) or (K, B), fp32 (fp64 for fp64). To autograd each of the three is a
        function of ``mu`` and ``scale``, and none of another: the gradient of a loss with respect
        to z is without that of log p(z).

    Raises:
        TypeError: an argument is not a tensor, or has an unsupported dtype.
        ValueError: shapes, devices, ``param``, ``num_samples``, ``clamp`` or ``key`` do not fit.
    """
    posterior = _posterior(param, clamp, clamp_mode, path_gradient)
    if num_samples is not None:
        _check_count("num_samples", num_samples)
    return _reparameterize(mu, scale, posterior, num_samples, key, generator, first_row)


def _reparameterize(
    mu: Tensor,
    scale: Tensor,
    posterior: tuple,
    num_samples: int | None,
    key: Tensor | None,
    generator: torch.Generator | None,
    first_row: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`reparameterize` with the checked options of :func:`_posterior`."""
    if has_torch_function((mu, scale)):
        options = _posterior_options(posterior)
        per_call = {"num_samples": num_samples, "generator": generator, "first_row": first_row}
        return handle_torch_function(
            reparameterize, (mu, scale), mu, scale, key=key, **per_call, **options
        )
    _check_row("first_row", first_row)
    if generator is None and not _validate and (shortcut := eager.shortcut()):
        results = shortcut.latent(mu, scale, key, num_samples or 0, first_row, *posterior)
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
        code, *clamp, _ = posterior
        _check_values(ops.PARAMS[code], clamp, mu=mu, scale=scale)

    if backend_for(mu.device.type) == "reference":
        options = _posterior_options(posterior)
        return reference.reparameterize(
            mu, scale, num_samples=num_samples, key=key, first_row=first_row, **options
        )
    options = (num_samples or 0, first_row, *posterior)
    if eager.suffices():
        return eager.latent(mu, scale, key, options)
    return ops.latent_forward(mu, scale, key, *_storable(options))


def gaussian_nll(
    x: Tensor,
    mean: Tensor,
    scale: Tensor | float | None,
    param: str = "logvar",
    clamp: tuple[float, float] | None = None,
    mask: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Gaussian negative log-likelihood −log p(x|z) of each row, in one pass.

    Σ(½((x − m)/τ)² + log τ + ½log 2π) over the event, constants included (Kingma and Welling 2014,
    appendix C.2). :func:`likelihood_nll` with ``likelihood="gaussian"``, which documents the
    arguments, other ``options`` and errors.
    """
    tensors = (x, mean, scale, mask)
    if has_torch_function(tensors):
        return handle_torch_function(
            gaussian_nll, tensors, x, mean, scale, param=param, clamp=clamp, mask=mask, **options
        )
    return likelihood_nll(x, mean, scale, "gaussian", param, clamp, mask=mask, **options)


def likelihood_nll(
    x: Tensor,
    mean: Tensor,
    scale: Tensor | float | None = None,
    likelihood: str = "gaussian",
    param: str = "logvar",
    clamp: tuple[float, float] | None = None,
    clamp_mode: str = "hard",
    mask: Tensor | None = None,
    df: float = 4.0,
    x_scale: tuple[float, float] | None = None,
    dequantize: bool = False,
    key: Tensor | None = None,
    first_row: int = 0,
) -> Tensor:
    """Negative log-likelihood −log p(x|z) of each row, in one pass over the data.

    Per element, with r = (x − m)/τ and constants included:

    * ``"gaussian"``: ½r² + log τ + ½log 2π (Kingma and Welling 2014, appendix C.2);
    * ``"laplace"``: abs(r) + log τ + log 2;
    * ``"student_t"``: ½(ν + 1)·log(1 + r²/ν) + log τ + log B(½, ½ν) + ½log ν, ν = ``df``;
    * ``"bernoulli"``: −x·log σ(m) − (1 − x)·log σ(−m) of logits m, x in [0, 1] (Kingma and Welling
      2014, appendix C.1); it has no scale;
    * ``"logistic"``: minus the log of the mass of a logistic density on the bin of x, one of 256
      levels, the first and last bins reaching to infinity (Salimans et al. 2017, "PixelCNN++",
      eq. 2, with a single component);
    * ``"squared_error"``: ½(x − m)², no density but what variances are estimated from; it has no
      scale.

    Gradients flow to a floating ``x``, ``mean`` and ``scale``.

    Args:
        x: data, (B, *event), floating point or uint8.
        mean: decoder means (locations, logits), (B, *event), or (K, B, *event) for K samples per
            row of x. With ``scale=None`` it is packed: twice as long along dimension 1 of
            (B, *event), mean first; but not where the likelihood has no scale.
        scale: raw scale parameters, of any shape that broadcasts to ``mean``, or a number; ``None``
            if packed. Its gradient has its own shape: for one value, one per row (B, 1, ...) or one
            event (*event) it is summed inside the pass, and nothing of the data's size is made.
            Other shapes are expanded first.
        likelihood: which of the above.
        param: what ``scale`` means, as in :func:`reparameterize`.
        clamp: (lo, hi), keeps the raw ``scale`` within these bounds.
        clamp_mode: ``"hard"`` or ``"soft"``, as in :func:`reparameterize`.
        mask: bool, broadcastable to ``x``; elements where it is False contribute nothing, in value
            and gradient, whatever they hold.
        df: degrees of freedom ν of ``"student_t"``, from 1e-10 to 1e30.
        x_scale: (a, b), where a uint8 ``x`` stands for a·x + b, made inside the pass; a > 0. For
            ``"logistic"`` the levels are a·i + b whatever the dtype. (1/255, 0) if ``None``.
        dequantize: a uint8 ``x`` stands for a·(x + u) + b instead, with uniform noise u
            (:func:`vae_fast.noise.uniform`), so that the density of the continuous values bounds
            the mass of the levels (Theis et al. 2016, section 3.1).
        key: noise key of the dequantization; a fresh one is drawn if ``None``.
        first_row: global index of row 0 for that noise.

    Returns:
        The negative log-likelihood in nats, (B,) or (K, B), fp32 (fp64 for fp64).

    Raises:
        TypeError: an argument is not a tensor, or has an unsupported dtype.
        ValueError: shapes, devices or options do not fit.
    """
    density = _density(likelihood, param, clamp, clamp_mode, df, x_scale)
    _check_row("first_row", first_row)
    tensors = x, mean, scale, mask, key
    if has_torch_function(tensors):
        options = _density_options(density)
        per_call = {"mask": mask, "dequantize": dequantize, "key": key, "first_row": first_row}
        return handle_torch_function(likelihood_nll, tensors, x, mean, scale, **per_call, **options)
    nll = _nll_in_cpp(x, mean, scale, density, mask, dequantize)
    if nll is not None:
        return nll
    sampled = isinstance(mean, Tensor) and isinstance(x, Tensor) and mean.dim() == x.dim() + 1
    mask, key = _check_likelihood(x, mean, scale, mask, likelihood, dequantize, key, sampled)
    scale = _fit_scale(scale, mean, 2 if sampled else 1)
    if _validate:
        _check_likelihood_values(x, mean, scale, mask, density)
    rows = mean.shape[:2]
    if sampled:
        mean = mean.flatten(0, 1)
    nll = _nll(x, mean, scale, mask, density, key, first_row)
    return nll.view(rows) if sampled else nll


def _nll_of_rows(x, mean, scale, rows, density, mask, dequantize, key, first_row) -> Tensor:
    """−log p(x|z) of what :func:`_fused_elbo` takes, in the shape of ``rows``; never in place."""
    nll = _nll_in_cpp(x, mean, scale, density, mask, dequantize, rows)
    if nll is not None:
        return nll
    likelihood = ops.LIKELIHOODS[density[0]]
    mask, key = _check_likelihood(x, mean, scale, mask, likelihood, dequantize, key, rows_of=rows)
    _check_rows("log_q", rows, mean, x)
    scale = _fit_scale(scale, mean, 1)
    if _validate:
        _check_likelihood_values(x, mean, scale, mask, density)
    return _nll(x, mean, scale, mask, density, key, first_row).view(rows.shape)


def _nll_in_cpp(x, mean, scale, density, mask, dequantize, rows=None) -> Tensor | None:
    """−log p(x|z), in the shape of ``rows`` if given, where ``eager.cpp`` serves the case."""
    if _validate or dequantize is not False or not (shortcut := eager.shortcut()):
        return None
    scaled = density[0] not in ops.WITHOUT_SCALE
    return shortcut.nll(x, mean, scale, scaled, mask, rows, *density)


def _nll(x, mean, scale, mask, density, key, first_row) -> Tensor:
    """−log p(x|z) of checked tensors, mean (N, *event) and a fitted scale; (N,)."""
    if backend_for(x.device.type) == "reference":
        return _reference_nll(x, mean, scale, mask, density, key, first_row)
    nll = _nll_in_cpp(x, mean, scale, density, mask, key is not None)
    if nll is not None:
        return nll
    tensors = (x, mean, scale, mask, None, None)
    options = (0.0, ops.NO_LOSS, *density, key, first_row)
    if eager.suffices():
        return eager.likelihood(*tensors, options)[0]
    return ops.likelihood_forward(*tensors, *_storable(options))[0]


def _reference_nll(x, mean, scale, mask, density, key, first_row) -> Tensor:
    batch = x.shape[0]
    sampled = mean.shape[0] != batch
    if sampled:  # rows k·B + b
        mean = mean.unflatten(0, (-1, batch))
        if scale is not None and scale.dim() > 0 and scale.shape[0] > 1:
            scale = scale.unflatten(0, (-1, batch))
    nll = reference.likelihood_nll(
        x,
        mean,
        scale,
        mask=mask,
        dequantize=key is not None,
        key=key,
        first_row=first_row,
        **_density_options(density),
    )
    return nll.flatten() if sampled else nll


def optimal_gaussian_nll(
    x: Tensor,
    mean: Tensor,
    over: str = "batch",
    param: str = "logvar",
    clamp: tuple[float, float] | None = None,
    clamp_mode: str = "hard",
    mask: Tensor | None = None,
    x_scale: tuple[float, float] | None = None,
    dequantize: bool = False,
    key: Tensor | None = None,
    first_row: int = 0,
) -> Tensor:
    """Gaussian negative log-likelihood under the variance that makes it smallest.

    τ² is the mean of (x − m)² over what shares it, the maximum-likelihood estimate (Rybkin et al.
    2021, "Simple and Effective VAE Training with Calibrated Decoders"), and a function
    of ``x`` and ``mean`` like any other: gradients flow through it.

    Args:
        x, mean, mask, x_scale, dequantize, key, first_row: as in :func:`likelihood_nll`; a masked
            element does not count.
        over: what shares one variance: all rows of the ``"batch"`` (samples included), each
            ``"sample"`` (row) by itself, or each ``"channel"``, dimension 1 of x, over all rows.
        param, clamp, clamp_mode: bounds of the variance, as a raw scale of this ``param``. Without
            a lower bound a perfect reconstruction has no finite likelihood.

    Returns:
        The negative log-likelihood in nats, (B,) or (K, B), fp32 (fp64 for fp64).

    Raises:
        TypeError, ValueError: as :func:`likelihood_nll`.
    """
    if has_torch_function((x, mean, mask, key)):
        return handle_torch_function(
            optimal_gaussian_nll,
            (x, mean, mask, key),
            x,
            mean,
            over=over,
            param=param,
            clamp=clamp,
            clamp_mode=clamp_mode,
            mask=mask,
            x_scale=x_scale,
            dequantize=dequantize,
            key=key,
            first_row=first_row,
        )
    _check_choice("over", over, dict.fromkeys(_OPTIMAL_OVER, 0))
    _check_row("first_row", first_row)
    if x_scale is not None:
        _check_x_scale(x_scale)
    _check_choice("param", param, _PARAM_CODE)
    bounds = _clamp_options(clamp, clamp_mode)[:2]
    sampled = isinstance(mean, Tensor) and isinstance(x, Tensor) and mean.dim() == x.dim() + 1
    options = {"likelihood": "squared_error", "x_scale": x_scale, "first_row": first_row}
    likelihood_check = (x, mean, None, mask, "squared_error", dequantize, key, sampled)
    mask, key = _check_likelihood(*likelihood_check)
    rows = mean.shape[:2] if sampled else mean.shape[:1]
    batch, channels = x.shape[0], 1
    if over == "channel":
        if x.dim() < 2:
            raise ValueError(f'over="channel" needs x (B, C, ...), got shape {tuple(x.shape)}')
        channels = x.shape[1]
        if key is not None:  # the noise of a row runs through its channels
            mul, add = reference.X_SCALE if x_scale is None else x_scale
            u = noise.uniform(key, x.shape[0], x.shape[1:], first_row)
            x, key = (x + u.to(ops.accumulation_dtype(mean))) * mul + add, None
        x, mean = x.flatten(0, 1), mean.flatten(-x.dim(), 1 - x.dim())
        mask = None if mask is None else mask.flatten(0, 1)
    sse = 2.0 * likelihood_nll(
        x, mean, mask=mask, dequantize=key is not None, key=key, **options
    ).reshape(math.prod(rows), channels)
    if mask is None:
        count = torch.full_like(sse, math.prod(x.shape[1:]))
    else:
        count = mask.flatten(1).sum(1) if mask.dim() > 1 else mask
        count = (
            count.to(sse.dtype).view(batch, channels).repeat(math.prod(rows) // max(batch, 1), 1)
        )
    if over == "sample":
        variance = sse / count
    else:
        dims = None if over == "batch" else 0
        variance = sse.sum(dims) / count.sum(dims)
    # A residual of zero, or no element at all, has no logarithm; the bounds decide what it means.
    variance = torch.where(variance > 0.0, variance, torch.finfo(sse.dtype).tiny)
    log_tau = 0.5 * torch.log(variance)
    if bounds != _UNCLAMPED:
        raw = _raw_scale(log_tau, param)
        log_tau, _ = reference.log_scale_and_scale(
            reference.clamp_scale(raw, bounds, clamp_mode), param
        )
    terms = 0.5 * sse * torch.exp(-2.0 * log_tau) + count * (log_tau + reference.HALF_LOG_2PI)
    return terms.sum(1).view(rows)


def _raw_scale(log_sigma: Tensor, param: str) -> Tensor:
    """The raw scale parameter of a σ."""
    if param in ("logvar", "logstd"):
        return (2.0 if param == "logvar" else 1.0) * log_sigma
    if param in ("std", "var"):
        return torch.exp((2.0 if param == "var" else 1.0) * log_sigma)
    sigma = torch.exp(log_sigma)
    return sigma + torch.log(-torch.expm1(-sigma))  # log(e^σ − 1)


def gaussian_kl(
    mu: Tensor,
    scale: Tensor,
    prior: tuple[Tensor, Tensor] | None = None,
    param: str = "logvar",
    prior_param: str = "logvar",
    clamp: tuple[float, float] | None = None,
    clamp_mode: str = "hard",
) -> Tensor:
    """KL(q‖p) of two diagonal Gaussians, per row, in one pass.

    Σ(½(ρ² − 1) − log ρ + ½((μ_q − μ_p)/σ_p)²) with ρ = σ_q/σ_p (Kingma and Welling 2014, appendix
    B, for p = N(0, 1)). Accurate where the two nearly agree and where they are far apart. Gradients
    flow to all four tensors.

    Args:
        mu: means of q, (B, *latent), floating point.
        scale: raw scale parameters of q, broadcastable to ``mu`` or 0-dim.
        prior: (mu, scale) of p, each broadcastable to ``mu``; N(0, 1) if ``None``.
        param: what ``scale`` means, as in :func:`reparameterize`.
        prior_param: what the prior's scale means.
        clamp, clamp_mode: bounds of q's raw scale, as in :func:`reparameterize`.

    Returns:
        KL(q‖p) in nats, (B,), fp32 (fp64 for fp64).

    Raises:
        TypeError: an argument is not a tensor, or has an unsupported dtype.
        ValueError: shapes, devices, ``param``, ``prior`` or ``clamp`` do not fit.
    """
    prior = (None, None) if prior is None else _check_pair("prior", prior)
    if has_torch_function((mu, scale, *prior)):
        return handle_torch_function(
            gaussian_kl,
            (mu, scale, *prior),
            mu,
            scale,
            prior=None if prior[0] is None else prior,
            param=param,
            prior_param=prior_param,
            clamp=clamp,
            clamp_mode=clamp_mode,
        )
    code = _check_choice("param", param, _PARAM_CODE)
    prior_code = _check_choice("prior_param", prior_param, _PARAM_CODE)
    lo, hi, soft = _clamp_options(clamp, clamp_mode)
    options = (code, prior_code, lo, hi, soft)
    shortcut = None if _validate else eager.shortcut()
    if shortcut is not None:
        kl = shortcut.gaussian_kl(mu, scale, *prior, *options)
        if kl is not None:
            return kl

    _check_tensor("mu", mu)
    _check_batched("mu", mu)
    tensors, standard = [mu], prior[0] is None and prior[1] is None
    for name, t in (("scale", scale), ("prior's mu", prior[0]), ("prior's scale", prior[1])):
        if name == "scale" or not standard:
            _check_tensor(name, t, like=mu)
            t = _broadcast(name, t, mu).expand(mu.shape)
        tensors.append(t)
    if _validate:
        _check_values(param, (lo, hi, soft), mu=mu, scale=tensors[1])
        _check_prior_values(prior, prior_param)
    if backend_for(mu.device.type) == "reference":
        p = None if standard else (tensors[2], tensors[3])
        return reference.gaussian_kl(*tensors[:2], p, param, prior_param, clamp, clamp_mode)
    if shortcut is not None:  # whose shapes the tensors have by now
        kl = shortcut.gaussian_kl(*tensors, *options)
        if kl is not None:
            return kl
    if eager.suffices():
        return eager.gaussian_kl(*tensors, options)
    return ops.gaussian_kl_forward(*tensors, *_storable(options))


def _check_beta(beta: object) -> None:
    if not isinstance(beta, (int, float)):
        raise TypeError(f"beta must be a float, got {type(beta).__name__}")


def _beta_as_data(
    log_q: Tensor, log_p: Tensor | None, beta: float
) -> tuple[Tensor, Tensor | None, float]:
    """The KL's terms and β; under torch.compile β(log q − log p), lest each β be a graph."""
    if not torch.compiler.is_compiling():
        return log_q, log_p, beta
    return (log_q if log_p is None else log_q - log_p) * beta, None, 1.0


def importance_bound(
    nll: Tensor, log_q: Tensor, log_p: Tensor | None = None, beta: float = 1.0
) -> Tensor:
    """The negative importance-weighted bound of each row, in one step over its K samples.

    −log(1/K Σ_k w_k) with log w = −nll − β(log q − log p) (Burda et al. 2016, "Importance Weighted
    Autoencoders", eq. 8), which the weights' largest keeps finite. Gradients flow to all three
    tensors.

    Args:
        nll: −log p(x|z), (K, B), fp32 or fp64.
        log_q: log q(z|x), (K, B); or, with ``log_p=None``, log q − log p.
        log_p: log p(z), (K, B).
        beta: weight of log q − log p; the bound is one on log p(x) for 1.

    Returns:
        The negative bound in nats, (B,).

    Raises:
        TypeError: a tensor is none, or not of the same dtype as the others; beta is no number.
        ValueError: shapes or devices do not fit.
    """
    if has_torch_function((nll, log_q, log_p)):
        return handle_torch_function(
            importance_bound, (nll, log_q, log_p), nll, log_q, log_p, beta=beta
        )
    _check_beta(beta)
    _check_tensor("nll", nll)
    if nll.dim() != 2 or nll.shape[0] == 0:
        raise ValueError(f"nll must have shape (K, B) with K ≥ 1, got {tuple(nll.shape)}")
    for name, t in (("log_q", log_q), ("log_p", log_p)):
        if t is None and name == "log_p":
            continue
        _check_tensor(name, t, like=nll)
        if t.dtype != nll.dtype or t.shape != nll.shape:
            raise ValueError(
                f"{name} must be {nll.dtype} of nll's shape {tuple(nll.shape)}; got {t.dtype} of "
                f"shape {tuple(t.shape)}".replace("torch.", "")
            )
    if nll.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"nll must be float32 or float64, got {nll.dtype}".replace("torch.", ""))
    if _validate:
        _check_values(nll=nll, log_q=log_q, log_p=log_p)
    if backend_for(nll.device.type) == "reference":
        return reference.importance_bound(nll, log_q, log_p, beta)
    if eager.suffices():
        return eager.importance(nll.flatten(), log_q, log_p, float(beta))[0]
    log_q, log_p, beta = _beta_as_data(log_q, log_p, beta)
    return ops.importance_forward(nll.flatten(), log_q, log_p, float(beta))[0]


def fused_elbo(
    x: Tensor,
    mean: Tensor,
    scale: Tensor | float | None,
    log_q: Tensor,
    log_p: Tensor | None = None,
    beta: float = 1.0,
    reduction: str = "mean",
    param: str = "logvar",
    clamp: tuple[float, float] | None = None,
    mask: Tensor | None = None,
    inplace: bool = False,
    likelihood: str = "gaussian",
    clamp_mode: str = "hard",
    df: float = 4.0,
    x_scale: tuple[float, float] | None = None,
    dequantize: bool = False,
    key: Tensor | None = None,
    first_row: int = 0,
) -> tuple[Tensor, Tensor]:
    """The negative ELBO of a decoder's output, from the latent pass's terms, in one pass.

    loss = mean over samples of nll + β(log q − log p), then ``reduction`` over the batch (Kingma
    and Welling 2014, eq. 3, by Monte Carlo; β as in Higgins et al. 2017, eq. 4). For reductions
    ``"mean"`` and ``"sum"`` the forward pass also writes the gradients, which the backward pass
    then only hands on.

    Args:
        x: data, (B, *event), floating point or uint8.
        mean: decoder means, (K·B, *event) with row k·B + b for sample k of x[b]; packed along
            dimension 1, mean first, if ``scale`` is ``None`` and the likelihood has one.
        scale: raw scale parameters, broadcastable to ``mean``, or a number; ``None`` if packed.
        log_q: log q(z|x), (B,) or (K, B), from :func:`reparameterize`; or, with ``log_p=None``,
            the KL term, from :func:`gaussian_kl` say.
        log_p: log p(z), the same shape.
        beta: weight of the KL term.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` over the batch.
        param: what ``scale`` means, as in :func:`reparameterize`.
        clamp: (lo, hi), bounds of the raw ``scale``, as in :func:`reparameterize`.
        mask: bool, broadcastable to ``x``, as in :func:`likelihood_nll`.
        inplace: overwrite the memory of ``mean`` and ``scale`` with their gradients, each if it is
            needed, so that nothing of the data's size is allocated. Both must be results of the
            decoder's computation that nothing else reads afterwards; autograd raises an error if
            the decoder's own backward pass still needs one. Has no effect for fp16 (a gradient
            divided by the batch size would underflow before a loss scale reaches it), when x needs
            a gradient, when the rows share a learned scale of more than one value (on a GPU, also
            when each has a learned one of its own), on the reference backend, under
            ``torch.compile`` and the transforms of ``torch.func``, and where a dispatch mode or a
            tensor subclass watches or a tensor is lazily negated. Hooks on the overwritten tensors
            must be there before the loss is computed.
        likelihood, clamp_mode, df, x_scale, dequantize, key, first_row: as in
            :func:`likelihood_nll`.

    Returns:
        ``loss``, 0-dim, or (B,) for ``reduction="none"``, and the rows' ``nll`` in the shape of
        ``log_q``; in nats, fp32 (fp64 for fp64).

    Raises:
        TypeError: an argument is not a tensor, or has an unsupported dtype.
        ValueError: shapes, devices or options do not fit, or ``inplace`` would overwrite something
            that is not the decoder's to give.
    """
    density = _density(likelihood, param, clamp, clamp_mode, df, x_scale)
    _check_choice("reduction", reduction, _REDUCTION_CODE)
    _check_flag("inplace", inplace)
    _check_row("first_row", first_row)
    tensors = x, mean, scale, log_q, log_p
    return _fused_elbo(
        *tensors, beta, reduction, density, mask, inplace, dequantize, key, first_row
    )


def _fused_elbo(
    x: Tensor,
    mean: Tensor,
    scale: Tensor | float | None,
    log_q: Tensor,
    log_p: Tensor | None,
    beta: float,
    reduction: str,
    density: tuple,
    mask: Tensor | None,
    inplace: bool,
    dequantize: bool,
    key: Tensor | None,
    first_row: int,
) -> tuple[Tensor, Tensor]:
    """:func:`fused_elbo` with checked options, those of the likelihood by :func:`_density`."""
    tensors = x, mean, scale, log_q, log_p, mask, key
    if has_torch_function(tensors):
        options = _density_options(density)
        per_call = {"dequantize": dequantize, "key": key, "first_row": first_row}
        return handle_torch_function(
            fused_elbo,
            tensors,
            *tensors[:5],
            beta=beta,
            reduction=reduction,
            mask=mask,
            inplace=inplace,
            **per_call,
            **options,
        )
    _check_beta(beta)
    reduction_code = _REDUCTION_CODE[reduction]
    options = beta, reduction_code, density
    # It neither looks at values nor makes noise.
    shortcut = None if _validate or dequantize is not False else eager.shortcut()
    if shortcut is not None:
        results = _elbo_in_cpp(shortcut, x, mean, scale, mask, log_q, log_p, inplace, *options)
        if results is not None:
            return results

    likelihood = ops.LIKELIHOODS[density[0]]
    mask, key = _check_likelihood(x, mean, scale, mask, likelihood, dequantize, key, rows_of=log_q)
    _check_rows("log_q", log_q, mean, x)
    if log_p is not None:
        _check_rows("log_p", log_p, mean, x)
        if log_p.shape != log_q.shape:
            raise ValueError(
                f"log_p must have the shape of log_q, {tuple(log_q.shape)}; "
                f"got {tuple(log_p.shape)}"
            )
    fitted = _fit_scale(scale, mean, 1)
    # A scale that was expanded is not the decoder's, though one row may give it mean's shape.
    expanded = fitted is not scale and fitted.dim() > 0 and fitted.requires_grad
    inplace = inplace and not expanded and eager.writes(x, mean, scale)
    scale = fitted
    if _validate:
        _check_likelihood_values(x, mean, scale, mask, density)
        _check_values(log_q=log_q, log_p=log_p)

    if backend_for(x.device.type) == "reference":
        nll = _reference_nll(x, mean, scale, mask, density, key, first_row).view(log_q.shape)
        return reference.elbo_loss(nll, log_q, log_p, beta, reduction), nll
    if shortcut is not None:  # whose shapes the scale and the mask have by now
        results = _elbo_in_cpp(shortcut, x, mean, scale, mask, log_q, log_p, inplace, *options)
        if results is not None:
            return results
    log_q, log_p, beta = _beta_as_data(log_q, log_p, beta)
    tensors = (x, mean, scale, mask, log_q, log_p)
    options = (float(beta), reduction_code, *density, key, first_row)
    if not eager.suffices():
        nll, loss = ops.likelihood_forward(*tensors, *_storable(options))
    elif _gradient_in_forward(x, mean, scale, reduction_code, inplace):
        if inplace:
            _check_inplace(x, mean, scale, log_q, log_p)
        nll, loss = eager.likelihood_grad(*tensors, options, inplace)
    else:
        nll, loss = eager.likelihood(*tensors, options)
    return loss, nll.view(log_q.shape) if log_q.dim() == 2 else nll


def _elbo_in_cpp(
    shortcut, x, mean, scale, mask, log_q, log_p, inplace, beta, reduction, density
) -> tuple[Tensor, Tensor] | None:
    """The loss and nll where ``eager.cpp`` serves the case."""
    scaled = density[0] not in ops.WITHOUT_SCALE
    options = float(beta), reduction, _check_inplace if inplace else None, *density
    results = shortcut.elbo(x, mean, scale, scaled, mask, log_q, log_p, *options)
    return None if results is None else (results[1], results[0])


def _gradient_in_forward(
    x: Tensor, mean: Tensor, scale: Tensor | None, reduction: int, inplace: bool
) -> bool:
    """Whether to write the gradients in the forward pass: five data-sized streams, not eight.

    Not where the row's weight is unknown until the backward pass and rescaling would cost what was
    saved ("none"), nor in fp16, where the unscaled gradient may underflow; nor where rows share a
    learned scale, whose gradient could not be taken apart again (in ``eager.cpp`` it need not be).
    """
    if not torch.is_grad_enabled() or x.requires_grad or not mean.requires_grad:
        return False
    if mean.dtype == torch.float16 or (scale is not None and scale.dtype == torch.float16):
        return False
    learned = scale is not None and scale.requires_grad
    if learned and scale.dim() > 0 and scale.shape != mean.shape:
        return False
    return inplace or reduction != _REDUCTION_CODE["none"]


# ---- argument checks -----------------------------------------------------------------------


def _check_tensor(
    name: str,
    t: object,
    like: Tensor | None = None,
    also: str = "",
    others: str = "the other tensors are",
) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
    if t.dtype not in _DTYPES:
        accepted = f"float16, bfloat16, float32{', float64 or ' + also if also else ' or float64'}"
        hint = f": {name}.float() has its values" if t.dtype == torch.bool else ""
        raise TypeError(f"{name} must be {accepted}; got {t.dtype}{hint}".replace("torch.", ""))
    if t.layout != torch.strided:
        raise TypeError(f"{name} must be a strided tensor, got layout {t.layout}")
    if like is None:
        return
    if t.device != like.device:
        raise ValueError(f"{name} is on {t.device}, but {others} on {like.device}")
    if t.dtype != like.dtype and torch.float64 in (t.dtype, like.dtype):
        raise TypeError(
            f"{name} is {t.dtype}, but {others} {like.dtype}: float64 does not mix "
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


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    if isinstance(value, int) and value >= 2**63:
        raise ValueError(f"{name} must fit in 64 bits, got {value}")


def _check_row(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must fit in 64 bits, got {value}")


def _check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")


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


def _clamp_options(clamp: object, mode: object, name: str = "clamp") -> tuple[float, float, bool]:
    """Lo, hi and whether the clamp is soft, as the ops take them."""
    if mode not in _CLAMP_MODES:
        raise ValueError(f"{name}_mode must be one of {', '.join(_CLAMP_MODES)}; got {mode!r}")
    if clamp is None:
        return *_UNCLAMPED, False
    lo, hi = _check_clamp(name, clamp)
    soft = mode == "soft"
    if soft and not (math.isfinite(lo) and math.isfinite(hi) and lo < hi):
        raise ValueError(
            f'{name} must be finite with lo < hi for {name}_mode="soft", got {clamp!r}'
        )
    return lo, hi, soft


def _check_df(df: object) -> float:
    # Within these 10^15·√ν·τ is far beyond τ, and nothing overflows in fp32.
    if isinstance(df, bool) or not isinstance(df, (int, float)) or not 1e-10 <= df <= 1e30:
        raise ValueError(f"df must be a positive number, from 1e-10 to 1e30, got {df!r}")
    return float(df)


def _posterior(param: object, clamp: object, clamp_mode: object, path_gradient: object) -> tuple:
    """The options of the latent ops from ``param`` on, checked."""
    code = _check_choice("param", param, _PARAM_CODE)
    _check_flag("path_gradient", path_gradient)
    return code, *_clamp_options(clamp, clamp_mode), path_gradient


def _posterior_options(posterior: tuple) -> dict[str, Any]:
    """What :func:`_posterior` was given, or as good as that."""
    param, lo, hi, soft, path_gradient = posterior
    return _scale_options(param, lo, hi, soft) | {"path_gradient": path_gradient}


def _density(
    likelihood: object,
    param: object,
    clamp: object,
    clamp_mode: object,
    df: object,
    x_scale: object,
) -> tuple:
    """The options of the likelihood ops from ``likelihood`` to the key, checked."""
    code = _check_choice("likelihood", likelihood, _LIKELIHOOD_CODE)
    param_code = _check_choice("param", param, _PARAM_CODE)
    mul, add = reference.X_SCALE if x_scale is None else _check_x_scale(x_scale)
    if likelihood == "bernoulli" and not 0.0 <= add < mul + add <= 1.0:
        raise ValueError(
            f'x_scale must keep the levels within [0, 1] for likelihood="bernoulli", but has '
            f"{add:g} and {mul + add:g} for the first two"
        )
    return code, param_code, *_clamp_options(clamp, clamp_mode), _check_df(df), mul, add


def _density_options(density: tuple) -> dict[str, Any]:
    """What :func:`_density` was given, or as good as that."""
    likelihood, param, lo, hi, soft, df, mul, add = density
    own = {"likelihood": ops.LIKELIHOODS[likelihood], "df": df, "x_scale": (mul, add)}
    return _scale_options(param, lo, hi, soft) | own


def _is_exporting() -> bool:
    """Whether torch.export traces. To Dynamo of PyTorch 2.11 the public function is always true."""
    return torch.compiler._is_exporting_flag


def _storable(options: tuple) -> tuple:
    """An op's options in a program for export, whose files are JSON: that knows no infinity.

    What bounds nothing becomes the largest number, which bounds no finite one.
    """
    if not _is_exporting():
        return options
    most = sys.float_info.max
    return tuple(max(-most, min(o, most)) if isinstance(o, float) else o for o in options)


def _scale_options(param: int, lo: float, hi: float, soft: bool) -> dict[str, Any]:
    clamp = None if (lo, hi) == _UNCLAMPED else (lo, hi)
    return {"param": ops.PARAMS[param], "clamp": clamp, "clamp_mode": "soft" if soft else "hard"}


def _check_x_scale(x_scale: object) -> tuple[float, float]:
    try:
        a, b = x_scale
        a, b = float(a), float(b)
    except (TypeError, ValueError) as error:
        raise ValueError(f"x_scale must be a pair of numbers (a, b), got {x_scale!r}") from error
    if not (0.0 < a < math.inf and math.isfinite(b)):
        raise ValueError(f"x_scale must be finite with a > 0, got ({a}, {b})")
    return a, b


def _check_pair(name: str, pair: object) -> tuple[Tensor, Tensor]:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(f"{name} must be a pair of tensors (mu, scale), got {_kind(pair)}")
    return pair[0], pair[1]


def _kind(value: object) -> str:
    """What was given in place of a pair."""
    name = type(value).__name__
    return f"{name} of {len(value)}" if isinstance(value, (tuple, list)) else name


def _fit_scale(scale: Tensor | float | None, mean: Tensor, lead: int) -> Tensor | None:
    """The likelihood's scale in one of the shapes that the ops know (:mod:`vae_fast.ops`).

    ``lead``: dimensions of mean that are samples and rows.
    """
    if scale is None:
        return None
    if not isinstance(scale, Tensor):
        return torch.full((), float(scale), dtype=ops.accumulation_dtype(mean), device=mean.device)
    if scale.dim() == 0 or _same_shape(scale, mean):
        return scale.flatten(0, 1) if lead == 2 and scale.dim() > 0 else scale
    _broadcast("scale", scale, mean)
    if scale.numel() == 1:
        return scale.reshape(())
    scale = scale.reshape((1,) * (mean.dim() - scale.dim()) + scale.shape)
    event = mean.shape[lead:]
    if all(n == 1 for n in scale.shape[:lead]):
        scale = scale.expand(*scale.shape[:lead], *event)  # one event for all rows
    elif all(n == 1 for n in scale.shape[lead:]):
        scale = scale.expand(*mean.shape[:lead], *scale.shape[lead:])  # one value a row
    else:
        scale = scale.expand(mean.shape)
    return scale.flatten(0, 1) if lead == 2 else scale


def _broadcast(name: str, t: Tensor, to: Tensor) -> Tensor:
    """``t`` itself if 0-dim or of the right shape, else expanded to ``to``'s shape."""
    if t.dim() == 0 or _same_shape(t, to):
        return t
    padded = (*(1,) * (to.dim() - t.dim()), *t.shape)
    fits = len(padded) == to.dim()
    if not fits or any(n not in (1, m) for n, m in zip(padded, to.shape, strict=True)):
        raise ValueError(
            f"{name} of shape {tuple(t.shape)} does not broadcast to {tuple(to.shape)}"
        )
    return t.expand(to.shape)


def _same_shape(t: Tensor, u: Tensor) -> bool:
    # Of unequal lengths, == would still compare sizes, which torch.export takes for a condition.
    return t.dim() == u.dim() and t.shape == u.shape


def _check_likelihood(
    x: Tensor,
    mean: Tensor,
    scale: Tensor | float | None,
    mask: Tensor | None,
    likelihood: str,
    dequantize: bool,
    key: Tensor | None,
    sampled: bool = False,
    rows_of: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Checks the tensors that the likelihood functions share.

    ``sampled``: mean has a leading sample dimension. ``rows_of``: the rows of mean are a multiple
    of x's. Returns the mask in x's shape, and the key to dequantize with.
    """
    _check_flag("dequantize", dequantize)
    stored = isinstance(x, Tensor) and x.dtype == torch.uint8 and x.layout == torch.strided
    if not stored:
        _check_tensor("x", x, also="uint8")
    _check_tensor("mean", mean, like=None if stored else x, others="x is")
    if mean.device != x.device:
        raise ValueError(f"mean is on {mean.device}, but x is on {x.device}")
    _check_batched("x", x)
    scaled = _LIKELIHOOD_CODE[likelihood] not in ops.WITHOUT_SCALE
    if isinstance(scale, bool) or (
        scale is not None and not isinstance(scale, (Tensor, int, float))
    ):
        raise TypeError(f"scale must be a torch.Tensor or a number, got {type(scale).__name__}")
    if isinstance(scale, int) and abs(scale) > sys.float_info.max:
        raise ValueError(f"scale must fit a float, got {scale}")
    if isinstance(scale, Tensor):
        _check_tensor("scale", scale, like=mean)
    if scale is not None and not scaled:
        raise ValueError(f"scale must be None, for likelihood={likelihood!r} has no scale")

    event = tuple(x.shape[1:])
    packed = scale is None and scaled
    if packed:
        if sampled or not event:
            raise ValueError(
                "scale=None means that mean is packed along dimension 1, (B, 2C, ...) against x of "
                f"shape (B, C, ...); got mean {tuple(mean.shape)} and x {tuple(x.shape)}"
            )
        event = (2 * event[0], *event[1:])
    lead, batch = 2 if sampled else 1, x.shape[0]
    rows = batch
    if rows_of is not None:  # and if that does not fit x, then it is not for mean to fit it
        terms = isinstance(rows_of, Tensor) and rows_of.shape[-1:] == x.shape[:1]
        rows = rows_of.numel() if terms else mean.shape[:1].numel()
    if tuple(mean.shape[lead - 1 :]) != (rows, *event) or mean.dim() != lead + len(event):
        expected = str((rows, *event)) + (" packed mean and scale" if packed else "")
        if rows_of is not None and rows != batch:
            expected += f", one row for each sample of {batch} rows"
        elif rows_of is None and not packed:
            expected += ", or that with a leading sample dimension"
        raise ValueError(
            f"mean of shape {tuple(mean.shape)} does not fit x of shape {tuple(x.shape)}: expected "
            f"{expected}"
        )
    if sampled and mean.shape[0] == 0:
        raise ValueError(f"mean must hold at least one sample, got shape {tuple(mean.shape)}")
    if mask is not None:
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask must be a torch.Tensor, got {type(mask).__name__}")
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool, got {mask.dtype}".replace("torch.", ""))
        if mask.device != x.device:
            raise ValueError(f"mask is on {mask.device}, but the other tensors are on {x.device}")
        if not _same_shape(mask, x):
            mask = _broadcast("mask", mask, x).expand(x.shape)
    if not dequantize:
        return mask, None
    if not stored:
        raise TypeError(f"dequantize=True needs x of dtype uint8, got {x.dtype}")
    if likelihood in _DISCRETE:
        raise ValueError(
            f"dequantize=True needs a density, but likelihood={likelihood!r} is a mass of the "
            "levels themselves"
        )
    if key is None:
        key = noise.make_key(x.device)
    else:
        noise.check_key(key)
        if key.device != x.device:
            raise ValueError(f"key is on {key.device}, but the other tensors are on {x.device}")
    return mask, key


def _check_rows(name: str, t: Tensor, mean: Tensor, x: Tensor) -> None:
    """A per-row latent term: (B,) or (K, B), in the accumulation dtype."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
    if t.dtype != ops.accumulation_dtype(mean):
        raise TypeError(
            f"{name} must be {ops.accumulation_dtype(mean)}, got {t.dtype}, beside a {mean.dtype} "
            f"mean. (A module's {name} is float64 if mu is, else float32.)".replace("torch.", "")
        )
    if t.device != x.device:
        raise ValueError(f"{name} is on {t.device}, but the other tensors are on {x.device}")
    rows = t.dim() == 1 or (t.dim() == 2 and t.shape[0] > 0)
    if not rows or t.shape[-1:] != x.shape[:1] or t.numel() != mean.shape[0]:
        raise ValueError(
            f"{name} must have shape (B,) or (K, B) with B = {x.shape[0]} rows of x and K·B = "
            f"{mean.shape[0]} rows of mean; got {tuple(t.shape)}"
        )


def _check_inplace(
    x: Tensor, mean: Tensor, scale: Tensor | None, log_q: Tensor, log_p: Tensor | None
) -> None:
    """Refuse to overwrite anything that is not the decoder's own, freshly computed output."""
    full = [("mean", mean)]
    if scale is not None and scale.requires_grad and scale.shape == mean.shape:
        full.append(("scale", scale))
    elif scale is not None and _same_storage(mean, scale):
        raise ValueError("inplace=True would overwrite scale, whose memory mean shares")
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
        for other, kept in (("x", x), ("log_q", log_q), ("log_p", log_p)):
            if kept is not None and _same_storage(t, kept):
                raise ValueError(
                    f"inplace=True would overwrite {other}, whose memory {name} shares"
                )
    if len(full) == 2 and _same_storage(mean, scale) and not _halves(mean, scale):
        raise ValueError("inplace=True needs mean and scale in memory of their own")


def _same_storage(a: Tensor, b: Tensor) -> bool:
    # Empty storages all have the same address.
    return a.numel() > 0 and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _overlaps_itself(t: Tensor) -> bool:
    if t.numel() == 0:
        return False
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


def _check_values(
    param: str = "",
    clamp: Sequence[float] = (*_UNCLAMPED, False),
    mask: Tensor | None = None,
    **tensors: Tensor | None,
) -> None:
    """Values that :func:`validate` promises to refuse; a scale's after its ``clamp``."""
    for name, t in tensors.items():
        if t is None or not t.is_floating_point():
            continue
        bad = ~torch.isfinite(t)
        positive = name.endswith("scale") and param in ("std", "var")
        if positive:
            lo, hi, soft = clamp
            bad = bad | (reference.clamp_scale(t, (lo, hi), "soft" if soft else "hard") <= 0)
        _refuse_values(name, bad, mask, "finite and positive" if positive else "finite")


def _check_likelihood_values(
    x: Tensor, mean: Tensor, scale: Tensor | None, mask: Tensor | None, density: tuple
) -> None:
    likelihood, param, *clamp, _, mul, add = density
    if scale is None and likelihood not in ops.WITHOUT_SCALE:
        mean, scale = mean.chunk(2, 1)
    _check_values(ops.PARAMS[param], clamp, mask, x=x, mean=mean, scale=scale)
    if ops.LIKELIHOODS[likelihood] == "logistic" and x.is_floating_point():
        levels = (x.double() - add) / mul
        off = (levels - levels.round().clamp(0.0, 255.0)).abs()
        # To 16 bits, the steps between the levels are hardly more than their own.
        far = off > (0.01 if x.dtype in (torch.float32, torch.float64) else 0.51)
        _refuse_values("x", far, mask, 'one of the 256 levels of likelihood="logistic"')
    if ops.LIKELIHOODS[likelihood] == "bernoulli":
        data = x if x.is_floating_point() else x * mul + add
        outside = (data < 0.0) | (data > 1.0 + 1e-6)  # 255·(1/255) is rounded
        _refuse_values("x", outside, mask, 'within [0, 1] for likelihood="bernoulli"')


def _check_prior_values(prior: Sequence[Tensor | None], param: str) -> None:
    _check_values(param, **{"prior's mu": prior[0], "prior's scale": prior[1]})


def _refuse_values(name: str, bad: Tensor, mask: Tensor | None, what: str) -> None:
    if mask is not None and bad.dim() >= mask.dim():
        bad = bad & _seen(mask, bad)
    if bool(bad.any()):
        raise ValueError(f"{name} must be {what}, but {int(bad.sum())} elements are not")


def _seen(mask: Tensor, t: Tensor) -> Tensor:
    """A mask of x, for a tensor of the samples' rows, or of shared scales."""
    rows = t.shape[0]
    if t.dim() > mask.dim() or rows == mask.shape[0]:
        return mask
    if rows == 1:  # a scale that the rows share
        return mask.any(0, keepdim=True)
    return mask.repeat(rows // max(mask.shape[0], 1), *(1,) * (mask.dim() - 1))
