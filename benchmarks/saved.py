"""Saved runs of the benchmarks: reading, and shrinking to what a report needs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

OURS = "vae_fast"
COMPILE = "torch.compile"
INPLACE, COMPILED, GRAPHS = f"{OURS} inplace", f"{OURS} compiled", f"{OURS} CUDA graphs"


def is_ours(implementation: str) -> bool:
    return implementation.startswith(OURS)


def best_peer(rows: dict[str, dict]) -> str | None:
    """The fastest peer of those that had all turns: a single one may have been a lucky one."""
    peers = {name: facts for name, facts in rows.items() if not is_ours(name)}
    most = max((len(facts["turns"]) for facts in peers.values()), default=0)
    full = [name for name, facts in peers.items() if len(facts["turns"]) == most]
    return min(full, key=lambda name: peers[name]["median"], default=None)


@dataclass
class Group:
    """Rows of one loss, phase, dtype and size; the facts of each implementation."""

    of: str
    phase: str
    dtype: str
    size: str
    rows: dict[str, dict] = field(default_factory=dict)

    @property
    def best_peer(self) -> str | None:
        return best_peer(self.rows)

    @property
    def place(self) -> tuple[str, str, str, str]:
        """What tells it from all other groups of a run."""
        return self.of, self.phase, self.dtype, self.size

    def ratio(self, implementation: str) -> float | None:
        """How many times the best peer's time it fits into."""
        best = self.best_peer
        return best and self.rows[best]["median"] / self.rows[implementation]["median"]

    def differs(self, implementation: str) -> bool:
        """Whether it came out on the same side of the best peer in every turn.

        Not if the best peer did not take part in all of them.
        """
        peer, own = (self.rows[name]["turns"] for name in (self.best_peer, implementation))
        return len(peer) == len(own) and len({p > o for p, o in zip(peer, own, strict=True)}) == 1

    def ours(self) -> Iterator[str]:
        return (name for name in self.rows if is_ours(name))


def load(path: Path) -> tuple[dict, list[Group]]:
    """The machine's facts and the groups of a run, in its order, without what was wrong.

    Args:
        path: what ``--benchmark-json`` wrote, or ``run.json`` of a report.
    """
    saved = json.loads(Path(path).read_text())
    groups: dict[str, Group] = {}
    for bench in saved["benchmarks"]:
        facts = dict(bench["extra_info"])
        place = {name: facts.pop(name) for name in ("of", "phase", "dtype", "size")}
        facts["median"] = bench["stats"]["median"]
        group = groups.setdefault(bench["group"], Group(**place))
        group.rows[facts.pop("implementation")] = facts
    return saved["machine_info"]["vae_fast"], list(groups.values())


def load_wrong(path: Path) -> list[dict[str, str]]:
    """``group``, ``implementation`` and ``wrong``, the reason, of what was not timed for it."""
    return json.loads(Path(path).read_text()).get("wrong", [])


def shrink(source: Path, target: Path) -> None:
    """Copy a run without what no report needs: a row a line, four digits a number."""
    saved = json.loads(Path(source).read_text())
    rows = [
        {
            "group": bench["group"],
            "stats": {"median": bench["stats"]["median"]},
            "extra_info": bench["extra_info"],
        }
        for bench in saved["benchmarks"]
        if "implementation" in bench["extra_info"]
    ]
    rounded = json.loads(json.dumps(rows), parse_float=lambda text: float(f"{float(text):.4g}"))
    machine = json.dumps({"vae_fast": saved["machine_info"]["vae_fast"]}, indent=1)
    lines = ",\n".join(json.dumps(row) for row in rounded)
    wrong = f',\n"wrong": {json.dumps(saved["wrong"])}' if saved.get("wrong") else ""
    target.write_text(f'{{"machine_info": {machine},\n"benchmarks": [\n{lines}\n]{wrong}}}\n')
