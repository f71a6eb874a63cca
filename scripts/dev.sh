#!/usr/bin/env bash
# Tasks of a developer; `scripts/dev.sh help` lists them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

jobs=$(nproc)
python=${VIRTUAL_ENV:-$PWD/.venv}/bin/python

sanitizer=(-DCMAKE_BUILD_TYPE=Sanitizer "-DCMAKE_CXX_FLAGS=-O1 -Wno-maybe-uninitialized")

# cpp_tests NAME CMAKE_OPTIONS...: configures and builds the C++ tests in build/NAME.
cpp_tests() {
  local name=$1
  shift
  cmake -S . -B "build/$name" -G Ninja -DKT_BUILD_TESTS=ON "$@"
  cmake --build "build/$name" -j "$jobs"
}

task_help() { ## list the tasks
  sed -n 's/^task_\([a-z]*\)() { ## \(.*\)/  \1\t\2/p' scripts/dev.sh | expand -t 12
}

task_build() { ## install the clone into the environment, with the tools of the tests
  ./install.sh --editable --test
}

task_test() { ## build and run the C++ tests on every tier, then pytest without servers; more arguments go to pytest
  cpp_tests test -DCMAKE_BUILD_TYPE=Release
  ctest --test-dir build/test --output-on-failure -j "$jobs"
  "$python" -m pytest -q -m "not server and not full" tests/python "$@"
}

task_asan() { ## run the C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer
  cpp_tests asan "${sanitizer[@]}" -DKT_SANITIZE=address
  ctest --test-dir build/asan --output-on-failure -j "$jobs" "$@"
}

task_tsan() { ## run the tests of the pool and the stream under ThreadSanitizer
  cpp_tests tsan "${sanitizer[@]}" -DKT_SANITIZE=thread
  ctest --test-dir build/tsan --output-on-failure -R 'worker_pool|cpu_stream|engine|deferral|fake_cuda|cuda_sync|cuda_schedules' "$@"
}

task_bench() { ## measure every kernel of the installed clone; more arguments go to python -m kt_kernel.bench kernels
  "$python" -m kt_kernel.bench kernels "$@"
}

task_lint() { ## ruff on Python, clang-format on C++, bash -n on shell
  "$python" -m ruff check .
  find csrc tests -name '*.h' -o -name '*.cpp' | xargs "$(dirname "$python")/clang-format" --dry-run --Werror
  # comments are wrapped by hand
  if grep -rnE '^.{101,}$' csrc tests --include='*.h' --include='*.cpp' --include='*.inc'; then
    echo "dev.sh: lines over 100 columns" >&2
    exit 1
  fi
  for script in install.sh scripts/*.sh .ci/run; do bash -n "$script"; done
}

task_tables() { ## write the generated tables of README.md and docs/kernels.md again
  "$python" scripts/generate_readme_tables.py
}

task=${1:-help}
if ! declare -F "task_$task" >/dev/null; then
  echo "dev.sh: unknown task $task; the tasks are:" >&2
  task_help >&2
  exit 2
fi
shift || true
"task_$task" "$@"
