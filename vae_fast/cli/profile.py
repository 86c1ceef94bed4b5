"""``vae-fast profile``: where the time and the memory of a training step go, fused and not.

A step is cut into parts: by ranges around the modules in the forward pass, and in the backward pass
by the sequence numbers of autograd's nodes, which tell what part of the forward pass made a node.
All figures are read from the very trace that is written.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import statistics
import tempfile
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import _get_sequence_nr
from torch.profiler import ProfilerActivity, record_function

import vae_fast
from vae_fast import backends, buffers
from vae_fast.cli.errors import CommandError, pick_device
from vae_fast.cli.train import _backend, _hidden, _optimizer
from vae_fast.vae import VAE

PARTS = ("encoder", "latent pass", "decoder", "likelihood pass", "optimizer")
OTHER = "other"
ROUNDS = 5

_STEP, _BACKWARD = "training step", " backward"
_NODE = "autograd::engine::evaluate_function"
#: The networks' matrix products, forward and backward.
PRODUCTS = {
    f"aten::{name}"
    for name in ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")
}
_DEVICE_TYPES = {"cpu": 0, "cuda": 1}  # as the trace has them
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver")

Event = dict[str, Any]


@dataclass
class Profile:
    """What a training step of one backend costs; seconds and bytes, by the names of the parts.

    Attributes:
        step_s: a step, without the profiler.
        times: on a GPU the time of its kernels, on a CPU that of the host. The names are those of
            :data:`PARTS`, of the same with " backward", and :data:`OTHER`: together, a step.
        host_times: the time of the host.
        products_s: what of ``times`` are matrix products.
        allocated: bytes allocated, also if they are freed at once.
        peaks: most bytes in use, besides weights, optimizer state and data.
    """

    step_s: float
    times: Mapping[str, float]
    host_times: Mapping[str, float]
    products_s: float
    allocated: Mapping[str, int]
    peaks: Mapping[str, int]


def profile(args: argparse.Namespace) -> None:
    """Run the command with parsed arguments."""
    device = pick_device(args.device)
    if device.type not in _DEVICE_TYPES:
        raise CommandError(f"--device {args.device}: only a CPU or a CUDA GPU can be profiled")
    if not torch.autograd.kineto_available():
        raise CommandError("this PyTorch was built without its profiler, Kineto")
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"--out {out}: {error.strerror}") from error
    torch.manual_seed(0)
    vae, x = _model(args, device)
    with _backend(args.backend):
        try:
            fused = backends.backend_for(device.type)
        except RuntimeError as error:
            raise CommandError(f"--backend {args.backend}: {error}") from error
    if fused == "reference":
        raise CommandError(
            "there is no fused backend to compare with the reference: choose another --backend, "
            "or see vae-fast doctor"
        )
    parameters = sum(p.numel() for p in vae.parameters())
    print(
        f"{args.model} with {parameters:,} parameters, {len(x)} random data points of "
        f"{'x'.join(map(str, args.shape))}, {args.dtype}, on {device}; {ROUNDS} rounds of "
        f"{args.steps} steps of each backend in turn"
    )
    names = {"fused": fused, "reference": "reference"}
    profiles, traces = measure(vae, x, names, args.steps, args.dtype == "bf16", args.compile)
    for name, costs in profiles.items():
        print(f"\n{_table(f'{name} ({fused})' if name == 'fused' else name, costs, x.is_cuda)}")
    print(f"\n{_summary(profiles, x.is_cuda)}")
    print("\ntraces, for https://ui.perfetto.dev:")
    for name, trace in traces.items():
        path = out / f"{name}.json.gz"
        try:
            with gzip.open(path, "wt") as file:
                json.dump(trace, file)
        except OSError as error:
            raise CommandError(f"--out {path}: {error.strerror}") from error
        print(f"  {path}")


def _model(args: argparse.Namespace, device: torch.device) -> tuple[VAE, Tensor]:
    """The model and a batch of what it takes."""
    if args.model == "conv" and len(args.shape) != 3:
        raise CommandError("--model conv needs images: --shape CxHxW")
    build = VAE.mlp if args.model == "mlp" else VAE.conv
    options = {name: getattr(args, name) for name in ("likelihood", "num_samples", "inplace")}
    vae = build(args.shape, args.latent_dim, _hidden(args), **options).to(device)
    x = torch.rand(args.batch_size, *args.shape)
    if args.likelihood == "logistic":  # which is of levels
        x = (256 * x).to(torch.uint8)
    return vae.train(), x.to(device)


# ---------------------------------------------------------------- measuring


def measure(
    vae: VAE, x: Tensor, names: Mapping[str, str], steps: int, bf16: bool, compiled: bool
) -> tuple[dict[str, Profile], dict[str, Event]]:
    """Profile training steps of ``vae``, which are made, on ``x``.

    Args:
        vae: the model.
        x: one batch.
        names: the backends, by what to call them.
        steps: steps of each backend in a turn; there are :data:`ROUNDS` turns.
        bf16: run the networks under autocast.
        compiled: run the networks under torch.compile.

    Returns:
        Profiles and traces by the keys of ``names``. A trace is the JSON of Chrome's trace format,
        of the backend's last turn.

    Raises:
        CommandError: the backends do not agree on the loss, or the profiler does not see the GPU.
    """
    optimizer = _optimizer(vae, 1e-6)  # the model stays what it is, or nearly

    def forward(key: Tensor | None = None) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            return vae(x, key=key).loss

    def step() -> None:
        with record_function(_STEP):
            loss = forward()
            loss.backward()
            with record_function("optimizer"):
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

    def turn(name: str, count: int) -> float:
        """Seconds that the steps took; to change the backend is not a part of them."""
        with vae_fast.use_backend(names[name]), record_function(name):
            began = time.perf_counter()
            for _ in range(count):
                step()
            if x.is_cuda:
                torch.cuda.synchronize(x.device)
            return time.perf_counter() - began

    key = torch.tensor([0, 0], dtype=torch.uint64).to(x.device)
    _check_losses(names, lambda: forward(key), 1e-2 if bf16 else 1e-4)
    if compiled:
        vae.encoder, vae.decoder = torch.compile(vae.encoder), torch.compile(vae.decoder)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(ROUNDS + 1):
        for name, taken in seconds.items():
            took = turn(name, steps)
            if round_:  # the first is a warm-up
                taken.append(took / steps)
    with _ranges(vae) as begun:
        with _recorded(x.device) as trace:
            for _ in range(ROUNDS):
                for name in names:
                    turn(name, steps)
        buffers.clear()
        with _recorded(x.device, profile_memory=True) as memory_trace:
            for name in names:
                turn(name, 3)
                buffers.clear()  # what it keeps for its next step

    timeline, memory_timeline = _Timeline(trace, begun), _Timeline(memory_trace, begun)
    profiles, traces = {}, {}
    for name in names:
        turns = timeline.named(name)
        times, host_times, products_s = _times(timeline, turns, x.is_cuda)
        allocated, peaks = _memory(memory_timeline, memory_timeline.named(name)[0], x.device)
        step_s = statistics.median(seconds[name])
        profiles[name] = Profile(step_s, times, host_times, products_s, allocated, peaks)
        traces[name] = timeline.cut(turns[-1])
    return profiles, traces


def _check_losses(
    names: Mapping[str, str], forward: Callable[[], Tensor], tolerance: float
) -> None:
    """Refuse to measure a result that is wrong."""
    losses = {}
    for name, backend in names.items():
        with vae_fast.use_backend(backend), torch.no_grad():
            losses[name] = float(forward())
    first, *rest = losses.values()
    if not all(abs(loss - first) <= tolerance * abs(first) for loss in rest):
        raise CommandError(f"the backends do not agree on the loss: {losses}")


@contextlib.contextmanager
def _ranges(vae: VAE) -> Iterator[list[tuple[int, str]]]:
    """Open a range around each part of the forward pass.

    Yields:
        The sequence number of the first node that autograd makes in a part, and the part, in
        rising order.
    """
    begun: list[tuple[int, str]] = []
    open_: list[record_function] = []

    def enter(part: str | None) -> Callable[..., None]:
        def hook(*_: object) -> None:
            if open_:
                open_.pop().__exit__(None, None, None)
            begun.append((_get_sequence_nr(), part or OTHER))
            if part is not None:
                open_.append(record_function(part))
                open_[0].__enter__()

        return hook

    # The loss samples z, calls the decoder, and goes on with what it returned.
    handles = [
        vae.register_forward_pre_hook(enter("encoder")),
        vae.elbo.register_forward_pre_hook(enter("latent pass")),
        vae.decoder.register_forward_pre_hook(enter("decoder")),
        vae.decoder.register_forward_hook(enter("likelihood pass")),
        vae.elbo.register_forward_hook(enter(None)),
    ]
    try:
        yield begun
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _recorded(device: torch.device, **options: bool) -> Iterator[Event]:
    """A trace of what runs in the context, filled in at its end."""
    trace: Event = {}
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    # acc_events only spares us a warning: there are no cycles.
    with torch.profiler.profile(activities=activities, acc_events=True, **options) as profiler:
        yield trace
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        trace |= json.loads(path.read_text())


# ---------------------------------------------------------------- reading the trace


@dataclass
class _Span:
    """A stretch of time of one thread, in the trace's microseconds."""

    start: float
    end: float
    name: str
    event: Event


class _Timeline:
    """A trace, and the parts' spans in it."""

    def __init__(self, trace: Event, begun: Sequence[tuple[int, str]]) -> None:
        self.trace = trace
        self.events = sorted(
            (e for e in trace["traceEvents"] if e["ph"] in "Xi" and "cat" in e),
            key=lambda e: e["ts"],
        )
        self.parts: list[_Span] = []
        products: list[_Span] = []
        for event in self.events:
            name, category = event["name"], event["cat"]
            if category == "user_annotation" and name in PARTS:
                self.parts.append(_span(event))
            elif name.startswith(_NODE):
                self._add_node(_span(event), begun)
            elif name in PRODUCTS and (not products or event["ts"] >= products[-1].end):
                products.append(_span(event))
        self.products = products

    def _add_node(self, node: _Span, begun: Sequence[tuple[int, str]]) -> None:
        """Extend the part that the node belongs to, or begin it.

        Autograd walks the nodes in the reverse order of their making, and so part by part. It adds
        up a weight's gradient at once when it is there; that has no sequence number.
        """
        last = self.parts[-1] if self.parts else None
        number = node.event["args"].get("Sequence number")
        if number is not None:
            place = bisect_right(begun, number, key=lambda entry: entry[0])
            if place == 0 or begun[place - 1][1] == OTHER:
                return
            node.name = begun[place - 1][1] + _BACKWARD
        elif last is not None and last.name.endswith(_BACKWARD):
            node.name = last.name
        if last is not None and last.name == node.name:
            last.end = max(last.end, node.end)
        elif number is not None:
            self.parts.append(node)

    def named(self, name: str, within: Sequence[_Span] | None = None) -> list[_Span]:
        """The ranges of a name, in their order; only those in some spans if these are given."""
        spans = [
            _span(event)
            for event in self.events
            if event["cat"] == "user_annotation" and event["name"] == name
        ]
        return [s for s in spans if within is None or _at(within, s.start) is not None]

    def part_at(self, when: float) -> str:
        """The part that runs at a time."""
        span = _at(self.parts, when)
        return OTHER if span is None else span.name

    def cut(self, turn: _Span) -> Event:
        """The trace of one turn, with ranges for the parts' backward passes, too."""
        ranges = [
            {
                **{name: part.event[name] for name in ("ph", "pid", "tid")},
                "cat": "user_annotation",
                "name": part.name,
                "ts": part.start,
                "dur": part.end - part.start,
            }
            for part in self.parts
            if part.name.endswith(_BACKWARD) and turn.start <= part.start < turn.end
        ]
        kept = [
            event
            for event in self.trace["traceEvents"]
            if event["ph"] == "M" or turn.start <= event["ts"] < turn.end
        ]
        return {**self.trace, "traceEvents": kept + ranges}


def _span(event: Event) -> _Span:
    return _Span(event["ts"], event["ts"] + event["dur"], event["name"], event)


def _at(spans: Sequence[_Span], when: float) -> _Span | None:
    """Which of the spans, in order and apart, contains a time."""
    place = bisect_right(spans, when, key=lambda span: span.start)
    return spans[place - 1] if place and when < spans[place - 1].end else None


def _times(
    timeline: _Timeline, turns: Sequence[_Span], on_gpu: bool
) -> tuple[dict[str, float], dict[str, float], float]:
    """Seconds of a typical step by part, on the device and on the host, and of its products."""
    launches = {
        event["args"]["correlation"]: event["ts"]
        for event in timeline.events
        if event["cat"] in _LAUNCHES and "correlation" in event["args"]
    }
    # What takes time: (when it was launched, or began; how long).
    work = [
        (launches[event["args"]["correlation"]], event["dur"])
        for event in timeline.events
        if event["cat"] in _ON_DEVICE and event["args"].get("correlation") in launches
    ]
    if on_gpu and not work:
        raise CommandError("the profiler saw no kernel on the GPU: is another profiler running?")
    work.sort()

    steps = []
    for span in timeline.named(_STEP, turns):
        times, host_times, products = defaultdict(float), defaultdict(float), 0.0
        for part in timeline.parts:
            if span.start <= part.start < span.end:
                host_times[part.name] += part.end - part.start
        host_times[OTHER] = span.end - span.start - sum(host_times.values())
        if on_gpu:
            first, last = (bisect_right(work, (t,)) for t in (span.start, span.end))
            for when, duration in work[first:last]:
                times[timeline.part_at(when)] += duration
                if _at(timeline.products, when) is not None:
                    products += duration
        else:
            times = host_times
            for product in timeline.products:
                if span.start <= product.start < span.end:
                    products += product.end - product.start
        steps.append((sum(times.values()), times, host_times, products))

    # The middle half, of whose mean the parts still add up.
    steps.sort(key=lambda step: step[0])
    middle = steps[len(steps) // 4 : len(steps) - len(steps) // 4]
    _, times, host_times, products = zip(*middle, strict=True)
    return _mean(times), _mean(host_times), 1e-6 * statistics.fmean(products)


def _mean(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Microseconds of several steps as seconds of one."""
    names = {name for step in steps for name in step}
    return {name: 1e-6 * statistics.fmean(s.get(name, 0.0) for s in steps) for name in names}


def _memory(
    timeline: _Timeline, turn: _Span, device: torch.device
) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes that the turn's last step allocates, and the most there are, by part."""
    allocated: dict[str, int] = defaultdict(int)
    peaks: dict[str, int] = defaultdict(int)
    last = timeline.named(_STEP, [turn])[-1]
    used = 0
    for event in timeline.events:
        if event["name"] != "[memory]" or not turn.start <= event["ts"] < last.end:
            continue
        if event["args"]["Device Type"] != _DEVICE_TYPES[device.type]:
            continue
        size = event["args"]["Bytes"]
        if event["ts"] >= last.start:
            part = timeline.part_at(event["ts"])
            allocated[part] += max(size, 0)
            peaks[part] = max(peaks[part], used, used + size)
        used += size
    return allocated, peaks


# ---------------------------------------------------------------- printing


def _table(title: str, costs: Profile, on_gpu: bool) -> str:
    """The costs of the parts, which add up to those of the step."""
    heads = ["forward", "backward", "total", "share", *["host"] * on_gpu, "allocated", "peak"]
    lines = [f"{title:<22}" + "".join(f"{head:>11}" for head in heads)]
    whole = sum(costs.times.values())

    def row(title: str, forward: Sequence[str], backward: Sequence[str]) -> str:
        both = (*forward, *backward)

        def total(of: Mapping[str, float], names: Sequence[str]) -> float:
            return sum(of.get(name, 0.0) for name in names)

        time_ = total(costs.times, both)
        cells = [
            _ms(total(costs.times, forward)),
            _ms(total(costs.times, backward)) if backward else "",
            _ms(time_),
            f"{time_ / whole:.1%}",
            *[_ms(total(costs.host_times, both))] * on_gpu,
            _bytes(total(costs.allocated, both)),
            _bytes(max(costs.peaks.get(name, 0) for name in both)),
        ]
        return f"  {title:<20}" + "".join(f"{cell:>11}" for cell in cells)

    for part in PARTS:
        lines.append(row(part, [part], [part + _BACKWARD] if part != "optimizer" else []))
    lines.append(row(OTHER, [OTHER], []))
    backward = [part + _BACKWARD for part in PARTS]
    lines.append(row("step", [*PARTS, OTHER], backward))
    return "\n".join(lines)


def _summary(profiles: Mapping[str, Profile], on_gpu: bool) -> str:
    fused, reference = profiles["fused"], profiles["reference"]
    lines = [f"{'':<36}{'fused':>11}{'reference':>11}{'ratio':>9}"]

    def add(title: str, value: Callable[[Profile], float], text: Callable[[float], str]) -> None:
        a, b = value(fused), value(reference)
        lines.append(f"{title:<36}{text(a):>11}{text(b):>11}{b / a:>8.2f}x")

    add("step without the profiler", lambda p: p.step_s, _ms)
    host = "step with it, time of the host" if on_gpu else "step with it"
    add(host, lambda p: sum(p.host_times.values()), _ms)
    if on_gpu:
        add("step with it, time of the GPU", lambda p: sum(p.times.values()), _ms)
    add("peak memory", lambda p: max(p.peaks.values()), _bytes)
    add(
        "time outside matrix products",
        lambda p: sum(p.times.values()) - p.products_s,
        _ms,
    )
    shares = [1.0 - p.products_s / sum(p.times.values()) for p in (fused, reference)]
    lines.append(f"{'  its share':<36}" + "".join(f"{share:>11.1%}" for share in shares))
    return "\n".join(lines)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3f} ms" if seconds < 0.1 else f"{1e3 * seconds:.1f} ms"


def _bytes(count: float) -> str:
    unit = min(max(int(count).bit_length() - 1, 10) // 10, 3)
    return f"{count / 1024**unit:.1f} {' KMG'[unit]}iB"
