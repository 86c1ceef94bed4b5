"""The tile of a program that owns whole rows."""

import triton
import triton.language as tl


@triton.jit
def row_tile(left, step, ROWS: tl.constexpr, COLS: tl.constexpr, TILES: tl.constexpr):
    """Row within the program [TILES·ROWS, 1], and column [TILES·ROWS, COLS], of a step's elements.

    Of ``left`` rows still to come, those past the end are the last one over again: they store the
    same values to the same place, which costs less than masking every load and store.
    """
    i = tl.arange(0, TILES * ROWS)[:, None]
    cols = (step * TILES + i // ROWS) * COLS + tl.arange(0, COLS)[None, :]
    return clip_row(i % ROWS, left, ROWS), cols


@triton.jit
def clip_row(r, left, ROWS: tl.constexpr):
    """Row ``r`` of a program, or the last row of the batch, as int64."""
    return tl.minimum(r, (tl.minimum(left, ROWS) - 1).to(tl.int32)).to(tl.int64)
