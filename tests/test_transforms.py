"""torch.func: its transforms give what loops over plain calls give, or say that they cannot."""

import pytest
import torch
from test_compile import FUNCTIONS, leaves
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, stack_module_state, vmap

import vae_fast

pytestmark = pytest.mark.works_with("torch.func (grad, vmap, functional_call)")


def total(fn):
    """The sum of squares of everything that fn returns."""

    def scalar(*args):
        outputs = fn(*args)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return sum(o.float().square().sum() for o in outputs)

    return scalar


def every(n):
    return tuple(range(n))


@pytest.fixture(params=FUNCTIONS)
def function(request, backend):
    """A public function, its inputs, and two more of each of these."""
    fn, shapes = FUNCTIONS[request.param]
    inputs = [t.detach() for t in leaves(*shapes, device=backend)]
    batched = [torch.stack([t, 0.5 * t, t - 1.0]) for t in inputs]
    return fn, inputs, batched


def test_grad_is_autograds(function):
    fn, inputs, _ = function
    own = [t.clone().requires_grad_() for t in inputs]
    expected = torch.autograd.grad(total(fn)(*own), own)
    for a, b in zip(grad(total(fn), every(len(inputs)))(*inputs), expected):
        torch.testing.assert_close(a, b)


def test_vmap_and_grad_are_a_loop(function):
    fn, _, batched = function
    one_by_one = [[t[i] for t in batched] for i in range(3)]
    value = vmap(total(fn))(*batched)
    torch.testing.assert_close(value, torch.stack([total(fn)(*part) for part in one_by_one]))
    gradient = grad(total(fn), every(len(batched)))
    expected = [torch.stack(parts) for parts in zip(*(gradient(*part) for part in one_by_one))]
    for a, b in zip(vmap(gradient)(*batched), expected):
        torch.testing.assert_close(a, b)


def test_other_dimensions_and_nesting(key):
    mu, s = torch.randn(4, 2, 3, 5), torch.randn(4, 2, 5)

    def z(mu, s):
        return vae_fast.reparameterize(mu, s, key=key)[0]

    nested = vmap(vmap(z, (1, None), 2))(mu, s)
    for i in range(4):
        for j in range(3):
            torch.testing.assert_close(nested[i, :, :, j], z(mu[i, :, j], s[i]))


# ---- models ----------------------------------------------------------------------------------

OPTIONS = [
    {},
    {"num_samples": 2, "inplace": True},
    {"num_samples": 2, "objective": "iwae", "estimator": "dreg"},
    {"kl": "analytic", "free_bits": 0.1},
    {"likelihood": "student_t", "variance": "channel"},
    {"likelihood_scale": "optimal"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_an_ensemble_of_models(options, backend, key):
    vaes = [vae_fast.VAE.mlp(9, 3, hidden=(8,), **options).to(backend) for _ in range(3)]
    parameters, buffers = stack_module_state(vaes)
    x, key = torch.rand(5, 9, device=backend), key.to(backend)

    def loss(parameters, buffers):
        return functional_call(vaes[0], (parameters, buffers), (x, key)).loss

    gradients = vmap(grad(loss))(parameters, buffers)
    for i, vae in enumerate(vaes):
        vae(x, key).loss.backward()
        for name, p in vae.named_parameters():
            torch.testing.assert_close(gradients[name][i], p.grad)


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_gradients_of_each_sample(kind, backend, key):
    event = (9,) if kind == "mlp" else (2, 5, 3)
    vae = getattr(vae_fast.VAE, kind)(event, 3, (8,)).to(backend)
    x = torch.rand(4, *event, device=backend)
    parameters = dict(vae.named_parameters())
    keys = torch.tensor([[1, i] for i in range(4)], dtype=torch.uint64, device=backend)

    def loss(parameters, x, key):
        return functional_call(vae, parameters, (x[None], key)).loss

    gradients = vmap(grad(loss), (None, 0, 0))(parameters, x, keys)
    for i in range(4):
        vae.zero_grad()
        vae(x[i : i + 1], keys[i]).loss.backward()
        for name, p in parameters.items():
            torch.testing.assert_close(gradients[name][i], p.grad)


def test_noise_follows_vmaps_randomness():
    mu = torch.zeros(3, 4, 5)

    def z(mu):
        return vae_fast.reparameterize(mu, torch.zeros(4, 5))[0]

    own = vmap(z, randomness="different")(mu)
    assert not torch.equal(own[0], own[1])
    shared = vmap(z, randomness="same")(mu)
    assert torch.equal(shared[0], shared[1])
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(z)(mu)


def test_jacobians(key):
    s = torch.zeros(3, 4)

    def rows(mu):
        return vae_fast.reparameterize(mu, s, key=key)[2]

    mu = torch.randn(3, 4)
    expected = torch.autograd.functional.jacobian(rows, mu)
    torch.testing.assert_close(jacrev(rows)(mu), expected)
    vectorized = torch.autograd.functional.jacobian(rows, mu, vectorize=True)
    torch.testing.assert_close(vectorized, expected)


@pytest.mark.parametrize("upstream", ["loss", "nll"])
@pytest.mark.parametrize("scale", ["full", "scalar"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_batched_upstream_gradients_of_the_loss(upstream, scale, reduction, backend):
    """Of gradients that the forward pass wrote."""
    x, mean, s, q, p = leaves((3, 6), (6, 6), (6, 6), (2, 3), (2, 3), device=backend)
    s = s if scale == "full" else s[0, 0]
    loss, nll = vae_fast.fused_elbo(x.detach(), mean, s, q, p, 0.5, reduction)
    output = loss if upstream == "loss" else nll
    inputs = (mean, s) if upstream == "nll" else (mean, s, q, p)
    batch = torch.randn(4, *output.shape, device=backend)
    together = torch.autograd.grad(output, inputs, batch, is_grads_batched=True, retain_graph=True)
    apart = [torch.autograd.grad(output, inputs, g, retain_graph=True) for g in batch]
    for a, b in zip(together, zip(*apart)):
        torch.testing.assert_close(a, torch.stack(b))


@pytest.mark.parametrize("options", [{}, {"num_samples": 2}], ids=str)
def test_transforms_compile(options, key):
    vaes = [vae_fast.VAE.mlp(9, 3, hidden=(8,), **options) for _ in range(2)]
    parameters, buffers = stack_module_state(vaes)
    x = torch.rand(5, 9)

    def loss(parameters, buffers):
        return functional_call(vaes[0], (parameters, buffers), (x, key)).loss

    step = vmap(grad(loss))
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(parameters, buffers)
    for name, g in step(parameters, buffers).items():
        torch.testing.assert_close(compiled[name], g)


# ---- what is refused -------------------------------------------------------------------------

DIFFERENTIABLE = {name: case for name, case in FUNCTIONS.items() if name != "optimal_gaussian_nll"}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("how", ["grad of grad", "jvp", "hessian", "dual", "create_graph"])
def test_other_derivatives_are_refused_never_wrong(name, how, fused):
    fn, shapes = FUNCTIONS[name]
    inputs = [t.detach() for t in leaves(*shapes, device=fused)]
    scalar, position = total(fn), every(len(inputs))

    def gradient_norm(*args):
        return sum(g.square().sum() for g in grad(scalar, position)(*args))

    def penalty():
        own = [t.clone().requires_grad_() for t in inputs]
        gradients = torch.autograd.grad(scalar(*own), own, create_graph=True)
        sum(g.square().sum() for g in gradients).backward()

    def dual():
        with forward_ad.dual_level():
            fn(*(forward_ad.make_dual(t, torch.ones_like(t)) for t in inputs))

    attempts = {
        "grad of grad": lambda: grad(gradient_norm, position)(*inputs),
        "jvp": lambda: torch.func.jvp(scalar, tuple(inputs), tuple(map(torch.ones_like, inputs))),
        "hessian": lambda: torch.func.hessian(scalar, position)(*inputs),
        "dual": dual,
        "create_graph": penalty,
    }
    message = "no forward-mode" if how in ("jvp", "hessian", "dual") else "double backward"
    with pytest.raises(NotImplementedError, match=f"vae_fast.*{message}"):
        attempts[how]()


@pytest.mark.parametrize("how", ["grad of grad", "hessian"])
def test_the_reference_has_them(how, key):
    mu, s = torch.randn(3, 4), torch.randn(3, 4)

    def scalar(mu):
        return total(lambda mu: vae_fast.reparameterize(mu, s, key=key))(mu)

    with vae_fast.use_backend("reference"):
        if how == "hessian":
            hessian = torch.func.hessian(scalar)(mu).reshape(12, 12)
            expected = torch.autograd.functional.hessian(scalar, mu).reshape(12, 12)
            torch.testing.assert_close(hessian, expected)
            assert hessian.diagonal().abs().min() > 0
        else:
            second = grad(lambda m: grad(scalar)(m).square().sum())(mu)
            assert second.abs().min() > 0


def test_a_batch_of_nothing():
    t = torch.randn(0, 3, 2)
    assert vmap(lambda m: vae_fast.gaussian_kl(m, m))(t).shape == (0, 3)
    z, log_q, _ = vmap(lambda m: vae_fast.reparameterize(m, m), randomness="same")(t)
    assert (z.shape, log_q.shape) == ((0, 3, 2), (0, 3))
