"""Memory for the gradients that the passes write, reused from step to step on the CPU.

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
# Buffers kept: the data's two gradients of a step, and of the step before it; the latent's two; and
# the four of a KL term with its prior.
MOST = 10
LARGEST_TOTAL = 1 << 31  # bytes kept

# Without this nothing is reused.
_use_count = getattr(torch._C, "_storage_Use_Count", None)


class _Buffer:
    """A tensor that is kept, and how many hold its memory while nobody uses it.

    ``uses`` counts tensors, views and NumPy arrays on it, ``references`` its storage object's.
    """

    __slots__ = ("address", "layout", "nbytes", "references", "storage", "tensor", "uses")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.layout = tensor.shape, tensor.stride(), tensor.dtype
        self.storage = tensor.untyped_storage()
        self.address = self.storage._cdata
        self.nbytes = self.storage.nbytes()
        self.uses = _use_count(self.address)
        self.references = sys.getrefcount(self.storage)


_kept: list[_Buffer] = []  # the latest used last
_lock = threading.Lock()


def empty_like(t: Tensor) -> Tensor:
    """``torch.empty_like``, in reused memory where that pays, unseen by autograd."""
    nbytes = t.nbytes
    reusable = (
        SMALLEST <= nbytes <= LARGEST_TOTAL // 2
        and t.is_cpu
        and _use_count is not None
        # What is made there, no later step may differentiate.
        and not torch.is_inference_mode_enabled()
    )
    # Whoever finds the lock taken (another thread, or a process forked meanwhile) does without.
    if not reusable or not _lock.acquire(blocking=False):
        return torch.empty_like(t)
    try:
        # As empty_like would lay it out: like t if t is dense, but not if it is half of a tensor.
        like = t if t.is_contiguous() else torch.empty_like(t, device="meta")
        layout = shape, stride, dtype = like.shape, like.stride(), like.dtype
        for i in range(len(_kept) - 1, -1, -1):  # of what was used last a cache may have some
            buffer = _kept[i]
            if (
                buffer.layout == layout
                and buffer.storage.nbytes() == buffer.nbytes  # FSDP, say, resizes to zero
                and not buffer.storage.is_shared()  # with another process, which nobody counts
                and _use_count(buffer.address) == buffer.uses
                and sys.getrefcount(buffer.storage) == buffer.references
            ):
                _kept.append(_kept.pop(i))
                return buffer.tensor.detach()
        tensor = torch.empty_strided(shape, stride, dtype=dtype, device=t.device)
        total = nbytes + sum(b.nbytes for b in _kept)
        while _kept and (len(_kept) >= MOST or total > LARGEST_TOTAL):
            total -= _kept.pop(0).nbytes
        _kept.append(_Buffer(tensor))
        return tensor.detach()
    finally:
        _lock.release()


def clear() -> None:
    """Give the kept memory back to the system."""
    with _lock:
        _kept.clear()
