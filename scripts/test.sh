#!/usr/bin/env bash
# Sets everything up and runs all tests: C++ on every tier, the sanitizers, Python, real servers.
#
# Usage: scripts/test.sh [--fast | --full]
#   --fast   leave out the tests that start servers
#   --full   add the tests that do not fit in 40 minutes on two cores
#
# Needs python3, apt and pip, and root for apt where a package is missing. Uses the clone's own .venv and build/.
# The last line is the totals. Exit code 0 only if nothing failed and every skip is one that scripts/test_totals.py
# names. Results are left in build/results (JUnit XML and logs).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

selection='not full and '
servers=1
case ${1:-} in
  '') ;;
  --fast) servers=0 ;;
  --full) selection='' ;;
  *)
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
    exit 2
    ;;
esac

results=$PWD/build/results
python=$PWD/.venv/bin/python
jobs=$(nproc)
mkdir -p "$results"
rm -f "$results"/*
unset VIRTUAL_ENV CONDA_PREFIX KT_FORCE_ISA

# stage NAME COMMAND...: runs one stage, says how long it took, and notes a failure for the totals.
stage() {
  local name=$1 start=$SECONDS code=0
  shift
  printf '\n== %s\n' "$name"
  "$@" || code=$?
  printf '== %s: %s in %d s\n' "$name" "$([[ $code == 0 ]] && echo ok || echo "FAILED (exit code $code)")" $((SECONDS - start))
  if ((code)); then printf '%s\texit code %d\n' "$name" "$code" >>"$results/failed_stages.tsv"; fi
  return "$code"
}

# logged LOG COMMAND...: output into a file; the end of it on failure.
logged() {
  local log=$results/$1.log
  shift
  "$@" >"$log" 2>&1 || {
    local code=$?
    tail -n 40 "$log"
    echo "full log: $log"
    return $code
  }
}

# cpp_build NAME CMAKE_OPTIONS...: the C++ tests in build/NAME; the programs in `targets`, or all.
cpp_build() {
  local name=$1
  shift
  logged "configure-$name" cmake -S . -B "build/$name" -G Ninja \
    -DKT_BUILD_TESTS=ON "$@" &&
    logged "build-$name" cmake --build "build/$name" -j "$jobs" --target $targets -- -k 0
}

# cpp_run NAME CTEST_OPTIONS...: every test of build/NAME; what it prints is kept for the totals.
cpp_run() {
  local name=$1
  shift
  "${prefix[@]}" ctest --test-dir "build/$name" -j "$jobs" --no-tests=error --timeout 1500 --output-on-failure \
    --test-output-size-passed 1000000 --output-junit "$results/ctest-$name.xml" "$@" >"$results/ctest-$name.log" 2>&1
  local code=$?
  if ((code)); then tail -n 60 "$results/ctest-$name.log"; else grep -E 'tests passed|Skipped' "$results/ctest-$name.log"; fi
  return $code
}

cpp() {
  local name=$1
  shift
  local options=()
  while (($#)) && [[ $1 != -- ]]; do
    options+=("$1")
    shift
  done
  (($# == 0)) || shift
  stage "build of $name" cpp_build "$name" "${options[@]}" && stage "C++ tests: $name" cpp_run "$name" "$@"
}

# The tests of servers wait for imports and answers much of the time: all others run beside them.
run_pytest() {
  local code=0 beside log=$results/pytest-library.log
  local pytest=("$python" -m pytest tests/python -q -rs --durations=8 --timeout=900)
  local library=(-m "${selection}not server" --junitxml="$results/pytest-library.xml")
  if ((!servers)); then
    "${pytest[@]}" "${library[@]}"
    return
  fi
  "${pytest[@]}" "${library[@]}" >"$log" 2>&1 &
  beside=$!
  # shellcheck disable=SC2064  # the process of now
  trap "kill $beside 2>/dev/null" EXIT
  "${pytest[@]}" -m "${selection}server" --junitxml="$results/pytest-servers.xml" || code=$?
  if wait "$beside"; then grep -E ' passed|SKIPPED' "$log"; else code=$?; tail -n 80 "$log"; fi
  trap - EXIT
  return "$code"
}

run_lint() { scripts/dev.sh lint; }

prefix=()
targets=all
if stage "set-up" ./install.sh --test --editable --venv .venv; then
  stage "lint" run_lint
  cpp test -DCMAKE_BUILD_TYPE=Release
  # gcc 12's sanitizers cannot map their shadow where the kernel randomizes addresses by more than 28 bits
  if setarch -R true 2>/dev/null; then prefix=(setarch -R); fi
  export ASAN_OPTIONS=detect_stack_use_after_return=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
  export TSAN_OPTIONS=halt_on_error=1:second_deadlock_stack=1
  # -O1 compiles in half the time; its extra code makes gcc 12 see uninitialized members inside the C++ library
  sanitizer=(-DCMAKE_BUILD_TYPE=Sanitizer "-DCMAKE_CXX_FLAGS=-O1 -Wno-maybe-uninitialized")
  # without the variants of the AMX tier: interpreted, they took a minute and no other code
  cpp asan "${sanitizer[@]}" -DKT_SANITIZE=address -- -E amx_no_amx
  targets='test_worker_pool test_cpu_stream test_engine test_fake_cuda test_cuda_sync test_cuda_errors test_cuda_schedules'
  cpp tsan "${sanitizer[@]}" -DKT_SANITIZE=thread -- -R 'worker_pool|cpu_stream|engine|fake_cuda|cuda_sync|cuda_errors|cuda_schedules'
  prefix=()
  stage pytest run_pytest
fi
printf '\nAll stages took %d min %d s.\n' $((SECONDS / 60)) $((SECONDS % 60))
python3 scripts/test_totals.py "$results"
