"""The example scripts for PyTorch Lightning and Accelerate, on one process and on two."""

import csv
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from test_distributed import torchrun

import vae_fast

EXAMPLES = Path(__file__).resolve().parent.parent / "docs" / "examples"
LIGHTNING, ACCELERATE = EXAMPLES / "vae_lightning.py", EXAMPLES / "vae_accelerate.py"

lightning = pytest.mark.works_with("PyTorch Lightning")
accelerate = pytest.mark.works_with("Accelerate")

# Runs an example and notes the noise ε of the first row of every training step.
RECORD = """
import json, os, runpy, sys
import torch
import vae_fast

forward, seen = vae_fast.VAE.forward, []

def record(self, x, **options):
    out = forward(self, x, **options)
    if torch.is_grad_enabled():
        with torch.no_grad():
            mu, logvar = self.encode(x)
            seen.append(((out.z - mu) * torch.exp(-0.5 * logvar))[0].tolist())
    return out

vae_fast.VAE.forward = record
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
with open(f"noise{os.environ['RANK']}.json", "w") as file:
    json.dump(seen, file)
"""


def elbo(printed):
    return float(re.search(r"^validation ELBO: (\S+) nats$", printed, flags=re.M)[1])


def assert_noise_of_their_own(folder):
    """No training step of one process had the noise of the same step of the other."""
    noise = [torch.tensor(json.loads((folder / f"noise{rank}.json").read_text())) for rank in "01"]
    assert noise[0].shape == noise[1].shape
    assert len(noise[0]) > 5
    assert (noise[0] - noise[1]).abs().amax(1).min() > 0.1


def two_processes(script, folder, *args):
    job = folder / "job.py"
    job.write_text(RECORD)
    printed = torchrun(job, script, "--folder", folder / "run", *args, cwd=folder)
    assert_noise_of_their_own(folder)
    return elbo(printed)


# ---- PyTorch Lightning -------------------------------------------------------------------------


@pytest.fixture
def lit(monkeypatch):
    """The example's namespace; what Lightning puts into the environment is taken out again."""
    pytest.importorskip("lightning")
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "0")
    # Lightning looks a class up by its module, which has to be there.
    module = type(sys)("vae_lightning")
    module.__dict__.update(runpy.run_path(str(LIGHTNING), run_name="vae_lightning"))
    monkeypatch.setitem(sys.modules, "vae_lightning", module)
    return module


def metrics(folder):
    """Each epoch's value of each metric."""
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows if row[name]] for name in rows[0]}


@lightning
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning(precision, lit, tmp_path, capsys):
    args = ["--epochs", "3", "--precision", precision, "--accelerator", "cpu"]
    best = lit.main([*args, "--folder", str(tmp_path)])
    logged = metrics(tmp_path)
    for name in ("train_loss", "val_loss", "train_nll", "val_nll"):
        first, *_, last = logged[name]
        assert last < first - 20, name
    assert min(logged["train_kl"] + logged["val_kl"]) > 0
    # The same noise, and so the very loss of the epoch whose checkpoint was reloaded.
    *epochs, reloaded = logged["val_loss"]
    assert len(epochs) == 3
    assert reloaded == min(epochs)
    assert elbo(capsys.readouterr().out) == pytest.approx(-reloaded, abs=0.01)

    x, key = torch.rand(5, 1, 8, 8), torch.tensor([1, 2], dtype=torch.uint64)
    again = lit.LitVAE.load_from_checkpoint(tmp_path / "best.ckpt")
    assert again.hparams == best.hparams
    outs = [model.cpu().eval().vae(x, key=key) for model in (best, again)]
    assert torch.equal(outs[0].loss, outs[1].loss)
    assert torch.equal(outs[0].z, outs[1].z)
    assert torch.equal(best(x), again(x))


@lightning
@pytest.mark.works_with("DistributedDataParallel", "torchrun")
def test_lightning_on_two_processes(tmp_path):
    pytest.importorskip("lightning")
    options = ["--epochs", "2", "--accelerator", "cpu", "--devices", "2", "--strategy", "ddp"]
    value = two_processes(LIGHTNING, tmp_path, *options)
    loss = metrics(tmp_path / "run")["val_loss"]
    assert loss[1] < loss[0] - 20
    assert value == pytest.approx(-loss[1], abs=0.01)


# ---- Accelerate --------------------------------------------------------------------------------


@pytest.fixture
def run_accelerate():
    """Runs the example; Accelerate keeps one state per process, so it is reset before."""
    pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState

    main = runpy.run_path(str(ACCELERATE))["main"]

    def run(folder, *args):
        AcceleratorState._reset_state(True)
        return main(["--cpu", "--folder", str(folder), *args])

    yield run
    AcceleratorState._reset_state(True)


def losses(printed):
    return [float(loss) for loss in re.findall(r"training loss (\S+) nats", printed)]


@accelerate
@pytest.mark.works_with("crash and resume")
def test_accelerate_goes_on_where_it_was_saved(run_accelerate, tmp_path, capsys):
    """Two epochs, and one, saved, reloaded, and one more, give the same bits."""
    whole = run_accelerate(tmp_path / "whole", "--epochs", "2")
    printed = capsys.readouterr().out
    first, second = losses(printed)
    assert second < first - 20
    value = elbo(printed)

    run_accelerate(tmp_path / "parts", "--epochs", "1")
    resumed = run_accelerate(tmp_path / "parts", "--epochs", "1", "--resume", "--seed", "5")
    printed = capsys.readouterr().out
    assert losses(printed) == [first, second]
    assert float(re.findall(r"ELBO: (\S+)", printed)[-1]) == value
    for p, q in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)

    loaded = vae_fast.VAE.load(tmp_path / "parts" / "model.safetensors")
    x, key = torch.rand(5, 1, 8, 8), torch.tensor([1, 2], dtype=torch.uint64)
    for got, want in zip(loaded(x, key=key)[:5], resumed(x, key=key)[:5]):
        assert torch.equal(got, want)


@accelerate
@pytest.mark.parametrize("precision", ["bf16"])
def test_accelerate_mixed_precision(precision, run_accelerate, tmp_path, capsys):
    model = run_accelerate(tmp_path, "--epochs", "2", "--mixed-precision", precision)
    first, second = losses(capsys.readouterr().out)
    assert second < first - 20
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@accelerate
@pytest.mark.works_with("DistributedDataParallel", "torchrun")
def test_accelerate_on_two_processes(tmp_path):
    pytest.importorskip("accelerate")
    two_processes(ACCELERATE, tmp_path, "--epochs", "2", "--cpu")
    assert {path.name for path in (tmp_path / "run" / "state").iterdir()} >= {
        "random_states_0.pkl",
        "random_states_1.pkl",
    }


# ---- docs/training.md --------------------------------------------------------------------------

GUIDE = (EXAMPLES.parent / "training.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.S)


@pytest.mark.parametrize("index", [*range(6), pytest.param(6, marks=pytest.mark.gpu)])
def test_the_guides_snippets_run(index):
    assert len(SNIPPETS) == 7
    if "cuda" in SNIPPETS[index] and not torch.cuda.is_available():
        pytest.skip("no GPU")
    scope = {}
    exec(compile(SNIPPETS[index], f"training.md[{index}]", "exec"), scope)
    if "gradients" in scope:
        assert all(g.isfinite().all() for g in scope["gradients"].values())
    else:
        assert all(p.grad.isfinite().all() for p in scope["vae"].parameters())


def test_the_guides_links_lead_somewhere():
    links = re.findall(r"\]\(([^)]+)\)", GUIDE)
    assert len(links) == 2
    assert all((EXAMPLES.parent / link).is_file() for link in links)
