"""Reused output memory: handed out again only when nobody can see it any more."""

import threading

import pytest
import torch

import vae_fast
from vae_fast import buffers


@pytest.fixture(autouse=True)
def _empty():
    buffers.clear()
    yield
    buffers.clear()


def like(n=buffers.SMALLEST):
    return torch.empty(n)


def test_memory_is_reused_once_it_is_free():
    t = like()
    first = buffers.empty_like(t)
    address = first.data_ptr()
    del first
    assert buffers.empty_like(t).data_ptr() == address


@pytest.mark.parametrize(
    "hold",
    [
        lambda t: t,
        lambda t: t[5:],
        lambda t: t.detach(),
        lambda t: t.numpy(),
        lambda t: t.untyped_storage(),
        lambda t: torch.nn.Parameter(t),
        lambda t: memoryview(t.numpy()),
    ],
)
def test_memory_that_somebody_holds_is_not_reused(hold):
    t = like()
    first = buffers.empty_like(t)
    address, held = first.data_ptr(), hold(first)
    del first
    assert buffers.empty_like(t).data_ptr() != address
    del held


def test_memory_that_somebody_gave_back_is_not_handed_out():
    t = like()
    first = buffers.empty_like(t)
    first.untyped_storage().resize_(0)
    del first
    second = buffers.empty_like(t)
    assert second.untyped_storage().nbytes() == second.nbytes


def test_memory_that_another_process_may_see_is_not_reused():
    t = like()
    buffers.empty_like(t).share_memory_()
    assert not buffers.empty_like(t).is_shared()


def test_memory_of_inference_mode_is_not_kept():
    """A later step could not differentiate it."""
    t = like()
    with torch.inference_mode():
        buffers.empty_like(t)
    assert not buffers.empty_like(t).is_inference()


def test_gradients_of_two_steps_do_not_share_memory():
    x, log = torch.randn(64, 1024), torch.zeros(64)
    steps = []
    for i in range(4):
        mean, s = (torch.full((64, 1024), 0.1 * i, requires_grad=True) for _ in range(2))
        loss, _ = vae_fast.fused_elbo(x, mean, s, log, log)
        loss.backward()
        steps.append((mean, s, mean.grad.clone(), s.grad.clone()))
    for mean, s, g_mean, g_s in steps:
        assert torch.equal(mean.grad, g_mean)
        assert torch.equal(s.grad, g_s)


def test_what_is_kept_is_bounded():
    for n in range(20):
        buffers.empty_like(like(buffers.SMALLEST + n))
    assert len(buffers._kept) == buffers.MOST


def test_kl_leaves_the_buffers_to_the_likelihood():
    """Its gradients are the latent's, and would drive those of the data's size out."""
    mu, s, *prior = (torch.randn(1 << 10, 1 << 9, requires_grad=True) for _ in range(4))
    vae_fast.gaussian_kl(mu, s, tuple(prior)).sum().backward()
    assert mu.grad.nbytes > buffers.SMALLEST
    assert not buffers._kept


def test_small_tensors_are_left_to_pytorch():
    buffers.empty_like(like(8))
    assert not buffers._kept


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t,
        lambda t: t.chunk(2, dim=1)[1],
        lambda t: t.transpose(1, 3),
        lambda t: t[:, :, ::2],
        lambda t: t[:1].expand(8, -1, -1, -1),
        lambda t: t.to(memory_format=torch.channels_last),
        lambda t: t.to(memory_format=torch.channels_last)[:, :8],
    ],
)
def test_layout_and_dtype_are_those_of_empty_like(view):
    t = view(torch.empty(8, 16, 64, 128, dtype=torch.bfloat16))
    want = torch.empty_like(t)
    addresses = set()
    for _ in range(2):
        out = buffers.empty_like(t)
        assert (out.shape, out.stride(), out.dtype) == (want.shape, want.stride(), want.dtype)
        addresses.add(out.data_ptr())
        del out
    assert len(addresses) == len(buffers._kept) == 1


def test_threads_never_share_a_buffer():
    t, clashes = like(), []

    def work(mark):
        for _ in range(300):
            out = buffers.empty_like(t)
            out.fill_(mark)
            if not torch.all(out == mark):
                clashes.append(mark)

    threads = [threading.Thread(target=work, args=(m,)) for m in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not clashes
