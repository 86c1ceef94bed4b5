"""The same bits run after run, for any number of threads, and in PyTorch's deterministic mode."""

import hashlib
import os
import platform
import subprocess
import sys
import warnings

import pytest
import torch

import vae_fast

pytestmark = pytest.mark.works_with("deterministic algorithms")

KEY = torch.tensor([3, 5], dtype=torch.uint64)


class Sizes:
    """B rows, K samples, L latent and D data elements.

    Unless tiny, several tiles and blocks; if large, enough that threads help each other.
    """

    def __init__(self, kind=""):
        kinds = {"tiny": (3, 2, 5, 6), "": (150, 3, 70, 1500), "large": (700, 3, 1501, 1502)}
        self.B, self.K, self.L, self.D = kinds[kind]


def _latent(n, dtype, **options):
    mu, s = torch.randn(2, n.B, n.L).to(dtype).unbind()
    s = s[0, 0].clone() if options.pop("scalar", False) else s
    z, log_q, log_p = vae_fast.reparameterize(*leaves(mu, s), key=KEY, **options)
    up = torch.randn(z.shape)
    return [z, log_q, log_p], (z * up).sum() + log_q.sum() - 0.3 * log_p.sum()


def leaves(*tensors):
    made = [t.detach().clone().requires_grad_() for t in tensors]
    leaves.last = made
    return made


def _nll(n, dtype, scale="full", levels=False, masked=False, sampled=False, family="gaussian"):
    shape = (n.K, n.B, n.D) if sampled else (n.B, n.D)
    x = (
        torch.randint(256, (n.B, n.D)).to(torch.uint8)
        if levels
        else torch.randn(n.B, n.D).to(dtype)
    )
    mask = torch.rand(n.B, n.D) > 0.3 if masked else None
    mean = torch.randn(shape).to(dtype)
    scale_shape = {"full": shape, "0-dim": (), "event": (n.D,), "row": (*shape[:-1], 1)}[scale]
    tensors = [mean, torch.randn(scale_shape).to(dtype), *([] if levels else [x])]
    mean, s, *rest = leaves(*tensors)
    nll = vae_fast.likelihood_nll(
        x if levels else rest[0], mean, s, family, mask=mask, dequantize=levels, key=KEY
    )
    return [nll], (nll * torch.randn(nll.shape)).sum()


def _elbo(n, dtype, reduction="mean", scale="full", inplace=False, packed=False):
    x, rows = torch.randn(n.B, n.D).to(dtype), n.K * n.B
    mean = torch.randn(rows, (1 + packed) * n.D).to(dtype)
    scale_shape = {"full": (rows, n.D), "0-dim": (), "event": (n.D,), "row": (rows, 1)}[scale]
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    mean, s, log_q, log_p = leaves(
        mean, torch.randn(scale_shape).to(dtype), *torch.randn(2, n.K, n.B, dtype=acc).unbind()
    )
    m, r = (mean * 1, s * 1) if inplace else (mean, s)
    loss, nll = vae_fast.fused_elbo(
        x, m, None if packed else r, log_q, log_p, 0.7, reduction, inplace=inplace
    )
    return [loss, nll], 1.3 * loss.sum()


def _kl(n, dtype, prior=False):
    tensors = leaves(*torch.randn(4 if prior else 2, n.B, n.L).to(dtype).unbind())
    kl = vae_fast.gaussian_kl(*tensors[:2], tuple(tensors[2:]) if prior else None)
    return [kl], (kl * torch.randn(kl.shape)).sum()


def _importance(n, dtype):
    bound = vae_fast.importance_bound(*leaves(*torch.randn(3, n.K, n.B, dtype=dtype).unbind()))
    return [bound], (bound * torch.randn(bound.shape)).sum()


def _optimal(n, dtype, over):
    x, mean = leaves(*torch.randn(2, n.B, n.D).to(dtype).unbind())
    nll = vae_fast.optimal_gaussian_nll(x, mean, over)
    return [nll], nll.sum()


def _module(n, dtype, **options):
    """The whole loss; the decoder's output is given, so that only this library adds anything up."""
    elbo = vae_fast.FusedELBO(num_samples=n.K, **options)
    x = torch.randn(n.B, n.D).to(dtype)
    mu, s, mean, scale = leaves(
        *torch.randn(2, n.B, n.L).to(dtype).unbind(),
        *torch.randn(2, n.K * n.B, n.D).to(dtype).unbind(),
    )
    out = elbo(x, mu, s, lambda z: (mean, scale), key=KEY)
    return [out.loss, out.nll, out.kl, out.z], out.loss.sum()


F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
CALLS = {
    "latent": (_latent, F32, {}),
    "latent fp64": (_latent, F64, {"num_samples": 2}),
    "latent bf16 samples": (_latent, BF16, {"num_samples": 3, "param": "softplus"}),
    "latent 0-dim scale": (_latent, F32, {"scalar": True, "clamp": (-1, 1)}),
    "latent path gradient": (_latent, F16, {"num_samples": 3, "path_gradient": True}),
    "nll": (_nll, F32, {}),
    "nll fp64": (_nll, F64, {"sampled": True}),
    "nll 0-dim scale": (_nll, F32, {"scale": "0-dim"}),
    "nll scale per event": (_nll, F32, {"scale": "event", "masked": True}),
    "nll scale per row": (_nll, BF16, {"scale": "row", "sampled": True}),
    "nll of levels": (_nll, F32, {"levels": True, "scale": "event", "sampled": True}),
    "laplace masked": (_nll, F16, {"family": "laplace", "masked": True}),
    "student t": (_nll, F32, {"family": "student_t", "scale": "event"}),
    "logistic": (_nll, F32, {"family": "logistic", "scale": "row"}),
    "elbo mean": (_elbo, F32, {}),
    "elbo sum": (_elbo, BF16, {"reduction": "sum"}),
    "elbo none": (_elbo, F32, {"reduction": "none"}),
    "elbo fp16": (_elbo, F16, {}),
    "elbo fp64 packed": (_elbo, F64, {"packed": True}),
    "elbo in place": (_elbo, F32, {"inplace": True}),
    "elbo 0-dim scale": (_elbo, F32, {"scale": "0-dim"}),
    "elbo scale per event": (_elbo, F32, {"scale": "event", "reduction": "sum"}),
    "elbo scale per row": (_elbo, F32, {"scale": "row"}),
    "kl": (_kl, F32, {}),
    "kl prior": (_kl, BF16, {"prior": True}),
    "importance": (_importance, F32, {}),
    "optimal": (_optimal, F32, {"over": "batch"}),
    "optimal sample": (_optimal, F64, {"over": "sample"}),
    "optimal channel": (_optimal, F32, {"over": "channel"}),
    "FusedELBO": (_module, F32, {}),
    "FusedELBO analytic": (_module, F32, {"kl": "analytic", "free_bits": 0.1}),
    "FusedELBO iwae": (_module, F32, {"objective": "iwae", "estimator": "dreg"}),
}


def compute(name, kind=""):
    """Results and gradients of a call, always of the same inputs."""
    call, dtype, options = CALLS[name]
    torch.manual_seed(1)
    results, total = call(Sizes(kind), dtype, **options)
    gradients = torch.autograd.grad(total, leaves.last, allow_unused=True)
    return [*(r.detach() for r in results), *(g for g in gradients if g is not None)]


def bits(tensors):
    return [t.contiguous().view(torch.uint8) for t in tensors if t.dim()] + [
        t.reshape(1).view(torch.uint8) for t in tensors if not t.dim()
    ]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(s, t) for s, t in zip(bits(a), bits(b)))


@pytest.fixture
def cpp():
    reason = vae_fast.backends.why_not("cpp", "cpu")
    if reason is not None:
        pytest.skip(reason)
    with vae_fast.use_backend("cpp"):
        yield


@pytest.fixture
def threads():
    """Sets the number of threads; restores it."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def deterministic():
    """Turns PyTorch's deterministic mode on; restores what was set."""
    yield lambda: torch.use_deterministic_algorithms(True)
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kind", ["", "large"])
@pytest.mark.parametrize("name", CALLS)
def test_same_bits_for_any_number_of_threads(name, kind, cpp, threads):
    threads(1)
    first = compute(name, kind)
    assert len(first) > 1
    assert all(torch.isfinite(t).all() for t in first)
    for n in (1, 2, 3, 7, 2):
        threads(n)
        assert same(compute(name, kind), first), f"{n} threads"


@pytest.mark.parametrize("name", CALLS)
def test_deterministic_algorithms(name, fused, deterministic):
    """The same bits as without, no warning, no error; fresh memory is NaN then."""
    kind = "tiny" if vae_fast.backends.backend_for("cpu") == "triton" else ""
    if fused.type != "cpu":
        pytest.skip("the inputs are the CPU's")
    plain = compute(name, kind)
    deterministic()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", module="triton")  # of its interpreter's NumPy
        for _ in range(2):
            assert same(compute(name, kind), plain)


def test_training_twice_gives_the_same_bits(cpp, deterministic):
    def train():
        torch.manual_seed(3)
        vae = vae_fast.VAE.mlp((1, 8, 8), latent_dim=4)
        optimizer = torch.optim.Adam(vae.parameters(), 1e-3)
        for x in torch.rand(5, 32, 1, 8, 8):
            optimizer.zero_grad()
            vae(x).loss.backward()
            optimizer.step()
        return [p.detach() for p in vae.parameters()]

    first = train()
    assert same(train(), first)
    deterministic()
    assert same(train(), first)


def digests():
    """One digest of the bits of each call."""
    found = {}
    for name in CALLS:
        data = b"".join(t.numpy().tobytes() for t in bits(compute(name)))
        found[name] = hashlib.sha256(data).hexdigest()[:16]
    return found


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc fills memory on request")
def test_what_memory_held_before_does_not_matter(cpp):
    """glibc fills all memory it hands out with a huge number: an unwritten element would show."""
    script = (
        "import test_determinism as t\nfor pair in t.digests().items(): print(*pair, sep='|')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"MALLOC_PERTURB_": "1", "VAE_FAST_BACKEND": "cpp"},
        cwd=os.path.dirname(os.path.abspath(__file__)),
        capture_output=True,
        text=True,
        check=True,
    )
    assert dict(line.split("|") for line in done.stdout.splitlines()) == digests()
