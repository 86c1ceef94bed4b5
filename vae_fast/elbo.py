"""The loss of a variational autoencoder as a module: two fused passes around the decoder."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vae_fast import eager, functional, noise, ops, reference

__all__ = ["ELBOOutput", "FusedELBO"]

LIKELIHOODS = tuple(name for name in ops.LIKELIHOODS if name != "squared_error")
KL_ESTIMATORS = ("monte_carlo", "analytic")
OBJECTIVES = ("elbo", "iwae")
ESTIMATORS = ("standard", "stl", "dreg")
# likelihood_scale names for what shares a variance.
OPTIMAL = {"optimal": "batch", "optimal_sample": "sample", "optimal_channel": "channel"}

_CHOICES = {
    "posterior_param": ops.PARAMS,
    "likelihood_param": ops.PARAMS,
    "prior_param": ops.PARAMS,
    "reduction": ops.REDUCTIONS,
    "kl": KL_ESTIMATORS,
    "likelihood": LIKELIHOODS,
    "objective": OBJECTIVES,
    "estimator": ESTIMATORS,
}

_PRIOR_TENSORS = ("prior_mu", "prior_scale")
_PAIRS = ("posterior_clamp", "likelihood_clamp", "x_scale")

Prior = tuple[Tensor, Tensor] | Callable[[Tensor], Tensor]


class ELBOOutput(NamedTuple):
    """A loss and the terms it is made of, in nats.

    Rows have shape (B,), or (K, B) for K > 1 samples.
    """

    loss: Tensor
    """What to minimise, 0-dim, or (B,) for ``reduction="none"``."""
    nll: Tensor
    """−log p(x|z) per row."""
    log_q: Tensor
    """log q(z|x) per row."""
    log_p: Tensor
    """log p(z) per row."""
    z: Tensor
    """The latent sample, (B, *latent) or (K, B, *latent). The gradient with respect to it is the
    decoder's alone: the terms here are functions of the networks' outputs, none of another.
    """
    analytic_kl: Tensor | None = None
    """KL(q‖p) per row of the batch, (B,), with ``kl="analytic"``."""
    data_shape: tuple[int, ...] = ()
    """The shape of x."""
    mask: Tensor | None = None
    """The mask that the loss was given."""
    bin_width: float = 1.0
    """Distance of neighbouring levels of x, where the likelihood is a density of levels."""
    objective: str = "elbo"
    """The bound that the loss is made of."""

    @property
    def kl(self) -> Tensor:
        """KL(q‖p) per row, unweighted by β: the analytic one, (B,), or its Monte Carlo estimate
        log q(z|x) − log p(z).
        """
        return self.log_q - self.log_p if self.analytic_kl is None else self.analytic_kl

    @property
    def bits_per_dim(self) -> Tensor:
        """The negative bound (β = 1) of each row in bits per element of x, (B,).

        For a density of levels a apart, a uint8 x say, log₂ a is taken off, which makes it one of
        levels. With ``dequantize=True`` that bounds the code length of the data (Theis et al. 2016,
        "A note on the evaluation of generative models", section 3.1); without, a density may rise
        at the levels themselves and bounds nothing. The masses of the Bernoulli and the logistic
        likelihood are of levels already. Not finite for a row that the mask hides as a whole.
        """
        rows = self.nll + self.kl
        if rows.dim() == 2:
            iwae = self.objective == "iwae"
            rows = reference.importance_bound(rows, 0.0) if iwae else rows.mean(0)
        if self.mask is None:
            size: Tensor | int = math.prod(self.data_shape[1:])
        else:
            kept = self.mask.expand(self.data_shape)
            size = kept.sum(tuple(range(1, kept.dim()))) if kept.dim() > 1 else kept
        return rows / size / math.log(2.0) - math.log2(self.bin_width)


class FusedELBO(nn.Module):
    """The negative evidence lower bound of a VAE with a diagonal Gaussian posterior.

    loss = E_q[log q(z|x) − log p(z)]·β − E_q[log p(x|z)], the expectations by Monte Carlo (Kingma
    and Welling 2014, eq. 3; β as in Higgins et al. 2017, eq. 4). Two fused passes, one on each side
    of the decoder, in the forward and in the backward direction. ``docs/options.md`` says when to
    use which option.

    Args:
        beta: weight of the KL term, a float or a 0-dim tensor; may be set anew at any step, as any
            option, which is then checked again.
        num_samples: K, latent samples per row.
        posterior_param: what the posterior's raw scale means: ``"logvar"``, ``"logstd"``,
            ``"std"``, ``"var"`` or ``"softplus"`` (:func:`vae_fast.reparameterize`).
        likelihood_param: the same for the decoder's raw scale.
        kl: how KL(q‖p) is computed: ``"monte_carlo"``, log q − log p at the sample, or
            ``"analytic"``, for a Gaussian prior.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` over the batch.
        posterior_clamp: (lo, hi), bounds of the posterior's raw scale.
        likelihood_clamp: (lo, hi), bounds of the decoder's raw scale.
        inplace: overwrite the decoder's output with its gradient
            (:func:`vae_fast.fused_elbo` says when that is possible).
        posterior_clamp_mode: ``"hard"`` or ``"soft"`` (:func:`vae_fast.reparameterize`).
        likelihood_clamp_mode: likewise.
        likelihood: ``"gaussian"``, ``"laplace"``, ``"bernoulli"``, ``"logistic"`` or
            ``"student_t"`` (:func:`vae_fast.likelihood_nll`).
        likelihood_scale: ``None``: the decoder's second output. A number: one fixed raw scale.
            ``"optimal"``, ``"optimal_sample"`` or ``"optimal_channel"``: the Gaussian variance of
            highest likelihood, over the batch, a row or a channel
            (:func:`vae_fast.optimal_gaussian_nll`). Unless it is ``None`` the decoder returns the
            mean alone.
        df: degrees of freedom of ``"student_t"``, from 1e-10 to 1e30.
        objective: ``"elbo"``, or ``"iwae"``, the importance-weighted bound of K samples (Burda et
            al. 2016, eq. 8).
        estimator: of the posterior's gradient: ``"standard"``; ``"stl"``, for the ELBO, without the
            score function (Roeder et al. 2017); ``"dreg"``, for the IWAE, doubly
            reparameterized (Tucker et al. 2019). The last is an estimate for ``loss`` alone:
            nll, or a prior of one's own, differentiated beside it gets its weights as well.
        prior: p(z): ``None`` for N(0, 1); (mu, scale) tensors, broadcastable to (B, *latent), for a
            Gaussian, Parameters if it is to be learned; or a callable that maps z (N, *latent) to
            log p(z) (N,), a module if it has parameters.
        prior_param: what the prior's scale means.
        free_bits: λ nats for each latent element: the KL term is Σ_j max(λ, mean over the batch of
            KL_j) (Kingma et al. 2016, eq. 15); needs ``kl="analytic"``.
        capacity: C nats: the KL term is abs(KL − C), of the batch's mean KL (Burgess et al. 2018,
            eq. 8); a float or a 0-dim tensor.
        x_scale: (a, b): a uint8 x stands for a·x + b (:func:`vae_fast.likelihood_nll`). Given for a
            floating x, it says that its levels are a apart, for ``bits_per_dim``.
        dequantize: add uniform noise within the levels of a uint8 x, from the same key as z's.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is not one of those listed, or options exclude each other.
    """

    def __init__(
        self,
        beta: float | Tensor = 1.0,
        num_samples: int = 1,
        posterior_param: str = "logvar",
        likelihood_param: str = "logvar",
        kl: str = "monte_carlo",
        reduction: str = "mean",
        posterior_clamp: tuple[float, float] | None = None,
        likelihood_clamp: tuple[float, float] | None = None,
        inplace: bool = False,
        *,
        posterior_clamp_mode: str = "hard",
        likelihood_clamp_mode: str = "hard",
        likelihood: str = "gaussian",
        likelihood_scale: float | str | None = None,
        df: float = 4.0,
        objective: str = "elbo",
        estimator: str = "standard",
        prior: Prior | None = None,
        prior_param: str = "logvar",
        free_bits: float | None = None,
        capacity: float | Tensor | None = None,
        x_scale: tuple[float, float] | None = None,
        dequantize: bool = False,
    ) -> None:
        super().__init__()
        self.beta = beta
        self.num_samples = num_samples
        self.posterior_param = posterior_param
        self.likelihood_param = likelihood_param
        self.kl = kl
        self.reduction = reduction
        self.posterior_clamp = posterior_clamp
        self.likelihood_clamp = likelihood_clamp
        self.inplace = inplace
        self.posterior_clamp_mode = posterior_clamp_mode
        self.likelihood_clamp_mode = likelihood_clamp_mode
        self.likelihood = likelihood
        self.likelihood_scale = likelihood_scale
        self.df = df
        self.objective = objective
        self.estimator = estimator
        self.prior_param = prior_param
        self.free_bits = free_bits
        self.capacity = capacity
        self.x_scale = x_scale
        self.dequantize = dequantize
        self._register_prior(prior)
        self._check_options()
        self._checked = True

    def __setattr__(self, name: str, value: object) -> None:
        """Set an option anew, checked as at construction; of β, which may change at each step, its
        type alone.
        """
        if name == "prior" and "_checked" in self.__dict__:
            self._replace_prior(value)
            return
        if isinstance(value, np.generic):  # as an array of a schedule has them
            value = value.item()
        if name in ("beta", "capacity") and isinstance(value, nn.Parameter):
            raise TypeError(
                f"{name} must be a float or a 0-dim tensor that no optimizer moves, got a Parameter"
            )
        if name == "beta" and not isinstance(value, Tensor):
            if not isinstance(value, (int, float)):
                got = type(value).__name__
                raise TypeError(f"beta must be a float or a 0-dim tensor, got {got}")
            # To torch.compile a number that changes is data.
            if not torch.compiler.is_compiling() and not math.isfinite(value):
                raise ValueError(f"beta must be finite, got {value}")
        if name in _PAIRS and hasattr(value, "__iter__") and not isinstance(value, str):
            with contextlib.suppress(TypeError, ValueError):  # which the checks explain
                # Which nobody changes unseen, and which a file can hold.
                value = tuple(v if type(v) in (int, float) else float(v) for v in value)
        checked = name in _DEFAULTS and name != "beta" and "_checked" in self.__dict__
        before = getattr(self, name) if checked else None
        super().__setattr__(name, value)
        if checked:
            try:
                self._check_options()
            except (TypeError, ValueError):
                super().__setattr__(name, before)
                raise

    def _register_prior(self, prior: Prior | None) -> None:
        """A Gaussian's tensors become parameters or buffers, a module a submodule."""
        named: dict[str, Tensor] = {}
        if prior is not None and not callable(prior):
            if hasattr(prior, "log_prob"):
                raise TypeError(
                    "prior must be a pair of tensors (mu, scale) or a callable, got "
                    f"{type(prior).__name__}: pass its log_prob, if that is one number per z, or "
                    "an object that is called for log p(z) and has a method sample(n), to sample"
                )
            pair = functional._check_pair("prior", prior)
            named = dict(zip(_PRIOR_TENSORS, pair, strict=True))
        for name, tensor in named.items():
            functional._check_tensor(name.replace("_", "'s "), tensor)
        for name in ("prior", *_PRIOR_TENSORS):
            if hasattr(self, name):
                delattr(self, name)
        for name, tensor in named.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)
        super().__setattr__("prior", "gaussian" if named else prior)

    def _replace_prior(self, prior: Prior | None) -> None:
        before = self._gaussian_prior() if self.prior == "gaussian" else self.prior
        self._register_prior(prior)
        try:
            self._check_options()
        except (TypeError, ValueError):
            self._register_prior(before)
            raise

    def _check_options(self) -> None:
        """Every option by itself, then those that exclude each other, and why."""
        functional._check_count("num_samples", self.num_samples)
        for name, choices in _CHOICES.items():
            functional._check_choice(name, getattr(self, name), dict.fromkeys(choices, 0))
        for name in ("posterior_clamp", "likelihood_clamp"):
            functional._clamp_options(getattr(self, name), getattr(self, f"{name}_mode"), name)
        for name in ("inplace", "dequantize"):
            functional._check_flag(name, getattr(self, name))
        self._check_likelihood_scale()
        _check_number("free_bits", self.free_bits)
        if self.free_bits is not None and not 0.0 <= self.free_bits < math.inf:
            raise ValueError(f"free_bits must be at least 0, got {self.free_bits}")
        if not isinstance(self.capacity, Tensor):
            _check_number("capacity", self.capacity)
        elif self.capacity.dim() > 0:
            raise ValueError(
                f"capacity must be a float or a 0-dim tensor, got {tuple(self.capacity.shape)}"
            )

        if self.dequantize and self.likelihood in functional._DISCRETE:
            raise ValueError(
                f"dequantize=True needs a density, but likelihood={self.likelihood!r} is a mass of "
                "the levels themselves"
            )
        shaped = self.free_bits is not None or self.capacity is not None
        if self.objective == "iwae" and (self.kl == "analytic" or shaped):
            what = 'kl="analytic"' if self.kl == "analytic" else "free_bits and capacity"
            raise ValueError(
                f'objective="iwae" weighs samples by log q and log p, so it excludes {what}'
            )
        if self.estimator == "dreg" and self.objective != "iwae":
            raise ValueError('estimator="dreg" is for objective="iwae"; for the ELBO use "stl"')
        if self.estimator == "dreg" and self.likelihood_scale in ("optimal", "optimal_channel"):
            raise ValueError(
                f'estimator="dreg" is biased for likelihood_scale={self.likelihood_scale!r}, by '
                'which each sample\'s weight depends on all samples; use "optimal_sample"'
            )
        if self.estimator == "stl" and self.objective == "iwae":
            raise ValueError(
                'estimator="stl" is biased for objective="iwae" (Tucker et al. 2019); use "dreg"'
            )
        if self.estimator == "stl" and self.kl == "analytic":
            raise ValueError('estimator="stl" needs kl="monte_carlo": it differentiates log q')
        if self.estimator == "stl" and self.capacity is not None:
            raise ValueError(
                'estimator="stl" is biased with capacity, whose sign depends on the sample too; '
                'kl="analytic" has no need of it'
            )
        if self.free_bits is not None and self.capacity is not None:
            raise ValueError("free_bits and capacity exclude each other")
        if self.free_bits is not None and self.kl != "analytic":
            raise ValueError('free_bits needs kl="analytic": it bounds the KL of each element')
        if self.kl == "analytic" and callable(self.prior):
            raise ValueError('kl="analytic" needs a Gaussian prior, not a callable')

        # As the passes take them, so that a step need not check them again.
        self._posterior = functional._posterior(
            self.posterior_param,
            self.posterior_clamp,
            self.posterior_clamp_mode,
            self.estimator != "standard",
        )
        self._density = functional._density(
            self.likelihood,
            self.likelihood_param,
            self.likelihood_clamp,
            self.likelihood_clamp_mode,
            self.df,
            self.x_scale,
        )

    def _check_likelihood_scale(self) -> None:
        scale = self.likelihood_scale
        if not isinstance(scale, str):
            _check_number("likelihood_scale", scale)
        elif scale not in OPTIMAL:
            raise ValueError(
                f"likelihood_scale must be a number, None or one of {', '.join(OPTIMAL)}; "
                f"got {scale!r}"
            )
        elif self.likelihood != "gaussian":
            raise ValueError(f'likelihood_scale={scale!r} needs likelihood="gaussian"')
        if scale is None or isinstance(scale, str):
            return
        if self.likelihood == "bernoulli":
            raise ValueError('likelihood_scale must be None, for "bernoulli" has no scale')
        positive = self.likelihood_param in ("std", "var")
        if not math.isfinite(scale) or (positive and scale <= 0.0):
            what = "finite and positive" if positive else "finite"
            raise ValueError(f"likelihood_scale must be {what}, got {scale}")

    def forward(
        self,
        x: Tensor,
        mu: Tensor,
        scale: Tensor,
        decoder: Callable[[Tensor], Tensor | tuple[Tensor, Tensor]],
        *,
        key: Tensor | None = None,
        generator: torch.Generator | None = None,
        first_row: int = 0,
        mask: Tensor | None = None,
        weight: Tensor | None = None,
        prior: Prior | None = None,
    ) -> ELBOOutput:
        """Sample z, decode it, and return the loss with its terms.

        Args:
            x: data, (B, *event), floating point or uint8.
            mu: posterior means, (B, *latent).
            scale: the posterior's raw scale, broadcastable to ``mu`` or 0-dim.
            decoder: called once with z of shape (K·B, *latent); returns (mean, scale) of p(x|z),
                mean (K·B, *event) and scale broadcastable to it or a number, or one tensor packed
                along dimension 1, mean first. The mean alone, one tensor of x's event, if the
                likelihood has no scale or ``likelihood_scale`` gives it. The two halves of a tensor
                split along dimension 1 are read as that tensor, which gets the gradient: to ask for
                that of a half (``torch.autograd.grad``, ``retain_grad``, a hook) call
                ``retain_grad`` on it in the decoder.
            key, generator, first_row: the noise, as in :func:`vae_fast.reparameterize`.
            mask: bool, broadcastable to x; what is False is missing data, whatever it holds.
            weight: weights of the rows' losses, (B,); ``reduction="mean"`` still divides by B.
            prior: p(z) for this call, in place of the one given at construction: the tensors of a
                conditional prior, say.

        Raises:
            TypeError, ValueError: as :func:`vae_fast.reparameterize` and
                :func:`vae_fast.fused_elbo`.
        """
        if isinstance(x, Tensor) and isinstance(mu, Tensor) and x.shape[:1] != mu.shape[:1]:
            functional._check_batched("x", x)
            functional._check_batched("mu", mu)
            raise ValueError(
                f"mu must have a row for each row of x; got mu of shape {tuple(mu.shape)} and x of "
                f"shape {tuple(x.shape)}"
            )
        if prior is None and (prior := self.prior) == "gaussian":
            prior = self._gaussian_prior()
        if self.dequantize and key is None:
            key = noise.make_key(mu.device, generator)
        samples = self.num_samples
        samples = samples if samples > 1 else None
        z, log_q, log_p = functional._reparameterize(
            mu, scale, self._posterior, samples, key, generator, first_row
        )
        weights_tag = None
        if samples is not None and self.estimator == "dreg":
            if functional._is_exporting():
                raise NotImplementedError(
                    'estimator="dreg" cannot be exported: torch.export would leave out a part of '
                    'its gradient; the loss is the same with estimator="standard"'
                )
            beta = self.beta
            if torch.compiler.is_compiling() and not isinstance(beta, Tensor):
                beta = log_q.new_ones(()) * beta  # a changing number becomes data, as in functional
            sample = z, log_q, log_p, beta
            z, log_q, log_p, weights_tag = _DoublyReparameterized.apply(*sample)
        decoded = z if samples is None else z.flatten(0, 1)
        analytic_kl = None
        if prior is not None:
            log_p = self._log_prior(z, decoded, prior)
        if self.kl == "analytic":
            analytic_kl = self._gaussian_kl(mu, scale, prior)

        mean, likelihood_scale = self._decode(decoder(decoded))
        if self.inplace and eager.suffices():
            _check_not_latent(z, mean, likelihood_scale)

        term, minus, beta = log_q, log_p, self.beta  # the KL term is term − minus
        special = analytic_kl is not None or self.capacity is not None
        if special or (type(beta) is not float and isinstance(beta, Tensor)):
            term, minus, beta = self._kl_terms(mu, scale, prior, log_q, log_p, analytic_kl)
        iwae = samples is not None and self.objective == "iwae"
        if iwae or weight is not None or self.likelihood_scale in OPTIMAL:
            rows, nll = self._rows(
                x, mean, likelihood_scale, term, minus, beta, key, first_row, mask, weights_tag
            )
            if weight is not None:
                rows = rows * _check_weight(weight, rows)
            loss = reference.reduce_rows(rows, self.reduction)
        else:
            loss, nll = self._fused(
                x, mean, likelihood_scale, term, minus, beta, self.reduction, key, first_row, mask
            )
        if weights_tag is not None:  # hand out what has the plain gradient
            z, log_q = sample[:2]
            log_p = log_p if prior is not None else sample[2]
        plain = self.x_scale is None and x.dtype is not torch.uint8
        return ELBOOutput(
            loss,
            nll,
            log_q,
            log_p,
            z,
            analytic_kl,
            x.shape,
            mask,
            1.0 if plain else self._bin_width(),
            self.objective,
        )

    @property
    def _levels(self) -> tuple[float, float]:
        """(a, b), where a uint8 x stands for a·x + b."""
        return self._density[-2:]

    def _bin_width(self) -> float:
        """Distance of the levels of x, where the likelihood is a density and no mass of them."""
        mass = self.likelihood in functional._DISCRETE
        return 1.0 if mass else self._levels[0]

    def _fused(
        self, x, mean, scale, log_q, log_p, beta, reduction, key, first_row, mask
    ) -> tuple[Tensor, Tensor]:
        """The loss and nll; ``key`` is the latent pass's, which the dequantization shares."""
        key = key if self.dequantize else None
        options = self._density, mask, self.inplace, self.dequantize, key, first_row
        return functional._fused_elbo(x, mean, scale, log_q, log_p, beta, reduction, *options)

    def _nll(self, x, mean, scale, rows, key, first_row, mask) -> Tensor:
        """−log p(x|z) alone, in the shape of ``rows``."""
        key = key if self.dequantize else None
        options = self._density, mask, self.dequantize, key, first_row
        return functional._nll_of_rows(x, mean, scale, rows, *options)

    def _rows(
        self, x, mean, scale, log_q, log_p, beta, key, first_row, mask, weights_tag
    ) -> tuple[Tensor, Tensor]:
        """The rows' losses (B,), and nll, for a loss that the pass itself cannot finish."""
        importance = self.objective == "iwae" and log_q.dim() == 2
        optimal = self.likelihood_scale in OPTIMAL
        if optimal:
            nll = functional.optimal_gaussian_nll(
                x,
                mean.unflatten(0, log_q.shape) if log_q.dim() == 2 else mean,
                OPTIMAL[self.likelihood_scale],
                self.likelihood_param,
                self.likelihood_clamp,
                self.likelihood_clamp_mode,
                mask,
                self.x_scale,
                self.dequantize,
                key if self.dequantize else None,
                first_row,
            )
        elif importance and not self.inplace:
            nll = self._nll(x, mean, scale, log_q, key, first_row, mask)
        else:
            rows, nll = self._fused(
                x, mean, scale, log_q, log_p, beta, "none", key, first_row, mask
            )
        if importance:
            tagged = nll if weights_tag is None else nll + weights_tag
            rows = functional.importance_bound(tagged, log_q, log_p, beta)
        elif optimal:
            rows = reference.elbo_loss(nll, log_q, log_p, beta, "none")
        return rows, nll

    def _decode(self, output: object) -> tuple[Tensor, Tensor | float | None]:
        """Mean and scale from what the decoder returned."""
        if self.likelihood_scale is None and self.likelihood != "bernoulli":
            return _mean_and_scale(output)
        if not isinstance(output, Tensor):
            raise TypeError(
                "decoder must return one tensor, the mean, where the scale comes from "
                f"likelihood_scale or there is none; got {type(output).__name__}"
            )
        fixed = isinstance(self.likelihood_scale, (int, float))
        return output, float(self.likelihood_scale) if fixed else None  # eager.cpp takes no int

    # ---------------------------------------------------------------- KL

    def _gaussian_prior(self) -> tuple[Tensor, Tensor]:
        return self.prior_mu, self.prior_scale

    def _log_prior(self, z: Tensor, flat: Tensor, prior: Prior) -> Tensor:
        """Log p(z) of a prior other than N(0, 1), (B,) or (K, B)."""
        rows = z.shape[: z.dim() - flat.dim() + 1]
        if callable(prior):
            log_p = prior(flat)
            if not isinstance(log_p, Tensor) or log_p.shape != flat.shape[:1]:
                got = tuple(log_p.shape) if isinstance(log_p, Tensor) else type(log_p).__name__
                raise ValueError(
                    f"prior must return log p(z) of shape ({flat.shape[0]},) for z of shape "
                    f"{tuple(flat.shape)}; got {got}"
                )
            return log_p.to(ops.accumulation_dtype(z)).view(rows)
        prior_mu, prior_scale = functional._check_pair("prior", prior)
        functional._check_tensor("prior's mu", prior_mu, like=z)
        functional._check_tensor("prior's scale", prior_scale, like=z)
        if functional._validate:
            functional._check_prior_values(prior, self.prior_param)
        # The density is symmetric in x and mean, and K samples may share a row of x.
        event = z.shape[len(rows) - 1 :]
        one = z[0] if len(rows) == 2 else z
        prior_mu = functional._broadcast("prior's mu", prior_mu, one)
        functional._broadcast("prior's scale", prior_scale, one)
        nll = functional.gaussian_nll(prior_mu.expand(event), z, prior_scale, self.prior_param)
        return -nll

    def _gaussian_kl(self, mu, scale, prior, transposed: bool = False) -> Tensor:
        """KL(q‖p) per row (B,), or ``transposed``, summed over the batch, per latent element."""
        if callable(prior):
            raise ValueError('kl="analytic" needs a Gaussian prior, not a callable')
        pair = None if prior is None else functional._check_pair("prior", prior)
        if transposed:
            pair = None if pair is None else tuple(_by_element(t, mu) for t in pair)
            scale, mu = _by_element(scale, mu), _by_element(mu, mu)
        return functional.gaussian_kl(
            mu,
            scale,
            pair,
            self.posterior_param,
            self.prior_param,
            self.posterior_clamp,
            self.posterior_clamp_mode,
        )

    def _kl_terms(
        self, mu, scale, prior, log_q, log_p, analytic_kl
    ) -> tuple[Tensor, Tensor | None, float]:
        """The two row terms whose difference is the KL term, and its weight β."""
        terms = log_q, log_p
        if analytic_kl is not None:
            terms = analytic_kl if log_q.dim() == 1 else analytic_kl.expand(log_q.shape), None
        # Shaped, the KL term is one number for the batch, and the same in every row.
        if self.free_bits is not None:
            summed = self._gaussian_kl(mu, scale, prior, transposed=True)
            per_element = summed / max(mu.shape[0], 1)
            terms = per_element.clamp(min=self.free_bits).sum().expand(log_q.shape), None
        elif self.capacity is not None:
            kl = log_q - log_p if analytic_kl is None else analytic_kl
            terms = (kl.mean() - self.capacity).abs().to(kl.dtype).expand(log_q.shape), None
        beta = self.beta
        if isinstance(beta, Tensor):
            if beta.dim() > 0:
                raise ValueError(f"beta must be a float or a 0-dim tensor, got {tuple(beta.shape)}")
            kl = terms[0] if terms[1] is None else terms[0] - terms[1]
            terms, beta = (kl * beta.to(kl.dtype), None), 1.0
        return *terms, beta

    def extra_repr(self) -> str:
        """Every option that is not at its default, for ``repr``."""
        options = {
            name: value for name, value in self.options().items() if value != _DEFAULTS[name]
        }
        return ", ".join(f"{name}={value!r}" for name, value in options.items())

    def options(self) -> dict[str, Any]:
        """The constructor's keyword arguments, without the prior."""
        return {name: getattr(self, name) for name in _DEFAULTS}


_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(FusedELBO).parameters.items()
    if name != "prior"
}


class _DoublyReparameterized(torch.autograd.Function):
    """z, log q and log p, whose gradients are each multiplied by (1 − β) + β·w̃.

    w̃ is the sample's normalised weight. Tucker et al. 2019, "Doubly Reparameterized Gradient
    Estimators for Monte Carlo Objectives": the posterior's gradient has the weights squared,
    the decoder's has them once. For β ≠ 1 the score that they replace has the factor β, so that
    w̃·∂log w/∂z − β·w̃(1 − w̃)·∂log w/∂z remains. The weights are known after the decoder, so they
    come back as the gradient of a tensor of zeros that the objective adds to the rows' terms.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(z, log_q, log_p, beta):
        return z.view_as(z), log_q.view_as(log_q), log_p.view_as(log_p), torch.zeros_like(log_q)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        beta = inputs[3]
        ctx.beta = beta.clone() if isinstance(beta, Tensor) else beta  # it may be refilled

    @staticmethod
    @once_differentiable  # an estimate of a gradient is nobody's gradient
    def backward(ctx, g_z, g_log_q, g_log_p, g_tag):
        if g_tag is None:
            return g_z, g_log_q, g_log_p, None
        total = g_tag.sum(0)
        weights = torch.where(total == 0.0, 0.0, g_tag / total)
        weights = (1.0 - ctx.beta) + ctx.beta * weights
        if g_z is not None:
            g_z = g_z * weights.view(*weights.shape, *(1,) * (g_z.dim() - 2)).to(g_z.dtype)
        return (
            g_z,
            None if g_log_q is None else g_log_q * weights,
            None if g_log_p is None else g_log_p * weights,
            None,
        )


def _by_element(t: Tensor, like: Tensor) -> Tensor:
    """``t`` of ``like``'s shape (B, *latent), or broadcast to it, as (L, B)."""
    if not functional._same_shape(t, like):
        t = t.expand(like.shape)
    return (t if t.dim() == 2 else t.reshape(like.shape[0], math.prod(like.shape[1:]))).t()


def _check_number(name: str, value: object) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def _check_weight(weight: object, rows: Tensor) -> Tensor:
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a torch.Tensor, got {type(weight).__name__}")
    if weight.device != rows.device:
        raise ValueError(
            f"weight is on {weight.device}, but the other tensors are on {rows.device}"
        )
    if weight.shape != rows.shape:
        raise ValueError(
            f"weight must have shape ({rows.shape[0]},), one value per row of x; "
            f"got {tuple(weight.shape)}"
        )
    if functional._validate:
        functional._check_values(weight=weight)
    return weight.to(rows.dtype)


def _mean_and_scale(output: object) -> tuple[Tensor, Tensor | float | None]:
    if isinstance(output, Tensor):
        return output, None
    if isinstance(output, (tuple, list)) and len(output) == 2:
        packed = _packed(output[0], output[1])
        return (output[0], output[1]) if packed is None else (packed, None)
    raise TypeError(
        "decoder must return (mean, scale), or one tensor packed along dimension 1; got "
        f"{functional._kind(output)}"
    )


def _packed(mean: object, scale: object) -> Tensor | None:
    """The tensor whose dimension 1 was split into (mean, scale), if that is what happened.

    Reading it packed gives it one packed gradient, where the split's own backward pass would
    concatenate two. Not if anything lies between the halves and the tensor, or watches them.
    """
    if torch.compiler.is_dynamo_compiling() or type(mean) is not Tensor:
        return None
    if (base := mean._base) is None or type(scale) is not Tensor or base is not scale._base:
        return None
    if not eager.suffices():
        return None
    if base.dim() != mean.dim() or mean.dim() < 2:
        return None
    half = mean.shape[1]
    fits = (
        mean.shape == scale.shape
        and base.shape == (mean.shape[0], 2 * half, *mean.shape[2:])
        and mean.stride() == scale.stride() == base.stride()
        and mean.storage_offset() == base.storage_offset()
        and scale.storage_offset() == base.storage_offset() + half * base.stride(1)
    )
    return base if fits and all(_is_slice(t, base) for t in (mean, scale)) else None


# What split, chunk, tensor_split, narrow and indexing with slices leave in the graph.
_SLICES = "SplitBackward0", "SplitWithSizesBackward0", "SliceBackward0"


def _is_slice(t: Tensor, base: Tensor) -> bool:
    """Whether the gradient of a view goes straight to ``base``, and nobody else sees it."""
    if not base.requires_grad:
        return not t.requires_grad
    node = t.grad_fn
    if node is None or node.name() not in _SLICES or t._backward_hooks or t.retains_grad:
        return False
    into, number = node.next_functions[0]
    if base.grad_fn is None:
        return getattr(into, "variable", None) is base
    return into is base.grad_fn and number == base.output_nr


def _check_not_latent(z: Tensor, mean: Tensor, scale: Tensor | None) -> None:
    for name, t in (("mean", mean), ("scale", scale)):
        # What writes() asks for costs more, and is seldom asked.
        aliases = isinstance(t, Tensor) and torch._C._is_alias_of(t, z) and t.numel() > 0
        if aliases and eager.writes(z, t):
            raise ValueError(f"inplace=True would overwrite z, whose memory {name} shares")
