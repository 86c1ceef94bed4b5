"""torch.compile, AOTAutograd, compiled autograd and torch.export: the eager results, unbroken."""

import io
import os
import subprocess
import sys

import pytest
import torch
import torch._inductor.config
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import vae_fast
from vae_fast import eager, noise

pytestmark = pytest.mark.works_with("torch.compile")
KEY = torch.tensor([20261122, 7], dtype=torch.uint64)


@pytest.fixture(autouse=True)
def _fresh():
    """Nothing compiled before, in this process or another, has a say."""
    torch._dynamo.reset()
    counters.clear()
    with torch._inductor.config.patch(force_disable_caches=True):
        yield


def leaves(*shapes, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in shapes]


def unique_graphs():
    return counters["stats"]["unique_graphs"]


def compiled(fn, backend="aot_eager", **options):
    return torch.compile(fn, fullgraph=True, backend=backend, **options)


def same(actual, expected, inputs):
    """Outputs, and the gradients of a function of all of them."""
    close = {"rtol": 1e-5, "atol": 1e-6}
    actual, expected = (
        [t for t in (o if isinstance(o, tuple) else (o,)) if isinstance(t, torch.Tensor)]
        for o in (actual, expected)
    )
    assert len(actual) == len(expected) > 0
    gradients = []
    for outputs in (actual, expected):
        loss = sum(o.float().square().mean() for o in outputs if o.requires_grad)
        gradients.append(torch.autograd.grad(loss, inputs) if inputs else ())
    for a, b in zip(actual, expected):
        torch.testing.assert_close(a, b, **close)
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, **close)


# ---- every public function -------------------------------------------------------------------

LEVELS = torch.randint(256, (4, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
MASK = torch.arange(24).reshape(4, 6) % 3 > 0
FUNCTIONS = {
    "reparameterize": (
        lambda mu, s: vae_fast.reparameterize(mu, s, num_samples=3, key=KEY.to(mu.device)),
        [(4, 5), (4, 5)],
    ),
    "reparameterize, options": (
        lambda mu, s: vae_fast.reparameterize(
            mu, s, "softplus", key=KEY.to(mu.device), clamp=(-1, 1), path_gradient=True
        ),
        [(4, 5), ()],
    ),
    "gaussian_nll": (
        lambda x, m, s: vae_fast.gaussian_nll(x, m, s, "logstd", clamp=(-1, 1)),
        [(4, 6), (2, 4, 6), (2, 4, 6)],
    ),
    "likelihood_nll": (
        lambda m, s: vae_fast.likelihood_nll(
            LEVELS.to(m.device), m, s, "laplace", dequantize=True, key=KEY.to(m.device)
        ),
        [(4, 6), (6,)],
    ),
    "optimal_gaussian_nll": (
        lambda x, m: vae_fast.optimal_gaussian_nll(x, m, "channel", mask=MASK.to(m.device)),
        [(4, 6), (2, 4, 6)],
    ),
    "gaussian_kl": (
        lambda mu, s, a, b: vae_fast.gaussian_kl(mu, s, (a, b), prior_param="logstd"),
        [(4, 5), (4, 5), (5,), (5,)],
    ),
    "importance_bound": (
        lambda nll, q, p: vae_fast.importance_bound(nll, q, p, 0.5),
        [(3, 4), (3, 4), (3, 4)],
    ),
    "fused_elbo": (
        lambda x, m, s, q, p: vae_fast.fused_elbo(x, m, s, q, p, 0.5),
        [(4, 6), (8, 6), (8, 6), (2, 4), (2, 4)],
    ),
    "fused_elbo, options": (
        lambda m, q, p: vae_fast.fused_elbo(
            LEVELS.to(m.device), m, None, q, p, 2.0, "none", mask=MASK.to(m.device)
        ),
        [(4, 12), (4,), (4,)],
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_compiles_whole(name, backend):
    fn, shapes = FUNCTIONS[name]
    inputs = leaves(*shapes, device=backend)
    same(compiled(fn)(*inputs), fn(*inputs), inputs)
    assert unique_graphs() == 1


def test_no_public_function_is_left_out():
    covered = {name.split(",")[0] for name in FUNCTIONS}
    assert covered == set(vae_fast.functional.__all__) - {"validate"}


def test_noise_compiles(backend):
    key = KEY.to(backend)
    for fn in (
        lambda key: noise.normal(key, 3, 2, (5,), first_row=7),
        lambda key: noise.uniform(key, 3, (5,)),
    ):
        assert torch.equal(compiled(fn)(key), fn(key))
    # A key drawn inside is the one that eager code draws from the same generator state.
    draw = compiled(lambda: noise.make_key(backend))
    torch.manual_seed(5)
    first, second = draw(), draw()
    torch.manual_seed(5)
    assert torch.equal(first, noise.make_key(backend))
    assert not torch.equal(first, second)


# ---- the module and the model ----------------------------------------------------------------

OPTIONS = [
    {},
    {"num_samples": 2},
    {"num_samples": 2, "objective": "iwae"},
    {"num_samples": 2, "objective": "iwae", "estimator": "dreg"},
    {"estimator": "stl", "posterior_clamp": (-3, 3)},
    {"kl": "analytic", "free_bits": 0.1},
    {"capacity": 2.0, "reduction": "sum"},
    {"beta": torch.tensor(0.5)},
    {"likelihood": "student_t", "likelihood_clamp_mode": "soft"},
    {"likelihood": "bernoulli"},
    {"likelihood_scale": "optimal"},
    {"likelihood_scale": 0.0, "inplace": True},
    {"prior": (torch.zeros(3), torch.ones(3))},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_training_steps_compile_whole(options, fused):
    vae = vae_fast.VAE.mlp(9, 3, hidden=(8,), **options).to(fused)
    x, key = torch.rand(5, 9, device=fused), KEY.to(fused)
    out, expected = compiled(vae)(x, key), vae(x, key)
    same(out[:5], expected[:5], list(vae.parameters()))
    assert torch.equal(out.z, expected.z)
    assert unique_graphs() == 1


@pytest.mark.parametrize("model", ["mlp", "conv"])
def test_inductor_trains_as_eager_does(model):
    """Steps of Adam, in code that Inductor made, with noise drawn inside."""
    weights = {}
    for kind in ("eager", "compiled"):
        torch.manual_seed(0)
        make = vae_fast.VAE.mlp if model == "mlp" else vae_fast.VAE.conv
        vae = make((1, 6, 6), 3, (8,))
        run = torch.compile(vae, fullgraph=True) if kind == "compiled" else vae
        optimizer = torch.optim.Adam(vae.parameters(), 1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            run(torch.rand(5, 1, 6, 6)).loss.backward()
            optimizer.step()
        weights[kind] = [p.detach() for p in vae.parameters()]
    for a, b in zip(weights["eager"], weights["compiled"]):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_inductor_makes_eager_noise():
    """Of any key: products of 64 bits overflow, which is undefined in C++."""
    functions = [
        lambda key: noise.uniform(key, 7, (8,), first_row=3),
        lambda key: noise.normal(key, 7, None, (8,), first_row=3),
    ]
    torch.manual_seed(7)
    keys = [noise.make_key() for _ in range(20)]
    for function in functions:
        run = torch.compile(function)
        for key in keys:
            torch.testing.assert_close(run(key), function(key))


def test_a_split_decoder_output_and_bfloat16():
    encoder, decoder = nn.Linear(9, 6), nn.Linear(3, 18)
    elbo = vae_fast.FusedELBO()

    def loss(x):
        with torch.autocast("cpu", torch.bfloat16):
            mu, s = encoder(x).chunk(2, 1)
            return elbo(x, mu, s, lambda z: decoder(z).chunk(2, 1), key=KEY)[:5]

    x = torch.rand(5, 9)
    out, expected = compiled(loss)(x), loss(x)
    assert out[0].dtype == torch.float32
    assert out[4].dtype == torch.bfloat16
    parameters = [*encoder.parameters(), *decoder.parameters()]
    for a, b in zip(out, expected):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
    for a, b in zip(
        torch.autograd.grad(out[0], parameters), torch.autograd.grad(expected[0], parameters)
    ):
        torch.testing.assert_close(a, b, rtol=5e-2, atol=5e-2)


# ---- recompilation ---------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [None, True])
def test_other_batch_sizes_recompile_at_most_once(dynamic, fused):
    vae = vae_fast.VAE.mlp(9, 3, hidden=(8,), num_samples=2).to(fused)
    run, key = compiled(vae, dynamic=dynamic), KEY.to(fused)
    for batch in (5, 7, 9):
        x = torch.rand(batch, 9, device=fused)
        out = run(x, key)
        same(out[:5], vae(x, key)[:5], list(vae.parameters()))
    assert unique_graphs() <= (1 if dynamic else 2)


def test_other_rows_of_the_noise_recompile_at_most_once():
    vae = vae_fast.VAE.mlp(9, 3, hidden=(8,))
    run, x = compiled(vae), torch.rand(4, 9)
    for first_row in (0, 4, 8, 12, 2**40):
        assert torch.equal(run(x, KEY, first_row=first_row).z, vae(x, KEY, first_row=first_row).z)
    assert unique_graphs() <= 2


IWAE = {"objective": "iwae", "num_samples": 2}


@pytest.mark.parametrize(
    ("name", "options"),
    [("beta", {}), ("capacity", {}), ("beta", IWAE), ("beta", IWAE | {"estimator": "dreg"})],
    ids=str,
)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_schedule_recompiles_at_most_once(name, options, as_tensor):
    """More values than torch.compile takes versions of a graph."""
    vae = vae_fast.VAE.mlp(9, 3, hidden=(8,), **{name: 1.0}, **options)
    run, x = compiled(vae), torch.rand(4, 9)
    for step in range(12):
        value = 0.1 * step
        setattr(vae.elbo, name, torch.tensor(value) if as_tensor else value)
        torch.testing.assert_close(run(x, KEY).loss, vae(x, KEY).loss)
    assert unique_graphs() <= 2


def test_beta_may_be_set_within_what_is_compiled(key):
    elbo = vae_fast.FusedELBO()
    x, mu, scale, w = leaves((6, 12), (6, 4), (6, 4), (4, 24))
    x = x.detach()

    def step(beta):
        elbo.beta = beta
        return elbo(x, mu, scale, lambda z: (z @ w).chunk(2, 1), key=key).loss

    run = compiled(step)
    for beta in (0.1, 0.2, 0.3, 0.7):
        same(run(beta), step(beta), [mu, scale, w])
    assert unique_graphs() <= 2


def test_a_changing_beta_of_the_function_recompiles_at_most_once():
    run, (x, mean, s) = compiled(vae_fast.fused_elbo), leaves(*3 * [(4, 6)])
    rows = torch.randn(2, 4)
    for step in range(12):
        args = x, mean, s, *rows, 0.1 * step
        torch.testing.assert_close(run(*args)[0], vae_fast.fused_elbo(*args)[0])
    assert unique_graphs() <= 2


def test_another_backend_is_another_graph():
    """What was compiled for one backend does not answer for another."""
    t, run = torch.randn(4, 6), compiled(vae_fast.gaussian_nll)
    run(t, t, t)
    with vae_fast.use_backend("reference"):
        assert vae_fast.backends.backend_for("cpu") == "reference"
        torch.testing.assert_close(run(t, t, t), vae_fast.gaussian_nll(t, t, t))
    assert unique_graphs() == 2


# ---- what the compiler sees ------------------------------------------------------------------


def test_aot_autograd_sees_one_op_for_each_pass():
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_compiler

    seen = {}

    def record(which):
        @make_boxed_compiler
        def compiler(graph, _):
            targets = [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]
            seen[which] = sorted(t for t in targets if t.startswith("vae_fast"))
            return graph.forward

        return compiler

    vae = vae_fast.VAE.mlp(9, 3, hidden=(8,))
    backend = aot_autograd(fw_compiler=record("forward"), bw_compiler=record("backward"))
    compiled(vae, backend)(torch.rand(5, 9), KEY).loss.backward()
    for which in ("forward", "backward"):
        assert seen[which] == [f"vae_fast.{p}_{which}.default" for p in ("latent", "likelihood")]


def test_what_bounds_nothing_is_only_a_number_in_exported_programs():
    graphs = []

    def record(graph, _):
        graphs.append(graph)
        return graph.forward

    x, mean = torch.rand(5, 9), torch.rand(5, 9)
    compiled(vae_fast.gaussian_nll, record)(x, mean, mean)
    (call,) = (n for n in graphs[0].graph.nodes if str(n.target).startswith("vae_fast"))
    assert {-torch.inf, torch.inf} <= {a for a in call.args if isinstance(a, float)}


@pytest.mark.parametrize("shortcut", [True, False])
@pytest.mark.parametrize("inplace", [True, False])
def test_compiled_autograd_of_an_eager_graph(shortcut, inplace):
    """The backward pass alone compiled, of nodes that C++ or Python recorded."""
    vae = vae_fast.VAE.mlp(9, 3, hidden=(8,), inplace=inplace)
    x = torch.rand(5, 9)
    module = eager.shortcut()
    vae(x, KEY).loss.backward()
    expected = [p.grad for p in vae.parameters()]
    graphs = []
    for _ in range(3):
        vae.zero_grad()
        eager.use_shortcut(module if shortcut else None)
        try:
            loss = 2.0 * vae(x, KEY).loss
        finally:
            eager.use_shortcut(module)
        counter = CompileCounterWithBackend("aot_eager")
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend=counter)):
            loss.backward()
        graphs.append(unique_graphs())
        for p, g in zip(vae.parameters(), expected):
            torch.testing.assert_close(p.grad, 2.0 * g)
    assert graphs[0] > 0
    assert graphs[-1] == graphs[1]  # nothing recompiles for long


def test_compiled_autograd_tells_options_apart():
    """Graphs of one shape that differ in an option alone."""
    x = torch.rand(5, 9)

    def gradients(beta, compiler=None):
        m, s = torch.full((5, 9), 0.3, requires_grad=True), torch.zeros(5, 9, requires_grad=True)
        z, log_q, log_p = vae_fast.reparameterize(m, s, key=KEY)
        loss, _ = vae_fast.fused_elbo(x, z * 1.0, s * 1.0, log_q, log_p, beta)
        if compiler is None:
            loss.backward()
        else:
            with torch._dynamo.compiled_autograd._enable(compiler):
                loss.backward()
        return m.grad, s.grad

    compiler = torch.compile(backend="aot_eager")
    for beta in (1.0, 5.0, 1.0):
        for got, want in zip(gradients(beta, compiler), gradients(beta), strict=True):
            torch.testing.assert_close(got, want)


def test_refused_derivatives_are_refused_compiled_too():
    mu, s = leaves((4, 5), (4, 5))

    def second(mu):
        z = vae_fast.reparameterize(mu, s, key=KEY)[0].square().sum()
        return torch.func.grad(lambda m: vae_fast.reparameterize(m, s, key=KEY)[0].sum())(mu) * z

    with pytest.raises(NotImplementedError, match="double backward is not supported"):
        compiled(second)(mu).sum().backward()


# ---- export ----------------------------------------------------------------------------------


class Method(nn.Module):
    """One method of a model as a module's forward, which is what export takes."""

    def __init__(self, vae, name):
        super().__init__()
        self.vae, self.name = vae, name

    def forward(self, *args):
        result = getattr(self.vae, self.name)(*args)
        return result[:5] if self.name == "forward" else result  # the tensors


LOAD = """
import sys, torch, vae_fast
program = torch.export.load(sys.argv[1]).module()
mu, z = torch.load(sys.argv[2])
torch.testing.assert_close(program(mu), z, rtol=0.0, atol=0.0)
"""


class Density(torch.nn.Module):
    def forward(self, x):
        return vae_fast.gaussian_nll(x, x + 1, torch.zeros(()))


@pytest.mark.works_with("torch.export")
@pytest.mark.parametrize("compiler", [True, False])
def test_a_new_process_runs_an_exported_program(compiler, tmp_path, cpp):
    """Its ops are called before any function of the package, which loads the kernels."""
    x = torch.randn(5, 3)
    torch.export.save(torch.export.export(Density(), (x,)), tmp_path / "program.pt2")
    torch.save((x, Density()(x)), tmp_path / "tensors.pt")
    without = {"CXX": "no-such-compiler", "VAE_FAST_CACHE": str(tmp_path / "empty")}
    command = [sys.executable, "-W", "error::UserWarning", "-c", LOAD]
    done = subprocess.run(
        [*command, tmp_path / "program.pt2", tmp_path / "tensors.pt"],
        env=os.environ | ({} if compiler else without),
        capture_output=True,
        text=True,
    )
    assert done.returncode == (0 if compiler else 1), done.stderr
    reason = "RuntimeError: vae_fast::likelihood_forward needs the fused kernels: no C++ compiler"
    assert (reason in done.stderr) == (not compiler)


@pytest.mark.works_with("torch.export")
@pytest.mark.parametrize("model", ["mlp", "conv"])
@pytest.mark.parametrize("name", ["forward", "encode", "decode", "reconstruct", "interpolate"])
def test_export_with_any_batch_size(model, name, fused):
    make = vae_fast.VAE.mlp if model == "mlp" else vae_fast.VAE.conv
    vae = make((1, 6, 6), 3, (4,)).to(fused).eval()
    batch = torch.export.Dim("batch", min=2, max=64)

    def arguments(n):
        x = torch.rand(n, 1, 6, 6, device=fused)
        z = torch.rand(n, 3, device=fused)
        return {"forward": (x, KEY.to(fused)), "decode": (z,), "interpolate": (x, 1 - x)}.get(
            name, (x,)
        )

    args = arguments(5)
    dims = tuple({} if a.dtype == torch.uint64 else {0: batch} for a in args)
    program = torch.export.export(Method(vae, name), args, dynamic_shapes=(dims,))
    loaded = program.module()
    if name != "forward":  # before torch 2.12 no file could hold a key, uint64
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        loaded = torch.export.load(file).module()
    for n in (5, 3):
        args = arguments(n)
        expected = Method(vae, name)(*args)
        actual = loaded(*args)
        expected, actual = (
            [t for t in torch.utils._pytree.tree_leaves(o) if isinstance(t, torch.Tensor)]
            for o in (expected, actual)
        )
        assert len(expected) == len(actual)
        for a, b in zip(actual, expected):
            torch.testing.assert_close(a, b)


@pytest.mark.works_with("torch.export")
def test_exported_samples_are_the_models(key):
    vae = vae_fast.VAE.mlp(9, 3, hidden=(8,)).eval()

    class Sampler(nn.Module):
        def __init__(self):
            super().__init__()
            self.vae = vae

        def forward(self, key):
            return self.vae.sample(4, key=key)

    program = torch.export.export(Sampler(), (key,)).module()
    for k in (key, torch.tensor([5, 6], dtype=torch.uint64)):
        torch.testing.assert_close(program(k), vae.sample(4, key=k))


class Loss(nn.Module):
    """The loss of a model, which is a tensor as export wants it."""

    def __init__(self, vae):
        super().__init__()
        self.vae = vae

    def forward(self, x, key):
        return self.vae(x, key).loss


@pytest.mark.works_with("torch.export")
@pytest.mark.parametrize("strict", [False, True])
def test_export_refuses_to_leave_out_a_derivative(strict, key):
    """torch.export drops the backward pass of a torch.autograd.Function."""
    vae = vae_fast.VAE.mlp(9, 3, (8,), num_samples=2, objective="iwae", estimator="dreg")
    x = torch.rand(4, 9)
    with pytest.raises(Exception, match='estimator="dreg" cannot be exported'):
        torch.export.export(Loss(vae), (x, key), strict=strict)
    with torch.no_grad(), pytest.raises(Exception, match='estimator="dreg" cannot be exported'):
        torch.export.export(Loss(vae), (x, key), strict=strict)  # its program may have gradients
    loss = vae(x, key).loss
    vae.elbo.estimator = "standard"
    program = torch.export.export(Loss(vae), (x, key), strict=strict).module()
    torch.testing.assert_close(program(x, key), loss)
    got = torch.autograd.grad(program(x, key), list(program.parameters()))
    want = torch.autograd.grad(vae(x, key).loss, list(vae.parameters()))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.works_with("torch.export")
def test_export_with_a_batch_as_large_as_something_else(key):
    """Sizes of scales, priors and masks with fewer dimensions are no conditions on the batch."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.vae = vae_fast.VAE.conv((3, 8, 8), 4, (4,), variance="channel")
            self.elbo = vae_fast.FusedELBO(prior=(torch.zeros(4), torch.ones(4)), kl="analytic")

        def forward(self, x, key, mask):
            mu, scale = self.vae.encode(x)
            event = self.vae(x, key, mask=mask).loss
            return event, self.elbo(x, mu, scale, self.vae.decode, key=key).loss

    model, mask = Model().eval(), torch.rand(8, 8) > 0.5
    auto = torch.export.Dim.AUTO
    args = torch.rand(6, 3, 8, 8), key, mask
    dims = {0: auto}, None, None
    program = torch.export.export(model, args, dynamic_shapes=dims).module()
    for n in (3, 4, 8, 9):
        x = torch.rand(n, 3, 8, 8)
        for a, b in zip(program(x, key, mask), model(x, key, mask), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.works_with("torch.export")
@pytest.mark.parametrize("fused", ["cpp"], indirect=True)
def test_a_package_of_aotinductor_without_clamps(fused, tmp_path):
    """Its files are JSON, which has no infinity."""

    class Losses(nn.Module):
        def __init__(self):
            super().__init__()
            self.vae = vae_fast.VAE.mlp(9, 3, (8,), kl="analytic")
            self.vae.elbo.likelihood_clamp = (-9.0, float("inf"))

        def forward(self, x):
            out = self.vae(x)
            return out.loss, out.nll, out.z

    model, x = Losses(), torch.rand(6, 9)
    with torch.no_grad():
        batch = torch.export.Dim("batch", min=2, max=64)
        program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "model.pt2")
        )
        packaged = torch._inductor.aoti_load_package(path)
        for n in (6, 5):
            x = torch.rand(n, 9)
            torch.manual_seed(n)
            want = model(x)
            torch.manual_seed(n)
            for a, b in zip(packaged(x), want, strict=True):
                torch.testing.assert_close(a, b)
