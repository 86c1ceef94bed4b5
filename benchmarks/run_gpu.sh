#!/usr/bin/env bash
# All that needs a GPU, in one folder: the GPU tests, the accuracy on the device, the benchmarks and
# their report, the kernels under ncu where there is one. From the repository's root, or any place:
#
#   benchmarks/run_gpu.sh [FOLDER]        (default: runs/gpu)
#
# PYTHON names a Python that has torch, Triton, setuptools and the packages of the "dev" extra. Where
# this checkout is not installed in it, it is installed, editable and without any download. A part
# that fails or runs out of its seconds does not stop the next; the exit status says whether one did.
# All their seconds together are less than ten minutes.
set -uo pipefail

folder=${1:-$(dirname "${BASH_SOURCE[0]}")/../runs/gpu}
python=${PYTHON:-python3}
mkdir -p "$folder" && folder=$(cd "$folder" && pwd) || exit 1
case $python in */*) python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python") ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
# What is here afterwards is of this run.
rm -rf "$folder"/{bench.json,report,nvidia-smi.txt} "$folder"/*.log
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} # what is measured is this checkout
failed=0

part() { # NAME SECONDS COMMAND...: runs it, and keeps what it prints
  local name=$1 limit=$2 status
  shift 2
  echo "== $name"
  timeout --signal=INT --kill-after=10 "$limit" "$@" >"$folder/$name.log" 2>&1
  status=$?
  tail -n 3 "$folder/$name.log"
  [ "$status" -eq 0 ] || { echo "== $name: exit status $status"; failed=1; }
}

"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
  echo "run_gpu.sh: '$python' has no torch that finds a GPU" >&2
  exit 1
}
nvidia-smi >"$folder/nvidia-smi.txt" 2>&1 || true
# The Triton kernels are a part of the package only where it is installed. That compiles nothing:
# doctor does, two libraries at once.
"$python" -c 'import vae_fast._triton' 2>/dev/null || CXX=false \
  part install 20 "$python" -m pip install --no-deps --no-build-isolation --no-index --editable .
part doctor 100 "$python" -m vae_fast.cli doctor
# -v: when time is up, what failed has been named.
part tests 80 "$python" -m pytest -v -n "$(nproc)" -m gpu -p no:cacheprovider
# On a GPU these run the compiled kernels, not the interpreter's; compiling takes most of their time.
part accuracy 110 "$python" -m pytest -v -n "$(nproc)" -k triton -p no:cacheprovider \
  tests/test_noise.py tests/test_passes.py tests/test_likelihoods.py tests/test_elbo.py tests/test_eager.py
part bench 220 "$python" -m pytest benchmarks --benchmark-only -q --quick --device cuda \
  --benchmark-json="$folder/bench.json"
[ ! -s "$folder/bench.json" ] ||
  part report 20 "$python" -m benchmarks.report "$folder/bench.json" --out "$folder/report"
if command -v ncu >/dev/null; then
  # The card's clocks are not ours to set.
  part ncu 40 ncu --clock-control none --set basic --kernel-name-base demangled \
    --kernel-name 'regex:latent|likelihood' --launch-count 12 --csv "$python" -c '
import torch
from vae_fast import FusedELBO

x, mu, logvar, mean, logvar_x = (
    torch.randn(65536, n, device="cuda", requires_grad=True) for n in (3072, 256, 256, 3072, 3072)
)
for _ in range(3):
    FusedELBO()(x.detach(), mu, logvar, lambda z: (mean + z.mean(), logvar_x)).loss.backward()
'
fi
exit "$failed"
