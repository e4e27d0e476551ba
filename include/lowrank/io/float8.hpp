// SPDX-License-Identifier: Apache-2.0
// 8-bit floating-point weights as checkpoints keep them: the values in one tensor, their scales in another beside it.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <string>
#include <string_view>
#include <vector>

#include "lowrank/io/checkpoint.hpp"

namespace lowrank::io {

/// Whether weights of this type come with scales: F8_E4M3 and F8_E5M2. (F8_E8M0 is itself a type of scales.)
constexpr bool is_float8(Dtype d) { return d == Dtype::F8_E4M3 || d == Dtype::F8_E5M2; }

namespace detail {

/// How the tensor of the scales is called where the weight is "STEM.weight" (or, without the first dot, any name).
struct Float8Name {
  std::string_view weight_ends, scale_ends;
};
/// DeepSeek's and transformers' blocks; compressed-tensors, fbgemm and ModelOpt; ComfyUI; DeepSeek's inference code.
inline constexpr std::array<Float8Name, 4> float8_names{
    {{"", "_scale_inv"}, {"", "_scale"}, {".weight", ".scale_weight"}, {".weight", ".scale"}}};

inline std::string replaced_end(std::string_view name, std::string_view end, std::string_view by) {
  if (!name.ends_with(end)) return {};
  return std::string(name.substr(0, name.size() - end.size())) + std::string(by);
}
inline Index blocks_of(Index extent, Index block) { return (extent + block - 1) / block; }

/// A tensor as `count` matrices m×n: a stack where it has three dimensions, else one, with all but the first folded.
struct Stack {
  Index count = 1, m = 1, n = 1;
  bool stacked = false;
};
inline Stack as_stack(const TensorView& t) {
  const Shape& s = t.shape();
  Stack k;
  k.stacked = s.size() == 3;
  if (k.stacked) k.count = Index(s[0]);
  if (!s.empty()) k.m = Index(s[k.stacked ? 1 : 0]);
  k.n = k.count * k.m > 0 ? t.size() / (k.count * k.m) : 0;
  return k;
}
}  // namespace detail

/// The name of the tensor with the scales of an 8-bit weight; empty when the checkpoint has none.
///
/// Looked for, in this order: `NAME_scale_inv`, `NAME_scale`, and for a NAME that is `STEM.weight` also
/// `STEM.scale_weight` and `STEM.scale`. All of them multiply, the one called "inv" too.
inline std::string float8_scale_name(const Checkpoint& c, std::string_view weight) {
  for (const auto& n : detail::float8_names)
    if (std::string name = detail::replaced_end(weight, n.weight_ends, n.scale_ends); !name.empty() && c.find(name))
      return name;
  return {};
}

/// Whether a tensor of this name holds the scales of an 8-bit weight, and is none itself.
inline bool is_float8_scale(const Checkpoint& c, std::string_view name) {
  for (const auto& n : detail::float8_names)
    if (const std::string weight = detail::replaced_end(name, n.scale_ends, n.weight_ends); !weight.empty())
      if (const auto t = c.find(weight); t && is_float8(t->dtype())) return true;
  return false;
}

/// The scales of one matrix: value (i, j) of the weight is code (i, j) × `values[(i / block_rows)·cols + j /
/// block_cols]`.
struct Float8Scales {
  std::string name;  ///< of the tensor they are from; empty: there is none, and the one value is 1
  Index block_rows = 0, block_cols = 0;
  Index rows = 1, cols = 1;  ///< of the grid of blocks
  std::vector<float> values{1.0F};

  /// "tensor", "row", "128x128 block": what shares a scale.
  [[nodiscard]] std::string per() const {
    if (values.size() == 1) return "tensor";
    if (block_rows == 1 && cols == 1) return "row";
    return lowrank::detail::shape_text(block_rows, block_cols) + " block";
  }
};

/// Reads the scales of an 8-bit weight, of its matrix `slice` where it is a stack of three dimensions.
///
/// **Shapes** for a weight m×n (all dimensions after the first folded; in a stack E×m×n, behind a leading extent of E):
/// one value; [m] or [m, 1], a scale a row; [⌈m/128⌉, ⌈n/128⌉], one a block; [m, ⌈n/32⌉] of F8_E8M0, the microscaling
/// format.
/// **Throws** IoError naming the tensor of the scales: a shape that is none of these, a type that is not F32, F64,
/// BF16, F16 or F8_E8M0, a scale that is negative or not finite, a second tensor that claims to hold them.
/// **Source** the formats of DeepSeek-V3's README_WEIGHTS, compressed-tensors, and OCP Microscaling Formats (MX) v1.0.
inline Float8Scales float8_scales(const Checkpoint& c, const TensorView& weight, Index slice = 0) {
  const auto [matrices, m, n, stacked] = detail::as_stack(weight);
  Float8Scales s;
  s.block_rows = m;
  s.block_cols = n;
  s.name = float8_scale_name(c, weight.name());
  if (s.name.empty()) return s;
  const TensorView t = c[s.name];
  for (const auto& other : detail::float8_names)
    if (const auto name = detail::replaced_end(weight.name(), other.weight_ends, other.scale_ends);
        !name.empty() && name != s.name && c.find(name))
      t.fail("and \"" + name + "\" both claim to be the scales of " + weight.name());
  if (!is_convertible_float(t.dtype()) || is_float8(t.dtype()))
    t.fail(lowrank::detail::text("is stored as ", dtype_name(t.dtype()),
                                 ", expected scales in F32, F64, BF16, F16 or "
                                 "F8_E8M0"));
  const Index bm = detail::blocks_of(m, 128), bn = detail::blocks_of(n, 128), micro = detail::blocks_of(n, 32);
  Shape shape = t.shape();
  Index first = 0;
  if (t.size() != 1) {
    Index count = stacked && (shape.empty() || Index(shape[0]) != matrices) ? 0
                  : matrices > 0                                            ? t.size() / matrices
                                                                            : 0;
    if (stacked && count > 0) shape.erase(shape.begin());
    const auto is = [&](Index rows, Index cols) {
      return shape.size() == 2 && Index(shape[0]) == rows && Index(shape[1]) == cols;
    };
    if (count == 1) {
      // one for each matrix of the stack
    } else if (count == m && Index(shape[0]) == m) {
      s.block_rows = 1;
    } else if (count > 0 && is(bm, bn)) {
      s.block_rows = s.block_cols = 128;
    } else if (count > 0 && is(m, micro) && t.dtype() == Dtype::F8_E8M0) {
      s.block_rows = 1;
      s.block_cols = 32;
    } else {
      const std::string lead = stacked ? lowrank::detail::text(matrices, ", ") : std::string();
      t.fail(lowrank::detail::text("has shape ", shape_text(t.shape()), "; expected for ", weight.name(), " of shape ",
                                   shape_text(weight.shape()), ": one scale, [", lead, m, "] or [", lead, m,
                                   ", 1] for its rows, or [", lead, bm, ", ", bn, "] for blocks of 128x128"));
    }
    s.rows = detail::blocks_of(m, s.block_rows);
    s.cols = detail::blocks_of(n, s.block_cols);
    first = slice * count;
  }
  s.values.resize(std::size_t(s.rows * s.cols));
  t.copy_to(s.values.data(), first, s.rows * s.cols);
  for (const float x : s.values)
    if (!(x >= 0) || !std::isfinite(x)) t.fail(lowrank::detail::text("holds ", x, ", which is no scale"));
  return s;
}

/// An 8-bit weight, or the matrix `slice` of a stack, as the numbers it stands for: codes times scales.
///
/// **Shapes** m×n as in float8_scales(). **Throws** IoError as that does; ArgumentError for other types of weight.
/// **Cost** memory speed, threaded. **Numerics** one rounding to T, of the product; NaN codes stay NaN.
template <Real T = float>
Matrix<T> read_float8(const Checkpoint& c, const TensorView& weight, Index slice = 0) {
  if (!is_float8(weight.dtype()))
    throw ArgumentError(lowrank::detail::text("read_float8: ", weight.name(), " is stored as ",
                                              dtype_name(weight.dtype()), ", expected F8_E4M3 or F8_E5M2"));
  const detail::Stack k = detail::as_stack(weight);
  if (slice < 0 || slice >= k.count)
    throw ArgumentError(lowrank::detail::text("read_float8: matrix ", slice, " of ", k.count, " in ", weight.name()));
  const Float8Scales s = float8_scales(c, weight, slice);
  Matrix<T> out;
  out.resize(k.m, k.n);
  weight.copy_to(out.data(), slice * k.m * k.n, k.m * k.n);
  if (s.name.empty()) return out;
  lowrank::parallel_ranges(k.m, std::max<Index>(1, (1 << 16) / std::max<Index>(1, k.n)), [&](Index begin, Index end) {
    for (Index i = begin; i < end; ++i) {
      T* row = out.data() + i * k.n;
      const float* scale = s.values.data() + i / s.block_rows * s.cols;
      for (Index j = 0; j < k.n; ++j) row[j] *= T(scale[j / s.block_cols]);
    }
  });
  return out;
}

}  // namespace lowrank::io
