// SPDX-License-Identifier: Apache-2.0
// Asks the system for large pages under large buffers, where it has such a thing.
#pragma once

#include <cstddef>
#if defined(__linux__)
#include <sys/mman.h>

#include <cstdint>
#endif

namespace lowrank::detail {

/// Tells Linux that the memory will be used whole: pages of 2 MiB take its first touch from a fault every 4 KiB to one
/// every 2 MiB, and most misses from the address translation of whatever walks down columns. Where transparent huge
/// pages are off or unknown this does nothing. Memory that no whole huge page fits into is left alone.
inline void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] std::size_t bytes) noexcept {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t huge = std::uintptr_t(2) << 20;
  if (bytes < 2 * huge) return;
  // Whole huge pages only: the rest of the first and the last may belong to a neighbour.
  const std::uintptr_t begin = (reinterpret_cast<std::uintptr_t>(data) + huge - 1) / huge * huge;
  const std::uintptr_t end = (reinterpret_cast<std::uintptr_t>(data) + bytes) / huge * huge;
  // Advice: a kernel that does not take it returns an error nobody needs.
  if (begin < end) (void)::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace lowrank::detail
