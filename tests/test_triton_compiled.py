"""What the Triton kernels compile to, checked with no GPU: see benchmarks/audit.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]
FAST = ("float32", "bfloat16")

# Instructions that one element may cost: where the arithmetic takes as long as the memory traffic
# of a GPU that reads 4.8 TB/s, 12 or 6 bytes an element, on 132 multiprocessors.
BUDGET = {"float32": 83, "bfloat16": 41}
# What the latent forward pass was built to cost, in fp32. Of rows of 16 a thread has four, whose
# addresses and sums weigh more.
LATENT_FORWARD, LATENT_FORWARD_OF_16 = 36, 38


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
    """Whether rows are whole vectors, in either dtype."""
    return int(r["case"].split()[1].split("x")[1]) % 8 == 0


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
        most = LATENT_FORWARD_OF_16 if size.endswith("x16") else LATENT_FORWARD
        assert r["per_element"] <= most, r


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
    assert not failures(levels, lambda r: r["converts"] == 0 and r["loads"].get("128", 0) >= 4)
    assert not failures(levels, lambda r: not {"8", "16"} & set(r["loads"]))


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
