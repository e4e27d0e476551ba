# SPDX-License-Identifier: Apache-2.0
# Which Debian packages the scripts of this tree stand on, and need_packages, which installs what is missing of them.
# Sourced by tests/test.sh, examples/demo.sh and .ci/run.

# To build anything: a compiler, CMake, Ninja; and Eigen, which the library does not need, but its examples and tests do.
packages_build=(g++ cmake ninja-build libeigen3-dev)
# The main job of examples/demo.sh; its prose comes from the package fortunes unless the user brings text.
packages_demo=("${packages_build[@]}" nlohmann-json3-dev libcli11-dev)
# The optional parts (io, xtensor, the lowrank program) and the tests, those of the programs against numpy among them.
packages_test=("${packages_build[@]}" nlohmann-json3-dev libxtensor-dev libcli11-dev doctest-dev python3 python3-numpy)
# Everything CI does: a second compiler with OpenMP, sanitizers and fuzzer, MPI, benchmarks and their peers, the reference.
packages_ci=("${packages_test[@]}" clang libomp-dev libclang-rt-dev mpi-default-dev libbenchmark-dev libopenblas-dev liblapacke-dev
  libspectra-dev doxygen)
# The peers written in JavaScript come through npm, whoever installed it.
command -v npm > /dev/null || packages_ci+=(nodejs npm)

# has_header FILE: whether a header lies where compilers or CMake look.
has_header() {
  local header=$1 folder more=() folders=(/usr/include /usr/local/include)
  if [[ -n ${CPLUS_INCLUDE_PATH:-} ]]; then IFS=: read -r -a more <<< "$CPLUS_INCLUDE_PATH" && folders+=("${more[@]}"); fi
  if [[ -n ${CMAKE_PREFIX_PATH:-} ]]; then IFS=: read -r -a more <<< "$CMAKE_PREFIX_PATH" && folders+=("${more[@]/%//include}"); fi
  for folder in "${folders[@]}"; do
    if [[ -e $folder/$header ]]; then return 0; fi
  done
  return 1
}

# has_package PACKAGE: whether it is installed, or what we want of it is there by other means.
has_package() {
  case $1 in
    g++) command -v "${CXX:-c++}" ;;
    cmake | clang | doxygen | nodejs | npm | python3) command -v "${1/nodejs/node}" ;;
    ninja-build) command -v ninja ;;
    libeigen3-dev) has_header eigen3/Eigen/Core || has_header Eigen/Core ;;
    nlohmann-json3-dev) has_header nlohmann/json.hpp ;;
    libxtensor-dev) has_header xtensor/xtensor.hpp || has_header xtensor/containers/xtensor.hpp ;;
    libcli11-dev) has_header CLI/CLI.hpp ;;
    doctest-dev) has_header doctest/doctest.h ;;
    # Any of the two that tests/CMakeLists.txt asks: a version manager's Python, or the system's.
    python3-numpy) python3 -c 'import numpy' 2> /dev/null || /usr/bin/python3 -c 'import numpy' 2> /dev/null ;;
    mpi-default-dev) command -v mpicxx ;;
    *) false ;;
  esac > /dev/null || [[ "$(dpkg-query -W -f='${db:Status-Status}' "$1" 2> /dev/null)" == installed* ]]
}

# need_packages PACKAGE...: returns at once when all are there; else installs the missing ones by apt-get, or, where that
# is not possible, says what to install. Without apt-get it goes on when there is a compiler, CMake and Ninja: headers may
# lie where only CMake finds them, and its own messages tell when they do not.
need_packages() {
  local package missing=() tools=()
  for package in "$@"; do
    has_package "$package" || missing+=("$package")
  done
  ((${#missing[@]} == 0)) && return 0
  if ! command -v apt-get > /dev/null; then
    for package in "${missing[@]}"; do
      case $package in g++ | cmake | ninja-build) tools+=("$package") ;; esac
    done
    if ((${#tools[@]} > 0)); then
      echo "This machine has no apt-get. Please install what these Debian packages hold: ${missing[*]}" >&2
      return 1
    fi
    echo "No apt-get here: taking it that CMake finds what these Debian packages hold: ${missing[*]}" >&2
    return 0
  fi
  local sudo=()
  if (($(id -u) != 0)); then
    if ! command -v sudo > /dev/null; then
      echo "Missing packages: ${missing[*]}. Please have them installed, as root: apt-get install ${missing[*]}" >&2
      return 1
    fi
    sudo=(sudo)
  fi
  echo "Installing ${missing[*]}" >&2
  "${sudo[@]}" apt-get update -qq &&
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" > /dev/null || {
    echo "apt-get failed. By hand, as root: apt-get install ${missing[*]}" >&2
    return 1
  }
}
