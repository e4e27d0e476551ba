// SPDX-License-Identifier: Apache-2.0
// What options take, and which of them count in which mode.
#include <cerrno>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>

#include "tool.hpp"

namespace lowrank::tool {
namespace {

/// Ranks, counts and sizes end well below this: what is beyond it is a slip of the finger.
constexpr double largest_number = 9e18;

std::string plain(double x) {
  char buffer[32];
  std::snprintf(buffer, sizeof buffer, "%g", x);
  return buffer;
}

CLI::Validator number(std::function<bool(double)> good, const std::string& expected, double limit) {
  return {[good = std::move(good), expected, limit](std::string& text) -> std::string {
            char* end = nullptr;
            const double x = std::strtod(text.c_str(), &end);
            const bool whole_text = !text.empty() && end == text.c_str() + text.size();
            if (whole_text && !std::isnan(x) && std::abs(x) >= limit && good(x))
              return text + " is too large, this takes numbers below " + plain(limit);
            if (whole_text && good(x)) return {};
            return "expected a number " + expected + ", got " + text;
          },
          ""};
}

}  // namespace

CLI::Validator positive() {
  return number([](double x) { return x > 0; }, "above 0", largest_number);
}
CLI::Validator not_negative() {
  return number([](double x) { return x >= 0; }, "not below 0", largest_number);
}
CLI::Validator between(double low, double high) {
  return number([=](double x) { return x >= low && x <= high; }, "from " + plain(low) + " to " + plain(high),
                std::numeric_limits<double>::infinity());
}
CLI::Validator finite_number() {
  return number([](double x) { return std::isfinite(x); }, "that is finite", std::numeric_limits<double>::infinity());
}

CLI::Validator whole(std::uint64_t low, std::uint64_t high) {
  return {[=](std::string& text) -> std::string {
            std::uint64_t x = 0;
            const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), x);
            if (error == std::errc() && end == text.data() + text.size() && x >= low && x <= high) return {};
            return "expected a whole number from " + std::to_string(low) + " to " + std::to_string(high) + ", got " +
                   text;
          },
          ""};
}
CLI::Validator seed() { return whole(0, std::numeric_limits<std::uint64_t>::max()); }
CLI::Validator count() { return whole(1, std::numeric_limits<std::int32_t>::max()); }

void expect_used(const CLI::App* sub, std::initializer_list<Use> uses) {
  for (const Use& u : uses)
    if (!u.used && sub->get_option(u.option)->count() > 0)
      throw UsageError(sub->get_name() + ": " + u.option + " has no use " + u.mode + "; " + u.users);
}

}  // namespace lowrank::tool
