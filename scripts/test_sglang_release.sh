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
{
  echo "scripts/test_sglang_release.sh $version, $(date -u +%Y-%m-%d), commit $(git describe --always --dirty)"
  "$venv/bin/python" -m kt_kernel.collect_env
  echo
  "$venv/bin/python" -m pytest tests/python/test_cuda_sync.py -q -rs --timeout=900
  "$venv/bin/python" -m pytest tests/python -q -m 'server and not full' -rs --durations=0 --timeout=900
} 2>&1 | sed -u "s|$PWD|.|g" | tee "$report"
