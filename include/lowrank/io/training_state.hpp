// SPDX-License-Identifier: Apache-2.0
// The state of a training run in one safetensors file: parameters, optimizer moments and counters, to the last bit.
#pragma once

#include <charconv>

#include "lowrank/adapter/parameters.hpp"
#include "lowrank/io/safetensors.hpp"
#include "lowrank/io/safetensors_writer.hpp"
#include "lowrank/optim/adamw.hpp"

namespace lowrank::io {

/// What a run needs beside the blocks, under names it chooses: counters ("step", "seed", "data_position"), exact 64-bit
/// integers; notes, the settings a resumed run must share ("method"); series, such as the losses so far. Learning rates
/// are functions of the step, random numbers of seed and step, so that no more is needed.
struct TrainingCounters {
  std::map<std::string, std::int64_t> values;
  std::map<std::string, std::string> notes = {};
  std::map<std::string, std::vector<double>> series = {};
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

/// Counters, notes and series of a state whose format and series have been checked.
inline TrainingCounters read_counters(const SafeTensors& in) {
  if (const auto f = in.metadata().find("format"); f == in.metadata().end() || f->second != state_format)
    throw IoError(in.path(), "is not a training state of this library");
  TrainingCounters counters;
  for (const auto& [key, value] : in.metadata()) {
    if (key.starts_with("counter.")) counters.values[key.substr(8)] = parse_counter(in.path(), key, value);
    if (key.starts_with("note.")) counters.notes[key.substr(5)] = value;
  }
  for (const TensorInfo& t : in.tensors()) {
    if (!t.name.starts_with("series.")) continue;
    const TensorView view = in.view(t);
    if (t.dtype != Dtype::F64 || t.shape.size() != 1)
      view.fail(lowrank::detail::text("is ", dtype_name(t.dtype), " ", shape_text(t.shape), ", expected a F64 vector"));
    counters.series[t.name.substr(7)] = view.to_vector<double>();
  }
  return counters;
}
}  // namespace detail

/// Saves parameters, AdamW's moments and step count, and the counters with their notes and series; the file is replaced
/// whole or not at all.
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
  for (const auto& [key, value] : counters.notes) metadata["note." + key] = value;
  const std::pair<const char*, std::span<T>> blocks[] = {{"parameter.", parameters.values()},
                                                         {"adamw.m.", optimizer.first_moments()},
                                                         {"adamw.v.", optimizer.second_moments()}};
  std::vector<TensorSpec> specs;
  for (const auto& [prefix, block] : blocks)
    for (const ParameterInfo& p : parameters.table())
      specs.push_back({prefix + p.name, dtype_of<T>(), {std::uint64_t(p.rows), std::uint64_t(p.cols)}});
  for (const auto& [name, values] : counters.series) specs.push_back({"series." + name, Dtype::F64, {values.size()}});
  SafeTensorsWriter out(path, std::move(specs), metadata);
  for (const auto& [prefix, block] : blocks)
    for (const ParameterInfo& p : parameters.table())
      out.write(prefix + p.name, std::as_bytes(std::span<const T>(block.data() + p.offset, std::size_t(p.size()))));
  for (const auto& [name, values] : counters.series)
    out.write("series." + name, std::as_bytes(std::span<const double>(values)));
  out.commit();
}

/// What save_training_state kept beside the blocks: a run looks at its notes before it builds what the blocks fit.
///
/// **Throws** IoError: not such a file, a counter that is no integer, a series that is not a vector of doubles.
inline TrainingCounters read_training_counters(const std::string& path) {
  return detail::read_counters(SafeTensors(path));
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
  TrainingCounters counters = detail::read_counters(in);
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
  if (const auto n = in.tensors().size() - counters.series.size(); n != 3 * parameters.table().size())
    throw IoError(path, lowrank::detail::text("holds ", n, " tensors of parameters and moments, expected ",
                                              3 * parameters.table().size()));
  std::int64_t steps = -1;
  if (const auto s = in.metadata().find("adamw.steps"); s != in.metadata().end())
    steps = detail::parse_counter(path, s->first, s->second);
  if (steps < 0) throw IoError(path, "adamw.steps", "is missing or negative");
  for (const auto& [prefix, block] : blocks)
    for (const ParameterInfo& p : parameters.table())
      in[prefix + p.name].copy_bytes(reinterpret_cast<std::byte*>(block.data() + p.offset));
  optimizer.set_steps(steps);
  return counters;
}

}  // namespace lowrank::io
