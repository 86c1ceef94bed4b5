"""Checkpoints of an unfinished training run: all that its next step depends on, in one file.

The file is safetensors: tensors, and JSON in its header. Reading one runs no code.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vae_fast
from vae_fast import _files, backends
from vae_fast.cli.errors import CommandError
from vae_fast.vae import VAE

NAME = "checkpoint.safetensors"
MODEL = "model.safetensors"  # what a run is for, beside it
_FORMAT = 1
_INFO, _DIGEST = "vae_fast_training", "sha256"  # keys of the file's header
_WAY_OUT = "move it away, or start without --resume"
_FIELDS = {"arguments": dict, "environment": dict, "step": int, "seen": int, "rows": list}


@dataclass
class State:
    """A training run between two steps.

    Attributes:
        vae: the model.
        optimizer: of its parameters.
        step: optimizer steps so far; the learning rate and β are functions of it.
        rows: metrics of the epochs so far.
        seen: rows of the data that the present epoch has seen.
        order: the order in which it sees them, int64 (N,).
        totals: NLL and KL of the rows seen, summed, fp32 (2,).
    """

    vae: VAE
    optimizer: torch.optim.Optimizer
    step: int = 0
    rows: list[dict[str, float]] = field(default_factory=list)
    seen: int = 0
    order: Tensor | None = None
    totals: Tensor | None = None


def environment(state: State, processes: int) -> dict[str, Any]:
    """What no option of the run says, but rounds its results."""
    return {
        "backend": backends.backend_for(_device(state).type),
        "vae_fast": vae_fast.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "processes": processes,
    }


# ---------------------------------------------------------------- writing


class Saver:
    """Writes a run's checkpoints, and its model.

    Args:
        path: the file.
        state: the run.
        arguments: what the run depends on, by the name of its option.
        every: steps or seconds between two checkpoints, and which of them: (100, "steps").
        processes: how many train the model.
        active: whether this process is the one that writes.
    """

    def __init__(
        self,
        path: Path,
        state: State,
        arguments: dict[str, Any],
        every: tuple[float, str],
        processes: int,
        active: bool,
    ) -> None:
        self.path = path
        self._state = state
        self._arguments = arguments
        self._every, self._unit = every
        self._processes = processes
        self._active = active
        self._saved: int | None = state.step if path.exists() else None  # the step of the file
        self._last = self._now()

    def step_done(self) -> None:
        """Write a checkpoint if one is due."""
        if self._now() - self._last >= self._every:
            self.save()

    def save(self) -> None:
        """Write a checkpoint."""
        if self._active:
            with self.writing(self.path):
                write(self.path, self._state, self._arguments, self._processes)
            self._saved = self._state.step
        self._last = self._now()

    def save_model(self) -> None:
        """Write the model."""
        if self._active:
            path = self.path.with_name(MODEL)
            with self.writing(path):
                self._state.vae.save(path)

    def outlook(self) -> str:
        """What --resume would find, in words."""
        if self._saved is None:
            return "there is no checkpoint to continue from"
        return f"{self.path} is whole, and --resume continues from its step, {self._saved}"

    @contextlib.contextmanager
    def writing(self, path: Path) -> Iterator[None]:
        """Say what becomes of the run if ``path`` cannot be written."""
        try:
            yield
        except OSError as error:
            raise CommandError(
                f"{path} cannot be written: {error.strerror or error}; {self.outlook()}"
            ) from error

    def _now(self) -> float:
        return time.monotonic() if self._unit == "seconds" else self._state.step


def write(path: Path, state: State, arguments: dict[str, Any], processes: int) -> None:
    """Write a checkpoint in place of the one that is there, which an error leaves as it is."""
    import safetensors.torch

    tensors = {f"model.{name}": value for name, value in state.vae.state_dict().items()}
    for index, values in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in values.items()}
    tensors |= {f"rng.{name}": module.get_rng_state() for name, module in _rngs(state).items()}
    if state.seen:
        tensors |= {"order": state.order, "totals": state.totals}
    # A copy each, because the format has no notion of tensors that share memory.
    tensors = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in tensors.items()}
    info = json.dumps(
        {
            "format": _FORMAT,
            "arguments": arguments,
            "environment": environment(state, processes),
            "step": state.step,
            "seen": state.seen,
            "rows": state.rows,
        }
    )
    header = {_INFO: info, _DIGEST: _digest(info, tensors)}  # all of it is checked
    _files.write_atomic(path, safetensors.torch.save(tensors, metadata=header))


def make_room(path: Path) -> Path | None:
    """Clear the way for a run from the start.

    Returns:
        Where the checkpoint of a run that did not finish went, if there is one.
    """
    if not os.path.lexists(path):
        return None
    with contextlib.suppress(CommandError, FileNotFoundError):  # a link may lead nowhere
        info, _ = _read(path, tensors=False)
        finished = len(info["rows"]) == info["arguments"].get("epochs")
        # Without the model beside it, it has the only copy of the weights.
        if finished and path.with_name(MODEL).exists():
            path.unlink()
            return None
    number = 1
    while (aside := path.with_stem(f"{path.stem}.{number}")).exists():
        number += 1
    os.replace(path, aside)
    return aside


# ---------------------------------------------------------------- reading


def resume(
    path: Path,
    state: State,
    arguments: dict[str, Any],
    processes: int,
    names: Sequence[str],
    count: int,
) -> list[str]:
    """Put a run where a checkpoint left it.

    Args:
        path: the file.
        state: a run that has just been set up; overwritten.
        arguments: what it depends on, which the checkpoint's run must share.
        processes: how many train the model.
        names: of the metrics of an epoch.
        count: rows of the data.

    Returns:
        What of the environment is not as it was, in words.

    Raises:
        FileNotFoundError: there is no such file.
        CommandError: it is of another run, damaged, or no checkpoint.
    """
    try:
        info, tensors = _read(path)
    except CommandError as error:
        raise CommandError(f"{error}; {_WAY_OUT}") from error
    was, now = info["arguments"], json.loads(json.dumps(arguments))
    changed = [
        f"--{name} {_shown(was.get(name))} there, {_shown(value)} here"
        for name, value in now.items()
        if was.get(name) != value
    ]
    if changed:
        raise CommandError(
            f"--resume: {path} is of another run: {'; '.join(changed)}. Give the same options, or "
            "another --out"
        )
    try:
        _check_progress(info, arguments, names, count)
        _restore(state, info, tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CommandError(
            f"{path} is damaged: it does not fit the run that it says it is of: {error}; {_WAY_OUT}"
        ) from error
    here, there = environment(state, processes), info["environment"]
    return [
        f"{name} {there.get(name)} there, {value} here"
        for name, value in here.items()
        if there.get(name) != value
    ]


def _check_progress(
    info: dict[str, Any], arguments: dict[str, Any], names: Sequence[str], count: int
) -> None:
    """Raise ValueError if a run with these arguments never is where the header says it was."""
    step, seen, rows = info["step"], info["seen"], info["rows"]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or row.keys() != set(names) or row["epoch"] != number:
            raise ValueError(f"epoch {number} has not the metrics {', '.join(names)}")
        if not all(isinstance(value, (int, float)) for value in row.values()):
            raise ValueError(f"the metrics of epoch {number} are not numbers")
    epochs, batch = arguments["epochs"], arguments["batch-size"]
    whole = 0 <= seen <= count and (seen % batch == 0 or seen == count)
    steps = len(rows) * math.ceil(count / batch) + math.ceil(seen / batch)
    if not whole or step != steps or len(rows) + (seen > 0) > epochs:
        raise ValueError(
            f"step {step}, with {len(rows)} epochs and {seen} rows more, is not one of {epochs} "
            f"epochs of {count} rows in batches of {batch}"
        )


def _restore(state: State, info: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    def under(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    state.vae.load_state_dict(under("model."))
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in under("optimizer.").items():
        index, _, name = name.partition(".")
        moments.setdefault(int(index), {})[name] = value
    # The groups and their rates are the run's arguments.
    groups = state.optimizer.state_dict()["param_groups"]
    state.optimizer.load_state_dict({"state": moments, "param_groups": groups})
    for name, module in _rngs(state).items():
        module.set_rng_state(tensors[f"rng.{name}"])
    state.step, state.rows, state.seen = info["step"], info["rows"], info["seen"]
    if state.seen:
        state.order, state.totals = (
            tensors[name].to(_device(state)) for name in ("order", "totals")
        )


def _read(path: Path, tensors: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The JSON of a checkpoint and its tensors, checked to be what was written."""
    import safetensors

    found: dict[str, Tensor] = {}
    try:
        with safetensors.safe_open(os.fspath(path), framework="pt", device="cpu") as file:
            header = file.metadata() or {}
            for name in file.keys() if tensors else ():
                # A copy, aligned like any tensor; the file's are not.
                found[name] = file.get_tensor(name).clone()
    except FileNotFoundError:
        raise
    except (safetensors.SafetensorError, OSError) as error:
        raise CommandError(f"{path} is damaged or no checkpoint: {error}") from error
    if _INFO not in header:
        raise CommandError(f"{path} is no checkpoint of vae-fast train")
    if tensors and header.get(_DIGEST) != _digest(header[_INFO], found):
        raise CommandError(f"{path} is damaged: its contents do not match their checksum")
    try:
        info = json.loads(header[_INFO])
        form = info["format"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CommandError(f"{path} is damaged: its header cannot be read ({error})") from error
    if form != _FORMAT:
        raise CommandError(f"{path} has format {form}, this version reads format {_FORMAT}")
    for name, kind in _FIELDS.items():
        if not isinstance(info.get(name), kind):
            raise CommandError(f"{path} is damaged: its header has no {name}")
    return info, found


# ---------------------------------------------------------------- both


def _digest(info: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(info.encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _rngs(state: State) -> dict[str, Any]:
    """The modules that hold the random generators of the CPU and of the current device."""
    kind = _device(state).type
    return {"cpu": torch} | ({} if kind == "cpu" else {kind: torch.get_device_module(kind)})


def _device(state: State) -> torch.device:
    return next(state.vae.parameters()).device


def _shown(value: object) -> str:
    if value is None:
        return "not given"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
