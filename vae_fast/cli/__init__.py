"""The ``vae-fast`` command: train a VAE, sample from it, profile it, and see what runs here."""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Sequence
from typing import Any

from vae_fast import __version__, schedules
from vae_fast.cli.errors import CommandError, Terminated
from vae_fast.elbo import ESTIMATORS, KL_ESTIMATORS, LIKELIHOODS, OBJECTIVES, OPTIMAL

__all__ = ["main"]

WARMUPS = tuple(schedules.__all__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments without the program's name; ``sys.argv[1:]`` if ``None``.

    Returns:
        0, also after a Ctrl-C in training that came after the first epoch and left a model. Wrong
        input ends in ``SystemExit`` with code 2 and a message on stderr, any other Ctrl-C with 130,
        SIGTERM in training with 143.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    alone = argv is None  # in a process of its own
    if alone:
        _show_builds()
    try:
        if args.command == "train":
            from vae_fast.cli.train import keep_freed_memory, train

            if alone:
                keep_freed_memory()
            train(args)
        elif args.command == "sample":
            from vae_fast.cli.sample import sample

            sample(args)
        elif args.command == "profile":
            from vae_fast.cli.profile import profile

            profile(args)
        else:
            from vae_fast.cli.doctor import doctor

            doctor()
    except CommandError as error:
        parser.exit(2, f"vae-fast {args.command}: error: {error}\n")
    except Terminated as error:
        parser.exit(143, f"\nvae-fast {args.command}: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\nvae-fast: interrupted\n")
    return 0


def _show_builds() -> None:
    """Say on stderr what is compiled, since that takes minutes."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("vae-fast: %(message)s"))
    logger = logging.getLogger("vae_fast.build")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that there are."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vae-fast",
        description="Train a variational autoencoder with fused loss kernels, sample from it, "
        "profile it, and see what runs on this machine.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="train a VAE and draw what it learned",
        description="Train a VAE. Writes model.safetensors, metrics.csv and pictures to --out, and "
        "checkpoint.safetensors, from which --resume continues the run.",
        epilog="On several CPUs or GPUs: torchrun --nproc-per-node N -m vae_fast.cli train ... "
        "computes what one process would, up to rounding. --batch-size is then of all processes "
        "together, --out must be the same folder for all, and Ctrl-C and SIGTERM end the job as it "
        "is, to be resumed from its last checkpoint.",
        formatter_class=_Formatter,
    )
    train.add_argument(
        "--data",
        default="digits",
        metavar="DATA",
        help="digits (1797 images of 8x8, from scikit-learn); FILE.npz with an array x of shape "
        "(N, ...) and optionally labels y (N,); or a folder of images, whose sub-folders are then "
        "the labels. uint8 values are levels from 0 to 1, 1/255 apart. Images may be (N, H, W) or "
        "(N, H, W, C): the model takes them as (N, C, H, W)",
    )
    train.add_argument(
        "--out",
        type=_folder,
        required=True,
        metavar="DIR",
        help="folder to write to; a model that is there becomes model.previous.safetensors",
    )
    train.add_argument(
        "--image-size",
        type=_positive_int,
        metavar="N",
        help="crop the images of a folder to squares and resize them to NxN",
    )
    _add_networks(train)
    train.add_argument(
        "--variance",
        choices=("full", "scalar", "channel", "unit"),
        help="what is learned of the scale of p(x|z): one per pixel and z (the default), one for "
        "everything, one per channel, or nothing (1)",
    )
    train.add_argument(
        "--likelihood",
        choices=LIKELIHOODS,
        default="gaussian",
        help="the family of p(x|z): bernoulli is for data in [0, 1], logistic for levels (uint8); "
        "docs/options.md says when to use which",
    )
    train.add_argument(
        "--likelihood-scale",
        type=_likelihood_scale,
        metavar="S",
        help="instead of --variance: a fixed scale of p(x|z), in the units of x (the standard "
        f"deviation of a gaussian); or {', '.join(OPTIMAL)}: the Gaussian variance that fits best, "
        "over a batch, a data point or a channel",
    )
    train.add_argument(
        "--dequantize",
        action="store_true",
        help="add uniform noise within the levels of uint8 data, so that bits/dim of a density "
        "bound those of the levels",
    )
    train.add_argument("--epochs", type=_positive_int, default=100, metavar="N")
    train.add_argument("--batch-size", type=_positive_int, default=128, metavar="B")
    train.add_argument(
        "--lr",
        type=_positive_float,
        default=2e-3,
        help="Adam's learning rate at the start; it falls to 0 along a cosine",
    )
    train.add_argument(
        "--beta", type=_non_negative_float, default=1.0, help="weight of the KL term in the loss"
    )
    train.add_argument(
        "--beta-warmup",
        type=_warmup,
        metavar="SHAPE:STEPS",
        help=f"raise that weight from 0 over so many steps; SHAPE is one of {', '.join(WARMUPS)}; "
        "cyclical is four rises, one after the other",
    )
    train.add_argument(
        "--kl",
        choices=KL_ESTIMATORS,
        default="monte_carlo",
        help="the KL term from the sample of z, or exactly",
    )
    train.add_argument(
        "--free-bits",
        type=_non_negative_float,
        metavar="NATS",
        help="KL that each latent element may have for free; with --kl analytic",
    )
    train.add_argument(
        "--capacity",
        type=_non_negative_float,
        metavar="NATS",
        help="draw the KL term to this value instead of 0",
    )
    train.add_argument(
        "--objective",
        choices=OBJECTIVES,
        default="elbo",
        help="the bound to raise; iwae is the importance-weighted one of --num-samples samples",
    )
    train.add_argument(
        "--estimator",
        choices=ESTIMATORS,
        default="standard",
        help="of the posterior's gradient: stl, of less variance, goes with elbo, dreg with iwae",
    )
    _add_loss(train)
    train.add_argument("--seed", type=_seed, default=0, help="of split, weights and noise")
    train.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    train.add_argument(
        "--backend",
        default="auto",
        help="auto, cpp, triton or reference; see vae-fast doctor",
    )
    train.add_argument(
        "--resume",
        action="store_true",
        help="continue from the checkpoint in --out, of a run that was killed, say, or from the "
        "start if there is none. On the CPU the weights become, to the bit, those of a run that "
        "was never stopped. The other options must be the same, --epochs too: the learning rate "
        "depends on them",
    )
    train.add_argument(
        "--checkpoint-every",
        type=_interval,
        default="60s",
        metavar="N|Ns",
        help="optimizer steps (100) or seconds (60s) between checkpoints. Ctrl-C, SIGTERM and the "
        "end of the run write one, too. Without --resume the checkpoint of a run that did not "
        "finish is kept as checkpoint.1.safetensors, .2, ...",
    )
    train.add_argument(
        "--compare",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="at the end, time the training step against plain PyTorch, for some ten seconds",
    )

    sample = commands.add_parser(
        "sample",
        help="draw samples from a trained VAE",
        description="Draw samples from a trained VAE.",
        formatter_class=_Formatter,
    )
    sample.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a model.safetensors, or the folder it is in"
    )
    sample.add_argument("-n", type=_positive_int, default=64, help="number of samples")
    sample.add_argument("--out", default="samples.png", metavar="PNG", help="picture to write")
    sample.add_argument("--npz", metavar="FILE", help="also write the values, as array x")
    sample.add_argument(
        "--noise", action="store_true", help="draw x from p(x|z) instead of showing its mean"
    )
    sample.add_argument("--seed", type=_seed, default=0)
    sample.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")

    profile = commands.add_parser(
        "profile",
        help="show where the time and the memory of a training step go",
        description="Show where the time and the memory of training steps on random data go, with "
        "the fused loss and with the reference, and write a trace of each that Perfetto opens. "
        "docs/profiling.md says how to read them.",
        formatter_class=_Formatter,
    )
    _add_networks(profile)
    profile.add_argument(
        "--shape",
        type=_shape,
        default="1x28x28",
        metavar="CxHxW",
        help="of one data point, of any number of dimensions for mlp",
    )
    profile.add_argument(
        "--likelihood", choices=LIKELIHOODS, default="gaussian", help="the family of p(x|z)"
    )
    _add_loss(profile)
    profile.add_argument("--batch-size", type=_positive_int, default=128, metavar="B")
    profile.add_argument(
        "--dtype",
        choices=("fp32", "bf16"),
        default="fp32",
        help="what the networks compute in; bf16 is autocast",
    )
    profile.add_argument(
        "--compile", action="store_true", help="compile the networks with torch.compile"
    )
    profile.add_argument(
        "--steps",
        type=_positive_int,
        default=5,
        metavar="N",
        help="steps of each backend in each round",
    )
    profile.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    profile.add_argument(
        "--backend", default="auto", help="the fused one: auto, cpp or triton; see vae-fast doctor"
    )
    profile.add_argument(
        "--out",
        type=_folder,
        default="runs/profile",
        metavar="DIR",
        help="folder to write the traces to",
    )

    commands.add_parser(
        "doctor",
        help="report what runs on this machine, and why the rest does not",
        description="Report which backend serves which device, why the others do not, and how the "
        "CPU extension was built.",
    )
    return parser


def _add_networks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=("mlp", "conv"), default="mlp", help="the networks")
    parser.add_argument(
        "--hidden",
        type=_positive_int,
        nargs="+",
        metavar="N",
        help="widths of the encoder's layers (channels for conv); by default 512 256 for mlp and "
        "32 64 for conv",
    )
    parser.add_argument("--latent-dim", type=_positive_int, default=10, metavar="L")


def _add_loss(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--num-samples",
        type=_positive_int,
        default=1,
        metavar="K",
        help="latent samples per data point",
    )
    parser.add_argument(
        "--inplace",
        action="store_true",
        help="let the loss overwrite the decoder's output with its gradient, to save memory",
    )


def _folder(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("must name a folder")
    return text


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(map(_positive_int, text.split("x")))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"must be sizes with x between them, like 3x32x32 or 784; got {text}"
        ) from None


def _likelihood_scale(text: str) -> float | str:
    if text in OPTIMAL:
        return text
    try:
        return _positive_float(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"must be a number above 0 or one of {', '.join(OPTIMAL)}, got {text}"
        ) from None


def _warmup(text: str) -> tuple[str, int]:
    shape, _, steps = text.partition(":")
    if shape not in WARMUPS or not steps.isdecimal() or int(steps) < 1:
        raise argparse.ArgumentTypeError(
            f"must be SHAPE:STEPS with SHAPE one of {', '.join(WARMUPS)} and STEPS at least 1, got "
            f"{text}"
        )
    return shape, int(steps)


def _interval(text: str) -> tuple[float, str]:
    number = text.removesuffix("s")
    try:
        if number == text:
            return _positive_int(text), "steps"
        return _positive_float(number), "seconds"
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"must be a number of steps, like 100, or of seconds, like 60s; got {text}"
        ) from None


def _number(kind: type, text: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"must be {what}, got {text}") from None


def _positive_int(text: str) -> int:
    value = _number(int, text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _seed(text: str) -> int:
    value = _number(int, text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"must be between 0 and 2^63 - 1, got {value}")
    return value


def _positive_float(text: str) -> float:
    value = _non_negative_float(text)
    if value == 0:
        raise argparse.ArgumentTypeError("must be above 0")
    return value


def _non_negative_float(text: str) -> float:
    value = _number(float, text)
    if not (value >= 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {text}")
    return value
