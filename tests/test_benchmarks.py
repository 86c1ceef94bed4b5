"""The benchmarks' own judgement: what they refuse to time, what they report and call slower."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import bench_loss
import bench_passes
import bench_train_step
import cases
import measure
import peers
import pytest
import torch

import vae_fast
from benchmarks import compare, readme, report, saved

SIZE = cases.Size(64, 16, 784)
NAMES = [
    (group, name)
    for group, implementations in peers.IMPLEMENTATIONS.items()
    for name in implementations
    if not name.startswith("torch.compile")
]


def judge(case, function, phase):
    check = case.checks(case.step(function, phase), phase)
    for _ in range(2):
        case.reset()
        check()


@pytest.mark.parametrize("phase", [cases.FORWARD, cases.BOTH])
@pytest.mark.parametrize(("group", "name"), NAMES)
def test_whoever_is_right_passes_the_check(group, name, phase):
    dtypes = bench_loss.dtypes(group, bench_loss.FEW[0], quick=False)
    for dtype in dtypes:
        case = cases.CASES[group](SIZE, dtype, "cpu")
        judge(case, peers.IMPLEMENTATIONS[group][name](), phase)


def _without_noise(mu, logvar):
    log_q = -0.5 * (logvar + peers.LOG_2PI).sum(1)
    return mu + 0 * logvar, log_q, -0.5 * (mu.square() + peers.LOG_2PI).sum(1)


def _no_constant(x, mean, logvar):
    return 0.5 * ((x - mean).square() * torch.exp(-logvar) + logvar).sum(1)


def _detached_scale(x, mean, logvar):
    value = peers.eager_likelihood(x, mean, logvar)
    return value - 0.5 * (logvar - logvar.detach()).sum(-1)


def _straight_through(x, mean, logvar):
    kept = logvar.clamp(*peers.CLAMP)
    return peers.eager_likelihood(x, mean, logvar + (kept - logvar).detach())


def _half_noise(mu, logvar):
    eps, sigma = 0.5 * torch.randn_like(mu), torch.exp(0.5 * logvar)
    z = mu + sigma * eps
    log_q = -0.5 * (eps.square() + logvar + peers.LOG_2PI).sum(1)
    return z, log_q, -0.5 * (z.square() + peers.LOG_2PI).sum(1)


def _without_kl(x, mu, logvar, mean, logvar_x):
    return peers.eager_likelihood(x, mean, logvar_x).mean()


def _free_bits_of_rows(mu, logvar):
    elements = 0.5 * (mu.square() + logvar.exp() - 1 - logvar)
    return elements.clamp(min=peers.FREE_BITS).mean(0).sum()


def _free_bits_for_all(mu, logvar):
    """The right value, with the gradient of the KL itself."""
    value, kl = peers.eager_free_bits(mu, logvar), peers.eager_kl(mu, logvar)
    return value.detach() + kl - kl.detach()


WRONG = [
    ("kl", _free_bits_of_rows, cases.FORWARD),
    ("free bits", _free_bits_of_rows, cases.FORWARD),
    ("free bits", _free_bits_for_all, cases.BOTH),
    ("latent", _without_noise, cases.FORWARD),
    ("latent", _half_noise, cases.FORWARD),
    ("likelihood", peers.mean_of(_no_constant), cases.FORWARD),
    ("likelihood", peers.mean_of(_detached_scale), cases.BOTH),
    ("clamped", peers.mean_of(peers.eager_likelihood), cases.FORWARD),
    ("clamped", peers.mean_of(_straight_through), cases.BOTH),
    ("per_pixel", peers.mean_of(_no_constant), cases.FORWARD),
    ("per_pixel", peers.mean_of(_detached_scale), cases.BOTH),
    ("bernoulli", peers.mean_of(peers.eager_laplace), cases.FORWARD),
    ("elbo", peers.whole(_without_noise, peers.eager_likelihood), cases.FORWARD),
    ("elbo", peers.whole(_without_noise, peers.eager_likelihood), cases.BOTH),
    ("elbo", peers.whole(_half_noise, peers.eager_likelihood), cases.BOTH),
    ("elbo", _without_kl, cases.FORWARD),
    ("elbo", peers.whole(peers.eager_latent, _no_constant), cases.FORWARD),
    ("elbo", peers.whole(peers.eager_latent, _detached_scale), cases.BOTH),
]


@pytest.mark.parametrize(("group", "function", "phase"), WRONG)
def test_whoever_is_wrong_is_found_out(group, function, phase):
    case = cases.CASES[group](SIZE, "fp32", "cpu")
    with pytest.raises(cases.Wrong):
        judge(case, function, phase)


@pytest.mark.parametrize(
    ("group", "function", "phase"),
    [
        ("latent", _without_noise, cases.FORWARD),
        ("latent", _half_noise, cases.BOTH),
        ("elbo", peers.whole(_without_noise, peers.eager_likelihood), cases.BOTH),
        ("elbo", peers.whole(_half_noise, peers.eager_likelihood), cases.BOTH),
        ("elbo", _without_kl, cases.FORWARD),
    ],
)
def test_whoever_is_wrong_is_found_out_in_16_bits(group, function, phase):
    # A smaller latent's KL is within the rounding of a loss of 16 bits.
    case = cases.CASES[group](cases.Size(1024, 64, 784), "bf16", "cpu")
    with pytest.raises(cases.Wrong):
        case.check(case.step(function, phase), phase)


@pytest.mark.parametrize("part", [0, 1])
def test_gradients_of_small_elements_count_in_16_bits(part):
    """A few that are large, of elements far off, must not hide that the rest is missing."""

    class Large(torch.autograd.Function):
        @staticmethod
        def forward(ctx, t):
            return t.clone()

        @staticmethod
        def backward(ctx, g):
            return torch.where(g.abs() < 0.09 * g.abs().max(), 0.0, g)

    def large_alone(x, *decoded):
        decoded = [Large.apply(t) if i == part else t for i, t in enumerate(decoded)]
        return peers.eager_likelihood(x, *decoded).mean()

    case = cases.CASES["likelihood"](cases.Size(1024, 64, 784), "bf16", "cpu")
    with pytest.raises(cases.Wrong, match="in norm"):
        case.check(case.step(large_alone, cases.BOTH), cases.BOTH)


@pytest.mark.parametrize(
    ("group", "phase", "dtype"),
    [
        *(("latent", phase, d) for phase in (cases.FORWARD, cases.BOTH) for d in ("fp32", "bf16")),
        ("elbo", cases.FORWARD, "fp32"),
        *(("elbo", cases.BOTH, d) for d in ("fp32", "bf16")),
    ],
)
def test_noise_that_is_drawn_once_is_found_out(group, phase, dtype, monkeypatch):
    step = peers.IMPLEMENTATIONS[group]["eager"]()
    case = cases.CASES[group](SIZE, dtype, "cpu")
    judge(case, step, phase)
    eps = torch.randn(SIZE.batch, SIZE.latent)
    monkeypatch.setattr(torch, "randn_like", lambda t: eps.to(t.dtype))
    case.reset()
    case.check(case.step(step, phase), phase)  # as good as any other
    with pytest.raises(cases.Wrong, match="where is the noise"):
        judge(case, step, phase)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("phase", bench_passes.PASSES)
def test_each_pass_passes_its_check(phase, dtype):
    case, step, check, moved = bench_passes.PASSES[phase](SIZE, dtype, "cpu")
    for _ in range(2):
        case.reset()
        check()
        case.reset()
        step()
    elements = SIZE.batch * (SIZE.latent if "latent" in phase else SIZE.data)
    tensors = 3 if phase.endswith(" forward") else 5
    assert moved == tensors * elements * case.dtype.itemsize


def _one_percent_more(function):
    def wrong(*args, **kwargs):
        first, *rest = results = function(*args, **kwargs)
        return 1.01 * results if isinstance(results, torch.Tensor) else (1.01 * first, *rest)

    return wrong


@pytest.mark.parametrize("phase", bench_passes.PASSES)
def test_a_wrong_pass_is_found_out(phase, monkeypatch):
    for name in ("reparameterize", "gaussian_nll", "fused_elbo"):
        monkeypatch.setattr(vae_fast, name, _one_percent_more(getattr(vae_fast, name)))
    case, _, check, _ = bench_passes.PASSES[phase](SIZE, "fp32", "cpu")
    case.reset()
    with pytest.raises(cases.Wrong):
        check()


@pytest.fixture
def slow_steps(monkeypatch):
    """Makes steps that take so many seconds, by a clock of their own, and count their calls.

    Copies, of 4096 bytes, take a second.
    """
    now = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    def make(seconds):
        def step():
            step.calls += 1
            now[0] += seconds

        step.calls = 0
        return step

    copy = make(1.0)
    copy.bandwidth = measure.Copy("cpu", 4096).bandwidth
    monkeypatch.setattr(measure, "Copy", lambda device: copy)
    return make


def test_a_wrong_result_is_not_timed(slow_steps):
    steps = {name: slow_steps(0.25) for name in ("right", "wrong")}

    def refuse():
        raise measure.Wrong("loss: off by two")

    results = measure.race(
        steps,
        {"right": lambda: None, "wrong": refuse},
        measure.Clock("cpu"),
        5.0 * measure.TURNS,
        lambda *facts: {"facts": facts},
    )
    assert str(results["wrong"]) == "loss: off by two"
    assert steps["wrong"].calls == 0
    assert len(results["right"]["turns"]) == measure.TURNS
    timed = sum(map(len, results["right"]["turns"]))
    assert timed == 20 * measure.TURNS
    assert steps["right"].calls == timed + measure.TURNS * measure.WARM_UP
    assert results["right"]["facts"] == ("right", 0.25, 2 * 4096.0)


def test_a_step_that_takes_longer_than_its_turn_is_timed_once(slow_steps):
    step = slow_steps(2.0)
    assert measure.Clock("cpu").turn(step, 1.9) == ([2.0], [2.0])
    assert step.calls == 2  # the first is a warm-up
    assert measure.Clock("cpu").turn(step, 5.0) == ([2.0, 2.0], [2.0, 2.0])
    assert step.calls == 2 + 1 + 2
    assert measure.Clock("cpu").turn(step, 40.0) == ([2.0] * 20, [2.0] * 20)
    assert step.calls == 5 + measure.WARM_UP + 20


def test_a_peer_that_is_slow_and_far_behind_has_one_turn(slow_steps):
    def turns(budget):
        seconds = {"best": 1.0, "near": 2.9, "far": 3.1, "vae_fast": 0.1}
        steps = {name: slow_steps(each) for name, each in seconds.items()}
        checks = dict.fromkeys(steps, lambda: None)
        others = lambda name, median, bandwidth: {"median": median}  # noqa: E731
        results = measure.race(steps, checks, measure.Clock("cpu"), budget, others)
        assert results["far"]["median"] == pytest.approx(3.1)
        return {name: len(facts["turns"]) for name, facts in results.items()}

    assert turns(3.0 * measure.TURNS) == dict.fromkeys(turns(1e3), measure.TURNS) | {"far": 1}
    assert set(turns(3.2 * measure.TURNS).values()) == {measure.TURNS}


def test_who_goes_wrong_while_it_is_timed_is_found_out():
    checks = []

    def check():
        checks.append(None)
        if len(checks) > 1:
            raise measure.Wrong("loss: another one by now")

    others = lambda name, median, bandwidth: {}  # noqa: E731
    results = measure.race({"a": list}, {"a": check}, measure.Clock("cpu"), 1e-3, others)
    assert str(results["a"]) == "loss: another one by now"


@pytest.mark.parametrize("option", ["bernoulli", "per_pixel"])
def test_no_scale_of_the_data_s_size_is_moved(option):
    case = cases.CASES[option](SIZE, "fp32", "cpu")
    assert case.bytes_moved(cases.FORWARD) == 2 * case.x.nbytes
    assert case.bytes_moved(cases.BOTH) == 3 * case.x.nbytes


# ---- reports and comparisons -------------------------------------------------------------------


def a_run(path, times, jitter=0.01, copy=None):
    """What pytest-benchmark would have written: for each group a median for each implementation;
    ``copy``: seconds that a copied byte took.
    """
    benchmarks = []
    for group, medians in times.items():
        of, phase, dtype, *size = group.split()
        for implementation, median in medians.items():
            facts = dict(implementation=implementation, of=of, phase=phase, dtype=dtype)
            facts |= dict(size=" ".join(size), host=median, peak=2000000, saved=1000)
            facts |= dict(turns=[median * (1 + jitter * i) for i in (-1, 0, 1)])
            share = 500 * copy / median if copy else 0.5
            facts |= {"outside": 0.25} if of == "train_step" else {"bytes": 500, "share": share}
            row = {"group": group, "stats": {"median": median, "data": [0.0]}, "name": "x"}
            benchmarks.append(row | {"extra_info": facts})
    machine = {"processor": "Some(R) CPU", "threads": 2, "torch": "2.13.0"}
    saved = {"machine_info": {"vae_fast": machine, "node": "secret"}, "benchmarks": benchmarks}
    path.write_text(json.dumps(saved))
    return path


ELBO, STEP = "elbo forward+backward fp32 B64 L16 D784", "train_step step fp32 mlp 1x8x8 B128"
TIMES = {
    ELBO: {"eager": 4e-3, "torch.compile": 3e-3, "vae_fast": 1e-3, "vae_fast inplace": 5e-4},
    STEP: {"eager": 2e-3, "torch.compile": 3e-3, "vae_fast": 1e-3, "vae_fast inplace": 1e-3},
}


def test_the_report_has_ratios_and_pictures(tmp_path, monkeypatch):
    run = a_run(tmp_path / "bench.json", TIMES)
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["report", str(run), "--out", str(out)])
    report.main()
    text = (out / "README.md").read_text()
    elbo = next(line for line in text.splitlines() if line.startswith("| forward+backward | fp32"))
    cells = [cell.strip() for cell in elbo.split("|")]
    assert cells[4:6] == ["torch.compile", "3 ms"]
    assert cells[6:12] == ["1 ms", "**3.0×**", "50%", "500 µs", "**6.0×**", "50%"]
    step = next(line for line in text.splitlines() if line.startswith("| fp32 | mlp"))
    assert "| eager | 2 ms | 1 ms | **2.0×** | 25% |" in step
    for picture in report.PICTURES:
        assert (out / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
        assert f"({picture}.png)" in text
    # What is kept gives the same report, without the machine's other facts.
    kept = (out / "run.json").read_text()
    assert "secret" not in kept
    assert report.report(*saved.load(out / "run.json")) == text
    assert "Wrong" not in text
    assert report.slug(saved.load(run)[0]) == "some-cpu-2-threads"


def test_a_ratio_that_turns_disagree_on_has_a_tilde(tmp_path):
    times = {STEP: {"eager": 1e-3, "vae_fast": 1e-3, "vae_fast inplace": 1.1e-3}}
    run = a_run(tmp_path / "bench.json", times)
    saved_run = json.loads(run.read_text())
    rows = {b["extra_info"]["implementation"]: b["extra_info"] for b in saved_run["benchmarks"]}
    rows["vae_fast"]["turns"] = [0.99e-3, 0.9e-3, 1.02e-3]  # ahead, ahead, behind
    run.write_text(json.dumps(saved_run))
    (group,) = saved.load(run)[1]
    assert report.ratio(group, "vae_fast") == "~1.00×"
    assert report.ratio(group, "vae_fast inplace") == "0.91×"


def test_a_peer_of_a_single_turn_is_the_best_only_among_its_like(tmp_path):
    times = {STEP: {"eager": 0.9e-3, "torch.compile": 3e-3, "vae_fast": 1e-3}}
    run = a_run(tmp_path / "bench.json", times)
    saved_run = json.loads(run.read_text())
    rows = {b["extra_info"]["implementation"]: b["extra_info"] for b in saved_run["benchmarks"]}
    rows["eager"]["turns"] = [0.9e-3]  # by luck; it was slow at first
    run.write_text(json.dumps(saved_run))
    (group,) = saved.load(run)[1]
    assert group.best_peer == "torch.compile"
    assert report.ratio(group, "vae_fast") == "3.0×"
    del group.rows["torch.compile"]  # found wrong in the end
    assert group.best_peer == "eager"
    assert report.ratio(group, "vae_fast") == "~0.90×"


def test_a_part_of_the_suite_does_not_replace_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    for times in (TIMES, {ELBO: TIMES[ELBO]}, TIMES):
        run = a_run(tmp_path / "bench.json", times)
        monkeypatch.setattr(sys, "argv", ["report", str(run)])
        report.main()
    assert len(saved.load(tmp_path / "some-cpu-2-threads" / "run.json")[1]) == 2
    assert len(saved.load(tmp_path / "some-cpu-2-threads-part" / "run.json")[1]) == 1
    machine, groups = saved.load(run)
    kept = report.folder({**machine, "malloc": "MALLOC_TRIM_THRESHOLD_=1"}, groups)
    assert kept == tmp_path / "some-cpu-2-threads-kept"


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"benchmarks": [], "machine_info": {}}'])
def test_what_is_no_run_is_said_to_be_none(text, tmp_path, monkeypatch):
    run = tmp_path / "bench.json"
    run.write_text(text)
    monkeypatch.setattr(sys, "argv", ["report", str(run), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=r"bench\.json is no run of these benchmarks"):
        report.main()
    assert not (tmp_path / "out").exists()


def test_the_readme_tells_passes_of_two_sizes_apart(tmp_path):
    sizes, shares = ("B2 L2 D2", "B4 L4 D4"), (1.0, 0.5)
    times = {
        f"pass latent-forward {dtype} {size}": {"copy": 1e-3, "vae_fast": 1e-3 / share}
        for size, share in zip(sizes, shares, strict=True)
        for dtype in ("fp32", "bf16")
    }
    table = readme._gpu_passes(saved.load(a_run(tmp_path / "bench.json", times))[1])
    assert "| latent-forward | B2 L2 D2 | 100% | 100% |" in table
    assert "| latent-forward | B4 L4 D4 | 50% | 50% |" in table


def compared(tmp_path, before, after, monkeypatch, capsys, copy=None):
    files = a_run(tmp_path / "a.json", before, copy=copy and 1e-6), tmp_path / "b.json"
    a_run(files[1], after, copy=copy)
    monkeypatch.setattr(sys, "argv", ["compare", *map(str, files)])
    code = compare.main()
    return code, capsys.readouterr().out


def changed(factor, only=None):
    return {
        group: {n: t * (factor if only in (None, n) else 1) for n, t in medians.items()}
        for group, medians in TIMES.items()
    }


def test_comparing_finds_the_rows_that_got_slower(tmp_path, monkeypatch, capsys):
    code, printed = compared(tmp_path, TIMES, changed(1.3, "vae_fast"), monkeypatch, capsys)
    assert code == 1
    assert printed.count("slower   1.30x") == 2
    assert "inplace" not in printed
    code, printed = compared(tmp_path, changed(1.3, "vae_fast"), TIMES, monkeypatch, capsys)
    assert code == 0
    assert printed.count("faster   0.77x") == 2


def test_comparing_names_what_is_missing_and_where_the_machines_differ(
    tmp_path, monkeypatch, capsys
):
    after = {ELBO: {n: t for n, t in TIMES[ELBO].items() if n != "vae_fast"}}
    files = [a_run(tmp_path / "a.json", TIMES), a_run(tmp_path / "b.json", after)]
    kept = json.loads(files[1].read_text())
    kept["machine_info"]["vae_fast"] |= {"malloc": "MALLOC_TRIM_THRESHOLD_=1", "date": "today"}
    files[1].write_text(json.dumps(kept))
    monkeypatch.setattr(sys, "argv", ["compare", *map(str, files)])
    assert compare.main() == 1
    printed = capsys.readouterr()
    assert printed.out == f"missing {ELBO} vae_fast\n1 rows, 0 slower, 1 missing\n"
    assert printed.err == "malloc differs: None and MALLOC_TRIM_THRESHOLD_=1\n"


def test_comparing_takes_peers_that_disagree_for_noise(tmp_path, monkeypatch, capsys):
    """Of a row that did not change, where one peer got twice as fast and another did not."""
    after = {ELBO: TIMES[ELBO] | {"eager": 2e-3}}
    assert compared(tmp_path, TIMES, after, monkeypatch, capsys)[0] == 0
    # And of one whose turns in the two runs overlap.
    files = [a_run(tmp_path / "a.json", TIMES), a_run(tmp_path / "b.json", TIMES)]
    run = json.loads(files[1].read_text())
    for bench in run["benchmarks"]:
        if bench["extra_info"]["implementation"] == "vae_fast":
            bench["stats"]["median"] *= 1.5
            bench["extra_info"]["turns"] = [bench["stats"]["median"]] * 4 + [1e-4]
    files[1].write_text(json.dumps(run))
    monkeypatch.setattr(sys, "argv", ["compare", *map(str, files)])
    assert compare.main() == 0


@pytest.mark.parametrize(
    "times",
    [
        {STEP: TIMES[STEP]},
        {ELBO: {"vae_fast": 1e-3, "vae_fast inplace": 5e-4}},
        {ELBO.replace("fp32", "bf16"): TIMES[ELBO]},
    ],
    ids=["steps alone", "no peers", "nothing to draw"],
)
def test_the_report_of_a_part_of_the_suite(times, tmp_path, monkeypatch):
    run = a_run(tmp_path / "bench.json", times)
    monkeypatch.setattr(sys, "argv", ["report", str(run), "--out", str(tmp_path / "out")])
    report.main()
    text = (tmp_path / "out" / "README.md").read_text()
    assert "1 ms" in text
    pictures = {f"{p}.png" for p in report.PICTURES if f"({p}.png)" in text}
    assert pictures == {file.name for file in (tmp_path / "out").glob("*.png")}


def test_what_is_wrong_is_reported(tmp_path, monkeypatch):
    run = a_run(tmp_path / "bench.json", TIMES)
    wrong = {"group": ELBO, "implementation": "distributions", "wrong": "loss 3, not 2\n# or so"}
    run.write_text(json.dumps(json.loads(run.read_text()) | {"wrong": [wrong]}))
    monkeypatch.setattr(sys, "argv", ["report", str(run), "--out", str(tmp_path / "out")])
    report.main()
    text = (tmp_path / "out" / "README.md").read_text()
    assert f"* {ELBO}, distributions: loss 3, not 2\n\n" in text
    assert saved.load_wrong(tmp_path / "out" / "run.json") == [wrong]


def test_who_raises_while_timed_takes_nobody_along():
    calls = iter(range(100))

    def raises():
        if next(calls) > 3:
            raise RuntimeError("enough")

    steps = {"good": lambda: None, "bad": raises, "bad later": lambda: None}
    checks = dict.fromkeys(steps, lambda: None)

    def others(name, median, bandwidth):
        return {"facts": name} if name == "good" else {}[name]

    results = measure.race(steps, checks, measure.Clock("cpu"), 0.01, others)
    assert results["good"]["facts"] == "good"
    assert str(results["bad"]) == "RuntimeError: enough"
    assert str(results["bad later"]) == "KeyError: 'bad later'"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_training_step_without_noise_is_found_out(dtype, monkeypatch):
    step = bench_train_step.Step(bench_train_step.DIGITS, "eager", dtype, "cpu")
    step.check()
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    with pytest.raises(cases.Wrong, match="where is the noise"):
        step.check()


def test_comparing_forgives_a_slower_machine_and_noise(tmp_path, monkeypatch, capsys):
    for after in (changed(1.5), changed(1.04, "vae_fast")):
        code, printed = compared(tmp_path, TIMES, after, monkeypatch, capsys)
        assert (code, printed) == (0, "4 rows, 0 slower\n")


def test_comparing_wants_peers_and_copies_to_agree(tmp_path, monkeypatch, capsys):
    times = {ELBO: TIMES[ELBO]}
    slower = {ELBO: {n: t * (1.3 if "vae" in n else 1.0) for n, t in times[ELBO].items()}}
    for copy, found in ((1e-6, 2), (1.2e-6, 2), (1.3e-6, 0), (1.5e-6, 0)):
        _, printed = compared(tmp_path, times, slower, monkeypatch, capsys, copy)
        assert printed.count("slower  ") == found, copy
        assert printed.count(f"slower   {1.3e-6 / copy:.2f}x") == found
    luck = {ELBO: {n: t * (1.0 if "vae" in n else 0.7) for n, t in times[ELBO].items()}}
    _, printed = compared(tmp_path, times, luck, monkeypatch, capsys, copy=1e-6)
    assert printed == "2 rows, 0 slower\n"


def test_the_readme_shows_the_stored_runs():
    """All that benchmarks/readme.py makes of them."""
    text = (readme.ROOT / "README.md").read_text()
    runs = {
        name: report.RESULTS / name / "run.json" for name in ("nvidia-h200", "nvidia-h200-again")
    }
    made = {"gpu": readme.gpu_table(*runs.values())}
    made["benchmark"] = readme.benchmark_table(
        report.RESULTS / "intel-xeon-processor-2-threads" / "run.json"
    )
    made["kept"] = readme.kept_table(
        report.RESULTS / "intel-xeon-processor-2-threads-kept" / "run.json"
    )
    for marker, want in made.items():
        assert f"<!-- {marker} -->\n{want}\n<!-- /{marker} -->" in text


@pytest.mark.parametrize(
    "run", sorted(report.RESULTS.glob("*/run.json")), ids=lambda p: p.parent.name
)
def test_the_stored_reports_are_of_the_stored_runs(run):
    page = report.report(*report.load(run), report.load_wrong(run))
    assert (run.parent / "README.md").read_text() == page


# ---- what needs a GPU --------------------------------------------------------------------------

RUN_GPU = Path(__file__).resolve().parent.parent / "benchmarks" / "run_gpu.sh"


def test_the_gpu_script_stays_below_ten_minutes():
    seconds = re.findall(r"^ *part \w+ (\d+) ", RUN_GPU.read_text(), re.MULTILINE)
    assert len(seconds) == 7
    assert sum(map(int, seconds)) < 600


@pytest.mark.skipif(shutil.which("timeout") is None, reason="needs the timeout of GNU's coreutils")
@pytest.mark.parametrize("fails", ["nothing", "accuracy", "import", "bench"])
def test_the_gpu_script_runs_every_part(tmp_path, fails):
    """With a Python that has a GPU, as far as the script can tell, and an ncu."""
    python, ncu = tmp_path / "bin" / "python", tmp_path / "bin" / "ncu"
    python.parent.mkdir()
    python.write_text(
        '#!/bin/sh\necho "$@"\ncase "$*" in\n*-k\\ triton*) exit $ACCURACY;;\n'
        "*import\\ vae_fast._triton) exit $IMPORT;;\n"
        "*--benchmark-json=*) [ $BENCH = 0 ] || exit 1\n"
        'for option; do file=${option#--benchmark-json=}; done; echo {} >"$file";;\nesac\n'
    )
    ncu.write_text('#!/bin/sh\nshift 11\nexec "$@"\n')
    for program in (python, ncu):
        program.chmod(0o755)
    path = os.pathsep.join([str(python.parent), os.environ["PATH"]])
    status = str(int(fails == "accuracy"))
    environment = {**os.environ, "PATH": path, "PYTHON": "bin/python", "ACCURACY": status}
    environment |= {name.upper(): str(int(fails == name)) for name in ("import", "bench")}
    (tmp_path / "out").mkdir()
    for stale in ("bench.json", "report.log"):
        (tmp_path / "out" / stale).write_text("of a run before")
    done = subprocess.run([RUN_GPU, "out"], env=environment, cwd=tmp_path, check=False)
    assert done.returncode == int(fails in ("accuracy", "bench"))
    logs = {file.stem: file.read_text() for file in (tmp_path / "out").glob("*.log")}
    parts = {"doctor", "tests", "accuracy", "bench", "ncu"}
    parts |= {"install"} if fails == "import" else set()
    assert set(logs) == (parts if fails == "bench" else parts | {"report"})
    assert f"--benchmark-json={tmp_path}/out/bench.json" in logs["bench"]
    if fails != "bench":
        assert f"benchmarks.report {tmp_path}/out/bench.json" in logs["report"]
    code = logs["ncu"].removeprefix("-c ").replace('"cuda"', '"cpu"').replace("65536", "8")
    exec(code, scope := {})  # what ncu watches, on a smaller scale
    assert scope["mean"].grad.isfinite().all()
