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

# ---- what is missing -------------------------------------------------------------------------------------------------
source .packages.sh
prose=/usr/share/games/fortunes
needs_prose=0
if ! has_option --source "$@" && ! has_option --base "$@"; then needs_prose=1; fi
if ((needs_prose)) && [[ ! -f $prose/fortunes ]]; then packages_demo+=(fortunes); fi
need_packages "${packages_demo[@]}" || exit 1
if ((needs_prose)) && [[ ! -f $prose/fortunes ]]; then
  echo "demo.sh: found no prose in $prose: install what Debian's package fortunes holds, or name your own text with --source PATH..." >&2
  exit 1
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
if ((needs_prose)); then
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
