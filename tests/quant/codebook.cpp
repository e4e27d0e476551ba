// SPDX-License-Identifier: Apache-2.0
// Tables against their definitions, thresholds against brute force, bad tables refused.
#include "lowrank/quant/codebook.hpp"

#include <doctest/doctest.h>

#include <cstring>
#include <limits>

#include "quant/reference.hpp"
#include "support/fixture.hpp"

using namespace lowrank;

namespace {

std::vector<Codebook> tables() {
  std::vector<Codebook> all{Codebook::nf2(), Codebook::nf3(), Codebook::nf4(), Codebook::fp4(), Codebook::dynamic8()};
  for (int bits = 5; bits <= 8; ++bits) all.push_back(Codebook::normal_float(bits));
  for (int bits = 1; bits <= 8; ++bits) all.push_back(Codebook::uniform(bits));
  const float levels[] = {-0.5F, -0.125F, 0.0F, 0.3F, 0.31F, 1.0F};
  all.emplace_back(levels, CodebookOptions{.name = "six"});
  return all;
}

}  // namespace

TEST_CASE("NormalFloat tables are the published ones") {
  const auto check = [](const Codebook& c, std::vector<double> want) {
    REQUIRE(c.values().size() == want.size());
    for (std::size_t i = 0; i < want.size(); ++i)
      CHECK(double(c.values()[i]) == doctest::Approx(want[i]).epsilon(5e-6));
  };
  check(Codebook::nf2(), {-1, 0, .337915, 1});
  check(Codebook::nf3(), {-1, -.478629, -.217142, 0, .16093, .337915, .562617, 1});
  CHECK(Codebook::normal_float(4) == Codebook::nf4());
  // The stored NF4 table is the formula's, computed in float by its authors; 1e-6 covers that.
  const auto quantile = [](int i, int steps) {
    return normal_quantile(0.9677083 + (0.5 - 0.9677083) * i / steps) / normal_quantile(0.9677083);
  };
  for (int i = 0; i < 8; ++i)
    CHECK(double(Codebook::nf4().values()[std::size_t(15 - i)]) == doctest::Approx(quantile(i, 8)).epsilon(1e-6));
  for (int i = 0; i < 7; ++i)
    CHECK(double(Codebook::nf4().values()[std::size_t(i)]) == doctest::Approx(-quantile(i, 7)).epsilon(1e-6));
}

TEST_CASE("NF4 thresholds are midpoints to one unit in the last place") {
  const Codebook nf4 = Codebook::nf4();
  REQUIRE(nf4.thresholds().size() == 15);
  for (std::size_t i = 0; i < 15; ++i) {
    const double middle = (double(nf4.values()[i]) + double(nf4.values()[i + 1])) / 2;
    CHECK(std::abs(double(nf4.thresholds()[i]) - middle) <= std::abs(middle) * 0x1p-23);
  }
}

TEST_CASE("FP4 and the dynamic map") {
  const Codebook fp4 = Codebook::fp4();
  const double twelfths[] = {0, 0.0625, 8, 12, 4, 6, 2, 3};
  for (std::size_t i = 0; i < 8; ++i) {
    CHECK(fp4.values()[i] == float(twelfths[i] / 12));
    CHECK(fp4.values()[i + 8] == -fp4.values()[i]);
  }
  CHECK(fp4.nearest(-1e-4F) == 0);
  CHECK(fp4.nearest(0.0F) == 0);
  CHECK(fp4.nearest(1e-4F) == 8);
  for (const float t : fp4.thresholds())  // the middle goes down, on both sides of zero
    CHECK(fp4.values()[fp4.nearest(t)] <= fp4.values()[fp4.nearest(std::nextafter(t, 2.0F))]);
  CHECK(fp4.nearest((fp4.values()[12] + fp4.values()[13]) / 2) == 13);
  CHECK(fp4.nearest(-0.7F) == 10);
  const test::Fixture f("../quant/data/bitsandbytes.txt");
  const Codebook map = Codebook::dynamic8();
  REQUIRE(map.levels() == 256);
  for (Index i = 0; i < 256; ++i)
    CHECK(double(map.values()[std::size_t(i)]) == doctest::Approx(f["dynamic_map"](0, i)).epsilon(2e-7));
}

TEST_CASE("nearest is nearest, for every bf16 and around every threshold") {
  for (const Codebook& c : tables()) {
    CAPTURE(c.name());
    Index wrong = 0;
    for (std::uint32_t b = 0; b < 65536; ++b) {
      const float x = float(bf16::from_bits(std::uint16_t(b)));
      if (std::isnan(x)) continue;
      wrong += c.nearest(x) != reference::nearest(c, x);
    }
    for (const float t : c.thresholds())
      for (const float x : {std::nextafter(t, -2.0F), t, std::nextafter(t, 2.0F)})
        wrong += c.nearest(x) != reference::nearest(c, x);
    CHECK(wrong == 0);
    for (std::size_t code = 0; code < std::size_t(c.levels()); ++code)
      if (!(c.name() == "fp4" && code == 8)) CHECK(c.nearest(c.values()[code]) == code);
  }
}

TEST_CASE("bad tables are refused") {
  const float inf = std::numeric_limits<float>::infinity();
  const auto make = [](std::vector<float> v, bool zero = true) { return Codebook(v, {.require_zero = zero}); };
  CHECK_THROWS_AS(make({1.0F}), ArgumentError);
  CHECK_THROWS_AS(make(std::vector<float>(257, 0.0F)), ArgumentError);
  CHECK_THROWS_AS(make({-1.0F, 0.5F, 0.0F, 1.0F}), ArgumentError);   // not sorted
  CHECK_THROWS_AS(make({-1.0F, 0.0F, 0.0F, 1.0F}), ArgumentError);   // a level twice
  CHECK_THROWS_AS(make({-1.0F, -0.2F, 0.2F, 1.0F}), ArgumentError);  // no zero
  CHECK_NOTHROW(make({-1.0F, -0.2F, 0.2F, 1.0F}, false));
  CHECK_THROWS_AS(make({-0.5F, 0.0F, 0.5F}), ArgumentError);  // does not reach 1
  CHECK_THROWS_AS(make({-1.0F, 0.0F, 2.0F}), ArgumentError);
  CHECK_THROWS_AS(make({-1.0F, 0.0F, inf}), NonFiniteError);
  CHECK_THROWS_AS(make({-1.0F, std::nanf(""), 1.0F}), NonFiniteError);
  for (const int bits : {-1, 0, 9, 64}) {
    CHECK_THROWS_AS(Codebook::uniform(bits), ArgumentError);
    CHECK_THROWS_AS(Codebook::uniform_asymmetric(bits), ArgumentError);
    CHECK_THROWS_AS(Codebook::normal_float(bits), ArgumentError);
  }
  CHECK_THROWS_AS(Codebook::normal_float(1), ArgumentError);
}
