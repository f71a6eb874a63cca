#!/usr/bin/env bash
# Runs the tests of servers and of the hand-off on a GPU on another SGLang release than the pinned one; writes what
# happened to docs/.
#
# Usage: scripts/test_sglang_release.sh [VERSION]      default: 0.5.23, the newest release when this was written
#
# The release is installed into .venv-sglang-VERSION with the tested list of requirements/sglang-cpu.txt (it runs on the
# same torch and transformers although it pins newer ones). The output stands in docs/sglang-VERSION.txt.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

version=${1:-0.5.23}
venv=$PWD/.venv-sglang-$version
report=docs/sglang-$version.txt

unset VIRTUAL_ENV CONDA_PREFIX KT_FORCE_ISA
KT_SGLANG_VERSION=$version ./install.sh --test --editable --venv "$venv"
parts=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null; rm -rf "$parts"' EXIT

# lane NAME MARKERS FILES...: Python tests with this release; output into a file.
lane() (
  exec "$venv/bin/python" -m pytest -q -rs --durations=0 --timeout=900 -m "$2" "${@:3}" >"$parts/$1" 2>&1
)

# Starting a server is one core's imports: two lanes take little more than half of the time of one.
mapfile -t others < <(grep -l 'pytest.mark.server' tests/python/test_*.py | grep -v test_server_placement)
commit=$(git describe --always --dirty)
code=0
lane first 'not full' tests/python/test_server_placement.py tests/python/test_cuda_sync.py &
first=$!
lane second 'server and not full' "${others[@]}" || code=$?
wait "$first" || code=$?
{
  echo "scripts/test_sglang_release.sh $version, $(date -u +%Y-%m-%d), commit $commit"
  "$venv/bin/python" -m kt_kernel.collect_env
  echo
  cat "$parts/first" "$parts/second"
} 2>&1 | sed "s|$PWD|.|g" | tee "$report"
exit "$code"
