"""Training that is killed at any moment, its checkpoints, and ``--resume``.

Run as a script, this file is the process of ``test_a_run_survives_any_number_of_kills`` that forks
runs and kills them: forking costs milliseconds, importing torch seconds.
"""

import csv
import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import vae_fast
from vae_fast import VAE, _files, cli
from vae_fast.cli import checkpoint, main, signals
from vae_fast.cli import train as training
from vae_fast.cli.errors import CommandError

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
pytestmark = pytest.mark.works_with("crash and resume")

# 45 data points to train on: five batches, the last of one point; 15 steps in all.
TINY = ["--batch-size", "11", "--epochs", "3", "--hidden", "8", "--latent-dim", "2"]
TINY += ["--device", "cpu"]
STEPS, BATCHES = 15, 5
VARIANTS = {
    "plain": [],
    "warm": ["--variance", "scalar", "--beta-warmup", "cyclical:9", "--backend", "reference"],
    "levels": ["--dequantize", "--num-samples", "2", "--seed", "3"],
    "conv": ["--model", "conv", "--likelihood", "logistic"],
}


def make_data(folder: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(folder / "values.npz", x=rng.random((57, 4, 4), dtype=np.float32))
    np.savez(folder / "levels.npz", x=rng.integers(0, 256, (57, 4, 4), dtype=np.uint8))


def command(folder: Path, out: Path, variant: str = "plain") -> list[str]:
    data = folder / ("levels.npz" if variant in ("levels", "conv") else "values.npz")
    return ["train", "--data", str(data), "--out", str(out), *TINY, *VARIANTS[variant]]


def results(out: Path) -> dict[str, object]:
    """What must not depend on how often the run was stopped: weights, bit by bit, and metrics."""
    weights = safetensors.torch.load_file(out / "model.safetensors")
    return {
        "weights": {name: value.numpy().tobytes() for name, value in weights.items()},
        "metrics": metrics_of(out),
    }


def metrics_of(out: Path) -> list[list[float]]:
    """Without the speed."""
    with (out / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [[float(v) for name, v in row.items() if name != "samples_per_s"] for row in rows]


def leave_out_pictures(patch) -> None:
    patch.setattr(training, "_draw", lambda *_: [])
    patch.setattr(training, "_compare", lambda *_: None)


# ---------------------------------------------------------------- kills, in processes of their own

KILLS = ("at a time", "in write", "in open", "in fsync", "in replace", "at a step")


def _arm(how: str, rng: random.Random) -> None:
    """Make this process kill itself in one of the next calls of one kind, before, in or after."""
    nth = rng.randint(1, 9)
    early = rng.random() < 0.5
    calls = 0

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def fatal(function):
        def wrapped(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == nth and early:
                die()
            result = function(*args, **kwargs)
            if calls == nth:
                die()
            return result

        return wrapped

    class Torn:
        """A file of which a part is written."""

        def __init__(self, file) -> None:
            self._file = file

        def __enter__(self):
            return self

        def __exit__(self, *error) -> None:
            self._file.__exit__(*error)

        def write(self, data: bytes) -> None:
            nonlocal calls
            calls += 1
            if calls == nth:
                self._file.write(data[: rng.randrange(len(data) + 1)])
                self._file.flush()
                die()
            self._file.write(data)

        def __getattr__(self, name):
            return getattr(self._file, name)

    if how == "in write":
        fdopen = os.fdopen
        os.fdopen = lambda *args, **kwargs: Torn(fdopen(*args, **kwargs))
    elif how == "at a step":
        torch.optim.Adam.step = fatal(torch.optim.Adam.step)
    elif how != "at a time":
        name = how.split()[-1]
        setattr(os, name, fatal(getattr(os, name)))


def _forked(argv: list[str], log: Path, how: str | None = None, rng=None, longest=0.0) -> int:
    """Run the command in a fork, to be killed as ``how`` says; its status, −9 if it was."""
    seed = rng.random() if rng else None
    if (pid := os.fork()) == 0:
        code = 70
        try:
            with log.open("a") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            if how is not None:
                _arm(how, random.Random(seed))
            code = main(argv)
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    if how == "at a time":
        time.sleep(rng.uniform(0.0, longest))
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def campaign(folder: Path, seed: int, variants: list[str], kills: int) -> dict[str, object]:
    """Kill runs and resume them, ``kills`` times for each variant, and finish each run."""
    torch.set_num_threads(1)  # a pool of threads would not survive a fork
    leave_out_pictures(pytest.MonkeyPatch())
    rng = random.Random(seed)
    log = folder / f"log{seed}.txt"
    report: dict[str, object] = {"kills": dict.fromkeys(KILLS, 0), "loaded": 0, "finished": 0}
    for variant in variants:
        whole = folder / f"whole-{variant}"
        began = time.perf_counter()
        assert _forked(command(folder, whole, variant), log) == 0, log.read_text()
        longest = time.perf_counter() - began
        want = results(whole)
        count = run = in_run = 0
        while count < kills or in_run:
            out = folder / f"killed-{variant}-{run}"
            argv = [*command(folder, out, variant), "--resume", "--checkpoint-every", "1"]
            # A run is killed up to eight times, then it may end.
            how = rng.choice(KILLS) if count < kills and in_run < 8 else None
            status = _forked(argv, log, how, rng, longest)
            assert status in (0, -signal.SIGKILL), log.read_text()
            path = out / checkpoint.NAME
            if path.exists():
                checkpoint._read(path)
                report["loaded"] += 1
            if status == 0:
                assert results(out) == want, f"{out}: other weights or metrics"
                left = [name for name in os.listdir(out) if name.startswith(".")]
                assert how is not None or left == [], left
                report["finished"] += 1
                run, in_run = run + 1, 0
            else:
                report["kills"][how] += 1
                count, in_run = count + 1, in_run + 1
    return report


@pytest.mark.slow
def test_a_run_survives_any_number_of_kills(tmp_path):
    """At least 100 kills; every time the checkpoint loads, and the end is the same to the bit."""
    make_data(tmp_path)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, str(tmp_path), str(seed), "30", *variants],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for seed, variants in enumerate((["plain", "warm"], ["levels", "conv"]))
    ]
    total = dict.fromkeys(KILLS, 0)
    for worker in workers:
        text, _ = worker.communicate(timeout=240)
        assert worker.returncode == 0, text
        report = json.loads(text.splitlines()[-1])
        assert report["finished"] >= 4, report
        assert report["loaded"] > 30, report
        for how, count in report["kills"].items():
            total[how] += count
    assert sum(total.values()) >= 100
    assert min(total.values()) >= 3, total


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The data sets, and in ``whole`` a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("resume")
    make_data(folder)
    with pytest.MonkeyPatch.context() as patch:
        leave_out_pictures(patch)
        main(command(folder, folder / "whole"))
    return folder


@pytest.mark.slow
def test_the_real_command_is_killed_limited_and_resumed(folder, tmp_path):
    """``python -m vae_fast.cli``, killed from outside; and files that may not grow large enough."""
    argv = [sys.executable, "-m", "vae_fast.cli", *command(folder, tmp_path)]
    argv = [*argv, "--epochs", "400", "--checkpoint-every", "1", "--resume"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    path = tmp_path / checkpoint.NAME
    while not path.exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    text, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, text.decode()
    info, _ = checkpoint._read(path)
    assert 0 < info["step"] < 400 * BATCHES

    before = path.read_bytes()
    limit = f'ulimit -f {len(before) // 2048}; exec "$0" "$@"'  # blocks of 1024 bytes
    ended = subprocess.run(
        ["bash", "-c", limit, *argv], env=environment, capture_output=True, text=True, timeout=100
    )
    assert ended.returncode == 2, ended.stderr
    assert f"{path} cannot be written: File too large" in ended.stderr
    assert f"{path} is whole, and --resume continues from its step, {info['step']}" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert path.read_bytes() == before
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


# ---------------------------------------------------------------- stops of other kinds, in process


def kick(number: int) -> None:
    """Send this process a signal, if that is not the end of it."""
    assert signal.getsignal(number) != signal.SIG_DFL
    os.kill(os.getpid(), number)


class Crash(BaseException):
    """What nothing catches."""


@pytest.fixture(autouse=True)
def _signals_as_at_a_terminal():
    """A shell's background jobs ignore Ctrl-C, and so would the tests of it."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def train(folder, tmp_path, monkeypatch):
    """Runs the command in ``tmp_path / "out"``; ``stop`` is done at step ``at``."""
    leave_out_pictures(monkeypatch)
    out = tmp_path / "out"
    out.mkdir()
    done = checkpoint.Saver.step_done

    def train(*more, at=None, stop=None, variant="plain"):
        def step_done(self):
            done(self)
            if self._state.step == at:
                stop()

        monkeypatch.setattr(checkpoint.Saver, "step_done", step_done)
        try:
            return main([*command(folder, out, variant), *more])
        finally:
            monkeypatch.setattr(checkpoint.Saver, "step_done", done)

    train.out = out
    train.path = out / checkpoint.NAME
    return train


def crash():
    raise Crash


def crashed(train, at=7, *more, variant="plain"):
    """A run that crashed at a step, with a checkpoint of that step."""
    with pytest.raises(Crash):
        train("--checkpoint-every", "1", *more, at=at, stop=crash, variant=variant)


def fails(capsys, train, *more) -> str:
    """Run the command, which must fail with code 2; returns its message."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        train(*more)
    assert end.value.code == 2
    return capsys.readouterr().err


def step_of(path: Path) -> int:
    return checkpoint._read(path)[0]["step"]


@pytest.mark.parametrize("at", [1, BATCHES, 2 * BATCHES + 3, STEPS])
def test_a_crash_at_a_step(train, folder, capsys, at):
    """In an epoch, between two of them and after the last step; the rest is done, and no more."""
    crashed(train, at)
    capsys.readouterr()
    taken = []
    step = torch.optim.Adam.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", lambda *a: (taken.append(1), step(*a))[1])
        train("--resume")
    assert len(taken) == STEPS - at
    assert results(train.out) == results(folder / "whole")
    # At the last step of an epoch that epoch is not yet evaluated, so its row is to come.
    printed = capsys.readouterr().out
    assert f"resuming {train.path}: {(at - 1) // BATCHES} epochs, {at} steps" in printed
    assert "the last bits may differ" not in printed


@pytest.mark.gpu
def test_a_crash_on_a_gpu(train):
    """Order and noise go on where they were; sums may round otherwise."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    train("--device", "cuda")
    want = metrics_of(train.out)
    crashed(train, 7, "--device", "cuda")
    torch.cuda.manual_seed(1)
    train("--device", "cuda", "--resume")
    np.testing.assert_allclose(metrics_of(train.out), want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_its_step(train, folder, number, capsys):
    """SIGTERM at once, Ctrl-C with the model so far; both leave a checkpoint of that very step."""

    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    if number == signal.SIGTERM:
        with pytest.raises(SystemExit) as end:
            train(at=7, stop=lambda: kick(number))
        assert end.value.code == 143
        assert (
            f"terminated after step 8; {train.path} is whole, and --resume"
            in capsys.readouterr().err
        )
        assert not (train.out / "model.safetensors").exists()
    else:
        assert train(at=7, stop=lambda: kick(number)) == 0
        text = capsys.readouterr().out
        assert f"keeping the model as it is, 1 epochs in; {train.path} is whole, and" in text
        assert "--resume continues from its step, 8" in text
        assert VAE.load(train.out / "model.safetensors").latent_shape == (2,)
    assert step_of(train.path) == 8
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    train("--resume")
    assert results(train.out) == results(folder / "whole")


def test_a_signal_in_the_first_or_last_epoch(train, folder, capsys):
    with pytest.raises(SystemExit) as end:
        train(at=2, stop=lambda: kick(signal.SIGINT))
    assert end.value.code == 130
    assert step_of(train.path) == 3
    assert not (train.out / "model.safetensors").exists()
    with pytest.raises(SystemExit) as end:  # which is noted after the last step of all
        train("--resume", at=STEPS, stop=lambda: kick(signal.SIGTERM))
    assert end.value.code == 143
    assert f"--resume continues from its step, {STEPS}" in capsys.readouterr().err
    train("--resume")
    assert results(train.out) == results(folder / "whole")


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupt_of_the_first_save(train, first, capsys, monkeypatch):
    """SIGTERM stays one, and nothing is promised that is not there."""
    monkeypatch.setattr(checkpoint, "write", lambda *_: kick(signal.SIGINT))
    try:
        code = train(at=7, stop=lambda: kick(first))
    except SystemExit as end:
        code = end.code
    printed = capsys.readouterr()
    if first == signal.SIGTERM:
        assert code == 143
        told = printed.err
    else:
        assert code == 0
        told = printed.out
    assert "; there is no checkpoint to continue from" in told
    assert "--resume" not in told
    assert not train.path.exists()
    assert (train.out / "model.safetensors").exists() == (first == signal.SIGINT)


def test_sigterm_while_an_interrupted_run_saves_its_model(train, monkeypatch):
    save = VAE.save
    monkeypatch.setattr(VAE, "save", lambda *args: (save(*args), kick(signal.SIGTERM)))
    with pytest.raises(SystemExit) as end:
        train(at=7, stop=lambda: kick(signal.SIGINT))
    assert end.value.code == 143
    assert VAE.load(train.out / "model.safetensors").latent_shape == (2,)


def test_a_second_interrupt_does_not_wait():
    with signals.noted() as noted:
        os.kill(os.getpid(), signal.SIGINT)
        assert noted.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_handlers_of_others_are_left_alone():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with signals.noted(), signals.noted(False):
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGINT) != signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    seen = []

    def elsewhere():  # only the main thread can set handlers
        with signals.noted() as noted:
            seen.append(noted.received)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [None]


# ---------------------------------------------------------------- when


def test_checkpoints_every_so_many_steps_or_seconds(train, monkeypatch):
    steps = []
    original = checkpoint.write
    now = [0.0]

    def write(path, state, *rest):
        steps.append(state.step)
        now[0] += 1000.0  # the interval begins after the writing
        original(path, state, *rest)

    monkeypatch.setattr(checkpoint, "write", write)
    train("--checkpoint-every", "4")
    assert steps == [4, 8, 12, 15]

    def tick(*args):
        now[0] += 10.0
        return step(*args)

    step = torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", tick)
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    for more, expected in (
        (["--checkpoint-every", "25s"], [3, 6, 9, 12, 15, 15]),
        ([], [6, 12, 15]),
    ):
        steps.clear()
        train(*more)  # by default every minute
        assert steps == expected


@pytest.mark.parametrize("text", ["0", "0s", "-1", "s", "5m", "1.5", "infs", "nans"])
def test_an_interval_that_is_none(text, capsys, tmp_path):
    with pytest.raises(SystemExit):
        main(["train", "--out", str(tmp_path), f"--checkpoint-every={text}"])
    assert "--checkpoint-every: must be a number of steps, like 100" in capsys.readouterr().err


# ---------------------------------------------------------------- what a run starts from


def test_nothing_to_resume_is_a_run_from_the_start(train, folder, capsys):
    train("--resume")
    assert f"nothing to resume: there is no {train.path}" in capsys.readouterr().out
    assert results(train.out) == results(folder / "whole")


def test_a_finished_run_is_not_run_again(train, folder, capsys, monkeypatch):
    train()
    (train.out / "model.safetensors").unlink()  # a kill may have come before it
    monkeypatch.setattr(torch.optim.Adam, "step", crash)
    train("--resume")
    assert results(train.out) == results(folder / "whole")


def test_a_checkpoint_is_never_destroyed_without_resume(train, folder, capsys):
    """One of an unfinished run is put aside, whatever it is; one of a finished run is not."""
    asides = [train.path.with_stem(f"checkpoint.{n}") for n in (1, 2, 3)]
    contents = []
    for aside in asides[:2]:
        crashed(train, 7)
        contents.append(train.path.read_bytes())
        with pytest.raises(Crash):  # before it has a checkpoint of its own
            train(at=1, stop=crash)
        text = capsys.readouterr().out
        assert f"the checkpoint of a run that did not finish is now {aside}" in text
        assert not train.path.exists()
    train.path.write_text("no checkpoint at all")
    train()
    assert [a.read_bytes() for a in asides] == [*contents, b"no checkpoint at all"]
    train()
    assert not train.path.with_stem("checkpoint.4").exists()
    # Without the model, the last checkpoint is the only copy of what was trained.
    (train.out / "model.safetensors").unlink()
    last = train.path.read_bytes()
    train()
    assert train.path.with_stem("checkpoint.4").read_bytes() == last
    # Moved back, it goes on.
    os.replace(asides[0], train.path)
    train("--resume")
    assert results(train.out) == results(folder / "whole")


def test_leftovers_of_killed_writers_are_removed(train):
    for name in (".checkpoint.safetensors.abc", ".model.safetensors.abc", ".other.abc"):
        (train.out / name).write_text("half of it")
    train()
    assert [name for name in os.listdir(train.out) if name.startswith(".")] == [".other.abc"]


def test_only_one_run_writes_to_a_folder(train, folder, capsys):
    """The second touches nothing; the end of the first, even a crash, lets others in."""
    live = train.out / ".checkpoint.safetensors.live"
    refused = []

    def second():
        live.write_text("half of it")
        with torch.random.fork_rng():  # the other run is in this process
            for more in ((), ("--resume",)):
                refused.append(fails(capsys, main, [*command(folder, train.out), *more]))
        assert live.exists()
        live.unlink()

    train("--checkpoint-every", "1", at=7, stop=second)
    assert len(refused) == 2
    for error in refused:
        assert f"--out {train.out}: another run is writing there" in error
    assert results(train.out) == results(folder / "whole")


def test_a_lock_ends_though_a_fork_has_its_handle(tmp_path):
    read, write = os.pipe()
    with _files.locked(tmp_path):
        if (pid := os.fork()) == 0:
            os.close(write)
            os.read(read, 1)  # until the other end is closed
            os._exit(0)
        with pytest.raises(BlockingIOError), _files.locked(tmp_path):
            pass
    try:
        with _files.locked(tmp_path):
            assert os.waitpid(pid, os.WNOHANG) == (0, 0)
    finally:
        os.close(write)
        os.close(read)
        os.waitpid(pid, 0)


@pytest.mark.parametrize("lacking", ["system", "file system"])
def test_locks_are_not_needed(train, folder, lacking, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    if lacking == "system":
        monkeypatch.setattr(_files, "fcntl", None)
    else:
        monkeypatch.setattr(_files.fcntl, "flock", flock)
    train()
    assert results(train.out) == results(folder / "whole")


def test_another_environment_is_told(train, capsys, monkeypatch):
    crashed(train)
    monkeypatch.setattr(vae_fast, "__version__", "99.0")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX9")
    train("--resume")
    told = capsys.readouterr().out
    assert "the last bits may differ" in told
    assert "99.0 here" in told
    assert "77 here" in told
    assert "AVX9 here" in told


# ---------------------------------------------------------------- another run's checkpoint


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--epochs", "9"], "--epochs 3 there, 9 here"),
        (["--batch-size", "12"], "--batch-size 11 there, 12 here"),
        (["--lr", "0.1"], "--lr 0.002 there, 0.1 here"),
        (["--seed", "5"], "--seed 0 there, 5 here"),
        (["--hidden", "9", "8"], "--hidden 8 there, 9 8 here"),
        (["--latent-dim", "3"], "--latent-dim 2 there, 3 here"),
        (["--model", "conv"], "--model mlp there, conv here"),
        (["--beta", "2"], "--beta 1.0 there, 2.0 here"),
        (["--beta-warmup", "linear:5"], "--beta-warmup not given there, linear 5 here"),
        (["--variance", "unit"], "--variance not given there, unit here"),
        (["--likelihood", "laplace"], "--likelihood gaussian there, laplace here"),
        (["--backend", "reference"], "--backend auto there, reference here"),
        (["--kl", "analytic", "--lr", "1"], "--kl monte_carlo there, analytic here; --lr 0.002"),
    ],
)
def test_other_options_are_refused(train, folder, argv, message, capsys):
    """By name, with both values, and nothing is touched."""
    crashed(train)
    before = train.path.read_bytes()
    assert message in fails(capsys, train, "--resume", *argv)
    assert train.path.read_bytes() == before
    train("--resume")
    assert results(train.out) == results(folder / "whole")


@pytest.mark.parametrize("change", ["values", "rows"])
def test_other_data_are_refused(train, change, tmp_path, folder, capsys):
    crashed(train)
    with np.load(folder / "values.npz") as file:
        x = file["x"]
    if change == "rows":
        x = x[:-1]
    else:
        x[3, 1, 2] = 0.5
    np.savez(tmp_path / "values.npz", x=x)
    error = fails(capsys, train, "--resume", "--data", str(tmp_path / "values.npz"))
    assert "--data of shape 57x1x4x4, torch.float32" in error
    assert f"there, of shape {len(x)}x1x4x4, torch.float32" in error
    # The same data under another name are the same data.
    np.savez(tmp_path / "other.npz", x=np.load(folder / "values.npz")["x"])
    train("--resume", "--data", str(tmp_path / "other.npz"))
    assert results(train.out) == results(folder / "whole")


def test_every_option_is_compared_or_does_not_matter(folder, tmp_path):
    parsed = cli._parser().parse_args(command(folder, tmp_path))
    data = training.datasets.load(parsed.data)
    compared = training._arguments(parsed, data, torch.device("cpu"))
    elsewhere = {"command", "out", "image_size", "resume", "checkpoint_every", "compare"}
    assert {name.replace("-", "_") for name in compared} | elsewhere == set(vars(parsed))


# ---------------------------------------------------------------- files that are no checkpoint


def test_damaged_and_foreign_checkpoints_are_refused(train, folder, capsys):
    """Every cut, and a flip of a bit anywhere; the message names the file, without a traceback."""
    crashed(train)
    whole = train.path.read_bytes()
    rng = random.Random(0)
    header = int.from_bytes(whole[:8], "little") + 8
    damaged = [
        whole[:n] for n in (0, 1, 7, 8, 100, header - 1, header, len(whole) // 2, len(whole) - 1)
    ]
    places = [
        *range(8),
        *rng.sample(range(8, header), 30),
        *rng.sample(range(header, len(whole)), 30),
    ]
    for place in places:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << rng.randrange(8)
        damaged.append(bytes(flipped))
    damaged += [
        whole + b"x",
        b"nothing of the kind",
        (folder / "whole/model.safetensors").read_bytes(),
    ]
    for data in damaged:
        train.path.write_bytes(data)
        error = fails(capsys, train, "--resume")
        assert str(train.path) in error
        assert "damaged" in error or "no checkpoint" in error or "has format" in error, error
        assert "Traceback" not in error
        assert "; move it away, or start without --resume" in error
        assert train.path.read_bytes() == data
    assert "is no checkpoint of vae-fast train" in error
    for place in range(header):  # all of which is read, and should be checked
        flipped = bytearray(whole)
        flipped[place] ^= 1 << rng.randrange(8)
        train.path.write_bytes(flipped)
        with pytest.raises(CommandError):
            checkpoint._read(train.path)
    train.path.unlink()
    train.path.mkdir()
    assert f"{train.path} is damaged or no checkpoint" in fails(capsys, train, "--resume")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(format=99), "has format 99, this version reads format 1"),
        (dict(format=None), "has format None"),
        (dict(step="7"), "its header has no step"),
        (dict(arguments=[]), "its header has no arguments"),
        (dict(seen=11), "does not fit the run"),  # an order of the data goes with it
        (dict(step=7), "step 7, with 1 epochs and 11 rows more, is not one of 3 epochs of 45 rows"),
        (dict(step=5, seen=0, rows=[1]), "epoch 1 has not the metrics epoch, train_elbo, "),
        (dict(rows=[{"epoch": 1}]), "epoch 1 has not the metrics"),
        (lambda info: dict(rows=[info["rows"][0] | {"val_kl": "x"}]), "epoch 1 are not numbers"),
        (lambda info: dict(rows=info["rows"] * 2, step=11), "epoch 2 has not the metrics"),
        (
            lambda info: dict(rows=[info["rows"][0] | {"epoch": n} for n in (1, 2, 3)], step=16),
            "step 16, with 3 epochs and 11 rows more",
        ),
        (dict(step=4, seen=-11), "step 4, with 1 epochs and -11 rows more"),
        (dict(step=6, seen=10), "step 6, with 1 epochs and 10 rows more"),
        (dict(step=10, seen=55), "step 10, with 1 epochs and 55 rows more"),
        ("[" * 100_000, "its header cannot be read"),
    ],
)
def test_headers_that_lie_are_refused(train, change, message, capsys):
    crashed(train, BATCHES + 1)
    info, tensors = checkpoint._read(train.path)
    change = change(info) if callable(change) else change
    if change == {"seen": 11}:
        del tensors["order"]
    text = change if isinstance(change, str) else json.dumps(info | change)
    header = {"vae_fast_training": text, "sha256": checkpoint._digest(text, tensors)}
    train.path.write_bytes(safetensors.torch.save(tensors, metadata=header))
    error = fails(capsys, train, "--resume")
    assert str(train.path) in error
    assert message in error
    assert error.endswith("; move it away, or start without --resume\n")


# ---------------------------------------------------------------- files that cannot be written


@pytest.mark.parametrize("name", ["open", "write", "fsync", "replace"])
def test_a_full_disk_costs_no_checkpoint(train, folder, name, capsys, monkeypatch):
    crashed(train, 7)
    before = train.path.read_bytes()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if name == "write":
            patch.setattr(os, "fdopen", lambda handle, mode: FullFile(handle))
        else:
            patch.setattr(os, name, full)
        error = fails(capsys, train, "--resume", "--checkpoint-every", "1")
    assert (
        f"{train.path} cannot be written: No space left on device; {train.path} is whole" in error
    )
    assert "--resume continues from its step, 7" in error
    assert train.path.read_bytes() == before
    assert not [n for n in os.listdir(train.out) if n.startswith(".")]
    train("--resume")
    assert results(train.out) == results(folder / "whole")


class FullFile:
    """A file on a disk that fills up in the middle of a write."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        os.close(self._handle)

    def write(self, data: bytes) -> None:
        os.write(self._handle, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_metrics_and_models_that_cannot_be_written(train, folder, capsys, monkeypatch):
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    metrics = train.out / "metrics.csv"
    metrics.symlink_to("/dev/full")
    error = fails(capsys, train)
    assert f"{metrics} cannot be written: No space left on device" in error
    assert "there is no checkpoint to continue from" in error
    metrics.unlink()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(VAE, "save", full)
        error = fails(capsys, train)
    assert f"{train.out / 'model.safetensors'} cannot be written: No space left" in error
    assert f"--resume continues from its step, {STEPS}" in error
    train("--resume")
    assert results(train.out) == results(folder / "whole")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), Crash()])
def test_the_model_is_there_before_the_last_checkpoint(train, folder, error, capsys, monkeypatch):
    """It may fit on a disk where the checkpoint, three times its size, does not."""

    def write(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write", write)
        with pytest.raises(Crash if isinstance(error, Crash) else SystemExit):
            train()
    assert not train.path.exists()
    assert results(train.out) == results(folder / "whole")
    train("--resume")
    assert step_of(train.path) == STEPS
    assert results(train.out) == results(folder / "whole")


@pytest.mark.parametrize("to", ["full", "closed pipe"])
def test_output_that_nobody_takes_does_not_end_the_run(train, folder, to, monkeypatch):
    if to == "full":
        if not os.path.exists("/dev/full"):
            pytest.skip("there is no /dev/full")
        write = os.open("/dev/full", os.O_WRONLY)
    else:
        read, write = os.pipe()
        os.close(read)
    with os.fdopen(write, "w") as file, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", file)
        assert train() == 0
        file.flush()  # as at the end of the process
    assert results(train.out) == results(folder / "whole")


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Written, synced, renamed, and the folder synced: a power cut finds the one or the other."""
    done = []
    path = tmp_path / "folder" / "file"

    def spied(name):
        original = getattr(os, name)

        def call(first, *rest):
            if name == "fsync":
                target = Path(os.readlink(f"/proc/self/fd/{first}"))
                done.append((name, target, None if target.is_dir() else target.read_bytes()))
            else:
                done.append((name, Path(first), rest))
            return original(first, *rest)

        monkeypatch.setattr(os, name, call)

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("/proc says which file a descriptor is of")
    spied("fsync")
    spied("replace")
    for data in (b"first", b"second"):
        done.clear()
        _files.write_atomic(path, data)
        (_, temporary, written), replaced, folder = done
        assert temporary.parent == path.parent
        assert written == data
        assert replaced == ("replace", temporary, (path,))
        assert folder == ("fsync", path.parent, None)
        assert path.read_bytes() == data
        assert os.listdir(path.parent) == ["file"]


def test_a_file_has_the_mode_of_any_new_file(tmp_path, monkeypatch):
    before = os.umask(0o027)
    try:
        with monkeypatch.context() as patch:  # it is the process's, and other threads write files
            patch.delattr(os, "umask")
            _files.write_atomic(tmp_path / "file", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_a_file_system_without_folder_sync_will_do(tmp_path, monkeypatch):
    fsync = os.fsync

    def only_files(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(code, "")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", only_files)
    code = errno.EINVAL
    _files.write_atomic(tmp_path / "file", b"1")
    assert (tmp_path / "file").read_bytes() == b"1"
    code = errno.EIO
    with pytest.raises(OSError, match=str(errno.EIO)):
        _files.write_atomic(tmp_path / "file", b"2")


if __name__ == "__main__":
    _folder, _seed, _kills, *_variants = sys.argv[1:]
    sys.stdout.write(json.dumps(campaign(Path(_folder), int(_seed), _variants, int(_kills))))
