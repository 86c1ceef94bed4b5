"""The C++ shortcut for eager calls does what the Python path does, and leaves it the rest."""

import sysconfig
import types
from pathlib import Path

import pytest
import torch
from test_autograd import Nothing
from torch.utils._python_dispatch import TorchDispatchMode

import vae_fast
from vae_fast import _build, backends, eager

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def served(*dtypes):
    """Parameters: the C++ kernels with each of these dtypes, and the slow interpreter with one."""
    pairs = [*(("cpp", dtype) for dtype in dtypes), ("triton", dtypes[0])]
    return pytest.mark.parametrize(("fused", "dtype"), pairs, ids=str, indirect=["fused"])


@pytest.fixture(autouse=True)
def _shortcut():
    """The shortcut in place, whatever a test does to it; it must be there where it can be built."""
    vae_fast.reparameterize(torch.zeros(1, 1), torch.zeros(1, 1))
    before = eager.shortcut()
    if before is None:
        headers = Path(sysconfig.get_path("include"), "Python.h").is_file()
        assert _build.can_build() is not None or not headers, _build.why_no_eager()
        pytest.skip("no C++ compiler, or no Python headers")
    yield
    eager.use_shortcut(before)


@pytest.fixture
def key():
    return torch.tensor([7, 11], dtype=torch.uint64)


class Calls:
    """Stands in for the shortcut and counts what it did not refuse, and what it did."""

    def __init__(self):
        backends.backend_for("cpu")  # which at its first use puts the shortcut in its place
        self.module, self.taken, self.refused = eager.shortcut(), [], []
        eager.use_shortcut(self)

    def __getattr__(self, name):
        def call(*args):
            result = getattr(self.module, name)(*args)
            (self.refused if result is None else self.taken).append(name)
            return result

        return call


def same_bits_without_it(fast, again, other_kernel=False):
    """``other_kernel``: of a loss whose gradient comes from the forward pass in eager.cpp alone."""
    eager.use_shortcut(None)
    for a, b in zip(fast, again(), strict=True):
        assert torch.equal(a, b) or other_kernel
        torch.testing.assert_close(a, b)  # of the same dtype, too


def step(
    dtype, key, inplace=False, packed=False, num_samples=1, reduction="mean", kl="monte_carlo",
    levels=False, objective="elbo", device=None, **graph,
):  # fmt: skip
    torch.manual_seed(0)
    x, mu, logvar = (torch.randn(6, n, dtype=dtype).to(device) for n in (9, 5, 5))
    if levels:
        x = torch.randint(0, 256, x.shape, dtype=torch.uint8, device=device)
    decoder = torch.nn.Linear(5, 18).to(device, dtype)
    leaves = [mu.requires_grad_(), logvar.requires_grad_(), *decoder.parameters()]
    elbo = vae_fast.FusedELBO(
        0.5, num_samples, kl=kl, reduction=reduction, inplace=inplace, objective=objective
    )
    out = elbo(
        x, mu, logvar, decoder if packed else lambda z: decoder(z).tensor_split(2, 1), key=key
    )
    grads = torch.autograd.grad(out.loss.sum() + 0.1 * out.nll.sum(), leaves, **graph)
    return [*out[:5], *grads]


@served(*DTYPES)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kl", ["monte_carlo", "analytic"])
@pytest.mark.parametrize("num_samples", [1, 3])
def test_same_bits_as_without_it(dtype, inplace, packed, reduction, kl, num_samples, fused, key):
    calls, key = Calls(), key.to(fused)
    options = {"reduction": reduction, "kl": kl, "num_samples": num_samples, "device": fused}
    fast = step(dtype, key, inplace, packed, **options)
    assert calls.taken == ["latent", *(["gaussian_kl"] if kl == "analytic" else []), "elbo"]
    same_bits_without_it(fast, lambda: step(dtype, key, inplace, packed, **options))


@served(torch.float32, torch.float64, torch.bfloat16)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_same_bits_on_levels(dtype, inplace, packed, fused, key):
    calls, key = Calls(), key.to(fused)
    options = {"levels": True, "device": fused}
    fast = step(dtype, key, inplace, packed, **options)
    assert "elbo" in calls.taken
    same_bits_without_it(fast, lambda: step(dtype, key, inplace, packed, **options))


BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@served((F32, BF16, BF16), (F32, F16, F16), (BF16, F32, F16), (F32, BF16, F32))
@pytest.mark.parametrize("scale", ["full", "packed", "scalar", "rows", "event"])
@pytest.mark.parametrize("inplace", [False, True])
def test_same_bits_of_several_dtypes(dtype, scale, inplace, fused, key):
    """fp32 data beside a network under autocast, say."""
    calls, key = Calls(), key.to(fused)
    torch.manual_seed(0)
    x, mean, mu = (torch.randn(6, n).to(fused, t) for n, t in zip((9, 9, 5), dtype, strict=True))
    spread = torch.randn(6, 5).to(fused, dtype[1])
    if scale == "packed":
        mean, s = torch.randn(6, 18).to(fused, dtype[1]), None
    else:
        shape = {"full": (6, 9), "scalar": (), "rows": (6, 1), "event": (1, 9)}[scale]
        s = torch.randn(shape).to(fused, dtype[2])
    leaves = [t.requires_grad_() for t in (mean, mu, spread, s) if t is not None]

    def results():
        own = mean * 1, None if s is None else s * 1
        z, *terms = vae_fast.reparameterize(mu, spread, key=key)
        loss, nll = vae_fast.fused_elbo(x, *own, *terms, inplace=inplace)
        return z, *terms, loss, nll, *torch.autograd.grad(loss, leaves)

    fast = results()
    assert calls.taken == ["latent", "elbo"]
    same_bits_without_it(fast, results)


@served(*DTYPES)
@pytest.mark.parametrize("scale", ["learned", "fixed", "packed"])
@pytest.mark.parametrize("levels", [False, True])
def test_the_likelihood_alone_has_the_same_bits(dtype, scale, levels, fused):
    calls = Calls()
    torch.manual_seed(0)
    x, w = torch.randn(6, 9, dtype=dtype, device=fused), torch.randn(6, device=fused)
    data = torch.randint(0, 256, x.shape, dtype=torch.uint8, device=fused) if levels else x
    columns = 18 if scale == "packed" else 9
    mean = torch.randn(6, columns, dtype=dtype, device=fused, requires_grad=True)
    s = None if scale == "packed" else torch.randn_like(x, requires_grad=scale == "learned")
    leaves = [t for t in (mean, s) if t is not None and t.requires_grad]

    def results():
        nll = vae_fast.gaussian_nll(data, mean, s, clamp=(-1.0, 1.0), x_scale=(0.5, 3.0))
        with torch.no_grad():
            value = vae_fast.gaussian_nll(data, mean, s, clamp=(-1.0, 1.0), x_scale=(0.5, 3.0))
        loss = (nll * w.to(nll.dtype)).sum()
        return (
            nll,
            value,
            *(g for _ in "ab" for g in torch.autograd.grad(loss, leaves, retain_graph=True)),
        )

    fast = results()
    assert calls.taken == ["nll", "nll"]
    assert torch.equal(fast[0], fast[1])
    same_bits_without_it(fast, results)


@served(*DTYPES)
@pytest.mark.parametrize("packed", [False, True])
def test_the_likelihood_of_samples_has_the_same_bits(dtype, packed, fused, key):
    calls, key = Calls(), key.to(fused)
    options = {"packed": packed, "num_samples": 3, "objective": "iwae", "device": fused}
    fast = step(dtype, key, **options)
    assert calls.taken == ["latent", "nll"]
    same_bits_without_it(fast, lambda: step(dtype, key, **options))


DENSITIES = [
    {"likelihood": "laplace", "param": "std"},
    {"likelihood": "student_t", "df": 3.0, "param": "logstd"},
    {"likelihood": "bernoulli"},
    {"likelihood": "logistic", "x_scale": (0.25, -1.0)},
    {"clamp": (-0.5, 0.5), "clamp_mode": "soft"},
    {"scale": 0.3},
    {"scale": 0.3, "likelihood": "laplace", "param": "var", "clamp": (0.4, 1.0)},
    {"scale": torch.tensor(0.3)},
    {"scale": torch.tensor(0.3, requires_grad=True)},
    {"scale": torch.rand(1, 9), "likelihood": "laplace"},
    {"scale": torch.rand(6, 1, requires_grad=True)},
    {"scale": torch.rand(1, 9, requires_grad=True), "clamp": (-1.0, 0.5)},
    {"scale": None, "likelihood": "student_t"},  # packed
    {"mask": torch.rand(6, 9) > 0.4},
    {"mask": torch.rand(9, 6).t() > 0.4, "likelihood": "bernoulli"},
    {"mask": torch.rand(6, 9) > 0.4, "scale": 0.3, "likelihood": "laplace"},
    {"mask": torch.rand(6, 9) > 0.4, "scale": None, "clamp": (-0.5, 0.5)},
]


@served(torch.float32, torch.float64, torch.bfloat16)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    "density",
    DENSITIES,
    # Without what is random in them, so that two processes agree on the tests' names.
    ids=lambda d: str({k: v.shape if isinstance(v, torch.Tensor) else v for k, v in d.items()}),
)
def test_every_density_has_the_same_bits(density, inplace, dtype, fused):
    calls = Calls()
    torch.manual_seed(0)
    options = {k: v.to(fused) if isinstance(v, torch.Tensor) else v for k, v in density.items()}
    logistic = options.get("likelihood") == "logistic"
    x = torch.rand(6, 9).to(fused, dtype)
    x = torch.randint(0, 256, x.shape, dtype=torch.uint8, device=fused) if logistic else x
    without = options.get("likelihood") == "bernoulli"
    given = None if without else (torch.rand(6, 9) + 0.1).to(fused).requires_grad_()
    scale = options.pop("scale", given)
    columns = 9 if without or scale is not None else 18
    mean = torch.randn(6, columns).to(fused, dtype)
    w, log_q = torch.randn(6, device=fused), torch.randn(6, device=fused)
    log_q = log_q.to(dtype) if dtype == torch.float64 else log_q
    learned = isinstance(scale, torch.Tensor) and scale.requires_grad
    if isinstance(scale, torch.Tensor):  # one for all may stay in the rows' dtype
        scale = scale.detach().to(dtype if scale.dim() or dtype == torch.float64 else scale.dtype)

    def results():
        leaves = [mean.clone().requires_grad_()]
        leaves += [scale.clone().requires_grad_()] if learned else []

        def tensors():
            own = [(t * 1.0).view_as(t) for t in leaves]  # views of a result, as a chunk is
            return own[0], own[1] if learned else scale

        nll = vae_fast.likelihood_nll(x, *tensors(), **options)
        each = torch.eye(6, dtype=nll.dtype, device=fused)
        batched = torch.autograd.grad(nll, leaves, each, is_grads_batched=True, retain_graph=True)
        grads = *batched, *torch.autograd.grad((nll * w.to(nll.dtype)).sum(), leaves)
        elbo = vae_fast.fused_elbo(x, *tensors(), log_q, None, 0.5, inplace=inplace, **options)
        return nll, *grads, *elbo, *torch.autograd.grad(elbo[0], leaves)

    fast = results()
    assert calls.taken == ["nll", "elbo"]
    in_cpp = backends.backend_for(fused.type) == "cpp"
    shared = learned and scale.dim() > 0 and scale.shape != mean.shape
    same_bits_without_it(fast, results, in_cpp and shared)


def test_one_scale_of_another_dtype_is_still_refused():
    x = torch.randn(3, 4, dtype=torch.float64)
    mean = x.clone().requires_grad_()
    for scale in (torch.zeros(()), torch.zeros((), dtype=torch.long)):
        with pytest.raises(TypeError, match="scale"):
            vae_fast.gaussian_nll(x, mean, scale)


def test_a_density_without_a_scale_refuses_one():
    t = torch.randn(3, 4, requires_grad=True)
    for scale in (t, 0.0, torch.zeros(())):
        with pytest.raises(ValueError, match="scale must be None"):
            vae_fast.likelihood_nll(torch.rand(3, 4), t, scale, "bernoulli")


def test_the_likelihood_alone_leaves_the_rest_to_the_long_way():
    calls = Calls()
    t = torch.randn(3, 4, requires_grad=True)
    fixed = torch.randn(3, 4)
    vae_fast.gaussian_nll(t, fixed, fixed).sum().backward()  # of x
    vae_fast.gaussian_nll(fixed, fixed, t).sum().backward()  # of the scale alone
    vae_fast.gaussian_nll(fixed, fixed.expand(2, 3, 4), fixed)
    assert not calls.taken
    nll = vae_fast.gaussian_nll(fixed, t, fixed)
    assert calls.taken == ["nll"]
    with pytest.raises(NotImplementedError, match="double backward"):
        torch.autograd.grad(nll.sum(), t, create_graph=True)
    nll = vae_fast.gaussian_nll(fixed, t, fixed)
    eye = torch.eye(3)
    each = torch.autograd.grad(nll, t, eye, is_grads_batched=True, retain_graph=True)[0]
    for row in range(3):
        (alone,) = torch.autograd.grad(nll, t, eye[row], retain_graph=True)
        assert torch.equal(each[row], alone)


# What eager.cpp spreads itself; what the KL has, and whole numbers, it takes as the checks make it.
BROADCAST = {
    "scale per element": lambda t: vae_fast.gaussian_nll(t.x, t.mean, t.element),
    "one scale": lambda t: vae_fast.gaussian_nll(t.x, t.mean, t.one),
    "a whole number": lambda t: vae_fast.gaussian_nll(t.x, t.mean, 0),
    "scale per channel": lambda t: vae_fast.gaussian_nll(
        t.x.view(6, 3, 3), t.mean.view(6, 3, 3), t.channel
    ),
    "mask": lambda t: vae_fast.gaussian_nll(t.x, t.mean, t.s, mask=t.mask),
    "loss, scale per element": lambda t: vae_fast.fused_elbo(t.x, t.mean, t.element, t.row, t.row),
    "loss, one scale": lambda t: vae_fast.fused_elbo(
        t.x, t.mean, t.one, t.row, t.row, inplace=True
    ),
    "loss, mask": lambda t: vae_fast.fused_elbo(t.x, t.mean, t.s, t.row, t.row, mask=t.mask),
    "loss, mask, in place": lambda t: vae_fast.fused_elbo(
        t.x, t.mean, t.s, t.row, None, 0.3, "sum", mask=t.mask, inplace=True
    ),
    "KL, scale per element": lambda t: vae_fast.gaussian_kl(t.mean, t.element),
    "KL, prior": lambda t: vae_fast.gaussian_kl(t.mean, t.s, (t.element, t.one)),
}


@served(torch.float32, torch.float64, torch.bfloat16)
@pytest.mark.parametrize("name", BROADCAST)
def test_what_broadcasts_has_the_same_bits(name, dtype, fused):
    torch.manual_seed(0)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = types.SimpleNamespace(
        x=torch.rand(6, 9).to(fused, dtype), mask=(torch.rand(1, 9) > 0.4).to(fused)
    )
    shapes = {"mean": (6, 9), "s": (6, 9), "element": (9,), "one": (1,), "channel": (3, 1)}
    leaves = {n: torch.randn(shape).to(fused, dtype) for n, shape in shapes.items()}
    leaves["row"] = torch.randn(6, device=fused).to(acc)
    for leaf in leaves.values():
        leaf.requires_grad_()
    calls = Calls()

    def results():
        for n, leaf in leaves.items():
            setattr(tensors, n, leaf * 1)
        out = BROADCAST[name](tensors)
        out = out if isinstance(out, tuple) else (out,)
        total = sum((t * torch.arange(1.0, 1 + t.numel()).view_as(t).to(t)).sum() for t in out)
        grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        return *out, *(g for g in grads if g is not None)

    fast = results()
    assert len(calls.taken) == 1, "once, and not by the long way"
    refused = ["gaussian_kl"] * name.startswith("KL") + ["nll"] * (name == "a whole number")
    assert calls.refused == refused
    in_cpp = backends.backend_for(fused.type) == "cpp"
    same_bits_without_it(fast, results, in_cpp and name == "loss, scale per element")


@served(torch.float32, torch.float64)
@pytest.mark.parametrize("upstream", ["loss", "loss, scaled", "loss and rows"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("scale", ["event", "channel", "row"])
def test_a_scale_that_rows_share(scale, learned, reduction, upstream, dtype, fused):
    """Its gradient is that of the reference, whatever is differentiated, once and again."""
    batch = 70 if backends.backend_for(fused.type) == "cpp" else 5  # which adds up blocks of 32
    x, mean, s = torch.randn(3, batch, 2, 3, 5, dtype=torch.float64)
    s = {"event": s[0], "channel": s[0, :, :1, :1], "row": s[:, :1, :1, :1]}[scale]
    acc = torch.float64 if dtype == torch.float64 else torch.float32

    def results(device, dtype, acc):
        leaf, t = mean.to(device, dtype, copy=True), s.to(device, dtype, copy=True)
        rows = torch.linspace(-1, 1, batch, dtype=acc, device=device)
        leaf.requires_grad_(), t.requires_grad_(learned)
        loss, nll = vae_fast.fused_elbo(x.to(device, dtype), leaf, t, rows, reduction=reduction)
        total = loss.sum() * (1 if upstream == "loss" else 3)
        if "rows" in upstream:
            total = total + (nll * rows).sum()
        inputs = [leaf, t] if learned else [leaf]
        first = torch.autograd.grad(total, inputs, retain_graph=True)
        again = torch.autograd.grad(total, inputs)
        assert all(map(torch.equal, first, again))
        return loss.cpu(), nll.cpu(), *(g.cpu() for g in first)

    got = results(fused, dtype, acc)
    with vae_fast.use_backend("reference"):
        expected = results("cpu", torch.float64, torch.float64)
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=1e-5 * b.abs().max().item())


@pytest.mark.parametrize("scale", [(9,), (6, 1), (6, 9)])
def test_a_fixed_scale_leaves_mean_to_its_gradient(scale, fused):
    """Of any shape: the forward pass writes the one gradient, over mean if it may."""
    x, rows = torch.randn(6, 9, device=fused), torch.zeros(6, device=fused)
    s = torch.randn(scale, device=fused)
    for inplace in (False, True):
        mean = torch.randn(6, 9, device=fused, requires_grad=True) * 1
        given = mean.detach().clone()
        loss, _ = vae_fast.fused_elbo(x, mean, s, rows, reduction="sum", inplace=inplace)
        assert torch.equal(mean.detach(), given) != inplace
        (g,) = torch.autograd.grad(loss, mean)
        assert (g.data_ptr() == mean.data_ptr()) == inplace
        torch.testing.assert_close(g, (given - x) * (-s).exp())


KL_SHAPES = {
    "2": (70, 2), "16": (70, 16), "17": (70, 17), "images": (40, 3, 5, 7), "long": (3, 2500),
    "one row": (1, 40), "transposed": (37, 90),
}  # fmt: skip


@served(torch.float32, torch.float64, torch.bfloat16, torch.float16)
@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("kind", KL_SHAPES)
def test_kl_has_the_same_bits(kind, prior, dtype, fused):
    shape = KL_SHAPES[kind]
    tensors = [torch.randn(shape).to(fused, dtype) for _ in range(4 if prior else 2)]
    tensors = [(t.t() if kind == "transposed" else t).requires_grad_() for t in tensors]
    upstream = torch.randn(tensors[0].shape[0], device=fused)
    calls = Calls()

    def results():
        mu, s, *pair = (t * 1 for t in tensors)
        kl = vae_fast.gaussian_kl(mu, s, tuple(pair) or None, "logstd", "softplus", (-2, 0.5))
        grads = torch.autograd.grad(kl, tensors, upstream.to(kl.dtype), retain_graph=True)
        for g, t in zip(grads, tensors, strict=True):
            assert g.stride() == t.stride()
        one = torch.autograd.grad(kl, tensors, torch.ones_like(kl[:1]).expand(kl.shape))
        with torch.no_grad():
            return kl, vae_fast.gaussian_kl(mu, s), *grads, *one

    fast = results()
    assert calls.taken == ["gaussian_kl"] * 2
    same_bits_without_it(fast, results)


def test_kl_differentiates_once():
    mu = torch.randn(3, 4, requires_grad=True)
    kl = vae_fast.gaussian_kl(mu, mu)
    with pytest.raises(NotImplementedError, match="double backward"):
        torch.autograd.grad(kl.sum(), mu, create_graph=True)
    kl = vae_fast.gaussian_kl(mu, mu)
    each = torch.autograd.grad(kl, mu, torch.eye(3), is_grads_batched=True, retain_graph=True)[0]
    for row in range(3):
        assert torch.equal(each[row], torch.autograd.grad(kl, mu, torch.eye(3)[row], True)[0])


def test_a_seed_draws_the_same_noise(fused):
    z, zeros = [], torch.zeros(4, 3, device=fused)
    for module in (eager.shortcut(), None):
        eager.use_shortcut(module)
        torch.manual_seed(3)
        z.append([vae_fast.reparameterize(zeros, zeros)[0] for _ in "ab"])
    assert torch.equal(z[0][0], z[1][0])
    assert torch.equal(z[0][1], z[1][1])
    assert not torch.equal(z[0][0], z[0][1])


@pytest.mark.parametrize("upstream", [(0,), (1,), (2,), (0, 1, 2)])
def test_each_upstream_gradient(upstream, fused, key):
    grads, key = [], key.to(fused)
    for module in (eager.shortcut(), None):
        eager.use_shortcut(module)
        torch.manual_seed(1)
        mu, s = (torch.randn(5, 7, dtype=torch.float64).to(fused) for _ in range(2))
        mu.requires_grad_(), s.requires_grad_()
        results = vae_fast.reparameterize(mu, s, key=key, num_samples=3)
        grads.append(torch.autograd.grad(sum(results[i].square().sum() for i in upstream), (mu, s)))
    assert torch.equal(grads[0][0], grads[1][0])
    assert torch.equal(grads[0][1], grads[1][1])


def test_frozen_inputs_build_no_graph(key):
    t = torch.randn(3, 4)
    calls = Calls()
    assert not vae_fast.reparameterize(t, t, key=key)[0].requires_grad
    with torch.no_grad():
        assert not vae_fast.reparameterize(t.clone().requires_grad_(), t, key=key)[0].requires_grad
    with torch.inference_mode():
        assert vae_fast.reparameterize(torch.randn(3, 4), t, key=key)[0].is_inference()
    assert calls.taken == ["latent"] * 3


def not_plain():
    t = torch.randn(4, 6)
    yield "lazily negated", torch.complex(t, t).conj().imag
    yield "subclass", t.as_subclass(type("Sub", (torch.Tensor,), {}))
    yield "broadcast", t[:1].squeeze(0)
    yield "no single stride", torch.randn(4, 2, 5)[:, :, :3]


@pytest.mark.parametrize(
    ("what", "scale"), list(not_plain()), ids=lambda v: v if type(v) is str else ""
)
def test_what_is_not_plain_goes_the_long_way(what, scale, key):
    mu = torch.randn(4, 2, 3) if scale.dim() == 3 else torch.randn(4, 6)
    calls = Calls()
    z = vae_fast.reparameterize(mu, scale, key=key)[0]
    assert calls.taken == []
    want = vae_fast.reference.reparameterize(mu, scale.resolve_neg().expand(mu.shape), key=key)[0]
    torch.testing.assert_close(z.as_subclass(torch.Tensor), want.as_subclass(torch.Tensor))


def test_a_negated_upstream_gradient(key):
    mu = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    z, _, _ = vae_fast.reparameterize(mu, torch.zeros(4, 6, dtype=torch.float64), key=key)
    upstream = torch.complex(z.detach(), z.detach()).conj().imag
    assert upstream.is_neg()
    z.backward(upstream)
    torch.testing.assert_close(mu.grad, -z.detach())


def test_whoever_watches_the_dispatcher_sees_the_ops(key):
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        step(torch.float32, key)
    with torch.profiler.profile() as profile:
        step(torch.float32, key)
    names = {event.key for event in profile.key_averages()}
    for op in ("latent_forward", "latent_backward", "likelihood_forward_grad"):
        assert f"vae_fast.{op}.default" in seen
        written = "_" if op == "likelihood_forward_grad" else ""  # nobody minds
        assert f"vae_fast::{op}{written}" in names


def test_functorch_is_left_to_the_ops(key):
    calls = Calls()
    s = torch.zeros(2, 3)
    # The shortcut would silently miss the transform.
    torch.func.grad(lambda mu: vae_fast.reparameterize(mu, s, key=key)[1].sum())(s)
    assert calls.taken == []


def test_batched_upstream_gradients(key):
    mu = torch.randn(3, 5, requires_grad=True)
    z, _log_q, _ = vae_fast.reparameterize(mu, torch.zeros(3, 5), key=key)
    upstream = torch.randn(4, 3, 5)
    batched = torch.autograd.grad(z, mu, upstream, is_grads_batched=True, retain_graph=True)[0]
    one_by_one = [torch.autograd.grad(z, mu, g, retain_graph=True)[0] for g in upstream]
    torch.testing.assert_close(batched, torch.stack(one_by_one))


def test_hooks_may_change_the_layout(key):
    mu, s = (torch.randn(3, 2, 5, requires_grad=True) for _ in range(2))
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: t, lambda t: t.mT.contiguous().mT if t.dim() == 3 else t
    ):
        z, _, _ = vae_fast.reparameterize(mu, s, key=key)
        z.square().sum().backward()
    torch.testing.assert_close(mu.grad, 2 * z.detach())


def test_a_graph_can_be_walked_twice(key):
    torch.manual_seed(0)
    x, mu = torch.randn(4, 6), torch.randn(4, 6, requires_grad=True)
    out = vae_fast.FusedELBO()(x, mu, torch.zeros(4, 6), lambda z: (z * 1.0, z * 0.1), key=key)
    first = torch.autograd.grad(out.loss * 3, mu, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(out.loss * 3, mu, retain_graph=True)[0], first)
    torch.testing.assert_close(torch.autograd.grad(out.loss, mu)[0] * 3, first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out.loss, mu)


def one_pass(which, t, key):
    """A loss whose graph is one node of the shortcut, on a leaf or a view of one."""
    calls, zeros = Calls(), torch.zeros(t.shape)
    x = torch.arange(t.numel()).view(t.shape) / t.numel()
    if which == "latent":
        loss = vae_fast.reparameterize(t, zeros, key=key)[2].sum()
    elif which == "nll":
        loss = vae_fast.gaussian_nll(x, t, zeros).sum()
    else:
        loss = vae_fast.fused_elbo(x, t, zeros, torch.zeros(len(t)))[0]
    assert calls.taken == [which]
    return loss


PASSES = pytest.mark.parametrize("which", ["latent", "nll", "elbo"])


@PASSES
def test_a_graph_walked_once_is_let_go(which, key):
    leaf = torch.randn(4, 6, requires_grad=True)
    loss = one_pass(which, leaf, key)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@PASSES
def test_rows_that_share_memory_have_gradients_of_their_own(which, key):
    leaf = torch.randn(1, 6, requires_grad=True)
    rows = torch.randn(4, 6).copy_(leaf.detach()).requires_grad_()
    one_pass(which, leaf.expand(4, 6), key).backward()
    one_pass(which, rows, key).backward()
    torch.testing.assert_close(leaf.grad, rows.grad.sum(0, keepdim=True))


@PASSES
def test_no_gradient_begets_none(which, key):
    leaf = torch.randn(4, 6, requires_grad=True)
    Nothing.apply(one_pass(which, leaf, key)).backward()
    assert leaf.grad is None


def test_modified_inputs_are_noticed(key):
    mu = torch.randn(4, 6, requires_grad=True)
    moved = mu * 1.0
    z, _, _ = vae_fast.reparameterize(moved, torch.zeros(4, 6), key=key)
    moved.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_saved_tensor_hooks_see_what_is_kept(key):
    packed = []

    def pack(t):
        packed.append(tuple(t.shape))
        return t.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        mu, s = (torch.randn(4, 6, requires_grad=True) for _ in range(2))
        z, log_q, log_p = vae_fast.reparameterize(mu, s, key=key)
        assert packed == [(4, 6), (4, 6), (2,)]
        packed.clear()
        loss, _ = vae_fast.fused_elbo(torch.randn(4, 6), z * 1.0, z * 0.5, log_q, log_p)
        assert packed.count((4, 6)) == 2
    loss.backward()
    assert torch.isfinite(mu.grad).all()


def test_hooks_on_views_that_are_overwritten(key):
    calls, seen = Calls(), []
    h = torch.randn(4, 12, requires_grad=True) * 1.0
    mean, scale = h.chunk(2, 1)
    for t in (mean, scale):
        t.register_hook(lambda g: seen.append(g.shape))
    vae_fast.fused_elbo(torch.randn(4, 6), mean, scale, torch.zeros(4), inplace=True)[0].backward()
    assert calls.taken == ["elbo"]
    assert seen == [(4, 6), (4, 6)]


def test_what_inplace_must_not_overwrite_is_still_refused(key):
    x, log = torch.randn(4, 6), torch.zeros(4)
    mean, scale = torch.randn(4, 6, requires_grad=True), torch.zeros(4, 6, requires_grad=True)
    with pytest.raises(ValueError, match="inplace=True would overwrite mean"):
        vae_fast.fused_elbo(x, mean, scale, log, log, inplace=True)
    moved = mean * 1.0
    before = moved._version
    vae_fast.fused_elbo(x, moved, scale * 1.0, log, log, inplace=True)
    assert moved._version > before


def test_without_it_everything_works(monkeypatch, tmp_path, key):
    attempts, why = [], _build.BuildError("interrupted")

    def fails(folder, target=_build.KERNELS):
        attempts.append(target.lib_name)
        raise why

    want = step(torch.float32, key)
    monkeypatch.setattr(_build, "compile_into", fails)
    monkeypatch.setattr(_build, "_why_no_eager", None)
    monkeypatch.setenv("VAE_FAST_CACHE", str(tmp_path))
    assert _build.build_eager() is None
    assert _build.why_no_eager() == "interrupted"
    why = _build._Rejected("no Python.h")
    assert _build.build_eager() is None  # tries again: next time nobody may interrupt
    assert _build.build_eager() is None  # but not where the compiler would say the same
    assert len(attempts) == 2
    (failed,) = tmp_path.glob("*.failed")
    assert "no Python.h" in failed.read_text()
    assert str(failed) in _build.why_no_eager()
    eager.use_shortcut(None)
    for a, b in zip(step(torch.float32, key), want):
        assert torch.equal(a, b)


def test_one_that_cannot_be_loaded_is_done_without(tmp_path, caplog):
    broken = tmp_path / "vae_fast_eager.so"
    broken.write_text("not a library")
    assert _build.load_eager(broken, torch.empty_like, 1, {}) is None
    assert "stay in Python" in caplog.text


def test_another_backend_is_not_bypassed(key):
    with vae_fast.use_backend("reference"):
        assert eager.shortcut() is None
        with vae_fast.use_backend("cpp"):
            assert eager.shortcut() is not None
        assert eager.shortcut() is None
    assert eager.shortcut() is not None
    assert backends.report()["extension"]["eager calls"] == "in C++"


def test_a_fixed_scale_that_is_an_integer_is_no_reason_to_refuse():
    calls = Calls()
    x, mu, mean = (torch.randn(4, n) for n in (9, 3, 9))
    vae_fast.FusedELBO(likelihood_scale=-2)(x, mu, mu, lambda z: mean)
    assert calls.taken == ["latent", "elbo"]


def test_a_number_for_a_scale_may_be_any_that_a_float_holds():
    x, mean = torch.randn(4, 9), torch.randn(4, 9)
    as_int = vae_fast.gaussian_nll(x, mean, 10**30, "std")
    assert torch.equal(as_int, vae_fast.gaussian_nll(x, mean, 1e30, "std"))
    with pytest.raises(ValueError, match="scale must fit a float"):
        vae_fast.gaussian_nll(x, mean, 10**400, "std")


def test_the_reference_draws_a_key_of_its_own_too():
    x, mean = torch.randint(0, 256, (4, 9), dtype=torch.uint8), torch.rand(4, 9)
    results = []
    for likelihood_nll in (vae_fast.likelihood_nll, vae_fast.reference.likelihood_nll):
        torch.manual_seed(3)
        results.append(likelihood_nll(x, mean, 0.0, dequantize=True))
    torch.testing.assert_close(*results)
