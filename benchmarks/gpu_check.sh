#!/usr/bin/env bash
# Does the package work on this machine's GPU, and how fast? Builds it in place, runs the tests, the benchmarks, and
# compute-sanitizer over a small part of the tests; leaves everything in one folder and prints a line for each step.
#
#   benchmarks/gpu_check.sh [FOLDER [STEP...]]
#
# FOLDER is benchmark-results/gpu by default. Steps, all by default, in this order whatever theirs on the command line:
#
#   build       the package; an elbo_ext/_cuda.so that was built from the same sources, here or elsewhere, is kept
#   info        python -m elbo_ext info
#   tests       those that use the GPU
#   quick       a few benchmarks, all contenders, with the time on the device alone
#   memcheck    compute-sanitizer over a few tests
#   racecheck   the same
#   synccheck   the same
#   benchmarks  all cases, without the compiled contenders
#   compiled    all cases, with them, as far as time is left
#
# All together take LIMIT seconds at most (480 by default): each step is cut to what is left, and benchmarks that are
# cut off write what they have. PYTHON=... chooses the Python. ELBO_EXT_STRICT=0 builds also where nvcc has warnings.
#
# The Python needs a torch with CUDA, pytest, pybind11, ninja and packaging, the benchmarks matplotlib and tqdm; the
# machine needs a C++ compiler, and nvcc unless _cuda.so is there. A test file whose imports are missing is an error of
# the step, but keeps no other from running. Exit code: 0 all steps passed; 1 one failed or was not run (benchmarks may
# be cut off, and those of the last step left out); 2 the command line is wrong, or there is no GPU to check, and one
# sentence says so.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

refuse() {
  echo "gpu_check: $1." >&2
  exit 2
}

all=(build info tests quick memcheck racecheck synccheck benchmarks compiled)
python=${PYTHON:-python3}
limit=${LIMIT:-480}
folder=${1:-benchmark-results/gpu}
[ $# -gt 0 ] && shift
chosen=" ${*:-${all[*]}} "
case $folder in
  -h | --help)
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' benchmarks/gpu_check.sh
    exit 0
    ;;
  -*) refuse "there is no option '$folder'" ;;
esac
for name in $chosen; do
  [[ " ${all[*]} " == *" $name "* ]] || refuse "there is no step '$name'; there are ${all[*]}"
done
[[ $limit =~ ^[1-9][0-9]{0,5}$ ]] || refuse "LIMIT is seconds, a whole number above 0, not '$limit'"
command -v "$python" > /dev/null || refuse "there is no Python '$python'; set PYTHON to one"
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2> /dev/null ||
  refuse "$python has no torch that sees a CUDA GPU"
{ mkdir -p "$folder" && : >> "$folder/steps.txt"; } 2> /dev/null || refuse "the folder '$folder' cannot be written"

failed=0
grace=10 # seconds from the interrupt of a step to its end, in which it writes what it has

report() {
  echo "$1" | tee -a "$folder/steps.txt"
}

# step NAME SECONDS COMMAND...: output in FOLDER/NAME.log
step() {
  local name=$1 seconds=$2 begun=$SECONDS left=$((limit - SECONDS - grace)) status ended last
  shift 2
  [[ $chosen == *" $name "* ]] || return 0
  if [ "$left" -lt 1 ]; then
    report "$(printf '%-12s not run: no time is left of %d s' "$name" "$limit")"
    [ "$name" = compiled ] || failed=1
    return
  fi
  [ "$left" -lt "$seconds" ] && seconds=$left
  rm -f "$folder/$name/results.json" # of a run before
  # As Ctrl-C does, also where this script was started in the background, which ignores it.
  timeout --preserve-status --signal=INT --kill-after="$grace" "$seconds" \
    env --default-signal=INT "$@" > "$folder/$name.log" 2>&1
  status=$?
  ended="exit $status"
  if [ $((SECONDS - begun)) -ge "$seconds" ]; then
    ended="cut off"
  fi
  if [ "$status" -ne 0 ] && ! { [ "$ended" = "cut off" ] && [ -e "$folder/$name/results.json" ]; }; then
    failed=1
  fi
  last=$(tr '\r' '\n' < "$folder/$name.log" | tail -n 1 | cut -c1-100)
  report "$(printf '%-12s %-8s %4d s  %s' "$name" "$ended" $((SECONDS - begun)) "$last")"
}

# Three quarters of the cores, as each worker's kernels wait for Python; more than 12 wait for the GPU.
cores=$(nproc)
workers=$((cores * 3 / 4 > 12 ? 12 : cores * 3 / 4))
parallel=(-o addopts=)
"$python" -c 'import xdist' 2> /dev/null && parallel+=(-n "$((workers > 0 ? workers : 1))")

sanitizer=$(PATH=$PATH:/usr/local/cuda/bin command -v compute-sanitizer)
regimes="row-33 or row-20000 or channels_last or rows-1025x8 or log_prob-row-1025 or number_of_examples or scale-of"
# sanitize STEP SECONDS TEST...
sanitize() {
  local name=$1 seconds=$2
  shift 2
  [[ $chosen == *" $name "* ]] || return 0
  if [ -z "$sanitizer" ]; then
    report "$(printf '%-12s not run: there is no compute-sanitizer on the PATH or in /usr/local/cuda/bin' "$name")"
    failed=1
    return
  fi
  local memory=()
  # In memory that torch has not cached every tensor has bounds of its own.
  [ "$name" = memcheck ] && memory=(PYTORCH_NO_CUDA_MEMORY_CACHING=1)
  step "$name" "$seconds" env "${memory[@]}" "$sanitizer" --tool "$name" --error-exitcode 3 \
    "$python" -m pytest -q -o addopts= -p no:cacheprovider "$@" -k "cuda and ($regimes or num_samples-many)"
}

step build 400 env ELBO_EXT_CUDA=reuse ELBO_EXT_STRICT="${ELBO_EXT_STRICT:-1}" \
  "$python" setup.py -q egg_info build_ext --inplace
step info 60 "$python" -m elbo_ext info
# What the files left out look at is nvcc's work, and this script: they need no GPU.
step tests 150 "$python" -m pytest -q "${parallel[@]}" --continue-on-collection-errors \
  --ignore=tests/build --ignore=tests/demo -k "cuda or gpu"
step quick 90 "$python" -m benchmarks --device cuda --quick --out "$folder/quick"
sanitize memcheck 60 tests/values/test_values.py tests/gradients/test_gradients.py tests/bounds/test_bounds.py
sanitize racecheck 40 tests/values/test_values.py
sanitize synccheck 40 tests/values/test_values.py
step benchmarks 180 "$python" -m benchmarks --device cuda --seconds 0.5 \
  --contenders ours,eager,distributions,nll-loss,copy,empty --out "$folder/benchmarks"
step compiled "$limit" "$python" -m benchmarks --device cuda --seconds 1 \
  --contenders ours,ours-compiled,eager-compiled,copy --out "$folder/compiled"
exit $failed
