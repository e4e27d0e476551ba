#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds and runs every test: `bash tests/test.sh`. Arguments go to ctest (`bash tests/test.sh -R quant`).
# Environment: JOBS (default: all cores), PRESET (default: test; also clang, sanitize), LOWRANK_WERROR (default: OFF, so
# that a compiler newer than ours cannot fail the build with a new warning).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source .packages.sh
need_packages "${packages_test[@]}"
preset=${PRESET:-test} jobs=${JOBS:-$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)}
cmake --preset "$preset" -DLOWRANK_WERROR="${LOWRANK_WERROR:-OFF}" --log-level=WARNING
cmake --build --preset "$preset" --parallel "$jobs"
ctest --preset "$preset" --parallel "$jobs" "$@"
