"""Every option of the loss, and every pair of options, against formulas written out independently.

The formulas here use torch.distributions and automatic differentiation, nothing of the package but
the noise, in fp64, gradients included.
"""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Bernoulli, Laplace, Normal, StudentT, kl_divergence

import vae_fast
from vae_fast import backends, noise

B, L, EVENT = 3, 4, (2, 2, 3)
C, D = EVENT[0], math.prod(EVENT)

# What may be set, each with its default first. Options whose value is a dict are several arguments.
OPTIONS = {
    "posterior_param": ["logvar", "logstd", "std", "var", "softplus"],
    "likelihood_param": ["logvar", "logstd", "std", "var", "softplus"],
    "posterior_clamp": [None, ("hard", 0.5, 0.8), ("soft", 0.2, 1.1)],
    "likelihood_clamp": [None, ("hard", 0.5, 0.8), ("soft", 0.2, 1.1)],
    "likelihood": ["gaussian", "laplace", "bernoulli", "logistic", "student_t"],
    "scale": [
        "full",
        "packed",
        "scalar",
        "one",
        "number",
        "channel",
        "feature",
        "row",
        "row and channel",
        "fixed",
        "optimal",
        "optimal_sample",
        "optimal_channel",
    ],
    "objective": ["elbo 1", "elbo 3", "stl 1", "stl 3", "iwae 3", "dreg 3"],
    "kl": ["monte_carlo", "analytic", "free_bits", "capacity", "analytic capacity"],
    "prior": [None, "gaussian", "conditional", "callable"],
    "beta": [1.0, 0.3, "tensor"],
    "x": ["float", "uint8", "scaled", "dequantized"],
    "mask": [False, True],
    "weight": [False, True],
    "reduction": ["mean", "sum", "none"],
}
DEFAULTS = {name: values[0] for name, values in OPTIONS.items()}


def excluded(o):
    """What FusedELBO refuses; tests/test_bad_input.py has the errors."""
    optimal = o["scale"].startswith("optimal")
    importance = o["objective"] in ("iwae 3", "dreg 3")
    return (
        (optimal and o["likelihood"] != "gaussian")
        or (o["likelihood"] == "bernoulli" and o["scale"] != "full")
        or (o["likelihood"] in ("bernoulli", "logistic") and o["x"] == "dequantized")
        or (o["likelihood"] == "bernoulli" and o["x"] == "scaled")
        or (importance and o["kl"] != "monte_carlo")
        or (o["objective"] == "dreg 3" and o["scale"] in ("optimal", "optimal_channel"))
        or (o["objective"].startswith("stl") and o["kl"] != "monte_carlo")
        or (o["prior"] == "callable" and o["kl"] in ("analytic", "free_bits", "analytic capacity"))
    )


def combinations():
    singles = [{n: v} for n, values in OPTIONS.items() for v in values[1:]]
    pairs = [a | b for a, b in itertools.combinations(singles, 2) if a.keys() != b.keys()]
    return [c for c in [{}, *singles, *pairs] if not excluded(DEFAULTS | c)]


COMBINATIONS = combinations()


# ---- the scene: data, posterior, decoder -------------------------------------------------------


def build(o, device):
    """Tensors and arguments for the options ``o``, with every differentiable leaf by name."""

    def leaf(*shape, positive=False):
        t = torch.rand(shape) + 0.4 if positive else torch.randn(shape)
        return t.to(device, torch.float64).requires_grad_()

    samples = int(o["objective"][-1])
    rows = samples * B
    leaves = {
        "mu": leaf(B, L),
        "s": leaf(B, L, positive=True),
        "w_mean": leaf(L, D),
        "w_scale": leaf(L, D),
    }
    if o["prior"] in ("gaussian", "conditional"):
        shape = (L,) if o["prior"] == "gaussian" else (B, L)
        leaves |= {"prior_mu": leaf(*shape), "prior_s": leaf(*shape, positive=True)}
    shapes = {"scalar": (), "one": (1,), "channel": (C, 1, 1), "feature": EVENT}
    if o["scale"] in shapes:
        leaves["scale"] = leaf(*shapes[o["scale"]], positive=True)

    def decode(z):
        mean = torch.tanh(z @ leaves["w_mean"]).view(-1, *EVENT)
        full = F.softplus(z @ leaves["w_scale"]).view(-1, *EVENT) * 0.3 + 0.4
        kind = o["scale"]
        if o["likelihood"] == "bernoulli" or kind == "fixed" or kind.startswith("optimal"):
            return mean, None
        if kind == "number":
            return mean, 0.7
        if kind == "row":
            return mean, full.mean((1, 2, 3), keepdim=True)
        if kind == "row and channel":
            return mean, full.mean((2, 3), keepdim=True)
        return mean, leaves.get("scale", full)

    stored = torch.randint(256, (B, *EVENT), dtype=torch.uint8)
    stored[0, 0, 0] = torch.tensor([0, 255, 128], dtype=torch.uint8)  # the first and last level
    x = (stored.double() / 255 if o["x"] == "float" else stored).to(device)
    mask = (torch.rand(B, 1, *EVENT[1:]) > 0.3).to(device) if o["mask"] else None
    weight = torch.rand(B, dtype=torch.float64).to(device) if o["weight"] else None
    beta = torch.tensor(0.6, device=device) if o["beta"] == "tensor" else o["beta"]
    return leaves, decode, x, mask, weight, beta, samples, rows


def fused(o, leaves, decode, x, mask, weight, beta, samples, key):
    def clamp(name):
        return {} if o[name] is None else {name: o[name][1:], f"{name}_mode": o[name][0]}

    prior = {
        None: None,
        "gaussian": (leaves.get("prior_mu"), leaves.get("prior_s")),
        "conditional": (leaves.get("prior_mu"), leaves.get("prior_s")),
        "callable": lambda z: Laplace(0.3, 1.2).log_prob(z).sum(1),
    }[o["prior"]]
    scale = o["scale"] if o["scale"].startswith("optimal") else None
    objective = o["objective"].split()[0]
    elbo = vae_fast.FusedELBO(
        beta=beta,
        num_samples=samples,
        posterior_param=o["posterior_param"],
        likelihood_param=o["likelihood_param"],
        kl="analytic" if "analytic" in o["kl"] or o["kl"] == "free_bits" else "monte_carlo",
        reduction=o["reduction"],
        likelihood=o["likelihood"],
        likelihood_scale=0.7 if o["scale"] == "fixed" else scale,
        df=3.5,
        objective="iwae" if objective in ("iwae", "dreg") else "elbo",
        estimator=objective if objective in ("stl", "dreg") else "standard",
        prior_param="std",
        free_bits=0.4 if o["kl"] == "free_bits" else None,
        capacity=2.5 if "capacity" in o["kl"] else None,
        x_scale=(2 / 255, -1.0) if o["x"] == "scaled" else None,
        dequantize=o["x"] == "dequantized",
        **clamp("posterior_clamp"),
        **clamp("likelihood_clamp"),
    )

    def decoder(z):
        mean, s = decode(z)
        if s is None:
            return mean
        return torch.cat([mean, s], 1) if o["scale"] == "packed" else (mean, s)

    out = elbo(
        *(x, leaves["mu"], leaves["s"], decoder),
        key=key,
        first_row=5,
        mask=mask,
        weight=weight,
        prior=prior,
    )
    return out.loss, out


# ---- the same, independently -------------------------------------------------------------------


def sigma(raw, param, clamp):
    if clamp is not None:
        mode, lo, hi = clamp
        if mode == "hard":
            raw = raw.clamp(lo, hi)
        else:
            c, m = (hi - lo) / 2, (hi + lo) / 2
            raw = m + c * torch.tanh((raw - m) / c)
    return {
        "logvar": lambda s: (0.5 * s).exp(),
        "logstd": torch.exp,
        "std": lambda s: s,
        "var": torch.sqrt,
        "softplus": F.softplus,
    }[param](raw)


def log_likelihood(o, y, mean, tau, levels, a, b):
    if o["likelihood"] == "gaussian":
        return Normal(mean, tau).log_prob(y)
    if o["likelihood"] == "laplace":
        return Laplace(mean, tau).log_prob(y)
    if o["likelihood"] == "student_t":
        return StudentT(3.5, mean, tau).log_prob(y)
    if o["likelihood"] == "bernoulli":
        return Bernoulli(logits=mean, validate_args=False).log_prob(y)
    # Salimans et al. 2017, eq. 2: the logistic distribution's mass of each level
    above = torch.sigmoid((y + a / 2 - mean) / tau)
    below = torch.sigmoid((y - a / 2 - mean) / tau)
    above = torch.where(levels == 255, 1.0, above)
    below = torch.where(levels == 0, 0.0, below)
    return (above - below).log()


def independent(o, leaves, decode, x, mask, weight, beta, samples, key):
    """Loss, rows of nll, log q, log p and KL, and bits per dimension."""
    objective = o["objective"].split()[0]
    path_only = objective in ("stl", "dreg")
    eps = noise.normal(key, B, samples, (L,), 5, torch.float64)
    mu, std = leaves["mu"], sigma(leaves["s"], o["posterior_param"], o["posterior_clamp"])
    z = mu + std * eps
    q = Normal(mu, std)
    log_q = (Normal(mu.detach(), std.detach()) if path_only else q).log_prob(z).sum(-1)
    if o["prior"] == "callable":
        p = Laplace(0.3, 1.2)
    elif o["prior"] is None:
        p = Normal(torch.zeros_like(mu), torch.ones_like(mu))
    else:
        p = Normal(leaves["prior_mu"].expand(B, L), leaves["prior_s"].expand(B, L))
    log_p = p.log_prob(z).sum(-1)

    a, b = (2 / 255, -1.0) if o["x"] == "scaled" else (1 / 255, 0.0)
    levels = (x * 255).round() if o["x"] == "float" else x
    y = x if o["x"] == "float" else x.double() * a + b
    if o["x"] == "dequantized":
        y = y + noise.uniform(key, B, EVENT, 5).double() * a
    mean, raw = decode(z.flatten(0, 1))
    mean = mean.unflatten(0, (samples, B))
    keep = torch.ones(B, *EVENT, dtype=torch.bool, device=x.device) if mask is None else mask
    keep = keep.expand(B, *EVENT)
    if o["likelihood"] == "bernoulli":
        tau = None
    elif o["scale"].startswith("optimal"):
        square = (y - mean).square() * keep
        over = {"optimal": (0, 1, 2, 3, 4), "optimal_sample": (2, 3, 4), "optimal_channel": None}
        dims = over[o["scale"]] or (0, 1, 3, 4)
        count = keep.expand(mean.shape).sum(dims, keepdim=True)
        variance = square.sum(dims, keepdim=True) / count
        inverse = {
            "logvar": torch.log,
            "logstd": lambda v: 0.5 * v.log(),
            "std": torch.sqrt,
            "var": lambda v: v,
            "softplus": lambda v: v.sqrt().expm1().log(),
        }[o["likelihood_param"]]
        tau = sigma(inverse(variance), o["likelihood_param"], o["likelihood_clamp"])
    else:
        raw = torch.tensor(0.7, dtype=torch.float64) if raw is None else raw
        raw = torch.as_tensor(raw, dtype=torch.float64, device=x.device)
        if raw.dim() == 4 and raw.shape[0] == samples * B:
            raw = raw.unflatten(0, (samples, B))
        tau = sigma(raw, o["likelihood_param"], o["likelihood_clamp"])
    nll = -torch.where(keep, log_likelihood(o, y, mean, tau, levels, a, b), 0.0).sum((2, 3, 4))

    kl_rows = None
    if "analytic" in o["kl"] or o["kl"] == "free_bits":
        kl_rows = kl_divergence(q, p)
        shaped = kl_rows.sum(1)
        if o["kl"] == "free_bits":
            shaped = kl_rows.mean(0).clamp(min=0.4).sum()
        kl_rows = kl_rows.sum(1)
    else:
        shaped = log_q - log_p
    if "capacity" in o["kl"]:
        shaped = (shaped.mean() - 2.5).abs()
    terms = nll + float(beta) * shaped
    bound = nll + (log_q - log_p if kl_rows is None else kl_rows)
    if objective in ("iwae", "dreg"):
        weights = torch.softmax(-terms, 0).detach()
        if objective == "dreg":
            factor = (1.0 - float(beta)) + float(beta) * weights
            z.register_hook(lambda g: factor[..., None] * g)
        rows = math.log(samples) - torch.logsumexp(-terms, 0)
        bound = math.log(samples) - torch.logsumexp(-bound, 0)
    else:
        rows, bound = terms.mean(0), bound.mean(0)
    density = o["likelihood"] not in ("bernoulli", "logistic") and o["x"] != "float"
    bits = bound / keep.sum((1, 2, 3)) / math.log(2) - (math.log2(a) if density else 0.0)
    if weight is not None:
        rows = rows * weight
    loss = {"mean": rows.mean(), "sum": rows.sum(), "none": rows}[o["reduction"]]
    return loss, nll, log_q, log_p, kl_rows, bits


def check(changes, device):
    o = DEFAULTS | changes
    leaves, decode, x, mask, weight, beta, samples, _ = build(o, device)
    key = torch.tensor([sum(map(ord, str(changes))), 11], dtype=torch.uint64, device=device)
    arguments = (leaves, decode, x, mask, weight, beta, samples, key)
    loss, out = fused(o, *arguments)
    expected, nll, log_q, log_p, kl, bits = independent(o, *arguments)
    close = {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(loss, expected, **close)
    for got, want in ((out.nll, nll), (out.log_q, log_q), (out.log_p, log_p)):
        torch.testing.assert_close(got, want[0] if samples == 1 else want, **close)
    if kl is not None:
        torch.testing.assert_close(out.kl, kl, **close)
    torch.testing.assert_close(out.bits_per_dim, bits, **close)

    upstream = torch.rand(loss.shape, dtype=torch.float64).to(device)
    names, inputs = leaves.keys(), list(leaves.values())
    got = torch.autograd.grad(loss, inputs, upstream, allow_unused=True)
    want = torch.autograd.grad(expected, inputs, upstream, allow_unused=True)
    for name, g, w in zip(names, got, want, strict=True):
        w = torch.zeros_like(leaves[name]) if w is None else w
        g = torch.zeros_like(leaves[name]) if g is None else g
        torch.testing.assert_close(g, w, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("part", range(8))
def test_pairs(part, backend):
    """Every option and every pair of them; in the slow interpreter, every seventh pair."""
    combinations = COMBINATIONS[part::8]
    if backends.backend_for("cpu") == "triton":
        combinations = combinations[::7]
    for changes in combinations:
        try:
            check(changes, backend)
        except (AssertionError, RuntimeError) as error:
            raise AssertionError(f"with {changes}: {error}") from error


@pytest.mark.parametrize("changes", [c for c in COMBINATIONS if len(c) < 2], ids=str)
def test_each_option(changes, fused_triton):
    check(changes, fused_triton)


def test_the_combinations_cover_every_value():
    seen = {(n, v) for c in COMBINATIONS for n, v in c.items()}
    assert seen == {(n, v) for n, values in OPTIONS.items() for v in values[1:]}
    assert len(COMBINATIONS) > 700
