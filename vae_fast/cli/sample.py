"""``vae-fast sample``: draw samples from a trained VAE."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from vae_fast.cli.checkpoint import MODEL
from vae_fast.cli.errors import CommandError, pick_device, require
from vae_fast.vae import VAE


def sample(args: argparse.Namespace) -> None:
    """Run the command with parsed arguments."""
    require("matplotlib", "safetensors")
    from vae_fast.cli import pictures

    device = pick_device(args.device)
    path = Path(args.checkpoint)
    if path.is_dir():
        path = path / MODEL
    try:
        vae = VAE.load(path, device=device).eval()
    except FileNotFoundError as error:
        raise CommandError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise CommandError(str(error)) from error

    generator = torch.Generator().manual_seed(args.seed)  # of the CPU: the same key everywhere
    try:
        x = vae.sample(args.n, generator=generator, noise=args.noise).float().cpu()
    except ValueError as error:
        raise CommandError(str(error)) from error
    kind = "drawn from p(x|z)" if args.noise else "means of p(x|z)"
    out = Path(args.out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        pictures.samples(x, out, f"{args.n} samples, {kind}, z from the prior")
        print(f"picture: {out}")
        if args.npz:
            npz = Path(args.npz)
            npz.parent.mkdir(parents=True, exist_ok=True)
            with npz.open("wb") as file:
                np.savez_compressed(file, x=x.numpy())
            print(f"values:  {npz}")
    except (OSError, ValueError) as error:
        raise CommandError(f"cannot write: {error}") from error
