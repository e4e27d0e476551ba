#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# The lowrank program on a checkpoint of LLaMA-2-7B's shapes: time, its split, and peak resident memory.
#
#     benchmarks/io.sh build/release/examples/lowrank CHECKPOINT OUT [METHOD] [more options of init]
#
# CHECKPOINT is made by benchmarks/make_checkpoint.py when it does not exist, SCALE=8 in the environment makes a small one. OUT
# needs as much room again.
set -eu
program=$1 checkpoint=$2 out=$3 method=${4:-pissa}
[ $# -gt 4 ] && shift 4 || shift $#
if [ ! -d "$checkpoint" ]; then
  for python in python3 /usr/bin/python3; do "$python" -c 'import numpy' 2> /dev/null && break; done
  "$python" "$(dirname "$0")/make_checkpoint.py" "$checkpoint" --scale "${SCALE:-1}"
fi
/usr/bin/env python3 - "$program" "$checkpoint" "$out" "$method" "$@" <<'PY'
import json, os, resource, subprocess, sys, time
program, checkpoint, out, method = sys.argv[1:5]
start = time.time()
r = subprocess.run([program, "init", method, checkpoint, "-o", out, "--rank", "16", "--json", "-q", *sys.argv[5:]], stdout=subprocess.PIPE, check=True)
wall = time.time() - start
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
report = json.loads(r.stdout)
s = report["seconds"]
print(f"{method} rank 16: {report['applied']} modules, {wall:.0f} s ({s['read']:.0f} reading, {s['compute']:.0f} computing, "
      f"{s['write']:.0f} writing), peak {peak:.0f} MiB resident, {os.cpu_count()} cores")
if "error_ratio" in report:
    print(f"error relative to plain quantisation: {report['error_ratio']:.4f}")
PY
