"""A whole training step of an MLP and of a convolutional VAE, optimizer included.

    pytest benchmarks --benchmark-only -k train_step

The peers are the same networks with the loss in plain PyTorch, eager and compiled as a whole. Adam
is PyTorch's fused one for all. Gradients are checked with a posterior so narrow that the noise,
which is each implementation's own, does not show in them.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
from cases import close, refuse_equal
from measure import Clock, has_graph, memory, race
from peers import MODES, RANDN, eager_latent, eager_likelihood
from saved import COMPILED, GRAPHS, INPLACE, OURS

from vae_fast import VAE
from vae_fast.cli.profile import PRODUCTS

WHOLE = {"fullgraph": True, "dynamic": False}  # how torch.compile takes a step
NARROW = -40.0  # log σ² of a posterior without noise


@dataclass(frozen=True)
class Model:
    """A VAE and its batch."""

    kind: str
    event: tuple[int, ...]
    latent: int
    batch: int

    def __str__(self) -> str:
        return f"{self.kind} {'x'.join(map(str, self.event))} B{self.batch}"

    def make(self, **options) -> VAE:
        torch.manual_seed(0)
        return getattr(VAE, self.kind)(self.event, self.latent, **options)


DIGITS = Model("mlp", (1, 8, 8), 10, 128)
MNIST = Model("mlp", (1, 28, 28), 16, 128)
CIFAR = Model("conv", (3, 32, 32), 64, 128)
MODELS = (
    DIGITS,
    MNIST,
    Model("mlp", (1, 28, 28), 16, 1024),
    Model("conv", (1, 28, 28), 16, 128),
    CIFAR,
)
GPU_MODELS = (*MODELS, Model("mlp", (1, 28, 28), 16, 16384), Model("conv", (3, 32, 32), 64, 1024))
IN_BF16 = (MNIST, CIFAR)  # also timed under autocast


def plain(vae: VAE) -> Callable:
    """The VAE with its loss in plain PyTorch."""

    def loss(x):
        mu, logvar = vae.encoder(x).chunk(2, dim=1)
        z, log_q, log_p = eager_latent(mu, logvar)
        mean, logvar_x = (t.flatten(1) for t in vae.decoder(z).chunk(2, dim=1))
        logvar_x = logvar_x.clamp(*vae.elbo.likelihood_clamp)
        return (eager_likelihood(x.flatten(1), mean, logvar_x) + log_q - log_p).mean()

    return loss


def ours(vae: VAE) -> Callable:
    return lambda x: vae(x).loss


def compiled(make: Callable, **mode) -> Callable:
    return lambda vae: torch.compile(make(vae), **mode, **WHOLE)


def implementations() -> dict[str, tuple[dict, Callable]]:
    """Options of the VAE, and what makes the loss of it."""
    graphs = compiled(ours, mode="reduce-overhead")
    return {
        "eager": ({}, plain),
        **{name: ({}, compiled(plain, **mode)) for name, mode in MODES.items()},
        OURS: ({}, ours),
        INPLACE: ({"inplace": True}, ours),
        COMPILED: ({}, compiled(ours)),
        **({GRAPHS: ({}, graphs)} if torch.cuda.is_available() else {}),
    }


@dataclass(frozen=True)
class Row:
    dtype: str
    model: Model
    implementation: str

    def __str__(self) -> str:
        return f"{self.name} {self.implementation}"

    @property
    def name(self) -> str:
        return f"train_step {self.dtype} {self.model}"


def rows(quick: bool, device: str) -> list[Row]:
    models = (DIGITS, MNIST) if quick else MODELS if device == "cpu" else GPU_MODELS
    return [
        Row(dtype, model, name)
        for model in models
        for dtype in ("fp32", "bf16")
        if dtype == "fp32" or (model in IN_BF16 and not quick)
        for name in implementations()
        # On a CPU it tries matrix products for minutes: one model shows what they gain.
        if not (
            name.endswith("max-autotune") and (quick or (device == "cpu" and model is not MNIST))
        )
        if not (name == RANDN and device != "cpu")
        if not (name.endswith("CUDA graphs") and device == "cpu")
    ]


class Step:
    """One step of training; networks, optimizer and data of its own."""

    def __init__(self, model: Model, name: str, dtype: str, device: str) -> None:
        options, make = implementations()[name]
        self.dtype = dtype
        self.vae = model.make(**options).to(device)
        self.start = copy.deepcopy(self.vae.state_dict())
        self.loss = make(self.vae)
        self.x = torch.rand(model.batch, *model.event, device=device)
        self.optimizer = torch.optim.Adam(self.vae.parameters(), fused=True)
        self.autocast = torch.autocast(self.x.device.type, torch.bfloat16, enabled=dtype == "bf16")
        # PyTorch lets convolutions on a GPU round to TF32.
        rounds = device != "cpu" and model.kind == "conv"
        self.exact = 0.1 if dtype == "bf16" else 1e-2 if rounds else 1e-3

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        with self.autocast:
            loss = self.loss(self.x)
        loss.backward()
        self.optimizer.step()

    def check(self) -> None:
        """Raise Wrong unless every parameter's gradient is right, and there is noise."""
        refuse_equal(self._noisy(), self._noisy())
        # Where training has led, gradients may be small, and all the error of 16 bits is left.
        with untrained(self.vae, self.start), narrow(self.vae):
            exact = copy.deepcopy(self.vae).double()
            plain(exact)(self.x.double()).backward()
            self.optimizer.zero_grad()
            with self.autocast:
                self.loss(self.x).backward()
        for (name, got), want in zip(self.vae.named_parameters(), exact.parameters(), strict=True):
            close(name, got.grad, want.grad, self.exact)

    def _noisy(self) -> torch.Tensor:
        """A result that the noise is in: 16 bits may round that of a loss away."""
        self.optimizer.zero_grad()
        with self.autocast:
            self.loss(self.x).backward()
        return self.vae.encoder[-1].bias.grad.clone()


@contextmanager
def untrained(vae: VAE, start: dict[str, torch.Tensor]):
    """The weights as they were before any step."""
    now = copy.deepcopy(vae.state_dict())
    vae.load_state_dict(start)
    try:
        yield
    finally:
        vae.load_state_dict(now)


@contextmanager
def narrow(vae: VAE):
    """The posterior's log σ² far below what could be seen."""
    last = vae.encoder[-1]
    half = last.bias.detach()[len(last.bias) // 2 :]
    half += NARROW
    try:
        yield
    finally:
        half -= NARROW


def outside_products(step: Callable, device: str) -> float:
    """The share of a step's time that is not in products, by the profiler; the median of three."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device != "cpu":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    total = "cpu_time_total" if device == "cpu" else "device_time_total"
    found = []
    for _ in range(3):
        with torch.profiler.profile(activities=activities) as profile:
            began = time.perf_counter()
            step()
            Clock(device).wait()
            took = time.perf_counter() - began  # of this very step: the next may be a slower one
        events = [e for e in profile.key_averages() if e.key in PRODUCTS]
        found.append(1 - sum(getattr(e, total) for e in events) / 1e6 / took)
    return statistics.median(found)


@lru_cache(maxsize=1)
def measured(dtype, model, names, device, budget):
    """What each implementation did: its facts, or why it is wrong."""
    torch._dynamo.reset()
    steps = {name: Step(model, name, dtype, device) for name in names}

    def others(name, median, bandwidth):
        step, closed = steps[name], has_graph(name, device)
        outside = None if closed else outside_products(step, device)
        step.optimizer.zero_grad()
        return {
            "outside": outside,
            **memory(step, [step.x, *step.vae.parameters()], device, closed),
        }

    checks = {name: step.check for name, step in steps.items()}
    return race(steps, checks, Clock(device), budget, others)


def test_train_step(row, names, device, budget, hand_in):
    result = measured(row.dtype, row.model, names, device, 2 * budget)[row.implementation]
    hand_in(row, result, of="train_step", phase="step", dtype=row.dtype, size=str(row.model))
