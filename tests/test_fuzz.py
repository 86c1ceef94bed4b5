"""Random calls of every function, in any shape, memory layout and dtype, against the reference.

Hypothesis draws the cases and makes a failing one small. What it prints is all there is to it:
after `from test_fuzz import *`, `check_latent(Case(...))` fails again. `make test` runs the same
200 cases each time; VAE_FAST_FUZZ=N (`make fuzz`) draws N others, anew each time.
"""

import math
import os
from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import vae_fast
from vae_fast import noise, ops, reference

WANTED = os.environ.get("VAE_FAST_FUZZ", "")
CASES = int(WANTED or 200)

HALVES = (torch.float16, torch.bfloat16)
FP32, FP64 = torch.float32, torch.float64
FAMILIES = ("gaussian", "laplace", "bernoulli", "logistic", "student_t", "squared_error")
WITHOUT_SCALE = ("bernoulli", "squared_error")
LAYOUTS = (
    *("contiguous", "offset", "step", "row step", "padded", "chunk"),
    *("permuted", "expanded", "overlapping"),
)
TILE = 1024  # elements that the C++ kernels sum at once
IN_ORDER = LAYOUTS[:6]  # the dimensions lie in memory as they do in a contiguous tensor


def cases(share, most=10**9):
    """Settings of a property that gets this share of all cases."""
    return settings(
        max_examples=min(most, max(2, round(share * CASES))),
        derandomize=not WANTED,
        database=None,
        deadline=None,
        print_blob=False,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(autouse=True)
def _backend(request):
    request.getfixturevalue("fused_triton" if "interpreted" in request.node.name else "cpp")


# ---- tensors -----------------------------------------------------------------------------------


def lay_out(values, layout, rng):
    """``values`` in other memory, with NaN (255) between and around them.

    "expanded" and "overlapping" tensors hold some of the values only, several times.
    """
    shape, fill = values.shape, 255 if values.dtype == torch.uint8 else math.nan
    if values.dtype == torch.bool:
        fill = True
    if layout == "contiguous" or not shape or values.numel() == 0:
        return values.contiguous()

    def embed(storage_shape, view):
        out = view(values.new_full(storage_shape, fill))
        return out.copy_(values)

    pick = lambda n: int(torch.randint(n, (), generator=rng))  # noqa: E731
    if layout == "offset":
        n = 1 + pick(7)
        return embed((values.numel() + n,), lambda t: t[n:].view(shape))
    if layout == "step":
        return embed((*shape[:-1], 2 * shape[-1]), lambda t: t[..., ::2])
    if layout == "row step":
        return embed((3 * shape[0], *shape[1:]), lambda t: t[1::3])
    if layout == "padded":
        return embed((*shape[:-1], shape[-1] + 3), lambda t: t[..., 1 : 1 + shape[-1]])
    if layout == "chunk":
        d, half = min(1, len(shape) - 1), pick(2)
        doubled = (*shape[:d], 2 * shape[d], *shape[d + 1 :])
        return embed(doubled, lambda t: t.chunk(2, d)[half])
    if layout == "permuted":
        order = torch.randperm(len(shape), generator=rng).tolist()
        inverse = [order.index(d) for d in range(len(shape))]
        return embed([shape[d] for d in order], lambda t: t.permute(inverse))
    if layout == "expanded":
        d = pick(len(shape))
        return values.narrow(d, 0, 1).contiguous().expand(shape)
    strides = [1 + pick(2) for _ in shape]
    reach = 1 + sum(st * (n - 1) for st, n in zip(strides, shape))
    if reach > values.numel():
        return values.contiguous()
    return values.flatten()[:reach].clone().as_strided(shape, strides)


def raw_scales(shape, param, rng):
    s = torch.randn(shape, generator=rng, dtype=FP64)
    return torch.exp(s.clamp(-3, 3)) if param in ("std", "var") else s


def fits_in(truth, dtype):
    return truth.abs() < 0.999 * torch.finfo(dtype).max


def assert_close(name, got, truth, eager, terms=1.0):
    """As DESIGN has it: twice eager's own error + 1e-6, of the largest magnitude; and what storing
    the result in its dtype costs. ``terms``: how many numbers of order one are summed in a value
    (a function of the largest value, where that makes it ill-conditioned).
    """
    assert got.shape == truth.shape, f"{name}: shape {tuple(got.shape)} != {tuple(truth.shape)}"
    if truth.numel() == 0:
        return
    got64, eager64 = got.detach().double(), eager.detach().double()
    judged = torch.isfinite(eager64) | (got.dtype not in HALVES)  # a part may overflow in fp16
    differ = torch.isnan(got64) != torch.isnan(truth)
    assert not (differ & judged).any(), f"{name}: NaN in only one of result and truth"
    keep = judged & torch.isfinite(truth) & fits_in(truth, got.dtype)
    assert not (~torch.isfinite(got64) & keep).any(), f"{name}: not finite where the truth is"
    if not keep.any():
        return
    got64, eager64, truth = got64[keep], eager64[keep], truth[keep]
    theirs = (eager64 - truth).abs().max().item()
    largest = truth.abs().max().item()
    scale = largest + (terms(largest) if callable(terms) else terms)
    unit = 1e-12 if got.dtype == FP64 else 1e-6
    bound = 2 * theirs * (0 if got.dtype == FP64 else 1) + unit * scale
    rounding = torch.finfo(got.dtype).eps if got.dtype in HALVES else 0.0
    bound = bound + rounding * truth.abs() + (6e-8 if got.dtype == torch.float16 else 0.0)
    wrong = (got64 - truth).abs()
    assert bool((wrong <= bound).all()), (
        f"{name}: error {wrong.max().item():.3g}, allowed {bound.max().item():.3g}, "
        f"eager's {theirs:.3g}, largest value {largest:.3g} ({got.dtype})"
    )


def run(fn, leaves, upstream):
    """Results of fn, and gradients of the leaves for those upstream gradients that are not None."""
    results = fn(*leaves)
    total = [
        (r * u.to(r.dtype)).sum() for r, u in zip(results, upstream) if u is not None and r.numel()
    ]
    total = [t for t in total if t.requires_grad]
    if not total:
        return [r.detach() for r in results], [None] * len(leaves)
    wanted = [t for t in leaves if t.requires_grad]
    found = iter(torch.autograd.grad(sum(total), wanted, allow_unused=True))
    gradients = [next(found) if t.requires_grad else None for t in leaves]
    return [r.detach() for r in results], gradients


def leaf(t, dtype=None):
    """A differentiable leaf; in t's own memory, or contiguous in another dtype."""
    t = t.detach() if dtype is None else t.detach().contiguous().to(dtype)
    return t.requires_grad_(t.is_floating_point())


def compare(fused, truth, leaves, upstream, terms):
    """``fused`` on the leaves against ``truth`` in fp64, and in their dtype for eager's own error.

    ``terms``: of each result and each gradient.
    """
    got = run(fused, [leaf(t) for t in leaves], upstream)
    exact = run(truth, [leaf(t, FP64) if t.is_floating_point() else t for t in leaves], upstream)
    eager = run(truth, [leaf(t, t.dtype) for t in leaves], upstream)
    names = [
        *(f"result {i}" for i in range(len(got[0]))),
        *(f"gradient {i}" for i in range(len(leaves))),
    ]
    for name, g, t, e, n in zip(
        names, [*got[0], *got[1]], [*exact[0], *exact[1]], [*eager[0], *eager[1]], terms
    ):
        if t is None:  # autograd: not a function of it
            assert g is None or not g.any(), name
        else:
            assert_close(
                name, torch.zeros_like(t) if g is None else g, t, t * 0 if e is None else e, n
            )
    for g, t in zip(got[1], leaves):
        assert g is None or (g.dtype, g.shape) == (t.dtype, t.shape)


# ---- cases -------------------------------------------------------------------------------------

sizes = st.one_of(
    st.integers(0, 5),
    st.sampled_from([7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 127, 255, 256, 257]),
    st.integers(0, 300),
    st.sampled_from([511, 512, 1023, 1024, 1025, 2047, 2049, 4096, 4097]),
)
layouts = st.sampled_from(LAYOUTS)
params = st.sampled_from(ops.PARAMS)
U64 = st.one_of(st.integers(0, 10), st.integers(2**64 - 10, 2**64 - 1), st.integers(0, 2**64 - 1))
FIRST_ROWS = st.one_of(
    st.just(0),
    st.integers(0, 1000),
    st.integers(2**31 - 100, 2**32 + 100),
    st.integers(2**62, 2**63 - 5000),
)


@st.composite
def shapes(draw, limit=6000):
    """(B, *event) of up to three event dimensions and about ``limit`` elements."""
    dims = draw(st.integers(0, 3))
    batch = draw(st.one_of(st.integers(0, 9), st.integers(0, 70)))
    event, left = [], max(1, limit // max(batch, 1))
    for _ in range(dims):
        event.append(min(draw(sizes), left))
        left = max(1, left // max(event[-1], 1))
    return (batch, *draw(st.permutations(event)))


@st.composite
def clamps(draw):
    """(clamp, mode)."""
    kind = draw(st.sampled_from(["none", "none", "hard", "one-sided", "soft", "point"]))
    lo = draw(st.floats(-3, 1, width=16))
    hi = lo + draw(st.floats(0.25, 4, width=16))
    if kind == "none":
        return None, "hard"
    if kind == "one-sided":
        return draw(st.sampled_from([(lo, math.inf), (-math.inf, hi)])), "hard"
    return ((lo, lo), "hard") if kind == "point" else ((lo, hi), kind)


def positive(clamp, param):
    """Bounds that keep a standard deviation positive where the raw scale is one."""
    if clamp is None or param not in ("std", "var"):
        return clamp
    lo, hi = (math.exp(b) if math.isfinite(b) else b for b in clamp)
    return (0.04 if lo == -math.inf else lo), hi


@dataclass
class Case:
    """All that a check needs to know; tensors' values follow from the seed."""

    seed: int
    shape: tuple
    samples: int | None = None
    dtypes: tuple = (FP32,)
    layouts: tuple = ("contiguous",)
    param: str = "logvar"
    clamp: tuple | None = None
    mode: str = "hard"
    key: tuple = (0, 0)
    first_row: int = 0
    scale_shape: tuple | None = None  # None: the mean's
    used: tuple = ()  # which results have an upstream gradient
    options: dict = field(default_factory=dict)

    def rng(self):
        return torch.Generator().manual_seed(self.seed)

    @property
    def noise_key(self):
        return torch.tensor(self.key, dtype=torch.uint64)


@st.composite
def common(draw, limit=6000, shape=None):
    param = draw(params)
    clamp, mode = draw(clamps())
    return dict(
        seed=draw(st.integers(0, 2**32 - 1)),
        shape=draw(shapes(limit)) if shape is None else shape,
        layouts=tuple(draw(st.lists(layouts, min_size=4, max_size=4))),
        param=param,
        clamp=positive(clamp, param),
        mode=mode,
        key=(draw(U64), draw(U64)),
    )


def broadcast_shapes(draw, shape):
    """A shape that broadcasts to this one, or 0-dim."""
    kept = [1 if draw(st.booleans()) else n for n in shape]
    return tuple(kept[draw(st.integers(0, len(kept))) :])


def normals(shape, rng):
    return torch.randn(shape, generator=rng, dtype=FP64)


# ---- the latent pass ---------------------------------------------------------------------------


@st.composite
def latent_cases(draw, limit=6000):
    base = draw(common(limit))
    double = draw(st.integers(0, 4)) == 0
    some = (FP64,) if double else (FP32, *HALVES)
    full = draw(st.integers(0, 2)) > 0
    return Case(
        **base,
        samples=draw(st.one_of(st.none(), st.integers(1, 5))),
        dtypes=(draw(st.sampled_from(some)), draw(st.sampled_from(some))),
        first_row=draw(FIRST_ROWS),
        scale_shape=None if full else broadcast_shapes(draw, base["shape"]),
        used=tuple(draw(st.lists(st.booleans(), min_size=3, max_size=3))),
        options={"path_gradient": draw(st.booleans())},
    )


def latent_tensors(case):
    rng = case.rng()
    shape = case.shape if case.scale_shape is None else case.scale_shape
    mu = normals(case.shape, rng).to(case.dtypes[0])
    s = raw_scales(shape, case.param, rng).to(case.dtypes[1])
    return lay_out(mu, case.layouts[0], rng), lay_out(s, case.layouts[1], rng), rng


def latent_call(case, mu, s, **more):
    options = dict(
        param=case.param, num_samples=case.samples, key=case.noise_key, first_row=case.first_row,
        clamp=case.clamp, clamp_mode=case.mode, **case.options,
    )  # fmt: skip
    return vae_fast.reparameterize(mu, s, **(options | more))


def check_latent(case):
    mu, s, rng = latent_tensors(case)
    rows = case.shape[:1] if case.samples is None else (case.samples, *case.shape[:1])
    event = case.shape[1:]
    upstream = [normals((*rows, *event), rng), normals(rows, rng), normals(rows, rng)]
    upstream[0] = lay_out(upstream[0].to(mu.dtype), case.layouts[2], rng).double()
    upstream = [u if used else None for u, used in zip(upstream, case.used)]
    eps = noise.normal(
        case.noise_key, case.shape[0], case.samples, event, case.first_row, case.dtypes[0]
    )
    size, k = math.prod(event), case.samples or 1
    shared = math.prod(case.shape) // max(s.numel(), 1)

    def truth(mu, s):
        s = s.expand(mu.shape) if s.dim() else s
        return reference.reparameterize(
            mu, s, case.param, case.samples, None, None, 0, case.clamp, case.mode, eps=eps,
            **case.options,
        )  # fmt: skip

    terms = [1, 3 * size, 3 * size, 3 * k, 3 * k * shared]
    compare(lambda m, r: latent_call(case, m, r), truth, [mu, s], upstream, terms)


@given(latent_cases())
@cases(0.14)
def test_latent(case):
    check_latent(case)


# ---- the likelihood pass -----------------------------------------------------------------------


@st.composite
def likelihood_cases(draw, limit=6000, elbo=False):
    base = draw(common(limit))
    shape = base["shape"]
    family = draw(st.sampled_from(("gaussian", "gaussian", *FAMILIES)))
    samples = draw(st.one_of(st.none(), st.integers(1, 4)))
    double = draw(st.integers(0, 4)) == 0
    some = (FP64,) if double else (FP32, FP32, *HALVES)
    same = draw(st.booleans())
    dtypes = [draw(st.sampled_from(some)) for _ in range(3)]
    dtypes = [dtypes[0]] * 3 if same else dtypes
    stored = draw(st.integers(0, 3)) == 0
    if stored:
        dtypes[0] = torch.uint8
    rows = (samples or 1) * shape[0]
    lead = (rows,) if elbo else shape[:1] if samples is None else (samples, shape[0])
    kinds = ["full", "full", "any", "row", "event", "number", "0-dim"]
    packs = len(shape) > 1 and (elbo or samples is None)
    kind = draw(st.sampled_from([*kinds, "packed", "packed"] if packs else kinds))
    scale_shape = {
        "any": lambda: broadcast_shapes(draw, (*lead, *shape[1:])),
        "row": lambda: (*lead, *(1 for _ in shape[1:])),
        "event": lambda: shape[1:],
        "0-dim": lambda: (),
    }.get(kind, lambda: None)()
    dequantize = stored and family not in ("bernoulli", "logistic") and draw(st.booleans())
    within = family == "bernoulli"
    x_scales = [(0.5 / 255, 0.25)] if within else [(2 / 255, -1.0), (0.5, 3.0)]
    options = {
        "likelihood": family,
        "df": draw(st.sampled_from([0.5, 1.0, 4.0, 30.0])),
        "x_scale": draw(st.sampled_from([None, (1 / 255, 0.0), *x_scales])),
        "dequantize": dequantize,
        "scale": kind,
        "mask": draw(st.sampled_from(["none", "none", "full", "any"])),
        "x_grad": not stored and draw(st.booleans()),
    }
    if options["mask"] == "any":
        options["mask_shape"] = broadcast_shapes(draw, shape)
    if elbo:
        options |= {
            "beta": draw(st.sampled_from([0.0, 1.0, 0.37, -2.0, 1e3])),
            "reduction": draw(st.sampled_from(ops.REDUCTIONS)),
            "inplace": draw(st.booleans()),
            "log_p": draw(st.booleans()),
            "rows_layout": draw(st.sampled_from(["contiguous", "permuted", "step", "expanded"])),
        }
    return Case(
        **base,
        samples=samples,
        dtypes=tuple(dtypes),
        first_row=draw(FIRST_ROWS),
        scale_shape=scale_shape,
        used=tuple(draw(st.lists(st.booleans(), min_size=2, max_size=2))),
        options=options,
    )


def likelihood_tensors(case, elbo=False):
    """x, mean, scale (a tensor, a number or None), mask, and the generator for more."""
    rng, o = case.rng(), case.options
    a, b = o["x_scale"] or (1 / 255, 0.0)
    levels = torch.randint(256, case.shape, generator=rng)
    if case.dtypes[0] == torch.uint8:
        x = levels.to(torch.uint8)
    elif o["likelihood"] in ("logistic", "bernoulli"):
        a, b = (1 / 255, 0.0) if o["likelihood"] == "bernoulli" else (a, b)
        x = (levels.double() * a + b).to(case.dtypes[0])
    else:
        x = normals(case.shape, rng).to(case.dtypes[0])
    batch, *event = case.shape
    k = case.samples or 1
    lead = (k * batch,) if elbo else (batch,) if case.samples is None else (k, batch)
    packed = o["scale"] == "packed" and o["likelihood"] not in WITHOUT_SCALE
    mean = normals((*lead, *event), rng)
    centre = b + 127 * a if case.dtypes[0] == torch.uint8 or o["likelihood"] == "logistic" else 0.0
    mean = mean * (64 * a if centre else 1.0) + centre
    s = None
    if o["likelihood"] not in WITHOUT_SCALE:
        shape = (*lead, *event) if case.scale_shape is None else case.scale_shape
        s = raw_scales(shape, case.param, rng)
    if packed:
        # What holds some values several times may make a scale of any of them.
        repeats = case.layouts[1] in ("expanded", "overlapping")
        first = s if repeats and case.param in ("std", "var") else mean
        mean, s = torch.cat([first, s], len(lead)), None
    elif o["scale"] == "number" and s is not None:
        s = 0.7
    mean = lay_out(mean.to(case.dtypes[1]), case.layouts[1], rng)
    if isinstance(s, torch.Tensor):
        s = lay_out(s.to(case.dtypes[2]), case.layouts[2], rng)
    x, mask = lay_out(x, case.layouts[0], rng), None
    if o["mask"] != "none":
        shape = case.shape if o["mask"] == "full" else o["mask_shape"]
        mask = torch.rand(shape, generator=rng) > 0.3
        mask = lay_out(mask, case.layouts[3], rng)
    return x, mean, s, mask, rng


def model_options(case):
    o = case.options
    return dict(
        param=case.param, clamp=case.clamp, clamp_mode=case.mode, likelihood=o["likelihood"],
        df=o["df"], x_scale=o["x_scale"], dequantize=o["dequantize"],
        key=case.noise_key if o["dequantize"] else None, first_row=case.first_row,
    )  # fmt: skip


def magnitudes(case, mean, s):
    """Numbers of order one in a row's value, in an x, a mean and a scale gradient."""
    size, k = math.prod(case.shape[1:]), case.samples or 1
    shared = mean.numel() // max(s.numel(), 1) if isinstance(s, torch.Tensor) else 1
    return 6 * size, 3 * k, 3, 3 * shared


def check_likelihood(case):
    x, mean, s, mask, rng = likelihood_tensors(case)
    options = model_options(case)
    rows = case.shape[:1] if case.samples is None else (case.samples, *case.shape[:1])
    value, gx, gm, gs = magnitudes(case, mean, s)
    leaves, with_x = [mean], case.options["x_grad"]
    leaves += [s] if isinstance(s, torch.Tensor) else []
    leaves += [x] if with_x else []

    def call(fn):
        def run_it(m, *rest):
            rest = list(rest)
            scale = rest.pop(0) if isinstance(s, torch.Tensor) else s
            data = rest.pop(0) if with_x else x if fn is vae_fast.likelihood_nll else widen(x, m)
            if fn is reference.likelihood_nll and is_expanded(case, scale):
                scale = scale.expand(m.shape)  # the derivatives of what is expanded are stored
            return [fn(data, m, scale, mask=mask, **options)]

        return run_it

    terms = [value, gm, *([gs] if isinstance(s, torch.Tensor) else []), gx]
    upstream = [normals(rows, rng)]
    compare(call(vae_fast.likelihood_nll), call(reference.likelihood_nll), leaves, upstream, terms)


def is_expanded(case, scale):
    return case.options["scale"] == "any" and scale is not None and scale.dim() > 0


def widen(x, like):
    """x for the truth in the dtype of ``like``."""
    return x if x.dtype == torch.uint8 or like.dtype != FP64 else x.double()


@given(likelihood_cases())
@cases(0.2)
def test_likelihood(case):
    check_likelihood(case)


def check_elbo(case):
    x, mean, s, mask, rng = likelihood_tensors(case, elbo=True)
    o, options = case.options, model_options(case)
    batch, k = case.shape[0], case.samples or 1
    rows = (batch,) if case.samples is None else (k, batch)
    acc = FP64 if mean.dtype == FP64 else FP32
    row_terms = [normals(rows, rng).to(acc) for _ in range(1 + o["log_p"])]
    row_terms = [lay_out(t, o["rows_layout"], rng) for t in row_terms]
    with_s, with_x = isinstance(s, torch.Tensor), o["x_grad"]
    inplace = o["inplace"]
    leaves = [mean, *row_terms, *([s] if with_s else []), *([x] if with_x else [])]

    def unpack(m, *rest):
        rest = list(rest)
        log_q, log_p = rest.pop(0), rest.pop(0) if o["log_p"] else None
        scale = rest.pop(0) if with_s else s
        return m, log_q, log_p, scale, rest.pop(0) if with_x else None

    def fused(*leaves):
        m, log_q, log_p, scale, data = unpack(*leaves)
        if inplace:  # both are the decoder's results then
            m, scale = m * 1, scale * 1 if with_s else scale
        return vae_fast.fused_elbo(
            x if data is None else data, m, scale, log_q, log_p, o["beta"], o["reduction"],
            mask=mask, inplace=inplace, **options,
        )  # fmt: skip

    def truth(*leaves):
        m, log_q, log_p, scale, data = unpack(*leaves)
        data = widen(x, m) if data is None else data
        if is_expanded(case, scale):
            scale = scale.expand(m.shape)  # as above
        if case.samples is not None:
            m = m.unflatten(0, (k, batch))
            if with_s and scale.dim() == m.dim() - 1 and scale.shape[0] == k * batch != 1:
                scale = scale.unflatten(0, (k, batch))
        nll = reference.likelihood_nll(data, m, scale, mask=mask, **options)
        return reference.elbo_loss(nll, log_q, log_p, o["beta"], o["reduction"]), nll

    value, gx, gm, gs = magnitudes(case, mean, s)
    weight = 2 + abs(o["beta"])
    loss_terms = (value + weight) * (batch if o["reduction"] == "sum" else 1)
    terms = [loss_terms, value, gm, *(weight for _ in row_terms), *([gs] if with_s else []), gx]
    loss_shape = (batch,) if o["reduction"] == "none" else ()
    upstream = [normals(loss_shape, rng), normals(rows, rng)]
    upstream = [u if used else None for u, used in zip(upstream, case.used)]
    compare(fused, truth, leaves, upstream, terms)


@given(likelihood_cases(elbo=True))
@cases(0.18)
def test_elbo(case):
    check_elbo(case)


# ---- KL, importance weights, the optimal variance ----------------------------------------------


@st.composite
def kl_cases(draw, limit=6000):
    base = draw(common(limit))
    double = draw(st.integers(0, 4)) == 0
    some = (FP64,) if double else (FP32, *HALVES)
    with_prior = draw(st.booleans())
    return Case(
        **base,
        dtypes=tuple(draw(st.lists(st.sampled_from(some), min_size=4, max_size=4))),
        options={
            "shapes": [broadcast_shapes(draw, base["shape"]) for _ in range(3)],
            "prior_param": draw(params),
            "with_prior": with_prior,
        },
    )


def check_kl(case):
    rng, o = case.rng(), case.options
    shapes = [case.shape, *o["shapes"]]
    mu, prior_mu = normals(shapes[0], rng), normals(shapes[2], rng)
    s, prior_s = (
        raw_scales(shapes[1], case.param, rng),
        raw_scales(shapes[3], o["prior_param"], rng),
    )
    count = 4 if o["with_prior"] else 2
    tensors = [mu, s, prior_mu, prior_s][:count]
    tensors = [
        lay_out(t.to(d), layout, rng) for t, d, layout in zip(tensors, case.dtypes, case.layouts)
    ]

    def call(fn):
        def run_it(m, r, *p):
            if fn is reference.gaussian_kl:  # the derivatives of what is expanded are stored
                r, *p = (t.expand(m.shape) for t in (r, *p))
            return [fn(m, r, tuple(p) or None, case.param, o["prior_param"], case.clamp, case.mode)]

        return run_it

    size, numel = math.prod(case.shape[1:]), math.prod(case.shape)
    terms = [4 * size, *(4 * (numel // max(t.numel(), 1)) for t in tensors)]
    upstream = [normals(case.shape[:1], rng)]
    compare(call(vae_fast.gaussian_kl), call(reference.gaussian_kl), tensors, upstream, terms)


@given(kl_cases())
@cases(0.07)
def test_kl(case):
    check_kl(case)


@st.composite
def importance_cases(draw):
    shape = (draw(st.integers(1, 9)), draw(st.integers(0, 70)))
    double = draw(st.booleans())
    return Case(
        **draw(common(shape=shape)),
        dtypes=(FP64 if double else FP32,),
        options={
            "log_p": draw(st.booleans()),
            "beta": draw(st.sampled_from([0.0, 1.0, 0.37, 3.0])),
            "spread": draw(st.sampled_from([1.0, 30.0, 1e4])),
        },
    )


def check_importance(case):
    rng, o = case.rng(), case.options
    tensors = [normals(case.shape, rng) * o["spread"] for _ in range(2 + o["log_p"])]
    tensors = [lay_out(t.to(case.dtypes[0]), lay, rng) for t, lay in zip(tensors, case.layouts)]

    def call(fn):
        return lambda nll, q, p=None: [fn(nll, q, p, o["beta"])]

    terms = [10 * o["spread"], *(2.0 * max(1.0, o["beta"]) * o["spread"] for _ in tensors)]
    upstream = [normals(case.shape[1:], rng)]
    compare(
        call(vae_fast.importance_bound), call(reference.importance_bound), tensors, upstream, terms
    )


@given(importance_cases())
@cases(0.02)
def test_importance(case):
    check_importance(case)


@st.composite
def optimal_cases(draw, limit=3000):
    case = draw(likelihood_cases(limit))
    case.options |= {
        "likelihood": "squared_error",
        "over": draw(st.sampled_from(["batch", "sample", "channel"])),
        "dequantize": case.dtypes[0] == torch.uint8 and case.options["dequantize"],
    }
    if len(case.shape) < 2:
        case.options["over"] = "sample"
    return case


def optimal_truth(x, mean, case, mask):
    """By its definition, for data as floating point."""
    over, bounds = case.options["over"], case.clamp
    square = (x - mean).square()
    here = torch.ones_like(square, dtype=torch.bool) if mask is None else mask.expand(square.shape)
    square = torch.where(here, square, 0.0)
    event = tuple(range(mean.dim() - x.dim() + 1, mean.dim()))
    channel = mean.dim() - x.dim() + 1
    dims = {
        "batch": tuple(range(mean.dim())),
        "sample": event,
        "channel": tuple(d for d in range(mean.dim()) if d != channel),
    }[over]
    reduce = (lambda t: t.sum(dims, keepdim=True)) if dims else (lambda t: t)
    variance = reduce(square) / reduce(here.to(square.dtype))
    variance = torch.where(variance > 0, variance, torch.finfo(square.dtype).tiny)
    if bounds is not None:
        log_tau = 0.5 * torch.log(variance)
        raw = reference.clamp_scale(
            vae_fast.functional._raw_scale(log_tau, case.param), bounds, case.mode
        )
        variance = torch.exp(2 * reference.log_scale_and_scale(raw, case.param)[0])
    value = 0.5 * square / variance + torch.where(
        here, 0.5 * torch.log(variance) + reference.HALF_LOG_2PI, 0.0
    )
    return value.sum(event) if event else value


def check_optimal(case):
    x, mean, _, mask, rng = likelihood_tensors(case)
    o = case.options
    rows = case.shape[:1] if case.samples is None else (case.samples, *case.shape[:1])

    def fused(m, *data):
        return [
            vae_fast.optimal_gaussian_nll(
                data[0] if data else x, m, o["over"], case.param, case.clamp, case.mode, mask,
                o["x_scale"], o["dequantize"], case.noise_key if o["dequantize"] else None,
                case.first_row,
            )
        ]  # fmt: skip

    def truth(m, *data):
        a, b = o["x_scale"] or reference.X_SCALE
        acc = FP64 if m.dtype == FP64 else FP32
        if data:
            wide = data[0].to(acc)
        elif x.dtype == torch.uint8:
            wide = x.to(acc)
            if o["dequantize"]:
                u = noise.uniform(case.noise_key, len(x), x.shape[1:], case.first_row)
                wide = wide + u.to(acc)
            wide = wide * a + b
        else:
            wide = x.to(acc)
        return [optimal_truth(wide, m.to(acc), case, mask)]

    leaves = [mean, x] if o["x_grad"] else [mean]
    size, k = math.prod(case.shape[1:]), case.samples or 1
    # 1/r of a lone residual r = x − m: x's own rounding is worth 1/r² of it.
    terms = [20 * size, lambda g: 20 + g * g, lambda g: (20 + g * g) * k]
    compare(fused, truth, leaves, [normals(rows, rng)], terms)


@given(optimal_cases())
@cases(0.05)
def test_optimal(case):
    check_optimal(case)


# ---- bad values stay in their row --------------------------------------------------------------

BAD = (math.nan, math.inf, -math.inf, 0.0, -0.0, -1.0, 1e-45, 1e-38, 1e30, -3e38, 65504.0)


def spoil(t, rows, rng):
    """A copy of t, (N, ...), with BAD values all over some rows."""
    t = t.detach().clone()
    values = torch.tensor(BAD, dtype=FP64)
    for n in rows:
        picks = values[torch.randint(len(BAD), t[n].shape, generator=rng)]
        if torch.rand((), generator=rng) < 0.5:
            picks = picks.flatten()[:1].expand(picks.numel()).reshape(picks.shape)
        t[n] = picks.to(t.dtype)
    return t


def assert_same_rows(names, clean, spoilt, clean_rows):
    for name, a, b in zip(names, clean, spoilt):
        if a is None or a.dim() == 0:
            assert a is None or b is not None
            continue
        same = torch.allclose(a[clean_rows], b[clean_rows], rtol=0, atol=0, equal_nan=True)
        assert same, f"{name}: another row's values changed"


def check_isolation_of_latent(case):
    mu, s, rng = latent_tensors(case)
    batch = case.shape[0]
    bad = [b for b in range(batch) if torch.rand((), generator=rng) < 0.3]
    good = [b for b in range(batch) if b not in bad]
    full = case.scale_shape is None
    rows = () if case.samples is None else (case.samples,)
    upstream = [
        normals((*rows, *case.shape), rng),
        normals((*rows, batch), rng),
        normals((*rows, batch), rng),
    ]
    results = []
    for spoilt in (False, True):
        m = spoil(mu, bad if spoilt else [], rng)
        r = spoil(s, bad if spoilt else [], rng) if full else s
        outputs, gradients = run(lambda m, r: latent_call(case, m, r), [leaf(m), leaf(r)], upstream)
        by_row = [o.movedim(0, 1) if rows else o for o in outputs]
        results.append([*by_row, *(gradients if full else gradients[:1])])
    assert_same_rows(("z", "log_q", "log_p", "∂mu", "∂scale"), *results, good)


@given(latent_cases())
@cases(0.02)
def test_bad_rows_of_the_latent_pass(case):
    check_isolation_of_latent(case)


def check_isolation(case, elbo):
    """Of ``fused_elbo``, or of ``likelihood_nll``, with rows of the mean and of x spoilt."""
    x, mean, s, mask, rng = likelihood_tensors(case, elbo)
    o, options = case.options, model_options(case)
    k, batch, with_s = case.samples or 1, case.shape[0], isinstance(s, torch.Tensor)
    lead = 1 if elbo or case.samples is None else 2
    rows = k * batch
    bad_x = [b for b in range(batch) if torch.rand((), generator=rng) < 0.2]
    bad = [n for n in range(rows) if n % batch in bad_x or torch.rand((), generator=rng) < 0.1]
    good = [n for n in range(rows) if n not in bad]
    good_x = [b for b in range(batch) if not any(n % batch == b for n in bad)]
    own = with_s and s.dim() == mean.dim() and s.shape[:lead] == mean.shape[:lead] and rows > 1

    def spoil_rows(t, rows):
        if lead == 1:
            return spoil(t, rows, rng)
        t = t.clone()
        for n in rows:
            t[n // batch] = spoil(t[n // batch], [n % batch], rng)
        return t

    acc = FP64 if mean.dtype == FP64 else FP32
    log_q = normals((k, batch), rng).to(acc)
    loss_shape = (batch,) if elbo and o["reduction"] == "none" else ()
    upstream = [normals((k, batch), rng).view(mean.shape[:lead] if lead > 1 else -1)]
    if elbo:
        upstream = [normals(loss_shape, rng), normals((k, batch), rng)]
    results = []
    for spoilt in (False, True):
        n, n_x = (bad, bad_x) if spoilt else ([], [])
        data = spoil(x, n_x, rng) if x.is_floating_point() else x
        m, q = spoil_rows(mean, n), spoil(log_q.T, n_x, rng).T
        r = spoil_rows(s, n) if own else s
        leaves = [m, *([r] if with_s else []), *([data] if o["x_grad"] else [])]
        leaves += [q] if elbo else []

        def call(m, *rest, data=data):
            rest = list(rest)
            scale = rest.pop(0) if with_s else s
            data = rest.pop(0) if o["x_grad"] else data
            if not elbo:
                return [vae_fast.likelihood_nll(data, m, scale, mask=mask, **options)]
            if o["inplace"]:
                m, scale = m * 1, scale * 1 if with_s else scale
            return vae_fast.fused_elbo(
                data, m, scale, rest.pop(0), None, o["beta"], o["reduction"], mask=mask,
                inplace=o["inplace"], **options,
            )  # fmt: skip

        outputs, gradients = run(call, [leaf(t) for t in leaves], upstream)
        found = dict(zip(("∂mean", *(["∂scale"] if with_s else [])), gradients))
        by_row = {"nll": outputs[-1], "∂mean": found["∂mean"]}
        by_row |= {"∂scale": found["∂scale"]} if own else {}
        by_row = {
            n: t if t is None else t.flatten(0, 1) if n == "nll" and t.dim() > 1
            else t.flatten(0, lead - 1) if n != "nll" and lead > 1 else t
            for n, t in by_row.items()
        }  # fmt: skip
        by_x = {"loss": outputs[0]} if elbo and loss_shape else {}
        by_x |= {"∂x": gradients[1 + with_s]} if o["x_grad"] else {}
        by_x |= (
            {"∂log_q": gradients[-1] if gradients[-1] is None else gradients[-1].T} if elbo else {}
        )
        results.append((by_row, by_x))
    for i, kept in enumerate((good, good_x)):
        names = list(results[0][i])
        assert_same_rows(names, *(list(r[i].values()) for r in results), kept)


@given(likelihood_cases(elbo=True))
@cases(0.02)
def test_bad_rows_of_elbo(case):
    check_isolation(case, elbo=True)


@given(likelihood_cases())
@cases(0.02)
def test_bad_rows_of_the_likelihood_pass(case):
    check_isolation(case, elbo=False)


def check_isolation_of_rows(case):
    """Of KL, importance weights and the optimal variance of each row."""
    rng, o = case.rng(), case.options
    batch = case.shape[0]
    mu, s = normals(case.shape, rng), raw_scales(case.shape, case.param, rng)
    bad = [b for b in range(batch) if torch.rand((), generator=rng) < 0.3]
    good = [b for b in range(batch) if b not in bad]
    dtype = case.dtypes[0]
    per_row = [normals((4, batch), rng).to(FP32) for _ in range(3)]
    prior = [normals(case.shape, rng).to(dtype), raw_scales(case.shape, "logvar", rng).to(dtype)]
    results = []
    for spoilt in (False, True):
        rows = bad if spoilt else []
        full = [leaf(spoil(t.to(dtype), rows, rng)) for t in (mu, s, *prior)]
        kl, g_kl = run(
            lambda m, r, *p: [
                vae_fast.gaussian_kl(
                    m, r, tuple(p), case.param, "logvar", case.clamp, case.mode
                )
            ],
            full, [normals((batch,), case.rng())],
        )  # fmt: skip
        terms = [leaf(spoil(t.T, rows, rng).T.contiguous()) for t in per_row]
        bound, g_bound = run(
            lambda *t: [vae_fast.importance_bound(*t)], terms, [normals((batch,), case.rng())]
        )
        nll, g_nll = run(
            lambda m, p: [vae_fast.optimal_gaussian_nll(p, m, "sample")],
            [full[0].detach().requires_grad_(), full[2].detach().requires_grad_()],
            [normals((batch,), case.rng())],
        )
        g_bound = [None if g is None else g.T for g in g_bound]
        results.append([*kl, *g_kl, *bound, *g_bound, *nll, *g_nll])
    assert o is not None
    assert_same_rows([f"result {i}" for i in range(len(results[0]))], *results, good)


@given(kl_cases(limit=1500))
@cases(0.02)
def test_bad_rows_of_the_other_functions(case):
    check_isolation_of_rows(case)


# ---- extreme values ----------------------------------------------------------------------------


def check_extremes(values, deviations, family, dtype=FP32):
    """Finite and right wherever the fp64 truth is finite and fits; x, mean and log τ at random."""
    x, m = (torch.tensor(v, dtype=dtype)[:, None] for v in zip(*values))
    s = torch.tensor(deviations, dtype=dtype)[:, None]
    leaves = [m] if family == "bernoulli" else [m, s]

    def call(fn):
        def run_it(m, s=None):
            data = x if m.dtype != FP64 else x.double()
            return [fn(data, m, s, likelihood=family, param="logstd")]

        return run_it

    ones = [torch.ones(len(x), dtype=FP64)]
    # Where residual/τ underflows its sign is lost, and where it overflows its logarithm is.
    size = ((x.double() - m.double()) / torch.exp(s.double())).abs()
    lost, over = (size > 0) & (size < 1e-36), size > 3e38
    got = run(call(vae_fast.likelihood_nll), [leaf(t) for t in leaves], ones)
    truth = run(call(reference.likelihood_nll), [leaf(t, FP64) for t in leaves], ones)
    for name, g, t in zip(("nll", "∂mean", "∂log τ"), [*got[0], *got[1]], [*truth[0], *truth[1]]):
        info = torch.finfo(g.dtype)
        fits = torch.isfinite(t) & (t.abs() < 0.98 * info.max)
        if family == "laplace" and name == "∂mean":
            fits &= ~lost
        if family == "student_t":
            fits &= ~over if t.dim() > 1 else ~over[:, 0]
        torch.testing.assert_close(
            g.double()[fits], t[fits], rtol=5e-5 + 2 * info.eps, atol=2e-5 + info.tiny,
            msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip


numbers = st.one_of(
    st.sampled_from([0.0, -0.0, 1e-45, -1e-40, 1e-30, 1.0, 1e10, -1e19, 1e30, -1e37]),
    st.floats(-(2.0**123), 2.0**123, width=32),
)


@st.composite
def extremes(draw):
    """(x, mean) and log τ of some rows, and the family."""
    family = draw(st.sampled_from(["gaussian", "laplace", "student_t", "bernoulli"]))
    row = st.tuples(numbers, numbers, st.booleans(), st.floats(-85, 85, width=32))
    rows = draw(st.lists(row, min_size=1, max_size=20))
    if family == "bernoulli":
        pairs = [(float(same), m) for _, m, same, _ in rows]
    else:
        pairs = [(x, x if same else m) for x, m, same, _ in rows]
    return pairs, [s for *_, s in rows], family


@given(extremes())
@cases(0.02)
def test_extreme_values(rows):
    check_extremes(*rows)


# ---- rows and memory ---------------------------------------------------------------------------


def check_split(case, cut):
    """Parts of a batch that name their first row draw and compute what the whole does."""
    mu, s, _ = latent_tensors(case)
    batch = case.shape[0]
    s = s if s.dim() == 0 else s.expand(mu.shape)
    samples = case.samples is not None
    dim = int(samples)
    parts = [(0, cut), (cut, batch)]
    whole = run(
        lambda m, r: latent_call(case, m, r), [leaf(mu), leaf(s)],
        [torch.ones(())] * 3,
    )  # fmt: skip
    pieces = [
        run(
            lambda m, r, b=begin: latent_call(case, m, r, first_row=case.first_row + b),
            [leaf(mu[begin:end]), leaf(s if s.dim() == 0 else s[begin:end])],
            [torch.ones(())] * 3,
        )
        for begin, end in parts
    ]
    for i, want in enumerate(whole[0]):
        assert torch.equal(torch.cat([p[0][i] for p in pieces], dim), want), i
    for i, want in enumerate(whole[1]):
        if want is not None and want.dim() and want.numel():
            got = [
                torch.zeros_like(mu[b:e]) if p[1][i] is None else p[1][i]
                for p, (b, e) in zip(pieces, parts)
            ]
            assert torch.equal(torch.cat(got), want), i


@given(latent_cases(), st.floats(0, 1))
@cases(0.02)
def test_split_batches(case, at):
    check_split(case, round(at * case.shape[0]))


@given(likelihood_cases(), st.floats(0, 1))
@cases(0.02)
def test_split_batches_of_levels(case, at):
    case.dtypes = (torch.uint8, *case.dtypes[1:])
    case.options |= {"likelihood": "gaussian", "dequantize": True, "mask": "none", "x_grad": False}
    case.options["scale"], case.scale_shape = "0-dim", ()
    x, mean, s, _, _ = likelihood_tensors(case)
    cut, options = round(at * case.shape[0]), model_options(case)
    options.pop("first_row")
    dim = 0 if case.samples is None else 1
    whole = vae_fast.likelihood_nll(x, mean, s, first_row=case.first_row, **options)
    parts = [
        vae_fast.likelihood_nll(
            x[b:e], mean.narrow(dim, b, e - b), s, first_row=case.first_row + b, **options
        )
        for b, e in ((0, cut), (cut, case.shape[0]))
    ]
    assert torch.equal(torch.cat(parts, dim), whole)


def check_latent_memory(case):
    mu, s, rng = latent_tensors(case)
    rows = () if case.samples is None else (case.samples,)
    up = normals((*rows, *case.shape), rng).to(mu.dtype)
    results = []
    for contiguous in (False, True):
        m, r = ((t.detach().clone(memory_format=torch.contiguous_format) if contiguous else t)
                for t in (mu, s))  # fmt: skip
        results.append(
            run(
                lambda m, r: latent_call(case, m, r), [leaf(m), leaf(r)], [up, torch.ones(()), None]
            )
        )
    for a, b in zip([*results[0][0], *results[0][1]], [*results[1][0], *results[1][1]]):
        assert (a is None and b is None) or torch.equal(a, b)


@given(latent_cases())
@cases(0.03)
def test_the_latent_pass_does_not_depend_on_memory(case):
    check_latent_memory(case)


def check_likelihood_memory(case):
    """Bit for bit, but for sums of more than a tile or of dimensions not in order."""
    x, mean, s, mask, _ = likelihood_tensors(case)
    options = model_options(case)
    with_s = isinstance(s, torch.Tensor)
    results = []
    for contiguous in (False, True):
        tensors = [x, mean, mask, *([s] if with_s else [])]
        if contiguous:
            tensors = [
                t if t is None else t.detach().clone(memory_format=torch.contiguous_format)
                for t in tensors
            ]
        data, m, here, *rest = tensors
        leaves = [leaf(m), *map(leaf, rest)]
        results.append(
            run(
                lambda m, r=s, data=data, here=here: [
                    vae_fast.likelihood_nll(data, m, r, mask=here, **options)
                ],
                leaves, [torch.ones(())],
            )
        )  # fmt: skip
    if results[0][1][0] is None:  # nothing to sum
        return
    (nll, g), (nll_, g_) = results
    exact = all(layout in IN_ORDER for layout in case.layouts)
    names, shared = ["nll", "∂mean", "∂scale"], with_s and s.shape != mean.shape
    for name, a, b in zip(names, [*nll, *g], [*nll_, *g_]):
        summed = name == "nll" or (name == "∂scale" and shared)
        if not summed or (exact and math.prod(case.shape[1:]) <= TILE):
            assert torch.equal(a, b), name
        else:
            size = mean.numel() if name == "∂scale" else math.prod(case.shape[1:])
            close = {FP32: 1e-6, FP64: 1e-14}.get(a.dtype, 1e-2)
            torch.testing.assert_close(a, b, rtol=10 * close, atol=close * 10 * (1 + size))


@given(likelihood_cases())
@cases(0.04)
def test_the_likelihood_pass_does_not_depend_on_memory(case):
    check_likelihood_memory(case)


# ---- arguments of no meaning -------------------------------------------------------------------

JUNK = {
    "None": lambda: None,
    "a string": lambda: "x",
    "bytes": lambda: b"logvar",
    "0": lambda: 0,
    "-1": lambda: -1,
    "a huge int": lambda: 2**70,
    "2**63": lambda: 2**63,
    "a float": lambda: 1.5,
    "nan": lambda: math.nan,
    "inf": lambda: math.inf,
    "a complex number": lambda: 1j,
    "True": lambda: True,
    "a list": lambda: [1.0, 2.0],
    "an empty tuple": tuple,
    "a tuple of None": lambda: (None, None),
    "a dict": dict,
    "an object": object,
    "a function": lambda: math.prod,
    "a dtype": lambda: torch.float32,
    "0-dim": lambda: torch.zeros(()),
    "empty": lambda: torch.zeros(0),
    "another shape": lambda: torch.zeros(5, 2),
    "more dimensions": lambda: torch.zeros(1, 2, 1, 3),
    "fp64": lambda: torch.zeros(4, 3, dtype=FP64),
    "int64": lambda: torch.zeros(4, 3, dtype=torch.int64),
    "int8": lambda: torch.zeros(4, 3, dtype=torch.int8),
    "uint8": lambda: torch.zeros(4, 3, dtype=torch.uint8),
    "bool": lambda: torch.zeros(4, 3, dtype=torch.bool),
    "complex": lambda: torch.zeros(4, 3, dtype=torch.complex64),
    "float8": lambda: torch.zeros(4, 3).to(torch.float8_e4m3fn),
    "meta": lambda: torch.zeros(4, 3, device="meta"),
    "sparse": lambda: torch.zeros(4, 3).to_sparse(),
    "csr": lambda: torch.eye(4)[:, :3].to_sparse_csr(),
    "quantized": lambda: torch.quantize_per_tensor(torch.zeros(4, 3), 0.1, 0, torch.qint8),
    "a key of int64": lambda: torch.zeros(2, dtype=torch.int64),
    "a key of three": lambda: torch.zeros(3, dtype=torch.uint64),
    "a numpy array": lambda: torch.zeros(4, 3).numpy(),
    "a generator": torch.Generator,
}
_X = dict(x=lambda: torch.rand(4, 3), mean=lambda: torch.zeros(4, 3, requires_grad=True))
_LEVELS = _X | dict(x=lambda: torch.zeros(4, 3, dtype=torch.uint8))
_MODEL = dict(
    param=lambda: "logvar", clamp=lambda: (-1.0, 1.0), clamp_mode=lambda: "soft",
    mask=lambda: torch.ones(4, 3, dtype=torch.bool), likelihood=lambda: "student_t",
    df=lambda: 3.0, x_scale=lambda: (1.0, 0.0), dequantize=lambda: True, first_row=lambda: 5,
    key=lambda: torch.zeros(2, dtype=torch.uint64),
)  # fmt: skip
_PLAIN = {n: v for n, v in _MODEL.items() if n not in ("mask", "likelihood", "dequantize", "key")}
_MU = dict(mu=lambda: torch.zeros(4, 3, requires_grad=True), scale=lambda: torch.zeros(4, 3))
_CLAMP = {n: _MODEL[n] for n in ("param", "clamp", "clamp_mode")}
_ROWS = dict(log_q=lambda: torch.zeros(4), log_p=lambda: torch.zeros(4), beta=lambda: 0.5)
CALLS = [
    ("reparameterize", _MU | _CLAMP | dict(
        num_samples=lambda: 2, first_row=lambda: 5, key=_MODEL["key"], path_gradient=lambda: True)),
    ("reparameterize", _MU | dict(
        generator=torch.Generator, first_row=lambda: 5, num_samples=lambda: None)),
    ("gaussian_nll", _X | dict(scale=lambda: 0.0) | _PLAIN),
    ("likelihood_nll", _LEVELS | dict(scale=lambda: torch.zeros(3)) | _MODEL),
    ("optimal_gaussian_nll", _LEVELS | {
        n: v for n, v in _MODEL.items() if n not in ("likelihood", "df")
    } | dict(over=lambda: "channel")),
    ("gaussian_kl", _MU | _CLAMP | dict(
        prior=lambda: (torch.zeros(3), torch.zeros(4, 3)), prior_param=lambda: "var")),
    ("importance_bound", dict(
        nll=lambda: torch.zeros(2, 4), log_q=lambda: torch.zeros(2, 4),
        log_p=lambda: torch.zeros(2, 4), beta=lambda: 0.5)),
    ("fused_elbo", _X | dict(scale=lambda: torch.zeros(4, 3)) | _ROWS | _PLAIN | dict(
        reduction=lambda: "sum")),
    ("fused_elbo", _X | dict(
        mean=lambda: torch.zeros(4, 3, requires_grad=True) * 1,
        scale=lambda: torch.zeros(4, 3)) | _ROWS | dict(inplace=lambda: True)),
    ("fused_elbo", _LEVELS | dict(scale=lambda: torch.zeros(4, 1)) | _ROWS | _MODEL),
]  # fmt: skip


def check_arguments(call, changes):
    """A call with some arguments replaced works, or raises what is documented."""
    name, arguments = CALLS[call]
    arguments = {n: make() for n, make in arguments.items()}
    for argument, junk in changes.items():
        arguments[argument] = JUNK[junk]()
    try:
        results = getattr(vae_fast, name)(**arguments)
    except (TypeError, ValueError):
        return
    except RuntimeError as error:  # every tensor is on it, and a backend was asked for by name
        if "cannot serve device 'meta'" not in str(error):
            raise
        return
    results = results if isinstance(results, tuple) else (results,)
    assert all(isinstance(r, torch.Tensor) for r in results)
    total = sum(r.sum() for r in results)
    if total.requires_grad and total.device.type != "meta":
        total.backward()


@pytest.mark.parametrize(
    "call", range(len(CALLS)), ids=[f"{name}-{i}" for i, (name, _) in enumerate(CALLS)]
)
def test_each_argument_of_no_meaning(call):
    for argument in CALLS[call][1]:
        for junk in JUNK:
            try:
                check_arguments(call, {argument: junk})
            except Exception as error:
                pytest.fail(f"check_arguments({call}, {{{argument!r}: {junk!r}}}): {error!r}")


@st.composite
def wrong_calls(draw):
    call = draw(st.integers(0, len(CALLS) - 1))
    names, junk = st.sampled_from(sorted(CALLS[call][1])), st.sampled_from(list(JUNK))
    return call, draw(st.dictionaries(names, junk, min_size=1, max_size=2))


@given(wrong_calls())
@cases(0.07)
def test_arguments_of_no_meaning(wrong):
    check_arguments(*wrong)


# ---- cases that once failed --------------------------------------------------------------------

ONE = Case(seed=0, shape=(1, 1), dtypes=(FP64,) * 3, layouts=("contiguous",) * 4)
PLAIN = dict(likelihood="gaussian", df=4.0, x_scale=None, dequantize=False, scale="full",
             mask="none", x_grad=False)  # fmt: skip
LOSS = PLAIN | dict(beta=1.0, reduction="mean", inplace=False, log_p=True, rows_layout="contiguous")


def test_found_before():
    check_arguments(1, {"mu": "meta", "scale": "meta"})
    three = {"used": (True,) * 3}
    check_latent(replace(ONE, shape=(0, 0, 0, 0), **three))
    check_latent(replace(ONE, shape=(0, 2, 7), scale_shape=(0, 2, 1), **three))
    check_likelihood(replace(ONE, options=PLAIN | {"scale": "number"}))
    check_optimal(replace(ONE, shape=(0, 0), options=PLAIN | {"over": "channel"}))
    empty = replace(ONE, shape=(0, 2, 0, 1), used=(True, True))
    check_elbo(replace(empty, options=LOSS | {"inplace": True}))
    # A scale so large that a level's mass is a sliver of it.
    wide = replace(ONE, shape=(4, 60), param="logstd", clamp=(4.0, 5.0))
    check_likelihood(replace(wide, options=PLAIN | {"likelihood": "logistic"}))


def test_interpreted_found_before():
    """One packed channel whose two halves do not follow each other in memory."""
    case = replace(ONE, dtypes=(FP32,) * 3, used=(True, True), options=LOSS | {"scale": "packed"})
    for layout in ("step", "chunk", "padded"):
        for shape in ((2, 1), (2, 1, 3)):
            check_elbo(replace(case, shape=shape, layouts=("contiguous", layout) * 2))
    base = torch.randn(2, 4, 2, 3)
    x, found = torch.rand(2, 1, 2, 3), []
    for fn in (vae_fast.gaussian_nll, reference.gaussian_nll):
        packed = base[:, ::2].detach().requires_grad_()
        nll = fn(x, packed, None)
        found.append([nll, *torch.autograd.grad(nll.sum(), packed)])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


# ---- Triton's interpreter ----------------------------------------------------------------------
#
# Very slow: a dozen tiny cases. Its bf16 is cut off, not rounded.


def rounds(case):
    return torch.bfloat16 not in case.dtypes


@given(latent_cases(limit=24).filter(rounds))
@cases(0.02, most=40)
def test_interpreted_latent(case):
    check_latent(case)


@given(likelihood_cases(limit=24).filter(rounds))
@cases(0.02, most=40)
def test_interpreted_likelihood(case):
    check_likelihood(case)


@given(likelihood_cases(limit=24, elbo=True).filter(rounds))
@cases(0.02, most=40)
def test_interpreted_elbo(case):
    check_elbo(case)
