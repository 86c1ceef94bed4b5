"""The README's Python runs as it stands, and its commands exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vae_fast

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.S)


def test_there_are_snippets():
    assert len(SNIPPETS) == 4


@pytest.mark.parametrize("index", range(4))
def test_snippet_runs(index, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(compile(SNIPPETS[index], f"README.md[{index}]", "exec"), scope)
    if index == 0:
        assert torch.isfinite(scope["out"].loss)
        assert len(SNIPPETS[0].splitlines()) <= 14
    elif index == 1:
        assert scope["z"].shape == (5, 8, 4)
        assert scope["nll"].shape == (5, 8)
    elif index == 2:
        assert scope["out"].bits_per_dim.shape == (64,)
    else:
        assert isinstance(scope["vae"], vae_fast.VAE)
        assert (tmp_path / "model.safetensors").exists()


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, flags=re.M):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target


def test_pictures_exist():
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / path).is_file(), path


def test_tables_are_filled_in():
    for marker in ("training", "benchmark", "kept"):
        table = re.search(rf"<!-- {marker} -->(.*?)<!-- /{marker} -->", README, flags=re.S)[1]
        assert table.count("\n|") >= 4, f"run benchmarks/readme.py: {marker}"


def test_the_table_of_what_it_works_with_is_the_tests_own():
    """In a process of its own, since it collects all the tests."""
    script = ROOT / "tests" / "works_with.py"
    run = subprocess.run(
        [sys.executable, script, "--print"], capture_output=True, text=True, check=True
    )
    table = re.search(r"<!-- works with -->\n(.*?)<!-- /works with -->", README, flags=re.S)[1]
    assert run.stdout == table, "run tests/works_with.py"
