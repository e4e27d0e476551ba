// SPDX-License-Identifier: Apache-2.0
// doctest's CAPTURE for structured bindings, which Clang before 16 does not let its lambda capture.
#pragma once

#include <doctest/doctest.h>

/// CAPTURE(x) of a copy of x.
#define CAPTURE_BOUND(x)       \
  const auto captured_##x = x; \
  INFO(#x " := ", captured_##x)
