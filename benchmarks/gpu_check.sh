#!/usr/bin/env bash
# Does the package work on this machine's GPU, and how fast? Builds it in place, runs the tests, compute-sanitizer over a
# small part of them, and the benchmarks; leaves everything in one folder and prints a line for each step.
#
#   benchmarks/gpu_check.sh [FOLDER]      default: benchmark-results/gpu; PYTHON=... chooses the Python
#
# The Python needs a torch with CUDA, pytest, pybind11, ninja and packaging; the machine needs nvcc. Exit code: 0 all
# steps passed, 1 one failed, 2 there is nothing to check.
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
folder=${1:-benchmark-results/gpu}
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  echo "gpu_check: $python has no torch that sees a CUDA GPU." >&2
  exit 2
fi
mkdir -p "$folder" || exit 2
failed=0

# step NAME SECONDS COMMAND...: output in FOLDER/NAME.log
step() {
  local name=$1 seconds=$2 begun=$SECONDS status
  shift 2
  timeout "$seconds" "$@" > "$folder/$name.log" 2>&1
  status=$?
  [ "$status" -eq 0 ] || failed=1
  printf '%-12s exit %-3d %4d s  %s\n' "$name" "$status" $((SECONDS - begun)) "$(tail -n 1 "$folder/$name.log" | cut -c1-100)" |
    tee -a "$folder/steps.txt"
}

: > "$folder/steps.txt"
step build 900 env ELBO_EXT_CUDA=1 ELBO_EXT_STRICT=1 "$python" setup.py -q egg_info build_ext --inplace
step info 60 "$python" -m elbo_ext info
# Four workers of pytest-xdist where it is installed; else one process.
workers=(-o addopts=)
"$python" -c 'import xdist' 2>/dev/null && workers=(-n 4)
step tests 1200 "$python" -m pytest -q "${workers[@]}" -k cuda
# The benchmarks write their results at the end: first a few, in case time runs out.
step quick 600 "$python" -m benchmarks --device cuda --quick --out "$folder/quick"
step benchmarks 1800 "$python" -m benchmarks --device cuda --out "$folder/benchmarks"
if command -v compute-sanitizer > /dev/null; then
  small=(-m pytest -q -o addopts= -p no:cacheprovider tests/test_values.py tests/test_gradients.py tests/test_bounds.py
    -k "cuda and (row-33 or row-20000 or channels_last or rows-1025x8 or log_prob-row-1025 or number_of_examples)")
  # In memory that torch has not cached every tensor has bounds of its own.
  step memcheck 900 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 3 "$python" "${small[@]}"
  for tool in racecheck synccheck; do
    step "$tool" 900 compute-sanitizer --tool "$tool" --error-exitcode 3 "$python" "${small[@]}"
  done
else
  echo "sanitizer    not run: compute-sanitizer is not on the PATH" | tee -a "$folder/steps.txt"
fi
exit $failed
