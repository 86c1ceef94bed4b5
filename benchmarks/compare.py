"""Says which rows of one run are slower, or faster, than those of another, beyond noise.

    python -m benchmarks.compare before.json after.json

A row's time is taken relative to the peers' of its group in the same run, and to that of the copies
which took turns with them, since a shared machine is slower at one time than at another for all of
them. Peers alone would not do: what page faults cost them differs from run to run. Noise is how far
the medians of a row's turns lie apart in either run, and the peers' changes from one another. A row
changed if it did so beyond noise by both measures, and by both the turns of one run are all above
those of the other. Exits with 1 if a row of ours got slower, or is missing from a group that the
second run has.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report import duration
from benchmarks.saved import Group, is_ours, load

LEAST = 0.05  # a smaller change is never called one
# Facts of a run that say nothing of the machine.
OF_THE_RUN = {"copy GB/s", "date", "commit", "vae_fast"}


def spread(facts: dict) -> float:
    """The typical distance of the turns' medians from their own median, as a share of it."""
    middle = statistics.median(facts["turns"])
    return statistics.median(abs(turn - middle) for turn in facts["turns"]) / middle


def drift(before: Group, after: Group) -> tuple[float, float]:
    """How much slower the peers that both runs have were, as the middle one of them says, and the
    typical distance of the others from it, as a share.
    """
    shared = [n for n in before.rows if n in after.rows and not is_ours(n)]
    ratios = [after.rows[n]["median"] / before.rows[n]["median"] for n in shared] or [1.0]
    middle = statistics.median(ratios)
    return middle, statistics.median(abs(ratio - middle) for ratio in ratios) / middle


def copy_seconds(group: Group) -> float | None:
    """What a copied byte took while the group ran; None if no row of it says."""
    for facts in group.rows.values():
        if facts.get("share"):
            return facts["median"] * facts["share"] / facts["bytes"]
    return None


def side(before: list[float], after: list[float]) -> int:
    """1 if every turn after was above every one before, −1 if below, 0 if neither."""
    return (min(after) > max(before)) - (max(after) < min(before))


@dataclass(frozen=True)
class Change:
    """A row of ours in two runs."""

    row: str
    implementation: str
    before: float  #: seconds
    ratio: float  #: of the seconds after, if the machine were as fast, to those before
    noise: float  #: share
    sides: set[int]  #: on which the turns after are of those before, by each measure

    @property
    def verdict(self) -> str:
        beyond = 1 + max(LEAST, self.noise)
        if self.sides == {1} and self.ratio > beyond:
            return "slower"
        return "faster" if self.sides == {-1} and self.ratio < 1 / beyond else ""


def changes(before: list[Group], after: list[Group]) -> tuple[list[Change], list[str]]:
    """Every row of ours that both runs have; and what only the first has of a group of both."""
    known = {g.place: g for g in before}
    found, missing = [], []
    for group in after:
        old = known.get(group.place)
        row = f"{group.of} {group.phase} {group.dtype} {group.size}"
        for name in old.ours() if old else ():
            if name not in group.rows:
                missing.append(f"{row} {name}")
                continue
            a, b = old.rows[name], group.rows[name]
            slower, uncertain = drift(old, group)
            noise = 3 * 1.4826 * math.hypot(spread(a), spread(b), uncertain)
            copies = copy_seconds(old), copy_seconds(group)
            machine = [slower, *([copies[1] / copies[0]] if None not in copies else [])]
            ratios = [b["median"] / a["median"] / by for by in machine]
            ratio = min(ratios, key=lambda r: abs(math.log(r)))
            sides = {side(a["turns"], [turn / by for turn in b["turns"]]) for by in machine}
            found.append(Change(row, name, a["median"], ratio, noise, sides))
    return found, missing


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("before", type=Path, help="run.json of a report, or what pytest wrote")
    parser.add_argument("after", type=Path)
    args = parser.parse_args()
    (machine, before), (other, after) = load(args.before), load(args.after)
    for fact in sorted((machine.keys() | other.keys()) - OF_THE_RUN):
        if machine.get(fact) != other.get(fact):
            print(f"{fact} differs: {machine.get(fact)} and {other.get(fact)}", file=sys.stderr)
    rows, missing = changes(before, after)
    if not rows and not missing:
        print("the runs have no row in common", file=sys.stderr)
        return 2
    for change in sorted(rows, key=lambda c: -c.ratio):
        if change.verdict:
            name = f"{change.row} {change.implementation}, was {duration(change.before)}"
            print(f"{change.verdict:7s} {change.ratio:5.2f}x (noise {change.noise:.0%}) {name}")
    for name in missing:
        print(f"missing {name}")
    slower = sum(change.verdict == "slower" for change in rows)
    print(f"{len(rows)} rows, {slower} slower" + (f", {len(missing)} missing" if missing else ""))
    return 1 if slower or missing else 0


if __name__ == "__main__":
    sys.exit(main())
