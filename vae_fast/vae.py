"""``VAE``: a variational autoencoder trained with the fused ELBO.

A ``VAE`` is an encoder, a decoder and a :class:`vae_fast.FusedELBO`. Bring your own two networks,
or let :meth:`VAE.mlp` or :meth:`VAE.conv` build them.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vae_fast import noise, reference
from vae_fast.elbo import ELBOOutput, FusedELBO

__all__ = ["VAE"]

# σ of p(x|z) may learn anything between these, by default. Without a floor a learned variance has
# no best value: where the data never varies (the blank corner of an image) the density grows
# without bound as σ shrinks. The floor is in units of x. At 0.03 one element adds at most
# −log 0.03 − ½ log 2π = 2.59 nats to log p(x|z); for data in steps of Δ, a floor of at least
# Δ/√(2π) also keeps the density at or below 1/Δ, that of certainty about the step (Δ = 1/16 needs
# 0.025). Floors of 0.018 to 0.12 all train stably on the digits.
_MIN_STD, _MAX_STD = 0.03, 30.0

_FORMAT = 1
_METADATA_KEY = "vae_fast"
# Parameters whose raw value may be any real number, so that a plain linear layer can output them.
_UNCONSTRAINED = ("logvar", "logstd", "softplus")
_VARIANCES = ("full", "scalar", "unit")
_OPTIONS = (
    "beta",
    "num_samples",
    "posterior_param",
    "likelihood_param",
    "kl",
    "reduction",
    "posterior_clamp",
    "likelihood_clamp",
    "inplace",
)


class VAE(nn.Module):
    """A variational autoencoder with a diagonal Gaussian posterior and a Gaussian decoder.

    Its loss is the negative ELBO, E_q[log q(z|x) − log p(z)] − E_q[log p(x|z)] (Kingma and Welling
    2014, eq. 3), in nats, computed by :class:`vae_fast.FusedELBO`.

    Args:
        encoder: maps x of shape (B, *event) to ``(mu, scale)`` of q(z|x), each (B, *latent), or to
            one tensor with the two packed along dim 1.
        decoder: maps z of shape (N, *latent) to ``(mean, scale)`` of p(x|z), each (N, *event), or
            to one tensor with the two packed along dim 1: (N, 2·C, ...) for events (C, ...).
            ``scale`` may also be a 0-dim tensor, one scale for every element.
        latent_dim: shape of z without its batch dimension; an int L means (L,).
        beta: weight of the KL term (Higgins et al. 2017, eq. 4).
        num_samples: samples K of z per data point. The decoder sees K·B rows.
        posterior_param: what the encoder's ``scale`` means: "logvar", "logstd", "std", "var" or
            "softplus".
        likelihood_param: what the decoder's ``scale`` means.
        kl: "monte_carlo": log q and log p are evaluated at the sample.
        reduction: "mean" or "sum" of the loss over the batch, or "none".
        posterior_clamp: ``(lo, hi)`` for the encoder's raw scale, or ``None``.
        likelihood_clamp: ``(lo, hi)`` for the decoder's raw scale; outside it the scale gets no
            gradient, as with ``torch.clamp``. The default "auto" keeps the standard deviation of
            p(x|z) between 0.03 and 30, in the units of x, which suits data scaled to [0, 1] or
            standardised. ``None`` sets no limit: where the data does not vary, a learned variance
            then shrinks until the loss is not finite.
        inplace: let the loss overwrite the decoder's output with its gradient. Saves memory; the
            decoder's output must not be used elsewhere.

    Inputs and outputs of every method are in the dtype and on the device of the networks.

    Raises:
        ValueError: for an option that does not exist or a latent that is not of ``latent_dim``.
    """

    def __init__(
        self,
        encoder: nn.Module | Callable[[Tensor], Any],
        decoder: nn.Module | Callable[[Tensor], Any],
        latent_dim: int | Sequence[int],
        *,
        beta: float = 1.0,
        num_samples: int = 1,
        posterior_param: str = "logvar",
        likelihood_param: str = "logvar",
        kl: str = "monte_carlo",
        reduction: str = "mean",
        posterior_clamp: tuple[float, float] | None = None,
        likelihood_clamp: tuple[float, float] | str | None = "auto",
        inplace: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.latent_shape = _shape(latent_dim, "latent_dim")
        if likelihood_clamp == "auto":
            likelihood_clamp = _clamp_between(_MIN_STD, _MAX_STD, likelihood_param)
        elif isinstance(likelihood_clamp, str):
            raise ValueError(
                f'likelihood_clamp must be "auto", None or (lo, hi), got {likelihood_clamp!r}'
            )
        self.elbo = FusedELBO(
            beta=beta,
            num_samples=num_samples,
            posterior_param=posterior_param,
            likelihood_param=likelihood_param,
            kl=kl,
            reduction=reduction,
            posterior_clamp=posterior_clamp,
            likelihood_clamp=likelihood_clamp,
            inplace=inplace,
        )
        self._options = {
            "beta": beta,
            "num_samples": num_samples,
            "posterior_param": posterior_param,
            "likelihood_param": likelihood_param,
            "kl": kl,
            "reduction": reduction,
            "posterior_clamp": posterior_clamp,
            "likelihood_clamp": likelihood_clamp,
            "inplace": inplace,
        }
        self._architecture: dict[str, Any] | None = None

    # ---------------------------------------------------------------- ready-made networks

    @classmethod
    def mlp(
        cls,
        event_shape: int | Sequence[int],
        latent_dim: int,
        hidden: Sequence[int] = (512, 256),
        *,
        variance: str = "full",
        **options: Any,
    ) -> VAE:
        """A VAE whose encoder and decoder are fully connected, with SiLU between the layers.

        Args:
            event_shape: shape of one data point, any number of dimensions; an int D means (D,).
            latent_dim: number of latent elements L.
            hidden: widths of the encoder's hidden layers; the decoder has them in reverse.
            variance: what the decoder learns of the variance of p(x|z): "full", one value per
                element and per z; "scalar", one value for everything; "unit", nothing, σ = 1.
                Adam moves the one value of "scalar" by about its learning rate per step, so give
                that parameter a larger rate than the rest.
            options: any keyword of :class:`VAE`.

        Returns:
            A ``VAE`` that takes x of shape (B, *event_shape).
        """
        event = _shape(event_shape, "event_shape")
        latent = _positive(latent_dim, "latent_dim")
        hidden = tuple(_positive(h, "hidden") for h in hidden)
        size = math.prod(event)
        _check_factory(variance, options)

        outputs = 2 if variance == "full" else 1
        encoder = nn.Sequential(nn.Flatten(), *_dense((size, *hidden, 2 * latent)))
        decoder = nn.Sequential(
            *_dense((latent, *reversed(hidden), outputs * size)),
            nn.Unflatten(1, (outputs * event[0], *event[1:])),
        )
        vae = cls(encoder, _with_variance(decoder, variance, options), latent, **options)
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
        variance: str = "full",
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
        _check_factory(variance, options)

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

        outputs = 2 if variance == "full" else 1
        up: list[nn.Module] = [
            nn.Linear(latent, features),
            nn.SiLU(),
            nn.Unflatten(1, (channels[-1], *sizes[-1])),
        ]
        widths = (*reversed(channels), channels[0])
        for (i, o), size in zip(itertools.pairwise(widths), reversed(sizes[:-1]), strict=True):
            padding = tuple(1 - n % 2 for n in size)
            up += [
                nn.ConvTranspose2d(i, o, 3, stride=2, padding=1, output_padding=padding),
                nn.SiLU(),
            ]
        decoder = nn.Sequential(*up, nn.Conv2d(widths[-1], outputs * event[0], 3, padding=1))
        vae = cls(encoder, _with_variance(decoder, variance, options), latent, **options)
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
    ) -> ELBOOutput:
        """The loss of a batch and its parts.

        Args:
            x: data, (B, *event).
            key: ``uint64`` tensor of shape (2,) that fixes the noise; drawn if ``None``.
            generator: where to draw the key from; the device's default generator if ``None``.
            first_row: global index of the batch's first row, so that the parts of a split batch
                draw what the whole would have drawn from the same key.

        Returns:
            An :class:`vae_fast.ELBOOutput`: ``loss``, and per row ``nll``, ``kl``, ``log_q``,
            ``log_p``, in nats, and ``z``.
        """
        mu, scale = self._encode(x)
        return self.elbo(
            x, mu, scale, self.decoder, key=key, generator=generator, first_row=first_row
        )

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and scale of q(z|x).

        Args:
            x: data, (B, *event).

        Returns:
            mu (B, *latent) and scale (B, *latent) or 0-dim; the scale is in ``posterior_param``'s
            terms and already clamped.
        """
        mu, scale = self._encode(x)
        return mu, _clamped(scale, self._options["posterior_clamp"])

    def decode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and scale of p(x|z).

        Args:
            z: latents, (N, *latent).

        Returns:
            mean (N, *event) and scale (N, *event) or 0-dim; the scale is in ``likelihood_param``'s
            terms and already clamped.
        """
        if tuple(z.shape[1:]) != self.latent_shape:
            raise ValueError(
                f"z must be of shape (N, {_joined(self.latent_shape)}), got {tuple(z.shape)}"
            )
        mean, scale = _pair(self.decoder(z), "decoder")
        return mean, _clamped(scale, self._options["likelihood_clamp"])

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """The mean of p(x|z) at the mean z of q(z|x): nothing is sampled, nothing has a gradient.

        Args:
            x: data, (B, *event).

        Returns:
            Reconstructions, (B, *event).
        """
        return self.decode(self._encode(x)[0])[0]

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        key: Tensor | None = None,
        generator: torch.Generator | None = None,
        noise: bool = False,
    ) -> Tensor:
        """Draw z from the prior N(0, 1) and return what the decoder makes of it.

        Args:
            n: number of samples.
            key: ``uint64`` tensor of shape (2,) that fixes the draw, the same on every device.
            generator: where to draw the key from; the device's default generator if ``None``.
            noise: return a draw of x from p(x|z) instead of its mean. The mean is what one usually
                looks at; the draw is what the model says the data look like.

        Returns:
            Samples of x, (n, *event).
        """
        if n < 0:
            raise ValueError(f"n must be at least 0, got {n}")
        device, dtype = self._where()
        if key is None:
            key = _make_key(device, generator)
        z = _normal(key.to(device), n, self.latent_shape, dtype)
        mean, scale = self.decode(z)
        if not noise:
            return mean
        # The same key half the counter space further on: a stream that z has no part in.
        half_way = torch.tensor([0, -(2**63)], device=device)
        key = (key.to(device).view(torch.int64) + half_way).view(torch.uint64)
        _, sigma = reference.log_scale_and_scale(scale, self._options["likelihood_param"])
        return mean + sigma * _normal(key, n, tuple(mean.shape[1:]), mean.dtype)

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
        return self.decode(z.flatten(0, 1))[0].unflatten(0, (steps, -1))

    # ---------------------------------------------------------------- files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the weights and the configuration to one safetensors file.

        The configuration is JSON in the file's header, so nothing is pickled and the two cannot be
        separated. The file appears complete or not at all.

        Args:
            path: the file to write, usually ``something.safetensors``.
        """
        import safetensors.torch

        path = Path(path)
        config = {
            "format": _FORMAT,
            "architecture": self._architecture,
            "latent_shape": list(self.latent_shape),
            "options": self._options,
        }
        # A copy each, because the format has no notion of tensors that share memory.
        weights = {
            name: value.detach().to("cpu", copy=True).contiguous()
            for name, value in self.state_dict().items()
        }
        data = safetensors.torch.save(
            weights, metadata={"format": "pt", _METADATA_KEY: json.dumps(config)}
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        device: torch.device | str = "cpu",
    ) -> VAE:
        """Read what :meth:`save` wrote.

        Args:
            path: the file.
            encoder: for a model that was not made by :meth:`mlp` or :meth:`conv`: a network of the
                same structure, whose weights are overwritten.
            decoder: likewise.
            device: where to put the model.

        Returns:
            The model, in training mode like any new module.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is not such a file, or needs ``encoder`` and ``decoder``.
        """
        import safetensors

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
        config = json.loads(metadata[_METADATA_KEY])
        if config["format"] != _FORMAT:
            raise ValueError(
                f"{path} has format {config['format']}, this version reads format {_FORMAT}"
            )
        options = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in config["options"].items()
        }
        architecture = config["architecture"]
        if architecture is None and (encoder is None or decoder is None):
            raise ValueError(
                f"{path} holds a model with an encoder and a decoder of its own, which a file "
                "cannot rebuild: pass both, VAE.load(path, encoder=..., decoder=...)"
            )
        if encoder is not None or decoder is not None:
            if encoder is None or decoder is None:
                raise ValueError("pass both encoder and decoder, or neither")
            vae = cls(encoder, decoder, config["latent_shape"], **options)
            vae.load_state_dict(weights)
        else:
            architecture = dict(architecture)
            build = {"mlp": cls.mlp, "conv": cls.conv}[architecture.pop("kind")]
            vae = build(**architecture, **options)
            vae.load_state_dict(weights, assign=True)  # also takes the saved dtypes
        return vae.to(device)

    # ---------------------------------------------------------------- private

    def _encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, scale = _pair(self.encoder(x), "encoder")
        if tuple(mu.shape[1:]) != self.latent_shape:
            raise ValueError(
                f"the encoder's mean must be of shape (B, {_joined(self.latent_shape)}) to match "
                f"latent_dim, got {tuple(mu.shape)}"
            )
        return mu, scale

    def _where(self) -> tuple[torch.device, torch.dtype]:
        """Device and dtype of z, read off the decoder's weights."""
        for module in (self.decoder, self):
            if isinstance(module, nn.Module):
                for tensor in itertools.chain(module.parameters(), module.buffers()):
                    if tensor.is_floating_point():
                        return tensor.device, tensor.dtype
        return torch.empty(()).device, torch.get_default_dtype()

    def extra_repr(self) -> str:
        """The part of ``repr`` that the submodules do not show."""
        return f"latent_shape={self.latent_shape}"


class _FixedOrScalarScale(nn.Module):
    """A decoder of means, with one 0-dim raw scale that is a parameter or a constant."""

    def __init__(self, mean: nn.Module, scale: float, learned: bool) -> None:
        super().__init__()
        self.mean = mean
        if learned:
            self.scale = nn.Parameter(torch.tensor(scale))
        else:
            self.register_buffer("scale", torch.tensor(scale))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.mean(z), self.scale


def _with_variance(decoder: nn.Module, variance: str, options: dict[str, Any]) -> nn.Module:
    if variance == "full":
        return decoder
    raw = _raw_scale(1.0, options.get("likelihood_param", "logvar"))
    return _FixedOrScalarScale(decoder, raw, learned=variance == "scalar")


def _dense(widths: Sequence[int]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for i, o in itertools.pairwise(widths):
        layers += [nn.Linear(i, o), nn.SiLU()]
    return layers[:-1]


def _check_factory(variance: str, options: dict[str, Any]) -> None:
    if variance not in _VARIANCES:
        raise ValueError(f"variance must be one of {', '.join(_VARIANCES)}; got {variance!r}")
    for name in ("posterior_param", "likelihood_param"):
        param = options.get(name, "logvar")
        if param not in _UNCONSTRAINED:
            raise ValueError(
                f"{name} must be one of {', '.join(_UNCONSTRAINED)} here, because these networks "
                f"output any real number; got {param!r}"
            )
    unknown = set(options) - set(_OPTIONS)
    if unknown:
        raise TypeError(f"unknown option {sorted(unknown)[0]!r}; VAE takes {', '.join(_OPTIONS)}")


def _raw_scale(std: float, param: str) -> float:
    """The raw scale parameter that means a standard deviation of ``std``."""
    return {
        "logvar": 2.0 * math.log(std),
        "logstd": math.log(std),
        "std": std,
        "var": std * std,
        "softplus": std + math.log(-math.expm1(-std)),  # log(e^std − 1)
    }[param]


def _clamp_between(lo: float, hi: float, param: str) -> tuple[float, float] | None:
    try:
        return _raw_scale(lo, param), _raw_scale(hi, param)
    except KeyError:
        return None  # FusedELBO names the parameters there are


def _clamped(scale: Tensor, clamp: tuple[float, float] | None) -> Tensor:
    return scale if clamp is None else torch.clamp(scale, *clamp)


def _pair(output: Any, name: str) -> tuple[Tensor, Tensor]:
    """Mean and scale from a network's output, a pair or one tensor packed along dim 1."""
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
        and all(isinstance(t, Tensor) for t in output)
    ):
        return output[0], output[1]
    raise TypeError(
        f"the {name} must return (mean, scale) or one tensor packed along dim 1, "
        f"got {type(output).__name__}"
    )


def _make_key(device: torch.device, generator: torch.Generator | None) -> Tensor:
    return noise.make_key(generator.device if generator is not None else device, generator)


def _normal(key: Tensor, n: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return noise.normal(key, n, None, shape, dtype=dtype).to(dtype)


def _shape(shape: int | Sequence[int], name: str) -> tuple[int, ...]:
    dims = (shape,) if isinstance(shape, int) else tuple(shape)
    if not dims:
        raise ValueError(f"{name} must have at least one dimension")
    return tuple(_positive(d, name) for d in dims)


def _positive(value: int, name: str) -> int:
    if int(value) != value or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return int(value)


def _joined(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
