"""CUDA graphs: a captured step draws fresh noise at each replay, as the generator's state says."""

import pytest
import torch
from torch import nn

import vae_fast

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.works_with("CUDA graphs"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def captured(fn, generator=None):
    """A graph of fn and its results, after the warm-up that capture asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            fn()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        results = fn()
    return graph, results


def inputs(*shape):
    return (torch.randn(shape, device="cuda") for _ in range(2))


def test_replays_draw_what_eager_calls_would():
    mu, s = inputs(64, 20)
    graph, (z, log_q, _) = captured(lambda: vae_fast.reparameterize(mu, s, num_samples=3))
    torch.cuda.manual_seed(11)
    replayed = []
    for _ in range(3):
        graph.replay()
        replayed.append((z.clone(), log_q.clone()))
    torch.cuda.manual_seed(11)
    for a, b in replayed:
        expected = vae_fast.reparameterize(mu, s, num_samples=3)
        assert torch.equal(a, expected[0])
        assert torch.equal(b, expected[1])
    assert not torch.equal(replayed[0][0], replayed[1][0])


def test_a_generators_state_brings_the_noise_back():
    mu, s = inputs(64, 20)
    generator = torch.Generator("cuda").manual_seed(3)
    graph, (z, *_) = captured(
        lambda: vae_fast.reparameterize(mu, s, generator=generator), generator
    )
    state = generator.get_state()
    graph.replay()
    first = z.clone()
    graph.replay()
    assert not torch.equal(z, first)
    generator.set_state(state)
    graph.replay()
    assert torch.equal(z, first)


def test_a_given_key_stays():
    mu, s = inputs(64, 20)
    key = torch.tensor([5, 6], dtype=torch.uint64, device="cuda")
    graph, (z, *_) = captured(lambda: vae_fast.reparameterize(mu, s, key=key))
    graph.replay()
    first = z.clone()
    graph.replay()
    assert torch.equal(z, first)
    key.copy_(torch.tensor([7, 8], dtype=torch.uint64))
    graph.replay()
    assert torch.equal(z, vae_fast.reparameterize(mu, s, key=key)[0])


@pytest.mark.parametrize("options", [{}, {"inplace": True}, {"num_samples": 2}], ids=str)
def test_a_captured_training_step_trains(options):
    """Forward, backward and Adam in one graph, against the same steps without it."""
    x, losses = torch.rand(64, 30, device="cuda"), {}
    for kind in ("eager", "graph"):
        torch.manual_seed(0)
        vae = vae_fast.VAE.mlp(30, 4, hidden=(32,), **options).cuda()
        optimizer = torch.optim.Adam(vae.parameters(), 1e-2, capturable=True)

        def step(vae=vae, optimizer=optimizer):
            optimizer.zero_grad(set_to_none=True)
            loss = vae(x).loss
            loss.backward()
            optimizer.step()
            return loss

        torch.cuda.manual_seed(1)
        if kind == "graph":
            graph, loss = captured(step)  # the warm-up takes three steps; capture takes none
            losses[kind] = []
            for _ in range(5):
                graph.replay()
                losses[kind].append(loss.item())
        else:
            losses[kind] = [step().item() for _ in range(8)][3:]
    assert losses["graph"] == pytest.approx(losses["eager"], rel=1e-4)
    assert losses["graph"][-1] < losses["graph"][0]


def test_graphed_callables():
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.vae = vae_fast.VAE.mlp(30, 4, hidden=(32,))

        def forward(self, x):
            return self.vae(x).loss

    model, x = Loss().cuda(), torch.rand(64, 30, device="cuda")
    graphed = torch.cuda.make_graphed_callables(model, (torch.rand_like(x),))
    torch.cuda.manual_seed(2)
    graphed(x).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.cuda.manual_seed(2)
    model.vae(x).loss.backward()
    for p, g in zip(model.parameters(), gradients):
        torch.testing.assert_close(p.grad, g, rtol=1e-4, atol=1e-6)


def test_reduce_overhead_uses_graphs():
    vae, x = vae_fast.VAE.mlp(30, 4, hidden=(32,)).cuda(), torch.rand(64, 30, device="cuda")
    run = torch.compile(vae, mode="reduce-overhead", fullgraph=True)
    drawn = []
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        vae.zero_grad()  # the gradients are the graph's own memory, which its next run overwrites
        out = run(x)
        out.loss.backward()
        drawn.append(out.z.clone())
    assert not torch.equal(drawn[-1], drawn[-2])


def test_nothing_waits_for_the_device():
    vae, x = vae_fast.VAE.mlp(30, 4, hidden=(32,)).cuda(), torch.rand(64, 30, device="cuda")
    vae(x).loss.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for options in ({}, {"inplace": True}, {"num_samples": 2}):
            for name, value in options.items():
                setattr(vae.elbo, name, value)
            vae(x).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
