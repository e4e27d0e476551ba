// SPDX-License-Identifier: Apache-2.0
// Merging into 4-bit weights.
#include "merge_packed.hpp"

namespace lowrank::tool {
namespace {

constexpr std::string_view state_suffix = io::bitsandbytes_state_suffix;

bool is_state(const std::string& part) { return part.find(state_suffix) != std::string::npos; }

/// The description with another offset of the scales, and blanks up to the length it was given.
std::vector<std::byte> described(const io::BitsandbytesState& state, float offset, std::size_t length) {
  io::Json json = state.json;
  json["nested_offset"] = offset;
  std::string text = json.dump();
  if (text.size() > length) throw ArgumentError("a 4-bit weight's description outgrew its place");
  text.resize(length, ' ');
  const auto b = std::as_bytes(std::span(text));
  return {b.begin(), b.end()};
}

}  // namespace

std::vector<std::string> PackedMerge::parts(const io::Checkpoint& checkpoint, const std::string& weight) {
  std::vector<std::string> names{weight, weight + ".absmax"};
  if (checkpoint.find(weight + ".nested_absmax")) {
    names.push_back(weight + ".nested_absmax");
    names.push_back(weight + ".nested_quant_map");
    names.push_back(weight + std::string(state_suffix) + io::bitsandbytes_type(checkpoint, weight));
  }
  return names;
}

io::TensorSpec PackedMerge::spec(const std::string& weight, const std::string& part) const {
  const io::TensorView t = checkpoint_[part];
  if (!is_state(part)) return {part, t.dtype(), t.shape()};
  // A float in JSON takes at most 24 characters; our own files have the room already.
  const std::size_t now = io::read_bitsandbytes_state(checkpoint_, weight).json.dump().size();
  return {part, t.dtype(), {std::max<std::size_t>(256, now + 32)}};
}

std::vector<std::byte> PackedMerge::bytes(const std::string& weight, const std::string& part) {
  if (part == weight) {
    if (last_ != weight) merge(weight);
    last_.clear();
    return std::exchange(codes_, {});
  }
  if (!small_.contains(weight)) merge(weight);
  return small_.at(weight).at(part);
}

MergeReport PackedMerge::report(const std::string& weight) const { return merged(weight).report; }

RequantisedMerge<float> PackedMerge::merged(const std::string& weight) const {
  const QuantisedMatrix<float> base = io::read_bitsandbytes<float>(checkpoint_, weight);
  try {
    return requantise_merge(base, factors_(weight), options_);
  } catch (const MergeRefused& e) {
    checkpoint_[weight].fail(std::string(e.what()) + " (--allow-lossy merges anyway)");
  } catch (const IoError&) {
    throw;
  } catch (const Error& e) {
    checkpoint_[weight].fail(e.what());
  }
}

void PackedMerge::merge(const std::string& weight) {
  const RequantisedMerge<float> result = merged(weight);
  const QuantisedMatrix<float>& q = result.base;
  const auto raw = [](auto values) {
    const auto b = std::as_bytes(values);
    return std::vector<std::byte>(b.begin(), b.end());
  };
  last_ = weight;
  codes_ = raw(q.codes());
  if (small_.contains(weight)) return;
  auto& parts = small_[weight];
  if (q.is_double_quantised()) {
    const NestedScales& n = q.nested();
    parts[weight + ".absmax"] = raw(std::span<const std::uint8_t>(n.codes));
    parts[weight + ".nested_absmax"] = raw(std::span<const float>(n.absmax));
    parts[weight + ".nested_quant_map"] = raw(std::span<const float>(n.values));
    const io::BitsandbytesState state = io::read_bitsandbytes_state(checkpoint_, weight);
    const std::string name = weight + std::string(state_suffix) + state.type;
    parts[name] = described(state, n.offset, std::size_t(spec(weight, name).shape[0]));
  } else {
    parts[weight + ".absmax"] = raw(q.absmax());
  }
  done_(weight, result.report);
}

}  // namespace lowrank::tool
