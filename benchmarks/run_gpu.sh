#!/usr/bin/env bash
# All that needs a GPU, in one folder: the GPU tests, the accuracy on the device, the benchmarks and
# their report, the kernels under ncu where there is one. From the repository's root, or any place:
#
#   benchmarks/run_gpu.sh [FOLDER]        (default: $OUT, or runs/gpu)
#
# PYTHON names a Python that has torch, Triton and the packages of the "dev" extra. A part that fails
# does not stop the next; the exit status says whether one did. SECONDS_EACH limits a part, 240 s.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder=${1:-${OUT:-runs/gpu}}
python=${PYTHON:-python3}
limit=${SECONDS_EACH:-240}
mkdir -p "$folder"
failed=0

part() { # NAME COMMAND...: runs it, and keeps what it prints
  local name=$1 status
  shift
  echo "== $name"
  timeout --kill-after=10 "$limit" "$@" >"$folder/$name.log" 2>&1
  status=$?
  tail -n 3 "$folder/$name.log"
  [ "$status" -eq 0 ] || { echo "== $name: exit status $status"; failed=1; }
}

"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
  echo "run_gpu.sh: '$python' has no torch that finds a GPU" >&2
  exit 1
}
nvidia-smi >"$folder/nvidia-smi.txt" 2>&1 || true
part install "$python" -m pip install --no-deps --no-build-isolation --no-index -e .
part doctor "$python" -m vae_fast.cli doctor
part tests "$python" -m pytest -m gpu -p no:cacheprovider
# On a GPU these run the compiled kernels, not the interpreter's.
part accuracy "$python" -m pytest -q -k triton -p no:cacheprovider \
  tests/test_noise.py tests/test_passes.py tests/test_likelihoods.py tests/test_elbo.py
part bench "$python" -m pytest benchmarks --benchmark-only -q --quick --device cuda \
  --benchmark-json="$folder/bench.json"
part report "$python" -m benchmarks.report "$folder/bench.json" --out "$folder/report"
if command -v ncu >/dev/null; then
  part ncu ncu --set basic --kernel-name-base demangled --kernel-name 'regex:latent|likelihood' \
    --launch-count 12 --csv "$python" -m vae_fast.cli profile --batch-size 16384
fi
exit "$failed"
