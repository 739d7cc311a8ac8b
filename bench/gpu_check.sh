#!/usr/bin/env bash
# Builds, tests and measures everything that a GPU is needed for, in one call:
#
#     bench/gpu_check.sh [DIRECTORY]          # default build/gpu-check
#
# No step ends the others. What each said is in DIRECTORY/STEP.log, the outcome of all in
# DIRECTORY/summary.txt, the figures in DIRECTORY/gpu.json. Exits with 0 if all steps passed, else with
# the number of those that did not. PYTHON: the interpreter, which has kvstore's requirements, numpy,
# pytest, hypothesis, CuPy, and torch for the reference engine and the figure of overlap.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:-build/gpu-check}" && cd "${1:-build/gpu-check}" && pwd)
PYTHON=${PYTHON:-python3}
export PYTHONPATH=.:adapters PYTHONUNBUFFERED=1
failed=0
: >"$out/summary.txt"

step() { # NAME SECONDS COMMAND...
    local name=$1 seconds=$2 began=$SECONDS status=0
    shift 2
    timeout --kill-after=10 "$seconds" "$@" >"$out/$name.log" 2>&1 || status=$?
    local said
    said=$(grep -v '^[[:space:]]*$' "$out/$name.log" | tail -n 1 | cut -c1-160)
    if [ "$status" = 0 ]; then
        printf 'ok      %-10s %4ss  %s\n' "$name" "$((SECONDS - began))" "$said"
    else
        printf 'FAILED  %-10s %4ss  status %s: %s\n' "$name" "$((SECONDS - began))" "$status" "$said"
    fi | tee -a "$out/summary.txt"
    [ "$status" = 0 ] || failed=$((failed + 1))
}

# Tests that are all skipped prove nothing.
tests() { # PYTEST ARGUMENTS...
    "$PYTHON" -m pytest -q -n0 -p no:cacheprovider "$@" || return
}
on_gpu() {
    "$PYTHON" -c 'import sys; from kvstore.gpu import available; ok, why = available(); print(why); sys.exit(not ok)' &&
        tests "$@"
}
figures() {
    "$PYTHON" bench/gpu.py --json >"$out/gpu.json" || return
    "$PYTHON" - "$out/gpu.json" <<'PY'
import json, sys
figures = json.load(open(sys.argv[1]))["figures"]
least = {"gpu_save_8b": 0.9, "gpu_load_8b": 0.9, "cuda_ipc_read": 0.9, "gpu_compute_beside_save": 0.9}
below = [f["name"] for f in figures if f["name"] in least and (f["ratio"] or 0) < least[f["name"]]]
for figure in figures:
    print(figure["name"], figure["value"], figure["unit"], figure["ratio"], figure["against"])
print("below what is wanted: " + ", ".join(below) if below else "all as wanted")
sys.exit(bool(below))
PY
}
export -f tests on_gpu figures
export PYTHON out

step device 60 bash -c 'nvidia-smi; "$PYTHON" -c "
import sys
from kvstore.gpu import CudaDevice, available
ok, why = available()
if ok:
    device = CudaDevice()
    print(device.name, device.capability, device.driver.version, \"batches\" if device.driver.has_batch else \"no batches\")
else:
    print(why)
sys.exit(not ok)"'
step build 600 "$PYTHON" setup.py -q build_ext --inplace
step compile 300 bash -c 'tests -m "slow or not slow" tests/gpu/test_compile.py'
step emulated 600 bash -c 'tests tests/gpu'
step on_gpu 600 bash -c 'on_gpu -m gpu tests/gpu'
step figures 300 bash -c figures
echo "$failed steps failed; see $out" | tee -a "$out/summary.txt"
exit "$failed"
