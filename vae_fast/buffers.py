"""Memory for the gradients that the forward pass writes, reused from step to step on the CPU.

Fresh memory costs more in page faults than the pass that fills it: the C library returns a freed
tensor of this size to the system, and the next step faults it in again, page by page. So the last
few buffers are kept, and one is handed out again once nothing but this module holds its memory.
GPUs have PyTorch's caching allocator for this.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

SMALLEST = 1 << 17  # bytes; below, the C library's heap reuses memory by itself
MOST = 4  # buffers kept: the two gradients of a step, and two of the step before it
LARGEST_TOTAL = 1 << 31  # bytes kept

# (buffer, its storage's address, use count when nobody else holds it), the latest used last.
_kept: list[tuple[Tensor, int, int]] = []
_lock = threading.Lock()

# Counts the owners of a storage: tensors, views, NumPy arrays. Without it nothing is reused.
_use_count = getattr(torch._C, "_storage_Use_Count", None)


def empty_like(t: Tensor) -> Tensor:
    """``torch.empty_like``, in reused memory where that pays. Call it below autograd."""
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
    for i, (buffer, storage, alone) in enumerate(_kept):
        same = buffer.shape == t.shape and buffer.dtype == t.dtype and buffer.stride() == t.stride()
        if same and _use_count(storage) == alone:
            _kept.append(_kept.pop(i))
            return buffer.view_as(buffer)
    buffer = torch.empty_like(t)
    storage = buffer.untyped_storage()._cdata
    kept = nbytes + sum(b.numel() * b.element_size() for b, _, _ in _kept)
    while _kept and (len(_kept) >= MOST or kept > LARGEST_TOTAL):
        oldest = _kept.pop(0)[0]
        kept -= oldest.numel() * oldest.element_size()
    # A dense layout only: empty_like of a strided tensor would not be found again by its strides.
    if buffer.stride() == t.stride():
        _kept.append((buffer, storage, _use_count(storage)))
        return buffer.view_as(buffer)
    return buffer


def clear() -> None:
    """Give the kept memory back to the system."""
    with _lock:
        _kept.clear()
