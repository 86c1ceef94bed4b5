"""What every launcher needs on the host: strides, gradient buffers, the device, scratch memory."""

import contextlib
import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Scratch of one stream: the ticket counter, and room for this many partial results.
MAX_PARTIALS = 8192

_NOTHING = contextlib.nullcontext()

_scratch: dict[tuple[int, int, torch.dtype], tuple[Tensor, Tensor]] = {}


def accumulation(t: Tensor) -> torch.dtype:
    """The dtype that sums over ``t`` are accumulated in."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def backend_of(t: Tensor) -> str:
    """Who runs a kernel on ``t``: "cuda" (NVIDIA), "hip" (AMD) or "interpreter"."""
    if not t.is_cuda:
        return "interpreter"
    return "cuda" if torch.version.hip is None else "hip"


def compile_options(
    backend: str, dtype: torch.dtype, registers: int | None = None
) -> dict[str, bool | int]:
    """Keyword arguments that depend on who compiles the kernel.

    Args:
        backend: as :func:`backend_of` says.
        dtype: dtype of the arithmetic's main tensor.
        registers: registers a thread may use, where ptxas would rather spill one than use more.
    """
    options: dict[str, bool | int] = {
        # PTX's approximate instructions: AMD's compiler takes PTX silently and wrongly.
        "APPROX": backend == "cuda" and dtype != torch.float64,
        "enable_fp_fusion": True,
        "num_stages": 1,
    }
    if backend == "cuda" and registers is not None:
        options["maxnreg"] = registers
    return options


class on_device:
    """Make ``t``'s GPU the current one, since Triton launches there.

    On NVIDIA GPUs it is also an NVTX range, "vae_fast ``name``", that Nsight Systems shows.
    """

    __slots__ = ("device", "name")

    def __init__(self, t: Tensor, name: str) -> None:
        self.name = f"vae_fast {name}" if backend_of(t) == "cuda" else None
        elsewhere = t.is_cuda and t.device.index != torch.cuda.current_device()
        self.device = torch.cuda.device(t.device) if elsewhere else _NOTHING

    def __enter__(self) -> None:
        self.device.__enter__()
        if self.name is not None:
            torch.cuda.nvtx.range_push(self.name)

    def __exit__(self, *error: object) -> None:
        if self.name is not None:
            torch.cuda.nvtx.range_pop()
        self.device.__exit__(*error)


@functools.cache
def _machine(index: int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(index)
    return properties.multi_processor_count, properties.warp_size


def machine(t: Tensor) -> tuple[int, int]:
    """Multiprocessors, and threads in a warp, of ``t``'s GPU; the interpreter plays an H200."""
    return _machine(t.device.index) if t.is_cuda else (132, 32)


def scratch(t: Tensor, dtype: torch.dtype, partials: int) -> tuple[Tensor, Tensor]:
    """(counter, partials) for a launch on ``t``'s device: an int32 zero, and uninitialised memory.

    Launches on one stream follow each other, and each leaves the counter at zero, so they share
    one pair. A graph being captured gets its own, zeroed by every replay.
    """
    if t.is_cuda and not torch.cuda.is_current_stream_capturing():
        stream = torch.cuda.current_stream(t.device).cuda_stream
        cached = _scratch.get((t.device.index, stream, dtype))
        if cached is not None and cached[1].numel() >= partials:
            return cached
        partials = max(partials, MAX_PARTIALS)
    else:
        stream = None
    pair = (
        torch.zeros((), dtype=torch.int32, device=t.device),
        torch.empty(partials, dtype=dtype, device=t.device),
    )
    if stream is not None:
        _scratch[t.device.index, stream, dtype] = pair
    return pair


def collapse(sizes: Sequence[int], strides: Sequence[int]) -> int | None:
    """The one stride that walks these dimensions in this order, or None if there is none."""
    col = expected = None
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size == 1:
            continue
        if col is None:
            col = stride
        elif stride != expected:
            return None
        expected = stride * size
    return 1 if col is None else col


def as_rows(t: Tensor) -> tuple[Tensor, int, int]:
    """``t`` (rows, *event) with its row stride and the one stride along the event.

    A tensor that no single stride walks is copied.
    """
    if not t.is_contiguous():
        col = collapse(t.shape[1:], t.stride()[1:])
        if col is not None:
            return t, t.stride(0), col
        t = t.contiguous()
    return t, math.prod(t.shape[1:]), 1


def alignment(vec: int, *elements: int) -> int:
    """The largest power of two that divides the size of a row and the strides between rows.

    Beyond a vector only 16 counts, of which Triton knows by itself.
    """
    shared = math.gcd(16, *elements)
    return shared if shared == 16 else min(shared, vec)


def row_stride(t: Tensor) -> tuple[Tensor, int]:
    """Per-row values of any shape with the one stride that walks them; copied if none does."""
    if t.is_contiguous():
        return t, 1
    stride = collapse(t.shape, t.stride())
    return (t.contiguous(), 1) if stride is None else (t, stride)
