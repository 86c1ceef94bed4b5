"""Puts measured numbers into README.md, between its markers, from the runs that made them.

python -m benchmarks.readme --run benchmarks/results/MACHINE/run.json
python -m benchmarks.readme --kept benchmarks/results/MACHINE-kept/run.json
python -m benchmarks.readme --gpu benchmarks/results/GPU/run.json [another run.json]
vae-fast train --out runs/digits && vae-fast train --variance unit --out runs/unit
python -m benchmarks.readme --trained runs/digits runs/unit
"""

from __future__ import annotations

import argparse
import csv
import re
import shutil
from dataclasses import replace
from pathlib import Path

from benchmarks.report import duration, name, ratio, table, times
from benchmarks.saved import COMPILE, COMPILED, GRAPHS, INPLACE, OURS, Group, load

ROOT = Path(__file__).resolve().parent.parent


def speeds(groups: list[Group], *variants: str) -> str:
    def line(group: Group) -> list[str]:
        best = group.best_peer
        cells = [f"{group.dtype} {group.size}", best, duration(group.rows[best]["median"])]
        for variant in variants:
            facts = group.rows.get(variant)
            cells += [duration(facts["median"]), ratio(group, variant)] if facts else ["", ""]
        return cells

    header = ["size", "best peer", "its time"]
    for variant in variants:
        header += [variant.removeprefix(f"{OURS} "), "ratio"]
    return table(header, map(line, groups))


def whole_losses(groups: list[Group]) -> list[Group]:
    return [g for g in groups if g.of == "elbo" and g.phase != "forward"]


def likelihoods(groups: list[Group]) -> list[Group]:
    """The options', and before them ``gaussian_nll``'s of the same sizes."""
    options = [g for g in groups if g.of == "option"]
    sizes = {g.size.split(" ", 1)[1] for g in options}
    plain = [
        replace(g, size=f"gaussian_nll {g.size}")
        for g in groups
        if g.of == "likelihood" and g.phase != "forward" and g.dtype == "fp32" and g.size in sizes
    ]
    return plain + options


def kept_table(path: Path) -> str:
    machine, groups = load(path)
    if "malloc" not in machine:
        raise SystemExit(f"{path} is a run with the C library's defaults")
    folder = path.resolve().parent.relative_to(ROOT)
    options = likelihoods(groups)
    return (
        f"{speeds(whole_losses(groups), OURS, INPLACE)}\n\n"
        + (f"{speeds(options, OURS, INPLACE)}\n\n" if options else "")
        + f"Every row of that run: [{folder}]({folder}/README.md)."
    )


def benchmark_table(path: Path) -> str:
    machine, groups = load(path)
    if "malloc" in machine:
        raise SystemExit(f"{path} is a run with {machine['malloc']}")
    options = likelihoods(groups)
    kl = [g for g in groups if g.of == "kl"]
    steps = [g for g in groups if g.of == "train_step"]
    folder = path.resolve().parent.relative_to(ROOT)
    return (
        f"{speeds(whole_losses(groups), OURS, INPLACE)}\n\n"
        + (
            "The likelihood alone: `gaussian_nll`, which learns the rows' weights in its backward "
            "pass and then reads everything once more, and the loss without a KL term with other "
            "scales and densities:\n\n"
            f"{speeds(options, OURS, INPLACE)}\n\n"
            if options
            else ""
        )
        + (
            "The analytic KL term alone, by rows and with free bits for each latent element:\n\n"
            f"{speeds(kl, OURS)}\n\n"
            if kl
            else ""
        )
        + "Whole training steps, where matrix products or convolutions take at least "
        f"{_products(steps)} of the time, whosever the loss is; *compiled* is the module under "
        f"`torch.compile`, as the best peer is:\n\n{speeds(steps, OURS, COMPILED)}\n\n"
        f"![Speed relative to the best peer]({folder}/ratio.png)\n\n"
        f"Medians on {name(machine)}, torch {machine['torch']}; every row in "
        f"[{folder}]({folder}/README.md), made by `make bench`. B is the batch, L the latent and D "
        "the data size; uint8 is the data's type, all else is fp32 there."
    )


def _products(steps: list[Group]) -> str:
    """The least share of a step's time that products take."""
    outside = (row.get("outside") for g in steps for row in g.rows.values())
    return f"{1 - max((share for share in outside if share is not None), default=1.0):.0%}"


def gpu_table(path: Path, again: Path | None) -> str:
    """Losses, steps and passes of a run, and the losses of another."""
    machine, groups = load(path)
    folder = path.resolve().parent.relative_to(ROOT)
    parts = [_gpu_losses(groups), _gpu_passes(groups), _gpu_steps(groups)]
    text = (
        f"Medians on {machine['gpu']}, torch {machine['torch']}, Triton {machine['triton']}, "
        f"driver {machine['driver']}; captured steps are replayed many times in a row. Every row "
        f"is in [{folder}]({folder}/README.md)."
    )
    if again:
        there = again.resolve().parent.relative_to(ROOT)
        text += (
            " Small steps wait for the host, which was slower in this run than in another: the "
            f"first row there ([{there}]({there}/README.md)):"
        )
        parts.append(_gpu_losses(load(again)[1]))
    return "\n\n".join([*parts[:3], text, *parts[3:]])


def _gpu_losses(groups: list[Group]) -> str:
    def line(group: Group) -> list[str]:
        rows = group.rows
        times_ = {n: rows[n]["median"] for n in ("eager", COMPILE, OURS)}
        cells = [f"{group.dtype} {group.size}", *map(duration, times_.values())]
        cells += [times(times_[n] / times_[OURS]) for n in ("eager", COMPILE)]
        captured = [rows[n]["replayed"] for n in (COMPILE, OURS)]
        return cells + [duration(t) if t else "" for t in captured]

    header = ("forward+backward", "eager", COMPILE, OURS, "over eager", f"over {COMPILE}")
    header += tuple(f"captured: {n}" for n in (COMPILE, OURS))
    return table(header, map(line, whole_losses(groups)))


def _gpu_passes(groups: list[Group]) -> str:
    shares: dict[tuple[str, str], dict[str, str]] = {}
    for group in (g for g in groups if g.of == "pass"):
        shares.setdefault((group.phase, group.size), {})[group.dtype] = f"{group.ratio(OURS):.0%}"
    header = ("speed of a copy of as many bytes = 100 %", "size", "fp32", "bf16")
    return table(header, ((*row, s["fp32"], s["bf16"]) for row, s in shares.items()))


def _gpu_steps(groups: list[Group]) -> str:
    groups = [g for g in groups if g.of == "train_step"]
    names = ("eager", COMPILE, f"{COMPILE} CUDA graphs", OURS, COMPILED, GRAPHS)
    names = [n for n in names if all(n in g.rows for g in groups)]

    def line(group: Group) -> list[str]:
        medians = (group.rows[n]["median"] for n in names)
        return [f"{group.dtype} {group.size}", *map(duration, medians)]

    header = ("training step", *names)
    return table(header, map(line, groups))


def training_table(runs: dict[str, Path]) -> str:
    def line(item: tuple[str, Path]) -> list[str]:
        with (item[1] / "metrics.csv").open() as file:
            last = list(csv.DictReader(file))[-1]
        return [item[0], *(f"{float(last[c]):.2f}" for c in ("val_nll", "val_kl", "val_elbo"))]

    header = ("decoder's variance", "validation NLL (nats/image)", "KL", "ELBO")
    return table(header, map(line, runs.items()))


def insert(marker: str, text: str) -> None:
    readme = ROOT / "README.md"
    pattern = rf"<!-- {marker} -->.*?<!-- /{marker} -->"
    whole = f"<!-- {marker} -->\n{text}\n<!-- /{marker} -->"
    readme.write_text(re.sub(pattern, lambda _: whole, readme.read_text(), flags=re.S))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, help="run.json of a report")
    parser.add_argument("--kept", type=Path, help="the same, of a run with freed memory kept")
    parser.add_argument("--gpu", type=Path, nargs="+", help="run.json of one on a GPU, and another")
    parser.add_argument("--trained", type=Path, nargs=2, metavar=("LEARNED", "UNIT"))
    args = parser.parse_args()
    if args.run:
        insert("benchmark", benchmark_table(args.run))
    if args.kept:
        insert("kept", kept_table(args.kept))
    if args.gpu:
        insert("gpu", gpu_table(args.gpu[0], *(args.gpu[1:] or [None])))
    if args.trained:
        learned, unit = args.trained
        insert("training", training_table({"learned per pixel": learned, "one": unit}))
        shutil.copy(learned / "reconstructions.png", ROOT / "docs" / "reconstructions.png")


if __name__ == "__main__":
    main()
