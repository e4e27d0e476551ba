// SPDX-License-Identifier: Apache-2.0
// Rotary position embedding, Hugging Face's split: feature i of a head turns with feature i + head_dim/2, by the angle
// position · f_i. The frequencies f_i = θ^(−2i/head_dim) may be scaled for windows longer than a model was made for.
#pragma once

#include <cmath>
#include <numbers>

#include "tensors.hpp"

namespace llama {

/// How the frequencies are scaled, as config.json's rope_scaling says it.
struct RopeScaling {
  enum class Rule { none, linear, llama3 };
  Rule rule = Rule::none;
  double factor = 1;
  double low_freq_factor = 1, high_freq_factor = 4;  ///< llama3 alone, as is the next
  Index original_max_position_embeddings = 8192;

  friend bool operator==(const RopeScaling&, const RopeScaling&) = default;
};

/// One frequency after scaling, in radians a position.
///
/// linear: f/factor, as if positions were `factor` times closer. llama3: with the turns n = L·f/2π that the feature
/// makes in the original window L, fast features (n > high) keep f, slow ones (n < low) get f/factor, and between the
/// two t = (n − low)/(high − low) blends: (1 − t)·f/factor + t·f.
/// **Source** transformers' modeling_rope_utils.py, rules "linear" and "llama3".
inline double scaled_frequency(double f, const RopeScaling& s) {
  if (s.rule == RopeScaling::Rule::none) return f;
  if (s.rule == RopeScaling::Rule::linear) return f / s.factor;
  const double turns = double(s.original_max_position_embeddings) * f / (2 * std::numbers::pi);
  const double t = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor);
  const double keep = std::clamp(t, 0.0, 1.0);
  return (1 - keep) * f / s.factor + keep * f;
}

/// cos and sin of position · f_i, positions × head_dim/2.
template <class T>
struct Rope {
  Mat<T> cos, sin;

  Rope() = default;
  Rope(Index positions, Index head_dim, double theta, const RopeScaling& scaling = {})
      : cos(positions, head_dim / 2), sin(positions, head_dim / 2) {
    for (Index i = 0; i < head_dim / 2; ++i) {
      const double f = scaled_frequency(std::pow(theta, -2.0 * double(i) / double(head_dim)), scaling);
      for (Index p = 0; p < positions; ++p) {
        cos(p, i) = T(std::cos(double(p) * f));
        sin(p, i) = T(std::sin(double(p) * f));
      }
    }
  }
};

/// Turns every head of x in place; row i stands at position i mod time. A rotation is undone, and its gradient taken,
/// by turning the other way: `direction` −1.
template <class T>
void rotate(const Rope<T>& rope, Index time, Index head_dim, Mat<T>& x, T direction = T(1)) {
  const Index half = head_dim / 2;
  for_each_parallel(x.rows(), [&](Index i) {
    const Index p = i % time;
    const T* const c = &rope.cos(p, 0);
    const T* const s = &rope.sin(p, 0);
    for (Index h = 0; h < x.cols(); h += head_dim) {
      T* const a = &x(i, h);
      T* const b = a + half;
      for (Index j = 0; j < half; ++j) {
        const T turned = a[j] * c[j] - direction * b[j] * s[j];
        b[j] = b[j] * c[j] + direction * a[j] * s[j];
        a[j] = turned;
      }
    }
  });
}

}  // namespace llama
