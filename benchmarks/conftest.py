"""What the benchmarks share: their options, how they hand in a row, and the closing table."""

from __future__ import annotations

import itertools
import statistics

import pytest
import torch
from measure import Wrong, machine
from saved import best_peer, is_ours

from vae_fast import backends

SECONDS, QUICK_SECONDS = 0.375, 0.25  # to time an implementation for, in all its turns

_rows: list[dict] = []


def pytest_addoption(parser):
    group = parser.getgroup("vae_fast")
    group.addoption(
        "--quick", action="store_true", help="few sizes, fp32, both phases as one, no max-autotune"
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    group.addoption("--device", default=default, help=f"cpu or cuda; {default} by default")


def pytest_generate_tests(metafunc):
    """The rows of a benchmark are those of its module's ``rows(quick, device)``."""
    if "row" in metafunc.fixturenames:
        option = metafunc.config.getoption
        rows = metafunc.module.rows(option("--quick"), option("--device"))
        metafunc.parametrize("row", rows, ids=str)


@pytest.fixture
def device(request):
    """The device; where none of the fused backends serves it, there is nothing to compare."""
    device = request.config.getoption("--device")
    if backends.backend_for(torch.device(device).type) == "reference":
        pytest.fail(f"{device!r} is served by the reference: vae-fast doctor says why")
    return device


@pytest.fixture
def names(row, request):
    """The implementations that the row's one competes with, and itself."""
    option = request.config.getoption
    rows = request.module.rows(option("--quick"), option("--device"))
    return tuple(r.implementation for r in rows if r.name == row.name)


@pytest.fixture
def budget(benchmark, request):
    """Seconds to time an implementation for; 0 only checks it."""
    if benchmark.disabled:
        return 0.0
    return QUICK_SECONDS if request.config.getoption("--quick") else SECONDS


@pytest.fixture
def hand_in(benchmark):
    """Gives pytest-benchmark what a race said of a row; a wrong result is a failure if it is ours.

    The times are of steps that took turns with the other implementations'.
    """

    def hand_in(row, result, **place):
        if isinstance(result, Wrong):
            why = {"implementation": row.implementation, "wrong": str(result)}
            _rows.append({"group": row.name, **why})
            if is_ours(row.implementation):
                pytest.fail(f"{row.name}, {row.implementation}: {result}")
            pytest.xfail(f"{row.implementation} is wrong, and not timed: {result}")
            return  # under --runxfail
        benchmark.group = row.name
        benchmark._mode = "steps that took turns"
        if benchmark.disabled:
            return
        stats = benchmark._make_stats(iterations=1)
        for duration in itertools.chain(*result["turns"]):
            stats.update(duration)
        medians = {"turns": [statistics.median(seconds) for seconds in result["turns"]]}
        facts = {"implementation": row.implementation, **place, **result, **medians}
        benchmark.extra_info.update(facts)
        _rows.append({"group": row.name, "median": stats.stats.median, **facts})

    return hand_in


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["vae_fast"] = machine(config.getoption("--device"))


def pytest_benchmark_update_json(output_json):
    output_json["wrong"] = [row for row in _rows if "wrong" in row]


def pytest_terminal_summary(terminalreporter, config):
    if not _rows:
        return
    write = terminalreporter.write_line
    terminalreporter.section("vae_fast against its peers")
    facts = machine(config.getoption("--device"))
    write(", ".join(f"{name} {value}" for name, value in facts.items()))
    write("ratio: the best peer's time over this one; of copy: share of the copy bandwidth; saved:")
    write("kept from forward to backward beyond the inputs; peak: held at once beyond the inputs")
    groups: dict[str, list[dict]] = {}
    for row in _rows:
        groups.setdefault(row["group"], []).append(row)
    for group, rows in groups.items():
        timed = [r for r in rows if "wrong" not in r]
        by_name = {r["implementation"]: r for r in timed}
        best = best_peer(by_name)
        write("")
        write(
            f"{group:44s} {'median':>10s} {'ratio':>7s} {'of copy':>8s} "
            f"{'saved':>10s} {'peak':>10s}"
        )
        for row in sorted(timed, key=lambda r: -r["median"]):
            ratio = f"{by_name[best]['median'] / row['median']:6.2f}x" if best else "-"
            share = f"{row['share']:8.1%}" if row.get("share") else f"{'-':>8s}"
            memory = [
                f"{'-':>10s}" if row[n] is None else f"{row[n] / 1e6:7.2f} MB"
                for n in ("saved", "peak")
            ]
            write(
                f"  {row['implementation']:42s} {row['median'] * 1e3:7.3f} ms {ratio:>7s} {share} "
                + " ".join(memory)
            )
        for row in (r for r in rows if "wrong" in r):
            write(f"  {row['implementation']:42s} WRONG, not timed: {row['wrong']}")
