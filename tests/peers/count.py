#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Says which peers were run and how many comparisons each made; skipped when there was none.

    count.py DIRECTORY      where the tests beside it leave a line each (LOWRANK_PEERS_RUN)
"""
import os
import sys

directory = sys.argv[1]
lines = []
for name in sorted(os.listdir(directory)) if os.path.isdir(directory) else []:
    lines.append(open(os.path.join(directory, name)).read().strip())
for line in lines:
    print(line)
print(f"{len(lines)} scripts ran beside real peers")
if not lines:
    print("skipped, because no peer ran")
    sys.exit(1 if os.environ.get("LOWRANK_REQUIRE_PEERS") == "1" else 77)
