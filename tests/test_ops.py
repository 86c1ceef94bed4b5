"""The ops as citizens of PyTorch: derivatives, opcheck, compile, backends."""

import importlib
import math
import os
import subprocess
import sys
import warnings

import pytest
import torch

import vae_fast
from vae_fast import backends, buffers, eager, ops

UNCLAMPED = (-math.inf, math.inf)


def gradcheck(fn, inputs):
    """Every entry of the Jacobian; in the slow interpreter, random projections of it."""
    interpreted = backends.backend_for("cpu") == "triton"
    return torch.autograd.gradcheck(fn, inputs, fast_mode=interpreted)


@pytest.mark.parametrize("param", ops.PARAMS)
@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("num_samples", [None, 2])
def test_gradcheck_latent(param, scalar, num_samples, fused, key):
    mu = torch.randn(3, 5, dtype=torch.float64, device=fused, requires_grad=True)
    s = torch.rand(() if scalar else (3, 5), dtype=torch.float64, device=fused) + 0.4
    assert gradcheck(
        lambda m, r: vae_fast.reparameterize(m, r, param, num_samples, key.to(fused)),
        (mu, s.requires_grad_()),
    )


@pytest.mark.parametrize("param", ops.PARAMS)
@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("num_samples", [None, 2])
def test_gradcheck_likelihood(param, scalar, num_samples, fused):
    x = torch.randn(3, 4, dtype=torch.float64, device=fused, requires_grad=True)
    shape = (3, 4) if num_samples is None else (num_samples, 3, 4)
    mean = torch.randn(shape, dtype=torch.float64, device=fused, requires_grad=True)
    s = torch.rand(() if scalar else shape, dtype=torch.float64, device=fused) + 0.4
    assert gradcheck(lambda *a: vae_fast.gaussian_nll(*a, param), (x, mean, s.requires_grad_()))


# Every layout and reduction for the two main parameters, and the others once.
ELBO_CASES = [
    (param, layout, reduction)
    for param in ops.PARAMS
    for layout in ("full", "scalar", "packed")
    for reduction in ("mean", "sum", "none")
    if param in ("logvar", "std") or (layout, reduction) == ("full", "mean")
]


@pytest.mark.parametrize(("param", "layout", "reduction"), ELBO_CASES)
def test_gradcheck_elbo(param, layout, reduction, fused):
    """Including the forward that writes the gradients, whose loss and rows both have gradients."""
    x = torch.randn(2, 4, dtype=torch.float64, device=fused)
    log_q, log_p = torch.randn(2, 3, 2, dtype=torch.float64, device=fused).unbind()
    mean = torch.rand(6, 8 if layout == "packed" else 4, dtype=torch.float64, device=fused) + 0.4
    inputs = [mean, log_q.clone(), log_p.clone()]
    if layout != "packed":
        shape = () if layout == "scalar" else mean.shape
        inputs.append(torch.rand(shape, dtype=torch.float64, device=fused) + 0.4)

    def elbo(mean, log_q, log_p, scale=None):
        return vae_fast.fused_elbo(x, mean, scale, log_q, log_p, 0.6, reduction, param)

    assert gradcheck(elbo, [t.requires_grad_() for t in inputs])


def samples(device, dtype=torch.float32):
    def t(*shape, grad=False):
        return torch.randn(*shape, device=device).to(dtype).requires_grad_(grad)

    key = torch.tensor([1, 2], dtype=torch.uint64, device=device)

    def model(likelihood="gaussian", clamp=UNCLAMPED, soft=False, key=None):
        return (ops.LIKELIHOODS.index(likelihood), 0, *clamp, soft, 4.0, 0.1, 0.0, key, 3)

    latent = (0, 0, 0, *UNCLAMPED, False, False)
    tail = (0, *model())  # the reduction, and the plain model
    rows = [t(6).float(), t(6).float()]
    levels = torch.randint(256, (3, 7), dtype=torch.uint8, device=device)
    kl = (0, 1, *UNCLAMPED, False)
    return [
        (ops.latent_forward, (t(4, 5, grad=True), t(4, 5, grad=True), key, *latent)),
        (
            ops.latent_forward,
            (t(4, 5, grad=True), t((), grad=True), key, 2, 3, 0, -1.0, 1.0, True, True),
        ),
        (ops.latent_backward, (t(4, 5), None, None, t(4, 5), t(4, 5), key, *latent)),
        (
            ops.likelihood_forward,
            (t(3, 7), t(6, 7, grad=True), t(6, 7, grad=True), None, *rows, 1.0, *tail),
        ),
        (
            ops.likelihood_forward,
            (t(3, 4), t(6, 8, grad=True), None, t(3, 4) > 0, *rows, 1.0, 2, *model()),
        ),
        (
            ops.likelihood_forward,
            (t(6, 7, grad=True), t(6, 7), t(()), None, None, None, 0.0, 3, *model()),
        ),
        (
            ops.likelihood_backward,
            (rows[0], None, t(3, 7), t(6, 7), t(()), None, 1.0, *tail, True, True, True),
        ),
        (
            ops.likelihood_backward,
            (None, t(()).float(), t(3, 7), t(6, 7), t(6, 7), None, 1.0, *tail, False, True, False),
        ),
        (
            ops.likelihood_backward,
            (rows[0], None, t(3, 7), t(6, 7), t(1, 7), None, 1.0, *tail, False, False, True),
        ),
        (
            ops.likelihood_forward_grad_,
            (t(3, 7), t(6, 7), t(6, 7), None, *rows, 1.0, *tail, t(6, 7), t(6, 7)),
        ),
        (
            ops.likelihood_forward_grad_,
            (t(3, 4), t(6, 8), None, None, *rows, 1.0, *tail, t(6, 8), None),
        ),
        (
            ops.likelihood_forward_grad_,
            (t(3, 7), t(6, 7), t(()), None, *rows, 1.0, *tail, t(6, 7), None),
        ),
        (
            ops.likelihood_rescale_,
            (t(6, 7), t(6, 7), None, rows[0], t(()).float(), 1.0, 0, 2, 3),
        ),
        (ops.likelihood_rescale_, (t(6, 7), None, rows[1], None, t(()).float(), 1.0, 0, 2, 3)),
        *(
            (
                ops.likelihood_forward_grad,
                (t(3, 7), t(6, 7), s, None, *rows, 1.0, *tail, s is not None and s.dim() > 0),
            )
            for s in (t(6, 7), t(()))
        ),
        (ops.likelihood_rescale, (t(6, 7), t(6, 7), None, rows[0], None, 1.0, 0, 2, 3)),
        # One value of the scale per row, and one event of them, with other likelihoods.
        (
            ops.likelihood_forward,
            (
                *(t(3, 7, grad=True), t(6, 7, grad=True), t(6, 1, grad=True)),
                *(None, None, None, 0.0, 3),
                *model("student_t", (-1.0, 1.0), soft=True),
            ),
        ),
        (
            ops.likelihood_forward,
            (
                *(levels, t(6, 7, grad=True), t(1, 7, grad=True)),
                *(None, *rows, 1.0, 2),
                *model("laplace", key=key),
            ),
        ),
        (
            ops.likelihood_forward,
            (
                t(3, 7, grad=True),
                t(6, 7, grad=True),
                None,
                None,
                *rows,
                1.0,
                0,
                *model("bernoulli"),
            ),
        ),
        (
            ops.gaussian_kl_forward,
            tuple(t(4, 5, grad=True) for _ in range(4)) + kl,
        ),
        (ops.gaussian_kl_forward, (t(4, 5, grad=True), t(4, 5, grad=True), None, None, *kl)),
        (
            ops.gaussian_kl_backward,
            (t(4).float(), t(4, 5), t(4, 5), t(4, 5), t(4, 5), *kl),
        ),
        (
            ops.importance_forward,
            (t(6, grad=True).float(), t(2, 3, grad=True).float(), t(2, 3).float(), 0.5),
        ),
        (ops.importance_backward, (t(3).float(), t(2, 3).float(), 0.5)),
    ]


@pytest.mark.parametrize("index", range(25))
def test_opcheck(index, fused):
    vae_fast.backends.backend_for(fused.type)
    op, args = samples(fused)[index]
    # AOT dispatch traces with dynamic shapes and compares with eager, gradients included.
    torch.library.opcheck(op, args)


@pytest.fixture
def connect():
    """Connects eager.cpp with other Autograd kernels of the ops than their own, or with none."""
    backends.backend_for("cpu")
    if backends._shortcut is None:
        pytest.skip("no C++ compiler, or no Python headers")

    def connected(autograd):
        backends._shortcut.connect(buffers.empty_like, buffers.SMALLEST, autograd)
        for name in ops.AUTOGRAD:  # modes remember which keys have kernels
            getattr(torch.ops.vae_fast, name).default._dispatch_cache.clear()

    yield connected
    connected(ops.AUTOGRAD)


@pytest.mark.parametrize("index", range(25))
def test_opcheck_without_eager_cpp(index, connect):
    connect({})
    torch.library.opcheck(*samples("cpu")[index])


def test_python_is_called_where_there_is_a_derivative_to_record(connect):
    called = []

    def spied(name, kernel):
        def spy(*args):
            called.append(name)
            return kernel(*args)

        return spy

    connect({name: spied(name, kernel) for name, kernel in ops.AUTOGRAD.items()})
    for op, args in samples("cpu"):
        name = op.name().removeprefix("vae_fast::")
        args = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
        wanted = [a for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()]
        if name not in ops.AUTOGRAD:
            continue
        before = op(*args)
        assert not called
        wanted[0].requires_grad_()
        with torch.no_grad():
            op(*args)
        assert not called
        after = op(*args)
        assert called == [name]
        called.clear()
        for a, b in zip(*([r] if isinstance(r, torch.Tensor) else r for r in (before, after))):
            assert torch.equal(a, b)


def test_every_op_is_opchecked():
    checked = {op.name().split("::")[1] for op, _ in samples("cpu")}
    assert checked == set(ops.SCHEMAS) - {"no_derivative"}  # which only ever raises


def test_registered_double_backward_refuses(key):
    """Through the ops themselves, as torch.func uses them."""
    backends.backend_for("cpu")
    mu = torch.randn(3, 4, requires_grad=True)
    z, _, _ = ops.latent_forward(mu, mu, key, 0, 0, 0, *UNCLAMPED, False, False)
    (g,) = torch.autograd.grad(z.square().sum(), mu, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward is not supported"):
        g.sum().backward()


def test_torch_function_dispatch():
    seen = []

    class Spy(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    t = torch.randn(3, 4).as_subclass(Spy)
    z, log_q, log_p = vae_fast.reparameterize(t, t)
    vae_fast.gaussian_nll(t, t, t)
    vae_fast.likelihood_nll(t, t, t, "laplace")
    vae_fast.optimal_gaussian_nll(t, t)
    vae_fast.fused_elbo(t, t, t, log_q, log_p)
    vae_fast.gaussian_kl(t, t)
    vae_fast.importance_bound(t, t, t)
    public = {getattr(vae_fast, name) for name in vae_fast.functional.__all__}
    assert public - {vae_fast.validate} <= set(seen)
    assert isinstance(z, Spy)


def test_direct_calls_are_checked(cpp):
    """By the little that keeps a kernel within its tensors."""
    t, rows, key = torch.rand, torch.rand(4), torch.tensor([1, 2], dtype=torch.uint64)
    latent = (0, 0, 0, *UNCLAMPED, False, False)
    model = (0, 0, *UNCLAMPED, False, 4.0, 1.0, 0.0, None, 0)
    kl = (0, 0, *UNCLAMPED, False)
    mask, none = torch.ones(4, 6, dtype=torch.bool), (None, None)

    def nll(x, mean, scale, mask=None, log_q=None, log_p=None, model=model):
        return ops.likelihood_forward(x, mean, scale, mask, log_q, log_p, 1.0, 0, *model)

    def grad(g_mean, g_scale):
        tensors = t(4, 6), t(4, 6), t(4, 6), None, rows, rows
        return ops.likelihood_forward_grad_(*tensors, 1.0, 0, *model, g_mean, g_scale)

    nll(t(4, 6), t(8, 6), t(8, 6), mask, t(8), t(8))
    nll(t(4, 6), t(8, 12), None)
    for scale in (t(()), t(8, 6), t(8, 1), t(1, 6)):
        nll(t(4, 6), t(8, 6), scale)
    grad(t(4, 6), t(4, 6))
    for wrong in (
        lambda: ops.latent_forward(t(64, 4096), t(1, 1), key, *latent),
        lambda: ops.latent_forward(t(4, 3), t(4, 3), key[:1], *latent),
        lambda: ops.latent_forward(t(4, 3), t(4, 3), key.view(torch.int64), *latent),
        lambda: ops.latent_forward(t(()), t(()), key, *latent),
        lambda: ops.latent_backward(t(4, 2), *none, t(4, 3), t(4, 3), key, *latent),
        lambda: ops.latent_backward(None, t(3), None, t(4, 3), t(4, 3), key, *latent),
        lambda: nll(t(4, 6), t(4, 5), t(4, 5)),
        lambda: nll(t(4, 6), t(6, 6), t(6, 6)),
        lambda: nll(t(4, 6), t(4, 6, 1), t(4, 6, 1)),
        lambda: nll(t(4, 6), t(4, 6), t(4, 2)),
        lambda: nll(t(4, 6), t(4, 6), t(2, 6)),
        lambda: nll(t(4, 6), t(4, 6), t(4, 6), mask[:2]),
        lambda: nll(t(4, 6), t(4, 6), t(4, 6), mask.float()),
        lambda: nll(t(4, 6), t(4, 6), t(4, 6), None, t(3)),
        lambda: nll(t(4, 6), t(4, 6), t(4, 6), None, rows, rows.double()),
        lambda: nll(t(4, 6), t(4, 6), t(()), model=(*model[:-2], key[:1], 0)),
        lambda: ops.likelihood_backward(
            t(3), None, t(4, 6), t(4, 6), t(()), None, 1.0, 0, *model, False, True, False
        ),
        lambda: ops.likelihood_backward(
            None, t(3), t(4, 6), t(4, 6), t(()), None, 1.0, 2, *model, False, True, False
        ),
        lambda: grad(t(4, 5), t(4, 6)),
        lambda: grad(t(4, 6), t(2, 6)),
        lambda: ops.likelihood_rescale_(t(4, 6), None, None, None, t(()), 1.0, 0, 1, 5),
        lambda: ops.likelihood_rescale_(t(4, 6), t(3, 6), None, None, t(()), 1.0, 0, 1, 4),
        lambda: ops.gaussian_kl_forward(t(4, 3), t(4, 2), *none, *kl),
        lambda: ops.gaussian_kl_forward(t(4, 3), t(4, 3), t(4, 3), t(1, 3), *kl),
        lambda: ops.gaussian_kl_backward(t(3), t(4, 3), t(4, 3), *none, *kl),
        lambda: ops.importance_forward(t(4), t(2, 3), None, 1.0),
        lambda: ops.importance_forward(t(6), t(2, 3), t(2, 2), 1.0),
    ):
        with pytest.raises(RuntimeError, match="vae_fast: "):
            wrong()


def test_memory_that_is_copied_on_write_is_copied(cpp):
    mean = torch.rand(4, 6)
    before, lazy = mean.clone(), torch._lazy_clone(mean)
    model = (0, 0, *UNCLAMPED, False, 4.0, 1.0, 0.0, None, 0)
    rows = torch.zeros(4)
    ops.likelihood_forward_grad_(
        *(torch.rand(4, 6), lazy, torch.zeros(()), None, rows, rows, 1.0, 0, *model, lazy, None)
    )
    assert torch.equal(mean, before)
    assert not torch.equal(lazy, before)
    lazy = torch._lazy_clone(mean)
    ops.likelihood_rescale_(lazy, None, None, None, torch.tensor(2.0), 1.0, 0, 1, 4)
    assert torch.equal(mean, before)
    assert torch.equal(lazy, 2 * before)


def test_triton_serves_every_op():
    pytest.importorskip("triton")
    launchers = importlib.import_module("vae_fast._triton")
    # Plain PyTorch, on every device.
    everywhere = {
        "importance_backward",
        "likelihood_forward_grad",
        "likelihood_rescale",
        "no_derivative",
    }
    assert set(launchers.__all__) == set(ops.SCHEMAS) - everywhere - {"no_derivative"}


# ---- backends --------------------------------------------------------------------------------


def test_use_backend_restores_and_nests():
    default = backends.backend_for("cpu")
    with vae_fast.use_backend("reference"):
        assert backends.backend_for("cpu") == "reference"
        with vae_fast.use_backend("cpp"):
            assert backends.backend_for("cpu") == "cpp"
        assert backends.backend_for("cpu") == "reference"
    assert backends.backend_for("cpu") == default == "cpp"


def test_the_cpp_kernels_come_back_after_the_interpreter(key):
    if backends.why_not("triton", "cpu"):
        pytest.skip("no interpreter")
    mu = torch.randn(3, 4)
    before = vae_fast.reparameterize(mu, mu, key=key)[0]
    with vae_fast.use_backend("triton"):
        between = vae_fast.reparameterize(mu, mu, key=key)[0]
    after = vae_fast.reparameterize(mu, mu, key=key)[0]
    assert torch.equal(before, after)
    torch.testing.assert_close(between, before)


def test_unknown_backend_is_refused():
    with (
        pytest.raises(ValueError, match="name must be one of cpp, triton, reference"),
        vae_fast.use_backend("cuda9"),
    ):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU makes this choice possible")
def test_an_impossible_backend_says_why():
    """In a process of its own, since the interpreter's switch is read at import."""
    code = (
        "import vae_fast\n"
        "try:\n    vae_fast.use_backend('triton').__enter__()\n"
        "except RuntimeError as error:\n    print(error)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert "cannot run on this machine" in run.stdout
    assert "TRITON_INTERPRET" in run.stdout or "not installed" in run.stdout


@pytest.mark.parametrize(
    ("value", "message"), [("nonsense", "must be one of"), ("reference", "reference")]
)
def test_environment_variable(value, message):
    code = (
        "import torch, vae_fast\n"
        "try:\n    vae_fast.gaussian_nll(*torch.zeros(3, 2, 2))\n"
        "    print(vae_fast.backends.backend_for('cpu'))\n"
        "except ValueError as error:\n    print(error)\n"
    )
    environment = {**os.environ, "VAE_FAST_BACKEND": value}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert message in run.stdout


@pytest.mark.parametrize("report_keeps_it_quiet", [False, True])
def test_a_missing_backend_warns_once_and_falls_back(report_keeps_it_quiet, monkeypatch):
    attempts = []

    def broken():
        attempts.append(1)
        raise backends._build.BuildError("no compiler")

    monkeypatch.setattr(backends, "_resolved", {})
    monkeypatch.setattr(backends, "_failures", {})
    monkeypatch.setattr(backends, "_forced", None)
    monkeypatch.setattr(backends._build, "load", broken)
    monkeypatch.setattr(eager, "_shortcut", None)
    t = torch.randn(3, 4)
    if report_keeps_it_quiet:  # who then computes is warned all the same
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            backends.report()
    tried = len(attempts)
    with pytest.warns(vae_fast.FallbackWarning, match="no compiler") as record:
        results = [vae_fast.gaussian_nll(t, t, t) for _ in range(2)]
    assert len(record) == 1
    assert record[0].filename == __file__
    assert len(attempts) - tried == (0 if report_keeps_it_quiet else 1)
    torch.testing.assert_close(results[0], vae_fast.reference.gaussian_nll(t, t, t))
    (cpu,) = (d for d in backends.report()["devices"] if d["device"] == "cpu")
    assert cpu["others"]["cpp"] == "no compiler"


def test_the_report_says_what_is_forced():
    with vae_fast.use_backend("reference"):
        report = backends.report()
    (cpu,) = (d for d in report["devices"] if d["device"] == "cpu")
    assert cpu["others"]["cpp"] == "available, but reference is forced"
    assert report["extension"]["eager calls"] == "none, reference is forced"


def test_report_covers_every_backend():
    report = backends.report()
    cpu = next(d for d in report["devices"] if d["device"] == "cpu")
    assert {cpu["backend"], *cpu["others"]} == set(backends.BACKENDS)
    assert report["extension"]["status"] == "loaded"
    assert report["versions"]["torch"] == torch.__version__
