#!/usr/bin/env bash
# Checks the kernels in AMX tiles on a machine that has AMX, and measures them. Needs an installed clone (install.sh
# --test --editable) and an idle machine; takes about ten minutes.
#
# Usage: scripts/amx_check.sh [FILE]
#   FILE   where the report goes; amx-report.txt by default. Please send it: docs/performance.md says what was predicted.
set -Eeuo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}
report=${1:-amx-report.txt}
build=build/amx-check

fail() {
  printf 'amx_check: error: %s\n' "$*" >&2
  exit 1
}

# section TITLE COMMAND...: what the command prints, and its exit code where that is not 0.
section() {
  local title=$1 code=0
  shift
  printf '\n## %s\n\n`%s`\n\n' "$title" "$*" >>"$report"
  "$@" >>"$report" 2>>"$report" || code=$?
  if ((code)); then
    printf '\nexit code %d\n' "$code" >>"$report"
    printf 'amx_check: %s ended with exit code %d\n' "$title" "$code" >&2
  fi
}

unset KT_FORCE_ISA KT_GEMM KT_DETERMINISTIC
tier=$("$python" -c 'from kt_kernel import _ext; print(_ext.cpu_features()["tier"])') ||
  fail "$python has no kt_kernel; run install.sh --test --editable, or set PYTHON"
[[ $tier == amx ]] ||
  fail "this machine's tier is $tier; run it where python -m kt_kernel.collect_env says amx"

printf '# AMX report\n' >"$report"
section "Machine" "$python" -m kt_kernel.collect_env
cmake -S . -B "$build" -G Ninja -DKT_BUILD_TESTS=ON -DCMAKE_BUILD_TYPE=Release >"$build.log" 2>&1 &&
  cmake --build "$build" >>"$build.log" 2>&1 || fail "the C++ tests do not build; see $build.log"
section "Tests on this tier" ctest --test-dir "$build" --output-on-failure -R 'amx'
section "Kernels alone" "$python" -m kt_kernel.bench kernels
section "The choice of KT_GEMM=auto" env KT_LOG_LEVEL=INFO "$python" -m kt_kernel.bench layer --method AMXINT8 --tokens 1 --rounds 3
for method in AMXINT8 AMXINT4 BF16; do
  for gemm in native onednn; do
    [[ $method/$gemm != AMXINT4/onednn ]] || continue
    section "$method, KT_GEMM=$gemm" env KT_GEMM=$gemm "$python" -m kt_kernel.bench layer --method "$method" --tokens 1,16,256,1024,4096
  done
done
section "AMXINT4 in groups of 128" "$python" -m kt_kernel.bench layer --method AMXINT4 --group-size 128 --tokens 1,16,256,1024,4096
echo "amx_check: the report is in $report"
