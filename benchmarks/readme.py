"""Puts measured numbers into README.md, between its markers, from the runs that made them.

pytest benchmarks --benchmark-only --benchmark-json=bench.json
vae-fast train --out runs/digits && vae-fast train --variance unit --out runs/unit
python -m benchmarks.readme bench.json runs/digits runs/unit
"""

from __future__ import annotations

import csv
import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OURS = ("vae_fast", "vae_fast inplace")


def benchmark_table(path: Path) -> str:
    saved = json.loads(path.read_text())
    machine = saved["machine_info"]
    groups: dict[str, dict[str, dict]] = {}
    for run in saved["benchmarks"]:
        name = run["params"]["implementation"]
        groups.setdefault(run["group"], {})[name] = run
    lines = [
        "| size | best peer | its time | vae_fast | ratio | inplace | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for group, runs in groups.items():
        if "forward+backward" not in group:
            continue
        medians = {name: run["stats"]["median"] for name, run in runs.items()}
        peer = min((n for n in medians if n not in OURS), key=medians.get)
        cells = [
            group.removeprefix("elbo forward+backward "),
            peer,
            f"{medians[peer] * 1e3:.2f} ms",
        ]
        for name in OURS:
            ratio = medians[peer] / medians[name]
            cells += [f"{medians[name] * 1e3:.2f} ms", f"{ratio:.1f}×"]
        lines.append("| " + " | ".join(cells) + " |")
    cpu = machine["cpu"].get("brand_raw", machine["machine"])
    lines += [
        "",
        f"Medians on {cpu}, {machine['threads']} threads, torch {machine['torch']}. "
        "B is the batch, L the latent and D the data size.",
    ]
    return "\n".join(lines)


def training_table(runs: dict[str, Path]) -> str:
    lines = [
        "| decoder's variance | validation NLL (nats/image) | KL | ELBO |",
        "| --- | --- | --- | --- |",
    ]
    for name, run in runs.items():
        with (run / "metrics.csv").open() as file:
            last = list(csv.DictReader(file))[-1]
        cells = [name, *(f"{float(last[c]):.2f}" for c in ("val_nll", "val_kl", "val_elbo"))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(bench: str, learned: str, unit: str) -> None:
    tables = {
        "benchmark": benchmark_table(Path(bench)),
        "training": training_table({"learned per pixel": Path(learned), "one": Path(unit)}),
    }
    readme = ROOT / "README.md"
    text = readme.read_text()
    for marker, table in tables.items():
        pattern = rf"<!-- {marker} -->.*?<!-- /{marker} -->"
        text = re.sub(pattern, f"<!-- {marker} -->\n{table}\n<!-- /{marker} -->", text, flags=re.S)
    readme.write_text(text)
    (ROOT / "docs").mkdir(exist_ok=True)
    shutil.copy(Path(learned) / "reconstructions.png", ROOT / "docs" / "reconstructions.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
