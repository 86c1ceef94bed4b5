"""Turns a saved run into tables and pictures, under benchmarks/results/<machine>/.

pytest benchmarks --benchmark-only --benchmark-json=bench.json
python -m benchmarks.report bench.json
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.saved import (
    COMPILE,
    COMPILED,
    GRAPHS,
    INPLACE,
    OURS,
    Group,
    is_ours,
    load,
    load_wrong,
    shrink,
)

RESULTS = Path(__file__).resolve().parent / "results"
TITLES = {
    "pass": "Each pass alone, against a copy of as many bytes",
    "latent": "Latent pass: z, log q(z|x), log p(z)",
    "kl": "KL(q‖N(0, 1)): the batch's mean, and the sum over latent elements with free bits",
    "likelihood": "Likelihood pass: the mean of −log p(x|z)",
    "option": "Likelihood pass: a clamped scale, one scale for all rows, other densities",
    "elbo": "Whole loss, given the decoder's output",
    "train_step": "Whole training step, optimizer included",
}
# Who has a colour of its own, the same in every picture.
COLOURED = (
    "eager",
    "distributions",
    COMPILE,
    f"{COMPILE} PyTorch's randn",
    OURS,
    "gaussian nll loss",
    INPLACE,
    f"{COMPILE} max-autotune",
    COMPILED,
    f"{COMPILE} CUDA graphs",
    GRAPHS,
)
PREFACE = """\
All implementations of a row ran in one process, on the same tensors, in turns; results were checked
before they were timed. Times are medians. *Ratio* is the best peer's time over ours, with a tilde
where not every turn had the same one ahead. *Of copy* is how fast the bytes which have to move were
moved, as a share of the speed of copies that took turns with the row's implementations. That is no
limit: it is above 100 % where tensors fit in the caches, for which the copies' are too large; and
on a CPU where more is read than written, or written in place or past the caches, while a copy also
reads the lines that it writes over. *Saved* is what is kept from the forward to the backward pass
beyond the loss's inputs, *peak* what is held beyond them at once.
"""
ONE_TURN = """\
Peers that took longer than a turn is meant to, and three times as long as the best, had only one.
"""


def duration(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def size(number: float) -> str:
    return f"{number / 1e6:.3g} MB" if number >= 1e6 else f"{number / 1e3:.3g} kB"


def times(ratio: float) -> str:
    return f"{ratio:.2f}×" if ratio < 2 else f"{ratio:.1f}×"


def ratio(group: Group, name: str) -> str:
    """How many times as fast as the best peer; with a tilde where the turns do not agree."""
    if group.best_peer is None:
        return ""
    return ("" if group.differs(name) else "~") + times(group.ratio(name))


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(header)]
    lines += [["---"] * len(lines[0]), *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def summary(groups: list[Group]) -> str:
    """A line for each row: ours against the best peer."""
    step = groups[0].of == "train_step"
    last = "outside products" if step else "of copy"
    variants = (OURS, INPLACE, COMPILED, GRAPHS) if step else (OURS, INPLACE)
    variants = [name for name in variants if any(name in g.rows for g in groups)]

    def line(group: Group) -> Iterable[str]:
        yield from ([] if step else [group.phase])
        best = group.best_peer
        yield from (group.dtype, group.size, best or "")
        yield duration(group.rows[best]["median"]) if best else ""
        for name in variants:
            facts = group.rows.get(name)
            share = facts and facts.get("outside" if step else "share")
            yield duration(facts["median"]) if facts else ""
            yield f"**{ratio(group, name)}**" if facts and best else ""
            yield f"{share:.0%}" if share is not None else ""

    header = [*([] if step else ["phase"]), "dtype", "size", "best peer", "its time"]
    for name in variants:
        header += [name.removeprefix(f"{OURS} "), "ratio", last]
    return table(header, map(line, groups))


def details(groups: list[Group]) -> str:
    """A line for each implementation."""

    def lines() -> Iterable[Iterable[str]]:
        for group in groups:
            for name, facts in sorted(group.rows.items(), key=lambda row: row[1]["median"]):
                share = facts.get("share", facts.get("outside"))
                yield (
                    f"{group.phase} {group.dtype} {group.size}",
                    name,
                    duration(facts["median"]),
                    duration(facts["host"]),
                    duration(facts["replayed"]) if facts.get("replayed") else "",
                    f"{group.ratio(name):.2f}" if group.best_peer else "",
                    "" if share is None else f"{share:.0%}",
                    size(facts["bytes"]) if facts.get("bytes") else "",
                    "" if facts["saved"] is None else size(facts["saved"]),
                    "" if facts["peak"] is None else size(facts["peak"]),
                )

    share = "outside products" if groups[0].of == "train_step" else "of copy"
    header = ("row", "implementation", "median", "host", "graph replay", "ratio", share)
    return table((*header, "to move", "saved", "peak"), lines())


def report(machine: dict, groups: list[Group], wrong: Iterable[dict[str, str]] = ()) -> str:
    """The Markdown page."""
    by_loss = {of: [g for g in groups if g.of == of] for of in TITLES}
    by_loss = {of: found for of, found in by_loss.items() if found}
    one_turn = any(len(row["turns"]) == 1 for group in groups for row in group.rows.values())
    parts = [f"# Benchmarks: {name(machine)}", PREFACE + ONE_TURN * one_turn]
    parts.append(table(("machine", ""), ((str(k), str(v)) for k, v in machine.items())))
    for picture in PICTURES:
        if drawn(groups, picture):
            parts.append(f"![{picture}]({picture}.png)")
    if wrong:
        parts += ["## Wrong, and not timed"]
        for w in wrong:
            why, *_ = w["wrong"].strip().split("\n")  # a line alone: the others might be Markdown
            parts.append(f"* {w['group']}, {w['implementation']}: {why}")
    for of, found in by_loss.items():
        parts += [f"## {TITLES[of]}", summary(found)]
    parts.append("## Every implementation")
    parts.append(
        "*Host* is the least time in which the call returned; on a GPU the device may still be "
        "busy then. *Graph replay* is the step as a CUDA graph, many times in a row and before the "
        "turns: the device alone."
    )
    for of, found in by_loss.items():
        parts += [f"### {TITLES[of]}", details(found)]
    return "\n\n".join(parts) + "\n"


def name(machine: dict) -> str:
    on = machine.get("gpu") or f"{machine['processor']}, {machine['threads']} threads"
    return re.sub(r"\((R|TM)\)", "", on)


def slug(machine: dict) -> str:
    kept = "-kept" if "malloc" in machine else ""
    return re.sub(r"[^a-z0-9]+", "-", name(machine).lower()).strip("-") + kept


def folder(machine: dict, groups: list[Group]) -> Path:
    """Where a report goes: that of a part of the suite not over one of more."""
    out = RESULTS / slug(machine)
    if (out / "run.json").exists():
        stored = load(out / "run.json")[1]
        if not {g.place for g in stored} <= {g.place for g in groups}:
            return out.with_name(f"{out.name}-part")
    return out


Value = Callable[[Group, str], float | None]


def drawn(groups: list[Group], picture: str) -> list[Group]:
    """What a picture shows: for each loss its last phase, in fp32."""
    without = {"pass", "option", "kl", *(("train_step",) if picture == "bandwidth" else ())}
    kept = [g for g in groups if g.of not in without]
    last = {g.of: g.phase for g in kept}
    return [g for g in kept if g.dtype == "fp32" and g.phase == last[g.of]]


# ---- pictures ----------------------------------------------------------------------------------


def _lines(drawn: list[Group], value: Value, label: str, path: Path) -> None:
    """For each loss a panel: a line for each implementation, over the sizes in fp32."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    losses = list(dict.fromkeys(g.of for g in drawn))
    figure, panels = plt.subplots(
        1, len(losses), figsize=(4.6 * len(losses), 4.4), squeeze=False, layout="constrained"
    )
    names = list(dict.fromkeys([*COLOURED, *(n for g in drawn for n in g.rows)]))
    cycle = [*(f"C{i}" for i in range(10)), "black", "gold", "navy", "lime"]
    colours = dict(zip(names, itertools.cycle(cycle), strict=False))
    for panel, of in zip(panels[0], losses, strict=True):
        own = [g for g in drawn if g.of == of]
        for n in names:
            points = [(i, value(g, n)) for i, g in enumerate(own) if n in g.rows]
            points = [(i, v) for i, v in points if v is not None]
            if points:
                style = {"lw": 2.4, "marker": "o"}
                if not is_ours(n):
                    style = {"ls": "--", "marker": ".", "zorder": 3}
                panel.plot(*zip(*points, strict=True), color=colours[n], label=n, **style)
        panel.set_title(f"{of}, {own[0].phase}, fp32", fontsize=10)
        panel.set_xticks(
            range(len(own)), [g.size for g in own], rotation=30, ha="right", fontsize=8
        )
        panel.grid(alpha=0.3)
        values = [v for line in panel.lines for v in line.get_ydata()]
        if values and 0 < 2 * min(values) < max(values):
            panel.set_yscale("log")
            few = max(values) < 1e3 * min(values)
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_formatter(NullFormatter())
    panels[0][0].set_ylabel(label)
    handles = {
        h.get_label(): h for panel in panels[0] for h in panel.get_legend_handles_labels()[0]
    }
    columns = min(4, 2 * len(losses))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


PICTURES: dict[str, tuple[str, Value]] = {
    "ratio": ("speed (the best peer = 1)", Group.ratio),
    "bandwidth": ("share of copy bandwidth", lambda g, n: g.rows[n].get("share")),
    "memory": (
        "peak memory beyond the inputs, MB",
        lambda g, n: (g.rows[n]["peak"] or 0) / 1e6 or None,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="what --benchmark-json wrote")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder; by default one named after the machine, and -part if that has more rows",
    )
    args = parser.parse_args()
    try:
        machine, groups = load(args.run)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{args.run} is no run of these benchmarks ({error!r})") from error
    out = args.out or folder(machine, groups)
    out.mkdir(parents=True, exist_ok=True)
    shrink(args.run, out / "run.json")
    _, groups = load(out / "run.json")  # the same digits for whoever reports what is kept
    (out / "README.md").write_text(report(machine, groups, load_wrong(out / "run.json")))
    for picture, (label, value) in PICTURES.items():
        if shown := drawn(groups, picture):
            _lines(shown, value, label, out / f"{picture}.png")
    print(out / "README.md")


if __name__ == "__main__":
    main()
