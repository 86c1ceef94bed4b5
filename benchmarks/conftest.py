"""What the benchmarks share: this machine's copy bandwidth, peak memory, and the closing table."""

from __future__ import annotations

import os
import platform
import time

import pytest
import torch
from peers import OURS
from torch._inductor.cpu_vec_isa import pick_vec_isa

import vae_fast
from vae_fast import buffers

_rows: list[dict] = []
_bandwidth: list[float] = []


def copy_bandwidth() -> float:
    """Bytes per second that a copy moves, read and written, between buffers larger than caches."""
    source, target = torch.ones(1 << 26), torch.empty(1 << 26)
    best = float("inf")
    for _ in range(7):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 2 * source.numel() * 4 / best


def peak_bytes(step, reset) -> int:
    """The most memory that PyTorch's CPU allocator held for a step at once, beyond its inputs."""
    reset()
    buffers.clear()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.fixture
def submit(benchmark):
    """Hands pytest-benchmark the seconds of rounds that took turns with other implementations'."""

    def hand_in(seconds):
        benchmark._mode = "rounds that took turns"
        if benchmark.disabled:
            return
        stats = benchmark._make_stats(iterations=1)
        for duration in seconds:
            stats.update(duration)

    return hand_in


@pytest.fixture
def record_row(benchmark, request):
    """Remembers a timed row, with its bytes and peak memory, for the closing table."""

    def record(implementation, bytes_moved, step, reset):
        if benchmark.disabled:
            return
        if not _bandwidth:
            _bandwidth.append(copy_bandwidth())
        seconds = benchmark.stats.stats.median
        share = bytes_moved / seconds / _bandwidth[0]
        peak = peak_bytes(step, reset)
        benchmark.extra_info.update(bytes_moved=bytes_moved, bandwidth_share=share, peak_bytes=peak)
        _rows.append(
            {
                "group": benchmark.group,
                "implementation": implementation,
                "seconds": seconds,
                "share": share,
                "peak": peak,
            }
        )

    return record


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["vae_fast"] = vae_fast.__version__
    machine_info["backend"] = vae_fast.backends.backend_for("cpu")
    # torch.compile's code is scalar, and no fair peer, where its test for vectors fails.
    machine_info["inductor"] = str(pick_vec_isa()) or "no vectors"


def pytest_terminal_summary(terminalreporter):
    if not _rows:
        return
    write = terminalreporter.write_line
    terminalreporter.section("vae_fast against its peers")
    write(
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}; copy bandwidth {_bandwidth[0] / 1e9:.1f} GB/s"
    )
    if not pick_vec_isa():
        write("torch.compile found no vector instructions here: its times say little")
    write("ratio: time of the best peer over this time; of copy: share of the copy bandwidth")
    groups: dict[str, list[dict]] = {}
    for row in _rows:
        groups.setdefault(row["group"], []).append(row)
    for group, rows in groups.items():
        peers = [r["seconds"] for r in rows if r["implementation"] not in OURS]
        write("")
        write(f"{group:44s} {'median':>10s} {'ratio':>7s} {'of copy':>8s} {'peak memory':>12s}")
        for row in sorted(rows, key=lambda r: -r["seconds"]):
            ratio = f"{min(peers) / row['seconds']:6.2f}x" if peers else "-"
            write(
                f"  {row['implementation']:42s} {row['seconds'] * 1e3:7.3f} ms {ratio:>7s} "
                f"{row['share']:8.1%} {row['peak'] / 1e6:9.2f} MB"
            )
