"""Says which rows of one run are slower, or faster, than those of another, beyond noise.

    python -m benchmarks.compare before.json after.json

A row's time is taken relative to the peers' of its group in the same run, since a shared machine is
slower at one time than at another for all of them. Noise is how far the medians of a row's turns
lie apart in either run. Exits with 1 if a row of ours got slower.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from pathlib import Path

from benchmarks.report import duration
from benchmarks.saved import Group, is_ours, load

LEAST = 0.05  # a smaller change is never called one


def spread(facts: dict) -> float:
    """The typical distance of the turns' medians from their own median, as a share of it."""
    middle = statistics.median(facts["turns"])
    return statistics.median(abs(turn - middle) for turn in facts["turns"]) / middle


def drift(before: Group, after: Group) -> float:
    """How much slower the peers that both runs have were, as the middle one of them says."""
    shared = [n for n in before.rows if n in after.rows and not is_ours(n)]
    ratios = [after.rows[n]["median"] / before.rows[n]["median"] for n in shared]
    return statistics.median(ratios) if ratios else 1.0


def changes(before: list[Group], after: list[Group]) -> list[tuple[str, str, float, float, float]]:
    """(row, implementation, seconds before, change as a ratio, noise) of every row of ours."""
    known = {(g.of, g.phase, g.dtype, g.size): g for g in before}
    found = []
    for group in after:
        old = known.get((group.of, group.phase, group.dtype, group.size))
        for name in group.ours() if old else ():
            if name not in old.rows:
                continue
            a, b = old.rows[name], group.rows[name]
            noise = 3 * 1.4826 * math.hypot(spread(a), spread(b))
            change = b["median"] / a["median"] / drift(old, group)
            row = f"{group.of} {group.phase} {group.dtype} {group.size}"
            found.append((row, name, a["median"], change, noise))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("before", type=Path, help="run.json of a report, or what pytest wrote")
    parser.add_argument("after", type=Path)
    args = parser.parse_args()
    (machine, before), (other, after) = load(args.before), load(args.after)
    for fact in ("processor", "gpu", "threads", "torch"):
        if machine.get(fact) != other.get(fact):
            print(f"{fact} differs: {machine.get(fact)} and {other.get(fact)}", file=sys.stderr)
    rows = changes(before, after)
    if not rows:
        print("the runs have no row in common", file=sys.stderr)
        return 2
    slower = 0
    for row, name, seconds, change, noise in sorted(rows, key=lambda r: -r[3]):
        beyond = max(LEAST, noise)
        verdict = "slower" if change > 1 + beyond else "faster" if change < 1 / (1 + beyond) else ""
        slower += verdict == "slower"
        if verdict:
            was = f"(noise {noise:.0%}) {row} {name}, was {duration(seconds)}"
            print(f"{verdict:7s} {change:5.2f}x {was}")
    print(f"{len(rows)} rows, {slower} slower")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
