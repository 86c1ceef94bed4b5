"""README's table of what the package works with, made from the tests that are marked for it.

python tests/works_with.py writes it; with --print it only says what it would write.
"""

import contextlib
import io
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
MARKERS = "<!-- works with -->\n", "<!-- /works with -->"


class _Collector:
    """Which files test each topic, and whether only a GPU runs them."""

    def __init__(self):
        self.files: dict[str, set[str]] = {}
        self.on_cpu: set[str] = set()

    def pytest_collection_finish(self, session):
        for item in session.items:
            for marker in item.iter_markers("works_with"):
                for topic in marker.args:
                    self.files.setdefault(topic, set()).add(item.path.name)
                    if item.get_closest_marker("gpu") is None:
                        self.on_cpu.add(topic)


def table() -> str:
    """The table, of a fresh collection of the tests."""
    collector = _Collector()
    with contextlib.redirect_stdout(io.StringIO()) as output:
        arguments = [str(ROOT / "tests"), "--collect-only", "--quiet", f"--rootdir={ROOT}"]
        failed = pytest.main(arguments, plugins=[collector])
    if failed:
        raise RuntimeError(f"the tests cannot be collected:\n{output.getvalue()[-2000:]}")
    lines = ["| works with | tested on | in |", "| --- | --- | --- |"]
    for topic in sorted(collector.files, key=str.lower):
        files = ", ".join(f"`{name}`" for name in sorted(collector.files[topic]))
        where = "CPU" if topic in collector.on_cpu else "GPU only"
        lines.append(f"| {topic} | {where} | {files} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    start, end = MARKERS
    text = re.sub(f"{start}.*?{end}", f"{start}{table()}{end}", README.read_text(), flags=re.S)
    README.write_text(text)


if __name__ == "__main__":
    if sys.argv[1:] == ["--print"]:
        sys.stdout.write(table())
    else:
        main()
