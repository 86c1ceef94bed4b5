"""The ordinary life of a graph: walked twice, accumulated, hooked, watched, frozen in parts."""

import pytest
import torch
from test_compile import FUNCTIONS, KEY, leaves
from torch.utils._python_dispatch import TorchDispatchMode

import vae_fast
from vae_fast import eager
from vae_fast.backends import backend_for

pytestmark = pytest.mark.works_with("autograd (retain_graph, accumulation, hooks, anomaly mode)")


def scalar(outputs):
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return sum(o.float().square().sum() for o in outputs if o.requires_grad)


@pytest.fixture(params=[True, False], ids=["C++", "Python"])
def shortcut(request):
    """Eager CPU calls with the autograd of eager.cpp, and without it."""
    vae_fast.backends.backend_for("cpu")
    module = eager.shortcut()
    eager.use_shortcut(module if request.param else None)
    yield
    eager.use_shortcut(module)


def networks(size=9, latent=3, **options):
    torch.manual_seed(1)
    return vae_fast.VAE.mlp(size, latent, hidden=(8,), **options)


def test_what_the_gradient_of_z_is(backend):
    """The decoder's; with a prior that is given, log p(z)'s as well. docs/training.md."""
    x, mu, s = (torch.rand(3, n, device=backend) for n in (4, 2, 2))
    mu.requires_grad_()
    decoder = torch.nn.Linear(2, 8).to(backend)
    zeros = torch.zeros(2, device=backend)

    def of_z(elbo):
        out = elbo(x, mu, s, decoder, key=KEY.to(backend))
        return out.z.detach(), torch.autograd.grad(out.loss, out.z)[0]

    leaf = of_z(vae_fast.FusedELBO())[0].requires_grad_()
    nll = vae_fast.gaussian_nll(x, decoder(leaf), None).mean()
    (decoders,) = torch.autograd.grad(nll, leaf)
    for elbo, of_prior in (
        (vae_fast.FusedELBO(), backend_for(torch.device(backend).type) == "reference"),
        (vae_fast.FusedELBO(prior=(zeros, zeros)), True),
    ):
        z, got = of_z(elbo)
        torch.testing.assert_close(got, decoders + z / 3 if of_prior else decoders)


# ---- a graph walked more than once -----------------------------------------------------------


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_retained_graph_gives_the_same_again(name, backend):
    fn, shapes = FUNCTIONS[name]
    inputs = leaves(*shapes, device=backend)
    loss = scalar(fn(*inputs))
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    kept = [g.clone() for g in first]
    for _ in range(2):
        for a, b in zip(torch.autograd.grad(loss, inputs, retain_graph=True), kept):
            assert torch.equal(a, b)
    for a, b in zip(first, kept):
        assert torch.equal(a, b)  # what was handed out stays as it was
    torch.autograd.grad(loss, inputs)
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_gradients_accumulate(shortcut, inplace, factor):
    vae, x = networks(inplace=inplace), torch.rand(5, 9)
    loss = factor * vae(x, KEY).loss
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in vae.parameters()]
    loss.backward()
    for p, g in zip(vae.parameters(), once):
        torch.testing.assert_close(p.grad, 2 * g, rtol=1e-6, atol=0)


def test_micro_batches_add_up_to_the_batch(backend):
    """With one key and each part's first row."""
    vae, x = networks(reduction="sum").to(backend), torch.rand(7, 9, device=backend)
    key = KEY.to(backend)
    vae(x, key).loss.backward()
    whole = [p.grad for p in vae.parameters()]
    vae.zero_grad()
    z = []
    for start, stop in ((0, 3), (3, 4), (4, 7)):
        out = vae(x[start:stop], key, first_row=start)
        out.loss.backward()
        z.append(out.z)
    for p, g in zip(vae.parameters(), whole):
        torch.testing.assert_close(p.grad, g, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.cat(z), vae(x, key).z, rtol=1e-6, atol=1e-6)


# ---- hooks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [False, True])
def test_hooks_see_and_change_gradients(shortcut, inplace):
    encoder, decoder = torch.nn.Linear(9, 6), torch.nn.Linear(3, 18)
    elbo = vae_fast.FusedELBO(inplace=inplace)
    x = torch.rand(5, 9)
    seen = {}

    def record(name, factor=None):
        def hook(g):
            seen[name] = g.clone()
            return None if factor is None else factor * g

        return hook

    def step(factor):
        mu, s = encoder(x).chunk(2, 1)
        out = elbo(x, mu, s, lambda z: note(decoder(z)), key=KEY)
        for name, t in (("mu", mu), ("loss", out.loss), ("z", out.z)):
            t.register_hook(record(name, factor if name == "loss" else None))
        return torch.autograd.grad(out.loss, [*encoder.parameters(), *decoder.parameters()])

    def note(output):
        output.register_hook(record("output"))
        return output

    plain = step(None)
    before = dict(seen)
    assert {"mu", "loss", "z", "output"} <= set(seen)
    assert before["loss"] == 1.0
    for a, b in zip(step(2.0), plain):
        torch.testing.assert_close(a, 2 * b)
    torch.testing.assert_close(seen["output"], 2 * before["output"])


def test_module_and_accumulation_hooks(shortcut):
    vae, x = networks(), torch.rand(5, 9)
    called = []
    vae.elbo.register_forward_hook(lambda *_: called.append("forward"))
    vae.encoder.register_full_backward_hook(lambda *_: called.append("encoder"))
    for p in vae.parameters():
        p.register_post_accumulate_grad_hook(lambda p: called.append("accumulated"))
    vae(x, KEY).loss.backward()
    assert called[0] == "forward"
    assert called.count("encoder") == 1
    assert called.count("accumulated") == len(list(vae.parameters()))


# ---- modes -----------------------------------------------------------------------------------


def test_anomaly_mode_names_the_pass(shortcut):
    vae, x = networks(), torch.rand(5, 9)
    with torch.autograd.set_detect_anomaly(True):
        vae(x, KEY).loss.backward()
        expected = [p.grad.clone() for p in vae.parameters()]
        mu = torch.zeros(2, 3, requires_grad=True)
        z, _, _ = vae_fast.reparameterize(mu, mu, key=KEY)
        with (
            pytest.warns(UserWarning, match="Traceback of forward call"),
            pytest.raises(RuntimeError, match=r"Latent.*returned nan values"),
        ):
            z.backward(torch.full_like(z, torch.nan))
    vae.zero_grad()
    vae(x, KEY).loss.backward()
    for p, g in zip(vae.parameters(), expected):
        assert torch.equal(p.grad, g)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_inference_mode(name, backend):
    fn, shapes = FUNCTIONS[name]
    inputs = leaves(*shapes, device=backend)
    expected = fn(*inputs)
    with torch.inference_mode():
        outputs = fn(*inputs)
        again = fn(*(t.clone() for t in inputs))
    expected, outputs, again = (
        o if isinstance(o, tuple) else (o,) for o in (expected, outputs, again)
    )
    for e, a, b in zip(expected, outputs, again):
        assert torch.equal(e, a)
        assert torch.equal(e, b)
        assert a.is_inference()
        assert not a.requires_grad


# ---- only what is required -------------------------------------------------------------------


class Calls(TorchDispatchMode):
    """The calls of the package's ops, with the sizes of their results."""

    def __init__(self):
        super().__init__()
        self.results = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        if func.namespace == "vae_fast":
            tensors = result if isinstance(result, (tuple, list)) else (result,)
            self.results[func._opname] = [t.numel() for t in tensors]
        return result


def test_a_frozen_encoder_costs_nothing(fused):
    vae, x = networks().to(fused), torch.rand(5, 9, device=fused)
    vae.encoder.requires_grad_(False)
    with Calls() as calls:
        vae(x, KEY.to(fused)).loss.backward()
    assert "latent_forward" in calls.results
    assert "latent_backward" not in calls.results
    assert all(p.grad is not None for p in vae.decoder.parameters())


def test_a_frozen_decoder_still_hands_gradients_on(fused):
    vae, x, key = networks().to(fused), torch.rand(5, 9, device=fused), KEY.to(fused)
    vae(x, key).loss.backward()
    expected = [p.grad for p in vae.encoder.parameters()]
    vae.zero_grad()
    vae.decoder.requires_grad_(False)
    vae(x, key).loss.backward()
    for p, g in zip(vae.encoder.parameters(), expected):
        torch.testing.assert_close(p.grad, g)
    assert all(p.grad is None for p in vae.decoder.parameters())


SHAPES = {"full": (6, 7), "event": (1, 7), "row": (6, 1), "scalar": ()}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (0, 0, 0)], ids=str
)
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_only_where_they_are_required(reduction, shape, wanted, masked, fused):
    """Of x, mean and scale: the same bits as if all were required, and nothing more is written."""
    tensors = leaves((3, 7), (6, 7), SHAPES[shape], device=fused)
    rows = leaves((2, 3), (2, 3), device=fused)
    mask = (torch.arange(21, device=fused).reshape(3, 7) % 3 > 0) if masked else None

    def gradients(wanted):
        own = [t.detach().clone().requires_grad_(bool(w)) for t, w in zip(tensors, wanted)]
        with Calls() as calls:
            loss, _ = vae_fast.fused_elbo(*own, *rows, 0.5, reduction, mask=mask)
            inputs = [t for t in (*own, *rows) if t.requires_grad]
            found = torch.autograd.grad(loss.sum(), inputs)
        return dict(zip(map(id, inputs), found)), own, calls.results

    everything, all_own, _ = gradients((1, 1, 1))
    some, own, results = gradients(wanted)
    for a, b in zip(all_own, own):
        if b.requires_grad:
            torch.testing.assert_close(some[id(b)], everything[id(a)], rtol=1e-6, atol=1e-7)
    for r in rows:
        torch.testing.assert_close(some[id(r)], everything[id(r)])
    if "likelihood_backward" in results:
        sizes = [t.numel() if w else 0 for t, w in zip(tensors, wanted)]
        assert results["likelihood_backward"][:3] == sizes
    else:
        assert wanted[0] == 0
        assert wanted[1] == 1


def test_a_constant_scale_has_no_gradient_to_keep(shortcut):
    """Of the two gradients that the forward pass may write, only one."""
    x, mean, s, q, p = leaves((16, 512), (16, 512), (16, 512), (16,), (16,))
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss, _ = vae_fast.fused_elbo(x.detach(), mean, s.detach(), q, p)
    assert sum(saved.values()) == x.nbytes
    expected, _ = vae_fast.fused_elbo(x.detach(), mean, s, q, p)
    for a, b in zip(torch.autograd.grad(loss, mean), torch.autograd.grad(expected, mean)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("negated", ["x", "mean", "scale"])
def test_inplace_has_no_effect_on_what_is_lazily_negated(negated, shortcut):
    """Such memory holds the negatives: x*, say, of a Fourier transform."""
    x, log_q = torch.randn(3, 5), torch.zeros(3)
    leaves = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    want = torch.autograd.grad(vae_fast.fused_elbo(x, *leaves, log_q)[0], leaves)
    tensors = dict(x=x, mean=leaves[0] * 1, scale=leaves[1] * 1)
    t = tensors[negated]
    tensors[negated] = torch.complex(torch.zeros_like(t), -t).conj().imag
    assert tensors[negated].is_neg()
    loss = vae_fast.fused_elbo(**tensors, log_q=log_q, inplace=True)[0]
    for got, exact in zip(torch.autograd.grad(loss, leaves), want, strict=True):
        torch.testing.assert_close(got, exact)


def test_inplace_leaves_a_constant_scale_alone(shortcut):
    x, mean, s, q, p = leaves((4, 6), (4, 6), (4, 6), (4,), (4,))
    constant, before = s.detach(), s.detach().clone()
    output = mean * 1.0
    loss, _ = vae_fast.fused_elbo(x.detach(), output, constant, q, p, inplace=True)
    loss.backward()
    expected, _ = vae_fast.fused_elbo(x.detach(), mean, before, q, p)
    torch.testing.assert_close(mean.grad, torch.autograd.grad(expected, mean)[0])
    assert torch.equal(constant, before)
    assert constant._version == 0


def test_only_a_scale_that_learns(shortcut):
    """The mean is given; in place there is nothing to overwrite then."""
    x, mean, s, q, p = (t.detach() for t in leaves((4, 6), (4, 6), (), (4,), (4,)))
    s.requires_grad_()
    found = []
    for inplace in (False, True):
        loss, _ = vae_fast.fused_elbo(x, mean, s, q, p, inplace=inplace)
        found.append(torch.autograd.grad(loss, s)[0])
    with vae_fast.use_backend("reference"):
        loss, _ = vae_fast.fused_elbo(x, mean, s, q, p)
        expected = torch.autograd.grad(loss, s)[0]
    for g in found:
        torch.testing.assert_close(g, expected)


# ---- who watches -----------------------------------------------------------------------------


def test_tensors_of_another_class_are_not_written_to():
    """Nor is what they allocate handed to the next call: they may have no memory."""
    from torch.testing._internal.two_tensor import TwoTensor

    x, mean, q = torch.rand(64, 8192), *leaves((64, 8192), (64,))
    expected = torch.autograd.grad(vae_fast.fused_elbo(x, mean, mean, q)[0], mean)[0]
    for inplace in (False, True):
        two = TwoTensor(mean.detach(), mean.detach()).requires_grad_()
        output = two * 1.0
        loss, _ = vae_fast.fused_elbo(x, output, output, q, inplace=inplace)
        loss.backward()
        torch.testing.assert_close(two.grad.a, expected)
        torch.testing.assert_close(two.grad.b, expected)
        again = torch.autograd.grad(vae_fast.fused_elbo(x, mean, mean, q)[0], mean)[0]
        assert torch.equal(again, expected)


@pytest.mark.parametrize("inplace", [False, True])
def test_fake_tensors(inplace):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        vae = networks(inplace=inplace)
        out = vae(torch.rand(5, 9), torch.empty(2, dtype=torch.uint64))
        out.loss.backward()
        assert out.z.shape == (5, 3)
        assert all(p.grad.shape == p.shape for p in vae.parameters())


@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_a_traced_graph_holds_the_passes(pre_dispatch):
    from torch.fx.experimental.proxy_tensor import make_fx

    def gradients(x, mu, s, mean):
        z, log_q, log_p = vae_fast.reparameterize(mu, s, key=KEY)
        loss, _ = vae_fast.fused_elbo(x, mean * z.sum(), None, log_q, log_p)
        return torch.autograd.grad(loss, (mu, s, mean))

    inputs = leaves((5, 9), (5, 3), (5, 3), (5, 18))
    inputs[0] = inputs[0].detach()
    graph = make_fx(gradients, tracing_mode="real", pre_dispatch=pre_dispatch)(*inputs)
    passes = {str(node.target) for node in graph.graph.nodes}
    assert "vae_fast.latent_forward.default" in passes
    assert "vae_fast.likelihood_forward_grad.default" in passes  # which writes to no argument
    others = [inputs[0], *((0.5 * t).detach().requires_grad_() for t in inputs[1:])]
    for a, b in zip(graph(*others), gradients(*others)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("half", [0, 1])
def test_a_half_that_was_cut_off_gets_no_gradient(half, backend):
    """A view made under no_grad lies beside the other half, and yet has no part in the graph."""
    (output,) = leaves((4, 6), device=backend)
    h = output * 1.0
    halves = [h[:, :3], h[:, 3:]]
    with torch.no_grad():
        halves[half] = h[:, 3:] if half else h[:, :3]
    zeros = torch.zeros(4, 2, device=backend)
    x = torch.rand(4, 3, device=backend)
    out = vae_fast.FusedELBO()(x, zeros, zeros, lambda z: tuple(halves))
    (g,) = torch.autograd.grad(out.loss, output)
    kept, cut = g.chunk(2, 1) if half else reversed(g.chunk(2, 1))
    assert cut.abs().max() == 0
    assert kept.abs().min() > 0


class Reversed(torch.autograd.Function):
    """A gradient reversal layer: views, with another derivative than a view's."""

    @staticmethod
    def forward(ctx, *halves):
        return tuple(h.view_as(h) for h in halves)

    @staticmethod
    def backward(ctx, *gradients):
        return tuple(-g for g in gradients)


SPLITS = {
    "chunk": lambda h: h.chunk(2, 1),
    "split": lambda h: h.split(3, 1),
    "split with sizes": lambda h: h.split([3, 3], 1),
    "tensor_split": lambda h: h.tensor_split(2, 1),
    "narrow": lambda h: (h.narrow(1, 0, 3), h.narrow(1, 3, 3)),
    "slices": lambda h: (h[:, :3], h[:, 3:]),
}


def gradient_through(split, seen=lambda *halves: halves):
    """Of the output of a decoder that splits it, and what has happened to the halves since."""
    torch.manual_seed(0)
    (output,) = leaves((4, 6))
    x, zeros = torch.rand(4, 3), torch.zeros(4, 2)
    nodes = []
    h = output * 1.0
    out = vae_fast.FusedELBO()(x, zeros, zeros, lambda z: seen(*split(h)))
    todo = [out.loss.grad_fn]
    while todo:
        node = todo.pop()
        nodes.append(node.name())
        todo += [n for n, _ in node.next_functions if n is not None]
    return torch.autograd.grad(out.loss, output)[0], nodes


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_halves_are_read_as_the_tensor_that_was_split(split):
    plain, nodes = gradient_through(split, lambda *halves: [h.clone() for h in halves])
    assert any(name.startswith(("Split", "Slice")) for name in nodes)
    packed, nodes = gradient_through(split)
    assert not any(name.startswith(("Split", "Slice")) for name in nodes)
    assert torch.equal(packed, plain)


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_what_lies_between_the_halves_and_the_tensor_has_its_say(split, shortcut):
    plain, _ = gradient_through(split)
    reversed_, _ = gradient_through(split, Reversed.apply)
    assert torch.equal(reversed_, -plain)
    one, _ = gradient_through(split, lambda mean, scale: (Reversed.apply(mean)[0], scale))
    assert torch.equal(one, torch.cat((-plain[:, :3], plain[:, 3:]), 1))


def test_hooks_of_a_decoder_that_splits_its_output(backend):
    class Decoder(torch.nn.Linear):
        def forward(self, z):
            return super().forward(z).chunk(2, 1)

    decoder, calls = Decoder(2, 6).to(backend), []
    decoder.register_full_backward_hook(lambda *args: calls.append("after"))
    decoder.register_full_backward_pre_hook(lambda *args: calls.append("before"))
    (mu,) = leaves((4, 2), device=backend)
    x = torch.rand(4, 3, device=backend)
    vae_fast.FusedELBO()(x, mu, mu, decoder).loss.backward()
    assert calls == ["before", "after"]


def test_leaves_that_are_halves_of_a_plain_tensor(backend):
    mean, scale = (h.requires_grad_() for h in torch.randn(4, 6, device=backend).chunk(2, 1))
    zeros = torch.zeros(4, 2, device=backend)
    x = torch.rand(4, 3, device=backend)
    vae_fast.FusedELBO()(x, zeros, zeros, lambda z: (mean, scale)).loss.backward()
    assert mean.grad.abs().min() > 0
    assert scale.grad is not None


def test_inplace_refuses_the_memory_of_the_latent_terms(shortcut):
    x, (w,) = torch.rand(4, 6), leaves((4, 6))
    h = w * 1.0
    with pytest.raises(ValueError, match="would overwrite log_q"):
        vae_fast.fused_elbo(x, h, x, h[:, 0], inplace=True)


class Nothing(torch.autograd.Function):
    """Has no gradient for what it was made of."""

    @staticmethod
    def forward(ctx, t):
        return t.clone()

    @staticmethod
    def backward(ctx, g):
        return None


def test_a_second_derivative_that_nobody_asks_for():
    """Recorded, walked over, and given no gradient: nothing to refuse."""
    (mu,) = leaves((3, 4))
    options = 0, 0, -torch.inf, torch.inf, False
    kl = vae_fast.ops.gaussian_kl_forward(mu, mu, None, None, *options).sum()
    (g,) = torch.autograd.grad(kl, mu, create_graph=True)
    (Nothing.apply(g).sum() + mu.sum()).backward()
    assert torch.equal(mu.grad, torch.ones_like(mu))
