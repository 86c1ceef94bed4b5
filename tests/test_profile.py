"""``vae-fast profile``: the parts of a step, what they cost, and the ranges that tools show."""

import gzip
import importlib
import itertools
import json
import re
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import _skip_unless_it_runs
from torch import nn

import vae_fast
from vae_fast import VAE
from vae_fast.cli import _parser, main
from vae_fast.cli import profile as profiling

BATCH, SIZE, LATENT = 64, 1000, 10
ARGV = ["profile", "--shape", f"{SIZE}", "--hidden", "8", "--batch-size", f"{BATCH}"]
ARGV += ["--steps", "2", "--device", "cpu"]
NETWORKS = "encoder", "latent pass", "decoder", "likelihood pass"
RANGES = [*NETWORKS, *(f"{part} backward" for part in reversed(NETWORKS)), "optimizer"]
NODE = "autograd::engine::evaluate_function: "


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """So that others who use the machine do not matter much."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def one_round(monkeypatch):
    monkeypatch.setattr(profiling, "ROUNDS", 1)


def run(out, *more):
    """What the command prints, as text and in numbers, and the traces it writes."""
    printed: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *args, **_: printed.append(" ".join(map(str, args))))
        assert main([*ARGV, "--out", str(out), *more]) == 0
    text = "\n".join(printed)
    tables = {}
    for name, table in re.findall(r"^(fused|reference)\b.*\n((?:  .*\n)+)", text, flags=re.M):
        tables[name] = rows(table)
    traces = {
        name: json.loads(gzip.decompress((out / f"{name}.json.gz").read_bytes()))["traceEvents"]
        for name in ("fused", "reference")
    }
    return SimpleNamespace(text=text, tables=tables, traces=traces)


def rows(text):
    """The cells of each row that begins with words, by these."""
    found = re.findall(r"^ *([a-z][a-z ]*?)  +(\d.*)$", text, flags=re.M)
    return {head: re.findall(r"\S+ (?:ms|[KMG]iB)|\S+[%x]", cells) for head, cells in found}


def ms(cell):
    number, unit = cell.split()
    assert unit == "ms"
    return float(number)


def size(cell):
    number, unit = cell.split()
    return float(number) * 1024 ** (" KMG".index(unit[0]))


def ranges(trace):
    """The ranges, in order: (name, start, end)."""
    events = [e for e in trace if e.get("cat") == "user_annotation"]
    events.sort(key=lambda e: (e["ts"], -e["dur"]))
    return [(e["name"], e["ts"], e["ts"] + e["dur"]) for e in events]


def nodes(trace, part):
    """How often autograd ran what in the ranges of a name, in each."""
    spans = [(start, end) for name, start, end in ranges(trace) if name == part]
    found = [
        e["name"].removeprefix(NODE)
        for e in trace
        if e["name"].startswith(NODE) and any(a <= e["ts"] < b for a, b in spans)
    ]
    return {name: found.count(name) / len(spans) for name in found}


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    _skip_unless_it_runs("cpp")
    with vae_fast.use_backend("reference"):  # what is forced outside does not matter
        return run(tmp_path_factory.mktemp("profile"), "--backend", "cpp")


@pytest.mark.parametrize("name", ["fused", "reference"])
def test_the_parts_add_up_to_the_step(result, name):
    table = dict(result.tables[name])
    step = table.pop("step")
    assert list(table) == [*profiling.PARTS, "other"]
    for part in NETWORKS:
        forward, backward, total = map(ms, table[part][:3])
        assert forward > 0.0
        assert backward > 0.0
        assert total == pytest.approx(forward + backward, abs=2e-3)
    assert ms(table["optimizer"][0]) > 0.0
    assert sum(ms(row[0]) for row in table.values()) == pytest.approx(ms(step[0]), abs=0.06)
    assert sum(ms(row[1]) for row in table.values() if len(row) == 6) == pytest.approx(
        ms(step[1]), abs=0.06
    )
    assert sum(ms(row[-4]) for row in table.values()) == pytest.approx(ms(step[2]), abs=0.06)
    shares = [float(row[-3].rstrip("%")) for row in table.values()]
    assert sum(shares) == pytest.approx(100.0, abs=0.5)
    assert step[3] == "100.0%"
    for part, share in zip(table, shares):
        assert share == pytest.approx(100.0 * ms(table[part][-4]) / ms(step[2]), abs=0.2)


def test_the_summary_is_of_the_tables(result):
    lines = rows(result.text.partition("ratio")[2])
    with_it = lines["step with it"]
    peaks = lines["peak memory"]
    for i, name in enumerate(("fused", "reference")):
        step = result.tables[name]["step"]
        assert with_it[i] == step[2]
        assert peaks[i] == step[5]
        outside = ms(lines["time outside matrix products"][i])
        networks = sum(ms(result.tables[name][part][2]) for part in ("encoder", "decoder"))
        assert ms(step[2]) - networks < outside < ms(step[2])
        share = float(lines["its share"][i].rstrip("%"))
        assert share == pytest.approx(100.0 * outside / ms(step[2]), abs=0.2)
    for cells in (with_it, lines["step without the profiler"]):
        ratio = float(cells[2].rstrip("x"))
        assert ratio == pytest.approx(ms(cells[1]) / ms(cells[0]), abs=0.01)


@pytest.mark.parametrize("name", ["fused", "reference"])
def test_the_trace_has_the_ranges(result, name):
    trace = result.traces[name]
    found = ranges(trace)
    assert found[0][0] == name
    assert [n for n, *_ in found if n in RANGES] == 2 * RANGES
    apart = [span for span in found if span[0] in RANGES]
    for (_, _, end), (_, start, _) in itertools.pairwise(apart):
        assert end <= start
    steps = [span for span in found if span[0] == "training step"]
    assert len(steps) == 2
    assert all(any(a <= start and end <= b for _, a, b in steps) for _, start, end in apart)
    assert f"{name}.json.gz" in result.text


@pytest.mark.parametrize("name", ["fused", "reference"])
def test_backward_nodes_belong_to_the_part_that_made_them(result, name):
    trace = result.traces[name]
    by_part = {part: nodes(trace, f"{part} backward") for part in NETWORKS}
    total = sum(e["name"].startswith(NODE) for e in trace) / 2
    assert sum(sum(found.values()) for found in by_part.values()) == total
    for part, layers in zip(NETWORKS, (2, 0, 2, 0)):  # of 8 hidden units and of its output
        assert by_part[part].get("AddmmBackward0", 0) == layers
        assert by_part[part].get("torch::autograd::AccumulateGrad", 0) == 2 * layers
        assert by_part[part].get("SiluBackward0", 0) == layers / 2
    # Of the packed outputs, autograd splits the one; the likelihood pass reads the other packed.
    assert by_part["encoder"]["SplitBackward0"] == 1
    if name == "fused":
        assert by_part["latent pass"] == {"LatentBackward": 1}
        assert by_part["likelihood pass"] == {"LikelihoodGradBackward": 1}
    else:
        assert by_part["likelihood pass"]["SplitBackward0"] == 1
        assert by_part["likelihood pass"]["MeanBackward0"] == 1
        assert by_part["latent pass"]["ExpBackward0"] == 1


def test_the_fused_loss_allocates_its_gradient_and_the_reference_far_more(
    result, tmp_path, one_round, cpp
):
    fused, reference = (result.tables[name] for name in ("fused", "reference"))
    data = 4 * BATCH * SIZE
    rows = 4 * BATCH
    # nll and the loss; the packed gradient; the gradients of log q and log p.
    assert size(fused["likelihood pass"][4]) == pytest.approx(2 * data + 3 * rows, abs=512)
    assert size(reference["likelihood pass"][4]) > 10 * data
    # z, log q, log p, and the gradients of mu and its scale; and the key.
    latent = 4 * BATCH * LATENT
    assert size(fused["latent pass"][4]) == pytest.approx(3 * latent + 2 * rows, abs=512)
    # The most is there in the likelihood pass: the output, its gradient, and little else.
    assert size(fused["step"][5]) == pytest.approx(4 * data, rel=0.2)
    assert size(reference["step"][5]) > 2 * size(fused["step"][5])
    assert fused["likelihood pass"][5] == fused["step"][5]

    inplace = run(tmp_path, "--inplace").tables["fused"]
    assert size(inplace["likelihood pass"][4]) == pytest.approx(3 * rows, abs=512)
    assert size(inplace["step"][5]) < 0.6 * size(fused["step"][5])


def test_memory_that_is_kept_for_the_next_step_is_in_use(tmp_path, one_round, cpp):
    """From a size on, the fused loss allocates its gradient once and for all."""
    rows, packed = 512, 4 * 512 * 2 * SIZE
    assert packed > vae_fast.buffers.SMALLEST
    table = run(tmp_path, "--batch-size", f"{rows}").tables["fused"]
    assert size(table["likelihood pass"][4]) == pytest.approx(4 * 3 * rows, abs=512)
    assert size(table["step"][5]) > 2 * packed


class _Slow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, forward, backward):
        time.sleep(forward)
        ctx.backward_s = backward
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        time.sleep(ctx.backward_s)
        return g.clone(), None, None


class _SlowNetwork(nn.Sequential):
    def forward(self, x):
        return _Slow.apply(super().forward(x), *self.seconds)


def test_times_are_where_they_are_spent(cpp):
    encoder, decoder = _SlowNetwork(nn.Linear(4, 4)), _SlowNetwork(nn.Linear(2, 8))
    encoder.seconds, decoder.seconds = (0.003, 0.006), (0.009, 0.012)
    vae = VAE(encoder, decoder, 2)
    names = {"fused": "cpp", "reference": "reference"}
    profiles, _ = profiling.measure(vae, torch.rand(8, 4), names, 1, False, False)
    for costs in profiles.values():
        times = costs.times
        assert times == costs.host_times
        for part, (forward, backward) in (
            ("encoder", encoder.seconds),
            ("decoder", decoder.seconds),
        ):
            assert times[part] >= forward
            assert times[f"{part} backward"] >= backward
        assert sum(times.values()) >= 0.030
        assert costs.step_s >= 0.030
        assert 0.0 < costs.products_s < sum(times.values()) - 0.030


# What Kineto writes of a GPU, in short: kernels know their launch by a number.
def _gpu_trace():
    def event(name, category, start, duration, thread=1, **args):
        return {
            "ph": "X",
            "name": name,
            "cat": category,
            "ts": start,
            "dur": duration,
            "pid": 1,
            "tid": thread,
            "args": args,
        }

    def kernel(number, launched, start, duration, category="cuda_runtime"):
        return [
            event("launch", category, launched, 1, correlation=number),
            event("k", "kernel", start, duration, 7, correlation=number),
        ]

    def node(name, start, duration, number=None):
        args = {} if number is None else {"Sequence number": number}
        return event(f"{NODE}{name}", "cpu_op", start, duration, 2, **args)

    return [
        event("fused", "user_annotation", 0, 1000),
        event("training step", "user_annotation", 10, 200),
        event("encoder", "user_annotation", 10, 20),
        event("encoder", "gpu_user_annotation", 100, 700, 7),
        event("aten::addmm", "cpu_op", 12, 8),
        event("aten::mm", "cpu_op", 13, 5),
        *kernel(1, 14, 100, 40),
        *kernel(2, 25, 140, 5),
        event("latent pass", "user_annotation", 30, 10),
        *kernel(3, 33, 150, 7, "cuda_driver"),
        event("decoder", "user_annotation", 40, 10),
        *kernel(4, 41, 160, 11),
        event("likelihood pass", "user_annotation", 50, 20),
        *kernel(5, 52, 180, 13),
        *kernel(6, 85, 200, 1),  # of the backward pass, before any node
        node("LikelihoodGradBackward", 100, 5, 13),
        *kernel(7, 103, 210, 17),
        node("AddmmBackward0", 110, 20, 12),
        event("aten::mm", "cpu_op", 112, 5, 2),
        *kernel(8, 113, 230, 19),
        node("torch::autograd::AccumulateGrad", 132, 3),
        *kernel(9, 133, 250, 23),
        node("LatentBackward", 140, 10, 11),
        *kernel(10, 141, 300, 29),
        node("SplitBackward0", 155, 1, 10),
        *kernel(11, 155, 340, 31),
        event("optimizer", "user_annotation", 170, 30),
        *kernel(12, 180, 400, 37),
        *kernel(13, 500, 800, 1000),  # of no step
    ]


def test_kernels_belong_to_the_part_that_launched_them():
    begun = [(10, "encoder"), (11, "latent pass"), (12, "decoder"), (13, "likelihood pass")]
    begun.append((14, "other"))
    timeline = profiling._Timeline({"traceEvents": _gpu_trace()}, begun)
    turns = timeline.named("fused")
    times, host_times, products = profiling._times(timeline, turns, on_gpu=True)
    us = pytest.approx
    assert {name: 1e6 * t for name, t in times.items()} == us(
        {
            "encoder": 45,
            "latent pass": 7,
            "decoder": 11,
            "likelihood pass": 13,
            "likelihood pass backward": 17,
            "decoder backward": 42,
            "latent pass backward": 29,
            "encoder backward": 31,
            "optimizer": 37,
            "other": 1,
        }
    )
    assert {name: 1e6 * t for name, t in host_times.items()} == us(
        {
            "encoder": 20,
            "latent pass": 10,
            "decoder": 10,
            "likelihood pass": 20,
            "likelihood pass backward": 5,
            "decoder backward": 25,
            "latent pass backward": 10,
            "encoder backward": 1,
            "optimizer": 30,
            "other": 200 - 131,
        }
    )
    assert 1e6 * products == us(40 + 19)
    # On the CPU the host's times are all there is, and one product is not counted within another.
    on_cpu = profiling._times(timeline, turns, on_gpu=False)
    assert on_cpu[:2] == (host_times, host_times)
    assert 1e6 * on_cpu[2] == us(8 + 5)
    memory = dict.fromkeys(times, 1024)
    costs = profiling.Profile(0.001, times, host_times, products, memory, memory)
    table = profiling._table("fused", costs, on_gpu=True).splitlines()
    decoder = next(line for line in table if "decoder" in line)
    found = re.findall(r"\S+ \w+|\S+%", decoder.replace("decoder", ""))
    assert found == ["0.011 ms", "0.042 ms", "0.053 ms", "22.7%", "0.035 ms", "2.0 KiB", "1.0 KiB"]
    assert [len(line) for line in table] == [len(table[0])] * len(table)
    summary = profiling._summary({"fused": costs, "reference": costs}, on_gpu=True)
    assert re.search(r"time of the host +0.200 ms", summary)
    assert re.search(r"time of the GPU +0.233 ms", summary)


def test_a_profiler_that_sees_no_kernels_is_an_error():
    trace = [e for e in _gpu_trace() if e["cat"] != "kernel"]
    timeline = profiling._Timeline({"traceEvents": trace}, [(0, "encoder")])
    with pytest.raises(profiling.CommandError, match="no kernel"):
        profiling._times(timeline, timeline.named("fused"), on_gpu=True)


def test_compiled_networks_have_their_parts(tmp_path, one_round, cpp, monkeypatch):
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module: original(module, backend="aot_eager"))
    trace = run(tmp_path, "--compile").traces["fused"]
    for part, compiled in zip(NETWORKS, (1, 0, 1, 0)):
        assert nodes(trace, f"{part} backward").get("CompiledFunctionBackward", 0) == compiled
    assert [n for n, *_ in ranges(trace) if n in RANGES] == 2 * RANGES


@pytest.mark.parametrize(
    "more",
    [
        ["--model", "conv", "--shape", "1x5x6", "--dtype", "bf16"],
        ["--likelihood", "logistic", "--num-samples", "2", "--shape", "20"],
    ],
)
def test_other_models(tmp_path, one_round, cpp, more):
    result = run(tmp_path, "--steps", "1", *more)
    for name, trace in result.traces.items():
        assert [n for n, *_ in ranges(trace) if n in RANGES] == RANGES
        bf16 = "ToCopyBackward0" in nodes(trace, "encoder backward")
        assert bf16 == ("bf16" in more)
        convolutions = nodes(trace, "decoder backward").get("ConvolutionBackward0", 0)
        assert convolutions == (2 if "conv" in more else 0), name


def test_the_logistic_likelihood_gets_levels():
    args = _parser().parse_args([*ARGV, "--likelihood", "logistic"])
    vae, x = profiling._model(args, torch.device("cpu"))
    assert vae.elbo.likelihood == "logistic"
    assert x.dtype == torch.uint8
    assert x.shape == (BATCH, SIZE)
    assert len(x.unique()) == 256


def test_it_refuses_to_measure_another_loss(tmp_path, cpp, monkeypatch, capsys):
    right = vae_fast.reference.elbo_loss
    monkeypatch.setattr(vae_fast.reference, "elbo_loss", lambda *a: 1.001 * right(*a))
    with pytest.raises(SystemExit):
        main([*ARGV, "--out", str(tmp_path)])
    assert "do not agree on the loss" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "conv"], "--model conv needs images"),
        (["--device", "nonsense"], "--device nonsense cannot be used here"),
        (["--device", "meta"], "--device meta cannot be used here"),
        (["--backend", "nonsense"], "--backend nonsense: name must be one of cpp, triton"),
        (["--backend", "reference"], "no fused backend"),
        (["--shape", "3x0"], "--shape: must be sizes with x between them"),
        (["--shape", "axb"], "--shape: must be sizes with x between them"),
        (["--steps", "0"], "--steps: must be at least 1"),
        (["--dtype", "fp16"], "--dtype: invalid choice"),
        (["--out", __file__], "--out"),
    ],
)
def test_wrong_input_names_the_argument(capsys, tmp_path, argv, message):
    with pytest.raises(SystemExit) as failure:
        main([*ARGV, "--out", str(tmp_path), *argv])
    assert failure.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_device_without_a_profile_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(profiling, "pick_device", torch.device)
    with pytest.raises(SystemExit):
        main([*ARGV, "--device", "xpu"])
    assert "--device xpu: only a CPU or a CUDA GPU" in capsys.readouterr().err


def test_a_pytorch_without_a_profiler_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(torch.autograd, "kineto_available", lambda: False)
    with pytest.raises(SystemExit):
        main(ARGV)
    assert "built without its profiler" in capsys.readouterr().err


def test_it_needs_no_more_than_torch(monkeypatch):
    for name in list(sys.modules):
        if name.startswith("vae_fast.cli"):
            monkeypatch.delitem(sys.modules, name)
    for name in ("matplotlib", "PIL", "safetensors", "sklearn", "tqdm"):
        monkeypatch.setitem(sys.modules, name, None)
    fresh = importlib.import_module("vae_fast.cli.profile")
    assert fresh is not profiling


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(tmp_path):
    result = run(tmp_path, "--device", "cuda")
    for name in ("fused", "reference"):
        table = dict(result.tables[name])
        step = table.pop("step")
        for part in NETWORKS:
            assert all(ms(cell) > 0.0 for cell in (*table[part][:3], table[part][4]))
        assert sum(ms(row[-5]) for row in table.values()) == pytest.approx(ms(step[2]), abs=0.01)
        assert [n for n, *_ in ranges(result.traces[name]) if n in RANGES] == 2 * RANGES
    fused, reference = (size(result.tables[name]["step"][-1]) for name in result.tables)
    assert fused < reference


# ---------------------------------------------------------------- NVTX


LAUNCHES = [
    "latent forward",
    "likelihood forward with gradients",
    "likelihood rescale",
    "latent backward",
]


@pytest.fixture
def nvtx(monkeypatch):
    """What NVTX is told: names, and None for an end."""
    told = []
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", told.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: told.append(None))
    return told


def train_step(device):
    vae = VAE.mlp((4,), 2, (4,)).to(device)
    vae(torch.rand(3, 4, device=device)).loss.backward()


def test_launches_are_nvtx_ranges(fused_triton, monkeypatch, nvtx):
    from vae_fast._triton import launch

    plain = launch.on_device.__init__
    nvidia = launch.Place("cuda", -1, 132, 32)  # and which of its GPUs is no matter
    monkeypatch.setattr(
        launch.on_device, "__init__", lambda self, _, name: plain(self, nvidia, name)
    )
    train_step(fused_triton)
    assert nvtx == [e for name in LAUNCHES for e in (f"vae_fast {name}", None)]


def test_a_launch_that_fails_ends_its_range(nvtx):
    from vae_fast._triton import launch

    with pytest.raises(KeyError), launch.on_device(launch.Place("cuda", -1, 132, 32), "launch"):
        raise KeyError
    assert nvtx == ["vae_fast launch", None]


@pytest.mark.parametrize("backend", ["cuda", "hip", "interpreter"])
def test_there_are_no_ranges_but_on_nvidia(backend, monkeypatch, nvtx):
    from vae_fast._triton import launch

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with launch.on_device(launch.Place(backend, 0, 132, 32), "launch"):
        pass
    assert nvtx == (["vae_fast launch", None] if backend == "cuda" else [])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nvtx_ranges_on_a_gpu(nvtx, launched_by_python):
    train_step("cuda")
    expected = [] if torch.version.hip else LAUNCHES
    assert nvtx == [e for name in expected for e in (f"vae_fast {name}", None)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_real_nvtx_ranges_are_balanced():
    depth = torch.cuda.nvtx.range_push("test")
    for _ in range(2):  # from Python, then from eager.cpp
        train_step("cuda")
    assert torch.cuda.nvtx.range_pop() == depth
