"""What the Triton kernels compile to, checked with no GPU: see benchmarks/audit.py.

Some cases are compiled here; of every configuration there is a stored audit, which is read.
"""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks import audit, audit_report

ROOT = Path(__file__).parents[1]
STORED = ROOT / "benchmarks" / "results" / "audit"
AGAIN = "run python -m benchmarks.audit --out benchmarks/results/audit, some half an hour"
FAST = ("float32", "bfloat16")

# Instructions that one element may cost: where the arithmetic takes as long as the memory traffic
# of a GPU that reads 4.8 TB/s, 12 or 6 bytes an element, on 132 multiprocessors.
BUDGET = {"float32": 83, "bfloat16": 41}
# What the latent forward pass was built to cost, in fp32.
LATENT_FORWARD = 36


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """The audit of every case, made in a process of its own: under TRITON_INTERPRET, which this one
    may run under, nothing compiles."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.audit", "--json"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout)


def select(reports, **wanted):
    found = [r for r in reports if all(r[k] == v for k, v in wanted.items())]
    assert found, wanted
    return found


def in_vectors(r):
    """Whether rows are whole vectors, in either dtype, one after another."""
    _, shape, *features = r["case"].split()
    return int(shape.split("x")[1]) % 8 == 0 and not {"transposed", "apart"} & set(features)


def failures(reports, good):
    return [(r["case"], r["target"], r["tile"]) for r in reports if not good(r)]


def test_every_target_is_covered(reports):
    assert {r["target"] for r in reports} == {"sm_80", "sm_90", "sm_100", "gfx942"}


def test_nothing_spills(reports):
    # In fp64, libdevice's sine keeps an array in local memory for huge arguments, which an angle in
    # (0, 2π] never is.
    def clean(r):
        return r["spills"] == 0 or (r["dtype"] == "float64" and r["op"].startswith("latent"))

    assert not failures(reports, clean)


def test_threads_hold_few_enough_registers_to_hide_latency(reports):
    # 512 threads to a multiprocessor at the least.
    assert not failures(reports, lambda r: r["registers"] <= 128 or r["target"] == "gfx942")


@pytest.mark.parametrize("dtype", FAST)
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_tiles_move_in_128_bits(reports, target, dtype):
    """Every access to a tile is one of 128 bits: what is narrower is one value for a row."""
    tensors = {  # read and written
        "latent_forward": (2, 1),
        "latent_backward": (3, 2),
        "likelihood_forward": (3, 0),
        "likelihood_backward": (3, 2),
        "likelihood_forward_grad": (3, 2),
    }
    checked = 0
    for r in select(reports, target=target, dtype=dtype):
        plain = r["case"] == f"{r['op']} {r['case'].split()[1]} {dtype}"
        if not plain or r["op"] not in tensors or not in_vectors(r):
            continue
        rows, cols, tiles = map(int, r["tile"].split()[0].split("x"))
        warps = int(r["tile"].split("w")[1].split()[0])
        vectors = rows * cols * tiles // (32 * warps * (4 if dtype == "float32" else 8))
        reads, writes = tensors[r["op"]]
        loads, stores = r["loads"].get("128", 0), r["stores"].get("128", 0)
        # The last program may read partial sums in 128 bits too.
        assert loads >= reads * vectors, r
        assert stores == writes * vectors, r
        if r["op"].startswith("latent"):
            assert loads == reads * vectors, r
            assert sum(r["stores"].values()) - stores <= 2, r
        checked += 1
    assert checked >= 3


def test_latent_forward_instructions(reports):
    """Every class of row that fills its program; a tiny batch spreads over more of them instead."""
    sizes = ("65536x16", "16384x64", "16384x128", "16384x256", "16384x512", "16384x4096")
    for size in sizes:
        (r,) = select(reports, case=f"latent_forward {size} float32", target="sm_90")
        assert r["per_element"] <= LATENT_FORWARD, r


@pytest.mark.parametrize(
    ("case", "wanted"),
    [
        ("latent_forward 16384x256 bfloat16", "FP16"),
        ("latent_backward 16384x256 bfloat16", "FP16"),
        ("likelihood_forward_grad 16384x3072 bfloat16", "FP16"),
        ("gaussian_kl_forward 16384x256 bfloat16", "FP16"),
        ("latent_forward 4096x64 bfloat16 mixed", "FP32"),
        ("latent_backward 4096x64 bfloat16 mixed", "FP32"),
        ("latent_forward 16384x256 float32", "FP32"),
        ("gaussian_kl_backward 16384x256 float32", "FP32"),
        ("importance_forward 16384x0 float32 K=64", "FP32"),
        ("latent_forward 4096x64 float64", "PLAIN"),
        ("likelihood_backward 4096x784 float64", "PLAIN"),
    ],
)
def test_launchers_ask_for_what_their_tensors_deserve(case, wanted):
    from vae_fast._triton import elementary

    (found,) = (c for c in audit.CASES if str(c) == case)
    launch = audit.record(found, "cuda")
    assert launch.arguments["APPROX"] == getattr(elementary, wanted).value
    assert audit.record(found, "hip").arguments["APPROX"] == elementary.PLAIN.value


def test_bf16_takes_fewer_instructions(reports):
    """Half of the bytes leave half of the time: for numbers of 16 bits less will do."""
    sizes = {"latent_forward": "16384x256", "likelihood_forward": "16384x3072"}
    sizes |= dict.fromkeys(("likelihood_backward", "likelihood_forward_grad"), "16384x3072")
    for op, size in sizes.items():
        (fp32,), (bf16,) = (
            select(reports, case=f"{op} {size} {dtype}", target="sm_90") for dtype in FAST
        )
        assert bf16["per_element"] < fp32["per_element"], (bf16, fp32)
    for size in ("65536x1024", "65536x3072"):
        (r,) = select(reports, case=f"latent_forward {size} bfloat16", target="sm_90")
        assert r["per_element"] <= LATENT_FORWARD - 4, r


@pytest.mark.parametrize("dtype", FAST)
def test_rows_of_a_multiple_of_four_are_vectors(reports, dtype):
    """Triton knows of multiples of 16 by itself; of others the launchers tell it."""
    bits = "128" if dtype == "float32" else "64"
    for op, (reads, writes) in (("latent_forward", (2, 1)), ("latent_backward", (3, 2))):
        (r,) = select(reports, case=f"{op} 65536x20 {dtype}", target="sm_90")
        assert r["loads"][bits] >= 4 * reads, r
        assert r["stores"][bits] == 4 * writes, r
        assert r["converts"] == 0, r


def test_far_elements_are_reached_in_64_bits(reports):
    far = [r for r in reports if "transposed" in r["case"]]
    assert {r["op"] for r in far} == set(audit_report.TENSORS)
    assert not failures(far, lambda r: r["narrow"] == [])


@pytest.mark.parametrize("dtype", FAST)
def test_arithmetic_keeps_up_with_memory(reports, dtype):
    for r in select(reports, target="sm_90", dtype=dtype):
        if r["case"] in (f"{r['op']} 16384x256 {dtype}", f"{r['op']} 16384x3072 {dtype}"):
            # The backward passes move five values an element where the forward passes move three,
            # but for a KL, which reads four and writes four gradients.
            backward = r["op"].endswith(("backward", "grad"))
            moved = (4, 8) if r["op"].startswith("gaussian_kl") else (3, 5)
            assert r["per_element"] <= BUDGET[dtype] * moved[backward] / 3, r


def test_nothing_is_left_uncounted(reports):
    fast = [r for r in select(reports, target="sm_90") if r["dtype"] in FAST]
    assert not failures(fast, lambda r: r["per_element"] is not None)


def test_noise_stays_in_the_thread_that_made_it(reports):
    """No layout conversion of a tile: only sums, and one result a row, cross threads."""
    fast = [r for r in reports if r["op"].startswith("latent") and r["dtype"] in FAST]
    aligned = [r for r in fast if in_vectors(r) and "mixed" not in r["case"]]
    assert not failures(aligned, lambda r: r["converts"] == 0)
    # A row's sums, or one of them for each warp, and nothing the size of a tile.
    assert not failures(aligned, lambda r: r["shared"] <= 128)


def test_levels_and_their_noise_stay_in_vectors(reports):
    """Bytes are read as many at once as other tensors' elements, and nothing crosses threads."""
    levels = [r for r in reports if "levels" in r["case"] and r["target"] != "gfx942"]
    levels = [r for r in levels if in_vectors(r)]

    def vectors(r):
        tile, warps = r["tile"].split(" w")
        elements = math.prod(map(int, tile.split("x"))) // (32 * int(warps))
        return 2 * elements * (4 if r["dtype"] == "float32" else 2) // 16  # of mean and scale

    assert not failures(
        levels, lambda r: r["converts"] == 0 and r["loads"].get("128", 0) >= vectors(r) > 0
    )
    assert not failures(levels, lambda r: not {"8", "16"} & set(r["loads"]))


def test_bytes_that_lie_apart_are_read_one_by_one(reports):
    """Four at once would be one element's and three strangers'."""
    apart = [r for r in reports if r["case"].endswith(" apart")]
    assert {"levels" in r["case"] for r in apart} == {False, True}

    def one_by_one(r):
        tile, warps = r["tile"].split(" w")
        return r["loads"].get("8", 0) == math.prod(map(int, tile.split("x"))) // (32 * int(warps))

    assert not failures(apart, one_by_one)


def test_no_root_is_taken_of_a_variance_that_is_no_normal_number():
    """NVIDIA's fast root takes that for 0; the interpreter, which other tests run, does not."""
    code = """
from benchmarks import audit
case = audit.Case("likelihood_forward", 64, 64, "float32", param=audit.VAR)
print(audit.compile_launch(audit.record(case, "cuda"), "sm_90").asm["ptx"])
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    ptx = subprocess.check_output(command, cwd=ROOT, env=environment, text=True)
    roots = len(re.findall(r"\bsqrt\.approx\.ftz\.f32", ptx))
    assert roots > 0
    assert len(re.findall(r"mul\.f32 .*, 0f5F800000;", ptx)) == roots  # 2^64


def test_a_shared_scale_costs_no_more_than_a_full_one(reports):
    full = {"row": "4096x784 float32", "event": "16384x3072 float32"}
    dearest = {"row": 38, "event": 22}  # of a full scale: 37.2 and 21.6
    for scale, case in full.items():
        (r,) = select(reports, case=f"likelihood_backward {case} {scale}", target="sm_90")
        assert r["per_element"] <= dearest[scale], r


@pytest.mark.parametrize("size", ["16384x3072", "256x196608"])
def test_the_last_program_sees_every_part(reports, size):
    """Stores, barrier, fence, ticket, invalidation, barrier; then loads that bypass L1."""
    for op in ("likelihood_forward", "likelihood_forward_grad"):
        (r,) = select(reports, case=f"{op} {size} float32", target="sm_90")
        order = [o.split(".")[0] for o in r["ordering"]]
        ticket = order.index("ATOMG")
        assert r["ordering"][ticket].endswith("STRONG.GPU"), r
        assert order[ticket - 2 : ticket] == ["BAR", "MEMBAR"], r
        assert r["ordering"][ticket - 1].endswith("GPU"), r
        assert order[ticket + 1 : ticket + 4] == ["CCTL", "BAR", "EXIT"], r
        later = r["ordering"][ticket + 4 :]
        assert any(o.startswith("LDG") and "STRONG.GPU" in o for o in later), r


def test_every_instruction_has_a_pipe(reports):
    """Unknown ones are an error of the audit; the pipes' shares add up to the whole."""
    for r in select(reports, target="sm_90"):
        if r["per_element"] is not None:
            assert sum(r["pipes"].values()) == pytest.approx(r["per_element"], abs=0.1), r


# ---- the stored audit --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sweep():
    return audit_report.read(STORED, "sweep")


def fast(reports):
    """Those on sm_90 in fp32 and bf16."""
    return [r for r in reports if r.target == "sm_90" and r.dtype in FAST]


def named(reports):
    return [(r.case, r.target, r.tile, r.traits) for r in reports]


def test_the_stored_audit_is_of_these_kernels():
    stored = json.loads((STORED / "sources.json").read_text())
    assert stored == audit_report.sources(), f"the kernels have changed since: {AGAIN}"


def test_the_stored_audit_has_every_configuration(sweep):
    """Enumerated anew; the tile and the rest are what the launchers then gave the kernel."""
    expected = {(str(case), *key[1:]) for key, case in audit.all_configurations().items()}
    stored = set(named(sweep))
    assert stored == expected, f"the heuristics choose otherwise by now: {AGAIN}"


def test_the_stored_audit_has_every_case():
    expected = {(str(c), target) for c in audit.CASES for target in c.targets}
    stored = {(r.case, r.target) for r in audit_report.read(STORED, "case")}
    assert stored == expected, f"there are other cases by now: {AGAIN}"


def test_no_configuration_spills(sweep):
    # The one array in local memory is of libdevice's sine in fp64, for angles that do not occur.
    spilling = [r for r in sweep if r.spills]
    assert all(r.dtype == "float64" and r.op.startswith("latent") for r in spilling), named(
        spilling
    )


def test_every_configuration_hides_latency(sweep):
    """512 threads to a multiprocessor at the least."""
    crowded = [r for r in fast(sweep) if r.registers > 128]
    assert not crowded, named(crowded)


def test_every_configuration_moves_vectors(sweep):
    """Where rows begin at multiples of 16 bytes, and a thread has as much."""
    wide = [r for r in sweep if r.dtype in FAST and audit_report.in_vectors(r)]
    wide = [r for r in wide if "levels" not in r.case]
    assert len(wide) > 1000
    narrow = [r for r in wide if not audit_report.in_128_bits(r)]
    assert not narrow, named(narrow)


def test_shared_memory_is_for_sums(sweep):
    """And for what is read once for a row; but rows of no whole vectors pass through it."""
    used = [r for r in sweep if r.shared and r.dtype in FAST and not audit_report.reduces(r)]
    for r in used:
        rows, _, tiles = map(int, r.tile.split()[0].split("x"))
        most = 4 * rows * tiles if audit_report.in_vectors(r) else 4096
        assert r.shared <= most, r


def test_latent_forward_instructions_of_every_configuration(sweep):
    """Where every lane has 16 elements; those of a small batch spread over more programs.

    Two threads share a row of 8, and have four each, whose addresses and sums weigh more.
    """
    full = []
    for r in fast(sweep):
        tile, warps = r.tile.split(" w")
        each = math.prod(map(int, tile.split("x"))) / (32 * int(warps))
        if (r.op, r.dtype) == ("latent_forward", "float32") and "even" in r.traits and each == 16:
            full.append(r)
    assert len(full) >= 10
    for r in full:
        eight = r.case.split()[1].endswith("x8")
        assert r.per_element <= (38 if eight else LATENT_FORWARD), r


@pytest.mark.parametrize("device", audit_report.BANDWIDTH)
@pytest.mark.parametrize("dtype", FAST)
def test_the_latent_forward_pass_waits_for_memory(dtype, device):
    """As the model has it; in bf16 on an H200 by 15 per cent only."""
    case = f"latent_forward 16384x256 {dtype}"
    (r,) = (r for r in fast(audit_report.read(STORED, "case")) if r.case == case)
    slowest = max(r.arithmetic().values())
    assert r.memory(device) >= slowest, (r.memory(device), slowest)


def test_the_stored_arithmetic_adds_up(sweep):
    for r in fast(sweep):
        assert sum(r.pipes.values()) == pytest.approx(r.per_element, abs=0.1), r
