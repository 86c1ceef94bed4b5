"""Puts measured numbers into README.md, between its markers, from the runs that made them.

python -m benchmarks.readme --run benchmarks/results/MACHINE/run.json
vae-fast train --out runs/digits && vae-fast train --variance unit --out runs/unit
python -m benchmarks.readme --trained runs/digits runs/unit
"""

from __future__ import annotations

import argparse
import csv
import re
import shutil
from pathlib import Path

from benchmarks.report import duration, name, table
from benchmarks.saved import OURS, Group, load

ROOT = Path(__file__).resolve().parent.parent
INPLACE = f"{OURS} inplace"


def benchmark_table(path: Path) -> str:
    machine, groups = load(path)
    groups = [g for g in groups if g.of in ("elbo", "train_step") and g.phase != "forward"]

    def line(group: Group) -> list[str]:
        best = group.best_peer
        of = "" if group.of == "elbo" else "training step, "
        cells = [f"{of}{group.dtype} {group.size}", best, duration(group.rows[best]["median"])]
        for implementation in (OURS, INPLACE):
            seconds = group.rows[implementation]["median"]
            cells += [duration(seconds), f"{group.ratio(implementation):.1f}×"]
        return cells

    header = ("size", "best peer", "its time", OURS, "ratio", "inplace", "ratio")
    folder = path.resolve().parent.relative_to(ROOT)
    return (
        f"{table(header, map(line, groups))}\n\n"
        f"![Speed relative to the best peer]({folder}/ratio.png)\n\n"
        f"Medians on {name(machine)}, torch {machine['torch']}; every row in "
        f"[{folder}]({folder}/README.md). B is the batch, L the latent and D the data size; bf16, "
        "other sizes and convolutions: `make bench`."
    )


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
    parser.add_argument("--trained", type=Path, nargs=2, metavar=("LEARNED", "UNIT"))
    args = parser.parse_args()
    if args.run:
        insert("benchmark", benchmark_table(args.run))
    if args.trained:
        learned, unit = args.trained
        insert("training", training_table({"learned per pixel": learned, "one": unit}))
        shutil.copy(learned / "reconstructions.png", ROOT / "docs" / "reconstructions.png")


if __name__ == "__main__":
    main()
