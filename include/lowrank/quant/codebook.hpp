// SPDX-License-Identifier: Apache-2.0
// Codebooks: what the codes of a quantised block stand for, and which code stands nearest to a value.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "lowrank/core/rng.hpp"

namespace lowrank {

/// How a code and the numbers of its block make a value.
enum class CodebookKind {
  table,   ///< value = table[code] · absmax, the table within [−1, 1]
  affine,  ///< value = (code − zero) · scale, zero an integer of its own for each block
  int8     ///< value = (two's complement code · absmax) / 127
};

struct CodebookOptions {
  std::string name = "custom";
  /// Without a zero, a pruned weight or the padding of an embedding would come back as something else; say so to allow
  /// it.
  bool require_zero = true;
};

/// An immutable table of at most 256 levels with the decision thresholds between them.
///
/// **Scale** levels lie in [−1, 1] and are multiplied by the largest magnitude of their block. **Numerics** the
/// threshold between two neighbours is their midpoint rounded to float, and a value on it goes to the lower code; NF4
/// has the thresholds of bitsandbytes' kernel, which are those midpoints written out, four of them off by one unit in
/// the last place. A code that stands for nothing (a table of 7 levels has one in 3 bits) decodes to the largest level:
/// no byte is undefined. **Cost** some 4 KiB each; cheap to copy beside a weight.
class Codebook {
 public:
  /// A table of the caller's. **Throws** ArgumentError unless it has 2 … 256 finite, strictly ascending levels within
  /// [−1, 1] of which one has magnitude 1, and a zero (unless that is waived).
  [[gnu::cold]] explicit Codebook(std::span<const float> levels, const CodebookOptions& options = {})
      : name_(options.name) {
    check(levels, options);
    std::vector<std::uint8_t> order(levels.size());
    for (std::size_t i = 0; i < order.size(); ++i) order[i] = std::uint8_t(i);
    build(CodebookKind::table, levels, std::move(order));
  }

  /// NormalFloat of 4 bits, the table as bitsandbytes stores it. **Source** Dettmers et al., arXiv 2305.14314, app. E.
  static Codebook nf4() {
    static constexpr std::array<float, 16> levels{-1.0F,
                                                  -0.6961928009986877F,
                                                  -0.5250730514526367F,
                                                  -0.39491748809814453F,
                                                  -0.28444138169288635F,
                                                  -0.18477343022823334F,
                                                  -0.09105003625154495F,
                                                  0.0F,
                                                  0.07958029955625534F,
                                                  0.16093020141124725F,
                                                  0.24611230194568634F,
                                                  0.33791524171829224F,
                                                  0.44070982933044434F,
                                                  0.5626170039176941F,
                                                  0.7229568362236023F,
                                                  1.0F};
    // The decimals bitsandbytes compares with, read as floats: midpoints, but for how four of them round.
    static constexpr std::array<float, 15> thresholds{
        -0.8480964004993439F,  -0.6106329262256622F,  -0.4599952697753906F,   -0.33967943489551544F,
        -0.23460740596055984F, -0.13791173323988914F, -0.045525018125772476F, 0.03979014977812767F,
        0.1202552504837513F,   0.2035212516784668F,   0.2920137718319893F,    0.3893125355243683F,
        0.5016634166240692F,   0.6427869200706482F,   0.8614784181118011F};
    Codebook c(levels, {.name = "nf4"});
    c.thresholds_.assign(thresholds.begin(), thresholds.end());
    return c;
  }
  static Codebook nf2() { return normal_float(2); }
  static Codebook nf3() { return normal_float(3); }

  /// NormalFloat of 2 … 8 bits: quantiles of the normal distribution, one side a level richer, with an exact zero.
  /// 4 bits gives nf4(). **Throws** ArgumentError for other widths. **Source** arXiv 2305.14314, eq. 4 and app. E.
  static Codebook normal_float(int bits) {
    if (bits == 4) return nf4();
    if (bits < 2 || bits > 8)
      throw ArgumentError(detail::text("Codebook::normal_float: bits must lie in [2, 8], got ", bits));
    constexpr double edge = 0.9677083;  // ½(1 − 1/32 + 1 − 1/30), the mean tail of 16 and 15 levels
    const int half = 1 << (bits - 1);
    const auto quantile = [&](int i, int steps) { return normal_quantile(edge + (0.5 - edge) * i / steps); };
    std::vector<double> levels{0.0};
    for (int i = 0; i < half; ++i) levels.push_back(quantile(i, half));
    for (int i = 0; i < half - 1; ++i) levels.push_back(-quantile(i, half - 1));
    std::sort(levels.begin(), levels.end());
    std::vector<float> rounded;
    for (const double x : levels) rounded.push_back(float(x / levels.back()));
    return Codebook(rounded, {.name = detail::text("nf", bits)});
  }

  /// The 4-bit float of bitsandbytes: bit 3 is the sign, codes 0–7 stand for 0, 1/192, 2/3, 1, 1/3, 1/2, 1/6, 1/4.
  /// **Numerics** a value on a threshold goes to the lower level. Of the two zeros, code 0 takes what is not positive
  /// and code 8 what is: so decides bitsandbytes on a CPU.
  static Codebook fp4() {
    static constexpr std::array<float, 8> magnitude{0.0F,        1.0F / 192, 2.0F / 3, 1.0F,
                                                    1.0F / 3.0F, 0.5F,       1.0F / 6, 0.25F};
    std::array<float, 16> values{};
    for (std::size_t i = 0; i < 8; ++i) {
      values[i] = magnitude[i];
      values[i + 8] = i == 0 ? 0.0F : -magnitude[i];
    }
    std::vector<std::uint8_t> order(16);
    for (std::size_t i = 0; i < 16; ++i) order[i] = std::uint8_t(i);
    std::sort(order.begin(), order.end(), [&](std::uint8_t a, std::uint8_t b) {
      return values[a] < values[b] || (values[a] == values[b] && a < b);
    });
    Codebook c;
    c.name_ = "fp4";
    c.build(CodebookKind::table, values, std::move(order));
    for (std::size_t i = 0; i < c.thresholds_.size(); ++i)
      c.thresholds_[i] = float((double(values[c.order_[i]]) + double(values[c.order_[i + 1]])) / 2);
    return c;
  }

  /// 2^bits − 1 evenly spaced levels −1 … 1 with a zero in the middle (two levels, −1 and 1, for one bit).
  /// **Throws** ArgumentError unless 1 ≤ bits ≤ 8.
  static Codebook uniform(int bits) {
    check_bits("Codebook::uniform", bits);
    if (bits == 1) {
      static constexpr std::array<float, 2> signs{-1.0F, 1.0F};
      return Codebook(signs, {.name = "uniform1", .require_zero = false});
    }
    const int half = (1 << (bits - 1)) - 1;
    std::vector<float> levels;
    for (int i = -half; i <= half; ++i) levels.push_back(float(double(i) / half));
    return Codebook(levels, {.name = detail::text("uniform", bits)});
  }

  /// 2^bits evenly spaced levels from min(0, smallest) to max(0, largest) of each block, zero exact: value =
  /// (code − zero)·scale with an 8-bit `zero` for each block. Better than `uniform` for one-sided blocks.
  /// **Numerics** ties to even. **Throws** ArgumentError unless 1 ≤ bits ≤ 8.
  static Codebook uniform_asymmetric(int bits) {
    check_bits("Codebook::uniform_asymmetric", bits);
    std::vector<float> levels;
    for (int i = 0; i < 1 << bits; ++i) levels.push_back(float(i));
    return linear(CodebookKind::affine, detail::text("uniform_asymmetric", bits), levels);
  }

  /// Signed bytes −127 … 127: code = round(127·x/absmax), as bitsandbytes' row-wise int8 (use with Blocking::row).
  /// **Numerics** ties to even, as there.
  static Codebook int8() {
    std::vector<float> levels;
    for (int i = 0; i < 256; ++i) levels.push_back(float(i < 128 ? i : i - 256));
    return linear(CodebookKind::int8, "int8", levels);
  }

  /// The signed dynamic 8-bit map, the one scales are quantised on a second time: for i = 0 … 6 the midpoints of
  /// linspace(0.1, 1, 2^i + 1)·10^(i−6) with both signs, and 0 and 1.
  /// **Numerics** each level is the exact number rounded once. bitsandbytes takes them from a float `linspace` whose
  /// last bits depend on the vector width of the machine, so some levels differ from a given file's by one unit in the
  /// last place; a file carries its own map, which is kept (see QuantisedParts). **Source** Dettmers, arXiv 1511.04561.
  static Codebook dynamic8() {
    std::vector<float> levels{0.0F, 1.0F};
    double decade = 1e-6;
    for (int i = 0; i < 7; ++i, decade *= 10) {
      const int steps = 1 << i;
      for (int k = 0; k < steps; ++k) {
        const auto middle = float(decade * (0.1 + 0.9 * (k + 0.5) / steps));
        levels.push_back(middle);
        levels.push_back(-middle);
      }
    }
    std::sort(levels.begin(), levels.end());
    return Codebook(levels, {.name = "dynamic8"});
  }

  [[nodiscard]] const std::string& name() const noexcept { return name_; }
  [[nodiscard]] CodebookKind kind() const noexcept { return kind_; }
  /// Bits a code takes, 1 … 8.
  [[nodiscard]] int bits() const noexcept { return bits_; }
  /// How many levels the quantiser uses; at most 2^bits.
  [[nodiscard]] int levels() const noexcept { return int(order_.size()); }
  /// The value of every code, 2^bits of them, before zero and scale are applied.
  [[nodiscard]] std::span<const float> values() const noexcept { return values_; }
  /// Codes in ascending order of their values.
  [[nodiscard]] std::span<const std::uint8_t> order() const noexcept { return order_; }
  /// Decision thresholds: rank = how many lie strictly below x; code = order()[rank].
  [[nodiscard]] std::span<const float> thresholds() const noexcept { return thresholds_; }

  /// The code nearest to x, a value relative to the scale of its block. Scalar and plain: the reference of the kernels.
  [[nodiscard]] std::uint8_t nearest(float x) const noexcept {
    const auto it = std::lower_bound(thresholds_.begin(), thresholds_.end(), x);
    return order_[std::size_t(it - thresholds_.begin())];
  }

  friend bool operator==(const Codebook& a, const Codebook& b) {
    return a.kind_ == b.kind_ && a.bits_ == b.bits_ && a.values_ == b.values_ && a.order_ == b.order_;
  }

  /// Sixteen values, the table repeated to fill them: what a register lookup of 2-, 3- and 4-bit codes needs, as it
  /// looks at four bits whatever stands above the code.
  [[nodiscard]] const float* table16() const noexcept { return table16_.data(); }
  /// Values of all codes in 8 (4 bits: 2 values, 2 bits: 4 values) or 6 (3 bits: 2 values) consecutive bits.
  [[nodiscard]] const float* group_table() const noexcept { return groups_.data(); }
  /// For more than 16 levels: rank of the left end of each of `buckets` equal parts of [−1, 1].
  [[nodiscard]] const std::uint8_t* bucket_table() const noexcept { return bucket_rank_.data(); }
  static constexpr int buckets = 1024;

 private:
  Codebook() = default;

  static void check_bits(const char* where, int bits) {
    if (bits < 1 || bits > 8) throw ArgumentError(detail::text(where, ": bits must lie in [1, 8], got ", bits));
  }
  static void check(std::span<const float> v, const CodebookOptions& options) {
    if (v.size() < 2 || v.size() > 256)
      throw ArgumentError(detail::text("Codebook: a table has 2 to 256 levels, got ", v.size()));
    bool zero = false;
    float largest = 0;
    for (std::size_t i = 0; i < v.size(); ++i) {
      if (!std::isfinite(v[i])) throw NonFiniteError(detail::text("Codebook: level ", i, " is not finite"));
      if (i > 0 && !(v[i - 1] < v[i]))
        throw ArgumentError(detail::text("Codebook: levels must ascend strictly, got ", double(v[i - 1]), " before ",
                                         double(v[i]), " at ", i));
      zero = zero || v[i] == 0;
      largest = std::max(largest, std::abs(v[i]));
    }
    if (largest != 1)
      throw ArgumentError(
          detail::text("Codebook: the largest magnitude must be 1 (divide the levels by it), got ", double(largest)));
    if (!zero && options.require_zero)
      throw ArgumentError("Codebook: no level is 0; set require_zero = false if zeros need not survive");
  }
  static Codebook linear(CodebookKind kind, std::string name, std::span<const float> levels) {
    Codebook c;
    c.name_ = std::move(name);
    std::vector<std::uint8_t> order;
    for (std::size_t i = 0; i < levels.size(); ++i)
      if (levels[i] >= -127) order.push_back(std::uint8_t(i));
    std::sort(order.begin(), order.end(), [&](std::uint8_t a, std::uint8_t b) { return levels[a] < levels[b]; });
    c.build(kind, levels, std::move(order));
    return c;
  }

  void build(CodebookKind kind, std::span<const float> values, std::vector<std::uint8_t> order) {
    kind_ = kind;
    bits_ = 1;
    while ((std::size_t(1) << bits_) < values.size()) ++bits_;
    order_ = std::move(order);
    values_.assign(values.begin(), values.end());
    values_.resize(std::size_t(1) << bits_, values[order_.back()]);
    for (std::size_t i = 0; i + 1 < order_.size(); ++i) {
      const float low = values_[order_[i]], high = values_[order_[i + 1]];
      const float middle = float((double(low) + double(high)) / 2);
      // Everything up to a threshold belongs below it; where the upper neighbour has the lower code, it wins the tie.
      thresholds_.push_back(order_[i] < order_[i + 1] ? middle : std::nextafter(middle, -2.0F));
    }
    if (bits_ <= 4)
      for (std::size_t i = 0; i < 16; ++i) table16_[i] = values_[i % values_.size()];
    if (bits_ >= 2 && bits_ <= 4) build_groups();
    if (kind == CodebookKind::table && order_.size() > 16) build_buckets();
  }
  void build_groups() {
    const int group_bits = bits_ == 3 ? 6 : 8, count = group_bits / bits_;
    for (int byte = 0; byte < 1 << group_bits; ++byte)
      for (int i = 0; i < count; ++i)
        groups_.push_back(values_[std::size_t((byte >> (group_bits - bits_ * (i + 1))) & ((1 << bits_) - 1))]);
  }
  void build_buckets() {
    for (int b = 0; b < buckets; ++b) {
      // A hair further left than the bucket: x + 1 may round up into the next one.
      const float left = float(b) * (2.0F / buckets) - 1.0F - 0x1p-20F;
      const auto it = std::lower_bound(thresholds_.begin(), thresholds_.end(), left);
      bucket_rank_.push_back(std::uint8_t(std::min<std::ptrdiff_t>(it - thresholds_.begin(), levels() - 1)));
    }
  }

  std::string name_;
  CodebookKind kind_ = CodebookKind::table;
  int bits_ = 0;
  std::vector<float> values_, thresholds_, groups_;
  std::vector<std::uint8_t> order_, bucket_rank_;
  std::array<float, 16> table16_{};
};

}  // namespace lowrank
