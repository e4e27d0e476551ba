// SPDX-License-Identifier: Apache-2.0
#include "state.hpp"

#include <charconv>
#include <cstdio>
#include <filesystem>

#include "lowrank/core/threads.hpp"
#include "lowrank/io/training_state.hpp"

namespace llama {
namespace io = lowrank::io;

namespace {

void check_settings(const std::string& file, const Settings& saved, const Settings& now) {
  std::string differences;
  const auto value = [](const Settings& s, const std::string& name) {
    const auto at = s.find(name);
    return at == s.end() ? std::string("nothing") : at->second.empty() ? std::string("''") : at->second;
  };
  Settings all = saved;
  all.insert(now.begin(), now.end());
  for (const auto& [name, ignored] : all)
    if (value(saved, name) != value(now, name))
      differences +=
          (differences.empty() ? "" : "; ") + name + ": expected " + value(saved, name) + ", got " + value(now, name);
  if (!differences.empty())
    throw lowrank::ArgumentError("the run in " + file +
                                 " goes on only with the settings it began with: " + differences);
}

std::uint64_t hash(std::uint64_t h, const void* data, std::size_t bytes) {
  const auto* p = static_cast<const unsigned char*>(data);
  for (std::size_t i = 0; i < bytes; i += 8) {
    std::uint64_t word = 0;
    std::memcpy(&word, p + i, std::min<std::size_t>(8, bytes - i));
    h = (h ^ word) * 0x9e3779b97f4a7c15U;
    h ^= h >> 29;
  }
  return h;
}

std::string fingerprint_text(Index count, const char* what, std::uint64_t h) {
  char text[64];
  std::snprintf(text, sizeof text, "%td %s, %016llx", count, what, static_cast<unsigned long long>(h));
  return text;
}

}  // namespace

void save_state(const std::string& file, lowrank::FlatParameters<float>& parameters, lowrank::AdamW<float>& adam,
                const Progressed& progressed, const Settings& settings) {
  const auto folder = std::filesystem::path(file).parent_path();
  std::error_code error;
  if (!folder.empty()) std::filesystem::create_directories(folder, error);
  if (error) throw lowrank::IoError(folder.string(), "cannot be created: " + error.message());
  io::save_training_state(file, parameters, adam,
                          {{{"step", progressed.step}, {"threads", lowrank::max_threads()}},
                           settings,
                           {{"loss", progressed.losses}, {"seconds", progressed.seconds}}});
}

Progressed load_state(const std::string& file, lowrank::FlatParameters<float>& parameters, lowrank::AdamW<float>& adam,
                      const Settings& settings) {
  const io::TrainingCounters kept = io::read_training_counters(file);  // the settings first: they explain the shapes
  check_settings(file, kept.notes, settings);
  const auto counter = [&](const char* name) {
    const auto at = kept.values.find(name);
    if (at == kept.values.end() || at->second < 0) throw lowrank::IoError(file, name, "is missing or negative");
    return Index(at->second);
  };
  const auto series = [&](const char* name) {
    const auto at = kept.series.find(name);
    if (at == kept.series.end() || Index(at->second.size()) != counter("step"))
      throw lowrank::IoError(file, name, message("must have a value for each of the ", counter("step"), " steps"));
    return at->second;
  };
  Progressed progressed{counter("step"), series("loss"), series("seconds")};
  io::load_training_state(file, parameters, adam);
  if (adam.steps() != progressed.step)
    throw lowrank::IoError(file, "step", message("is ", progressed.step, ", the optimizer's is ", adam.steps()));
  if (const Index threads = counter("threads"); threads != lowrank::max_threads())
    std::fprintf(stderr,
                 "%s: was made by %td threads, goes on with %d: the same run to rounding, not to the last bit\n",
                 file.c_str(), threads, lowrank::max_threads());
  return progressed;
}

std::string fingerprint(const std::vector<Token>& tokens) {
  return fingerprint_text(Index(tokens.size()), "tokens", hash(1, tokens.data(), tokens.size() * sizeof(Token)));
}

std::string fingerprint(const Weights<float>& weights) {
  std::uint64_t h = 1;
  Index count = 0;
  for (const auto& [module, W] : weights) {
    h = hash(h, module.data(), module.size());
    h = hash(h, W.data(), std::size_t(W.size()) * sizeof(float));
    count += W.size();
  }
  return fingerprint_text(count, "weights", h);
}

std::string exact(double x) {
  char buffer[32];
  return {buffer, std::to_chars(buffer, buffer + sizeof buffer, x).ptr};
}

}  // namespace llama
