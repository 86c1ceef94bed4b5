"""Launch configurations: a tile of rows and columns per program, by closed-form heuristics."""

import functools
from dataclasses import dataclass

_WARPS = 4


def _pow2(n: int) -> int:
    """The smallest power of two that is at least n, and at least 1."""
    return 1 << max(n - 1, 0).bit_length()


def _vector(itemsize: int, align: int) -> int:
    """Neighbouring elements that a thread holds: 16 bytes, or 4 elements if rows begin elsewhere.

    Noise comes in fours, or in twos of fp64.
    """
    vec = 16 // itemsize
    return vec if align >= vec else min(vec, 4)


@dataclass(frozen=True)
class LatentConfig:
    """A program of the latent pass owns ``rows`` rows and walks them in steps of a few tiles.

    Attributes:
        rows, cols: the tile, powers of two; it has one vector of each thread, or several rows.
        tiles: tiles side by side in a step, a power of two.
        vec: neighbouring elements a thread holds.
        steps: steps that walk the row.
        even: the steps cover the row exactly, so no column needs a mask.
        num_warps: warps per program.
    """

    rows: int
    cols: int
    tiles: int
    vec: int
    steps: int
    even: bool
    num_warps: int


@functools.lru_cache(maxsize=4096)
def latent_config(
    rows: int, size: int, itemsize: int, align: int, sms: int, warp: int
) -> LatentConfig:
    """Tile for ``rows`` rows of ``size`` elements whose narrowest tensor has ``itemsize`` bytes.

    Args:
        align: what divides all rows' first elements: see ``launch.alignment``.
        sms, warp: multiprocessors of the GPU, and threads in a warp.
    """
    vec, each = _vector(itemsize, align), 4 if itemsize == 8 else 16
    # One warp still spans such a row in bf16, with fewer instructions to an element.
    if itemsize == 2 and align >= vec and warp * each < size <= 2 * warp * each:
        each *= 2
    # One warp to a program while a thread's ``each`` elements let it span the row: sums then need
    # neither shared memory nor a barrier.
    num_warps = min(_pow2(-(-size // (warp * each))), _WARPS)
    if itemsize < 8 and num_warps == _WARPS and not 0.75 < size / (_WARPS * warp * each) <= 1:
        # A loop over the row wants few registers, and no lanes without an element: in bf16, rows of
        # 3072 moved 1.4 times as fast on an H200.
        num_warps, each = _WARPS // 2, each // 2
    threads = num_warps * warp
    # A thread's elements lie in one row as far as may be, so that they share their addresses and
    # are summed before anything crosses threads; but a tile's row is at least a 128-byte line, or
    # half a row, or a 32-byte sector.
    whole, line = _pow2(size), 128 // itemsize
    cols = max(whole * vec // each, min(line, whole // 2), line // 4)
    cols = min(cols, max(whole, vec), threads * vec)
    tiles = min(_pow2(-(-size // cols)), each // vec)
    # Short rows: several to a thread, unless the multiprocessors would then be short of programs.
    tile_rows = threads * vec // cols
    each //= vec * tiles
    if align < vec:  # each element has an address of its own
        each //= 2
    while each > 1 and rows >= 8 * sms * tile_rows:
        tile_rows, each = tile_rows * 2, each // 2
    return LatentConfig(
        rows=tile_rows,
        cols=cols,
        tiles=tiles,
        vec=vec,
        steps=-(-size // (cols * tiles)),
        even=size % (cols * tiles) == 0,
        num_warps=num_warps,
    )


@dataclass(frozen=True)
class LikelihoodConfig:
    """A program of the likelihood pass owns some rows, or a part of one row.

    Attributes:
        rows, cols: the tile, powers of two; it has one vector of each thread, or several rows.
        tiles: tiles side by side in a step, a power of two.
        vec: neighbouring elements a thread holds.
        steps: steps that walk the program's part of a row.
        passes: times ``rows`` that a program owns, so that few partial sums are left at the end.
        split: programs that share one row, for few and long rows; a power of two, unless a program
            owns a step of columns.
        even: the steps cover the row exactly, so no column needs a mask.
        num_warps: warps per program.
        programs: size of the grid.
    """

    rows: int
    cols: int
    tiles: int
    vec: int
    steps: int
    passes: int
    split: int
    even: bool
    num_warps: int
    programs: int


@functools.lru_cache(maxsize=4096)
def likelihood_config(
    rows: int,
    size: int,
    itemsize: int,
    align: int,
    sms: int,
    warp: int,
    heavy: int = 0,
    columns: bool = False,
    sums: bool = True,
    most: int | None = 32,
    grad: bool = False,
) -> LikelihoodConfig:
    """Tile for ``rows`` rows of ``size`` elements whose narrowest tensor has ``itemsize`` bytes.

    Args:
        align: what divides all rows' first elements: see ``launch.alignment``.
        sms, warp: multiprocessors of the GPU, and threads in a warp.
        heavy: how often a thread's elements must be halved, for the registers of the arithmetic.
        columns: a program owns one step of its rows, to sum each column over them.
        sums: each row is summed.
        most: programs for each multiprocessor, of which more would only lengthen a sum over their
            parts, or look in vain whether there is anything to do.
        grad: gradients are written.
    """
    vec = _vector(itemsize, align)
    light = heavy == 0
    heavy += align < vec  # each element has an address of its own
    # 16 elements a thread and step keep enough loads in flight; 4 in fp64, for the registers.
    each = max((4 if itemsize == 8 else 16) >> heavy, min(vec, 4))
    vec = min(vec, each)
    tiles = each // vec
    # With plenty of rows each warp takes one to itself and sums it by shuffles alone; else, and
    # where there is nothing to sum, the program's warps share one.
    plenty = (sums or columns) and rows >= 8 * sms
    # Eight warps leave half the parts; but in bf16, gradients wait for them (measured on an H200).
    wide = plenty and light and rows >= 64 * sms and not columns
    wide = wide and itemsize in ((4,) if grad else (2, 4))
    warps = 2 * _WARPS if wide else _WARPS
    cols = min(max(_pow2(size), vec), (1 if plenty else warps) * warp * vec)
    tiles = min(tiles, _pow2(-(-size // cols)))
    tile_rows = min(warps * warp * vec // cols, _pow2(rows))
    while tile_rows > 1 and rows < 2 * sms * tile_rows:
        tile_rows //= 2
    enough = 4 * sms  # programs for every multiprocessor to hold several
    row_tiles = -(-rows // tile_rows)
    steps = -(-size // (cols * tiles))
    if columns:
        # Each block of rows leaves a row of sums: with 16 rows to a block, little beside the data.
        split, steps = max(steps, 1), 1
        passes = max(-(-row_tiles * split // (2 * enough)), -(-16 // tile_rows))
    else:
        split = 1
        while split < steps and row_tiles * split < enough:
            split *= 2
        steps = -(-steps // split)
        # A heavy likelihood has no registers for this loop, and hides a longer sum.
        passes = -(-row_tiles // (most * sms)) if most and split == 1 and light else 1
    return LikelihoodConfig(
        rows=tile_rows,
        cols=cols,
        tiles=tiles,
        vec=vec,
        steps=steps,
        passes=passes,
        split=split,
        even=size == split * steps * tiles * cols,
        num_warps=max(1, min(warps, tile_rows * cols // (vec * warp))),
        programs=-(-row_tiles // passes) * split,
    )
