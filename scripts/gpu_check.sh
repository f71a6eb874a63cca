#!/usr/bin/env bash
# Builds kt_kernel on a machine with an NVIDIA GPU and checks the hand-off on hardware. Needs no network.
#
# Usage: scripts/gpu_check.sh --pack     where apt and SGLang are: put what such a machine lacks into .gpu/
#        scripts/gpu_check.sh            on the GPU machine (Python with torch, pybind11, pytest; CMake, ninja, g++)
#        scripts/gpu_check.sh --double   here: the same tests against the CUDA test double; says nothing about hardware
#
# Tests, each with doorbells and with host functions: eager and replayed graphs against the CPU's own answer bit for bit,
# masks, streams, errors, SGLang's KTEPWrapperMethod in a graph; compute-sanitizer over the eager ones; then the figures
# of tests/gpu/measure.py. Writes docs/gpu-results.md, and a copy with all logs into $OUT where that is set.
set -Eeuo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}
folder=$PWD/build/gpu-check
double=''

fail() {
  printf 'gpu_check: error: %s\n' "$*" >&2
  exit 1
}

pack() {
  local wrapper
  [[ -f /usr/include/numa.h ]] || fail "libnuma's headers are missing; run 'apt-get install libnuma-dev' first"
  wrapper=$("$python" -c 'import importlib.util as u, os, sys; s = u.find_spec("sglang"); s or sys.exit(1); print(os.path.join(os.path.dirname(s.origin), "srt/layers/moe/kt_ep_wrapper.py"))') ||
    fail "$python has no SGLang; set PYTHON to the environment's interpreter"
  rm -rf .gpu
  mkdir -p .gpu/include .gpu/lib
  cp /usr/include/numa.h /usr/include/numaif.h /usr/include/numacompat1.h .gpu/include/
  cp -L "$(ls /usr/lib/*/libnuma.so.1)" .gpu/lib/libnuma.so.1
  ln -s libnuma.so.1 .gpu/lib/libnuma.so
  cp "$wrapper" .gpu/
  git rev-parse --short HEAD >.gpu/commit
  echo "packed into .gpu: $(du -sh .gpu | cut -f1); carry this folder along"
}

build() {
  local options=()
  if [[ -d .gpu/include && ! -f /usr/include/numa.h ]]; then
    # a link does not survive every way of copying
    [[ -e .gpu/lib/libnuma.so ]] || cp .gpu/lib/libnuma.so.1 .gpu/lib/libnuma.so
    options+=("-DKT_NUMA_INCLUDE=$PWD/.gpu/include" "-DKT_NUMA_LIBRARY=$PWD/.gpu/lib/libnuma.so")
    export LD_LIBRARY_PATH=$PWD/.gpu/lib:${LD_LIBRARY_PATH:-}
  fi
  "$python" - "$folder/build" "${options[@]}" <<'PYTHON'
import subprocess, sys
from pathlib import Path

import pybind11
import torch

build, options = sys.argv[1], sys.argv[2:]
subprocess.run(
    ["cmake", "-G", "Ninja", "-S", ".", "-B", build, "-DCMAKE_BUILD_TYPE=Release", "-DKT_BUILD_EXTENSION=ON",
     f"-DKT_TORCH_ROOT={Path(torch.__file__).parent}", f"-DKT_TORCH_VERSION={torch.__version__}",
     f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}",
     f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={Path.cwd() / 'kt_kernel'}", *options], check=True)
subprocess.run(["cmake", "--build", build, "--target", "_ext"], check=True)
Path("kt_kernel/_build_info.py").write_text(f'TORCH_VERSION = "{torch.__version__}"\n')
PYTHON
}

# step NAME COMMAND...: runs one, notes how it ended; the others run all the same.
failed=0
step() {
  local name=$1 start=$SECONDS code=0
  shift
  "$@" >"$folder/${name// /-}.log" 2>&1 || code=$?
  tail -n 3 "$folder/${name// /-}.log"
  if ((code)); then
    failed=1
    tail -n 60 "$folder/${name// /-}.log"
  fi
  echo "- $name: $([[ $code == 0 ]] && echo passed || echo "FAILED (exit code $code)") in $((SECONDS - start)) s" | tee -a "$folder/steps.txt"
}

case $* in
  --pack)
    pack
    exit 0
    ;;
  --double) double=1 ;;
  '') ;;
  --help)
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
    exit 0
    ;;
  *)
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
    exit 2
    ;;
esac

missing=$("$python" -c 'import importlib.util as u; print(*(m for m in ("pybind11", "pytest", "torch") if not u.find_spec(m)))') ||
  fail "$python does not run; set PYTHON to an interpreter"
[[ -z $missing ]] || fail "$python lacks ${missing// /, }; './install.sh --test' installs them into .venv, or set PYTHON to an interpreter that has them"
if [[ -n $double ]]; then
  library=$PWD/build/test/libfake_cuda.so
  [[ -f $library ]] || fail "$library is missing; scripts/dev.sh test builds it first"
  export KT_CUDA_DRIVER=$library
else
  "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    fail "torch of $python sees no CUDA device; run this on a machine that has one, or with --double"
fi
rm -rf "$folder"
mkdir -p "$folder"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 KT_GPU_CHECK_FOLDER=$folder
if [[ -z $double ]]; then
  step "build" build
  ((failed == 0)) || fail "the build failed; its log is $folder/build.log"
fi
for way in doorbell hostfunc; do
  export KT_CUDA_SIGNAL=$way
  step "tests with $way" "$python" -m pytest -q -p no:cacheprovider tests/gpu/test_gpu.py
  step "figures with $way" "$python" tests/gpu/measure.py --json "$folder/$way.json"
done
if [[ -z $double ]]; then
  unset KT_CUDA_SIGNAL
  step "doorbell probe" "$python" -m kt_kernel.device_stream 0
  CUDA_DEVICE_MAX_CONNECTIONS=1 KT_CUDA_SIGNAL=doorbell step "tests on one channel" "$python" -m pytest -q -p no:cacheprovider tests/gpu/test_gpu.py
  if command -v compute-sanitizer >/dev/null; then
    KT_CUDA_SIGNAL=hostfunc step "compute-sanitizer" compute-sanitizer --error-exitcode 9 "$python" -m pytest -q -p no:cacheprovider tests/gpu/test_gpu.py -k eager
  else
    echo "- compute-sanitizer: not on this machine" >>"$folder/steps.txt"
  fi
  step "machine" "$python" -m kt_kernel.collect_env
  commit=$(git rev-parse --short HEAD 2>/dev/null || cat .gpu/commit)
  # a step that failed may have left no figures: what there is comes back all the same
  [[ -z ${OUT:-} ]] || tar -C "$folder" --exclude build -czf "$OUT/logs.tar.gz" .
  "$python" tests/gpu/report.py "$folder" "$commit" >"$folder/page" ||
    fail "figures are missing; see the steps above and the logs in $folder"
  cp "$folder/page" docs/gpu-results.md
  [[ -z ${OUT:-} ]] || cp docs/gpu-results.md "$OUT/"
fi
exit "$failed"
