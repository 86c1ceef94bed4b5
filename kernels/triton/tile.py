"""Where the elements of a tile are."""

import triton
import triton.language as tl


@triton.jit
def multiple(n, ALIGN: tl.constexpr):
    """``n``, a multiple of ALIGN, and now known to be one: else no access would be a vector.

    Of multiples of 16 Triton knows by itself.
    """
    if ALIGN == 1 or ALIGN == 16:
        return n
    else:
        return tl.multiple_of(n & -ALIGN, ALIGN)


@triton.jit
def along(cols, stride):
    """Offsets of columns. Neighbours have a constant 1 for their stride; others need 64 bits."""
    if isinstance(stride, int):  # Triton's constant 1; it hands builtins the value
        return cols * stride
    else:
        return cols.to(tl.int64) * stride


@triton.jit
def byte_offsets(row, cols, stride, VEC: tl.constexpr):
    """Offsets of one-byte elements, which are at most VEC in a row: more would give every tensor of
    the tile a wider layout.

    Triton takes that for a promise that so many are, which only neighbours keep.
    """
    at = row + along(cols, stride)
    if isinstance(stride, int):  # Triton's constant 1
        return tl.max_contiguous(at, [1, VEC])
    else:
        return at


@triton.jit
def row_tile(row0, B, step, ROWS: tl.constexpr, COLS: tl.constexpr, TILES: tl.constexpr):
    """Row of the batch [TILES·ROWS, 1], and column [TILES·ROWS, COLS], of a step's elements."""
    i = tl.arange(0, TILES * ROWS)[:, None]
    cols = (step * TILES + i // ROWS) * COLS + tl.arange(0, COLS)[None, :]
    return clip_row(row0, i % ROWS, B).to(tl.int64), cols


@triton.jit
def clip_row(row0, r, B):
    """Row ``r`` of the program that begins with ``row0``, or the last of the B in the batch.

    Rows past the end are thus the last one over again: they store the same values to the same
    place, which costs less than masking every load and store. All in B's own dtype: while that is
    32 bits wide, an address is one widening multiplication.
    """
    return row0 + tl.minimum(r, B - 1 - row0)
