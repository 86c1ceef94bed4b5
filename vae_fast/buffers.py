"""Memory for the gradients that the forward pass writes, reused from step to step on the CPU.

Fresh memory costs more in page faults than the pass that fills it: the C library returns a freed
tensor of this size to the system, and the next step faults it in again, page by page. So the last
few buffers are kept, and one is handed out again once nothing but this module holds its memory.
GPUs have PyTorch's caching allocator for this.
"""

from __future__ import annotations

import sys
import threading

import torch
from torch import Tensor

SMALLEST = 1 << 20  # bytes; below, the C library's heap reuses memory by itself
MOST = 4  # buffers kept: the two gradients of a step, and two of the step before it
LARGEST_TOTAL = 1 << 31  # bytes kept

# Without this nothing is reused.
_use_count = getattr(torch._C, "_storage_Use_Count", None)


class _Buffer:
    """A tensor that is kept, and how many hold its memory when nobody uses it."""

    __slots__ = ("alone", "nbytes", "storage", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.storage = tensor.untyped_storage()
        self.nbytes = self.storage.nbytes()
        self.alone = self.holders()

    def holders(self) -> tuple[int, int]:
        """Tensors, views and NumPy arrays on this memory, and holders of its storage object."""
        return _use_count(self.storage._cdata), sys.getrefcount(self.storage)

    def fits(self, t: Tensor) -> bool:
        own = self.tensor
        return own.shape == t.shape and own.dtype == t.dtype and own.stride() == t.stride()


_kept: list[_Buffer] = []  # the latest used last
_lock = threading.Lock()


def empty_like(t: Tensor) -> Tensor:
    """``torch.empty_like``, in reused memory where that pays, unseen by autograd."""
    nbytes = t.numel() * t.element_size()
    reusable = t.is_cpu and SMALLEST <= nbytes <= LARGEST_TOTAL // 2 and _use_count is not None
    # Whoever finds the lock taken (another thread, or a process forked meanwhile) does without.
    if not reusable or not _lock.acquire(blocking=False):
        return torch.empty_like(t)
    try:
        return _take(t, nbytes)
    finally:
        _lock.release()


def _take(t: Tensor, nbytes: int) -> Tensor:
    # As empty_like would lay it out: like t if t is dense, but not if it is half of a tensor, say.
    like = t if t.is_contiguous() else torch.empty_like(t, device="meta")
    for i in reversed(range(len(_kept))):  # of what was used last a cache may still have some
        buffer = _kept[i]
        if buffer.fits(like) and buffer.holders() == buffer.alone:
            _kept.append(_kept.pop(i))
            return buffer.tensor.detach()
    tensor = torch.empty_strided(like.shape, like.stride(), dtype=t.dtype, device=t.device)
    while _kept and (len(_kept) >= MOST or nbytes + sum(b.nbytes for b in _kept) > LARGEST_TOTAL):
        _kept.pop(0)
    _kept.append(_Buffer(tensor))
    return tensor.detach()


def clear() -> None:
    """Give the kept memory back to the system."""
    with _lock:
        _kept.clear()
