// SPDX-License-Identifier: Apache-2.0
// The library's version, for users who must compile against several.
#pragma once

#define LOWRANK_VERSION_MAJOR 0
#define LOWRANK_VERSION_MINOR 1
#define LOWRANK_VERSION_PATCH 0

namespace lowrank {

/// The version these headers carry, `major.minor.patch`.
inline constexpr const char* version = "0.1.0";

}  // namespace lowrank
