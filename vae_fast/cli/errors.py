"""How the command ends early, and the checks the commands share."""

from __future__ import annotations

import importlib.util

import torch


class CommandError(Exception):
    """Wrong input: the command prints the message, without a traceback, and exits with 2."""


class Terminated(Exception):
    """SIGTERM, after what had to be saved was saved: the command exits with 143."""


def require(*modules: str) -> None:
    """Raise :class:`CommandError` if an optional dependency is missing."""
    names = {"sklearn": "scikit-learn", "PIL": "Pillow"}
    missing = [names.get(m, m) for m in modules if importlib.util.find_spec(m) is None]
    if missing:
        raise CommandError(f'this needs {" and ".join(missing)}: pip install "vae_fast[train]"')


def pick_device(name: str) -> torch.device:
    """The device called ``name`` ("auto": the GPU if there is one), checked to be usable."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).fill_(0.0).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CommandError(f"--device {name} cannot be used here: {reason}") from error
    return device
