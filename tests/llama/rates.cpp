// SPDX-License-Identifier: Apache-2.0
#include <doctest/doctest.h>

#include "methods.hpp"

using namespace llama;

TEST_CASE("rates are the demo's for small models and the usual ones at seven billion parameters") {
  const auto rate = [](const char* method, Index parameters) { return default_rate(*find_method(method), parameters); };
  for (const MethodInfo& m : known_methods()) {
    CAPTURE(m.name);
    for (const Index small : {1, 30000, 804000}) CHECK(default_rate(m, small) == m.learning_rate);
    double before = m.learning_rate;
    for (Index n = 804000; n < Index(1) << 37; n *= 4) {
      const double r = default_rate(m, n);
      CHECK(r <= before);
      CHECK(r > 0);
      before = r;
    }
    CHECK(default_rate(m, Index(7000000000)) ==
          doctest::Approx(m.adapts() ? m.learning_rate / 50 : 2e-5).epsilon(1e-9));
  }
  CHECK(rate("lora", 7000000000) == doctest::Approx(2e-4).epsilon(1e-9));
  // docs/demo.md
  CHECK(rate("full", 124000000) == doctest::Approx(2.3e-4).epsilon(1e-9));
  CHECK(rate("lora", 1200000000) == doctest::Approx(4.3e-4).epsilon(1e-9));
  CHECK(rate("pissa", 124000000) == doctest::Approx(5.7e-4).epsilon(1e-9));
  CHECK(find_method("loar") == nullptr);
}
