#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What including lowrank costs a translation unit, beside what its users include anyway. Prints the table of
# docs/compile-cost.md: CPU seconds, best of RUNS (default 3), and the ratio to Eigen/Core by the same compiler.
#   bash benchmarks/compile_cost.sh [COMPILER...]     default: g++ and clang++, as far as they are there
# A row that ends in "compiled" is the same file as a user of lowrank::compiled compiles it (LOWRANK_COMPILED).
# Environment: FLAGS (default: those we recommend, -std=c++20 -O3 -march=native -fopenmp), EIGEN (default /usr/include/eigen3).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
runs=${RUNS:-3} flags=${FLAGS:--std=c++20 -O3 -march=native -fopenmp}
compilers=("$@")
if ((${#compilers[@]} == 0)); then
  for c in g++ clang++; do if command -v $c > /dev/null; then compilers+=($c); fi; done
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

names=() sources=()
row() { names+=("$1"); sources+=("$2"); }
both() {  # the row as it is, and over the compiled library
  row "$1" "$2"
  row "the same, compiled" "#define LOWRANK_COMPILED
$2"
}
row '`<vector>`, `<string>`, `<cmath>`, `<algorithm>`' '#include <algorithm>
#include <cmath>
#include <string>
#include <vector>'
row '`Eigen/Core`' '#include <Eigen/Core>'
row '`Eigen/Core`, one `MatrixXf` product' '#include <Eigen/Core>
void f(const Eigen::MatrixXf& a, const Eigen::MatrixXf& b, Eigen::MatrixXf& c) { c.noalias() = a * b; }'
row '`lowrank/adapter/lora.hpp`' '#include "lowrank/adapter/lora.hpp"'
row '`lowrank/adapter/lora.hpp`, `LoraLinear<float>` forward and backward' '#include "lowrank/adapter/lora.hpp"
using M = lowrank::Matrix<float>;
void f(lowrank::LoraLinear<float>& l, const M& x, M& y, lowrank::LoraWorkspace<float>& ws) {
  l.forward(x, y, ws);
  l.backward(x, y, ws);
}'
row '`lowrank/eigen.hpp`' '#include "lowrank/eigen.hpp"'
row '`lowrank/quant/quantised_matrix.hpp`' '#include "lowrank/quant/quantised_matrix.hpp"'
row '`lowrank/init/pissa.hpp`' '#include "lowrank/init/pissa.hpp"'
both '`lowrank/init/pissa.hpp`, `pissa` of a float matrix' '#include "lowrank/init/pissa.hpp"
auto f(const lowrank::Matrix<float>& w) { return lowrank::pissa(w, {.rank = 8}); }'
both '`lowrank/init/loftq.hpp`, `loftq` of a float matrix' '#include "lowrank/init/loftq.hpp"
auto f(const lowrank::Matrix<float>& w) { return lowrank::loftq(w, {.rank = 8}); }'
both '`LoraLinear` over a `QuantisedMatrix`, forward and backward' '#include "lowrank/adapter/lora.hpp"
#include "lowrank/quant/quantised_matrix.hpp"
using M = lowrank::Matrix<float>;
void f(lowrank::LoraLinear<float, lowrank::QuantisedMatrix<float>>& l, const M& x, M& y, M& dx,
       lowrank::LoraWorkspace<float>& ws) {
  l.forward(x, y, ws);
  l.backward(x, y, ws, dx);
}'
both '`lowrank/spectrum/intruders.hpp`, `find_intruders` in two float matrices' '#include "lowrank/spectrum/intruders.hpp"
auto f(const lowrank::Matrix<float>& w, const lowrank::Matrix<float>& t) { return lowrank::find_intruders(w, t); }'
row '`Eigen/SVD`, one `BDCSVD<MatrixXf>`' '#include <Eigen/SVD>
auto f(const Eigen::MatrixXf& w) { return Eigen::BDCSVD<Eigen::MatrixXf>(w, 20).singularValues().eval(); }'
row '`lowrank/lowrank.hpp`, everything that needs no other library' '#include "lowrank/lowrank.hpp"'
if [[ -e /usr/include/xtensor/xtensor.hpp || -e /usr/include/xtensor/containers/xtensor.hpp ]]; then
  row 'xtensor: `xadapt.hpp`, `xtensor.hpp`, `xview.hpp`, `xstrided_view.hpp`' '#if __has_include(<xtensor/containers/xadapt.hpp>)
#include <xtensor/containers/xadapt.hpp>
#include <xtensor/views/xstrided_view.hpp>
#include <xtensor/views/xview.hpp>
#else
#include <xtensor/xadapt.hpp>
#include <xtensor/xstrided_view.hpp>
#include <xtensor/xview.hpp>
#endif'
  row '`lowrank/xtensor.hpp`' '#include "lowrank/xtensor.hpp"'
fi

seconds() {  # CPU milliseconds of the fastest of $runs compilations of $2 by $1; what takes 10 s is not repeated
  local best= i spent TIMEFORMAT='%U %S'
  for ((i = 0; i < runs; ++i)); do
    # shellcheck disable=SC2086
    { time "$1" $flags -I"$root/include" -isystem "${EIGEN:-/usr/include/eigen3}" -c "$2" -o "$work/out.o" 2> "$work/err"; } \
      2> "$work/time" || { cat "$work/err" >&2; return 1; }
    spent=$(awk '{ printf "%d", 1000 * ($1 + $2) }' "$work/time")
    if [[ -z $best ]] || ((spent < best)); then best=$spent; fi
    if ((best > 10000)); then break; fi
  done
  echo "$best"
}

printf '%s; %s; CPU seconds, best of %d\n\n' "$(sed -n 's/^model name\s*: //p' /proc/cpuinfo 2> /dev/null | head -1)" "$flags" "$runs"
printf '| a translation unit with |'
for c in "${compilers[@]}"; do printf ' %s |' "$("$c" --version | head -1 | sed 's/ (Debian[^)]*)//; s/Debian //')"; done
printf '\n|---|'
for c in "${compilers[@]}"; do printf -- '---|'; done
printf '\n'
declare -A core
for i in "${!names[@]}"; do
  printf '%s\n' "${sources[$i]}" > "$work/unit.cpp"
  printf '| %s |' "${names[$i]}"
  for c in "${compilers[@]}"; do
    ms=$(seconds "$c" "$work/unit.cpp")
    if [[ ${names[$i]} == '`Eigen/Core`' ]]; then core[$c]=$ms; fi
    if [[ -n ${core[$c]:-} ]]; then
      awk -v t="$ms" -v e="${core[$c]}" 'BEGIN { printf " %.2f s (%.2f×) |", t / 1e3, t / e }'
    else
      awk -v t="$ms" 'BEGIN { printf " %.2f s |", t / 1e3 }'
    fi
  done
  printf '\n'
done
