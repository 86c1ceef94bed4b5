"""``vae-fast train`` under torchrun: several processes on gloo do what one does.

Run as a script, this file is what some of the jobs run: see ``_misbehave`` and ``_fork_jobs``.
"""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from vae_fast.cli import checkpoint, main
from vae_fast.cli import train as training
from vae_fast.cli.errors import CommandError
from vae_fast.cli.job import Job

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
distributed = pytest.importorskip("torch.distributed")
if not distributed.is_available() or not distributed.is_gloo_available():
    pytest.skip("this PyTorch has no gloo", allow_module_level=True)
pytestmark = pytest.mark.works_with("torchrun")

# 45 data points to train on: the last batch of an epoch has one, and one of two processes none.
TINY = ["--batch-size", "11", "--epochs", "4", "--hidden", "8", "--latent-dim", "2"]
TINY += ["--device", "cpu"]
# Noise of z and of the levels, several samples, a schedule and both rates of the optimizer.
FULL = ["--num-samples", "2", "--dequantize", "--beta-warmup", "linear:7", "--variance", "scalar"]


def command(folder: Path, out: Path, *more: str) -> list[str]:
    return ["train", "--data", str(folder / "x.npz"), "--out", str(out), *TINY, *more]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


def torchrun(*argv: str) -> subprocess.CompletedProcess:
    """A job of two processes on this machine."""
    how = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*how, *argv], env=environment(), capture_output=True, text=True, timeout=120
    )


def metrics(out: Path) -> np.ndarray:
    with (out / "metrics.csv").open() as file:
        rows = [
            [float(v) for k, v in row.items() if k != "samples_per_s"]
            for row in csv.DictReader(file)
        ]
    return np.array(rows)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(out / "model.safetensors")


def check_same(one: Path, other: Path) -> None:
    """Up to the order of sums, over 20 steps."""
    np.testing.assert_allclose(metrics(other), metrics(one), atol=2e-4)
    expected = weights(one)
    assert weights(other).keys() == expected.keys()
    for name, value in weights(other).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=2e-6, msg=name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data, and in ``one`` what a single process makes of it."""
    folder = tmp_path_factory.mktemp("torchrun")
    x = np.random.default_rng(0).integers(0, 256, (57, 4, 4), dtype=np.uint8)
    np.savez(folder / "x.npz", x=x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_draw", lambda *_: [])
        patch.setattr(training, "_compare", lambda *_: None)
        main(command(folder, folder / "one", *FULL))
    return folder


@pytest.fixture(scope="module")
def two(folder):
    """The same by torchrun; the folder and what was printed."""
    out = folder / "two"
    ended = torchrun("-m", "vae_fast.cli", *command(folder, out, *FULL))
    assert ended.returncode == 0, ended.stderr
    return out, ended.stdout


def test_two_processes_compute_what_one_does(folder, two):
    check_same(folder / "one", two[0])


def test_one_process_prints_and_writes(two):
    out, text = two
    for part in (
        "x: 45 images to train",
        "in 2 processes",
        "epoch 1/4:",
        "epoch 4/4:",
        "model:   ",
    ):
        assert text.count(part) == 1, part
    written = {path.name for path in out.iterdir()}
    assert {"model.safetensors", "metrics.csv", "checkpoint.safetensors", "samples.png"} <= written
    assert not [name for name in written if name.startswith((".", "checkpoint.1"))]
    assert len(metrics(out)) == 4


def test_a_killed_job_is_resumed_to_the_same_bits(folder, two):
    """Process 0 dies in the middle of a write, and the job with it; torchrun starts it again."""
    out = folder / "killed"
    argv = command(folder, out, *FULL, "--resume", "--checkpoint-every", "3")
    ended = torchrun("--max-restarts", "1", __file__, "killed", *argv)
    assert ended.returncode == 0, ended.stderr
    assert "exitcode: -9" in ended.stderr
    assert ended.stdout.count("nothing to resume") == 1
    assert ended.stdout.count(f"resuming {out / checkpoint.NAME}: 1 epochs, 6 steps") == 1
    assert not [name for name in os.listdir(out) if name.startswith(".")]
    np.testing.assert_array_equal(metrics(out), metrics(two[0]))
    for name, value in weights(two[0]).items():
        assert torch.equal(weights(out)[name], value), name


def test_an_error_in_one_process_ends_the_job(folder):
    ended = torchrun(__file__, "failing", *command(folder, folder / "failed", *FULL))
    assert ended.returncode != 0
    assert "error: only process 1 fails" in ended.stderr
    assert not (folder / "failed" / "model.safetensors").exists()


def _misbehave(how: str) -> None:
    """Arrange what befalls a process of a job, the first time that it is started."""
    rank = int(os.environ["RANK"])
    training._draw = lambda *_: []
    if how == "killed" and rank == 0 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        replace, calls = os.replace, []

        def fatal(*args):
            calls.append(args)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*args)

        os.replace = fatal
    if how == "failing" and rank == 1:
        step, taken = torch.optim.Adam.step, []

        def failing(*args):
            taken.append(args)
            if len(taken) == 3:
                raise CommandError("only process 1 fails")
            return step(*args)

        torch.optim.Adam.step = failing


# ---------------------------------------------------------------- jobs forked from one process


def _fork_jobs(path: Path) -> None:
    """Run the jobs of a file, each in as many forks as it says, as torchrun would start them."""
    torch.set_num_threads(1)  # a pool of threads would not survive a fork
    training._draw, training._compare = (lambda *_: []), (lambda *_: None)
    report = []
    for number, argvs in enumerate(json.loads(path.read_text())):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        logs = [path.with_name(f"job{number}-{rank}.txt") for rank in range(len(argvs))]
        children = []
        for rank, argv in enumerate(argvs):
            if (pid := os.fork()) == 0:
                with logs[rank].open("w") as file:
                    os.dup2(file.fileno(), 1)
                    os.dup2(file.fileno(), 2)
                os.environ.update(
                    TORCHELASTIC_RUN_ID="here",
                    MASTER_ADDR="127.0.0.1",
                    MASTER_PORT=str(port),
                    WORLD_SIZE=str(len(argvs)),
                    RANK=str(rank),
                    LOCAL_RANK=str(rank),
                )
                code = 70
                try:
                    code = main(argv)
                except SystemExit as end:
                    code = end.code
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code)
            children.append(pid)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
        report.append({"codes": codes, "texts": [log.read_text() for log in logs]})
    sys.stdout.write(json.dumps(report))


VARIANTS = {
    "default": [],
    "iwae": ["--num-samples", "3", "--objective", "iwae", "--estimator", "dreg"],
    "logistic": ["--likelihood", "logistic", "--variance", "channel", "--kl", "analytic"],
    "sample": ["--likelihood-scale", "optimal_sample", "--batch-size", "2"],
}
COUPLED = {
    "--free-bits": ["--kl", "analytic", "--free-bits", "0.5"],
    "--capacity": ["--capacity", "3"],
    "--likelihood-scale optimal": ["--likelihood-scale", "optimal"],
    "--likelihood-scale optimal_channel": ["--likelihood-scale", "optimal_channel"],
}


@pytest.fixture(scope="module")
def forked(folder):
    """The reports of all forked jobs, by name."""
    jobs = {}
    for name, argv in VARIANTS.items():
        for size in (1, 3):
            out = folder / f"{name}-{size}"
            jobs[f"{name}-{size}"] = [command(folder, out, *argv)] * size
    for name, argv in COUPLED.items():
        jobs[name] = [command(folder, folder / "coupled", *argv)] * 2
    jobs["seeds"] = [command(folder, folder / "seeds", "--seed", seed) for seed in "12"]
    path = folder / "jobs.json"
    path.write_text(json.dumps(list(jobs.values())))
    ended = subprocess.run(
        [sys.executable, __file__, "jobs", str(path)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    return dict(zip(jobs, json.loads(ended.stdout)))


@pytest.mark.parametrize("name", VARIANTS)
def test_three_processes_compute_what_one_does(name, forked, folder):
    """Batches of two rows, too, of which one process never has any."""
    for size in (1, 3):
        report = forked[f"{name}-{size}"]
        assert report["codes"] == [0] * size, report["texts"]
    check_same(folder / f"{name}-1", folder / f"{name}-3")


@pytest.mark.parametrize("name", COUPLED)
def test_losses_that_couple_the_rows_are_refused(name, forked):
    report = forked[name]
    assert report["codes"] == [2, 2]
    for text in report["texts"]:
        assert f"error: {name} is of a batch as a whole, which torchrun splits" in text
        assert "Traceback" not in text


def test_processes_that_were_not_given_the_same_run_are_refused(forked):
    report = forked["seeds"]
    assert report["codes"] == [2, 2]
    for text in report["texts"]:
        assert "the processes do not see the same arguments, data and checkpoint" in text


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_parts_are_contiguous_and_even(size):
    for rows in range(20):
        parts = [Job(torch.device("cpu"), rank, size).part(rows) for rank in range(size)]
        assert [i for first, count in parts for i in range(first, first + count)] == [*range(rows)]
        counts = [count for _, count in parts]
        assert max(counts) - min(counts) <= 1
        # A process without rows borrows the one at its first, which there must be.
        assert all(first < rows for first, _ in parts) or rows == 0


if __name__ == "__main__":
    if sys.argv[1] == "jobs":
        _fork_jobs(Path(sys.argv[2]))
    else:
        _misbehave(sys.argv[1])
        sys.exit(main(sys.argv[2:]))
