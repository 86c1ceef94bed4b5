"""Launches that ``eager.cpp`` repeats without Python.

A launcher works out its one launch from what is known of its arguments but for values and
addresses: layouts, options, and what begins at a multiple of 16 bytes. Where such arguments come
again, so does the launch, only with other addresses; to send it off from Python takes longer than a
small kernel runs. Hooks that Triton calls at each launch (Proton's) do not see it. No launcher may
call another op, whose launch might be repeated unseen.
"""

import ctypes
import logging
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from triton import knobs
from triton.compiler import CompiledKernel

from .launch import Seen, is_shared_scratch, seen

logger = logging.getLogger("vae_fast.triton")

# What a parameter of a kernel is, as in eager.cpp: a tensor among the op's arguments or its
# results, one that is kept for all launches, an argument that may change, or a number.
INPUT, OUTPUT, KEPT, DOUBLE, INTEGER, NUMBER = range(6)

_CHANGING = {"beta": (("fp64",), DOUBLE), "first_row": (("i32", "i64"), INTEGER)}
_FORMATS = {"i32": "<i4x", "i64": "<q", "fp32": "<f4x", "fp64": "<d"}  # in 8 bytes
_UNUSUAL = (
    *("global_scratch_size", "profile_scratch_size", "launch_cooperative_grid", "launch_pdl"),
    "instrumentation_mode",
)
_kernels: dict[int, CompiledKernel] = {}  # by handle, which must not outlive its kernel

NEVER, NOT_NOW = None, False


def learn(op: str, wanted: bool, *arguments: object) -> tuple[tuple[Tensor, ...], Any]:
    """Run the launcher of an op.

    Returns:
        Its results, and if ``wanted``, what repeats its launch, if that is all there is to it: the
        kernel's handle, the grid, threads of a program, bytes of shared memory, the name of its
        range, its parameters (what they are, and which or how much), and the tensors that are
        kept. Else ``NEVER``; or ``NOT_NOW``, where chance decided.
    """
    launcher = getattr(sys.modules[__package__], op)
    if not wanted:
        results = launcher(*arguments)
        return results if isinstance(results, tuple) else (results,), NOT_NOW
    before = _versions(arguments)
    with seen() as launches:
        results = launcher(*arguments)
    results = results if isinstance(results, tuple) else (results,)
    try:
        # A version that changed is an operation of PyTorch's, beside the launch.
        if _versions(arguments) != before or any(_versions(results)):
            return results, NEVER
        return results, _described(op, launches, arguments, results)
    except Exception as error:  # of another Triton, say; the op itself is done
        logger.info("%s is launched from Python: %r", op, error)
        return results, NEVER


def _versions(tensors: Sequence[object]) -> list[int]:
    tensors = [t for t in tensors if isinstance(t, Tensor)]
    return [0 if t.is_inference() else t._version for t in tensors]


def _described(
    op: str, launches: Sequence[Seen], arguments: Sequence[object], results: Sequence[Tensor]
) -> Any:
    if len(launches) != 1 or not isinstance(launches[0].compiled, CompiledKernel):
        return NEVER
    launch, name, compiled, tensors, values = launches[0]
    metadata = compiled.metadata
    if metadata.target.backend != "cuda" or metadata.num_ctas != 1:
        return NEVER
    if any(getattr(metadata, n, None) for n in _UNUSUAL) or not all(map(_is_fresh, results)):
        return NEVER
    hook = knobs.runtime.launch_enter_hook
    if getattr(hook, "calls", hook):
        return NOT_NOW
    inputs = {i: t for i, t in enumerate(arguments) if isinstance(t, Tensor)}
    places = {id(t): (INPUT, i) for i, t in inputs.items()}
    if len(places) < len(inputs):  # one tensor in two places, that may be two tensors next time
        return NOT_NOW
    places |= {id(t): (OUTPUT, i) for i, t in enumerate(results)}
    names = [a.name for a in getattr(torch.ops.vae_fast, op).default._schema.arguments]
    parameters, kept, passed = [], [], set()
    given = *tensors, *launch.sizes, *values
    signature = list(compiled.src.signature.items())[: len(given)]  # without the constants
    for (parameter, kind), value in zip(signature, given, strict=True):
        if kind == "constexpr":
            continue
        if isinstance(value, Tensor):
            place = places.get(id(value)) or _viewed(value, inputs)
            if place is None:
                if not is_shared_scratch(value):  # a copy, or what is yet to be summed or moved
                    return NEVER
                place = KEPT, len(kept)
                kept.append(value)
            passed.add(place)
        elif parameter in _CHANGING:
            kinds, what = _CHANGING[parameter]
            index = names.index(parameter)
            if kind not in kinds or value != arguments[index]:
                return NEVER
            place = what, index
        else:
            number = struct.pack(_FORMATS[kind], value)
            place = NUMBER, int.from_bytes(number, "little", signed=True)
        parameters.append(place)
    if any(t.numel() and (OUTPUT, i) not in passed for i, t in enumerate(results)):
        return NEVER
    threads = metadata.num_warps * metadata.target.warp_size
    handle, shared = compiled.function, metadata.shared
    _kernels[handle] = compiled
    return handle, launch.grid[0], threads, shared, name, parameters, tuple(kept)


def _is_fresh(t: Tensor) -> bool:
    """Whether an allocation of its own would do as well."""
    return t.storage_offset() == 0 and t.untyped_storage().nbytes() == t.numel() * t.element_size()


def _viewed(t: Tensor, inputs: dict[int, Tensor]) -> tuple[int, int] | None:
    """The one argument of which ``t`` is another view from the same element on, if there is."""
    base = t._base
    if base is None:
        return None
    of = [i for i, given in inputs.items() if base is given or base is given._base]
    of = [i for i in of if inputs[i].data_ptr() == t.data_ptr()]
    return (INPUT, of[0]) if len(of) == 1 else None


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
