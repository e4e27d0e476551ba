#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# need_packages of .packages.sh on machines that are not this one, played by stub commands: what it installs, what it says,
# and whether the scripts go on. Usage: packages.sh ROOT_OF_THE_TREE
set -euo pipefail
root=$1
stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT
bash=$(command -v bash)

stub() {  # stub NAME BODY: a command on the stage
  printf '#!%s\n%s\n' "$bash" "$2" > "$stage/bin/$1"
  chmod +x "$stage/bin/$1"
}
machine() {  # a machine with nothing but what is named: dpkg knows no package, headers lie under $stage/include
  rm -rf "$stage/bin" "$stage/include" "$stage/log"
  mkdir -p "$stage/bin" "$stage/include"
  : > "$stage/log"
  local tool
  for tool in "$@"; do
    case $tool in
      root) stub id 'echo 0' ;;
      user) stub id 'echo 1000' ;;
      sudo) stub sudo 'echo "sudo $*" >> '"$stage/log"'; "$@"' ;;
      apt-get) stub apt-get 'echo "apt-get $*" >> '"$stage/log" ;;
      apt-get-fails) stub apt-get 'echo "E: no network" >&2; exit 100' ;;
      *) stub "$tool" : ;;
    esac
  done
  stub dpkg-query 'exit 1'
  ln -s "$(command -v env)" "$stage/bin/env"
}
run() {  # run FUNCTION ARGUMENTS: in a shell that sees only the stage; sets status and output
  status=0
  output=$(env -i PATH="$stage/bin" CPLUS_INCLUDE_PATH="$stage/include" "$bash" -c \
    'source "$1"; shift; "$@"' _ "$root/.packages.sh" "$@" 2>&1) || status=$?
}
expect() {  # expect STATUS TEXT_IN_OUTPUT TEXT_IN_LOG
  if ((status != $1)) || [[ $output != *"$2"* ]] || ! grep -qF -- "$3" <(cat "$stage/log"; echo); then
    printf 'line %s: status %s, expected %s with "%s" said and "%s" run\n%s\n-- run:\n' \
      "${BASH_LINENO[0]}" "$status" "$1" "$2" "$3" "$output" >&2
    cat "$stage/log" >&2
    exit 1
  fi
}

machine root apt-get cmake ninja c++
run need_packages g++ cmake ninja-build
expect 0 "" ""
[[ -z $output && ! -s $stage/log ]]  # everything there: not a word, nothing run
mkdir -p "$stage/include/CLI" && touch "$stage/include/CLI/CLI.hpp"
if [[ ! -e /usr/include/CLI/CLI.hpp ]]; then run need_packages libnone-dev libcli11-dev; else run need_packages libnone-dev; fi
expect 0 "Installing libnone-dev" "apt-get install -y -qq --no-install-recommends libnone-dev"
grep -q 'apt-get update' "$stage/log"
if grep -q sudo "$stage/log"; then exit 1; fi

# numpy is there when a Python has it, whoever installed it.
machine root apt-get python3
run need_packages python3 python3-numpy
expect 0 "" ""
[[ ! -s $stage/log ]]
if ! /usr/bin/python3 -c 'import numpy' 2> /dev/null; then
  stub python3 'exit 1'
  run need_packages python3 python3-numpy
  expect 0 "Installing python3-numpy" "install -y -qq --no-install-recommends python3-numpy"
fi

machine user sudo apt-get
run need_packages g++ libnone-dev
expect 0 "Installing g++ libnone-dev" "sudo env DEBIAN_FRONTEND=noninteractive apt-get install"

machine user apt-get  # neither root nor sudo: what to do by hand, and nothing run
run need_packages cmake libnone-dev
expect 1 "Missing packages: cmake libnone-dev. Please have them installed, as root: apt-get install cmake libnone-dev" ""
[[ ! -s $stage/log ]]

machine root apt-get-fails
run need_packages cmake libnone-dev
expect 1 "apt-get failed. By hand, as root: apt-get install cmake libnone-dev" ""
[[ $output == *"E: no network"* ]]

machine user cmake  # no apt-get, no compiler
run need_packages g++ cmake libnone-dev
expect 1 "no apt-get. Please install what these Debian packages hold: g++ libnone-dev" ""
machine user cmake ninja c++  # no apt-get, but CMake may know more than we do
run need_packages g++ cmake ninja-build libnone-dev
expect 0 "taking it that CMake finds what these Debian packages hold: libnone-dev" ""

# What each script needs: the tests run the programs against numpy, CI runs the scans over MPI.
[[ $(env -i "$bash" -c 'source "$1"; echo "${packages_test[*]}"' _ "$root/.packages.sh") == *python3-numpy* ]]
[[ $(env -i PATH=/nowhere "$bash" -c 'source "$1"; echo "${packages_ci[*]}"' _ "$root/.packages.sh") == *mpi-default-dev*npm* ]]

# The scripts all ask here, and nowhere else.
for script in examples/demo.sh tests/test.sh .ci/run; do
  grep -q '^source .packages.sh$' "$root/$script"
  grep -q 'need_packages "${packages_' "$root/$script"
  if grep -q 'apt-get' "$root/$script"; then
    echo "$script calls apt-get itself" >&2
    exit 1
  fi
  "$bash" -n "$root/$script"
done
echo "packages: ok"
