"""Launches that ``eager.cpp`` repeats without Python.

A launcher works out its one launch from what is known of its arguments but for values and
addresses: layouts, options, and what begins at a multiple of 16 bytes. Where such arguments come
again, so does the launch, only with other addresses; to send it off from Python takes longer than a
small kernel runs.
"""

import ctypes
import logging
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from triton.compiler import CompiledKernel

from . import importance, kl, latent, likelihood
from .launch import Seen, is_shared, seen

logger = logging.getLogger("vae_fast.triton")

# What a parameter of a kernel is: a tensor among the op's arguments or its results, one that is
# kept for all launches, the argument beta, or a number.
INPUT, OUTPUT, KEPT, BETA, NUMBER = range(5)

_FORMATS = {"i32": "<i4x", "i64": "<q", "fp32": "<f4x", "fp64": "<d"}  # in 8 bytes
_UNUSUAL = "global_scratch_size", "profile_scratch_size", "launch_cooperative_grid", "launch_pdl"
_MODULES = latent, likelihood, kl, importance
_kernels: dict[int, CompiledKernel] = {}  # by handle, which must not outlive its kernel


def learn(op: str, *arguments: object) -> tuple[tuple[Tensor, ...], tuple[Any, ...] | None]:
    """Run the launcher of an op.

    Returns:
        Its results, and what repeats its launch, if that is all there is to it: the kernel's
        handle, the grid, threads of a program, bytes of shared memory, the name of its range, its
        parameters (what they are, and which or how much), and the tensors that are kept.
    """
    launcher = next(getattr(module, op) for module in _MODULES if hasattr(module, op))
    with seen() as launches:
        results = launcher(*arguments)
    results = results if isinstance(results, tuple) else (results,)
    try:
        return results, _described(launches, arguments, results)
    except (AttributeError, KeyError, struct.error) as error:  # of another Triton
        logger.info("%s is launched from Python: %r", op, error)
        return results, None


def _described(
    launches: Sequence[Seen], arguments: Sequence[object], results: Sequence[Tensor]
) -> tuple[Any, ...] | None:
    if len(launches) != 1 or not isinstance(launches[0].compiled, CompiledKernel):
        return None
    launch, name, compiled, tensors, values = launches[0]
    metadata = compiled.metadata
    if metadata.target.backend != "cuda" or metadata.num_ctas != 1:
        return None
    if any(getattr(metadata, n, None) for n in _UNUSUAL) or not all(map(_is_fresh, results)):
        return None
    known = [(t, (INPUT, i)) for i, t in enumerate(arguments) if isinstance(t, Tensor)]
    known += [(t, (OUTPUT, i)) for i, t in enumerate(results)]
    places = {id(t): place for t, place in known}
    if len(places) < len(known):  # one tensor in two places, that may be two tensors next time
        return None
    parameters, kept, written = [], [], set()
    given = *tensors, *launch.sizes, *values
    signature = list(compiled.src.signature.items())[: len(given)]  # without the constants
    for (parameter, kind), value in zip(signature, given, strict=True):
        if kind == "constexpr":
            continue
        if isinstance(value, Tensor):
            place = places.get(id(value))
            if place is None:
                if not is_shared(value):  # a copy, or what still has to be summed or moved
                    return None
                place = KEPT, len(kept)
                kept.append(value)
            written.add(place)
        elif parameter == "beta":
            place = BETA, 0
        else:
            number = struct.pack(_FORMATS[kind], value)
            place = NUMBER, int.from_bytes(number, "little", signed=True)
        parameters.append(place)
    if any(t.numel() and (OUTPUT, i) not in written for i, t in enumerate(results)):
        return None
    threads = metadata.num_warps * metadata.target.warp_size
    handle, shared = compiled.function, metadata.shared
    _kernels[handle] = compiled
    return handle, launch.grid[0], threads, shared, name, parameters, tuple(kept)


def _is_fresh(t: Tensor) -> bool:
    """Whether an allocation of its own would do as well."""
    return t.storage_offset() == 0 and t.untyped_storage().nbytes() == t.numel() * t.element_size()


def driver() -> tuple[int, int] | None:
    """Addresses of CUDA's cuLaunchKernel, and of what tells torch's current stream."""
    if torch.version.hip is not None:
        return None
    folder = Path(torch.__file__).parent / "lib"
    try:
        launch = ctypes.CDLL("libcuda.so.1").cuLaunchKernel
        stream = ctypes.CDLL(str(folder / "libtorch_cuda.so")).aoti_torch_get_current_cuda_stream
    except (OSError, AttributeError) as error:
        logger.info("kernels are launched from Python: %s", error)
        return None
    return tuple(ctypes.cast(f, ctypes.c_void_p).value for f in (launch, stream))
