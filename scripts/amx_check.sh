#!/usr/bin/env bash
# Checks the kernels in AMX tiles on a machine that has AMX, and measures them. Needs an installed clone (install.sh
# --test --editable) and an idle machine; takes about ten minutes.
#
# Usage: scripts/amx_check.sh [FILE]
#   FILE   where the report goes; amx-report.txt here by default. Please send it: docs/performance.md says what was
#          predicted.
#
# Exit code 0 only if every part of it ran and every test passed.
set -Eeuo pipefail

usage() {
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
}

fail() {
  printf 'amx_check: error: %s\n' "$*" >&2
  exit 1
}

case ${1:-} in
  -h | --help) usage && exit 0 ;;
  -*) usage >&2 && exit 2 ;;
esac
(($# <= 1)) || fail "one FILE at most; $# were given"
report=$(realpath -m -- "${1:-amx-report.txt}")
python=${PYTHON:-}
[[ $python != */* ]] || python=$(realpath -s -- "$python")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${python:-$([[ -x .venv/bin/python ]] && echo "$PWD/.venv/bin/python" || echo python3)}
build=$PWD/build/amx-check
failed=()

# section TITLE COMMAND...: what the command prints, and its exit code where that is not 0.
section() {
  local title=$1 code=0
  shift
  printf '\n## %s\n\n`%s`\n\n' "$title" "$*" >>"$report"
  "$@" >>"$report" 2>&1 || code=$?
  ((code)) || return 0
  printf '\nexit code %d\n' "$code" >>"$report"
  failed+=("$title (exit code $code)")
}

unset KT_FORCE_ISA KT_GEMM KT_DETERMINISTIC
tier=$("$python" -c 'from kt_kernel import _ext; print(_ext.cpu_features()["tier"])' 2>&1 | tail -n 1) || true
case $tier in
  amx) ;;
  reference | avx2 | avx512) fail "this machine's tier is $tier; run it where python -m kt_kernel.collect_env says amx" ;;
  *) fail "$python cannot use kt_kernel ($tier); run install.sh --test --editable, or set PYTHON" ;;
esac
{ printf '# AMX report\n' >"$report"; } 2>/dev/null || fail "$report cannot be written; give another FILE"

section "Machine" "$python" -m kt_kernel.collect_env
mkdir -p "$build"
{ cmake -S . -B "$build" -G Ninja -DKT_BUILD_TESTS=ON -DCMAKE_BUILD_TYPE=Release && cmake --build "$build"; } \
  >"$build/log" 2>&1 || fail "the C++ tests do not build; see $build/log"
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
if ((${#failed[@]})); then
  printf 'amx_check: %s\n' "${failed[@]}" >&2
  exit 1
fi
