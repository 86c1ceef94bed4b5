"""``vae-fast train``: train a VAE, measure it, and draw what it learned."""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import ctypes
import hashlib
import math
import os
import platform
import re
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import vae_fast
from vae_fast import _files, noise, reference, schedules
from vae_fast.cli import checkpoint, signals
from vae_fast.cli import data as datasets
from vae_fast.cli.errors import CommandError, Terminated, require
from vae_fast.cli.job import Job, join
from vae_fast.elbo import OPTIMAL
from vae_fast.vae import VAE, _pair, _raw_scale

METRICS = "metrics.csv"
COLUMNS = (
    "epoch",
    "train_elbo",
    "train_nll",
    "train_kl",
    "val_elbo",
    "val_nll",
    "val_kl",
    "samples_per_s",
)
# In a run whose likelihood bounds the mass of the data's levels.
BITS = "val_bits_per_dim"
# Adam moves a parameter by about its learning rate per step. The learned scale of
# --variance scalar or channel has units to travel, not hundredths, so it gets a larger rate.
_SCALAR_RATE = 20.0
# What --likelihood-scale may name that all the rows of a batch share.
_COUPLING = tuple(name for name, shared in OPTIMAL.items() if shared != "sample")
# Widths of the networks, unless --hidden gives them.
_HIDDEN = {"mlp": (512, 256), "conv": (32, 64)}
# Points of a scatter plot that still can be told apart.
_DRAWN = 10_000


def keep_freed_memory() -> None:
    """Have glibc keep what a step frees for the next one, which else faults it in page by page.

    PyTorch's CPU allocator is the C library's, which returns large memory to the system. What the
    environment says of its thresholds holds.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    trim, mmap = -1, -3
    # Once either is set glibc adapts neither, so trim is left alone where mmap is refused: of some
    # versions the documented 32 MiB are the most.
    kept = "MALLOC_MMAP_THRESHOLD_" in os.environ or any(mallopt(mmap, 1 << n) for n in (30, 25))
    if kept and "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        mallopt(trim, 1 << 30)


def train(args: argparse.Namespace) -> None:
    """Run the command with parsed arguments."""
    require("matplotlib", "safetensors", "tqdm")
    started = time.perf_counter()
    data = datasets.load(args.data, args.image_size)
    out = Path(args.out)

    with _backend(args.backend), contextlib.ExitStack() as until_the_end:
        with join(args.device) as job:
            state = _set_up(args, data, job)
            if job.main:
                until_the_end.enter_context(_alone(out))
            saver = _train(state, args, data, out, job)
        if not job.main:
            return
        vae, rows = state.vae.eval(), state.rows
        train_index, val_index = datasets.split(data, args.seed)
        with saver.writing(out):
            pictures = _draw(vae, data, val_index, rows, out)

        last = rows[-1]
        per_element = last["val_elbo"] / math.prod(data.event_shape)
        element = "pixel" if data.unit == "image" else "element"
        job.say(
            f"\nvalidation ELBO after epoch {last['epoch']}: {last['val_elbo']:.2f} nats per "
            f"{data.unit}, {per_element:.4f} per {element} "
            f"(NLL {last['val_nll']:.2f}, KL {last['val_kl']:.2f})"
            + (f"; at most {last[BITS]:.3f} bits/dim" if BITS in last else "")
        )
        if args.compare and args.backend != "reference" and job.size == 1 and _comparable(vae):
            job.say()
            _compare(vae, data.x[train_index[: args.batch_size]].to(job.device), job)
    job.say(f"\nmodel:    {out / checkpoint.MODEL}\nmetrics:  {out / METRICS}")
    job.say("pictures: " + "\n          ".join(str(p) for p in pictures))
    job.say(f"all done in {time.perf_counter() - started:.0f} s")


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Have the folder to write to, which no other run may write to meanwhile."""
    with contextlib.ExitStack() as stack:
        try:
            out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_files.locked(out))
        except BlockingIOError as error:
            raise CommandError(f"--out {out}: another run is writing there") from error
        except FileExistsError as error:
            raise CommandError(f"--out {out} is a file, and no folder") from error
        except OSError as error:
            raise CommandError(f"--out {out}: {error.strerror}") from error
        yield


def _set_up(args: argparse.Namespace, data: datasets.Data, job: Job) -> checkpoint.State:
    """A run before its first step, whose options are checked."""
    torch.manual_seed(args.seed)
    vae = _build(args, data).to(job.device)
    _check_parts(vae, job)
    _check(vae, data.x[:2].to(job.device), args.backend)
    return checkpoint.State(vae, _optimizer(vae, args.lr))


def _train(
    state: checkpoint.State, args: argparse.Namespace, data: datasets.Data, out: Path, job: Job
) -> checkpoint.Saver:
    """Resume the run, if it is to be, and train; returns what keeps it."""
    vae = state.vae
    train_index, val_index = datasets.split(data, args.seed)
    x_train, x_val = data.x[train_index].to(job.device), data.x[val_index].to(job.device)
    parameters = sum(p.numel() for p in vae.parameters())
    together = f" in {job.size} processes" if job.size > 1 else ""
    job.say(
        f"{data.name}: {len(x_train)} {data.unit}s to train, {len(x_val)} to validate, "
        f"shape {'x'.join(map(str, data.event_shape))}; "
        f"{args.model} with {parameters:,} parameters on {job.device}{together}"
    )
    names = (*COLUMNS, BITS) if _bounds_bits(vae, data) else COLUMNS
    arguments = _arguments(args, data, job.device)
    saver = _begin(state, args, arguments, out / checkpoint.NAME, job, names, len(x_train))
    _fit(state, x_train, x_val, args, job, saver, _Metrics(out / METRICS, names, saver), data.unit)
    return saver


# ---------------------------------------------------------------- beginning and resuming


def _arguments(
    args: argparse.Namespace, data: datasets.Data, device: torch.device
) -> dict[str, Any]:
    """What the trained weights depend on, by the name of its option."""
    x = data.x.contiguous()
    digest = hashlib.sha256(x.numpy()).hexdigest()[:16]
    shape = "x".join(map(str, x.shape))
    names = ("model", "latent_dim", *_OPTIONS, "beta_warmup", "epochs", "batch_size", "lr", "seed")
    return {
        "data": f"of shape {shape}, {x.dtype}, levels {data.x_scale}, sha256 {digest}",
        "hidden": list(_hidden(args)),
        **{name.replace("_", "-"): getattr(args, name) for name in names},
        "device": device.type,
        "backend": args.backend,
    }


def _begin(
    state: checkpoint.State,
    args: argparse.Namespace,
    arguments: dict[str, Any],
    path: Path,
    job: Job,
    names: Sequence[str],
    count: int,
) -> checkpoint.Saver:
    """Put the run at its checkpoint, if it is to be resumed and there is one."""
    resumed = False
    if args.resume:
        try:
            changes = checkpoint.resume(path, state, arguments, job.size, names, count)
            resumed = True
            job.say(f"resuming {path}: {len(state.rows)} epochs, {state.step} steps")
            if changes:
                job.say(f"the last bits may differ from those of one run: {'; '.join(changes)}")
        except FileNotFoundError:
            job.say(f"nothing to resume: there is no {path}")
    job.agree(f"{arguments} {state.step}")
    if job.main:
        try:
            for name in (checkpoint.NAME, checkpoint.MODEL):
                _files.remove_leftovers(path.with_name(name))
            aside = None if resumed else checkpoint.make_room(path)
            model = path.with_name(checkpoint.MODEL)
            if not resumed and model.exists():
                before = model.with_stem(f"{model.stem}.previous")
                os.replace(model, before)
                job.say(f"the model that was there is now {before}")
        except OSError as error:
            raise CommandError(f"--out {path.parent}: {error.strerror}") from error
        if aside:
            job.say(
                f"the checkpoint of a run that did not finish is now {aside}; to continue that "
                "run, move it back and pass --resume"
            )
    return checkpoint.Saver(path, state, arguments, args.checkpoint_every, job.size, job.main)


def _check_parts(vae: VAE, job: Job) -> None:
    """Fail if the loss of a batch is not the mean of its parts' losses, and there are parts."""
    elbo = vae.elbo
    for option, coupled in (
        ("--free-bits", elbo.free_bits is not None),
        ("--capacity", elbo.capacity is not None),
        (f"--likelihood-scale {elbo.likelihood_scale}", elbo.likelihood_scale in _COUPLING),
    ):
        if coupled and job.size > 1:
            raise CommandError(
                f"{option} is of a batch as a whole, which torchrun splits over {job.size} "
                "processes: train in one"
            )


# ---------------------------------------------------------------- training


_OPTIONS = (
    "variance",
    "likelihood",
    "likelihood_scale",
    "dequantize",
    "beta",
    "kl",
    "free_bits",
    "capacity",
    "objective",
    "estimator",
    "num_samples",
    "inplace",
)


def _build(args: argparse.Namespace, data: datasets.Data) -> VAE:
    options = {name: getattr(args, name) for name in _OPTIONS} | {"x_scale": data.x_scale}
    if isinstance(args.likelihood_scale, float):  # σ, which the loss takes as log σ²
        options["likelihood_scale"] = _raw_scale(args.likelihood_scale, "logvar")
    event_shape = data.event_shape
    if args.model == "conv" and len(event_shape) != 3:
        raise CommandError(f"--model conv needs images, but one data point is of {event_shape}")
    _check_data(args, data)
    try:
        build = VAE.mlp if args.model == "mlp" else VAE.conv
        return build(event_shape, args.latent_dim, _hidden(args), **options)
    except ValueError as error:
        raise CommandError(_as_typed(str(error), args)) from error


def _as_typed(message: str, args: argparse.Namespace) -> str:
    """What the loss has against its options, in the command line's words."""

    def option(match: re.Match) -> str:
        name, value = match[1] or match[3], match[2]
        if value and name == "likelihood_scale":
            value = args.likelihood_scale
        given = f" {value}" if value not in (None, "True") else ""
        return f"--{name.replace('_', '-')}{given}"

    # With its value or, if it is no word of English, alone.
    names, alone = "|".join(_OPTIONS), "|".join(name for name in _OPTIONS if "_" in name)
    unquoted = re.sub(r"(['\"])(\w+)\1", r"\2", message)
    return re.sub(rf"\b(?:({names})=([^\s,;]+)|({alone})\b)", option, unquoted)


def _hidden(args: argparse.Namespace) -> Sequence[int]:
    return args.hidden or _HIDDEN[args.model]


def _check_data(args: argparse.Namespace, data: datasets.Data) -> None:
    """Fail if the data are not what the options are for."""
    levels = data.x_scale is not None
    for option, wanted in (
        ("--likelihood logistic", args.likelihood == "logistic"),
        ("--dequantize", args.dequantize),
    ):
        if wanted and not levels:
            raise CommandError(f"{option} needs data of levels, uint8; {data.name} is not")
    if args.likelihood == "bernoulli" and not levels:
        lo, hi = float(data.x.min()), float(data.x.max())
        if lo < 0.0 or hi > 1.0:
            raise CommandError(
                f"--likelihood bernoulli needs data in [0, 1], but {data.name} goes from {lo:g} to "
                f"{hi:g}"
            )


def _bounds_bits(vae: VAE, data: datasets.Data) -> bool:
    """Whether the loss bounds the bits that the data take.

    So does a mass, and a density of levels with noise that fills the gaps between them; not the
    density of the levels themselves, which has no limit, nor the Bernoulli mass of greys.
    """
    if vae.elbo.likelihood == "bernoulli":
        x = data.values()
        return bool(((x == 0.0) | (x == 1.0)).all())
    return vae.elbo.likelihood == "logistic" or vae.elbo.dequantize


def _beta(args: argparse.Namespace) -> Callable[[int], float]:
    """The weight of the KL term at each step."""
    if args.beta_warmup is None:
        return lambda step: args.beta
    shape, steps = args.beta_warmup
    return getattr(schedules, shape)(steps, end=args.beta)


@contextlib.contextmanager
def _backend(name: str) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if name != "auto":
            try:
                stack.enter_context(vae_fast.use_backend(name))
            except (ValueError, RuntimeError) as error:
                raise CommandError(f"--backend {name}: {error}") from error
        yield


def _check(vae: VAE, x: Tensor, backend: str) -> None:
    """Fail before anything is trained if the chosen backend cannot run here."""
    try:
        with torch.no_grad():
            vae(x)
    except (ValueError, RuntimeError) as error:
        wanted = os.environ.get("VAE_FAST_BACKEND")
        if backend == "auto" and not wanted:
            raise
        option = f"VAE_FAST_BACKEND={wanted}" if backend == "auto" else f"--backend {backend}"
        raise CommandError(f"{option}: {error}") from error


def _optimizer(vae: VAE, lr: float) -> torch.optim.Optimizer:
    named = dict(vae.named_parameters())
    scale = named.pop("decoder.scale", None)
    groups = [
        {"params": list(named.values()), "lr": lr},
        {"params": [] if scale is None else [scale], "lr": lr * _SCALAR_RATE},
    ]
    for group in groups:
        group["initial_lr"] = group["lr"]
    return torch.optim.Adam([g for g in groups if g["params"]], lr=lr, fused=True)


class _Metrics:
    """The file of metrics, a row per epoch."""

    def __init__(self, path: Path, names: Sequence[str], saver: checkpoint.Saver) -> None:
        self._path, self.names, self._saver = path, names, saver

    def start(self, rows: list[dict[str, float]]) -> None:
        """Write the file anew, with the epochs so far."""
        with self._saver.writing(self._path), self._path.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.names)
            writer.writeheader()
            writer.writerows(map(self._shown, rows))

    def add(self, row: dict[str, float]) -> None:
        """Append an epoch."""
        with self._saver.writing(self._path), self._path.open("a", newline="") as file:
            csv.DictWriter(file, self.names).writerow(self._shown(row))

    @staticmethod
    def _shown(row: dict[str, float]) -> dict[str, Any]:
        return {k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()}


def _fit(
    state: checkpoint.State,
    x_train: Tensor,
    x_val: Tensor,
    args: argparse.Namespace,
    job: Job,
    saver: checkpoint.Saver,
    metrics: _Metrics,
    unit: str,
) -> None:
    """Train from wherever the run is. An interrupt ends it early, keeping the model."""
    from tqdm import tqdm

    vae, rows = state.vae, state.rows
    model = job.wrap(vae)
    # One key for every validation, so that epochs differ by the model and not by the noise.
    key = torch.tensor([args.seed, 0], dtype=torch.uint64).to(x_val.device)
    if job.main:
        metrics.start(rows)
    with (
        # Processes that note a signal at different steps would wait for one another.
        signals.noted(job.size == 1) as noted,
        tqdm(
            total=args.epochs * len(x_train),
            initial=len(rows) * len(x_train) + state.seen,
            unit=unit,
            unit_scale=True,
            disable=None if job.main and sys.stderr is not None else True,
        ) as progress,
    ):

        def step_done(count: int) -> None:
            progress.update(count)
            if noted.received is None:
                saver.step_done()
                return
            saver.save()
            heed_sigterm()
            raise KeyboardInterrupt

        def heed_sigterm() -> None:
            if noted.received == signal.SIGTERM:
                raise Terminated(f"terminated after step {state.step}; {saver.outlook()}")

        def keep_model() -> None:
            vae.elbo.beta = args.beta
            saver.save_model()

        try:
            for epoch in range(len(rows) + 1, args.epochs + 1):
                began, seen = time.perf_counter(), state.seen
                trained = _train_epoch(state, model, x_train, args, job, step_done)
                rate = (len(x_train) - seen) / (time.perf_counter() - began)
                *validated, bits_per_dim = _evaluate(vae, x_val, args.batch_size, key, job)
                row = {"epoch": epoch, "samples_per_s": round(rate)}
                for name, value in (("train", trained), ("val", validated)):
                    nll, kl = value
                    row |= {f"{name}_elbo": -nll - kl, f"{name}_nll": nll, f"{name}_kl": kl}
                if BITS in metrics.names:
                    row[BITS] = bits_per_dim
                if not all(map(math.isfinite, row.values())):
                    raise CommandError(
                        f"the loss was not finite in epoch {epoch}: try a smaller --lr, or data "
                        "scaled to [0, 1]"
                    )
                rows.append(row)
                state.seen = 0
                if job.main:
                    metrics.add(row)
                shown = {
                    "ELBO": f"{row['val_elbo']:.2f}",
                    "NLL": f"{row['val_nll']:.2f}",
                    "KL": f"{row['val_kl']:.2f}",
                }
                progress.set_description(f"epoch {epoch}/{args.epochs}", refresh=False)
                progress.set_postfix(shown)
                if progress.disable and (epoch % max(1, args.epochs // 10) == 0 or epoch == 1):
                    text = ", ".join(f"{name} {value}" for name, value in shown.items())
                    job.say(
                        f"epoch {epoch}/{args.epochs}: validation {text} nats per {unit}; "
                        f"{rate:,.0f} {unit}s/s"
                    )
            try:
                keep_model()  # first: it may fit on a disk that has no room for both
            except CommandError:
                saver.save()
                keep_model()  # which says what there is now
            saver.save()
        except KeyboardInterrupt:
            heed_sigterm()
            if not rows or job.size > 1:
                raise
            job.say(
                f"\ninterrupted: keeping the model as it is, {len(rows)} epochs in; "
                f"{saver.outlook()}"
            )
            keep_model()
        heed_sigterm()


def _train_epoch(
    state: checkpoint.State,
    model: nn.Module,
    x: Tensor,
    args: argparse.Namespace,
    job: Job,
    step_done: Callable[[int], None],
) -> tuple[float, float]:
    """The rest of a pass over the data; mean NLL and KL per data point, before each batch's step.

    ``model`` is ``state.vae``, wrapped if there are several processes.
    """
    vae, optimizer = state.vae, state.optimizer
    beta = _beta(args)
    steps = args.epochs * math.ceil(len(x) / args.batch_size)
    vae.train()
    if state.seen == 0:
        state.order = torch.randperm(len(x), device=x.device)
        state.totals = torch.zeros(2, device=x.device)
    while state.seen < len(x):
        index = state.order[state.seen : state.seen + args.batch_size]
        # The whole batch has one key, and each of its rows the noise of its place in it.
        key = noise.make_key(x.device)
        first, count = job.part(len(index))
        # A process without rows takes part with one that weighs nothing: the rest await it.
        part = index[first : first + max(count, 1)]
        vae.elbo.beta = beta(state.step)
        _set_rate(optimizer, 0.5 * (1 + math.cos(math.pi * state.step / steps)))
        out = model(x[part], key=key, first_row=first)
        optimizer.zero_grad(set_to_none=True)
        if job.size == 1:
            out.loss.backward()
        else:  # the mean of what the processes add is the gradient of the batch's mean
            (out.loss * (count * job.size / len(index))).backward()
        optimizer.step()
        state.totals += job.sum(_totals(out.nll, out.kl, count))
        state.step += 1
        state.seen += len(index)
        step_done(len(index))
    nll, kl = (state.totals / len(x)).tolist()
    return nll, kl


def _set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


@torch.no_grad()
def _evaluate(
    vae: VAE, x: Tensor, batch_size: int, key: Tensor, job: Job
) -> tuple[float, float, float]:
    """Mean NLL, KL and bits/dim; the same key gives the same noise at any batch size."""
    vae.eval()
    totals = torch.zeros(3, device=x.device)
    for start in range(0, len(x), batch_size):
        first, count = job.part(min(batch_size, len(x) - start))
        if count:
            first += start
            out = vae(x[first : first + count], key=key, first_row=first)
            totals += _totals(out.nll, out.kl, count, out.bits_per_dim)
    nll, kl, bits = (job.sum(totals) / len(x)).tolist()
    return nll, kl, bits


def _totals(nll: Tensor, kl: Tensor, batch: int, *more: Tensor) -> Tensor:
    """NLL, KL and more, summed over the batch and averaged over the samples of z."""
    return torch.stack([rows.detach().mean() for rows in (nll, kl, *more)]) * batch


# ---------------------------------------------------------------- what was gained


def _comparable(vae: VAE) -> bool:
    """Whether :func:`_plain_loss` covers the model's options."""
    elbo = vae.elbo
    shaped = elbo.free_bits is not None or elbo.capacity is not None
    usual = elbo.objective == "elbo" and elbo.estimator == "standard"
    return usual and not shaped and elbo.likelihood_scale not in OPTIMAL


def _compare(vae: VAE, x: Tensor, job: Job) -> None:
    """Time the loss and whole training steps, fused and not, and print the ratios."""
    step, loss = measure(vae, x)
    names = {
        "fused": "vae_fast",
        "plain": "plain PyTorch (noise from torch.randn)",
        "reference": "reference backend (same noise as vae_fast)",
    }
    job.say(f"milliseconds for a batch of {len(x)}, forward and backward:")
    job.say(f"  {'':<43}{'loss alone':>16}{'training step':>18}")
    for which, name in names.items():
        cells = [f"{1e3 * t[which]:.3f} ({t[which] / t['fused']:.2f}x)" for t in (loss, step)]
        job.say(f"  {name:<43}{cells[0]:>16}{cells[1]:>18}")
    job.say(
        f"with vae_fast the training step ran at {step['plain'] / step['fused']:.2f}x the speed of "
        f"plain PyTorch and {step['reference'] / step['fused']:.2f}x that of the reference"
    )


def measure(
    vae: VAE, x: Tensor, rounds: int = 15, steps: int = 10, budget_s: float = 10.0
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds per training step and per loss, with the fused loss and without.

    The contestants take turns within each round, on the same data and the same networks, and each
    gets the median of its rounds. "reference" is the reference backend, which makes the kernels'
    own noise stream in Python; "plain" is the same formulas with ``torch.randn`` noise, as one
    would write them by hand.

    Args:
        vae: the model; it is copied, not changed.
        x: one batch.
        rounds: how often the contestants take turns.
        steps: repetitions in each turn.
        budget_s: no new round begins after so many seconds, except to make three.

    Returns:
        Two dicts with keys "fused", "reference" and "plain": seconds for a training step (encoder,
        loss, decoder, gradients, Adam), and for the loss alone, forward and backward, with the
        outputs of the two networks given.
    """
    vae = copy.deepcopy(vae).train()
    optimizer = _optimizer(vae, 1e-6)
    elbo = copy.copy(vae.elbo)
    elbo.inplace = False  # there is nothing to overwrite where the decoder's output is given
    with torch.no_grad():
        values = vae._encoder_input(x)
        posterior = vae.encoder(values)
        likelihood = vae.decoder(_pair(posterior, "")[0].repeat(elbo.num_samples, 1))
    given = [t.requires_grad_() for t in _tensors(posterior) + _tensors(likelihood)]
    # By hand one would keep the data in floating point.
    data = {_fused_loss: x, _plain_loss: values}

    def step(loss: Callable[..., Tensor]) -> None:
        optimizer.zero_grad(set_to_none=True)
        posterior = vae.encoder(vae._encoder_input(data[loss]))
        loss(elbo=vae.elbo, x=data[loss], posterior=posterior, decoder=vae.decoder).backward()
        optimizer.step()

    def loss_alone(loss: Callable[..., Tensor]) -> None:
        out = loss(elbo=elbo, x=data[loss], posterior=posterior, decoder=lambda z: likelihood)
        torch.autograd.grad(out, given, allow_unused=True)

    def timed(run: Callable[..., None], which: str) -> float:
        backend = vae_fast.use_backend("reference") if which == "reference" else None
        with backend or contextlib.nullcontext():
            began = time.perf_counter()
            for _ in range(steps):
                run(_plain_loss if which == "plain" else _fused_loss)
            if x.is_cuda:
                torch.cuda.synchronize(x.device)
            return (time.perf_counter() - began) / steps

    results = []
    for run in (step, loss_alone):
        times: dict[str, list[float]] = {"fused": [], "reference": [], "plain": []}
        began = time.perf_counter()
        for round_ in range(rounds + 1):
            if round_ > 3 and time.perf_counter() - began > budget_s:
                break
            for which, seconds in times.items():
                taken = timed(run, which)
                if round_:  # the first is a warm-up
                    seconds.append(taken)
        results.append({which: statistics.median(seconds) for which, seconds in times.items()})
    return results[0], results[1]


def _fused_loss(elbo, x: Tensor, posterior: Any, decoder: Callable[[Tensor], Any]) -> Tensor:
    return elbo(x, *_pair(posterior, "encoder"), decoder).loss


def _plain_loss(elbo, x: Tensor, posterior: Any, decoder: Callable[[Tensor], Any]) -> Tensor:
    """The loss as one would write it by hand: plain PyTorch, ``torch.randn`` noise.

    x is in floating point, levels too.
    """
    k = elbo.num_samples
    mu, posterior_scale = _pair(posterior, "encoder")
    rows = mu.shape if k == 1 else (k, *mu.shape)
    z, log_q, log_p = reference.reparameterize(
        mu,
        posterior_scale,
        elbo.posterior_param,
        num_samples=None if k == 1 else k,
        clamp=elbo.posterior_clamp,
        eps=torch.randn(rows, device=mu.device, dtype=mu.dtype),
    )
    output = decoder(z.reshape(-1, *mu.shape[1:]))
    if elbo.likelihood_scale is None and elbo.likelihood != "bernoulli":
        mean, scale = _pair(output, "decoder")
    else:
        mean, scale = output, elbo.likelihood_scale
    if k > 1:
        full = isinstance(scale, Tensor) and scale.shape == mean.shape
        scale = scale.unflatten(0, (k, -1)) if full else scale
        mean = mean.unflatten(0, (k, -1))
    if elbo.dequantize:
        x = x + elbo._levels[0] * torch.rand_like(x)
    nll = reference.likelihood_nll(
        x,
        mean,
        scale,
        elbo.likelihood,
        elbo.likelihood_param,
        elbo.likelihood_clamp,
        x_scale=elbo.x_scale,
    )
    if elbo.kl == "analytic":
        log_q, log_p = reference.gaussian_kl(mu, posterior_scale, param=elbo.posterior_param), None
        log_q = log_q.expand(nll.shape)
    return reference.elbo_loss(nll, log_q, log_p, elbo.beta, elbo.reduction)


def _tensors(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else list(output)


# ---------------------------------------------------------------- pictures


@torch.no_grad()
def _draw(
    vae: VAE, data: datasets.Data, val_index: Tensor, rows: list[dict[str, float]], out: Path
) -> list[Path]:
    """Draw what was learned; returns the files."""
    from vae_fast.cli import pictures

    image = datasets.is_image(data.event_shape)
    device = next(vae.parameters()).device
    written: list[Path] = []

    def at(name: str) -> Path:
        written.append(out / name)
        return out / name

    pictures.training_curves(rows, at("training_curves.png"), data.unit)

    shown = val_index[: 12 if image else 8]
    z, _ = vae.encode(data.x[shown].to(device))
    x, mean, std = data.values(shown), vae._mean(z).cpu(), _std(vae, z)
    pictures.reconstructions(x, mean, std, at("reconstructions.png"))

    count = 64 if image else 16
    key = torch.tensor([0, 0], dtype=torch.uint64)
    drawn = vae.sample(count, key=key).cpu()
    title = f"{count} samples: means of p(x|z), z from the prior"
    pictures.samples(drawn, at("samples.png"), title)

    first, second = _pairs(data, val_index, 8)
    between = vae.interpolate(data.x[first].to(device), data.x[second].to(device), steps=10).cpu()
    name = at("interpolations.png")
    pictures.interpolations(data.values(first), data.values(second), between, name)

    if vae.latent_shape == (2,):
        if image:
            line = torch.linspace(-3, 3, 13)
            z2, z1 = torch.meshgrid(line.flip(0), line, indexing="ij")
            plane = torch.stack([z1, z2], -1).reshape(-1, 2).to(device)
            pictures.manifold(vae._mean(plane).cpu(), line, at("manifold.png"))
        mu = torch.cat(
            [vae.encode(part.to(device))[0].cpu() for part in data.x[:_DRAWN].split(1024)]
        )
        y = None if data.y is None else data.y[:_DRAWN]
        pictures.encoded(mu, y, data.labels, at("encoded.png"))
    return written


def _std(vae: VAE, z: Tensor) -> Tensor | None:
    """The standard deviations that the decoder learned, on the CPU, if it learns a scale."""
    _, scale = vae.decode(z)
    if scale is None:
        return None
    _, tau = reference.log_scale_and_scale(scale, vae.elbo.likelihood_param)
    df = vae.elbo.df
    variance = {
        "gaussian": 1.0,
        "laplace": 2.0,
        "logistic": math.pi**2 / 3,
        "student_t": df / (df - 2.0) if df > 2.0 else math.inf,
    }[vae.elbo.likelihood]
    return (math.sqrt(variance) * tau).cpu()


def _pairs(data: datasets.Data, val_index: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Indices of validation data to walk between, of different classes where there are any."""
    count = min(count, len(val_index) // 2)
    first = val_index[:count]
    second = []
    rest = val_index[count:].tolist()
    for start in first.tolist():
        other = next(
            (i for i in rest if data.y is not None and data.y[i] != data.y[start]), rest[0]
        )
        rest.remove(other)
        second.append(other)
    return first, torch.tensor(second)
