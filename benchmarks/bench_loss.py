"""The latent pass, the KL term, the likelihood pass with its options, and the whole loss.

    pytest benchmarks --benchmark-only [--quick] [--device cuda] [-k "elbo and fp32"]

Against what people use: all implementations of a row run in this process on the same tensors, each
drawing its own noise inside its time, and take turns. A result is checked before it is timed and
after; one that is wrong is reported, and not timed. torch.compile's max-autotune chooses between
matrix products and GPU kernels: on a CPU a loss has nothing to choose, so there only one group
shows it, in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from cases import BOTH, CASES, FORWARD, Size
from measure import Clock, has_graph, memory, race
from peers import IMPLEMENTATIONS, KL, OPTIONS, RANDN
from saved import INPLACE

SMALL = Size(64, 16, 784)
SIZES = (
    SMALL,
    Size(128, 32, 3072),
    Size(1024, 64, 784),
    Size(4096, 128, 3072),
    Size(16384, 256, 3072),
)
GPU_SIZES = (*SIZES, Size(65536, 256, 3072), Size(256, 4096, 196608))
# Sizes that are also timed on uint8 data, and the only ones of the likelihood's options.
FEW = (Size(1024, 64, 784), Size(4096, 128, 3072))
KL_SIZES = (SMALL, Size(16384, 10, 784), Size(4096, 128, 3072))
NOISY = ("latent", "elbo")  # who draw noise
QUICK_SIZES = (SMALL, *FEW)
QUICK_GPU_SIZES = (SMALL, Size(4096, 128, 3072), Size(65536, 256, 3072))


@dataclass(frozen=True)
class Row:
    group: str
    phase: str
    dtype: str
    size: Size
    implementation: str

    def __str__(self) -> str:
        return f"{self.name} {self.implementation}"

    @property
    def name(self) -> str:
        return f"{self.group} {self.phase} {self.dtype} {self.size}"


def dtypes(group: str, size: Size, quick: bool) -> tuple[str, ...]:
    if group in OPTIONS:
        return ("uint8",) if group == "logistic" else ("fp32",)
    if quick or group in KL:
        return ("fp32",)
    return ("fp32", "bf16", *(("uint8",) if group != "latent" and size in FEW else ()))


def rows(quick: bool, device: str) -> list[Row]:
    cpu = device == "cpu"
    full, few = (SIZES, QUICK_SIZES) if cpu else (GPU_SIZES, QUICK_GPU_SIZES)
    sizes = few if quick else full
    return [
        Row(group, phase, dtype, size, implementation)
        for group, implementations in IMPLEMENTATIONS.items()
        if not (quick and group in (*OPTIONS, *KL))
        for size in (FEW if group in OPTIONS else KL_SIZES if group in KL else sizes)
        for dtype in dtypes(group, size, quick)
        for phase in ((BOTH,) if quick or group in (*OPTIONS, *KL) else (FORWARD, BOTH))
        for implementation in implementations
        # Without gradients there is nothing to write in place.
        if not (implementation == INPLACE and phase == FORWARD)
        if not (
            implementation.endswith("max-autotune")
            and (quick or (cpu and (group, dtype) != ("elbo", "fp32")))
        )
        if not (implementation == RANDN and (not cpu or group not in NOISY))
        if not (cpu and implementation.endswith("CUDA graphs"))
    ]


@lru_cache(maxsize=1)
def measured(group, phase, dtype, size, names, device, budget):
    """What each implementation did: its facts, or why it is wrong."""
    torch._dynamo.reset()
    case = CASES[group](size, dtype, device)
    steps = {name: case.step(IMPLEMENTATIONS[group][name](), phase) for name in names}
    clock = Clock(device, case.reset)

    def checked(step):
        check = case.checks(step, phase)

        def check_anew():
            case.reset()
            check()

        return check_anew

    def check_replays(replay):
        check = case.checks(replay, phase)
        check()
        check()

    # First: what has graphs of its own keeps nodes of the default stream, and with them on their
    # inputs nothing can be captured.
    closed = [name for name in names if has_graph(name, device)]
    replayed = {
        name: clock.replayed(steps[name], check_replays)
        for name in names
        if name not in closed and budget
    }

    def others(name, median, bandwidth):
        moved = case.bytes_moved(phase)
        case.reset()
        return {
            "bytes": moved,
            "share": moved / median / bandwidth,
            "replayed": replayed.get(name),
            **memory(steps[name], case.inputs, device, name in closed),
        }

    checks = {name: checked(step) for name, step in steps.items()}
    return race(steps, checks, clock, budget, others)


def test_loss(row, names, device, budget, hand_in):
    place = row.group, row.phase, row.dtype, row.size
    result = measured(*place, names, device, budget)[row.implementation]
    of, size = row.group, str(row.size)
    if of in OPTIONS:
        of, size = "option", f"{of} {size}"
    if of in KL:
        of, size = "kl", f"{of} {size}"
    hand_in(row, result, of=of, phase=row.phase, dtype=row.dtype, size=size)
