"""The pictures that training leaves behind.

Images are drawn as mosaics; data that is not an image is drawn as curves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from vae_fast.cli.data import MOST_LOPSIDED, is_image

_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.labelcolor": "#333333",
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "text.usetex": False,
    "savefig.dpi": 130,
    "savefig.facecolor": "white",
}
_BLUE, _ORANGE, _GREEN = "#2f6db3", "#e07b1f", "#3a9a5b"


def training_curves(rows: Sequence[dict[str, float]], path: Path, unit: str) -> None:
    """ELBO, NLL and KL against the epoch.

    Args:
        rows: one per epoch, as in metrics.csv.
        path: the PNG to write.
        unit: what one data point is, for the axis labels.
    """
    epoch = [row["epoch"] for row in rows]
    with _figure(path, (12.0, 3.8)) as figure:
        axes = figure.subplots(1, 3)
        titles = {
            "elbo": ("ELBO (higher is better)", _BLUE),
            "nll": ("NLL: −E log p(x|z)", _ORANGE),
            "kl": ("KL: E log q(z|x) − log p(z)", _GREEN),
        }
        for ax, (name, (title, colour)) in zip(axes, titles.items(), strict=True):
            marker = "o" if len(rows) < 3 else None
            train = [row[f"train_{name}"] for row in rows]
            val = [row[f"val_{name}"] for row in rows]
            ax.plot(epoch, train, color=colour, alpha=0.45, lw=1.4, marker=marker, label="training")
            ax.plot(epoch, val, color=colour, lw=1.8, marker=marker, label="validation")
            ax.annotate(
                f"{val[-1]:.2f}".replace("-", "−"),
                (epoch[-1], val[-1]),
                xytext=(4, 0),
                textcoords="offset points",
                color=colour,
                va="center",
                annotation_clip=False,
            )
            # The first epochs are orders of magnitude away; show what comes after them.
            later = [*train[len(rows) // 20 :], *val[len(rows) // 20 :]]
            room = 0.06 * (max(later) - min(later)) or 1.0
            ax.set(title=title, xlabel="epoch", ylabel=f"nats per {unit}")
            ax.set_ylim(min(later) - room, max(later) + room)
            ax.xaxis.get_major_locator().set_params(integer=True)
            ax.legend(loc="best")


def reconstructions(x: Tensor, mean: Tensor, std: Tensor | None, path: Path) -> None:
    """Inputs, their reconstructions and, where it differs between elements, the σ of p(x|z).

    Args:
        x: inputs, (n, *event).
        mean: means of p(x|z) at the posterior means, (n, *event).
        std: standard deviations of p(x|z), (n, *event) or of a shape that broadcasts to it;
            ``None`` to leave them out.
        path: the PNG to write.
    """
    event = tuple(x.shape[1:])
    if not is_image(event):
        _reconstructed_curves(x, mean, std, path)
        return
    limits = _limits(x)
    rows: list[tuple[str, Tensor, tuple[float, float], str | None]] = [
        ("input", x, limits, None),
        ("reconstruction\n(mean of p(x|z))", mean, limits, None),
    ]
    if std is not None and std.dim() == x.dim():
        # One value per pixel, whatever the channels.
        grey = std.mean(1, keepdim=True)
        # A few pixels, all but unpredictable, would darken all others.
        top = float(torch.quantile(grey.flatten()[:1_000_000], 0.99))
        rows.append(("learned σ\nof each pixel", grey, (0.0, top), "magma"))
    n = len(x)
    tile = event[1] / event[2]
    width = 12.0
    with _figure(path, (width, 0.55 + len(rows) * ((width - 2.4) / n * tile + 0.06))) as figure:
        axes = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
        axes[0].set_title("Validation data and what the VAE makes of it")
        for ax, (label, images, (lo, hi), cmap) in zip(axes, rows, strict=True):
            shown = _mosaic(images, 1, n, lo, hi)
            drawn = ax.imshow(shown, cmap=cmap or "gray", vmin=lo, vmax=hi, interpolation="nearest")
            _bare(ax)
            ax.set_ylabel(label, rotation=0, ha="right", va="center", labelpad=8)
            if cmap:
                bar = figure.colorbar(
                    drawn, ax=axes, shrink=0.85, pad=0.012, aspect=22, extend="max"
                )
                bar.set_label("σ, in units of x")
                bar.outline.set_visible(False)


def samples(x: Tensor, path: Path, title: str) -> None:
    """Samples in a square.

    Args:
        x: samples, (n, *event).
        path: the PNG to write.
        title: what to write above them.
    """
    columns = math.ceil(math.sqrt(len(x)))
    rows = math.ceil(len(x) / columns)
    if not is_image(tuple(x.shape[1:])):
        _curves(x, rows, columns, path, title)
        return
    lo, hi = _limits(x)
    tile = x.shape[-2] / x.shape[-1]
    with _figure(path, (6.6, 0.5 + 6.4 * tile * rows / columns)) as figure:
        ax = figure.subplots()
        ax.imshow(
            _mosaic(x, rows, columns, lo, hi),
            cmap="gray",
            vmin=lo,
            vmax=hi,
            interpolation="nearest",
        )
        _bare(ax)
        ax.set_title(title)


def interpolations(x0: Tensor, x1: Tensor, path_between: Tensor, path: Path) -> None:
    """Real data at both ends, and the decoded straight line between their latent means.

    Args:
        x0: where the lines start, (B, *event).
        x1: where the lines end, (B, *event).
        path_between: means of p(x|z) along the lines, (steps, B, *event).
        path: the PNG to write.
    """
    steps, count = path_between.shape[:2]
    title = "From one real {} to another in a straight line through the latent space"
    if not is_image(tuple(x0.shape[1:])):
        _interpolated_curves(path_between, path, title.format("sample"))
        return
    lo, hi = _limits(torch.cat([x0, x1]))
    parts = [
        _mosaic(x0, count, 1, lo, hi),
        _mosaic(path_between.transpose(0, 1).flatten(0, 1), count, steps, lo, hi),
        _mosaic(x1, count, 1, lo, hi),
    ]
    blank = np.full_like(parts[0], math.nan if parts[0].ndim == 2 else 1.0)
    blank = blank[:, : blank.shape[1] // 3]
    shown = np.concatenate([parts[0], blank, parts[1], blank, parts[2]], 1)
    middle = parts[0].shape[1] / 2
    width = 9.6
    with _figure(path, (width, 0.75 + width * shown.shape[0] / shown.shape[1])) as figure:
        ax = figure.subplots()
        ax.imshow(shown, cmap="gray", vmin=lo, vmax=hi, interpolation="nearest")
        _bare(ax)
        for position, label in (
            (middle, "real"),
            (shown.shape[1] / 2, "decoded from points on the line"),
            (shown.shape[1] - middle, "real"),
        ):
            ax.annotate(
                label, (position, 0), xycoords=("data", "axes fraction"), xytext=(0, -4),
                textcoords="offset points", ha="center", va="top",
            )  # fmt: skip
        ax.set_title(title.format("image"))


def manifold(x: Tensor, z: Tensor, path: Path) -> None:
    """The decoded plane of a two-dimensional latent.

    Args:
        x: means of p(x|z), (n·n, *event); row by row from the top, where z₂ is largest.
        z: the n coordinates along each axis, ascending.
        path: the PNG to write.
    """
    n = len(z)
    lo, hi = _limits(x)
    with _figure(path, (7.4, 0.7 + 7.0 * x.shape[-2] / x.shape[-1])) as figure:
        ax = figure.subplots()
        shown = _mosaic(x, n, n, lo, hi)
        ax.imshow(
            shown, cmap="gray", vmin=lo, vmax=hi, interpolation="nearest", extent=(0, n, 0, n),
            aspect="auto",
        )  # fmt: skip
        ax.grid(False)
        ax.spines[:].set_visible(False)
        ticks = np.arange(0, n, 2)
        names = [f"{float(z[t]):.3g}".replace("-", "−") for t in ticks]
        ax.set_xticks(ticks + 0.5, names)
        ax.set_yticks(ticks + 0.5, names)
        ax.tick_params(length=0)
        ax.set(xlabel="z₁", ylabel="z₂", title="What each point of the latent plane decodes to")


def encoded(mu: Tensor, y: Tensor | None, labels: list[str] | None, path: Path) -> None:
    """Posterior means of the data on a two-dimensional latent, coloured by class.

    Args:
        mu: posterior means, (N, 2).
        y: classes, int64 (N,), or ``None``.
        labels: names of the classes.
        path: the PNG to write.
    """
    with _figure(path, (7.6, 6.6)) as figure:
        ax = figure.subplots()
        angle = np.linspace(0, 2 * np.pi, 200)
        for radius in (1, 2, 3):
            ax.plot(
                radius * np.cos(angle), radius * np.sin(angle), color="#999999", lw=0.8, ls="--",
                zorder=1,
            )  # fmt: skip
            ax.annotate(
                f"{radius}σ", (0, radius), color="#555555", ha="center", va="center", fontsize=8,
                bbox={"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.85},
                zorder=3,
            )  # fmt: skip
        style = {"s": 13, "alpha": 0.75, "linewidths": 0, "zorder": 2}
        classes = 0 if labels is None else len(labels)
        if y is None or classes > 20:
            colour = _BLUE if y is None else y.numpy()
            ax.scatter(mu[:, 0], mu[:, 1], c=colour, cmap=None if y is None else "turbo", **style)
        else:
            colours = matplotlib.colormaps["tab10" if classes <= 10 else "tab20"]
            for index, label in enumerate(labels):
                points = mu[y == index]
                name = label.replace("$", r"\$")  # which would begin a formula
                ax.scatter(points[:, 0], points[:, 1], color=colours(index), label=name, **style)
            ax.legend(
                title="class", loc="center left", bbox_to_anchor=(1.0, 0.5), markerscale=2,
                handletextpad=0.2,
            )  # fmt: skip
        ax.set_aspect("equal", adjustable="datalim")
        ax.set(
            xlabel="z₁",
            ylabel="z₂",
            title="Posterior means of the data; circles: the prior",
        )


# ---------------------------------------------------------------- data that is not an image


def _reconstructed_curves(x: Tensor, mean: Tensor, std: Tensor | None, path: Path) -> None:
    std = torch.full((), math.nan) if std is None else std  # NaN is not drawn
    x, mean, std = _in_line(x, 1), _in_line(mean, 1), _in_line(std.expand_as(mean), 1)
    position = np.arange(x.shape[1])
    columns = min(4, len(x))
    rows = math.ceil(len(x) / columns)
    with _figure(path, (12.0, 0.8 + 2.2 * rows)) as figure:
        axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
        for ax, data, m, s in zip(axes, x, mean, std, strict=False):
            low, high = m - 2 * s, m + 2 * s
            label = None if s.isnan().all() else "mean ± 2σ"
            ax.fill_between(position, low, high, color=_BLUE, alpha=0.18, lw=0, label=label)
            ax.plot(position, m, color=_BLUE, lw=1.5, label="mean of p(x|z)")
            ax.plot(position, data, ".", color=_ORANGE, ms=4, label="input")
        _edge_labels(axes, rows, columns)
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="upper right", ncols=3)
        title = "Validation data and what the VAE makes of it"
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, weight="bold")


def _interpolated_curves(between: Tensor, path: Path, title: str) -> None:
    steps, count = between.shape[:2]
    values = _in_line(between, 2)
    columns = min(4, count)
    rows = math.ceil(count / columns)
    with _figure(path, (12.0, 0.8 + 2.2 * rows)) as figure:
        axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
        for b in range(count):
            for k in range(steps):
                colour = matplotlib.colormaps["viridis"](0.95 * k / (steps - 1))
                axes[b].plot(values[k, b], color=colour, lw=1.2)
        _edge_labels(axes, rows, columns)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, weight="bold")


def _curves(x: Tensor, rows: int, columns: int, path: Path, title: str) -> None:
    with _figure(path, (9.0, 0.8 + 8.0 * rows / columns)) as figure:
        axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
        for ax, values in zip(axes, _in_line(x, 1), strict=False):
            ax.plot(values, color=_BLUE, lw=1.0)
        for ax in axes[len(x) :]:
            ax.set_visible(False)
        _edge_labels(axes, rows, columns)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, weight="bold")


def _in_line(x: Tensor, lead: int) -> Tensor:
    """Each data point as one line of values: of a few long columns, one after the other."""
    if x.dim() - lead >= 2 and x.shape[-2] > MOST_LOPSIDED * x.shape[-1]:
        x = x.transpose(-2, -1)
    return x.flatten(lead)


def _edge_labels(axes: Sequence[Axes], rows: int, columns: int) -> None:
    for index in range(rows * columns):
        if index % columns == 0:
            axes[index].set_ylabel("x")
        if index >= (rows - 1) * columns:
            axes[index].set_xlabel("element")


# ---------------------------------------------------------------- shared


@contextmanager
def _figure(path: Path, size: tuple[float, float]) -> Iterator[Figure]:
    """A figure in the house style, written to ``path`` at the end. Needs no display."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        figure.savefig(path, format="png")


def _bare(ax: Axes) -> None:
    ax.grid(False)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)


def _limits(x: Tensor) -> tuple[float, float]:
    """What to draw as black and as white: 0 and 1 where that fits the values, else their range."""
    ranks = torch.tensor([0.01, 0.05, 0.95, 0.99])
    lo, low, high, hi = torch.quantile(x.flatten()[:1_000_000], ranks).tolist()
    if low > -0.25 and 0.25 < high < 1.25:
        return 0.0, 1.0
    return (lo, hi) if hi > lo else (lo, lo + 1.0)


def _mosaic(x: Tensor, rows: int, columns: int, lo: float, hi: float) -> np.ndarray:
    """Images (n, C, H, W) side by side, with white gaps, as (H', W') or (H', W', 3)."""
    _, channels, height, width = x.shape
    # Small images are enlarged, so that the gaps can be a fraction of one of their pixels.
    zoom = max(1, round(48 / min(height, width)))
    height, width = height * zoom, width * zoom
    gap = max(1, round(min(height, width) / 24))
    colour = channels >= 3
    out = np.full(
        (rows * (height + gap) - gap, columns * (width + gap) - gap, 3 if colour else 1), np.nan
    )
    images = x[:, : 3 if colour else 1].permute(0, 2, 3, 1).numpy()
    for index, image in enumerate(images):
        top, left = (index // columns) * (height + gap), (index % columns) * (width + gap)
        out[top : top + height, left : left + width] = image.repeat(zoom, 0).repeat(zoom, 1)
    if not colour:
        return out[..., 0]  # NaN is drawn as the background
    return np.where(np.isnan(out), 1.0, ((out - lo) / (hi - lo)).clip(0, 1))
