"""What the benchmarks share: their options, how they hand in a row, and the closing table."""

from __future__ import annotations

import statistics

import pytest
import torch
from measure import machine
from runs import is_ours

_rows: list[dict] = []


def pytest_addoption(parser):
    group = parser.getgroup("vae_fast")
    group.addoption("--quick", action="store_true", help="few sizes, fp32, both phases as one")
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
    return request.config.getoption("--device")


@pytest.fixture
def quick(request):
    return request.config.getoption("--quick")


@pytest.fixture
def hand_in(benchmark):
    """Gives pytest-benchmark the seconds of steps that took turns with other implementations'."""

    def hand_in(group, implementation, turns, **facts):
        benchmark.group = group
        benchmark._mode = "steps that took turns"
        if benchmark.disabled:
            return
        stats = benchmark._make_stats(iterations=1)
        for seconds in turns:
            for duration in seconds:
                stats.update(duration)
        facts["turns"] = [statistics.median(seconds) for seconds in turns]
        benchmark.extra_info.update(implementation=implementation, **facts)
        _rows.append({"group": group, "seconds": stats.stats.median, **benchmark.extra_info})

    return hand_in


@pytest.fixture
def hand_in_wrong(benchmark):
    """Reports an implementation whose results are wrong: a peer is not timed, ours is a failure."""

    def hand_in_wrong(group, implementation, why):
        if is_ours(implementation):
            pytest.fail(f"{group}, {implementation}: {why}")
        _rows.append({"group": group, "implementation": implementation, "wrong": why})
        pytest.xfail(f"{implementation} is wrong, and not timed: {why}")

    return hand_in_wrong


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["vae_fast"] = machine(config.getoption("--device"))


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
        peers = [r["seconds"] for r in timed if not is_ours(r["implementation"])]
        write("")
        write(
            f"{group:44s} {'median':>10s} {'ratio':>7s} {'of copy':>8s} "
            f"{'saved':>10s} {'peak':>10s}"
        )
        for row in sorted(timed, key=lambda r: -r["seconds"]):
            ratio = f"{min(peers) / row['seconds']:6.2f}x" if peers else "-"
            share = f"{row['share']:8.1%}" if row.get("share") else f"{'-':>8s}"
            memory = [f"{row[n] / 1e6:7.2f} MB" for n in ("saved", "peak")]
            write(
                f"  {row['implementation']:42s} {row['seconds'] * 1e3:7.3f} ms {ratio:>7s} {share} "
                + " ".join(memory)
            )
        for row in (r for r in rows if "wrong" in r):
            write(f"  {row['implementation']:42s} WRONG, not timed: {row['wrong']}")
