// SPDX-License-Identifier: Apache-2.0
// 4-bit weights the way bitsandbytes keeps them in a checkpoint: packed codes, their scales, and a JSON description.
#pragma once

#include <array>
#include <cmath>

#include "lowrank/io/checkpoint.hpp"
#include "lowrank/io/json.hpp"
#include "lowrank/quant/quantised_matrix.hpp"

namespace lowrank::io {

/// What stands between the name of a 4-bit weight and its type ("nf4", "fp4") in the name of the tensor that describes
/// it.
inline constexpr std::string_view bitsandbytes_state_suffix = ".quant_state.bitsandbytes__";

/// A tensor ready to be written.
struct OwnedTensor {
  TensorSpec spec;
  std::vector<std::byte> bytes;
};

namespace detail {

template <class X>
OwnedTensor owned(std::string name, Shape shape, std::span<const X> values) {
  const auto b = std::as_bytes(values);
  return {{std::move(name), dtype_of<X>(), std::move(shape)}, {b.begin(), b.end()}};
}

/// All values of a small tensor of that very type.
template <class X>
std::vector<X> plain_values(const TensorView& t) {
  if (t.dtype() != dtype_of<X>())
    t.fail(lowrank::detail::text("is stored as ", dtype_name(t.dtype()), ", expected ", dtype_name(dtype_of<X>())));
  std::vector<X> v(t.bytes().size() / sizeof(X));
  t.copy_bytes(reinterpret_cast<std::byte*>(v.data()));
  return v;
}

inline Codebook bnb_codebook(const std::string& path, const std::string& type) {
  if (type == "nf4") return Codebook::nf4();
  if (type == "fp4") return Codebook::fp4();
  throw IoError(path, "quant_type", "is \"" + type + "\", expected nf4 or fp4");
}

/// The table by code, as `quant_map` lists it.
inline std::array<float, 16> table_by_code(const Codebook& c) {
  std::array<float, 16> t{};
  std::copy_n(c.table16(), 16, t.begin());
  return t;
}
}  // namespace detail

/// The tensors that hold `q` under the name of a weight ("model.layers.0.mlp.up_proj.weight"):
/// the codes [(n+1)/2, 1], `.absmax`, `.quant_map`, `.nested_absmax` and `.nested_quant_map` under double quantisation,
/// and
/// `.quant_state.bitsandbytes__nf4` (or fp4), a JSON text as bytes.
///
/// `dtype` is the type of arithmetic a loader uses, "bfloat16", "float16" or "float32".
/// **Throws** ArgumentError unless q is NF4 or FP4 in flat blocks: bitsandbytes has no others.
template <Real T>
std::vector<OwnedTensor> bitsandbytes_tensors(const std::string& weight, const QuantisedMatrix<T>& q,
                                              const std::string& dtype = "bfloat16") {
  const auto& o = q.options();
  const std::string& type = o.codebook.name();
  if ((type != "nf4" && type != "fp4") || o.blocking != Blocking::flat)
    throw ArgumentError("bitsandbytes_tensors: bitsandbytes holds nf4 and fp4 in flat blocks, got " + type);
  std::vector<OwnedTensor> out;
  out.push_back(detail::owned(weight, {q.codes().size(), 1}, q.codes()));
  const auto map = detail::table_by_code(o.codebook);
  nlohmann::json state = {
      {"quant_type", type}, {"blocksize", o.block_size}, {"dtype", dtype}, {"shape", {q.rows(), q.cols()}}};
  if (q.is_double_quantised()) {
    const NestedScales& n = q.nested();
    out.push_back(detail::owned(weight + ".absmax", {n.codes.size()}, std::span<const std::uint8_t>(n.codes)));
    out.push_back(detail::owned(weight + ".nested_absmax", {n.absmax.size()}, std::span<const float>(n.absmax)));
    out.push_back(detail::owned(weight + ".nested_quant_map", {n.values.size()}, std::span<const float>(n.values)));
    state["nested_blocksize"] = n.block_size;
    state["nested_dtype"] = "float32";
    state["nested_offset"] = n.offset;
  } else {
    out.push_back(detail::owned(weight + ".absmax", {q.absmax().size()}, q.absmax()));
  }
  out.push_back(detail::owned(weight + ".quant_map", {16}, std::span<const float>(map)));
  // Blanks after the JSON make its length the same whatever the numbers are, so that a streaming writer knows it
  // before.
  std::string text = state.dump();
  text.append(text.size() < 256 ? 256 - text.size() : 0, ' ');
  out.push_back(detail::owned(weight + std::string(bitsandbytes_state_suffix) + type, {text.size()},
                              std::span(reinterpret_cast<const std::uint8_t*>(text.data()), text.size())));
  return out;
}

/// The quantisation type of a weight that a checkpoint holds in bitsandbytes' 4 bits: "nf4", "fp4"; empty when it does
/// not.
inline std::string bitsandbytes_type(const Checkpoint& c, const std::string& weight) {
  for (const char* type : {"nf4", "fp4"})
    if (c.find(weight + std::string(bitsandbytes_state_suffix) + type)) return type;
  return {};
}

/// What `.quant_state.bitsandbytes__nf4` says of a weight, without the weight.
struct BitsandbytesState {
  std::string type;  ///< "nf4", "fp4"
  Index rows = 0, cols = 0, block_size = 64;
  float nested_offset = 0;  ///< meaningful under double quantisation
  Index nested_block_size = 256;
  Json json;  ///< all that is there, with what is not known here
};

/// Reads the description of a 4-bit weight. **Throws** IoError naming the tensor: there is none, or it is not the JSON
/// it should be, a block size bitsandbytes does not have.
inline BitsandbytesState read_bitsandbytes_state(const Checkpoint& c, const std::string& weight) {
  BitsandbytesState s;
  s.type = bitsandbytes_type(c, weight);
  if (s.type.empty()) throw IoError(c.path(), weight, "is no 4-bit weight of bitsandbytes");
  const TensorView state = c[weight + std::string(bitsandbytes_state_suffix) + s.type];
  const std::string& path = state.file().path();
  const auto bytes = detail::plain_values<std::uint8_t>(state);
  s.json = parse_json(path, {reinterpret_cast<const char*>(bytes.data()), bytes.size()});
  if (!s.json.is_object()) state.fail("must hold a JSON object");
  const detail::JsonReader in(path, s.json);
  s.type = detail::bnb_codebook(path, in.string("quant_type", s.type)).name();
  s.block_size = in.integer("blocksize", 64, 32, 4096);
  const Json* shape = in.find("shape");
  if (shape == nullptr || !shape->is_array() || shape->size() != 2) state.fail("shape must be two integers");
  constexpr std::int64_t limit = std::int64_t(1) << 31;
  s.rows = in.as_integer("shape", (*shape)[0], 0, limit);
  s.cols = in.as_integer("shape", (*shape)[1], 0, limit);
  s.nested_offset = float(in.number("nested_offset", 0));
  s.nested_block_size = in.integer("nested_blocksize", 256, 1, limit);
  return s;
}

/// Reads a 4-bit weight.
///
/// **Throws** IoError naming the tensor: a part is missing or of the wrong type or length, what
/// read_bitsandbytes_state() refuses, a quant_map that is not the table of its type, scales that are negative or not
/// finite. **Cost** a copy of the codes.
template <Real T = float>
QuantisedMatrix<T> read_bitsandbytes(const Checkpoint& c, const std::string& weight) {
  const BitsandbytesState state = read_bitsandbytes_state(c, weight);
  const auto fail = [&](const std::string& what) { throw IoError(c[weight].file().path(), weight, what); };
  QuantiseOptions o;
  o.codebook = detail::bnb_codebook(c.path(), state.type);
  o.block_size = state.block_size;
  const auto map = detail::plain_values<float>(c[weight + ".quant_map"]);
  const auto table = detail::table_by_code(o.codebook);
  if (map.size() != 16) fail("quant_map must have 16 values");
  for (std::size_t i = 0; i < 16; ++i)
    if (!(std::abs(map[i] - table[i]) <= 1e-6F)) fail("quant_map is not the table of " + state.type);
  const auto codes = detail::plain_values<std::uint8_t>(c[weight]);
  QuantisedParts parts;
  parts.codes = codes;
  std::vector<float> absmax, nested_absmax, nested_values;
  std::vector<std::uint8_t> nested_codes;
  const TensorView scales = c[weight + ".absmax"];
  if (scales.dtype() == Dtype::U8) {
    nested_codes = detail::plain_values<std::uint8_t>(scales);
    nested_absmax = detail::plain_values<float>(c[weight + ".nested_absmax"]);
    nested_values = detail::plain_values<float>(c[weight + ".nested_quant_map"]);
    parts.nested_codes = nested_codes;
    parts.nested_absmax = nested_absmax;
    parts.nested_values = nested_values;
    parts.nested_offset = state.nested_offset;
    parts.nested_block_size = state.nested_block_size;
  } else {
    absmax = detail::plain_values<float>(scales);
    parts.absmax = absmax;
  }
  try {
    return QuantisedMatrix<T>(state.rows, state.cols, o, parts);
  } catch (const IoError&) {
    throw;
  } catch (const Error& e) {
    fail(e.what());
    throw;
  }
}

}  // namespace lowrank::io
