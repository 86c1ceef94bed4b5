"""Activation checkpointing, saved-tensor hooks, and what is kept for the backward pass."""

import functools
import io

import pytest
import torch
from torch.autograd.graph import (
    allow_mutation_on_saved_tensors,
    disable_saved_tensors_hooks,
    save_on_cpu,
    saved_tensors_hooks,
)
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

import vae_fast
from vae_fast import backends, eager

checkpointing = pytest.mark.works_with("activation checkpointing")
hooks = pytest.mark.works_with("saved-tensor hooks and CPU offload")

SEED = 3


def mlp(**options):
    return vae_fast.VAE.mlp((12,), 5, hidden=(16,), **options)


def run(loss_of, leaves):
    """Loss, gradients, and a number drawn afterwards, which tells how the generators were left."""
    torch.manual_seed(SEED)
    loss = loss_of(leaves)
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [loss.detach(), *grads, torch.rand(3)]


def run_backward(loss_of, leaves):
    """The same by ``backward()``, as reentrant checkpointing needs."""
    torch.manual_seed(SEED)
    for leaf in leaves:
        leaf.grad = None
    loss = loss_of(leaves)
    loss.backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves), torch.rand(3)]


def assert_same_bits(got, want):
    assert len(got) == len(want)
    for g, w in zip(got, want):
        assert (g is None) == (w is None)
        assert g is None or torch.equal(g, w)


def region(name, device, **options):
    """(a function to be checkpointed, whose noise is drawn inside; its parameters)."""
    x = torch.rand(6, 12, device=device)
    if name in ("mlp", "conv"):
        if name == "conv":
            x = x.view(6, 3, 2, 2)
            vae = vae_fast.VAE.conv((3, 2, 2), 3, channels=(4,), **options)
        else:
            vae = mlp(**options)
        vae.to(device)
        return lambda: vae(x).loss, list(vae.parameters())
    encoder = torch.nn.Linear(12, 10).to(device)
    decoder = torch.nn.Linear(5, 24).to(device)
    parameters = [*encoder.parameters(), *decoder.parameters()]
    elbo = vae_fast.FusedELBO(**options)

    def reparameterize():
        z, log_q, log_p = vae_fast.reparameterize(*encoder(x).chunk(2, 1), num_samples=2)
        return decoder(z).square().mean() + (log_q - log_p).mean()

    def fused_elbo():
        z, log_q, log_p = vae_fast.reparameterize(*encoder(x).chunk(2, 1))
        mean, s = decoder(z).tensor_split(2, 1)
        return vae_fast.fused_elbo(x, mean, s, log_q, log_p, **options)[0].sum()

    def fused_elbo_module():
        return elbo(x, *encoder(x).chunk(2, 1), decoder).loss.sum()

    return locals()[name], parameters


REGIONS = [
    (name, inplace)
    for inplace in (False, True)
    for name in ("reparameterize", "fused_elbo", "fused_elbo_module", "mlp", "conv")
    if not (inplace and name == "reparameterize")
]  # which has no such option


# ---- activation checkpointing ------------------------------------------------------------------


@checkpointing
@pytest.mark.parametrize(("name", "inplace"), REGIONS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_same_bits_as_without(name, inplace, reentrant, backend):
    """The noise is replayed: losses, gradients and the generator are what they are without it."""
    inner, leaves = region(name, backend, inplace=inplace)
    switch = torch.zeros((), device=backend, requires_grad=True)  # a reentrant one needs an input
    calls = []

    def counted(switch):
        calls.append(1)
        return inner() + 0.0 * switch

    want = run_backward(lambda _: inner() + 0.0 * switch, leaves)
    got = run_backward(lambda _: checkpoint(counted, switch, use_reentrant=reentrant), leaves)
    assert len(calls) == 2
    assert_same_bits(got, want)


@checkpointing
@pytest.mark.parametrize("reentrant", [False, True])
def test_the_noise_is_what_the_generator_replays(reentrant):
    """Without the generator's state the second run draws other noise, and gradients differ."""
    inner, leaves = region("mlp", torch.device("cpu"))
    switch = torch.zeros((), requires_grad=True)
    want = run_backward(lambda _: inner(), leaves)
    got = run_backward(
        lambda _: checkpoint(
            lambda s: inner() + 0.0 * s, switch, use_reentrant=reentrant, preserve_rng_state=False
        ),
        leaves,
    )
    assert torch.equal(got[0], want[0])
    assert not any(torch.equal(g, w) for g, w in zip(got[1:-1], want[1:-1]))


OPTIONS = [
    dict(num_samples=3, objective="iwae", estimator="dreg"),
    dict(num_samples=2, estimator="stl"),
    dict(kl="analytic", free_bits=0.1),
    dict(likelihood_scale="optimal"),
    dict(likelihood_scale=0.5),
    dict(likelihood="student_t", likelihood_clamp_mode="soft"),
    dict(variance="scalar"),
    dict(reduction="none"),
    dict(reduction="none", inplace=True),
]


@checkpointing
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option(options):
    inner, leaves = region("mlp", torch.device("cpu"), **options)
    loss = lambda: inner().sum()  # noqa: E731
    want = run(lambda _: loss(), leaves)
    got = run(lambda _: checkpoint(loss, use_reentrant=False), leaves)
    assert_same_bits(got, want)


@checkpointing
def test_dequantization_is_replayed():
    vae = mlp(dequantize=True)
    x = torch.randint(256, (6, 12), dtype=torch.uint8)
    leaves = list(vae.parameters())
    want = run(lambda _: vae(x).loss, leaves)
    got = run(lambda _: checkpoint(lambda: vae(x).loss, use_reentrant=False), leaves)
    assert_same_bits(got, want)


@checkpointing
def test_the_module_itself_as_the_region():
    """``checkpoint(vae, x)`` returns what ``vae(x)`` does, rows and z with their gradients."""
    vae, x = mlp(), torch.rand(6, 12)
    leaves = list(vae.parameters())

    def total(out):
        return out.loss + out.kl.square().sum() + out.z.square().sum() + 0.1 * out.nll.sum()

    want = run(lambda _: total(vae(x)), leaves)
    got = run(lambda _: total(checkpoint(vae, x, use_reentrant=False)), leaves)
    assert_same_bits(got, want)


@checkpointing
@pytest.mark.parametrize("early_stop", [False, True])
def test_early_stop(early_stop):
    """The second run may end at the last tensor that is needed, here those of the likelihood."""
    vae, x, ran = mlp(), torch.rand(6, 12), []
    leaves = list(vae.parameters())

    def forward():
        ran.append("start")
        loss = vae(x).loss
        ran.append("end")
        return loss

    want = run(lambda _: forward(), leaves)
    ran.clear()
    with set_checkpoint_early_stop(early_stop):
        got = run(lambda _: checkpoint(forward, use_reentrant=False), leaves)
    assert_same_bits(got, want)
    assert ran == ["start", "end", "start"] + ["end"] * (not early_stop)


@checkpointing
def test_nested_and_sequential():
    vae, x = mlp(), torch.rand(6, 12)
    leaves = list(vae.parameters())
    want = run(lambda _: vae(x).loss, leaves)
    encoder, decoder = vae.encoder, vae.decoder

    def through(segments):
        inner = vae_fast.VAE(
            lambda t: checkpoint_sequential(encoder, segments, t, use_reentrant=False),
            lambda z: checkpoint(decoder, z, use_reentrant=False),
            5,
        )
        return checkpoint(lambda: inner(x).loss, use_reentrant=False)

    got = run(lambda _: checkpoint(lambda: through(2), use_reentrant=False), leaves)
    assert_same_bits(got, want)


@checkpointing
@pytest.mark.parametrize("around", ["nothing", "checkpoint"])
def test_a_checkpointed_decoder_refuses_inplace_where_it_must(around):
    """The decoder's output, which ``inplace`` overwrites, is made anew inside its own region."""
    x, mu = torch.rand(6, 12), torch.randn(6, 5, requires_grad=True)
    layer = torch.nn.Linear(5, 24)

    def decoder(z):
        if around == "nothing":
            return layer(z)
        return checkpoint(layer, z, use_reentrant=False)

    leaves = [mu, *layer.parameters()]
    elbo = vae_fast.FusedELBO(inplace=True)
    got = run(lambda _: elbo(x, mu, torch.zeros(6, 5), decoder).loss, leaves)
    elbo.inplace = False
    want = run(lambda _: elbo(x, mu, torch.zeros(6, 5), layer).loss, leaves)
    assert_same_bits(got, want)


@checkpointing
def test_walking_a_checkpointed_graph_twice():
    inner, leaves = region("mlp", torch.device("cpu"))
    torch.manual_seed(SEED)
    loss = checkpoint(inner, use_reentrant=False) * 3.0
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert_same_bits(torch.autograd.grad(loss, leaves, retain_graph=True), first)
    assert_same_bits(torch.autograd.grad(loss, leaves), first)


@checkpointing
def test_a_generator_of_ones_own_is_not_replayed():
    """As for ``torch.randn(generator=...)``: checkpoint keeps the state of default generators only.

    A key drawn outside the region is the remedy.
    """
    mu = torch.randn(6, 5, requires_grad=True)

    def ours(generator, key=None):
        z, _, _ = vae_fast.reparameterize(mu, torch.zeros(6, 5), generator=generator, key=key)
        return (torch.tanh(z) ** 2).sum()

    def built_in(generator):
        return (torch.tanh(mu + torch.randn(6, 5, generator=generator)) ** 2).sum()

    def gradient(f, **arguments):
        generator = torch.Generator().manual_seed(5)
        plain = torch.autograd.grad(f(generator), mu)[0]
        generator.manual_seed(5)
        loss = checkpoint(f, generator, use_reentrant=False)
        return torch.equal(torch.autograd.grad(loss, mu)[0], plain)

    assert not gradient(built_in)
    assert not gradient(ours)
    key = vae_fast.noise.make_key(generator=torch.Generator().manual_seed(5))
    assert gradient(lambda generator: ours(None, key))


# ---- selective checkpointing -------------------------------------------------------------------


def policy(saved, rest=CheckpointPolicy.PREFER_RECOMPUTE, how=CheckpointPolicy.MUST_SAVE):
    """Saves the outputs of ops whose name contains one of ``saved``."""

    def decide(ctx, op, *args, **kwargs):
        return how if any(name in str(op) for name in saved) else rest

    return functools.partial(create_selective_checkpoint_contexts, decide)


POLICIES = {
    "must save": policy([""]),
    "prefer save": policy([""], how=CheckpointPolicy.PREFER_SAVE),
    "must recompute": policy([], rest=CheckpointPolicy.MUST_RECOMPUTE),
    "prefer recompute": policy([]),
    "ours": policy(["vae_fast"]),
    "latent": policy(["vae_fast.latent"]),
    "likelihood": policy(["vae_fast.likelihood"]),
    "matmul": policy(["mm"]),
    "all but ours": policy(["aten"]),
}


@checkpointing
@pytest.mark.parametrize("which", POLICIES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("inplace", [False, True])
def test_selective_checkpointing(which, reduction, inplace):
    """Each policy gives the gradients of no checkpointing, whichever outputs it saves.

    Up to rounding: a dispatch mode may take the likelihood another way.
    """
    inner, leaves = region("mlp", torch.device("cpu"), inplace=inplace, reduction=reduction)
    loss = lambda: inner().sum() * 3.0  # noqa: E731
    want = run(lambda _: loss(), leaves)
    got = run(lambda _: checkpoint(loss, use_reentrant=False, context_fn=POLICIES[which]), leaves)
    for g, w in zip(got, want):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5 * w.abs().max().item())


@checkpointing
def test_a_saved_op_does_not_run_again():
    """What the policy saves is taken from memory; what it does not save runs twice."""
    inner, leaves = region("mlp", torch.device("cpu"))
    ran = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            ran.append(str(func))
            return func(*args, **(kwargs or {}))

    for which, count in (("latent", 1), ("must recompute", 2)):
        ran.clear()
        with Watch():
            run(lambda _, w=which: checkpoint(inner, use_reentrant=False, context_fn=POLICIES[w]),
                leaves)  # fmt: skip
        assert ran.count("vae_fast.latent_forward.default") == count


# ---- saved-tensor hooks ------------------------------------------------------------------------


def to_disk(folder):
    """Pack to a file, unpack from it."""
    count = iter(range(10**6))

    def pack(t):
        path = folder / f"{next(count)}.pt"
        torch.save(t, path)
        return path

    return pack, torch.load


def to_numpy(folder):
    def pack(t):
        return t.detach().numpy().copy(order="K")  # matmul rounds as the layout has it

    return pack, torch.from_numpy


def to_bytes(folder):
    def pack(t):
        buffer = io.BytesIO()
        torch.save(t, buffer)
        return buffer.getvalue()

    return pack, lambda data: torch.load(io.BytesIO(data))


def to_copy(folder):
    return torch.clone, lambda t: t


PACKERS = {"disk": to_disk, "numpy": to_numpy, "bytes": to_bytes, "copy": to_copy}
HOOKED = [
    dict(),
    dict(inplace=True),
    dict(reduction="none"),
    dict(num_samples=3, objective="iwae", estimator="dreg"),
    dict(kl="analytic"),
    dict(variance="scalar"),
    dict(likelihood="laplace"),
]


@hooks
@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("options", HOOKED, ids=str)
def test_hooks_that_store_elsewhere(packer, options, tmp_path):
    inner, leaves = region("mlp", torch.device("cpu"), **options)
    loss = lambda _: inner().sum() * 3.0  # noqa: E731
    want = run(loss, leaves)
    with saved_tensors_hooks(*PACKERS[packer](tmp_path)):
        got = run(loss, leaves)
    assert_same_bits(got, want)


@hooks
@pytest.mark.parametrize("options", HOOKED, ids=str)
def test_save_on_cpu(options, backend):
    inner, leaves = region("mlp", backend, **options)
    loss = lambda _: inner().sum() * 3.0  # noqa: E731
    want = run(loss, leaves)
    with save_on_cpu():
        got = run(loss, leaves)
    assert_same_bits(got, want)


@hooks
@pytest.mark.parametrize("inplace", [False, True])
def test_hooks_and_a_graph_walked_twice(inplace, fused):
    inner, leaves = region("mlp", fused, inplace=inplace)
    torch.manual_seed(SEED)
    want = torch.autograd.grad(inner() * 3.0, leaves)
    torch.manual_seed(SEED)
    packed = []

    def pack(t):  # keeps what it was given, as save_on_cpu does with what is there already
        packed.append((t, t.clone()))
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        loss = inner() * 3.0
    for _ in range(2):
        assert_same_bits(torch.autograd.grad(loss, leaves, retain_graph=True), want)
    assert all(torch.equal(kept, copy) for kept, copy in packed)
    assert_same_bits(torch.autograd.grad(loss, leaves), want)


@hooks
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_packing_to_a_lower_precision(low, inplace, backend):
    """Changes the gradients by its rounding, and nothing else; keys are no numbers to round."""
    inner, leaves = region("mlp", backend, inplace=inplace)
    want = run(lambda _: inner(), leaves)

    def pack(t):
        return (t.to(low), t.dtype) if t.is_floating_point() else (t, t.dtype)

    with saved_tensors_hooks(pack, lambda packed: packed[0].to(packed[1])):
        got = run(lambda _: inner(), leaves)
    assert torch.equal(got[0], want[0])
    for g, w in zip(got[1:-1], want[1:-1]):
        error = (g - w).norm() / w.norm()
        assert 0 < error < 8 * torch.finfo(low).eps


@hooks
@pytest.mark.parametrize("inplace", [False, True])
def test_saved_tensors_may_be_changed_where_autograd_allows_it(inplace):
    """``allow_mutation_on_saved_tensors`` clones what is written to, if it sees who writes."""
    x, mu = torch.rand(6, 12), torch.randn(6, 5, requires_grad=True)
    layer = torch.nn.Linear(5, 24)

    def packed(z):
        return layer(z)

    def needs_its_output(z):  # in its backward pass
        mean, s = layer(z).chunk(2, 1)
        return torch.tanh(mean), torch.exp(s)

    leaves = [mu, *layer.parameters()]
    for decoder in (packed, needs_its_output):

        def loss(inplace, decoder=decoder):
            elbo = vae_fast.FusedELBO(inplace=inplace)
            return elbo(x, mu, torch.zeros(6, 5), decoder).loss

        want = run(lambda _, f=loss: f(False), leaves)
        with allow_mutation_on_saved_tensors():
            got = run(lambda _, f=loss: f(inplace), leaves)
        assert_same_bits(got, want)


@pytest.mark.works_with("autograd (retain_graph, accumulation, hooks, anomaly mode)")
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_hooks_on_a_view_that_is_overwritten(inplace, packed, fused):
    """A view whose version changed has a new grad_fn; the hooks are on the old one."""
    x, z = torch.rand(4, 6, device=fused), torch.ones(4, 12, device=fused, requires_grad=True)
    view, seen = (z * 0.5).view(4, 12), []
    parts = (view, None) if packed else view.tensor_split(2, 1)
    for part in parts[: 1 if packed else 2]:
        part.register_hook(lambda g: seen.append(g.shape) or 2.0 * g)
    loss, _ = vae_fast.fused_elbo(x, *parts, torch.zeros(4, device=fused), inplace=inplace)
    (grad,) = torch.autograd.grad(loss, z)
    assert seen == [(4, 12)] if packed else [(4, 6)] * 2
    loss, _ = vae_fast.fused_elbo(x, z * 0.5, None, torch.zeros(4, device=fused))
    torch.testing.assert_close(grad, 2.0 * torch.autograd.grad(loss, z)[0])


@hooks
def test_forbidden_hooks():
    """Where hooks are forbidden nothing here needs one."""
    inner, leaves = region("mlp", torch.device("cpu"))
    want = run(lambda _: inner(), leaves)
    with disable_saved_tensors_hooks("not here"):
        assert_same_bits(run(lambda _: inner(), leaves), want)


@hooks
def test_hooks_inside_a_checkpoint(tmp_path):
    inner, leaves = region("mlp", torch.device("cpu"))
    want = run(lambda _: inner(), leaves)
    with saved_tensors_hooks(*to_disk(tmp_path)):
        got = run(lambda _: checkpoint(inner, use_reentrant=False), leaves)
    assert_same_bits(got, want)


# ---- what is kept, and what is allocated -------------------------------------------------------


class Kept:
    """The tensors saved for the backward pass, each storage once, as (data_ptr, bytes)."""

    def __enter__(self):
        self.tensors = []
        self.hooks = saved_tensors_hooks(self.pack, lambda t: t)
        self.hooks.__enter__()
        return self

    def pack(self, t):
        self.tensors.append(t)
        return t

    def __exit__(self, *error):
        return self.hooks.__exit__(*error)

    @property
    def storages(self):
        return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.tensors}

    @property
    def nbytes(self):
        return sum(self.storages.values())


def storage(*tensors):
    return {t.untyped_storage().data_ptr() for t in tensors}


@hooks
@pytest.mark.parametrize("samples", [None, 1, 4])
def test_the_latent_keeps_its_inputs_and_the_key(samples, fused, key):
    key = key.to(fused)
    mu, s = (torch.randn(8, 33, device=fused, requires_grad=True) for _ in range(2))
    with Kept() as kept:
        vae_fast.reparameterize(mu, s, key=key, num_samples=samples)
    assert set(kept.storages) == storage(mu, s, key)
    with Kept() as kept:
        vae_fast.reparameterize(mu, s, num_samples=samples)
    assert kept.nbytes == 2 * mu.nbytes + 16


@hooks
@pytest.mark.parametrize("layout", ["pair", "packed", "scalar", "row", "event", "without"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("inplace", [False, True])
def test_the_likelihood_keeps_two_gradients_or_its_inputs(layout, reduction, inplace, fused):
    x, log_q = torch.rand(8, 40, device=fused), torch.zeros(8, device=fused)
    size = {"packed": (8, 80)}.get(layout, (8, 40))
    mean = torch.randn(size, device=fused, requires_grad=True) * 1
    shapes = {"pair": (8, 40), "scalar": (), "row": (8, 1), "event": (40,)}
    s = (
        torch.zeros(shapes[layout], device=fused, requires_grad=True) * 1
        if layout in shapes
        else None
    )
    options = dict(likelihood="bernoulli") if layout == "without" else {}
    with Kept() as kept:
        vae_fast.fused_elbo(x, mean, s, log_q, reduction=reduction, inplace=inplace, **options)
    full = [mean] + [s] * (layout == "pair")
    outputs = sum(t.nbytes for t in full)
    # A value a row, and whatever is smaller, is not counted.
    large = {p: n for p, n in kept.storages.items() if n >= x.nbytes}
    written = inplace or reduction != "none"
    in_cpp = backends.backend_for(fused.type) == "cpp" and eager.shortcut() is not None
    if layout == "event" and in_cpp and reduction != "none":
        # The gradient of one loss; for any other, what it is of.
        assert set(large) > storage(x, mean)
        assert sum(large.values()) == x.nbytes + 2 * mean.nbytes
        return
    if not written or layout == "event" or (layout == "row" and not in_cpp):
        assert set(large) == storage(x, *full)
        return
    assert sum(large.values()) == outputs
    if inplace:
        assert set(large) == storage(*full)
    else:
        assert not set(large) & storage(x, *full)


@hooks
def test_a_step_keeps_less_than_autograd_does(fused):
    """Of all the intermediate results of the formulas nothing of the data's size is kept."""
    vae, x = mlp().to(fused), torch.rand(64, 12, device=fused)
    kept = {}
    for backend in ("reference", None):
        with Kept() as saved:
            if backend is None:
                vae(x)
            else:
                with vae_fast.use_backend(backend):
                    vae(x)
        kept[backend] = saved.nbytes
    assert kept[None] < 0.6 * kept["reference"]


class Decoder(torch.autograd.Function):
    """Two outputs of the data's size, and a backward pass that allocates nothing of that size."""

    @staticmethod
    def forward(ctx, z, x):
        ctx.shape = z.shape
        return x * 0.9, torch.zeros_like(x)

    @staticmethod
    def backward(ctx, g_mean, g_scale):
        Decoder.gradients = g_mean.data_ptr(), g_scale.data_ptr()
        return (g_mean.sum() + g_scale.sum()).expand(ctx.shape), None


def allocations(step):
    """Bytes of each allocation that ``step`` makes."""
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    return [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]


@hooks
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("watched", [False, True])
def test_inplace_allocates_nothing_of_the_datas_size(inplace, reduction, watched):
    """Forward and backward, seen by the profiler; and by addresses, which it does not change."""
    x = torch.rand(64, 512)
    z = torch.randn(64, 4, requires_grad=True)
    mean, s = Decoder.apply(z, x)
    addresses = mean.data_ptr(), s.data_ptr()
    elbo_options = dict(reduction=reduction, inplace=inplace)
    vae_fast.buffers.clear()

    def step():
        # A factor on the loss, so that the backward pass has something to do.
        loss, _ = vae_fast.fused_elbo(x, mean, s, torch.zeros(64), **elbo_options)
        (loss.sum() * 3.0).backward()

    made = allocations(step) if watched else step()
    if watched:
        large = sum(n for n in made if n >= x.nbytes)
        assert large == (0 if inplace else 2 * x.nbytes)
    assert (Decoder.gradients == addresses) == inplace
