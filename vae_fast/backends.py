"""Which implementation of the ops runs where, why another does not, and how to choose.

===========  ==================================  ===========================================
backend      serves                              needs
===========  ==================================  ===========================================
``cpp``      CPU                                 a C++ compiler once, or a wheel built with one
``triton``   CUDA and ROCm                       Triton, which PyTorch brings on those platforms;
                                                 on the CPU only with ``TRITON_INTERPRET=1``
``reference``  every device                      nothing: plain PyTorch with autograd
===========  ==================================  ===========================================

The default for a device is the fastest that runs there. ``VAE_FAST_BACKEND`` in the environment or
:func:`use_backend` force one for all devices.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import platform
import sys
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import torch

from vae_fast import _build, buffers, eager, ops

__all__ = ["BACKENDS", "report", "use_backend"]

BACKENDS = ("cpp", "triton", "reference")
DEFAULTS = {"cpu": "cpp", "cuda": "triton"}  # by device type; elsewhere the reference

# The backend forced by use_backend() or the environment, for every device.
_forced: str | None = os.environ.get("VAE_FAST_BACKEND") or None

# The contexts of use_backend() that are open: what each forces, and what held before the first.
_open: list[list[str | None]] = []
_lock = threading.Lock()  # of what is forced, and of what serves

# Backend by (forced, device type), once it has been found to run.
_resolved: dict[tuple[str | None, str], str] = {}

# Why the default backend of a device type could not be loaded, where it could not.
_failures: dict[str, str] = {}

# eager.cpp, once a fused backend is loaded, if it can be had.
_shortcut: ModuleType | None = None

# The Triton launchers' registrations by dispatch key; dropping one restores what was there before.
_triton_library: dict[str, torch.library.Library] = {}


class FallbackWarning(UserWarning):
    """A faster backend is missing, and the reference runs in its place."""


def backend_for(device_type: str) -> str:
    """The backend that serves a device now; loads it at its first use.

    Raises:
        ValueError: the forced backend has an unknown name.
        RuntimeError: the forced backend cannot serve the device; says why.
    """
    if torch.compiler.is_compiling():
        return _resolve(_forced, device_type)
    name = _resolved.get((_forced, device_type))
    return name if name is not None else _resolve(_forced, device_type)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend for all devices and threads while the context is open.

    Backward passes must run inside the context too.

    Args:
        name: ``"cpp"``, ``"triton"`` or ``"reference"``.

    Raises:
        ValueError: ``name`` is unknown.
        RuntimeError: the backend runs on no device of this machine; says why.
    """
    _check_name(name, "name")
    reasons = {d: why_not(name, d) for d in _device_types()}
    if all(reasons.values()):
        why = "; ".join(f"{d}: {r}" for d, r in reasons.items())
        raise RuntimeError(f"backend {name!r} cannot run on this machine ({why})")
    with _lock:
        outside = _open[0][1] if _open else _forced  # what holds once all contexts are closed
        context = [name, outside]
        _open.append(context)
    try:
        with _lock:
            _force(name)
        yield
    finally:
        with _lock:  # contexts of other threads may close in any order
            _open[:] = [other for other in _open if other is not context]
            _force(_open[-1][0] if _open else outside)


def _force(name: str | None) -> None:
    global _forced
    _forced = name
    _serve()


def why_not(name: str, device_type: str) -> str | None:
    """Why a backend cannot serve a device, or ``None`` if it can (as far as is known unloaded)."""
    if name == "reference":
        return None
    if name == "cpp":
        if device_type != "cpu":
            return "the C++ kernels are for the CPU"
        return None if _build.find() is not None else _build.can_build()
    if device_type not in ("cpu", "cuda"):
        return "the Triton kernels are for CUDA and ROCm devices"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton runs on the CPU only under TRITON_INTERPRET=1, for tests"
    if device_type == "cuda" and not torch.cuda.is_available():
        return "no CUDA or ROCm device is available"
    return None


@torch.compiler.assume_constant_result
def _resolve(forced: str | None, device_type: str) -> str:
    if forced is None:
        name = _load_default(device_type)
    else:
        _check_name(forced, "VAE_FAST_BACKEND")
        reason = why_not(forced, device_type)
        if reason is not None:
            raise RuntimeError(f"backend {forced!r} cannot serve device {device_type!r}: {reason}")
        _load(forced, device_type)
        name = forced
    _resolved[forced, device_type] = name
    return name


def _load_default(device_type: str) -> str:
    name = DEFAULTS.get(device_type, "reference")
    reason = _failures.get(device_type) or why_not(name, device_type)
    if reason is None:
        try:
            _load(name, device_type)
            return name
        except (_build.BuildError, ImportError) as error:
            reason = str(error)
    _failures[device_type] = reason
    # Once per device type, since the outcome is remembered.
    warnings.warn(
        f"vae_fast runs on the slower reference backend on {device_type!r}: backend {name!r} is "
        f"missing ({reason}). `vae-fast doctor` tells more.",
        FallbackWarning,
        stacklevel=_user_stacklevel(),
    )
    return "reference"


def _load(name: str, device_type: str) -> None:
    if name == "cpp":
        with ThreadPoolExecutor(1) as pool:
            path = pool.submit(_build.build_eager)  # beside the kernels, if both must be built
            _build.load()
        _load_shortcut(path.result())
    elif name == "triton":
        with _lock:
            _register_triton(device_type.upper())
        _load_shortcut(_build.build_eager())
        if device_type == "cuda" and _shortcut is not None:
            with _lock:
                _repeat_launches()


@functools.cache
def _repeat_launches() -> None:
    """Let the ops launch again on a GPU, without Python, what was launched before."""
    launchers = _launchers()
    repeat = importlib.import_module("vae_fast._triton.repeat")
    if addresses := repeat.driver():
        with _overriding():
            _shortcut.repeat("CUDA", launchers.__all__, repeat.learn, *addresses)


def _load_shortcut(path: Path | None) -> None:
    global _shortcut
    with _lock:
        if _shortcut is None and path is not None:
            _shortcut = _build.load_eager(path, buffers.empty_like, buffers.SMALLEST, ops.AUTOGRAD)
        _serve()


def _serve() -> None:
    """Let the CPU's ops, and the shortcut to fused kernels, follow what is forced, if anything."""
    interpreted = _forced == "triton" and why_not("triton", "cpu") is None
    if interpreted:
        _register_triton("CPU")
    elif library := _triton_library.pop("CPU", None):
        library._destroy()
    if _shortcut is not None:
        cpp, cuda = _forced in (None, "cpp"), _forced in (None, "triton")
        cuda = cuda and "CUDA" in _triton_library
        _shortcut.serve(_build.passes_address(), cpp, interpreted, cuda)
    eager.use_shortcut(None if _forced == "reference" else _shortcut)


def _register_triton(dispatch_key: str) -> None:
    """Make the Triton launchers the kernels of the ops for one dispatch key."""
    if dispatch_key in _triton_library:
        return
    launchers = _launchers()
    library = torch.library.Library("vae_fast", "IMPL")
    with _overriding():  # on the CPU the C++ kernels, until it is undone
        for name in launchers.__all__:
            library.impl(name, getattr(launchers, name), dispatch_key, allow_override=True)
    _triton_library[dispatch_key] = library


def _load_and_call(name: str, *args: object) -> object:
    """An op's kernel where no backend is loaded: an exported program may be the first caller."""
    device_type = next(arg.device.type for arg in args if isinstance(arg, torch.Tensor))
    backend = DEFAULTS.get(device_type, "reference")
    reason = f"none are for {device_type!r}"
    if backend != "reference":
        reason = why_not(backend, device_type)
    if reason is None:
        try:
            _load(backend, device_type)
            return getattr(torch.ops.vae_fast, name).default(*args)
        except (_build.BuildError, ImportError) as error:
            reason = str(error)
    raise RuntimeError(f"vae_fast::{name} needs the fused kernels: {reason}")


_before_loading = torch.library.Library("vae_fast", "IMPL")
for _name in ops.SCHEMAS:
    if not torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"vae_fast::{_name}", "CPU"):
        _before_loading.impl(
            _name, functools.partial(_load_and_call, _name), "CompositeExplicitAutograd"
        )


def _launchers() -> ModuleType:
    """The package of the Triton kernels; in a checkout that is not installed, beside this one."""
    name = "vae_fast._triton"
    folder = Path(__file__).resolve().parent.parent / "kernels" / "triton"
    if importlib.util.find_spec(name) is None and folder.is_dir():
        spec = importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return importlib.import_module(name)


@contextlib.contextmanager
def _overriding() -> Iterator[None]:
    """Without PyTorch's warning that an op gets another kernel: it is on purpose."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*other operators may also be overridden")
        yield


def _check_name(name: object, argument: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{argument} must be one of {', '.join(BACKENDS)}; got {name!r}")


def _device_types() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _user_stacklevel() -> int:
    """The stacklevel, counted from the caller, of the first frame outside this package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("vae_fast"):
        level, frame = level + 1, frame.f_back
    return level


def report() -> dict:
    """What runs here: versions, the backend of each device and why not another, the C++ build.

    Returns:
        A dict with ``versions`` (name to version), ``devices`` (a list of ``device``, ``backend``
        (``None`` where the forced one cannot serve it, for a ``reason``) and ``others``, a dict
        from backend to the reason that it does not serve the device) and
        ``extension`` (``status``, ``path``, ``origin``, ``compiler``, ``flags``, ``seconds``,
        ``eager calls``).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        devices = []
        for device_type in _device_types():
            known = (_forced, device_type) in _resolved
            try:
                backend, reason = backend_for(device_type), None
            except (ValueError, RuntimeError, ImportError) as error:  # what is forced cannot be
                backend, reason = None, str(error)
            if not known and _forced is None and device_type in _failures:
                _resolved.pop((None, device_type), None)  # whoever computes there is to be warned
            devices.append(
                {
                    "device": device_type,
                    "name": torch.cuda.get_device_name() if device_type == "cuda" else _cpu_name(),
                    "backend": backend,
                    "reason": reason,
                    "others": {n: _why_other(n, device_type) for n in BACKENDS if n != backend},
                }
            )
    return {"versions": _versions(), "devices": devices, "extension": _extension()}


def _why_other(name: str, device_type: str) -> str:
    """Why a backend does not serve a device now."""
    failed = _failures.get(device_type) if name == DEFAULTS.get(device_type) else None
    spare = "available, slower" if _forced is None else f"available, but {_forced} is forced"
    return failed or why_not(name, device_type) or spare


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("vae_fast", "torch", "triton", "numpy"):
        try:
            versions[name] = getattr(importlib.import_module(name), "__version__", "unknown")
        except ImportError:
            versions[name] = None
    return versions


def _extension() -> dict:
    try:
        info = _build.load()
    except _build.BuildError as error:
        return {"status": "not available", "reason": str(error)}
    if _forced == "reference":
        eager_calls = "none, reference is forced"
    else:
        why = _build.why_no_eager()
        eager_calls = "in C++" if _shortcut else f"in Python: {why}" if why else "in Python"
    return {
        "status": "loaded",
        "path": str(info.path),
        "origin": info.origin,
        "compiler": info.compiler,
        "flags": " ".join(info.flags),
        "seconds": info.seconds,
        "eager calls": eager_calls,
    }


def _cpu_name() -> str:
    return f"{platform.machine()}, {torch.get_num_threads()} threads"
