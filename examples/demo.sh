#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The whole story by one command: installs what is missing, builds optimised, trains a small base on English prose, adapts it
# to C++ code by full fine-tuning, LoRA and PiSSA at the same budget, and prints what each cost and what each forgot.
#
#   bash examples/demo.sh                                          prose: the fortunes package; code: Eigen's and libstdc++'s headers
#   bash examples/demo.sh --source PATH... --target PATH...        your own files or folders
#   bash examples/demo.sh --rank 16 --method full,lora,pissa,loftq4   any option of build/demo/examples/finetune (--help lists them)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

interrupted() {
  echo >&2
  echo "demo.sh: interrupted; run it again to go on, nothing half-written is left" >&2
  exit 130
}
trap interrupted INT TERM

has_option() {  # whether an option is among the arguments, as --name or --name=…
  local name=$1 argument
  shift
  for argument in "$@"; do
    if [[ $argument == "$name" || $argument == "$name="* ]]; then return 0; fi
  done
  return 1
}
has_header() {
  local header=$1 folder
  local -a folders=(/usr/include /usr/local/include)
  if [[ -n ${CPLUS_INCLUDE_PATH:-} ]]; then IFS=: read -r -a more <<< "$CPLUS_INCLUDE_PATH" && folders+=("${more[@]}"); fi
  if [[ -n ${CMAKE_PREFIX_PATH:-} ]]; then IFS=: read -r -a more <<< "$CMAKE_PREFIX_PATH" && folders+=("${more[@]/%//include}"); fi
  for folder in "${folders[@]}"; do
    if [[ -e $folder/$header ]]; then return 0; fi
  done
  return 1
}

# ---- what is missing -------------------------------------------------------------------------------------------------
missing=()
command -v "${CXX:-c++}" > /dev/null || missing+=(g++)
command -v cmake > /dev/null || missing+=(cmake)
command -v ninja > /dev/null || missing+=(ninja-build)
has_header eigen3/Eigen/Core || has_header Eigen/Core || missing+=(libeigen3-dev)
has_header CLI/CLI.hpp || missing+=(libcli11-dev)
has_header nlohmann/json.hpp || missing+=(nlohmann-json3-dev)
prose=/usr/share/games/fortunes
if ! has_option --source "$@" && ! has_option --base "$@" && [[ ! -f $prose/fortunes ]]; then missing+=(fortunes); fi

if ((${#missing[@]} > 0)); then
  if ! command -v apt-get > /dev/null; then
    echo "demo.sh: this machine has no apt-get. Please install what these Debian packages hold: ${missing[*]}" >&2
    echo "         (or name your own text with --source and --target), then run it again." >&2
    exit 1
  fi
  as_root=()
  if ((EUID != 0)); then
    if ! command -v sudo > /dev/null; then
      echo "demo.sh: needs root or sudo to install ${missing[*]}; as root: apt-get install ${missing[*]}" >&2
      exit 1
    fi
    as_root=(sudo)
  fi
  echo "Installing ${missing[*]}" >&2
  "${as_root[@]}" apt-get update -qq
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" > /dev/null
fi

# ---- build -----------------------------------------------------------------------------------------------------------
log=build/demo/build.log
mkdir -p build/demo
echo "Building (log: $log)" >&2
if ! { cmake --preset demo && cmake --build --preset demo --target finetune; } > "$log" 2>&1; then
  tail -n 30 "$log" >&2
  echo "demo.sh: the build failed; the whole log is $log" >&2
  exit 1
fi

# ---- run -------------------------------------------------------------------------------------------------------------
arguments=()
if ! has_option --source "$@" && ! has_option --base "$@"; then
  # The files themselves: not their indices and second names, nor what fortunes-off may have put in a folder below.
  arguments+=(--source)
  for file in "$prose"/*; do
    if [[ -f $file && ! -L $file && $file != *.dat ]]; then arguments+=("$file"); fi
  done
fi
if ! has_option --target "$@"; then
  arguments+=(--target)
  for folder in /usr/include/eigen3 /usr/local/include/eigen3 "$(find /usr/include/c++ -mindepth 1 -maxdepth 1 2> /dev/null | sort -V | tail -n 1)"; do
    if [[ -n $folder && -d $folder ]]; then arguments+=("$folder"); fi
  done
  if ((${#arguments[@]} > 0)) && [[ ${arguments[-1]} == --target ]]; then
    echo "demo.sh: found no C++ headers to adapt to; name text with --target PATH..." >&2
    exit 1
  fi
fi
has_option --output "$@" || arguments+=(--output build/demo/results)
exec build/demo/examples/finetune "${arguments[@]}" "$@"
