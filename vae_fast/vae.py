"""``VAE``: a variational autoencoder trained with the fused ELBO.

A ``VAE`` is an encoder, a decoder and a :class:`vae_fast.FusedELBO`. Bring your own two networks,
or let :meth:`VAE.mlp` or :meth:`VAE.conv` build them.
"""

from __future__ import annotations

import inspect
import itertools
import json
import math
import numbers
import os
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from vae_fast import _files, functional, noise, ops, reference
from vae_fast.elbo import OPTIMAL, ELBOOutput, FusedELBO, Prior

__all__ = ["VAE"]

# The scale τ of a density p(x|z) may learn anything between these, by default. Without a floor a
# learned scale has no best value: where the data never varies (the blank corner of an image) the
# density grows without bound as τ shrinks. The floor is in units of x. At 0.03 one element adds at
# most −log 0.03 − ½ log 2π = 2.59 nats to a Gaussian log p(x|z) (2.81 to a Laplace, 2.53 to a
# Student t of 4 degrees of freedom); for data in steps of Δ, a floor of at least Δ/√(2π) also keeps
# the density at or below 1/Δ, that of certainty about the step (Δ = 1/16 needs 0.025). Floors of
# 0.018 to 0.12 all train stably on the digits.
_MIN_STD, _MAX_STD = 0.03, 30.0
# The discretized logistic is a mass, at most 1 at any τ, so its floor is in units of a level and
# far lower: it keeps the gradient of an outlier, 1/τ, within reason. At a tenth of a level the
# level at the mean already has 98.7 % of the mass; the code of PixelCNN++ (Salimans et al. 2017)
# has log τ ≥ −7 for levels 2/255 apart, which is 0.116 of one.
_LOGISTIC_LEVELS = (0.1, 255 * _MAX_STD)

_FORMATS = (1, 2)  # 1: the Gaussian likelihood, N(0, 1) as the prior
_METADATA_KEY = "vae_fast"
# Parameters whose raw value may be any real number, so that a plain linear layer can output them.
_UNCONSTRAINED = ("logvar", "logstd", "softplus")
_VARIANCES = ("full", "scalar", "channel", "unit")
_OPTIONS = tuple(inspect.signature(FusedELBO).parameters)
# Counters of the noise stream between what one key is used for: more than fits in any memory.
_APART = 2**40


class VAE(nn.Module):
    """A variational autoencoder with a diagonal Gaussian posterior.

    Its loss is the negative ELBO, E_q[log q(z|x) − log p(z)] − E_q[log p(x|z)] (Kingma and Welling
    2014, eq. 3), in nats, computed by :class:`vae_fast.FusedELBO`.

    Args:
        encoder: maps x of shape (B, *event) to ``(mu, scale)`` of q(z|x), each (B, *latent), or to
            one tensor with the two packed along dim 1.
        decoder: maps z of shape (N, *latent) to ``(mean, scale)`` of p(x|z), each (N, *event), or
            to one tensor with the two packed along dim 1: (N, 2·C, ...) for events (C, ...).
            ``scale`` may have any shape that broadcasts to the mean: 0-dim, one scale for every
            element, say. Where the likelihood has no scale (``"bernoulli"``, whose mean is given as
            logits) or ``likelihood_scale`` gives it, the mean alone.
        latent_dim: shape of z without its batch dimension; an int L means (L,).
        likelihood_clamp: ``(lo, hi)`` for the decoder's raw scale; outside it the scale gets no
            gradient, as with ``torch.clamp``, unless ``likelihood_clamp_mode="soft"``. The default
            "auto" keeps the scale τ of a density p(x|z) between 0.03 and 30, in the units of x,
            which suits data scaled to [0, 1] or standardised, and that of ``"logistic"`` above a
            tenth of a level; it sets no limit to a fixed ``likelihood_scale``. It is worked out
            once: who sets the likelihood or its parameter anew sets ``elbo.likelihood_clamp`` as
            well. ``None`` sets no limit: where the data does not vary, a learned density then
            narrows until the loss is not finite.
        options: every other keyword of :class:`vae_fast.FusedELBO`, which documents them and has
            the same defaults: ``beta`` and ``num_samples``; ``likelihood`` and
            ``likelihood_scale``; ``posterior_param`` and ``likelihood_param``; ``kl``,
            ``objective`` and ``estimator``; ``prior``; ``free_bits`` and ``capacity``; ``x_scale``
            and ``dequantize`` for uint8 data; ``reduction`` and ``inplace``; ...

    Inputs and outputs of every method are in the dtype and on the device of the networks. x may
    also be uint8: the loss then takes it as it is, and the encoder sees a·x + b, (a, b) =
    ``x_scale``, (1/255, 0) by default.

    Raises:
        TypeError: for an option that does not exist.
        ValueError: for options that exclude each other or a latent that is not of ``latent_dim``.
    """

    def __init__(
        self,
        encoder: nn.Module | Callable[[Tensor], Any],
        decoder: nn.Module | Callable[[Tensor], Any],
        latent_dim: int | Sequence[int],
        *,
        likelihood_clamp: tuple[float, float] | str | None = "auto",
        **options: Any,
    ) -> None:
        super().__init__()
        _check_options(options)
        self.encoder = encoder
        self.decoder = decoder
        self.latent_shape = _shape(latent_dim, "latent_dim")
        if isinstance(likelihood_clamp, str) and likelihood_clamp != "auto":
            raise ValueError(
                f'likelihood_clamp must be "auto", None or (lo, hi), got {likelihood_clamp!r}'
            )
        auto = likelihood_clamp == "auto"
        self.elbo = FusedELBO(likelihood_clamp=None if auto else likelihood_clamp, **options)
        if auto:
            self.elbo.likelihood_clamp = _auto_clamp(self.elbo)
        self._architecture: dict[str, Any] | None = None

    def __setattr__(self, name: str, value: object) -> None:
        """Refuse the loss's options, which would have no effect here."""
        if name in _OPTIONS and type(self) is VAE:  # other classes may have a use for the names
            raise AttributeError(f"{name} is an option of the loss: set vae.elbo.{name}")
        super().__setattr__(name, value)

    # ---------------------------------------------------------------- ready-made networks

    @classmethod
    def mlp(
        cls,
        event_shape: int | Sequence[int],
        latent_dim: int,
        hidden: Sequence[int] = (512, 256),
        *,
        variance: str | None = None,
        **options: Any,
    ) -> VAE:
        """A VAE whose encoder and decoder are fully connected, with SiLU between the layers.

        Args:
            event_shape: shape of one data point, any number of dimensions; an int D means (D,).
            latent_dim: number of latent elements L.
            hidden: widths of the encoder's hidden layers; the decoder has them in reverse.
            variance: what the decoder learns of the scale of p(x|z): "full", one value per element
                and per z; "scalar", one value for everything; "channel", one value for each index
                of the event's first dimension; "unit", nothing, τ = 1. "full" if ``None``, unless
                the likelihood has no scale or ``likelihood_scale`` gives it, where nothing else is
                possible. Adam moves the values of "scalar" and "channel", the parameter
                ``decoder.scale``, by about its learning rate per step, so give it a larger rate
                than the rest.
            options: any keyword of :class:`VAE`.

        Returns:
            A ``VAE`` that takes x of shape (B, *event_shape).
        """
        event = _shape(event_shape, "event_shape")
        latent = _positive(latent_dim, "latent_dim")
        hidden = tuple(_positive(h, "hidden") for h in hidden)
        size = math.prod(event)
        learned = _learned_variance(variance, options)

        outputs = 2 if learned == "full" else 1
        encoder = nn.Sequential(_Flatten(event), *_dense((size, *hidden, 2 * latent)))
        decoder = nn.Sequential(
            *_dense((latent, *reversed(hidden), outputs * size)),
            nn.Unflatten(1, (outputs * event[0], *event[1:])),
        )
        decoder = _with_variance(decoder, learned, event, options)
        vae = cls(encoder, decoder, latent, **options)
        vae._architecture = {
            "kind": "mlp",
            "event_shape": list(event),
            "latent_dim": latent,
            "hidden": list(hidden),
            "variance": variance,
        }
        return vae

    @classmethod
    def conv(
        cls,
        event_shape: Sequence[int],
        latent_dim: int,
        channels: Sequence[int] = (32, 64),
        *,
        variance: str | None = None,
        **options: Any,
    ) -> VAE:
        """A VAE for images: each layer halves (encoder) or doubles (decoder) height and width.

        Args:
            event_shape: (C, H, W) of one image; any height and width, odd ones too.
            latent_dim: number of latent elements L.
            channels: channels of the encoder's layers; the decoder has them in reverse.
            variance: as in :meth:`VAE.mlp`.
            options: any keyword of :class:`VAE`.

        Returns:
            A ``VAE`` that takes x of shape (B, C, H, W).
        """
        event = _shape(event_shape, "event_shape")
        if len(event) != 3:
            raise ValueError(f"event_shape of VAE.conv must be (C, H, W), got {event}")
        latent = _positive(latent_dim, "latent_dim")
        channels = tuple(_positive(c, "channels") for c in channels)
        if not channels:
            raise ValueError("channels must name at least one layer")
        learned = _learned_variance(variance, options)

        # A 3×3 convolution of stride 2 maps a size n to ceil(n/2). Its transpose maps that back to
        # n with one element of output padding where n is even, so no size needs cropping.
        sizes = [event[1:]]
        for _ in channels:
            sizes.append(tuple((n + 1) // 2 for n in sizes[-1]))
        features = channels[-1] * math.prod(sizes[-1])
        down: list[nn.Module] = []
        for i, o in itertools.pairwise((event[0], *channels)):
            down += [nn.Conv2d(i, o, 3, stride=2, padding=1), nn.SiLU()]
        encoder = nn.Sequential(*down, nn.Flatten(), nn.Linear(features, 2 * latent))

        outputs = 2 if learned == "full" else 1
        up: list[nn.Module] = [
            nn.Linear(latent, features),
            nn.SiLU(),
            _ChannelsLast(1, (channels[-1], *sizes[-1])),
        ]
        widths = (*reversed(channels), channels[0])
        for (i, o), size in zip(itertools.pairwise(widths), reversed(sizes[:-1]), strict=True):
            padding = tuple(1 - n % 2 for n in size)
            up += [
                nn.ConvTranspose2d(i, o, 3, stride=2, padding=1, output_padding=padding),
                nn.SiLU(),
            ]
        last = nn.Conv2d(widths[-1], outputs * event[0], 3, padding=1)
        decoder = nn.Sequential(*up, last, _Contiguous())
        decoder = _with_variance(decoder, learned, event, options)
        vae = cls(encoder, decoder, latent, **options)
        vae._architecture = {
            "kind": "conv",
            "event_shape": list(event),
            "latent_dim": latent,
            "channels": list(channels),
            "variance": variance,
        }
        return vae

    # ---------------------------------------------------------------- the model

    def forward(
        self,
        x: Tensor,
        key: Tensor | None = None,
        generator: torch.Generator | None = None,
        first_row: int = 0,
        mask: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> ELBOOutput:
        """The loss of a batch and its parts.

        Args:
            x: data, (B, *event), in the networks' dtype or uint8.
            key: ``uint64`` tensor of shape (2,) that fixes the noise; drawn if ``None``.
            generator: where to draw the key from; the device's default generator if ``None``.
            first_row: global index of the batch's first row, so that the parts of a split batch
                draw what the whole would have drawn from the same key.
            mask: bool, broadcastable to x; what is False is missing data, whatever it holds, and
                no part of p(x|z). The encoder sees zeros in its place.
            weight: weights of the rows' losses, (B,).

        Returns:
            An :class:`vae_fast.ELBOOutput`: ``loss``, and per row ``nll``, ``kl``, ``log_q``,
            ``log_p``, in nats, and ``z``.
        """
        mu, scale = self._encode(x, mask)
        return self.elbo(
            x,
            mu,
            scale,
            self.decoder,
            key=key,
            generator=generator,
            first_row=first_row,
            mask=mask,
            weight=weight,
        )

    def encode(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and scale of q(z|x).

        Args:
            x: data, (B, *event).
            mask: what of x there is, as in :meth:`forward`.

        Returns:
            mu (B, *latent) and scale (B, *latent) or 0-dim; the scale is in ``posterior_param``'s
            terms and already clamped.
        """
        mu, scale = self._encode(x, mask)
        elbo = self.elbo
        return mu, reference.clamp_scale(scale, elbo.posterior_clamp, elbo.posterior_clamp_mode)

    def decode(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the likelihood p(x|z) is made of: its location and its scale.

        Args:
            z: latents, (N, *latent).

        Returns:
            mean (N, *event), logits for ``"bernoulli"``, and the scale as the decoder gives it,
            (N, *event) or of a shape that broadcasts to it, in ``likelihood_param``'s terms and
            already clamped. A fixed ``likelihood_scale`` is a 0-dim tensor, fp32 (fp64 for fp64).
            ``None`` for ``"bernoulli"``, which has no scale, and for the ``"optimal"`` ones, which
            depend on x.
        """
        if tuple(z.shape[1:]) != self.latent_shape:
            raise ValueError(
                f"z must be of shape (N, {_joined(self.latent_shape)}), got {tuple(z.shape)}"
            )
        elbo, output = self.elbo, self.decoder(z)
        if elbo.likelihood_scale is None and elbo.likelihood != "bernoulli":
            mean, scale = _pair(output, "decoder")
        else:
            mean, scale = elbo._decode(output)
        if scale is None:
            return mean, None
        if not isinstance(scale, Tensor):
            scale = torch.full((), scale, dtype=ops.accumulation_dtype(mean), device=mean.device)
        return mean, reference.clamp_scale(scale, elbo.likelihood_clamp, elbo.likelihood_clamp_mode)

    @torch.no_grad()
    def reconstruct(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The mean of p(x|z) at the mean z of q(z|x): nothing is sampled, nothing has a gradient.

        Args:
            x: data, (B, *event).
            mask: what of x there is, as in :meth:`forward`; the rest is made up.

        Returns:
            Reconstructions, (B, *event): means, as in :meth:`sample`.
        """
        return self._mean(self._encode(x, mask)[0])

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        key: Tensor | None = None,
        generator: torch.Generator | None = None,
        noise: bool = False,
    ) -> Tensor:
        """Draw z from the prior and return what the decoder makes of it.

        A callable prior draws z itself, ``prior.sample(n)`` of shape (n, *latent), and by its own
        random numbers.

        Args:
            n: number of samples.
            key: ``uint64`` tensor of shape (2,) that fixes the draw, the same on every device.
            generator: where to draw the key from; the device's default generator if ``None``.
            noise: return a draw of x from p(x|z) instead of its mean: for ``"bernoulli"`` of 0 and
                1, for ``"logistic"`` of the 256 levels. The mean is what one usually looks at; the
                draw is what the model says the data look like.

        Returns:
            Samples of x, (n, *event), in floating point. Means are σ(logits) for ``"bernoulli"``;
            for ``"logistic"`` that of the density between the first and the last level; for
            ``"student_t"`` the location, even of one without a mean.

        Raises:
            ValueError: there is no way to draw from the prior; or ``noise`` of a model whose
                variance is estimated from the data.
        """
        if n < 0:
            raise ValueError(f"n must be at least 0, got {n}")
        if noise and self.elbo.likelihood_scale in OPTIMAL:
            raise ValueError(
                f"likelihood_scale={self.elbo.likelihood_scale!r} estimates the variance of p(x|z) "
                "from x, so without x there is none to draw with; noise=False gives the means"
            )
        device, dtype = self._where(self.decoder)
        key = _key(key, device, generator)
        z = self._sample_prior(n, key, dtype)
        if not noise:
            return self._mean(z)
        # The same key half the counter space further on: a stream that z has no part in.
        return _draw(self.elbo, *self.decode(z), _later(key, -(2**63)))

    @torch.no_grad()
    def interpolate(self, x0: Tensor, x1: Tensor, steps: int = 10) -> Tensor:
        """Walk in a straight line between the latent means of two data points.

        Args:
            x0: where to start, (B, *event).
            x1: where to end, (B, *event).
            steps: points on each line, both ends included; at least 2.

        Returns:
            Means of p(x|z) along the lines, (steps, B, *event). The first and the last step are
            the reconstructions of ``x0`` and ``x1``.
        """
        if steps < 2:
            raise ValueError(f"steps must be at least 2, got {steps}")
        if x0.shape != x1.shape:
            raise ValueError(
                "x0 and x1 must have the same shape (B, *event), "
                f"got {tuple(x0.shape)} and {tuple(x1.shape)}"
            )
        start, end = self._encode(x0)[0], self._encode(x1)[0]
        t = torch.linspace(0, 1, steps, device=start.device, dtype=start.dtype)
        z = torch.lerp(start, end, t.reshape(-1, *(1,) * start.dim()))
        return self._mean(z.flatten(0, 1)).unflatten(0, (steps, -1))

    @torch.no_grad()
    def log_likelihood(
        self,
        x: Tensor,
        num_samples: int = 1000,
        chunk: int = 100,
        *,
        key: Tensor | None = None,
        generator: torch.Generator | None = None,
        mask: Tensor | None = None,
        first_row: int = 0,
    ) -> Tensor:
        """An importance-sampling estimate of log p(x), without a gradient.

        log 1/K Σ_k p(x|z_k)·p(z_k)/q(z_k|x), z_k ~ q(z|x): the bound of Burda et al. 2016, eq. 8,
        which rises to log p(x) with K. It is made of the model alone: β, free bits, the capacity
        and the objective of the training do not enter.

        Args:
            x: data, (B, *event), in the networks' dtype or uint8.
            num_samples: K, latent samples per row.
            chunk: how many of them to decode at a time, so that the decoder sees at most chunk·B
                rows. Chunks share no random number; their size changes which ones are drawn, and
                so the estimate by its random error, but nothing else.
            key: ``uint64`` tensor of shape (2,) that fixes the noise for a given chunk size.
            generator: where to draw the key from; the device's default generator if ``None``.
            mask: what of x there is, as in :meth:`forward`; the result is log p of that part.
            first_row: global index of the batch's first row, as in :meth:`forward`: batches with
                one key need it, or they all have the same noise.

        Returns:
            log p(x) in nats, (B,), fp32 (fp64 for fp64): of the mass of ``"bernoulli"`` and
            ``"logistic"``, of the density of the others, in the units that ``x_scale`` gives a
            uint8 x, and with ``dequantize=True`` of its mean over each level.

        Raises:
            ValueError: for ``likelihood_scale="optimal"`` and its like, which estimate the variance
                from x itself: that is no density of x.
        """
        elbo = self.elbo
        functional._check_count("num_samples", num_samples)
        functional._check_count("chunk", chunk)
        if elbo.likelihood_scale in OPTIMAL:
            raise ValueError(
                f"likelihood_scale={elbo.likelihood_scale!r} estimates the variance of p(x|z) from "
                "x itself, so the model has no density of x; fix or learn a scale instead"
            )
        mu, scale = self._encode(x, mask)
        key = _key(key, mu.device, generator)
        prior = elbo._gaussian_prior() if elbo.prior == "gaussian" else elbo.prior
        # fp64, because every chunk rounds the sum so far.
        total = torch.full(mu.shape[:1], -math.inf, dtype=torch.float64, device=mu.device)
        for index, done in enumerate(range(0, num_samples, chunk)):
            k, part = min(chunk, num_samples - done), _later(key, index * _APART)
            z, log_q, log_p = functional.reparameterize(
                mu,
                scale,
                elbo.posterior_param,
                k,
                part,
                clamp=elbo.posterior_clamp,
                clamp_mode=elbo.posterior_clamp_mode,
                first_row=first_row,
            )
            rows = z.flatten(0, 1)
            if prior is not None:
                log_p = elbo._log_prior(z, rows, prior)
            nll = self._nll(x, rows, log_q, part, first_row, mask)
            total = torch.logaddexp(total, torch.logsumexp((log_p - log_q - nll).double(), 0))
        return (total - math.log(num_samples)).to(ops.accumulation_dtype(mu))

    # ---------------------------------------------------------------- files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the weights and the configuration to one safetensors file.

        The configuration is JSON in the file's header, so nothing is pickled and the two cannot be
        separated. The file appears complete or not at all. Of a callable prior it has the weights,
        if it is a module, but not the code; nor has it that of networks that :meth:`mlp` and
        :meth:`conv` did not make, or in which layers were changed since.

        Args:
            path: the file to write, usually ``something.safetensors``.

        Raises:
            ModuleNotFoundError: safetensors is not installed.
            ValueError: the weights are parts of a sharded model's.
        """
        safetensors = _safetensors()
        for name, value in self.state_dict().items():
            if hasattr(value, "full_tensor"):  # a DTensor
                raise ValueError(
                    f"{name} is a shard: load what torch.distributed.checkpoint.state_dict's "
                    "get_model_state_dict gathers, full_state_dict=True, into a VAE that is not "
                    "sharded, and save that"
                )
        # A copy each, because the format has no notion of tensors that share memory. A module that
        # torch.compile wraps is the module.
        weights = {
            name.replace("_orig_mod.", ""): value.detach().to("cpu", copy=True).contiguous()
            for name, value in self.state_dict().items()
        }
        config = {
            "format": _FORMATS[-1],
            "architecture": self._architecture if self._can_be_rebuilt(weights) else None,
            "latent_shape": list(self.latent_shape),
            "options": {
                name: float(value.detach()) if isinstance(value, Tensor) else value
                for name, value in self.elbo.options().items()
            },
            "prior": self._prior_config(),
        }
        # One entry: the format writes several in any order, and equal models should be equal files.
        header = {_METADATA_KEY: json.dumps(config)}
        _files.write_atomic(path, safetensors.torch.save(weights, metadata=header))

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        prior: Callable[[Tensor], Tensor] | None = None,
        device: torch.device | str = "cpu",
    ) -> VAE:
        """Read what :meth:`save` wrote.

        Args:
            path: the file.
            encoder: for a model that was not made by :meth:`mlp` or :meth:`conv`: a network of the
                same structure, whose weights are overwritten.
            decoder: likewise.
            prior: for a model with a callable prior: that callable, whose weights are overwritten
                if it is a module.
            device: where to put the model.

        Returns:
            The model, in training mode like any new module.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is not such a file, needs ``encoder`` and ``decoder``, or
                ``prior``, or holds other weights than those that are given have.
            ModuleNotFoundError: safetensors is not installed.
        """
        safetensors = _safetensors()
        weights = {}
        try:
            with safetensors.safe_open(os.fspath(path), framework="pt", device="cpu") as file:
                metadata = file.metadata() or {}
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    weights[name] = file.get_tensor(name).clone()
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file: {error}") from error
        if _METADATA_KEY not in metadata:
            raise ValueError(f"{path} was not written by VAE.save: its header has no configuration")
        try:
            config = json.loads(metadata[_METADATA_KEY])
            if config["format"] not in _FORMATS:
                raise ValueError(
                    f"{path} has format {config['format']}, this version reads formats up to "
                    f"{_FORMATS[-1]}"
                )
            vae = cls._rebuilt(path, config, weights, encoder, decoder, prior)
        except (KeyError, TypeError, AttributeError, RuntimeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{path} is damaged, or its weights are not those of these networks: {error!r}"
            ) from error
        return vae.to(device)

    # ---------------------------------------------------------------- private

    @classmethod
    def _rebuilt(cls, path, config, weights, encoder, decoder, prior) -> VAE:
        """The model of a file, with what :meth:`load` was given."""
        options = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in config["options"].items()
        }
        options["prior"] = _load_prior(path, config.get("prior"), weights, prior)
        architecture = config["architecture"]
        if architecture is None and (encoder is None or decoder is None):
            raise ValueError(
                f"{path} holds a model with an encoder and a decoder of its own, which a file "
                "cannot rebuild: pass both, VAE.load(path, encoder=..., decoder=...)"
            )
        if encoder is not None or decoder is not None:
            if encoder is None or decoder is None:
                raise ValueError("pass both encoder and decoder, or neither")
            try:
                vae = cls(encoder, decoder, config["latent_shape"], **options)
            except TypeError as error:
                if cls.__init__ is VAE.__init__:
                    raise
                raise ValueError(
                    f"{cls.__name__} cannot be made with (encoder, decoder, latent_dim, **options) "
                    f"({error}): load a VAE, with VAE.load, or override __init__ compatibly"
                ) from error
            vae.load_state_dict(weights)
        else:
            vae = cls._of(architecture, options)
            vae.load_state_dict(weights, assign=True)  # also takes the saved dtypes
        return vae

    @classmethod
    def _of(cls, architecture: dict[str, Any], options: dict[str, Any]) -> VAE:
        architecture = dict(architecture)
        build = {"mlp": cls.mlp, "conv": cls.conv}[architecture.pop("kind")]
        return build(**architecture, **options)

    def _can_be_rebuilt(self, weights: dict[str, Tensor]) -> bool:
        """Whether the networks are still those that :meth:`mlp` or :meth:`conv` made."""
        if self._architecture is None:
            return False
        try:
            with torch.device("meta"):
                made = self._of(self._architecture, self.elbo.options())
        except ValueError:  # options that go with other networks
            return False
        ours = {name: t.shape for name, t in weights.items() if not name.startswith("elbo.")}
        theirs = {name: t.shape for name, t in made.state_dict().items()}
        return (
            ours == theirs
            and _layers(self.encoder) == _layers(made.encoder)
            and _layers(self.decoder) == _layers(made.decoder)
        )

    def _encode(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        mu, scale = _pair(self.encoder(self._encoder_input(x, mask)), "encoder")
        if tuple(mu.shape[1:]) != self.latent_shape:
            raise ValueError(
                f"the encoder's mean must be of shape (B, {_joined(self.latent_shape)}) to match "
                f"latent_dim, got {tuple(mu.shape)}"
            )
        return mu, scale

    def _encoder_input(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Data as the encoder sees them: uint8 in units of x, zeros for what is missing."""
        if x.dtype == torch.bool:  # an integer may be the index of an embedding, for all we know
            raise TypeError("x must be floating point or uint8; got bool: x.float() has its values")
        if x.dtype == torch.uint8:
            mul, add = self.elbo._levels
            x = x.to(self._where(self.encoder)[1]) * mul + add
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
                raise TypeError(f"mask must be a bool torch.Tensor, got {got}")
            mask = functional._broadcast("mask", mask, x)
        if functional._validate:  # before what the encoder makes of it is to blame
            functional._check_values(mask=mask, x=x)
        return x if mask is None else torch.where(mask, x, 0.0)

    def _mean(self, z: Tensor) -> Tensor:
        """The mean of p(x|z), (N, *event)."""
        mean, scale = self.decode(z)
        if self.elbo.likelihood == "bernoulli":
            return torch.sigmoid(mean)
        if self.elbo.likelihood != "logistic":
            return mean
        # ∫ t·p(t) dt with what lies outside the levels moved to the nearest one: the integral of
        # σ((m − t)/τ) over their range. The mean of the levels is its midpoint rule.
        mul, add = self.elbo._levels
        acc = ops.accumulation_dtype(mean)
        _, tau = reference.log_scale_and_scale(scale.to(acc), self.elbo.likelihood_param)
        first = (mean.to(acc) - add) / tau
        last = first - 255.0 * mul / tau
        inside = tau * (nn.functional.softplus(first) - nn.functional.softplus(last))
        return (add + inside).to(mean.dtype)

    def _nll(
        self,
        x: Tensor,
        z: Tensor,
        log_q: Tensor,
        key: Tensor,
        first_row: int,
        mask: Tensor | None,
    ) -> Tensor:
        """−log p(x|z) of k samples, rows k·B + b of z, (k, B); the key dequantizes."""
        elbo, samples = self.elbo, log_q.shape[0]
        mean, scale = elbo._decode(self.decoder(z))
        if not elbo.dequantize:
            return elbo._nll(x, mean, scale, log_q, key, first_row, mask).view(log_q.shape)

        # Every sample has noise of its own. That is the noise of rows: a row's samples follow each
        # other there, so that they are the same ones in whatever batch the row is.
        def by_row(t):
            rows = isinstance(t, Tensor) and t.dim() == mean.dim() and t.shape[0] == mean.shape[0]
            return t.unflatten(0, log_q.shape).transpose(0, 1).flatten(0, 1) if rows else t

        if mask is not None:
            mask = mask.expand(x.shape).repeat_interleave(samples, 0)
        x, scale, mean = x.repeat_interleave(samples, 0), by_row(scale), by_row(mean)
        nll = elbo._nll(x, mean, scale, log_q.t().flatten(), key, first_row * samples, mask)
        return nll.view(-1, samples).t()

    def _sample_prior(self, n: int, key: Tensor, dtype: torch.dtype) -> Tensor:
        """Draw z, (n, *latent), from the prior."""
        prior, shape = self.elbo.prior, (n, *self.latent_shape)
        if prior is None:
            return _normal(key, n, self.latent_shape, dtype)
        if prior == "gaussian":
            mu, scale = self.elbo._gaussian_prior()
            _, sigma = reference.log_scale_and_scale(scale, self.elbo.prior_param)
            try:
                mu, sigma = (t.to(key.device).expand(1, *self.latent_shape) for t in (mu, sigma))
            except RuntimeError:
                raise ValueError(
                    f"prior differs between rows, so there is no one distribution to sample: its "
                    f"tensors of shapes {tuple(mu.shape)} and {tuple(scale.shape)} do not "
                    f"broadcast to the latent's ({_joined(self.latent_shape)})"
                ) from None
            eps = noise.normal(key, n, None, self.latent_shape, dtype=dtype)
            return (mu + sigma * eps).to(dtype)
        if not hasattr(prior, "sample"):
            raise ValueError(
                "prior gives the density of z but no way to draw it: add a method sample(n) that "
                f"returns z of shape (n, {_joined(self.latent_shape)})"
            )
        z = prior.sample(n)
        if not isinstance(z, Tensor) or tuple(z.shape) != shape:
            got = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
            raise ValueError(f"prior.sample({n}) must return z of shape {shape}, got {got}")
        return z.to(key.device, dtype)

    def _prior_config(self) -> dict[str, Any] | None:
        """What a file says of the prior; a Gaussian's tensors are among the weights."""
        if self.elbo.prior is None:
            return None
        if self.elbo.prior != "gaussian":
            return {"kind": "callable"}
        learned = [isinstance(t, nn.Parameter) for t in self.elbo._gaussian_prior()]
        return {"kind": "gaussian", "learned": learned}

    def _where(self, first: object) -> tuple[torch.device, torch.dtype]:
        """Device and dtype of the weights, of one of the networks if it has any."""
        for module in (first, self):
            if isinstance(module, nn.Module):
                for tensor in itertools.chain(module.parameters(), module.buffers()):
                    if tensor.is_floating_point():
                        return tensor.device, tensor.dtype
        return torch.empty(()).device, torch.get_default_dtype()

    def extra_repr(self) -> str:
        """The part of ``repr`` that the submodules do not show."""
        return f"latent_shape={self.latent_shape}"


def _safetensors() -> ModuleType:
    try:
        import safetensors
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'VAE.save and VAE.load need safetensors: pip install "vae_fast[train]"'
        ) from error
    return safetensors


class _SharedScale(nn.Module):
    """A decoder of means, with a raw scale that no z changes: a parameter or a constant."""

    def __init__(self, mean: nn.Module, shape: tuple[int, ...], raw: float, learned: bool) -> None:
        super().__init__()
        self.mean, self._raw = mean, raw
        scale = torch.full(shape, raw)
        if learned:
            self.scale = nn.Parameter(scale)
        else:
            self.register_buffer("scale", scale)

    def reset_parameters(self) -> None:
        """As it began; for a model that was made on the meta device."""
        with torch.no_grad():
            self.scale.fill_(self._raw)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        # A copy: FSDP frees its parameters after the forward pass of the module that has them.
        return self.mean(z), self.scale.clone()


def _with_variance(
    decoder: nn.Module, learned: str | None, event: tuple[int, ...], options: dict[str, Any]
) -> nn.Module:
    if learned in (None, "full"):
        return decoder
    raw = _raw_scale(1.0, options.get("likelihood_param", "logvar"))
    shape = (event[0], *(1 for _ in event[1:])) if learned == "channel" else ()
    return _SharedScale(decoder, shape, raw, learned != "unit")


def _dense(widths: Sequence[int]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for i, o in itertools.pairwise(widths):
        layers += [nn.Linear(i, o), nn.SiLU()]
    return layers[:-1]


class _Flatten(nn.Flatten):
    """Data points as vectors: those of another shape but as many elements are a mistake."""

    def __init__(self, event: tuple[int, ...]) -> None:
        super().__init__()
        self.event = event

    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape[1:]) != self.event:
            raise ValueError(f"x must be of shape (B, {_joined(self.event)}), got {tuple(x.shape)}")
        return super().forward(x)


class _ChannelsLast(nn.Unflatten):
    """Vectors as images (N, C, H, W), stored pixel by pixel.

    Convolutions keep the layout that they are given, and in this one a whole training step takes a
    fifth less time on a CPU. The weights keep their own layout, which files and FSDP rely on.
    """

    def forward(self, rows: Tensor) -> Tensor:
        # contiguous(memory_format=...) would say the same, but torch.func.vmap refuses it.
        return super().forward(rows).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


class _Contiguous(nn.Module):
    """Images stored channel by channel again: as data are, and as the likelihood reads them."""

    def forward(self, images: Tensor) -> Tensor:
        return images.contiguous()


def _layers(network: nn.Module) -> list[tuple[type, str]]:
    """What a network's modules are and are made with; what torch.compile wraps is what counts."""
    return [(type(m), m.extra_repr()) for m in network.modules() if not hasattr(m, "_orig_mod")]


def _check_options(options: dict[str, Any]) -> None:
    for name in options:
        if name not in _OPTIONS:
            raise TypeError(f"unknown option {name!r}; VAE takes {', '.join(_OPTIONS)}")


def _learned_variance(variance: str | None, options: dict[str, Any]) -> str | None:
    """Which scale the decoder outputs, ``None`` if none, of checked options of mlp and conv."""
    _check_options(options)
    if variance is not None and variance not in _VARIANCES:
        raise ValueError(f"variance must be one of {', '.join(_VARIANCES)}; got {variance!r}")
    names = ["posterior_param"]
    scaled = options.get("likelihood_scale") is None and options.get("likelihood") != "bernoulli"
    if scaled:
        names.append("likelihood_param")
        variance = variance or "full"
    elif variance is not None:
        name = "likelihood" if options.get("likelihood_scale") is None else "likelihood_scale"
        raise ValueError(
            f"variance={variance!r} and {name}={options[name]!r} exclude each other: the decoder "
            "outputs means only"
        )
    for name in names:
        param = options.get(name, "logvar")
        if param not in _UNCONSTRAINED:
            raise ValueError(
                f"{name} must be one of {', '.join(_UNCONSTRAINED)} here, because these networks "
                f"output any real number; got {param!r}"
            )
    return variance


def _load_prior(
    path: object, config: dict[str, Any] | None, weights: dict[str, Tensor], given: Any
) -> Prior | None:
    """The prior of a model that is being loaded."""
    kind = None if config is None else config["kind"]
    if kind == "callable":
        if not callable(given):
            raise ValueError(
                f"{path} holds a model with a callable prior, which a file cannot rebuild: pass "
                "it, VAE.load(path, prior=...)"
            )
        return given
    if given is not None:
        raise ValueError(f"{path} needs no prior: its own is {kind or 'N(0, 1)'}")
    if kind is None:
        return None
    mu, scale = (
        nn.Parameter(weights[name].clone()) if learned else weights[name].clone()
        for name, learned in zip(
            ("elbo.prior_mu", "elbo.prior_scale"), config["learned"], strict=True
        )
    )
    return mu, scale


def _raw_scale(std: float, param: str) -> float:
    """The raw scale parameter that means a standard deviation of ``std``."""
    return {
        "logvar": 2.0 * math.log(std),
        "logstd": math.log(std),
        "std": std,
        "var": std * std,
        "softplus": std + math.log(-math.expm1(-std)),  # log(e^std − 1)
    }[param]


def _auto_clamp(elbo: FusedELBO) -> tuple[float, float] | None:
    """The default bounds of the decoder's raw scale, if it has one to learn."""
    if elbo.likelihood == "bernoulli" or isinstance(elbo.likelihood_scale, (int, float)):
        return None
    bounds = _MIN_STD, _MAX_STD
    if elbo.likelihood == "logistic":
        level, _ = elbo._levels
        bounds = tuple(level * n for n in _LOGISTIC_LEVELS)
    lo, hi = (_raw_scale(std, elbo.likelihood_param) for std in bounds)
    return lo, hi


def _draw(elbo: FusedELBO, mean: Tensor, scale: Tensor | None, key: Tensor) -> Tensor:
    """A draw of x from p(x|z) for each row of ``mean``, (N, *event)."""
    n, event = mean.shape[0], tuple(mean.shape[1:])
    acc = ops.accumulation_dtype(mean)
    if elbo.likelihood == "bernoulli":
        # u is on (0, 1]: never at or below 0, always at or below 1.
        return (noise.uniform(key, n, event) <= torch.sigmoid(mean.to(acc))).to(mean.dtype)
    _, tau = reference.log_scale_and_scale(scale.to(acc), elbo.likelihood_param)
    if elbo.likelihood == "gaussian":
        draw = noise.normal(key, n, None, event, dtype=mean.dtype)
    elif elbo.likelihood == "student_t":
        # A polar coordinate of the bivariate t, which is Box and Muller's for ν → ∞ (Bailey 1994,
        # "Polar generation of random variates with the t-distribution").
        u, v = noise.uniform(key, n, (2, *event)).double().unbind(1)
        radius = torch.sqrt(elbo.df * torch.expm1(-2.0 / elbo.df * torch.log(u)))
        draw = radius * torch.cos(2.0 * math.pi * v)
    else:
        # Inverse distribution functions, for which 1 is too much.
        u = noise.uniform(key, n, event).double().clamp(max=1.0 - 2.0**-25)
        if elbo.likelihood == "laplace":
            draw = torch.where(u < 0.5, torch.log(2.0 * u), -torch.log(2.0 * (1.0 - u)))
        else:
            draw = torch.logit(u)
    x = mean.to(acc) + tau * draw.to(acc)
    if elbo.likelihood == "logistic":
        mul, add = elbo._levels
        x = torch.round((x - add) / mul).clamp(0.0, 255.0) * mul + add
    return x.to(mean.dtype)


def _pair(output: Any, name: str) -> tuple[Tensor, Any]:
    """Mean and scale from a network's output, a pair or one tensor packed along dim 1.

    A pair's scale is a tensor, or a decoder's may be a number.
    """
    if isinstance(output, Tensor):
        if output.dim() < 2 or output.shape[1] % 2:
            raise ValueError(
                f"the {name} returned one tensor, which holds mean and scale packed along dim 1, "
                f"so that dimension must be even; got shape {tuple(output.shape)}"
            )
        mean, scale = output.chunk(2, dim=1)
        return mean, scale
    if (
        isinstance(output, (tuple, list))
        and len(output) == 2
        and isinstance(output[0], Tensor)
        and isinstance(output[1], (Tensor, int, float) if name == "decoder" else Tensor)
    ):
        return output[0], output[1]
    raise TypeError(
        f"the {name} must return (mean, scale) or one tensor packed along dim 1, "
        f"got {type(output).__name__}"
    )


def _key(key: Tensor | None, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """The key that was given, or a fresh one, on ``device``."""
    if key is None:
        key = noise.make_key(device if generator is None else generator.device, generator)
    noise.check_key(key)
    return key.to(device)


def _later(key: Tensor, counters: int) -> Tensor:
    """The key whose stream starts so many counters further on."""
    step = torch.arange(2, dtype=torch.int64, device=key.device) * counters  # no wait for a device
    return (key.view(torch.int64) + step).view(torch.uint64)


def _normal(key: Tensor, n: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return noise.normal(key, n, None, shape, dtype=dtype).to(dtype)


def _shape(shape: int | Sequence[int], name: str) -> tuple[int, ...]:
    dims = (shape,) if isinstance(shape, numbers.Integral) else tuple(shape)
    if not dims:
        raise ValueError(f"{name} must have at least one dimension")
    return tuple(_positive(d, name) for d in dims)


def _positive(value: int, name: str) -> int:
    if int(value) != value or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return int(value)


def _joined(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape))
