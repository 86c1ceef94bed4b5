"""The ``vae-fast`` command, run in process."""

import contextlib
import csv
import importlib.util
import math
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import vae_fast
from vae_fast import VAE
from vae_fast.cli import data as datasets
from vae_fast.cli import doctor, main
from vae_fast.cli import train as training

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")
Image = pytest.importorskip("PIL.Image")
pictures = pytest.importorskip("vae_fast.cli.pictures")

QUICK = ["--epochs", "1", "--hidden", "16", "--batch-size", "64", "--backend", "reference"]
PICTURES = {"training_curves.png", "reconstructions.png", "samples.png", "interpolations.png"}


def check_picture(path: Path) -> None:
    """A PNG, of a sensible size, with something on it."""
    with Image.open(path) as image:
        assert image.format == "PNG", path
        pixels = np.asarray(image.convert("L"), dtype=float)
    assert min(pixels.shape) > 100, path
    assert pixels.std() > 5, path


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def rows_of(folder: Path) -> list[dict[str, float]]:
    with (folder / "metrics.csv").open() as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def fails(capsys, *argv: str) -> str:
    """Run a command that must fail with code 2; returns its message."""
    with pytest.raises(SystemExit) as failure:
        main(argv)
    assert failure.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


# ---------------------------------------------------------------- train


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """A run on the digits with a two-dimensional latent, and what it printed."""
    out = tmp_path_factory.mktemp("digits") / "run"
    measured = []
    original = training.measure

    def measure(vae, x):
        before = {name: value.clone() for name, value in vae.state_dict().items()}
        times = original(vae, x, rounds=3, steps=2)
        measured.append((before, vae.state_dict(), times))
        return times

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "measure", measure)
        printed: list[str] = []
        patch.setattr("builtins.print", lambda *args, **_: printed.append(" ".join(map(str, args))))
        assert (
            main(
                [
                    "train",
                    "--out",
                    str(out),
                    "--epochs",
                    "2",
                    "--latent-dim",
                    "2",
                    "--hidden",
                    "128",
                    "64",
                ]
            )
            == 0
        )
    return SimpleNamespace(out=out, text="\n".join(printed), measured=measured[0])


def test_train_writes_model_metrics_and_pictures(digits_run):
    expected = PICTURES | {"manifold.png", "encoded.png", "model.safetensors", "metrics.csv"}
    expected |= {"checkpoint.safetensors"}
    assert files(digits_run.out) == expected
    for name in expected:
        if name.endswith(".png"):
            check_picture(digits_run.out / name)
            assert str(digits_run.out / name) in digits_run.text


def test_train_metrics(digits_run):
    rows = rows_of(digits_run.out)
    assert tuple(rows[0]) == training.COLUMNS
    assert [row["epoch"] for row in rows] == [1, 2]
    for row in rows:
        for part in ("train", "val"):
            assert row[f"{part}_elbo"] == pytest.approx(
                -row[f"{part}_nll"] - row[f"{part}_kl"], abs=1e-3
            )
        assert row["samples_per_s"] > 0
    # σ = 1 cannot do better than −58.8 nats, and two epochs are enough to beat that.
    assert rows[1]["val_elbo"] > max(rows[0]["val_elbo"], -58.8)


def test_the_checkpoint_is_the_model_the_metrics_tell_of(digits_run):
    """Loaded and evaluated anew, at another batch size, it has the last row's validation ELBO."""
    data = datasets.load("digits")
    _, val = datasets.split(data, seed=0)
    vae = VAE.load(digits_run.out / "model.safetensors").eval()
    key = torch.tensor([0, 0], dtype=torch.uint64)
    with torch.no_grad():
        out = vae(data.x[val], key=key)
    last = rows_of(digits_run.out)[-1]
    assert -float(out.loss) == pytest.approx(last["val_elbo"], abs=5e-3)
    said = re.search(r"(\S+) nats per image, (\S+) per pixel", digits_run.text)
    assert float(said[1]) == pytest.approx(last["val_elbo"], abs=6e-3)
    assert float(said[2]) == pytest.approx(last["val_elbo"] / 64, abs=1e-4)


def test_train_compares_with_plain_pytorch_on_a_copy(digits_run):
    before, after, (step, loss) = digits_run.measured
    for name, value in after.items():
        assert torch.equal(value, before[name]), name
    for times in (step, loss):
        assert set(times) == {"fused", "plain", "reference"}
        assert all(t > 0 for t in times.values())
    assert f"{step['plain'] / step['fused']:.2f}x the speed of plain PyTorch" in digits_run.text


def test_networks_are_a_part_of_the_step_and_not_of_the_loss(monkeypatch):
    """By a clock that only an encoder moves on."""
    vae, calls = VAE.mlp(6, 2, (4,)), []
    vae.encoder.register_forward_hook(lambda *_: calls.append(1))
    monkeypatch.setattr(training.time, "perf_counter", lambda: float(len(calls)))
    step, loss = training.measure(vae, torch.rand(4, 6), rounds=2, steps=3)
    assert step == {"fused": 1.0, "plain": 1.0, "reference": 1.0}
    assert loss == {"fused": 0.0, "plain": 0.0, "reference": 0.0}


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        dict(variance="full", posterior_clamp=(-0.1, 0.1), likelihood_clamp=(-0.1, 0.1)),
        dict(variance="scalar", likelihood_clamp=(-0.1, 0.1)),
        dict(variance="channel", likelihood="laplace"),
        dict(likelihood="student_t"),
        dict(likelihood="logistic", x_scale=(1 / 16, 0.0)),
        dict(likelihood="bernoulli"),
        dict(likelihood_scale=-1.0, kl="analytic"),
        dict(dequantize=True, x_scale=(1 / 16, 0.0)),
    ],
)
def test_the_plain_loss_of_the_comparison_is_the_same_loss(options, samples, monkeypatch):
    torch.manual_seed(0)
    vae = VAE.mlp((4,), 2, (8,), num_samples=samples, beta=0.5, **options)
    assert training._comparable(vae)
    levels = torch.randint(0, 17, (6, 4), dtype=torch.uint8)
    values = vae._encoder_input(levels)
    key = torch.tensor([1, 2], dtype=torch.uint64)
    eps = vae_fast.noise.normal(key, 6, samples, (2,))
    eps = eps[0] if samples == 1 else eps
    monkeypatch.setattr(torch, "randn", lambda *args, **kwargs: eps)
    uniform = vae_fast.noise.uniform(key, 6, (4,))
    monkeypatch.setattr(torch, "rand_like", lambda x: uniform)
    plain = training._plain_loss(vae.elbo, values, vae.encoder(values), vae.decoder)
    torch.testing.assert_close(plain, vae(levels, key=key).loss)


@pytest.mark.parametrize(
    "options",
    [
        dict(objective="iwae"),
        dict(estimator="stl"),
        dict(kl="analytic", free_bits=1.0),
        dict(capacity=1.0),
        dict(likelihood_scale="optimal"),
    ],
)
def test_there_is_no_comparison_where_the_plain_loss_is_another(options):
    assert not training._comparable(VAE.mlp((4,), 2, (8,), **options))


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (
            ["--likelihood", "laplace", "--estimator", "stl", "--variance", "channel"],
            dict(likelihood="laplace", estimator="stl"),
        ),
        (
            ["--likelihood", "student_t", "--capacity", "5"],
            dict(likelihood="student_t", capacity=5),
        ),
        (
            ["--likelihood", "bernoulli", "--kl", "analytic", "--free-bits", "0.1"],
            dict(likelihood="bernoulli", kl="analytic", free_bits=0.1),
        ),
        (
            [
                "--likelihood",
                "logistic",
                "--objective",
                "iwae",
                "--estimator",
                "dreg",
                "--num-samples",
                "3",
            ],
            dict(likelihood="logistic", objective="iwae", estimator="dreg", num_samples=3),
        ),
        (
            ["--likelihood-scale", "0.5", "--dequantize"],
            dict(likelihood_scale=2 * math.log(0.5), dequantize=True),
        ),
        (["--likelihood-scale", "optimal_sample"], dict(likelihood_scale="optimal_sample")),
    ],
)
def test_train_with_every_option(tmp_path, argv, expected):
    of_levels = "logistic" in argv or "--dequantize" in argv
    x = np.random.default_rng(0).integers(0, 256, (40, 4, 4, 3), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", x=x)
    out = tmp_path / "out"
    source = ["--data", str(tmp_path / "x.npz"), "--out", str(out), "--latent-dim", "2"]
    assert main(["train", *source, *QUICK, *argv]) == 0
    for name in PICTURES | {"manifold.png", "encoded.png"}:
        check_picture(out / name)
    vae = VAE.load(out / "model.safetensors").eval()
    options = vae.elbo.options()
    assert {name: options[name] for name in expected} == pytest.approx(expected)

    # The model is the one of the metrics, bits per dimension included.
    (row,) = rows_of(out)
    data = datasets.load(str(tmp_path / "x.npz"))
    _, val = datasets.split(data, seed=0)
    with torch.no_grad():
        told = vae(data.x[val], key=torch.tensor([0, 0], dtype=torch.uint64))
    assert float(told.nll.mean()) == pytest.approx(row["val_nll"], rel=1e-4)
    assert float(told.kl.mean()) == pytest.approx(row["val_kl"], rel=1e-3, abs=1e-3)
    assert (training.BITS in row) == of_levels
    if of_levels:
        assert float(told.bits_per_dim.mean()) == pytest.approx(row[training.BITS], abs=2e-4)

    draws = tmp_path / "draws.npz"
    argv = ["sample", str(out), "-n", "9", "--out", str(tmp_path / "s.png"), "--npz", str(draws)]
    main([*argv, *([] if "optimal_sample" in expected.values() else ["--noise"])])
    check_picture(tmp_path / "s.png")
    with np.load(draws) as file:
        drawn = file["x"]
    if vae.elbo.likelihood == "bernoulli":
        assert set(np.unique(drawn)) == {0.0, 1.0}
    if vae.elbo.likelihood == "logistic":
        np.testing.assert_allclose(drawn * 255, (drawn * 255).round(), atol=1e-3)


def test_bits_of_binary_data(tmp_path, capsys):
    x = np.random.default_rng(0).random((40, 6)) < 0.3
    np.savez(tmp_path / "x.npz", x=x)
    out = tmp_path / "out"
    argv = ["train", "--data", str(tmp_path / "x.npz"), "--out", str(out), *QUICK]
    main([*argv, "--likelihood", "bernoulli"])
    (row,) = rows_of(out)
    assert row[training.BITS] == pytest.approx(-row["val_elbo"] / (6 * math.log(2)), abs=1e-3)
    assert f"at most {row[training.BITS]:.3f} bits/dim" in capsys.readouterr().out


def test_the_digits_are_17_levels_a_sixteenth_apart(tmp_path):
    data = datasets.load("digits")
    assert data.x_scale == (1 / 16, 0.0)
    assert data.x.unique().tolist() == list(range(17))
    main(["train", "--out", str(tmp_path), *QUICK, "--likelihood", "logistic"])
    vae = VAE.load(tmp_path / "model.safetensors")
    assert vae.elbo.x_scale == (1 / 16, 0.0)
    (row,) = rows_of(tmp_path)
    # A mass, so never above 1; and already a first epoch is better than a guess among 256 levels.
    assert row["val_nll"] > 0
    assert row[training.BITS] < 8


@pytest.mark.parametrize("shape", ["linear", "sigmoid", "cyclical"])
def test_the_weight_of_the_kl_term_warms_up(shape, tmp_path, monkeypatch):
    x = np.random.default_rng(0).random((40, 4), dtype=np.float32)
    np.savez(tmp_path / "x.npz", x=x)
    seen = []
    forward = VAE.forward

    def spied(self, *args, **kwargs):
        if torch.is_grad_enabled():
            seen.append(self.elbo.beta)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(VAE, "forward", spied)
    argv = ["train", "--data", str(tmp_path / "x.npz"), "--out", str(tmp_path / "o"), *QUICK]
    main(
        [*argv, "--batch-size", "8", "--epochs", "3", "--beta", "4", "--beta-warmup", f"{shape}:8"]
    )
    steps = 3 * 4  # 32 data points to train on
    schedule = getattr(vae_fast.schedules, shape)(8, end=4.0)
    assert seen == [schedule(step) for step in range(steps)]
    assert seen[0] == 0.0
    assert seen[-1] == 4.0
    assert VAE.load(tmp_path / "o" / "model.safetensors").elbo.beta == 4.0


@pytest.mark.parametrize(
    ("likelihood", "df"),
    [("gaussian", 4.0), ("laplace", 4.0), ("student_t", 9.0), ("logistic", 4.0)],
)
def test_the_pictured_deviation_is_that_of_draws(likelihood, df):
    vae = VAE(
        torch.nn.Linear(4, 2), lambda z: (torch.full((len(z), 4), 0.5), torch.tensor(-6.0)), 1,
        likelihood=likelihood, df=df,
    )  # fmt: skip
    x = vae.sample(20_000, key=torch.tensor([1, 2], dtype=torch.uint64), noise=True)
    assert float(x.std()) == pytest.approx(float(training._std(vae, torch.zeros(1, 1))), rel=0.03)


def test_the_comparison_can_be_left_out(tmp_path, capsys):
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).random((20, 4), dtype=np.float32))
    argv = ["train", "--data", str(tmp_path / "x.npz"), "--out", str(tmp_path / "o")]
    main([*argv, "--epochs", "1", "--no-compare"])
    printed = capsys.readouterr().out
    assert "all done" in printed
    assert "plain PyTorch" not in printed


def test_runs_are_reproducible(tmp_path):
    x = np.random.default_rng(0).random((60, 4, 4), dtype=np.float32)
    np.savez(tmp_path / "x.npz", x=x)
    metrics = []
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        out = tmp_path / name
        main(
            ["train", "--data", str(tmp_path / "x.npz"), "--out", str(out), "--seed", seed, *QUICK]
        )
        (row,) = rows_of(out)
        del row["samples_per_s"]
        metrics.append(row)
    assert metrics[0] == metrics[1] != metrics[2]


FAULTS = """
import resource, sys, torch
from vae_fast.cli import main, train

def faults():
    torch.ones(1 << 24)  # 16384 pages, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def steps(args):
    *_, first = [faults() for _ in range(9)]  # until the heap has a place for it
    *_, last = [faults() for _ in range(8)]
    print(last - first)

train.train = steps
sys.argv = ["vae-fast", "train", "--out", "."]
main()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc")
@pytest.mark.parametrize("told", [False, True])
def test_the_command_keeps_freed_memory_unless_told_otherwise(told):
    names = "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"
    env = {k: v for k, v in os.environ.items() if k not in names}
    env |= dict.fromkeys(names, "131072") if told else {}
    run = [sys.executable, "-c", FAULTS]
    done = subprocess.run(run, env=env, capture_output=True, text=True, check=True)
    tensors = int(done.stdout) / 16384  # of eight
    assert tensors > 7 if told else tensors < 0.5


def test_train_conv_on_a_colour_npz_with_classes(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (50, 9, 7, 3), dtype=np.uint8)
    np.savez(tmp_path / "colour.npz", x=x, y=np.array(["cat", "dog"] * 25))
    data = datasets.load(str(tmp_path / "colour.npz"))
    assert data.event_shape == (3, 9, 7)
    assert data.labels == ["cat", "dog"]
    assert data.x.dtype == torch.uint8
    np.testing.assert_allclose(data.values().numpy(), x.transpose(0, 3, 1, 2) / 255, rtol=1e-6)
    out = tmp_path / "out"
    argv = ["train", "--data", str(tmp_path / "colour.npz"), "--out", str(out), "--model", "conv"]
    main([*argv, "--latent-dim", "2", "--num-samples", "2", "--inplace", *QUICK])
    for name in PICTURES | {"manifold.png", "encoded.png"}:
        check_picture(out / name)
    assert VAE.load(out / "model.safetensors").sample(2).shape == (2, 3, 9, 7)


@pytest.mark.parametrize("variance", ["full", "scalar", "channel", "unit", None])
def test_train_on_vectors(tmp_path, variance):
    t = np.linspace(0, 1, 12)
    phase = np.random.default_rng(0).random((40, 1))
    np.savez(tmp_path / "waves.npz", x=np.sin(2 * np.pi * (t + phase)))
    out = tmp_path / "out"
    argv = ["train", "--data", str(tmp_path / "waves.npz"), "--out", str(out), "--latent-dim", "2"]
    how = ["--variance", variance] if variance else ["--likelihood-scale", "optimal"]
    main([*argv, *how, *QUICK])
    for name in PICTURES | {"encoded.png"}:
        check_picture(out / name)
    scale = VAE.load(out / "model.safetensors").decode(torch.zeros(1, 2))[1]
    if variance is None:
        assert scale is None
        return
    assert scale.shape == {"full": (1, 12), "channel": (12,)}.get(variance, ())
    assert (scale == 0).all() == (variance == "unit")


def test_train_on_a_folder_of_images(tmp_path):
    rng = np.random.default_rng(0)
    for index in range(20):
        folder = tmp_path / "images" / ("even" if index % 2 == 0 else "odd")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (6, 10), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:02}.png")
    data = datasets.load(str(tmp_path / "images"))
    assert data.event_shape == (1, 6, 10)
    assert data.labels == ["even", "odd"]
    assert data.y.tolist() == [0] * 10 + [1] * 10
    np.testing.assert_allclose(data.values()[-1, 0].numpy(), pixels / 255, rtol=1e-6)

    # One of another size, in colour: an error, unless they are resized, then all are in colour.
    odd_one = tmp_path / "images" / "odd" / "99.jpg"
    Image.fromarray(rng.integers(0, 256, (30, 20, 3), dtype=np.uint8)).save(odd_one)
    assert datasets.load(str(tmp_path / "images"), image_size=8).event_shape == (3, 8, 8)
    out = tmp_path / "out"
    main(
        [
            "train",
            "--data",
            str(tmp_path / "images"),
            "--out",
            str(out),
            "--image-size",
            "8",
            *QUICK,
        ]
    )
    check_picture(out / "samples.png")


def test_images_behind_links(tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        for index in range(6):
            Image.new("L", (4, 4)).save(folder / f"{index}.png")
        (tmp_path / "images" / name).symlink_to(folder)
    (tmp_path / "a" / "around").symlink_to(tmp_path / "images")
    data = datasets.load(str(tmp_path / "images"))
    assert data.labels == ["a", "b"]
    assert len(data.x) == 12


def test_a_folder_that_may_not_be_read_is_not_left_out(tmp_path, capsys, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)  # root may read all there is
    error = fails(capsys, "train", "--out", str(tmp_path / "o"), "--data", str(tmp_path))
    assert "cannot be read as a folder of images: [Errno 13] Permission denied" in error


def test_series_are_drawn_as_curves(tmp_path):
    """A few columns of many values are no image, of which a picture could be a mile long."""
    x = np.random.default_rng(0).random((12, 100, 3)).astype(np.float32)
    np.savez(tmp_path / "series.npz", x=x)
    assert (
        main(
            ["train", *QUICK, "--data", str(tmp_path / "series.npz"), "--out", str(tmp_path / "o")]
        )
        == 0
    )
    for picture in (tmp_path / "o").glob("*.png"):
        with Image.open(picture) as image:
            assert max(image.size) < 4000, picture.name
    columns = torch.arange(40.0).reshape(1, 1, 20, 2)
    assert pictures._in_line(columns, 1)[0].tolist() == [*range(0, 40, 2), *range(1, 40, 2)]
    assert pictures._in_line(columns.expand(3, 1, 1, 20, 2), 2).shape == (3, 1, 40)
    assert not datasets.is_image((1, 100, 3))
    assert datasets.is_image((3, 8, 64))


def test_names_of_classes_are_no_formulas(tmp_path):
    y = torch.arange(4) % 2
    pictures.encoded(torch.randn(4, 2), y, [r"$\foo$", "a$b"], tmp_path / "encoded.png")
    assert (tmp_path / "encoded.png").stat().st_size > 0


def test_the_model_of_the_run_before_is_kept_aside(tmp_path, capsys):
    """Until the new run ends there is none beside the new metrics."""
    out = tmp_path / "o"
    assert main(["train", *QUICK, "--out", str(out)]) == 0
    before = (out / "model.safetensors").read_bytes()
    fails(capsys, "train", *QUICK, "--out", str(out), "--lr", "1e30", "--epochs", "3")
    assert not (out / "model.safetensors").exists()
    assert (out / "model.previous.safetensors").read_bytes() == before


def test_an_interrupt_keeps_what_was_trained(tmp_path, monkeypatch, capsys):
    original = training._train_epoch
    epochs = []

    def train_epoch(*args):
        epochs.append(1)
        if len(epochs) == 3:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(training, "_train_epoch", train_epoch)
    assert main(["train", "--out", str(tmp_path), *QUICK, "--epochs", "9"]) == 0
    assert len(rows_of(tmp_path)) == 2
    assert "2 epochs" in capsys.readouterr().out
    assert VAE.load(tmp_path / "model.safetensors").latent_shape == (10,)
    check_picture(tmp_path / "training_curves.png")


def test_the_split_is_a_partition_that_depends_on_the_seed():
    data = datasets.load("digits")
    train, val = datasets.split(data, 0)
    assert (len(train), len(val)) == (1437, 360)
    assert sorted(torch.cat([train, val]).tolist()) == list(range(1797))
    assert torch.equal(train, datasets.split(data, 0)[0])
    assert not torch.equal(train, datasets.split(data, 1)[0])
    assert data.values().min() == 0
    assert data.values().max() == 1


def test_pictures_show_each_image_in_its_place(tmp_path):
    """Tiles of one grey level each come out in reading order, and the rest is white."""
    grey = torch.linspace(0, 1, 5)
    path = tmp_path / "five.png"
    pictures.samples(grey.reshape(5, 1, 1, 1).expand(5, 1, 8, 8), path, "")
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("L"), dtype=float)[60:]  # below the title
    height, width = pixels.shape
    for index in range(6):  # three columns, two rows
        y = int(height * (0.25 + 0.5 * (index // 3)))
        x = int(width * (1 / 6 + (index % 3) / 3))
        want = 255 * (grey[index] if index < 5 else 1.0)
        assert pixels[y, x] == pytest.approx(float(want), abs=2), index


# ---------------------------------------------------------------- bad input


def test_files_that_cannot_be_used_are_explained(tmp_path, capsys):
    def message(data, *more):
        return fails(capsys, "train", "--out", str(tmp_path / "o"), "--data", str(data), *more)

    def npz(name="d.npz", **arrays):
        np.savez(tmp_path / name, **arrays)
        return tmp_path / name

    x = np.zeros((20, 4), np.float32)
    assert "no such file or folder" in message(tmp_path / "absent.npz")
    assert "no array x; arrays found: a, b" in message(npz(a=x, b=x))
    bad = x.copy()
    bad[3, 1], bad[5, 0] = math.nan, math.inf
    assert "NaN or infinity in 2 of 20 rows; the first is 3" in message(npz(x=bad))
    beyond = x.astype(np.float64)
    beyond[2, 1] = 1e39
    assert "x in fp32 has NaN or infinity in 1 of 20 rows; the first is 2" in message(npz(x=beyond))
    assert "y must be of shape (20,) like x, got (19,)" in message(npz(x=x, y=np.zeros(19)))
    assert "x must be of shape (N, ...), got (20,)" in message(npz(x=x[:, 0]))
    assert "x must be of shape (N, ...), got empty, (0, 4)" in message(npz(x=x[:0]))
    for kind, ends in (("int64", "0 to 255"), ("int16", "-1 to 1"), ("uint16", "0 to 2")):
        lo, hi = map(int, ends.split(" to "))
        bad = np.full((20, 4), lo, kind)
        bad[7, 1] = hi
        assert f"x is {kind}, from {ends}: save levels from 0 to 255 as uint8" in message(
            npz(x=bad)
        )
    binary = npz(x=x.astype(np.uint8) + 1)
    assert "x is uint8, levels 1/255 apart, but none is above 1" in message(binary)
    assert "x must hold real numbers, got dtype complex128" in message(npz(x=x.astype(complex)))
    assert "9 data points; at least 10" in message(npz(x=x[:9]))
    assert "--model conv needs images" in message(npz(x=x), "--model", "conv")
    levels = "needs data of levels, uint8; d is not"
    assert "--likelihood logistic " + levels in message(npz(x=x), "--likelihood", "logistic")
    assert "--dequantize " + levels in message(npz(x=x), "--dequantize")
    wide = npz(x=x - np.arange(4, dtype=np.float32))
    assert "needs data in [0, 1], but d goes from -3 to 0" in message(
        wide, "--likelihood", "bernoulli"
    )
    (tmp_path / "broken.npz").write_bytes(b"PK but not really")
    assert "cannot be read as a .npz file: it is none" in message(tmp_path / "broken.npz")
    with open(tmp_path / "array.npz", "wb") as file:
        np.save(file, x)
    assert "is one array, not a .npz file" in message(tmp_path / "array.npz")
    np.savez_compressed(tmp_path / "damaged.npz", x=np.random.default_rng(0).random((400, 4)))
    damaged = bytearray((tmp_path / "damaged.npz").read_bytes())
    damaged[200:400] = bytes(byte ^ 0x5A for byte in damaged[200:400])
    (tmp_path / "damaged.npz").write_bytes(damaged)
    assert "cannot be read as a .npz file" in message(tmp_path / "damaged.npz")
    encrypted = bytearray(npz(x=x).read_bytes())
    encrypted[encrypted.index(b"PK\x01\x02") + 8] |= 1  # a flag in the directory
    (tmp_path / "encrypted.npz").write_bytes(encrypted)
    assert "cannot be read as a .npz file" in message(tmp_path / "encrypted.npz")
    np.savez(tmp_path / "objects.npz", x=np.array([{}] * 20))
    assert "cannot be read as a .npz file" in message(tmp_path / "objects.npz")
    (tmp_path / "table.csv").write_text("1,2")
    assert "must be digits, a .npz file or a folder" in message(tmp_path / "table.csv")
    assert "--image-size goes with a folder" in message("digits", "--image-size", "8")

    images = tmp_path / "images"
    images.mkdir()
    assert "has no images" in message(images)
    for index in range(12):
        Image.new("L", (5, 4 if index < 11 else 3)).save(images / f"{index:02}.png")
    text = message(images)
    assert "00.png is 5x4" in text
    assert "11.png is 5x3" in text
    assert "--image-size" in text
    Image.fromarray(np.full((5, 4), 60000, np.uint16)).save(images / "00.png")
    assert "00.png has more than 8 bits a channel" in message(images)
    (images / "00.png").write_text("no image")
    assert "00.png cannot be read as an image" in message(images)
    (images / "00.png").write_bytes(b"P6\n99999999 99999999\n255\n")
    assert "00.png cannot be read as an image" in message(images)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--device", "nonsense"], "--device nonsense cannot be used here"),
        (["--device", "cuda:99"], "--device cuda:99 cannot be used here"),
        (["--backend", "nonsense"], "--backend nonsense"),
        (["--out", ""], "must name a folder"),
        (["--epochs", "0"], "must be at least 1"),
        (["--epochs", "x"], "must be a whole number, got x"),
        (["--lr", "fast"], "must be a number, got fast"),
        (["--lr", "-1"], "must be a number of at least 0"),
        (["--lr", "0"], "must be above 0"),
        (["--beta", "nan"], "must be a number of at least 0"),
        (["--seed", "-1"], "must be between 0"),
        (["--variance", "some"], "invalid choice"),
        (["--likelihood", "poisson"], "invalid choice"),
        (
            ["--likelihood-scale", "best"],
            "must be a number above 0 or one of optimal, optimal_sample",
        ),
        (["--likelihood-scale", "0"], "must be a number above 0 or one of"),
        (
            ["--likelihood-scale", "1", "--variance", "unit"],
            "--variance unit and --likelihood-scale 1.0",
        ),
        (["--beta-warmup", "steep:3"], "SHAPE one of cyclical, linear, sigmoid and STEPS"),
        (["--beta-warmup", "linear:0"], "and STEPS at least 1, got linear:0"),
        (["--beta-warmup", "linear"], "must be SHAPE:STEPS"),
        (["--free-bits", "1"], "--free-bits needs --kl analytic: "),
        (
            ["--objective", "iwae", "--estimator", "stl"],
            "--estimator stl is biased for --objective iwae (Tucker et al. 2019); use dreg",
        ),
        (
            ["--likelihood", "logistic", "--dequantize"],
            "--dequantize needs a density, but --likelihood logistic is",
        ),
        ([*QUICK, "--lr", "1e30", "--epochs", "3"], "the loss was not finite in epoch"),
    ],
)
def test_wrong_options_are_explained(argv, message, tmp_path, capsys):
    assert message in fails(capsys, "train", "--out", str(tmp_path / "o"), *argv)
    assert (tmp_path / "o").exists() == ("not finite" in message)


@contextlib.contextmanager
def forced(name):
    """What VAE_FAST_BACKEND in the environment of a new process does."""
    backends = vae_fast.backends
    before, resolved = backends._forced, backends._resolved
    backends._resolved = {}
    try:
        backends._force(name)
        yield
    finally:
        backends._resolved = resolved
        backends._force(before)


def test_a_backend_that_cannot_run_says_why(tmp_path, capsys, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("Triton runs here")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    error = fails(capsys, "train", "--out", str(tmp_path / "o"), "--backend", "triton")
    assert "--backend triton: backend 'triton' cannot run on this machine" in error
    monkeypatch.setenv("VAE_FAST_BACKEND", "triton")
    with forced("triton"):
        error = fails(capsys, "train", "--out", str(tmp_path / "o"))
    assert "VAE_FAST_BACKEND=triton: backend 'triton' cannot serve device 'cpu'" in error


def test_an_out_that_cannot_be_written_is_explained(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "file is a file, and no folder" in fails(
        capsys, "train", "--out", str(tmp_path / "file")
    )
    assert "--out" in fails(capsys, "train", "--out", str(tmp_path / "file" / "below"))


@pytest.mark.parametrize("missing", ["matplotlib", "safetensors", "tqdm", "sklearn"])
def test_a_missing_dependency_names_the_extra(missing, tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == missing else find(name, *a)
    )
    error = fails(capsys, "train", "--out", str(tmp_path / "o"))
    assert missing.replace("sklearn", "scikit-learn") in error
    assert 'pip install "vae_fast[train]"' in error


# ---------------------------------------------------------------- sample, doctor


def test_sample_writes_a_picture_and_values(digits_run, tmp_path, capsys):
    values = []
    for name, more in (
        ("a", []),
        ("b", []),
        ("seed", ["--seed", "1"]),
        ("noise", ["--noise"]),
        ("folder", []),
    ):
        source = digits_run.out if name == "folder" else digits_run.out / "model.safetensors"
        png, npz = tmp_path / "new" / f"{name}.png", tmp_path / f"{name}.npz"
        argv = ["sample", str(source), "-n", "10", "--out", str(png), "--npz", str(npz)]
        assert main([*argv, *more]) == 0
        check_picture(png)
        assert str(png) in capsys.readouterr().out
        with np.load(npz) as file:
            values.append(file["x"])
    a, b, seed, noise, folder = values
    assert a.shape == (10, 1, 8, 8)
    assert np.array_equal(a, b)
    assert np.array_equal(a, folder)
    assert not np.allclose(a, seed)
    assert not np.allclose(a, noise)


def test_sample_explains_a_variance_that_needs_data(tmp_path, capsys):
    VAE.mlp((4,), 2, (8,), likelihood_scale="optimal").save(tmp_path / "model.safetensors")
    error = fails(capsys, "sample", str(tmp_path), "--noise", "--out", str(tmp_path / "s.png"))
    assert "estimates the variance of p(x|z) from x" in error


def test_sample_explains_a_wrong_checkpoint(tmp_path, capsys):
    assert "no such file" in fails(capsys, "sample", str(tmp_path / "absent"))
    assert "model.safetensors: no such file" in fails(capsys, "sample", str(tmp_path))
    (tmp_path / "model.safetensors").write_text("nothing of the kind, to be sure")
    assert "not a safetensors file" in fails(capsys, "sample", str(tmp_path))


def test_doctor_reports_what_runs_here(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    report = vae_fast.backends.report()
    assert torch.__version__ in text
    for entry in report["devices"]:
        assert f"served by {entry['backend']}" in text
        for name, reason in entry["others"].items():
            assert f"{name}: {reason}" in text
    assert str(report["extension"]["status"]) in text


def test_doctor_tells_of_a_backend_that_cannot_be(capsys):
    with forced("fast"):
        assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "served by nothing: VAE_FAST_BACKEND must be one of cpp, triton, reference" in text


def test_doctor_renders_an_unusual_report():
    assert "Versions" in doctor.render({})
    text = doctor.render(
        {
            "versions": {"torch": None},
            "devices": [{"device": "cuda:0"}, {"backend": "cpp", "others": None}],
            "extension": "no compiler",
            "environment": {"VAE_FAST_BACKEND": "cpp"},
        }
    )
    for part in ("none", "cuda:0: served by nothing", "no compiler", "VAE_FAST_BACKEND  cpp"):
        assert part in text


@pytest.mark.parametrize("command", [[], ["train"], ["sample"], ["doctor"]])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([*command, "--help"])
    assert end.value.code == 0
    assert "usage: vae-fast" in capsys.readouterr().out
