"""DDP and FSDP2: a real job of two processes gives what one process gives on the whole batch."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

JOB = Path(__file__).with_name("distributed_job.py")
# The names of its checks, without running its imports of a job.
CHECKS = re.findall(r"^@check\ndef (\w+)", JOB.read_text(), flags=re.M)

pytestmark = [
    pytest.mark.works_with("torchrun"),
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo"
    ),
]


def launch(script, *args, cwd, timeout=240, processes=2):
    """Runs a script as a job of two processes on this machine; its exit code and its output."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), str(script), *map(str, args)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    env.pop("VAE_FAST_BACKEND", None)
    done = subprocess.run(
        command, cwd=cwd, env=env, timeout=timeout, text=True, errors="replace",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return done.returncode, done.stdout


def torchrun(script, *args, **options):
    """Runs a job that must succeed; returns its output."""
    code, output = launch(script, *args, **options)
    assert code == 0, f"{script} failed with exit code {code}:\n{output[-8000:]}"
    return output


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The job's exit code and output, and what came of every check: None, or the tracebacks."""
    folder = tmp_path_factory.mktemp("job")
    code, output = launch(JOB, folder, cwd=folder)
    file = folder / "results.json"
    assert file.exists(), f"exit code {code}:\n{output[-8000:]}"
    return code, output, json.loads(file.read_text())


def marked(prefix, topic):
    names = [name for name in CHECKS if name.startswith(prefix)]
    return [pytest.param(name, marks=pytest.mark.works_with(topic)) for name in names]


@pytest.mark.parametrize(
    "name",
    [
        *marked("ddp", "DistributedDataParallel"),
        *marked("fsdp", "FSDP2 (fully_shard)"),
        "seeds",
    ],
)
def test_two_processes(name, job):
    problem = job[2][name]
    assert problem is None, f"\n{problem}"


def test_every_check_was_run(job):
    code, output, results = job
    assert sorted(results) == sorted(CHECKS)
    assert {name.split("_")[0] for name in CHECKS} == {"ddp", "fsdp", "seeds"}
    assert code == 0, output[-8000:]


def test_a_failing_process_fails_the_test(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text("import os, sys\nsys.exit('on purpose' if os.environ['RANK'] == '1' else 0)")
    with pytest.raises(AssertionError, match="on purpose"):
        torchrun(script, cwd=tmp_path)
