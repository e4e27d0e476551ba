// SPDX-License-Identifier: Apache-2.0
// The state of a training run in one safetensors file: parameters, optimizer moments and counters, to the last bit.
#pragma once

#include <charconv>

#include "lowrank/adapter/parameters.hpp"
#include "lowrank/io/safetensors.hpp"
#include "lowrank/io/safetensors_writer.hpp"
#include "lowrank/optim/adamw.hpp"

namespace lowrank::io {

/// What a run needs beside the blocks: counters it chooses by name ("step", "seed", "data_position"), exact 64-bit
/// integers. Learning rates are functions of the step, random numbers of seed and step, so that no more is needed.
struct TrainingCounters {
  std::map<std::string, std::int64_t> values;
};

namespace detail {
inline constexpr const char* state_format = "lowrank-training-state-1";

inline std::int64_t parse_counter(const std::string& path, const std::string& key, const std::string& s) {
  std::int64_t n = 0;
  const auto [end, error] = std::from_chars(s.data(), s.data() + s.size(), n);
  if (error != std::errc() || end != s.data() + s.size())
    throw IoError(path, key, "must be an integer, got \"" + s + "\"");
  return n;
}
}  // namespace detail

/// Saves parameters, AdamW's moments and step count, and the counters; the file is replaced whole or not at all.
///
/// **Shapes** the optimizer's block must be as long as the parameters'. **Throws** ShapeError otherwise; IoError as
/// OutputFile. **Cost** three passes over the block.
template <Real T>
void save_training_state(const std::string& path, FlatParameters<T>& parameters, AdamW<T>& optimizer,
                         const TrainingCounters& counters = {}) {
  if (optimizer.size() != parameters.size())
    throw ShapeError(lowrank::detail::text("save_training_state: the optimizer has ", optimizer.size(),
                                           " elements, the parameters ", parameters.size()));
  std::map<std::string, std::string> metadata{{"format", detail::state_format},
                                              {"adamw.steps", std::to_string(optimizer.steps())}};
  for (const auto& [key, value] : counters.values) metadata["counter." + key] = std::to_string(value);
  const std::pair<const char*, std::span<T>> blocks[] = {{"parameter.", parameters.values()},
                                                         {"adamw.m.", optimizer.first_moments()},
                                                         {"adamw.v.", optimizer.second_moments()}};
  std::vector<TensorSpec> specs;
  for (const auto& [prefix, block] : blocks)
    for (const ParameterInfo& p : parameters.table())
      specs.push_back({prefix + p.name, dtype_of<T>(), {std::uint64_t(p.rows), std::uint64_t(p.cols)}});
  SafeTensorsWriter out(path, std::move(specs), metadata);
  for (const auto& [prefix, block] : blocks)
    for (const ParameterInfo& p : parameters.table())
      out.write(prefix + p.name, std::as_bytes(std::span<const T>(block.data() + p.offset, std::size_t(p.size()))));
  out.commit();
}

/// Restores what save_training_state saved, into parameters and an optimizer built as they were then.
///
/// A run resumed so continues bit for bit as if it had not stopped, given the same thread count and counters.
/// **Throws** IoError naming the tensor: not such a file, a parameter that is missing, of another shape or type, or
/// left over; ShapeError as save_training_state. Nothing is changed after a throw.
template <Real T>
TrainingCounters load_training_state(const std::string& path, FlatParameters<T>& parameters, AdamW<T>& optimizer) {
  if (optimizer.size() != parameters.size())
    throw ShapeError(lowrank::detail::text("load_training_state: the optimizer has ", optimizer.size(),
                                           " elements, the parameters ", parameters.size()));
  const SafeTensors in(path);
  const auto& metadata = in.metadata();
  if (const auto f = metadata.find("format"); f == metadata.end() || f->second != detail::state_format)
    throw IoError(path, "is not a training state of this library");
  const std::pair<const char*, std::span<T>> blocks[] = {{"parameter.", parameters.values()},
                                                         {"adamw.m.", optimizer.first_moments()},
                                                         {"adamw.v.", optimizer.second_moments()}};
  for (const auto& [prefix, block] : blocks)
    for (const ParameterInfo& p : parameters.table()) {
      const TensorView t = in[prefix + p.name];
      if (t.dtype() != dtype_of<T>() || t.shape() != Shape{std::uint64_t(p.rows), std::uint64_t(p.cols)})
        t.fail(lowrank::detail::text("is ", dtype_name(t.dtype()), " ", shape_text(t.shape()), ", expected ",
                                     dtype_name(dtype_of<T>()), " ", lowrank::detail::shape_text(p.rows, p.cols)));
    }
  if (in.tensors().size() != 3 * parameters.table().size())
    throw IoError(path, lowrank::detail::text("holds ", in.tensors().size(), " tensors, expected ",
                                              3 * parameters.table().size()));
  TrainingCounters counters;
  std::int64_t steps = -1;
  for (const auto& [key, value] : metadata) {
    if (key == "adamw.steps") steps = detail::parse_counter(path, key, value);
    if (key.starts_with("counter.")) counters.values[key.substr(8)] = detail::parse_counter(path, key, value);
  }
  if (steps < 0) throw IoError(path, "adamw.steps", "is missing or negative");
  for (const auto& [prefix, block] : blocks)
    for (const ParameterInfo& p : parameters.table())
      if (const Bytes b = in[prefix + p.name].bytes(); !b.empty())
        std::memcpy(block.data() + p.offset, b.data(), b.size());
  optimizer.set_steps(steps);
  return counters;
}

}  // namespace lowrank::io
