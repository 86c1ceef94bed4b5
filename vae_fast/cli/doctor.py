"""``vae-fast doctor``: what runs on this machine, and why the rest does not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vae_fast import backends


def doctor() -> None:
    """Print the environment report."""
    print(render(backends.report()))


def render(report: Mapping[str, Any]) -> str:
    """The environment report as text.

    Args:
        report: what ``vae_fast.backends.report()`` returns; a part that is missing or empty is
            left out or said to be missing.
    """
    lines = ["Versions"]
    lines += _table(report.get("versions") or {})
    lines += ["", "Backends"]
    for entry in report.get("devices") or []:
        name = f" ({entry['name']})" if entry.get("name") else ""
        backend = entry.get("backend") or f"nothing: {entry.get('reason')}"
        lines.append(f"  {entry.get('device', '?')}{name}: served by {backend}")
        for name, reason in (entry.get("others") or {}).items():
            lines.append(f"    {name}: {reason}")
    lines += ["", "CPU extension"]
    extension = report.get("extension")
    if isinstance(extension, Mapping):
        lines += _table(extension)
    else:
        lines.append(f"  {extension or 'none'}")
    # Whatever else the report has to say.
    for title, content in report.items():
        if title not in ("versions", "devices", "extension") and content:
            lines += ["", str(title).capitalize()]
            table = isinstance(content, Mapping)
            lines += _table(content) if table else [f"  {_text(content)}"]
    return "\n".join(lines)


def _table(content: Mapping[str, Any]) -> list[str]:
    width = max(map(len, map(str, content)), default=0)
    return [f"  {name!s:<{width}}  {_text(value)}" for name, value in content.items()]


def _text(value: Any) -> str:
    if value is None or value == "":
        return "none"
    if isinstance(value, float):
        return f"{value:.1f}"
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "none"
    return str(value)
