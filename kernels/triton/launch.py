"""What every launcher needs on the host: plans of launches, strides, the device, scratch memory.

A small kernel takes the GPU microseconds. To work out its grid and strides, and Triton's own look
at every argument, take the host many times that. So what follows from layouts and options alone is
worked out once: each launcher has a function of these, pure and cached, that returns a `Plan`.
"""

import contextlib
import functools
import itertools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import triton
from triton.compiler import CompiledKernel

from .elementary import FP16, FP32, PLAIN

# Plans that a launcher keeps: those used last.
PLANS = 1024

# Scratch that launches share: the ticket counter, and room for this many partial results.
MAX_PARTIALS = 1 << 15

# Columns are numbered in 32 bits, beyond the end of a row as well.
LARGEST_ROW = 1 << 30

_scratch: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = {}


def accumulation(t: Tensor) -> torch.dtype:
    """The dtype that sums over ``t`` are accumulated in."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


# ---- where ---------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Who runs a kernel.

    Attributes:
        backend: "cuda" (NVIDIA), "hip" (AMD) or "interpreter".
        device: index of the GPU; -1 for the interpreter, which plays an H200.
        sms, warp: multiprocessors, and threads in a warp.
    """

    backend: str
    device: int
    sms: int
    warp: int


@functools.cache
def _place(device: torch.device) -> Place:
    if device.type != "cuda":
        return Place("interpreter", -1, 132, 32)
    gpu = torch.cuda.get_device_properties(device)
    backend = "cuda" if torch.version.hip is None else "hip"
    return Place(backend, device.index, gpu.multi_processor_count, gpu.warp_size)


def place(t: Tensor) -> Place:
    """Who runs a kernel on ``t``."""
    return _place(t.device)


class on_device:
    """Make a GPU the current one, since Triton launches there.

    On NVIDIA GPUs it is also an NVTX range, "vae_fast ``name``", that Nsight Systems shows.
    """

    __slots__ = ("elsewhere", "name")

    def __init__(self, where: Place, name: str) -> None:
        self.name = f"vae_fast {name}" if where.backend == "cuda" else None
        elsewhere = where.device >= 0 and where.device != torch.cuda.current_device()
        self.elsewhere = torch.cuda.device(where.device) if elsewhere else None

    def __enter__(self) -> None:
        _look.range = self.name or ""
        if self.elsewhere is not None:
            self.elsewhere.__enter__()
        if self.name is not None:
            torch.cuda.nvtx.range_push(self.name)

    def __exit__(self, *error: object) -> None:
        if self.name is not None:
            torch.cuda.nvtx.range_pop()
        if self.elsewhere is not None:
            self.elsewhere.__exit__(*error)


# ---- plans ---------------------------------------------------------------------------------------

Layout = tuple[torch.Size, tuple[int, ...], torch.dtype]


def layout(t: Tensor | None) -> Layout | None:
    """What a plan may know of a tensor: all but its values and its address."""
    return None if t is None else (t.shape, t.stride(), t.dtype)


def laid_out(layout: Layout | None) -> Tensor | None:
    """A tensor of this layout, without memory."""
    if layout is None:
        return None
    shape, stride, dtype = layout
    return torch.empty_strided(shape, stride, dtype=dtype, device="meta")


def approximation(where: Place, *tensors: Tensor | None) -> int:
    """The ``APPROX`` of a kernel whose distributions are made of ``tensors``.

    AMD's compiler takes PTX silently and wrongly.
    """
    itemsize = max(t.element_size() for t in tensors if t is not None)
    if where.backend != "cuda" or itemsize == 8:
        return PLAIN.value
    return FP16.value if itemsize == 2 else FP32.value


class Launch:
    """A kernel's grid, and all its arguments but for tensors and ``values`` that change.

    A kernel takes tensors, then ``sizes``, then values, then ``constants``. Triton compiles it for
    the dtypes of the tensors, which of them there are and which begin at a multiple of 16 bytes,
    and for the integers; all but the third is of the plan. So the first compiled kernel for some
    alignment is that of all later ones, which are then launched without another search. (For AMD
    also whether a storage has more than 2 GiB, which only decides how addresses are written: no
    tensor of the plan reaches further than the first one's storage.)

    Args:
        where: who runs it.
        programs: size of the grid.
        sizes: integers. One among the values must be in the plan in so far as it needs 64 bits.
        constants: the kernel's ``tl.constexpr``, in its order.
        num_warps: warps per program.
        registers: registers a thread may use, where ptxas would rather spill one than use more.
    """

    def __init__(
        self, where: Place, programs: int, sizes: Sequence[int], constants: dict[str, Any],
        num_warps: int, registers: int | None = None,
    ) -> None:  # fmt: skip
        self.grid = programs, 1, 1
        self.sizes, self.constants = tuple(sizes), constants
        self.options = {"num_warps": num_warps, "num_stages": 1, "enable_fp_fusion": True}
        if where.backend == "cuda" and registers is not None:
            self.options["maxnreg"] = registers
        # Kernels by the alignment of their tensors, and what launches them.
        self._known: dict[int, tuple[CompiledKernel, Callable[..., object]]] = {}

    def __call__(self, kernel: Any, tensors: Sequence[Tensor | None], *values: float) -> None:
        """Launch ``kernel`` on the current device and stream."""
        addresses = 0
        for t in tensors:
            if t is not None:
                addresses |= t.data_ptr()
        odd = 0  # a bit for each tensor that begins elsewhere
        if addresses % 16 != 0:
            odd = sum(1 << i for i, t in enumerate(tensors) if t is not None and t.data_ptr() % 16)
        compiled, run = self._known.get(odd, (None, None))
        # What stands for a kernel, as the interpreter does, sees every launch.
        if run is not None and type(kernel) is triton.JITFunction:
            run(*tensors, *self.sizes, *values, *self.constants.values())
        else:
            arguments = *tensors, *self.sizes, *values
            compiled = kernel[self.grid](*arguments, **self.constants, **self.options)
            if isinstance(compiled, CompiledKernel):
                self._known[odd] = compiled, compiled[self.grid]
        if _look.launches is not None:
            _look.launches.append(Seen(self, _look.range, compiled, tensors, values))


class Seen(NamedTuple):
    """A launch that was looked at: its range's name, its kernel and what that was given."""

    launch: Launch
    range: str
    compiled: CompiledKernel | None
    tensors: Sequence[Tensor | None]
    values: Sequence[float]


class _Look(threading.local):
    launches: list[Seen] | None = None
    range: str = ""


_look = _Look()


@contextlib.contextmanager
def seen() -> Iterator[list[Seen]]:
    """Look at the launches of this thread."""
    _look.launches = launches = []
    try:
        yield launches
    finally:
        _look.launches = None


def is_wide(n: int) -> bool:
    """Whether Triton passes an integer in 64 bits."""
    return not -(2**31) <= n < 2**31


def check_rows(name: str, t: Tensor) -> None:
    """Raise a ValueError where a row of ``t`` has more elements than the kernels number."""
    size = math.prod(t.shape[1:])
    if size > LARGEST_ROW:
        raise ValueError(
            f"{name} has {size} elements in a row of the batch; the Triton kernels take at most "
            f"{LARGEST_ROW} (use_backend('reference') takes any number)"
        )


def copies(
    tensors: Sequence[Tensor | None],
    read: Sequence[Tensor | None],
    orders: Iterable[tuple[int, ...] | None] = itertools.repeat(None),
) -> dict[int, tuple[int, ...]]:
    """``Plan.copied``, of tensors and what a kernel reads of them: they themselves, or copies.

    ``orders`` are those of the copies' dimensions where they are not the tensors' own.
    """
    return {
        i: order or tuple(range(t.dim()))
        for i, (t, taken, order) in enumerate(zip(tensors, read, orders, strict=False))
        if taken is not t
    }


@dataclass(frozen=True)
class Plan:
    """A launch, and what comes before it.

    Attributes:
        copied: numbers of the tensors that no stride pattern fits, and the order of the dimensions
            in which they are copied.
        partials: partial results that need scratch memory, if any do.
    """

    launch: Launch
    copied: dict[int, tuple[int, ...]]
    partials: int | None = None

    def read(self, *tensors: Tensor | None) -> Sequence[Tensor | None]:
        """The tensors, or copies in place of them."""
        if not self.copied:
            return tensors
        read = list(tensors)
        for i, order in self.copied.items():
            read[i] = read[i].permute(order).contiguous()
        return read

    def scratch(self, t: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The counter and the partial results that the launch takes, for a sum over ``t``."""
        return (None, None) if self.partials is None else scratch(t, accumulation(t), self.partials)


# ---- memory --------------------------------------------------------------------------------------


def scratch(t: Tensor, dtype: torch.dtype, partials: int) -> tuple[Tensor, Tensor]:
    """(counter, partials) for a launch on ``t``'s device: an int32 zero, and uninitialised memory.

    Launches on the default stream follow each other, and each leaves the counter at zero, so they
    share one pair. On other streams each launch gets its own: there, memory may be a graph's, which
    is captured or warmed up in a pool that takes back all that it gave.
    """
    shared = t.is_cuda and torch._C._cuda_getCurrentRawStream(t.device.index) == 0
    if shared:
        cached = _scratch.get((t.device.index, dtype))
        if cached is not None and cached[1].numel() >= partials:
            return cached
        partials = max(partials, MAX_PARTIALS)
    pair = (
        torch.zeros((), dtype=torch.int32, device=t.device),
        torch.empty(partials, dtype=dtype, device=t.device),
    )
    if shared:
        _scratch[t.device.index, dtype] = pair
    return pair


def is_shared_scratch(t: Tensor) -> bool:
    """Whether ``t`` is scratch memory that all launches on the default stream share."""
    return any(t is s for pair in tuple(_scratch.values()) for s in pair)


# ---- strides -------------------------------------------------------------------------------------


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
