# SPDX-License-Identifier: Apache-2.0
# Which Debian packages the scripts of this tree stand on, and the one function that installs what is missing of them.
# Sourced by tests/test.sh, examples/demo.sh and .ci/run.

# To build anything: a compiler, CMake, Ninja, and the one library the headers need.
packages_build=(g++ cmake ninja-build libeigen3-dev)
# The optional parts (io, xtensor, the lowrank program) and the tests.
packages_test=("${packages_build[@]}" nlohmann-json3-dev libxtensor-dev libcli11-dev doctest-dev)
# Everything CI does: a second compiler with OpenMP, sanitizers and fuzzer, benchmarks and their peers, the reference.
packages_ci=("${packages_test[@]}" clang libomp-dev libclang-rt-dev libbenchmark-dev libopenblas-dev liblapacke-dev
  libspectra-dev doxygen python3-numpy)
# The peers written in JavaScript come through npm, whoever installed it.
command -v npm > /dev/null || packages_ci+=(nodejs npm)

# need_packages PACKAGE...: returns at once when all are installed; else installs the missing ones by apt-get, or, where
# that is not possible, says what to install. On a system without dpkg nothing can be checked: it says what is wanted,
# goes on when there is a compiler and CMake, and leaves the rest to CMake's own messages.
need_packages() {
  if ! command -v dpkg-query >/dev/null; then
    local tool
    for tool in cmake ninja c++; do
      if ! command -v "$tool" >/dev/null; then
        echo "$tool not found. Please install what these Debian packages hold, by your system's means: $*" >&2
        return 1
      fi
    done
    echo "Not a Debian system: taking it that the equivalents of these are installed: $*"
    return 0
  fi
  local package missing=()
  for package in "$@"; do
    [[ "$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null)" == installed* ]] || missing+=("$package")
  done
  ((${#missing[@]} == 0)) && return 0
  local sudo=()
  if ((EUID != 0)); then
    if ! command -v sudo >/dev/null; then
      echo "Missing packages: ${missing[*]}. Please have them installed: apt-get install ${missing[*]}" >&2
      return 1
    fi
    sudo=(sudo)
  fi
  echo "Installing ${missing[*]}"
  "${sudo[@]}" apt-get update -qq &&
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null || {
    echo "apt-get failed. By hand: apt-get install ${missing[*]}" >&2
    return 1
  }
}
