#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# How the time of a truncated SVD grows with the rows, the columns and the rank, beside its flops at the speed of a product.
#   benchmarks/growth.sh PROGRAM OUT.svg     PROGRAM: benchmark_truncated_svd; needs gnuplot. The figures go to OUT.csv.
set -euo pipefail
if (($# != 2)); then
  sed -n '3,4s/^# *//p' "$0" >&2
  exit 2
fi
program=$1 svg=$2 csv=${2%.svg}.csv
"$program" --growth > "$csv.partial"
mv "$csv.partial" "$csv"
# One file a curve: lines of the CSV where the other two sizes are those of the middle point.
curves=$(mktemp -d)
trap 'rm -rf "$curves"' EXIT
grep '^[0-9]' "$csv" | tr ',' ' ' > "$curves/all"
awk '$1 == 2048 && $2 == 2048' "$curves/all" | sort -n -k3 > "$curves/rank"
awk '$2 == 2048 && $3 == 16' "$curves/all" | sort -n -k1 > "$curves/rows"
awk '$1 == 2048 && $3 == 16' "$curves/all" | sort -n -k2 > "$curves/columns"
gnuplot << PLOT
set terminal svg size 960,320 font "sans-serif,12" background "white"
set output "$svg.partial"
set multiplot layout 1,3
set logscale xy
set grid
set key top left Left reverse samplen 2
set yrange [1:1000]
set ylabel "ms"
set xtics (8, 16, 32, 64, 128, 256, 1024, 2048, 4096, 8192)
# Column 7 is the time in ms, 8 the flops in 1e9, 10 the share of the product's speed: 7·10 is the flops at that speed.
do for [curve in "rank rows columns"] {
  column = curve eq "rank" ? 3 : curve eq "rows" ? 1 : 2
  set title curve eq "rank" ? "2048 × 2048" : curve eq "rows" ? "rows × 2048, rank 16" : "2048 × columns, rank 16"
  set xlabel curve
  if (column == 3) { set xrange [6:340] } else { set xrange [800:10500] }
  plot "$curves/".curve using column:7 with linespoints lw 2 pt 7 ps 0.6 title "measured", \
       "$curves/".curve using column:(\$7*\$10) with lines lw 2 dt 2 title "flops at gemm speed"
}
unset multiplot
PLOT
mv "$svg.partial" "$svg"
