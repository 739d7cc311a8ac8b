#!/usr/bin/env bash
# Builds, tests and measures everything on a machine with a GPU, in one call:
#     bench/gpu_check.sh [OUTPUT-DIRECTORY]
# Leaves logs and JSON in the output directory (default: build/gpu_check). There is no CUDA code yet:
# what it shows today is that the host paths work and what they reach on that machine.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-build/gpu_check}
mkdir -p "$out"
failed=0

run() {
    local name=$1
    shift
    echo "== $name"
    "$@" >"$out/$name.log" 2>&1 || { echo "   failed: see $out/$name.log"; failed=1; }
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv >"$out/gpu.csv" 2>&1 || true
run build pip install -e '.[dev]'
run tests python -m pytest -q
python -m pytest -q -m gpu >"$out/gpu_tests.log" 2>&1
case $? in 0 | 5) ;; *) echo "   GPU tests failed: see $out/gpu_tests.log"; failed=1 ;; esac # 5: none yet
if compgen -G 'csrc/cuda/*.cu' >/dev/null; then
    run nvcc nvcc -std=c++20 -arch=sm_90 -Icsrc --compile --output-directory "$out" csrc/cuda/*.cu
fi
kvstore bench --json >"$out/bench.json" 2>"$out/bench.log" || failed=1
kvstore demo --json --plot "$out/demo.png" >"$out/demo.json" 2>"$out/demo.log" || failed=1
exit $failed
