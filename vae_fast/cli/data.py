"""Reading data sets: the digits, .npz files and folders of images."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vae_fast import reference
from vae_fast.cli.errors import CommandError, require

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
_CHANNELS = (1, 3, 4)
_FEWEST = 10
MOST_LOPSIDED = 8  # an image's longer side over the other


@dataclass(frozen=True)
class Data:
    """A data set.

    Attributes:
        name: what to call it.
        x: values, fp32 (N, *event), or levels, uint8; images are (N, C, H, W).
        x_scale: (a, b), where a level i stands for the value a·i + b; ``None`` for values.
        y: class of each, int64 (N,), or ``None``.
        labels: names of the classes, or ``None``.
    """

    name: str
    x: Tensor
    y: Tensor | None = None
    labels: list[str] | None = None
    x_scale: tuple[float, float] | None = None

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one data point."""
        return tuple(self.x.shape[1:])

    def values(self, index: Tensor | slice = slice(None)) -> Tensor:
        """The values of some of the data, fp32."""
        x = self.x[index]
        return x if self.x_scale is None else x * self.x_scale[0] + self.x_scale[1]

    @property
    def unit(self) -> str:
        """What one data point is."""
        return "image" if is_image(self.event_shape) else "sample"


def is_image(event_shape: tuple[int, ...]) -> bool:
    """Whether a data point of this shape can be drawn as an image (C, H, W).

    A few columns of many values, a time series say, are better drawn as curves.
    """
    if len(event_shape) != 3 or event_shape[0] not in _CHANNELS:
        return False
    return max(event_shape[1:]) <= MOST_LOPSIDED * min(event_shape[1:])


def load(source: str, image_size: int | None = None) -> Data:
    """Read the data set that ``--data`` names."""
    if image_size is not None and (source == "digits" or not Path(source).is_dir()):
        raise CommandError("--image-size goes with a folder of images")
    if source == "digits":
        return _digits()
    path = Path(source)
    if path.is_dir():
        data = _folder(path, image_size)
    elif not path.exists():
        raise CommandError(f"--data {source}: no such file or folder")
    elif path.suffix == ".npz":
        data = _npz(path)
    else:
        raise CommandError(f"--data {source}: must be digits, a .npz file or a folder of images")
    if len(data.x) < _FEWEST:
        raise CommandError(f"{source}: {len(data.x)} data points; at least {_FEWEST} are needed")
    return data


def split(data: Data, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the training set (80 %) and of the validation set, by a seeded permutation."""
    order = torch.randperm(len(data.x), generator=torch.Generator().manual_seed(seed))
    count = len(order) * 4 // 5
    return order[:count], order[count:]


def _digits() -> Data:
    require("sklearn")
    from sklearn.datasets import load_digits

    digits = load_digits()
    # 17 grey levels, 0 to 16, as the values 0 to 1. What --likelihood logistic puts on the levels
    # 17 to 255, which never occur, is lost, so that its figures are bounds.
    x = torch.tensor(digits.images, dtype=torch.uint8).unsqueeze(1)
    names = [str(name) for name in digits.target_names]
    y = torch.tensor(digits.target, dtype=torch.int64)
    return Data("digits", x, y, names, (1 / 16, 0.0))


def _npz(path: Path) -> Data:
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            raise CommandError(f"{path} is one array, not a .npz file: use np.savez(..., x=x)")
        with loaded as file:
            if "x" not in file:
                found = ", ".join(file.files) or "none"
                raise CommandError(f"{path} has no array x; arrays found: {found}")
            x = file["x"]
            y = file.get("y")
    except (
        *(OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error),
        RuntimeError,  # encrypted, or compressed in a way that Python does not know
    ) as error:
        reason = error if zipfile.is_zipfile(path) else "it is none"
        raise CommandError(f"{path} cannot be read as a .npz file: {reason}") from error

    if x.dtype.kind not in "buif":
        raise CommandError(f"{path}: x must hold real numbers, got dtype {x.dtype}")
    if x.ndim < 2 or 0 in x.shape:
        empty = "empty, " if 0 in x.shape else ""
        raise CommandError(f"{path}: x must be of shape (N, ...), got {empty}{x.shape}")
    stored = x.dtype == np.uint8
    if x.dtype.kind in "ui":
        _check_levels(path, x)
    with np.errstate(over="ignore"):
        x = x.astype(np.uint8 if stored else np.float32)
    if not np.isfinite(x).all():
        rows = np.flatnonzero(~np.isfinite(x).reshape(len(x), -1).all(1))
        raise CommandError(
            f"{path}: x in fp32 has NaN or infinity in {len(rows)} of {len(x)} rows; "
            f"the first is {rows[0]}"
        )
    values = torch.from_numpy(x)
    x_scale = reference.X_SCALE if stored else None
    if values.dim() == 3:  # (N, H, W)
        values = values.unsqueeze(1)
    elif values.dim() == 4 and values.shape[-1] in _CHANNELS and values.shape[1] not in _CHANNELS:
        values = values.permute(0, 3, 1, 2).contiguous()
    if y is None:
        return Data(path.stem, values, x_scale=x_scale)
    if y.shape != (len(x),):
        raise CommandError(f"{path}: y must be of shape ({len(x)},) like x, got {y.shape}")
    names, index = np.unique(y, return_inverse=True)
    y = torch.from_numpy(index.astype(np.int64))
    return Data(path.stem, values, y, [*map(str, names)], x_scale)


def _check_levels(path: Path, x: np.ndarray) -> None:
    """Fail if integers are not certainly levels, 0 to 255, or certainly numbers, 0 and 1."""
    lo, hi = x.min(), x.max()
    if x.dtype == np.uint8:
        if hi <= 1:
            raise CommandError(
                f"{path}: x is uint8, levels 1/255 apart, but none is above 1: save binary data as "
                "bool or float32"
            )
    elif lo < 0 or hi > 1:
        raise CommandError(
            f"{path}: x is {x.dtype}, from {lo} to {hi}: save levels from 0 to 255 as uint8, other "
            "numbers as float32"
        )


def _folder(path: Path, image_size: int | None) -> Data:
    require("PIL")
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        files = sorted(_image_files(path))
    except OSError as error:
        raise CommandError(f"{path} cannot be read as a folder of images: {error}") from error
    if not files:
        raise CommandError(f"{path} has no images; looked for {', '.join(sorted(_SUFFIXES))}")
    images = []
    for file in files:
        try:
            with Image.open(file) as opened:
                image = ImageOps.exif_transpose(opened)
                if image.mode.startswith(("I", "F")):  # which converting would clip
                    raise CommandError(
                        f"{file} has more than 8 bits a channel (mode {image.mode}): convert it, "
                        "or save the values as x in an .npz file"
                    )
                image = image.convert("L" if image.mode in ("1", "L") else "RGB")
        except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
            raise CommandError(f"{file} cannot be read as an image: {error}") from error
        if image_size is not None:
            image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BICUBIC)
        if images and image.size != images[0].size:
            raise CommandError(
                "the images must be of one size, but "
                f"{files[0]} is {_size(images[0])} and {file} is {_size(image)}; "
                "--image-size N resizes them all"
            )
        images.append(image)
    if len({image.mode for image in images}) > 1:
        images = [image.convert("RGB") for image in images]
    pixels = np.stack([np.asarray(image, dtype=np.uint8) for image in images])
    x = torch.from_numpy(pixels)
    x = x.unsqueeze(1) if x.dim() == 3 else x.permute(0, 3, 1, 2).contiguous()

    folders = [file.relative_to(path).parts[0] if file.parent != path else None for file in files]
    if None in folders:
        return Data(path.name, x, x_scale=reference.X_SCALE)
    names = sorted(set(folders))
    y = torch.tensor([names.index(f) for f in folders])
    return Data(path.name, x, y, names, reference.X_SCALE)


def _image_files(folder: Path, around: tuple[Path, ...] = ()) -> Iterator[Path]:
    """The images in a folder and those in it, also behind links, which may lead back."""
    real = folder.resolve()
    if real in around:
        return
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _image_files(entry, (*around, real))
        elif entry.suffix.lower() in _SUFFIXES and entry.is_file():
            yield entry


def _size(image) -> str:
    return f"{image.width}x{image.height}"
