// SPDX-License-Identifier: Apache-2.0
// LoraFactors, the currency of the library: ΔW = s·B·A, with the scale s stored and nothing implied.
#pragma once

#include <cmath>

#include "lowrank/core/matrix.hpp"
#include "lowrank/core/scalar.hpp"

namespace lowrank {

/// A low-rank update ΔW = scale · B · A.
///
/// **Shapes** A is r×in, B is out×r; ΔW is out×in like the weight it belongs to. **Scale** s multiplies the product as
/// it stands: α/r, α/√r and file conventions are translated into it once, at the edges (lora_scale, rslora_scale).
template <Real T>
struct LoraFactors {
  Matrix<T> A, B;
  T scale = T(1);

  [[nodiscard]] Index rank() const noexcept { return A.rows(); }
  [[nodiscard]] Index in_features() const noexcept { return A.cols(); }
  [[nodiscard]] Index out_features() const noexcept { return B.rows(); }
};

namespace detail {

/// Throws unless the factors form a product of the shape out×in with a finite scale.
template <class T>
void check_factors(const char* where, const LoraFactors<T>& f) {
  if (f.B.cols() != f.A.rows()) [[unlikely]]
    throw ShapeError(text(where, ": B must have as many columns as A has rows, got B ",
                          shape_text(f.B.rows(), f.B.cols()), " and A ", shape_text(f.A.rows(), f.A.cols())));
  if (!std::isfinite(f.scale)) [[unlikely]]
    throw ArgumentError(text(where, ": the scale must be finite, got ", double(f.scale)));
}

/// Throws unless 1 ≤ rank ≤ min(m, n).
inline void check_rank(const char* where, Index rank, Index m, Index n) {
  if (rank < 1 || rank > std::min(m, n)) [[unlikely]]
    throw ArgumentError(text(where, ": rank must lie in [1, min(", m, ", ", n, ")], got ", rank));
}

inline void check_alpha(const char* where, double alpha, Index rank) {
  if (!(alpha > 0) || !std::isfinite(alpha)) [[unlikely]]
    throw ArgumentError(text(where, ": alpha must be positive and finite, got ", alpha));
  if (rank < 1) [[unlikely]]
    throw ArgumentError(text(where, ": rank must be at least 1, got ", rank));
}

}  // namespace detail

/// The scale of LoRA, α/r. **Throws** ArgumentError unless α is positive and finite and r ≥ 1.
/// **Source** Hu et al., "LoRA", arXiv 2106.09685, §4.1.
inline double lora_scale(double alpha, Index rank) {
  detail::check_alpha("lora_scale", alpha, rank);
  return alpha / double(rank);
}

/// The rank-stabilised scale, α/√r. **Throws** as lora_scale.
/// **Source** Kalajdzievski, "A rank stabilization scaling factor for fine-tuning with LoRA", arXiv 2312.03732.
inline double rslora_scale(double alpha, Index rank) {
  detail::check_alpha("rslora_scale", alpha, rank);
  return alpha / std::sqrt(double(rank));
}

}  // namespace lowrank
