"""What is timed: tensors of one size, steps on them, the right results, and the bytes of a step."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from measure import Wrong, last_level_cache
from peers import FREE_BITS, LOG_2PI, OPTIONS
from torch import Tensor

from vae_fast import reference

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "uint8": torch.float32}  # uint8: x alone
FORWARD, BOTH = "forward", "forward+backward"
LARGE = 1 << 25  # bytes; what the layer before wrote of larger tensors, no cache still has
CHECKED = 1 << 21  # elements whose gradients are checked, in rows evenly spread


@dataclass(frozen=True)
class Size:
    """Batch, latent elements and data elements."""

    batch: int
    latent: int
    data: int

    def __str__(self) -> str:
        return f"B{self.batch} L{self.latent} D{self.data}"


def close(name: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    """Raise Wrong unless the largest error is a small share of the largest value, and the norm of
    all, in which a few large values do not hide the rest, a smaller one.
    """
    error = got.double() - want
    largest = error.abs().max() / want.abs().max()
    if not largest < tolerance:  # a NaN is not close
        raise Wrong(f"{name}: relative error {largest:.2g}")
    whole = error.norm() / want.norm()
    if error.dim() and not whole < tolerance / 5:
        raise Wrong(f"{name}: relative error {whole:.2g} in norm")


def standard_normal(eps: Tensor, exact: float) -> None:
    """Raise Wrong unless the moments are: but for chance, and what rounding changes."""
    n = eps.numel()
    mean, square = eps.mean(), eps.square().mean()
    if not (abs(mean) < 6 / n**0.5 + exact and abs(square - 1) < 6 * (2 / n) ** 0.5 + 10 * exact):
        raise Wrong(f"noise: mean {mean:.2g}, mean square {square:.4g}")


def refuse_equal(first: Tensor, second: Tensor) -> None:
    """Raise Wrong if two steps gave the same, which whoever draws noise does by chance alone."""
    if torch.equal(first, second):
        raise Wrong("a second step gave the same: where is the noise?")


class Case:
    """Tensors of one size in one dtype.

    Large tensors come in as many copies as no cache holds, which take turns; smaller ones are where
    the layer before would have left them.
    """

    group: str
    decoded = True  # whether a decoder's output is part of it

    def __init__(self, size: Size, dtype: str, device: str) -> None:
        torch.manual_seed(0)
        self.size, self.dtype, self.device = size, DTYPES[dtype], device
        small, large = (size.batch, size.latent), (size.batch, size.data)
        # Of a gradient, and of sums of many elements, whose rounding averages out.
        self.exact, self.exact_sum = (1e-4, 1e-4) if self.dtype == torch.float32 else (0.1, 0.005)
        if self.group != "likelihood":
            self.mu = self._randn(small).requires_grad_()
            self.logvar = (self._randn(small) - 1).requires_grad_()
        if not self.decoded:
            return
        x, self._mean, self._logvar_x = self._make(large, dtype)
        copies = 1
        if self._mean.nbytes >= LARGE:
            copies = max(1, math.ceil(2 * last_level_cache(device) / (5 * self._mean.nbytes)))
        new = functools.partial(torch.empty_like, requires_grad=True)
        sets = [(x.clone(), new(self._mean), new(self._logvar_x)) for _ in range(copies)]
        self._sets = itertools.cycle(sets)
        self.reset()

    def _randn(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, device=self.device).to(self.dtype)

    def _make(self, shape: tuple[int, ...], dtype: str) -> tuple[Tensor, Tensor, Tensor]:
        """Data, and the decoder's output."""
        if dtype == "uint8":
            x = torch.randint(256, shape, dtype=torch.uint8, device=self.device)
        else:
            x = self._randn(shape)
        return x, self._randn(shape), 0.5 * self._randn(shape)

    def reset(self) -> None:
        """Before every step: new decoder outputs, since one may have been overwritten."""
        if not self.decoded:
            return
        self.x, self.mean, self.logvar_x = next(self._sets)
        with torch.no_grad():
            self.mean.copy_(self._mean)
            self.logvar_x.copy_(self._logvar_x)
        self._outputs = self._decoded() if self.device == "cpu" else None

    def _decoded(self) -> list[Tensor]:
        """What a decoder would give: neither leaves nor views of them, which inplace refuses."""
        leaves = self.mean, self.logvar_x
        return [torch.ops.aten._unsafe_view.default(t, t.shape) for t in leaves]

    def outputs(self) -> list[Tensor]:
        """The decoder's output, made before the clock starts; but on a GPU only now.

        A step that is captured there must hold all that its backward pass walks over.
        """
        return self._outputs or self._decoded()

    def step(self, function: Callable, phase: str) -> Callable[[], object]:
        """The step that is timed."""
        raise NotImplementedError

    def check(self, step: Callable[[], object], phase: str) -> Tensor | None:
        """Raise Wrong unless the step's results are right. Returns one that all its noise is in."""
        raise NotImplementedError

    def checks(self, step: Callable[[], object], phase: str) -> Callable[[], None]:
        """What checks the step again and again: each time its noise must be new."""
        before = None

        def check():
            nonlocal before
            noise = self.check(step, phase)
            if noise is not None:
                if before is not None:
                    refuse_equal(before, noise)
                before = noise.detach().clone()

        return check

    def bytes_moved(self, phase: str) -> int:
        """The bytes that a step cannot avoid: each input read once, each result written once."""
        raise NotImplementedError

    @property
    def inputs(self) -> list[Tensor]:
        """What a loss is given, whoever computes it."""
        return [
            t
            for n in ("x", "mu", "logvar", "mean", "logvar_x")
            if (t := getattr(self, n, None)) is not None
        ]

    def _rows(self) -> slice:
        return slice(None, None, max(1, self.size.batch * self.size.data // CHECKED))

    def _check_decoder(self, g_mean: Tensor, g_logvar: Tensor | None) -> None:
        """The decoder's gradients of the mean likelihood, in the rows that are checked."""
        rows, n = self._rows(), self.size.batch
        _, true_mean, true_logvar = self._truth(rows)
        close("decoder mean", g_mean[rows].double() * n, true_mean, self.exact)
        if true_logvar is not None:
            close("decoder scale", g_logvar[rows].double() * n, true_logvar, self.exact)

    def _truth(self, rows: slice) -> tuple[float, Tensor, Tensor | None]:
        """Of some rows the exact sum of −log p(x|z), and its gradients."""
        x, mean, s = self._data(rows)
        precision, r = torch.exp(-s), x - mean
        nll = 0.5 * (r.square() * precision + s + LOG_2PI).sum().item()
        return nll, -r * precision, 0.5 * (1 - r.square() * precision)

    def _data(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        x = self.x[rows].double()
        if self.x.dtype == torch.uint8:
            x /= 255
        return x, self._mean[rows].double(), self._logvar_x[rows].double()

    def _nll(self) -> float:
        """The exact mean of the rows' −log p(x|z)."""
        if not hasattr(self, "_exact_nll"):
            total = 0.0
            for start in range(0, self.size.batch, 1024):
                total += self._truth(slice(start, start + 1024))[0]
            self._exact_nll = total / self.size.batch
        return self._exact_nll


class Latent(Case):
    """Sampling, log q(z|x) and log p(z); backward from gradients of all three."""

    group = "latent"
    decoded = False

    def __init__(self, size, dtype, device):
        super().__init__(size, dtype, device)
        rows = torch.randn(2, size.batch, device=device)
        self.upstream = self._randn((size.batch, size.latent)), *rows

    def step(self, function, phase):
        inputs = self.mu, self.logvar
        if phase == FORWARD:
            return torch.no_grad()(lambda: function(*inputs))

        def both():
            z, log_q, log_p = function(*inputs)
            g_z, g_q, g_p = self.upstream
            upstream = g_z, g_q.to(log_q.dtype), g_p.to(log_p.dtype)
            return z, log_q, log_p, torch.autograd.grad((z, log_q, log_p), inputs, upstream)

        return both

    def check(self, step, phase):
        results = step()
        mu, logvar = self.mu.detach().double(), self.logvar.detach().double()
        sigma = torch.exp(0.5 * logvar)
        z = results[0].double()
        eps = (z - mu) / sigma
        standard_normal(eps, self.exact_sum)
        log_q = -0.5 * (eps.square() + logvar + LOG_2PI).sum(1)
        close("log_q", results[1], log_q, self.exact)
        close("log_p", results[2], -0.5 * (z.square() + LOG_2PI).sum(1), self.exact)
        if phase == BOTH:
            g_z, g_q, g_p = (g.double() for g in self.upstream)
            h = g_z - g_p[:, None] * z
            close("mu", results[3][0], h, self.exact)
            close("logvar", results[3][1], 0.5 * (sigma * eps * h - g_q[:, None]), self.exact)
        return results[0]

    def bytes_moved(self, phase):
        """μ and the scale in, z out; for the backward pass those and z's gradient in, two out."""
        return (3 if phase == FORWARD else 8) * self.mu.nbytes


class KL(Case):
    """KL(q‖N(0, 1)): the mean over the batch, or with free bits the sum over latent elements."""

    group = "kl"
    decoded = False
    free_bits = 0.0

    def step(self, function, phase):
        inputs = self.mu, self.logvar
        if phase == FORWARD:
            return torch.no_grad()(lambda: function(*inputs))

        def both():
            value = function(*inputs)
            return value, *torch.autograd.grad(value, inputs)

        return both

    def check(self, step, phase):
        value, *gradients = step() if phase == BOTH else [step()]
        mu, logvar = self.mu.detach().double(), self.logvar.detach().double()
        elements = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).mean(0)
        close("kl", value.detach(), elements.clamp(min=self.free_bits).sum(), self.exact_sum)
        if gradients:
            paid = (elements > self.free_bits) / self.size.batch
            close("mu", gradients[0], mu * paid, self.exact)
            close("logvar", gradients[1], 0.5 * torch.expm1(logvar) * paid, self.exact)

    def bytes_moved(self, phase):
        """μ and the scale in; for the backward pass two out."""
        return (2 if phase == FORWARD else 4) * self.mu.nbytes


class FreeBits(KL):
    free_bits = FREE_BITS


class Likelihood(Case):
    """−log p(x|z), averaged over the batch."""

    group = "likelihood"

    def step(self, function, phase):
        if phase == FORWARD:
            return torch.no_grad()(lambda: function(self.x, self.mean, self.logvar_x))

        def both():
            decoded = self.outputs()
            value = function(self.x, *decoded)
            # Not every likelihood has a scale.
            return value, *torch.autograd.grad(value, decoded, allow_unused=True)

        return both

    def check(self, step, phase):
        value, *gradients = step() if phase == BOTH else [step()]
        close("loss", value.detach(), torch.tensor(self._nll()), self.exact_sum)
        if gradients:
            self._check_decoder(*gradients)

    def bytes_moved(self, phase):
        """x, mean and scale in, two gradients out."""
        return self.x.nbytes + (2 if phase == FORWARD else 4) * self.mean.nbytes


class ELBO(Case):
    """The whole loss given the decoder's output."""

    group = "elbo"

    def step(self, function, phase):
        latent = self.mu, self.logvar
        if phase == FORWARD:
            return torch.no_grad()(lambda: function(self.x, *latent, self.mean, self.logvar_x))

        def both():
            decoded = self.outputs()
            value = function(self.x, *latent, *decoded)
            return value, *torch.autograd.grad(value, (*latent, *decoded))

        return both

    def check(self, step, phase):
        """The noise is the implementation's own: it is recovered from the gradient of μ, which is
        z/B here, must be standard normal, and must explain the rest."""
        value, *gradients = step() if phase == BOTH else [step()]
        value = value.detach().double().cpu()
        mu, logvar = self.mu.detach().double(), self.logvar.detach().double()
        if phase == FORWARD:
            kl = 0.5 * (mu.square() + logvar.exp() - logvar - 1).sum(1).mean().cpu()
            # One sample per row: the estimate of KL scatters around it.
            spread = 6 * (3 * self.size.latent / self.size.batch) ** 0.5
            if not abs(value - self._nll() - kl) < spread + self.exact_sum * abs(self._nll()):
                raise Wrong(f"loss {value:.6g}, not {self._nll() + kl:.6g}")
            # 16 bits may round the noise of a loss away.
            return value if self.dtype == torch.float32 else None
        g_mu, g_logvar, *decoder = gradients
        sigma = torch.exp(0.5 * logvar)
        z = g_mu.double() * self.size.batch
        eps = (z - mu) / sigma
        standard_normal(eps, self.exact_sum)
        log_ratio = 0.5 * (z.square() - eps.square() - logvar).sum(1).mean().cpu()
        close("loss", value, self._nll() + log_ratio, self.exact_sum)
        g_logvar = g_logvar.double() * self.size.batch
        close("logvar", g_logvar, 0.5 * (sigma * eps * z - 1), self.exact)
        self._check_decoder(*decoder)
        return g_mu

    def bytes_moved(self, phase):
        """Those of both passes, but for z's gradient, which no decoder gives here."""
        unused = 0 if phase == FORWARD else self.mu.nbytes
        return Latent.bytes_moved(self, phase) + Likelihood.bytes_moved(self, phase) - unused


class Option(Likelihood):
    """The likelihood pass with an option of peers.OPTIONS."""

    def __init__(self, option: str, size: Size, dtype: str, device: str) -> None:
        self.option = option
        self.own = option != "per_pixel"  # each row has a scale of its own
        super().__init__(size, dtype, device)

    def _make(self, shape, dtype):
        x, mean, logvar = super()._make(shape, dtype)
        if self.option == "bernoulli":
            x = torch.rand(shape, device=self.device).to(self.dtype)
        if not self.own:
            logvar = logvar[0].clone()
        if self.option == "logistic":  # some levels wide, so that eager's differences are exact
            mean, logvar = x / 255 + 0.03 * mean, logvar - 7
        return x, mean, logvar

    def _truth(self, rows):
        given = self._mean[rows], self._logvar_x[rows] if self.own else self._logvar_x
        mean, logvar = (t.double().requires_grad_() for t in given)
        x = self.x[rows] if self.x.dtype == torch.uint8 else self.x[rows].double()
        scale = None if self.option == "bernoulli" else logvar
        nll = reference.likelihood_nll(x, mean, scale, **OPTIONS[self.option][0]).sum()
        nll.backward()
        return nll.item(), mean.grad, logvar.grad

    def _check_decoder(self, g_mean, g_logvar):
        if self.own:
            super()._check_decoder(g_mean, g_logvar)
            return
        rows, n = self._rows(), self.size.batch
        close("decoder mean", g_mean[rows].double() * n, self._truth(rows)[1], self.exact)
        if not hasattr(self, "_exact_scale"):
            parts = (slice(start, start + 1024) for start in range(0, n, 1024))
            self._exact_scale = sum(self._truth(part)[2] for part in parts) / n
        close("decoder scale", g_logvar.double(), self._exact_scale, self.exact)

    def bytes_moved(self, phase):
        """Of a scale, and its gradient, that are not of the data's size or not there, nothing."""
        absent = 0 if self.own and self.option != "bernoulli" else 1 if phase == FORWARD else 2
        return super().bytes_moved(phase) - absent * self.mean.nbytes


CASES = {case.group: case for case in (Latent, Likelihood, ELBO, KL)} | {"free bits": FreeBits}
CASES |= {option: functools.partial(Option, option) for option in OPTIONS}
