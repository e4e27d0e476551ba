// SPDX-License-Identifier: Apache-2.0
// What options take, which of them count in which mode, and words for those that were misspelt.
#include <algorithm>
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

/// Letters to insert, drop, replace or swap with their neighbour until a is b.
std::size_t edits(const std::string& a, const std::string& b) {
  std::vector<std::size_t> before(b.size() + 1), last(b.size() + 1), now(b.size() + 1);
  for (std::size_t j = 0; j <= b.size(); ++j) last[j] = j;
  for (std::size_t i = 1; i <= a.size(); ++i) {
    now[0] = i;
    for (std::size_t j = 1; j <= b.size(); ++j) {
      now[j] = std::min({last[j] + 1, now[j - 1] + 1, last[j - 1] + (a[i - 1] == b[j - 1] ? 0 : 1)});
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1]) now[j] = std::min(now[j], before[j - 2] + 1);
    }
    std::swap(before, last);
    std::swap(last, now);
  }
  return last[b.size()];
}

/// "; did you mean X?", or nothing where no name is near.
std::string suggestion(const std::string& word, const std::vector<std::string>& names) {
  const std::string* best = nullptr;
  std::size_t least = word.size() / 3 + 2;  // of "--tpo", two of five letters may be wrong, and no more
  for (const std::string& name : names)
    if (const std::size_t n = edits(word, name); n < least) {
      least = n;
      best = &name;
    }
  return best == nullptr ? std::string() : "; did you mean '" + *best + "'?";
}

std::vector<std::string> option_names(const CLI::App& app) {
  std::vector<std::string> names;
  for (const CLI::Option* option : app.get_options()) {
    for (const std::string& name : option->get_lnames()) names.push_back("--" + name);
    for (const std::string& name : option->get_snames()) names.push_back("-" + name);
  }
  return names;
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

std::string unknown_subcommand(const CLI::App& app, const std::string& word) {
  std::vector<std::string> names;
  for (const CLI::App* sub : app.get_subcommands(nullptr)) names.push_back(sub->get_name());
  return "there is no subcommand '" + word + "'" + suggestion(word, names);
}

std::string unexpected_words(const CLI::App& app) {
  std::string stray;
  std::vector<const CLI::App*> all{&app};
  for (const CLI::App* sub : app.get_subcommands()) all.insert(all.begin(), sub);
  for (const CLI::App* a : all)
    for (const std::string& word : a->remaining()) {
      const std::string of = a == &app ? std::string() : a->get_name() + ": ";
      if (word.size() > 1 && word[0] == '-') {
        const std::string name = word.substr(0, word.find('='));
        return of + "there is no option '" + name + "'" + suggestion(name, option_names(*a));
      }
      if (stray.empty()) stray = of + "'" + word + "' is an argument too many";
    }
  return stray;
}

}  // namespace lowrank::tool
