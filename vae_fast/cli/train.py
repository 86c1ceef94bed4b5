"""``vae-fast train``: train a VAE, measure it, and draw what it learned."""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vae_fast
from vae_fast import reference
from vae_fast.cli import data as datasets
from vae_fast.cli.errors import CommandError, pick_device, require
from vae_fast.vae import VAE, _pair

CHECKPOINT = "model.safetensors"
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
# Adam moves a parameter by about its learning rate per step. The one learned scale of
# --variance scalar has units to travel, not hundredths, so it gets a larger rate.
_SCALAR_RATE = 20.0
# Points of a scatter plot that still can be told apart.
_DRAWN = 10_000


def train(args: argparse.Namespace) -> None:
    """Run the command with parsed arguments."""
    require("matplotlib", "safetensors", "tqdm")
    started = time.perf_counter()
    data = datasets.load(args.data, args.image_size)
    device = pick_device(args.device)
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / METRICS).touch()
    except OSError as error:
        raise CommandError(f"--out {out}: {error.strerror}") from error

    torch.manual_seed(args.seed)
    vae = _build(args, data.event_shape).to(device)
    train_index, val_index = datasets.split(data, args.seed)
    x_train, x_val = data.x[train_index].to(device), data.x[val_index].to(device)

    with _backend(args.backend):
        _check(vae, x_train[:2], args.backend)
        parameters = sum(p.numel() for p in vae.parameters())
        print(
            f"{data.name}: {len(x_train)} {data.unit}s to train, {len(x_val)} to validate, "
            f"shape {'x'.join(map(str, data.event_shape))}; "
            f"{args.model} with {parameters:,} parameters on {device}"
        )
        rows = _fit(vae, x_train, x_val, args, out / METRICS, data.unit)
        vae.eval()
        vae.save(out / CHECKPOINT)
        pictures = _draw(vae, data, val_index, rows, out)

        last = rows[-1]
        per_element = last["val_elbo"] / math.prod(data.event_shape)
        element = "pixel" if data.unit == "image" else "element"
        print(
            f"\nvalidation ELBO after epoch {last['epoch']}: {last['val_elbo']:.2f} nats per "
            f"{data.unit}, {per_element:.4f} per {element} "
            f"(NLL {last['val_nll']:.2f}, KL {last['val_kl']:.2f})"
        )
        if args.backend != "reference":
            print()
            _compare(vae, x_train[: args.batch_size])
    print(f"\nmodel:    {out / CHECKPOINT}\nmetrics:  {out / METRICS}")
    print("pictures: " + "\n          ".join(str(p) for p in pictures))
    print(f"all done in {time.perf_counter() - started:.0f} s")


# ---------------------------------------------------------------- training


def _build(args: argparse.Namespace, event_shape: tuple[int, ...]) -> VAE:
    options = {
        "variance": args.variance,
        "beta": args.beta,
        "num_samples": args.num_samples,
        "inplace": args.inplace,
    }
    if args.model == "mlp":
        return VAE.mlp(event_shape, args.latent_dim, args.hidden or (512, 256), **options)
    if len(event_shape) != 3:
        raise CommandError(f"--model conv needs images, but one data point is of {event_shape}")
    return VAE.conv(event_shape, args.latent_dim, args.hidden or (32, 64), **options)


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
        if backend == "auto":
            raise
        raise CommandError(f"--backend {backend}: {error}") from error


def _optimizer(vae: VAE, lr: float) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in vae.parameters() if p.dim() > 0]},
        {"params": [p for p in vae.parameters() if p.dim() == 0], "lr": lr * _SCALAR_RATE},
    ]
    return torch.optim.Adam([g for g in groups if g["params"]], lr=lr, fused=True)


def _fit(
    vae: VAE, x_train: Tensor, x_val: Tensor, args: argparse.Namespace, path: Path, unit: str
) -> list[dict[str, float]]:
    """Train, writing a row of metrics per epoch. An interrupt ends it early, keeping the model."""
    from tqdm import tqdm

    optimizer = _optimizer(vae, args.lr)
    steps = args.epochs * math.ceil(len(x_train) / args.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    # One key for every validation, so that epochs differ by the model and not by the noise.
    key = torch.tensor([args.seed, 0], dtype=torch.uint64).to(x_val.device)
    rows: list[dict[str, float]] = []
    with (
        path.open("w", newline="") as file,
        tqdm(
            total=args.epochs * len(x_train), unit=unit, unit_scale=True, disable=None
        ) as progress,
    ):
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        try:
            for epoch in range(1, args.epochs + 1):
                began = time.perf_counter()
                trained = _train_epoch(vae, x_train, args.batch_size, optimizer, schedule, progress)
                rate = len(x_train) / (time.perf_counter() - began)
                validated = _evaluate(vae, x_val, args.batch_size, key)
                row = {"epoch": epoch, "samples_per_s": round(rate)}
                for name, value in (("train", trained), ("val", validated)):
                    nll, kl = value
                    row |= {f"{name}_elbo": -nll - kl, f"{name}_nll": nll, f"{name}_kl": kl}
                if not all(map(math.isfinite, row.values())):
                    raise CommandError(
                        f"the loss was not finite in epoch {epoch}: try a smaller --lr, or data "
                        "scaled to [0, 1]"
                    )
                rows.append(row)
                writer.writerow(
                    {k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()}
                )
                file.flush()
                shown = {
                    "ELBO": f"{row['val_elbo']:.2f}",
                    "NLL": f"{row['val_nll']:.2f}",
                    "KL": f"{row['val_kl']:.2f}",
                }
                progress.set_description(f"epoch {epoch}/{args.epochs}", refresh=False)
                progress.set_postfix(shown)
                if progress.disable and (epoch % max(1, args.epochs // 10) == 0 or epoch == 1):
                    text = ", ".join(f"{name} {value}" for name, value in shown.items())
                    print(
                        f"epoch {epoch}/{args.epochs}: validation {text} nats per {unit}; "
                        f"{rate:,.0f} {unit}s/s",
                        flush=True,
                    )
        except KeyboardInterrupt:
            if not rows:
                raise
            print(f"\ninterrupted: keeping the model as it is, {len(rows)} epochs in")
    return rows


def _train_epoch(
    vae: VAE,
    x: Tensor,
    batch_size: int,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    progress,
) -> tuple[float, float]:
    """One pass over the data; mean NLL and KL per data point, before each batch's step."""
    vae.train()
    totals = torch.zeros(2, device=x.device)
    for index in torch.randperm(len(x), device=x.device).split(batch_size):
        out = vae(x[index])
        optimizer.zero_grad(set_to_none=True)
        out.loss.backward()
        optimizer.step()
        schedule.step()
        totals += _totals(out.nll, out.kl, len(index))
        progress.update(len(index))
    nll, kl = (totals / len(x)).tolist()
    return nll, kl


@torch.no_grad()
def _evaluate(vae: VAE, x: Tensor, batch_size: int, key: Tensor) -> tuple[float, float]:
    """Mean NLL and KL per data point; the same key gives the same noise at any batch size."""
    vae.eval()
    totals = torch.zeros(2, device=x.device)
    for start in range(0, len(x), batch_size):
        part = x[start : start + batch_size]
        out = vae(part, key=key, first_row=start)
        totals += _totals(out.nll, out.kl, len(part))
    nll, kl = (totals / len(x)).tolist()
    return nll, kl


def _totals(nll: Tensor, kl: Tensor, batch: int) -> Tensor:
    """NLL and KL summed over the batch and averaged over the samples of z."""
    return torch.stack([nll.detach().mean(), kl.detach().mean()]) * batch


# ---------------------------------------------------------------- what was gained


def _compare(vae: VAE, x: Tensor) -> None:
    """Time the loss and whole training steps, fused and not, and print the ratios."""
    step, loss = measure(vae, x)
    names = {
        "fused": "vae_fast",
        "plain": "plain PyTorch (noise from torch.randn)",
        "reference": "reference backend (same noise as vae_fast)",
    }
    print(f"milliseconds for a batch of {len(x)}, forward and backward:")
    print(f"  {'':<43}{'loss alone':>16}{'training step':>18}")
    for which, name in names.items():
        cells = [f"{1e3 * t[which]:.3f} ({t[which] / t['fused']:.2f}x)" for t in (loss, step)]
        print(f"  {name:<43}{cells[0]:>16}{cells[1]:>18}")
    print(
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
        posterior = vae.encoder(x)
        likelihood = vae.decoder(_pair(posterior, "")[0].repeat(elbo.num_samples, 1))
    given = [t.requires_grad_() for t in _tensors(posterior) + _tensors(likelihood)]

    def step(loss: Callable[..., Tensor]) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss(elbo=vae.elbo, x=x, posterior=vae.encoder(x), decoder=vae.decoder).backward()
        optimizer.step()

    def loss_alone(loss: Callable[..., Tensor]) -> None:
        out = loss(elbo=elbo, x=x, posterior=posterior, decoder=lambda z: likelihood)
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
    """The loss as one would write it by hand: plain PyTorch, ``torch.randn`` noise."""
    k = elbo.num_samples
    mu, scale = _pair(posterior, "encoder")
    rows = mu.shape if k == 1 else (k, *mu.shape)
    z, log_q, log_p = reference.reparameterize(
        mu,
        scale,
        elbo.posterior_param,
        num_samples=None if k == 1 else k,
        clamp=elbo.posterior_clamp,
        eps=torch.randn(rows, device=mu.device, dtype=mu.dtype),
    )
    mean, scale = _pair(decoder(z.reshape(-1, *mu.shape[1:])), "decoder")
    if k > 1:
        mean = mean.unflatten(0, (k, -1))
        scale = scale.unflatten(0, (k, -1)) if scale.dim() else scale
    nll = reference.gaussian_nll(x, mean, scale, elbo.likelihood_param, elbo.likelihood_clamp)
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
    x_val = data.x[val_index]
    written: list[Path] = []

    def at(name: str) -> Path:
        written.append(out / name)
        return out / name

    pictures.training_curves(rows, at("training_curves.png"), data.unit)

    x = x_val[: 12 if image else 8]
    mean, scale = vae.decode(vae.encode(x.to(device))[0])
    _, std = reference.log_scale_and_scale(scale, vae.elbo.likelihood_param)
    pictures.reconstructions(x, mean.cpu(), std.cpu(), at("reconstructions.png"))

    count = 64 if image else 16
    key = torch.tensor([0, 0], dtype=torch.uint64)
    drawn = vae.sample(count, key=key).cpu()
    title = f"{count} samples: means of p(x|z), z from the prior"
    pictures.samples(drawn, at("samples.png"), title)

    first, second = _pairs(data, val_index, 8)
    between = vae.interpolate(data.x[first].to(device), data.x[second].to(device), steps=10).cpu()
    name = at("interpolations.png")
    pictures.interpolations(data.x[first], data.x[second], between, name)

    if vae.latent_shape == (2,):
        if image:
            line = torch.linspace(-3, 3, 13)
            z2, z1 = torch.meshgrid(line.flip(0), line, indexing="ij")
            plane = torch.stack([z1, z2], -1).reshape(-1, 2).to(device)
            pictures.manifold(vae.decode(plane)[0].cpu(), line, at("manifold.png"))
        mu = torch.cat(
            [vae.encode(part.to(device))[0].cpu() for part in data.x[:_DRAWN].split(1024)]
        )
        y = None if data.y is None else data.y[:_DRAWN]
        pictures.encoded(mu, y, data.labels, at("encoded.png"))
    return written


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
