"""One check of distributed training per name, run by every process of a torchrun job on the CPU.

``torchrun --nproc-per-node 2 distributed_job.py FOLDER`` runs them all, and rank 0 writes what
came of each to FOLDER/results.json: null, or the traceback of the ranks where it failed. What they
compare with is always the same step of one process on the whole batch.
"""

import contextlib
import datetime
import json
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint

import vae_fast

ROWS, SIZE, LATENT = 8, 12, 3  # of the whole batch
KEYS = torch.arange(20, dtype=torch.int64).view(10, 2).view(torch.uint64)  # one a step
CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


# ---- the model, on one process and on all ------------------------------------------------------


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(ROWS, SIZE, generator=generator)


def mine(rows):
    """This rank's part of a batch, and the global index of its first row."""
    size = len(rows) // dist.get_world_size()
    first = dist.get_rank() * size
    return rows[first : first + size], first


def mlp(**options):
    torch.manual_seed(0)
    return vae_fast.VAE.mlp((SIZE,), LATENT, hidden=(16,), **options)


class HandWritten(nn.Module):
    """A loss written with FusedELBO, of which DDP sees a dict."""

    def __init__(self, unused=False, checkpointed=False, **options):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(SIZE, 16), nn.SiLU(), nn.Linear(16, 2 * LATENT))
        self.decoder = nn.Sequential(nn.Linear(LATENT, 16), nn.SiLU(), nn.Linear(16, 2 * SIZE))
        self.unused = nn.Linear(2, 2) if unused else None
        self.checkpointed = checkpointed
        self.elbo = vae_fast.FusedELBO(likelihood_clamp=(-6.0, 6.0), **options)

    def decode(self, z):
        if self.checkpointed:
            z = checkpoint(self.decoder, z, use_reentrant=False)
        else:
            z = self.decoder(z)
        return z.tensor_split(2, 1)

    def forward(self, x, key, first_row=0):
        mu, logvar = self.encoder(x).chunk(2, 1)
        out = self.elbo(x, mu, logvar, self.decode, key=key, first_row=first_row)
        return {"loss": out.loss, "kl": out.kl.mean(), "z": out.z}


def full(t):
    return t.full_tensor() if isinstance(t, DTensor) else t


def gathered(rows):
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.detach().contiguous())
    return torch.cat(parts)


def mean_over_ranks(value):
    value = value.detach().clone()
    dist.all_reduce(value)
    return value / dist.get_world_size()


def close(got, want, what, rtol=2e-5):
    """To the order of summation of fp32: relative to the largest element."""
    atol = rtol * max(want.abs().max().item(), 1e-6)
    torch.testing.assert_close(got, want, rtol=0, atol=atol, msg=lambda m: f"{what}: {m}")


def same_gradients(model, single, rtol=2e-5):
    named = dict(single.named_parameters())
    compared = 0
    for name, p in model.named_parameters():
        name = name.removeprefix("module.")
        if named[name].grad is None:
            assert p.grad is None or not full(p.grad).any(), name
            continue
        close(full(p.grad), named[name].grad, name, rtol)
        assert named[name].grad.any(), name
        compared += 1
    assert compared >= 8


def same_weights(model, single, rtol=2e-5):
    named = dict(single.named_parameters())
    for name, p in model.named_parameters():
        close(full(p.detach()), named[name.removeprefix("module.")].detach(), name, rtol)


def same_step(model, single, **forward):
    """z bit for bit, the loss and the gradients, of one step on the same key."""
    x, key = data(), KEYS[0]
    part, first = mine(x)
    out, want = model(part, key=key, first_row=first), single(x, key=key)
    out, want = (o if isinstance(o, dict) else o._asdict() for o in (out, want))
    assert torch.equal(gathered(out["z"]), want["z"]), "the shards' noise is not the batch's"
    close(mean_over_ranks(out["loss"]), want["loss"], "loss")
    out["loss"].backward()
    want["loss"].backward()
    same_gradients(model, single)


def same_training(model, single, steps=3):
    """Weights after a few Adam steps, each with its own key."""
    x = data()
    part, first = mine(x)
    optimizers = [torch.optim.Adam(m.parameters(), 1e-2) for m in (model, single)]
    start = [full(p.detach()).clone() for p in model.parameters()]
    for step in range(steps):
        for m, optimizer, rows, row in zip((model, single), optimizers, (part, x), (first, 0)):
            optimizer.zero_grad()
            out = m(rows, key=KEYS[step], first_row=row)
            (out["loss"] if isinstance(out, dict) else out.loss).backward()
            optimizer.step()
    # Adam's steps are of the size of the learning rate, whatever the gradient's.
    same_weights(model, single, rtol=2e-4)
    assert all(not torch.equal(full(p), s) for p, s in zip(model.parameters(), start))


# ---- DistributedDataParallel -------------------------------------------------------------------


@check
def ddp_step():
    same_step(DDP(mlp()), mlp())


@check
def ddp_training():
    same_training(DDP(mlp()), mlp())


@check
def ddp_inplace():
    same_step(DDP(mlp(inplace=True)), mlp())
    same_training(DDP(HandWritten(inplace=True)), HandWritten())


@check
def ddp_static_graph():
    same_training(DDP(HandWritten(), static_graph=True), HandWritten())


@check
def ddp_static_graph_with_checkpointing():
    same_training(DDP(HandWritten(checkpointed=True), static_graph=True), HandWritten())


@check
def ddp_around_each_network():
    """The encoder and the decoder wrapped by themselves, below a loss of one's own."""
    for options in (dict(), dict(static_graph=True), dict(find_unused_parameters=True)):
        for inplace in (False, True):
            model, single = HandWritten(inplace=inplace), HandWritten()
            model.encoder, model.decoder = (
                DDP(model.encoder, **options),
                DDP(model.decoder, **options),
            )
            part, first = mine(data())
            model(part, key=KEYS[0], first_row=first)["loss"].backward()
            single(data(), key=KEYS[0])["loss"].backward()
            for got, want in zip(model.parameters(), single.parameters(), strict=True):
                close(got.grad, want.grad, str(options))


@check
def ddp_gradients_as_bucket_views():
    for inplace in (False, True):
        model = DDP(HandWritten(inplace=inplace), gradient_as_bucket_view=True)
        same_training(model, HandWritten())


@check
def ddp_unused_parameters():
    model = DDP(HandWritten(unused=True), find_unused_parameters=True)
    single = HandWritten(unused=True)
    same_step(model, single)
    assert model.module.unused.weight.grad is None


@check
def ddp_samples_and_options():
    """K samples, data levels with noise of their own, learned scales and priors."""
    for options in (
        dict(num_samples=3, objective="iwae", estimator="dreg"),
        dict(num_samples=2, estimator="stl", beta=0.5),
        dict(variance="scalar"),
        dict(kl="analytic", prior=(nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3)))),
    ):
        model, single = DDP(mlp(**options)), mlp(**options)
        x, key = data(), KEYS[0]
        part, first = mine(x)
        out, want = model(part, key=key, first_row=first), single(x, key=key)
        close(mean_over_ranks(out.loss), want.loss, "loss")
        out.loss.backward()
        want.loss.backward()
        if "prior" not in options:  # whose parameters the two models share
            same_gradients(model, single)


@check
def ddp_dequantization():
    levels = torch.randint(256, (ROWS, SIZE), dtype=torch.uint8, generator=torch.Generator())
    model, single = DDP(mlp(dequantize=True)), mlp(dequantize=True)
    part, first = mine(levels)
    out, want = model(part, key=KEYS[0], first_row=first), single(levels, key=KEYS[0])
    assert torch.equal(gathered(out.z), want.z)
    close(gathered(out.nll), want.nll, "nll")


@check
def ddp_no_sync():
    """Two micro-batches a rank, synchronised at the second, against the batch in one piece."""
    for options in (dict(), dict(inplace=True), dict(reduction="sum"), dict(reduction="none")):
        model, single = DDP(HandWritten(**options)), HandWritten()
        x, key = data(), KEYS[0]
        part, first = mine(x)
        half, scale = len(part) // 2, {"sum": 1 / len(part)}.get(options.get("reduction"), 0.5)
        for i in range(2):
            with contextlib.nullcontext() if i else model.no_sync():
                rows = part[i * half : (i + 1) * half]
                loss = model(rows, key=key, first_row=first + i * half)["loss"]
                loss = loss.mean() if options.get("reduction") == "none" else loss
                (loss * scale).backward()
        single(x, key=key)["loss"].backward()
        same_gradients(model, single)


@check
def ddp_communication_hook():
    """Gradients that are compressed on their way: fp16's rounding, and nothing else."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

    model, single = DDP(mlp()), mlp()
    model.register_comm_hook(None, fp16_compress_hook)
    part, first = mine(data())
    model(part, key=KEYS[0], first_row=first).loss.backward()
    single(data(), key=KEYS[0]).loss.backward()
    same_gradients(model, single, rtol=2.0**-10)


@check
def ddp_autocast():
    model, single = DDP(mlp(inplace=True)), mlp()
    part, first = mine(data())
    with torch.autocast("cpu", torch.bfloat16):
        out = model(part, key=KEYS[0], first_row=first)
        want = single(data(), key=KEYS[0])
    assert out.loss.dtype == torch.float32
    close(mean_over_ranks(out.loss), want.loss, "loss", rtol=1e-3)
    out.loss.backward()
    want.loss.backward()
    same_gradients(model, single, rtol=2.0**-5)


@check
def seeds():
    """Without a key: one seed on all ranks is one noise for all, a seed of one's own is not."""
    vae = mlp()
    rank = dist.get_rank()
    for seed, alike in ((7, True), (7 + rank, False)):
        torch.manual_seed(seed)
        z = gathered(vae(torch.zeros(1, SIZE)).z)
        assert torch.equal(z[0], z[1]) == alike


# ---- FSDP2 -------------------------------------------------------------------------------------


def sharded(model, **options):
    for part in (model.encoder, model.decoder, model):
        fully_shard(part, **options)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return model


@check
def fsdp_step():
    same_step(sharded(mlp()), mlp())
    same_step(sharded(HandWritten()), HandWritten())


@check
def fsdp_training():
    same_training(sharded(mlp()), mlp())


@check
def fsdp_without_resharding():
    same_training(sharded(mlp(), reshard_after_forward=False), mlp())


@check
def fsdp_inplace():
    same_training(sharded(mlp(inplace=True)), mlp())
    same_training(sharded(HandWritten(inplace=True)), HandWritten())


@check
def fsdp_checkpointing():
    same_training(sharded(HandWritten(checkpointed=True)), HandWritten())


@check
def fsdp_conv_and_shared_scale():
    def conv():
        torch.manual_seed(0)
        return vae_fast.VAE.conv((3, 2, 2), LATENT, channels=(4,), variance="channel")

    model, single, x = sharded(conv()), conv(), data().view(ROWS, 3, 2, 2)
    part, first = mine(x)
    model(part, key=KEYS[0], first_row=first).loss.backward()
    single(x, key=KEYS[0]).loss.backward()
    same_gradients(model, single)


@check
def fsdp_scalar_scale():
    """A parameter without dimensions, which FSDP leaves alone; its gradient is averaged by hand."""
    model, single = mlp(variance="scalar"), mlp(variance="scalar")
    scale = model.decoder.scale
    for module in (model.encoder, model.decoder, model):
        fully_shard(module, ignored_params={scale})
    part, first = mine(data())
    model(part, key=KEYS[0], first_row=first).loss.backward()
    single(data(), key=KEYS[0]).loss.backward()
    scale.grad = mean_over_ranks(scale.grad)
    same_gradients(model, single)


@check
def fsdp_other_methods():
    """Methods besides forward() call the encoder and the decoder, which are sharded themselves."""
    model, single, x = sharded(mlp()), mlp(), data()
    close(model.reconstruct(x), single.reconstruct(x), "reconstruct")
    close(model.sample(5, key=KEYS[0]), single.sample(5, key=KEYS[0]), "sample")
    bound = [m.log_likelihood(x, 4, 2, key=KEYS[0]) for m in (model, single)]
    close(*bound, "log_likelihood")
    root_only = mlp()
    fully_shard(root_only)
    torch.distributed.fsdp.register_fsdp_forward_method(root_only, "reconstruct")
    close(root_only.reconstruct(x), single.reconstruct(x), "reconstruct")


@check
def fsdp_files():
    """Sharded weights are refused; gathered ones are saved, as docs/training.md says."""
    model, whole = sharded(mlp()), mlp()
    path = f"{tempfile.gettempdir()}/vae_fast_{os.getpid()}.safetensors"
    with pytest.raises(ValueError, match=r"encoder.* is a shard"):
        model.save(path)
    for parameter in whole.parameters():
        torch.nn.init.zeros_(parameter)
    options = StateDictOptions(full_state_dict=True)
    whole.load_state_dict(get_model_state_dict(model, options=options))
    whole.save(path)
    close(vae_fast.VAE.load(path).sample(5, key=KEYS[0]), mlp().sample(5, key=KEYS[0]), "file")
    os.remove(path)


@check
def fsdp_accumulation():
    """set_requires_gradient_sync, FSDP2's counterpart of no_sync."""
    model, single = sharded(mlp()), mlp()
    x, key = data(), KEYS[0]
    part, first = mine(x)
    half = len(part) // 2
    for i in range(2):
        model.set_requires_gradient_sync(i == 1)
        out = model(part[i * half : (i + 1) * half], key=key, first_row=first + i * half)
        (out.loss / 2).backward()
    single(x, key=key).loss.backward()
    same_gradients(model, single)


@check
def fsdp_mixed_precision():
    """bf16 compute, fp32 reduction and parameters: bf16's error against fp32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for inplace in (False, True):
        model, single = sharded(mlp(inplace=inplace), mp_policy=policy), mlp()
        part, first = mine(data())
        out, want = model(part, key=KEYS[0], first_row=first), single(data(), key=KEYS[0])
        assert out.z.dtype == torch.bfloat16
        assert {t.dtype for t in out[:4]} == {torch.float32}
        close(mean_over_ranks(out.loss), want.loss, "loss", rtol=1e-2)
        out.loss.backward()
        want.loss.backward()
        assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
        same_gradients(model, single, rtol=2.0**-5)


@check
def fsdp_gradient_clipping_and_state_dict():
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    model, single = sharded(mlp()), mlp()
    part, first = mine(data())
    model(part, key=KEYS[0], first_row=first).loss.backward()
    single(data(), key=KEYS[0]).loss.backward()
    norms = [nn.utils.clip_grad_norm_(m.parameters(), 0.1) for m in (model, single)]
    close(full(norms[0]), norms[1], "norm")
    same_gradients(model, single)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    if dist.get_rank() == 0:
        loaded = vae_fast.VAE.mlp((SIZE,), LATENT, hidden=(16,))
        loaded.load_state_dict(state)
        same_weights(loaded, single)


# ---- the job -----------------------------------------------------------------------------------


def main(folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    results = {}
    for name, function in CHECKS.items():
        problem = None
        try:
            function()
        except Exception:
            problem = traceback.format_exc()
        problems = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
        failed = [f"rank {rank}: {p}" for rank, p in enumerate(problems) if p]
        results[name] = "\n".join(failed) or None
    if dist.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(results))
    # Gloo's threads drop the tensors of a gather only now, and need Python for it: a process that
    # ends meanwhile aborts or waits for ever. While this one sleeps they have it; in the barrier
    # only the one that comes first waits.
    dist.barrier()
    time.sleep(1)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
