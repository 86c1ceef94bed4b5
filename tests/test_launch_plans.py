"""The Triton launchers' shortcut past Triton's own search for the kernel: see launch_job.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

JOB = Path(__file__).with_name("launch_job.py")


@pytest.mark.parametrize("seed", [1, 2])
def test_planned_launches_are_those_of_triton(seed, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, str(JOB), str(seed), "300"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == "all launches are Triton's"
