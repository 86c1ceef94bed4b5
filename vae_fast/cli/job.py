"""The processes that train one model together: one, or those that ``torchrun`` started."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vae_fast.cli.errors import CommandError, pick_device


@dataclass(frozen=True)
class Job:
    """What a process is to the job.

    Attributes:
        device: where this process computes.
        rank: its number, from 0.
        size: how many there are; with one there is no process group.
    """

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the process that prints and writes files."""
        return self.rank == 0

    def say(self, text: str = "") -> None:
        """Print, once per job. A full disk or a reader that has gone does not end the run."""
        if not self.main:
            return
        try:
            print(text, flush=True)
        except OSError:
            # The rest goes nowhere, what is in the buffer too: Python flushes it at exit.
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), sys.stdout.fileno())

    def part(self, rows: int) -> tuple[int, int]:
        """First row and number of rows of this process's part of a batch; it may have none."""
        first, end = (rows * rank // self.size for rank in (self.rank, self.rank + 1))
        return first, end - first

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model, with gradients averaged over the processes."""
        if self.size == 1:
            return model
        return nn.parallel.DistributedDataParallel(model)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def agree(self, what: str) -> None:
        """Fail in every process if ``what`` is not the same in all."""
        if self.size == 1:
            return
        digest = int.from_bytes(hashlib.sha256(what.encode()).digest()[:7], "big")
        bounds = torch.tensor([digest, -digest], device=self.device)
        dist.all_reduce(bounds, dist.ReduceOp.MAX)
        if int(bounds[0]) != -int(bounds[1]):
            raise CommandError(
                "the processes do not see the same arguments, data and checkpoint: --data and "
                "--out must be the same files for all"
            )


@contextlib.contextmanager
def join(device: str) -> Iterator[Job]:
    """This process's place in the job, with a process group while the context is open.

    Args:
        device: what ``--device`` says.
    """
    launched = dist.is_available() and dist.is_torchelastic_launched()
    rank, size, local = 0, 1, 0
    if launched:
        names = "RANK", "WORLD_SIZE", "LOCAL_RANK"
        rank, size, local = (int(os.environ[name]) for name in names)
    one = pick_device(device) if size == 1 else _one_of_many(device, local)
    on_gpu = one.type == "cuda"
    if on_gpu and one.index is not None:
        torch.cuda.set_device(one)  # its random generator is then the default one
    if size > 1:
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=_store(),
            rank=rank,
            world_size=size,
            device_id=one if on_gpu else None,
        )
    yield Job(one, rank, size)
    if size > 1:
        # Not after an error: the others may be waiting for this process, whose end ends the job.
        dist.barrier()
        dist.destroy_process_group()


def _store() -> dist.Store:
    """Where the processes find one another."""
    store, _, _ = next(dist.rendezvous("env://"))
    # torchrun --max-restarts hands the last start's store, and the addresses in it, to the next
    # (pytorch/pytorch#135712). Its count of starts is the same for all on one machine only.
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    return store


def _one_of_many(name: str, local: int) -> torch.device:
    """The device of process ``local`` of this machine."""
    device = pick_device(name)
    if device.type == "cuda":
        if device.index is not None:
            raise CommandError(f"--device {name} is one GPU; under torchrun, use --device cuda")
        if local >= torch.cuda.device_count():
            raise CommandError(
                f"process {local} of this machine has no GPU of its own, there being "
                f"{torch.cuda.device_count()}: start fewer, or use --device cpu"
            )
        return torch.device("cuda", local)
    return device
