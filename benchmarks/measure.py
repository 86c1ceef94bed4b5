"""How steps are measured: time in turns, copy bandwidth, memory."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import itertools
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from saved import is_ours
from torch._inductor.cpu_vec_isa import pick_vec_isa

import vae_fast
from vae_fast import _build, buffers

TURNS = 5  # of each implementation, so that whatever else the machine does slows all of them
WARM_UP = 2  # steps at the start of a turn that are not timed
MOST = 100  # timed steps in a turn
FAR = 3  # times the best peer's time: a peer that takes more, and longer than a turn, has only one

Step = Callable[[], object]


class Wrong(AssertionError):
    """A result that is not right: whoever made it is not timed."""


class Clock:
    """Times steps on a device.

    On a GPU the seconds are those between events before and after the step, with the steps queued
    one behind the other: the device's time, or the host's where it cannot keep up.
    """

    def __init__(self, device: str, reset: Callable[[], None] = lambda: None) -> None:
        self.device, self.cuda, self.reset = device, device.startswith("cuda"), reset

    def turn(self, step: Step, budget: float) -> tuple[list[float], list[float]]:
        """Seconds of each timed step, and the host's share of them, for ``budget`` seconds."""
        for _ in range(WARM_UP):
            self.reset()
            first = time.perf_counter()
            results = step()
            self.wait()
            once = time.perf_counter() - first
            del results
            if once > budget / 10:  # whoever takes this long has nothing left to warm up
                break
        seconds, host, events = [], [], []
        for _ in range(max(1, min(MOST, int(budget / once)))):
            self.reset()
            if self.cuda:
                events.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
                events[-1][0].record()
            start = time.perf_counter()
            results = step()
            host.append(time.perf_counter() - start)
            if self.cuda:
                events[-1][1].record()
            del results  # outside the clock
        self.wait()
        seconds = [start.elapsed_time(end) / 1e3 for start, end in events] if self.cuda else host
        return seconds, host

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def replayed(self, step: Step, check: Callable[[Step], None], times: int = 20) -> float | None:
        """Seconds of a step replayed as a CUDA graph, ``times`` in a row: no host at all.

        None if it can't be one, or if ``check`` finds what replays give wrong.
        """
        if not self.cuda:
            return None
        try:
            self.reset()
            step()  # which may compile
            self.wait()
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side), no_waiting():
                for _ in range(3):
                    self.reset()
                    step()
            torch.cuda.current_stream().wait_stream(side)
            self.reset()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                results = step()

            def replay():
                graph.replay()
                return results

            check(replay)
            seconds = []
            for _ in range(TURNS):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                for _ in range(times):
                    graph.replay()
                end.record()
                self.wait()
                seconds.append(start.elapsed_time(end) / 1e3 / times)
        except Exception:  # whoever cannot run is told so where it is checked
            self.wait()
            # A generator does not forget a capture that failed.
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            generator.graphsafe_set_state(torch.Generator("cuda").graphsafe_get_state())
            return None
        return statistics.median(seconds)


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Raise where the host waits for the GPU: who does that cannot be captured."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Copy:
    """A copy between tensors larger than caches: what a step's bytes are compared with.

    Args:
        nbytes: of each of the two; by default as many as the last cache holds, and at least
            512 MiB on a GPU, 128 MiB on a CPU.
    """

    def __init__(self, device: str, nbytes: int | None = None) -> None:
        least = 1 << 29 if device.startswith("cuda") else 1 << 27
        nbytes = nbytes or max(least, last_level_cache(device))
        self.source = torch.ones(nbytes // 4, device=device)
        self.target = torch.zeros_like(self.source)

    def __call__(self) -> None:
        self.target.copy_(self.source)

    def bandwidth(self, seconds: list[float]) -> float:
        """Bytes per second, read and written, from the times of some copies."""
        return 2 * self.source.nbytes / statistics.median(seconds)


def has_graph(name: str, device: str) -> bool:
    """Whether an implementation replays a CUDA graph of its own, which nothing can look into."""
    return device.startswith("cuda") and name.endswith(("CUDA graphs", "max-autotune"))


def verdict(check: Callable[[], None]) -> Wrong | None:
    """What ``check`` has against a step."""
    try:
        check()
    except Exception as why:  # what cannot run, on a GPU say, must not take the others with it
        return why if isinstance(why, Wrong) else Wrong(f"{type(why).__name__}: {why}")
    return None


def race(
    steps: dict[str, Step],
    checks: dict[str, Callable[[], None]],
    clock: Clock,
    budget: float,
    others: Callable[[str, float, float], dict],
) -> dict[str, dict | Wrong]:
    """What each step did: its facts, or why it is wrong.

    Args:
        steps: by the names of the implementations.
        checks: what raises Wrong unless the step's results are right.
        clock: what times them.
        budget: seconds to time each step for, in all its turns; 0 to check alone. A peer that takes
            longer than one turn is meant to, and FAR times as long as another, has no further one.
        others: further facts of a step, from its name, its median, and the bandwidth of copies that
            took turns with the steps, since other users of a machine have a part of it.
    """
    results: dict[str, dict | Wrong] = {n: verdict(check) or {} for n, check in checks.items()}
    right = [name for name, result in results.items() if result == {}]
    if not budget:
        return results
    turns = {name: [] for name in right}
    copy, copies = Copy(clock.device), []

    def take_turn(name):
        turns[name].append(clock.turn(steps[name], budget / TURNS))

    def conclude(name, bandwidth):
        checks[name]()  # again, for what later calls do otherwise
        seconds, host = zip(*turns[name], strict=True)
        median = statistics.median(itertools.chain(*seconds))
        facts = others(name, median, bandwidth)
        results[name] = {"turns": seconds, "host": min(map(min, host)), **facts}

    going = right
    for _ in range(TURNS):
        for name in going:
            results[name] = results[name] or verdict(partial(take_turn, name)) or {}
        copies += Clock(clock.device).turn(copy, budget / TURNS)[0]
        peers = [name for name in going if turns[name] and not is_ours(name)]
        first = {name: min(turns[name][0][0]) for name in peers}
        limit = max(budget / TURNS, FAR * min(first.values(), default=0.0))
        going = [name for name in going if first.get(name, 0.0) <= limit]
    bandwidth = copy.bandwidth(copies)
    del copy
    for name in right:
        if results[name] == {} and (wrong := verdict(partial(conclude, name, bandwidth))):
            results[name] = wrong
    return results


def peak_bytes(step: Step, device: str) -> int:
    """The most memory that PyTorch's allocator held for a step at once, beyond its inputs."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    buffers.clear()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def memory(step: Step, inputs: list, device: str, closed: bool) -> dict[str, int | None]:
    """``peak``, see :func:`peak_bytes`, None if ``closed``: nothing can look into the step; and
    ``saved``, bytes kept from the forward pass for the backward pass, beyond ``inputs``.
    """
    own = {t.untyped_storage().data_ptr() for t in inputs}
    saved: dict[int, int] = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return t

    peak = None
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        if closed:
            step()
        else:
            peak = peak_bytes(step, device)
    return {"peak": peak, "saved": sum(saved.values())}


@functools.cache
def last_level_cache(device: str) -> int:
    """Bytes; 32 MiB where nobody says."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text.rstrip("KM")) * {"K": 1 << 10, "M": 1 << 20}.get(text[-1], 1))
    return max(sizes) or 32 << 20


@functools.cache
def machine(device: str) -> dict[str, object]:
    """What the figures depend on."""
    kind = device.split(":")[0]
    facts = {
        "device": kind,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "vae_fast": vae_fast.__version__,
        "backend": vae_fast.backends.backend_for(kind),
        "compiler": _build.find_compiler()[1],
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "copy GB/s": round(_copy_bandwidth(device) / 1e9, 1),
        "cache MiB": round(last_level_cache(device) / 2**20, 1),
    }
    git, code = ("git", "-C", str(Path(__file__).resolve().parent.parent)), ("vae_fast", "kernels")
    if commit := _output(*git, "log", "-1", "--format=%h", "--", *code):
        changed = _output(*git, "status", "--porcelain", "--", *code)
        facts["commit"] = f"{commit} and changes" if changed else commit
    if malloc := [f"{k}={v}" for k, v in os.environ.items() if k.startswith("MALLOC_")]:
        facts["malloc"] = " ".join(malloc)  # page faults are a part of the times
    if importlib.util.find_spec("triton"):
        facts["triton"] = importlib.import_module("triton").__version__
    if kind == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
        facts["cuda"] = torch.version.cuda or torch.version.hip
        query = ("--query-gpu=driver_version", "--format=csv,noheader")
        facts["driver"] = _output("nvidia-smi", *query).split("\n")[0]  # a line for each GPU
    else:
        # torch.compile's code is scalar, and no fair peer, where its test for vectors fails.
        facts["torch.compile's vectors"] = str(pick_vec_isa()) or "none"
    return facts


def _copy_bandwidth(device: str) -> float:
    copy = Copy(device)
    return copy.bandwidth(Clock(device).turn(copy, 1.0)[0])


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""
