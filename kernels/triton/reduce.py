"""Finishing a sum in the launch that made its parts, in a fixed order and without float atomics."""

import triton
import triton.language as tl


@triton.jit
def is_last_program(counter_ptr):
    """Take a ticket; true in the program that takes the last one.

    That program sees every store that the others made before taking theirs. It leaves the counter
    at zero for the next launch.
    """
    # Every thread's stores come before the barrier, and the ticket releases them to the GPU.
    tl.debug_barrier()
    ticket = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    last = ticket == tl.num_programs(0) - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def sum_partials(partial_ptr, count, BLOCK: tl.constexpr):
    """The sum of ``count`` partial results that other programs wrote."""
    offsets = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], partial_ptr.dtype.element_ty)
    for start in range(0, count, BLOCK):
        index = start + offsets
        # .cg reads the L2 cache: this SM's L1 does not see what other SMs wrote.
        total += tl.load(partial_ptr + index, index < count, 0.0, cache_modifier=".cg")
    return tl.sum(total)
