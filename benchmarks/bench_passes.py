"""Each pass over large tensors alone, on a GPU, against a copy of as many bytes.

    pytest benchmarks --benchmark-only -k passes

A pass that waits for nothing but memory takes as long as the copy does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import torch
from bench_loss import Row
from cases import BOTH, FORWARD, Latent, Likelihood, Size, close
from measure import Clock, Copy, peak_bytes, race
from saved import OURS

import vae_fast

COPY = "copy of as many bytes"
SIZES = (Size(131072, 1024, 1024), Size(65536, 3072, 3072))  # tensors from 256 MB up, in any dtype
QUICK_SIZES = SIZES[:1]


def latent_forward(size: Size, dtype: str, device: str):
    case = Latent(size, dtype, device)
    step = case.step(vae_fast.reparameterize, FORWARD)
    return case, step, partial(case.check, step, FORWARD), case.bytes_moved(FORWARD)


def latent_backward(size: Size, dtype: str, device: str):
    case = Latent(size, dtype, device)
    inputs = case.mu, case.logvar
    results = vae_fast.reparameterize(*inputs)
    upstream = tuple(g.to(r.dtype) for g, r in zip(case.upstream, results, strict=True))

    def step():
        return *results, torch.autograd.grad(results, inputs, upstream, retain_graph=True)

    moved = case.bytes_moved(BOTH) - case.bytes_moved(FORWARD)
    return case, step, partial(case.check, step, BOTH), moved


def likelihood_forward(size: Size, dtype: str, device: str):
    case = Likelihood(size, dtype, device)
    step = torch.no_grad()(lambda: vae_fast.gaussian_nll(case.x, case.mean, case.logvar_x))
    mean = lambda: step().mean()  # noqa: E731
    return case, step, partial(case.check, mean, FORWARD), case.bytes_moved(FORWARD)


def likelihood_backward(size: Size, dtype: str, device: str):
    case = Likelihood(size, dtype, device)
    case.reset = lambda: None  # what the graph holds must stay as it is
    decoded = case.mean, case.logvar_x
    nll = vae_fast.gaussian_nll(case.x, *decoded)
    upstream = torch.full_like(nll, 1 / len(nll))

    def step():
        return nll, *torch.autograd.grad(nll, decoded, upstream, retain_graph=True)

    def mean():
        nll, *gradients = step()
        return nll.mean(), *gradients

    return case, step, partial(case.check, mean, BOTH), case.bytes_moved(BOTH)


def likelihood_forward_with_gradients(size: Size, dtype: str, device: str):
    case = Likelihood(size, dtype, device)
    kl = torch.zeros(size.batch, device=device)

    def step():
        return vae_fast.fused_elbo(case.x, *case.outputs(), kl, inplace=True)[0]

    def check():
        close("loss", step().detach(), torch.tensor(case._nll()), case.exact)
        case._check_decoder(case.mean, case.logvar_x)  # where the gradients are by now

    return case, step, check, case.bytes_moved(BOTH)


#: What makes a pass's tensors, its step, the check of it, and says the bytes that it must move.
PASSES: dict[str, Callable] = {
    made.__name__.replace("_", " "): made
    for made in (
        latent_forward,
        latent_backward,
        likelihood_forward,
        likelihood_backward,
        likelihood_forward_with_gradients,
    )
}


def rows(quick: bool, device: str) -> list[Row]:
    if device == "cpu":
        return []
    return [
        Row("passes", phase, dtype, size, implementation)
        for phase in PASSES
        for size in (QUICK_SIZES if quick else SIZES)
        for dtype in ("fp32", "bf16")
        for implementation in (COPY, OURS)
    ]


@lru_cache(maxsize=1)
def measured(phase, dtype, size, device, budget):
    """What the pass and the copy did: their facts, or why the pass is wrong."""
    case, step, check, moved = PASSES[phase](size, dtype, device)

    def checked():
        case.reset()
        check()

    steps = {COPY: Copy(device, moved // 2), OURS: step}
    checks = {COPY: lambda: None, OURS: checked}

    def others(name, median, bandwidth):
        case.reset()
        peak = peak_bytes(steps[name], device)
        facts = {"bytes": moved, "share": moved / median / bandwidth}
        return {**facts, "replayed": None, "peak": peak, "saved": None}

    return race(steps, checks, Clock(device, case.reset), budget, others)


def test_passes(row, device, budget, hand_in):
    place = row.phase, row.dtype, row.size
    result = measured(*place, device, budget)[row.implementation]
    hand_in(row, result, of="pass", phase=row.phase, dtype=row.dtype, size=str(row.size))
