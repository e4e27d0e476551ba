// SPDX-License-Identifier: Apache-2.0
// 8-bit weights the way bitsandbytes keeps them in a checkpoint (LLM.int8): integers, and the largest magnitude of each
// row.
#pragma once

#include <cmath>
#include <string>
#include <string_view>

#include "lowrank/io/checkpoint.hpp"

namespace lowrank::io {

namespace detail {

/// "STEM.weight" with its last component replaced; empty for other names.
inline std::string beside_weight(std::string_view weight, std::string_view by) {
  constexpr std::string_view end = ".weight";
  if (!weight.ends_with(end)) return {};
  return std::string(weight.substr(0, weight.size() - end.size())).append(by);
}
}  // namespace detail

/// The name of the tensor with the row maxima of an int8 weight, `STEM.SCB` for `STEM.weight`; empty when `weight` is
/// no such weight of the checkpoint.
inline std::string int8_scale_name(const Checkpoint& c, std::string_view weight) {
  std::string name = detail::beside_weight(weight, ".SCB");
  if (name.empty() || !c.find(name)) return {};
  const auto t = c.find(weight);
  return t && t->dtype() == Dtype::I8 ? name : std::string();
}

/// Whether a tensor of this name is a part of an int8 weight, `STEM.SCB` or `STEM.weight_format`, and no weight itself.
inline bool is_int8_part(const Checkpoint& c, std::string_view name) {
  for (const std::string_view end : {".SCB", ".weight_format"})
    if (name.ends_with(end))
      return !int8_scale_name(c, std::string(name.substr(0, name.size() - end.size())) + ".weight").empty();
  return false;
}

/// Reads an int8 weight of bitsandbytes: W_ij = q_ij·SCB_i/127.
///
/// **Shapes** the weight is out×in of I8, SCB has `out` values. **Throws** IoError naming the tensor: no such weight, a
/// weight of other than two dimensions, an SCB of another length or holding values that are negative or not finite, a
/// `weight_format` other than 0 (rows as they are; the other layouts belong to certain GPUs).
/// **Cost** one pass at memory speed. **Numerics** one rounding to T, of the product.
/// **Source** Dettmers et al., "LLM.int8()", arXiv 2208.07339, eq. 6; names and layout as bitsandbytes' Linear8bitLt
/// writes them.
template <Real T = float>
Matrix<T> read_bitsandbytes_int8(const Checkpoint& c, const std::string& weight) {
  const std::string name = int8_scale_name(c, weight);
  if (name.empty()) throw IoError(c.path(), weight, "is no 8-bit weight of bitsandbytes");
  const TensorView w = c[weight], scales = c[name];
  const Index m = w.rows(), n = w.cols();  // throws for other than two dimensions
  if (scales.size() != m || !is_convertible_float(scales.dtype()))
    scales.fail(lowrank::detail::text("has shape ", shape_text(scales.shape()), " of ", dtype_name(scales.dtype()),
                                      ", expected one float for each of the ", m, " rows of ", weight));
  if (const auto format = c.find(detail::beside_weight(weight, ".weight_format")))
    for (const std::byte b : format->copied_bytes())
      if (b != std::byte{0})
        format->fail("says that the weight is in a GPU's own layout, which is not read; save it in rows");
  const auto largest = scales.to_vector<double>();
  for (const double x : largest)
    if (!(x >= 0) || !std::isfinite(x)) scales.fail(lowrank::detail::text("holds ", x, ", which is no scale"));
  Matrix<T> out;
  out.resize(m, n);
  std::vector<std::int8_t> q(w.bytes().size());
  w.copy_bytes(reinterpret_cast<std::byte*>(q.data()));
  for (Index i = 0; i < m; ++i)
    for (Index j = 0; j < n; ++j) out(i, j) = T(double(q[std::size_t(i * n + j)]) * largest[std::size_t(i)] / 127);
  return out;
}

}  // namespace lowrank::io
