#!/usr/bin/env bash
# Does the package work on this machine's GPU, and how fast? Builds it in place, runs the tests, compute-sanitizer over a
# small part of them, and the benchmarks; leaves everything in one folder and prints a line for each step.
#
#   benchmarks/gpu_check.sh [FOLDER [STEP...]]
#
# FOLDER is benchmark-results/gpu by default. Steps: build info tests quick benchmarks memcheck racecheck synccheck, all by
# default; those that are named run in this order, so that a machine which is lent in pieces of a few minutes can take them
# one by one. PYTHON=... chooses the Python; LIMIT=540 gives no step more seconds than that: it is then interrupted, and
# tests and benchmarks still tell what they have found. ELBO_EXT_STRICT=0 builds also where nvcc has warnings.
#
# The Python needs a torch with CUDA, pytest, pybind11, ninja and packaging, the benchmarks matplotlib and tqdm; the machine
# needs nvcc. A test file whose imports are missing is an error of the step, but keeps no other from running. Exit code: 0
# all steps passed, 1 one failed, 2 there is nothing to check.
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
all=(build info tests quick benchmarks memcheck racecheck synccheck)
folder=${1:-benchmark-results/gpu}
shift
chosen=" ${*:-${all[*]}} "
for name in $chosen; do
  if [[ " ${all[*]} " != *" $name "* ]]; then
    echo "gpu_check: there is no step '$name'; there are ${all[*]}." >&2
    exit 2
  fi
done
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
  [[ $chosen == *" $name "* ]] || return 0
  [ "${LIMIT:-$seconds}" -lt "$seconds" ] && seconds=$LIMIT
  # As Ctrl-C does, with time to print what there is.
  timeout --signal=INT --kill-after=30 "$seconds" "$@" > "$folder/$name.log" 2>&1
  status=$?
  [ "$status" -eq 0 ] || failed=1
  printf '%-12s exit %-3d %4d s  %s\n' "$name" "$status" $((SECONDS - begun)) "$(tail -n 1 "$folder/$name.log" | cut -c1-100)" |
    tee -a "$folder/steps.txt"
}

step build 900 env ELBO_EXT_CUDA=1 ELBO_EXT_STRICT="${ELBO_EXT_STRICT:-1}" "$python" setup.py -q egg_info build_ext --inplace
step info 60 "$python" -m elbo_ext info
# Four workers of pytest-xdist where it is installed; else one process.
workers=(-o addopts=)
"$python" -c 'import xdist' 2>/dev/null && workers=(-n 4)
step tests 1200 "$python" -m pytest -q "${workers[@]}" --continue-on-collection-errors -k cuda
# A few cases first, in case time runs out.
step quick 600 "$python" -m benchmarks --device cuda --quick --out "$folder/quick"
step benchmarks 1800 "$python" -m benchmarks --device cuda --out "$folder/benchmarks"
if command -v compute-sanitizer > /dev/null; then
  regimes="row-33 or row-20000 or channels_last or rows-1025x8 or log_prob-row-1025 or number_of_examples or scale-of"
  small=(-m pytest -q -o addopts= -p no:cacheprovider tests/values/test_values.py
    tests/gradients/test_gradients.py tests/bounds/test_bounds.py
    -k "cuda and ($regimes or num_samples-many)")
  # In memory that torch has not cached every tensor has bounds of its own.
  step memcheck 900 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 3 "$python" "${small[@]}"
  for tool in racecheck synccheck; do
    step "$tool" 900 compute-sanitizer --tool "$tool" --error-exitcode 3 "$python" "${small[@]}"
  done
elif [[ $chosen == *check* ]]; then
  echo "sanitizer    not run: compute-sanitizer is not on the PATH" | tee -a "$folder/steps.txt"
fi
exit $failed
