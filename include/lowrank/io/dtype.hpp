// SPDX-License-Identifier: Apache-2.0
// The element types tensor files name, their widths, and the conversions to and from the scalars we compute in.
#pragma once

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <span>
#include <string_view>

#include "lowrank/core/scalar.hpp"
#include "lowrank/core/threads.hpp"

namespace lowrank::io {

static_assert(std::endian::native == std::endian::little, "lowrank/io reads and writes little-endian files in place");

/// Element types, by the names safetensors gives them.
enum class Dtype : std::uint8_t {
  BOOL,
  F4,
  F6_E2M3,
  F6_E3M2,
  U8,
  I8,
  F8_E5M2,
  F8_E4M3,
  F8_E8M0,
  I16,
  U16,
  F16,
  BF16,
  I32,
  U32,
  F32,
  C64,
  F64,
  I64,
  U64
};

namespace detail {
struct DtypeEntry {
  std::string_view name;
  unsigned bits;
};
inline constexpr std::array<DtypeEntry, 20> dtype_table{
    {{"BOOL", 8},    {"F4", 4},      {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"U8", 8},   {"I8", 8},    {"F8_E5M2", 8},
     {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"I16", 16},    {"U16", 16},    {"F16", 16}, {"BF16", 16}, {"I32", 32},
     {"U32", 32},    {"F32", 32},    {"C64", 64},    {"F64", 64},    {"I64", 64}, {"U64", 64}}};

/// a·b, or nothing when it does not fit in 64 bits.
constexpr std::optional<std::uint64_t> checked_mul(std::uint64_t a, std::uint64_t b) {
  if (a != 0 && b > std::numeric_limits<std::uint64_t>::max() / a) return std::nullopt;
  return a * b;
}
}  // namespace detail

/// "BF16", …: the name of a type in a safetensors header.
constexpr std::string_view dtype_name(Dtype d) { return detail::dtype_table[std::size_t(d)].name; }

/// The type of that name, if there is one.
constexpr std::optional<Dtype> parse_dtype(std::string_view name) {
  for (std::size_t i = 0; i < detail::dtype_table.size(); ++i)
    if (detail::dtype_table[i].name == name) return Dtype(i);
  return std::nullopt;
}

/// Width of one element in bits; F4 and F6_* are narrower than a byte.
constexpr unsigned dtype_bits(Dtype d) { return detail::dtype_table[std::size_t(d)].bits; }

/// Bytes of a tensor: the product of the shape times the width. Nothing when that overflows 64 bits or is no whole
/// number of bytes.
constexpr std::optional<std::uint64_t> byte_size(Dtype d, std::span<const std::uint64_t> shape) {
  // A zero extent makes the tensor empty whatever the others say, but the others must not overflow on the way.
  std::uint64_t n = 1;
  for (const std::uint64_t extent : shape) {
    const auto next = detail::checked_mul(n, extent);
    if (!next) return std::nullopt;
    n = *next;
  }
  const auto bits = detail::checked_mul(n, dtype_bits(d));
  if (!bits || *bits % 8 != 0) return std::nullopt;
  return *bits / 8;
}

/// The Dtype of a C++ scalar.
template <class T>
constexpr Dtype dtype_of() {
  if constexpr (std::is_same_v<T, float>)
    return Dtype::F32;
  else if constexpr (std::is_same_v<T, double>)
    return Dtype::F64;
  else if constexpr (std::is_same_v<T, bf16>)
    return Dtype::BF16;
  else if constexpr (std::is_same_v<T, f16>)
    return Dtype::F16;
  else if constexpr (std::is_same_v<T, bool>)
    return Dtype::BOOL;
  else if constexpr (std::is_same_v<T, std::uint8_t>)
    return Dtype::U8;
  else if constexpr (std::is_same_v<T, std::int8_t>)
    return Dtype::I8;
  else if constexpr (std::is_same_v<T, std::uint16_t>)
    return Dtype::U16;
  else if constexpr (std::is_same_v<T, std::int16_t>)
    return Dtype::I16;
  else if constexpr (std::is_same_v<T, std::uint32_t>)
    return Dtype::U32;
  else if constexpr (std::is_same_v<T, std::int32_t>)
    return Dtype::I32;
  else if constexpr (std::is_same_v<T, std::uint64_t>)
    return Dtype::U64;
  else {
    static_assert(std::is_same_v<T, std::int64_t>, "no Dtype stores this scalar");
    return Dtype::I64;
  }
}

/// Whether `convert_from` and `convert_to` know the type: the real floating-point ones of whole bytes.
constexpr bool is_convertible_float(Dtype d) {
  return d == Dtype::F32 || d == Dtype::F64 || d == Dtype::BF16 || d == Dtype::F16 || d == Dtype::F8_E4M3 ||
         d == Dtype::F8_E5M2 || d == Dtype::F8_E8M0;
}

namespace detail {

struct f8_e4m3 {  // one NaN a sign, no infinity
  std::uint8_t bits;
  operator float() const {  // NOLINT(google-explicit-constructor)
    const int e = (bits >> 3) & 15, m = bits & 7;
    float x = e == 0 ? float(m) * 0x1p-9F : std::ldexp(float(8 + m), e - 10);
    if (e == 15 && m == 7) x = std::numeric_limits<float>::quiet_NaN();
    return (bits & 0x80) != 0 ? -x : x;
  }
};
struct f8_e5m2 {  // the upper byte of an f16
  std::uint8_t bits;
  operator float() const { return f16::from_bits(std::uint16_t(bits << 8)); }  // NOLINT(google-explicit-constructor)
};
struct f8_e8m0 {  // a power of two
  std::uint8_t bits;
  operator float() const {  // NOLINT(google-explicit-constructor)
    return bits == 255 ? std::numeric_limits<float>::quiet_NaN() : std::ldexp(1.0F, int(bits) - 127);
  }
};

}  // namespace detail

/// One element, wherever it lies: file data owes nobody an alignment.
template <class S>
S load_unaligned(const std::byte* p) {
  S x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

namespace detail {

template <class S, class T>
void convert_run(const std::byte* in, Index n, T* out) {
  lowrank::parallel_ranges(n, 1 << 18, [&](Index begin, Index end) {
    if constexpr (std::is_same_v<S, T>) {
      std::memcpy(out + begin, in + begin * Index(sizeof(S)), std::size_t(end - begin) * sizeof(S));
    } else {
      for (Index i = begin; i < end; ++i) out[i] = static_cast<T>(load_unaligned<S>(in + i * Index(sizeof(S))));
    }
  });
}

template <class S, class T>
void convert_back_run(const T* in, Index n, std::byte* out) {
  lowrank::parallel_ranges(n, 1 << 18, [&](Index begin, Index end) {
    if constexpr (std::is_same_v<S, T>) {
      std::memcpy(out + begin * Index(sizeof(S)), in + begin, std::size_t(end - begin) * sizeof(S));
    } else {
      for (Index i = begin; i < end; ++i) {
        const S x = static_cast<S>(in[i]);
        std::memcpy(out + i * Index(sizeof(S)), &x, sizeof x);
      }
    }
  });
}
}  // namespace detail

/// Reads n elements of type `d` from bytes of any alignment into T.
///
/// **Throws** ArgumentError for types without a conversion (integers, C64, F4, F6). **Cost** memory speed, threaded.
/// **Numerics** exact, except F64 → float, which rounds to nearest.
template <Real T>
void convert_from(Dtype d, const std::byte* in, Index n, T* out) {
  switch (d) {
    case Dtype::F32:
      return detail::convert_run<float>(in, n, out);
    case Dtype::F64:
      return detail::convert_run<double>(in, n, out);
    case Dtype::BF16:
      return detail::convert_run<bf16>(in, n, out);
    case Dtype::F16:
      return detail::convert_run<f16>(in, n, out);
    case Dtype::F8_E4M3:
      return detail::convert_run<detail::f8_e4m3>(in, n, out);
    case Dtype::F8_E5M2:
      return detail::convert_run<detail::f8_e5m2>(in, n, out);
    case Dtype::F8_E8M0:
      return detail::convert_run<detail::f8_e8m0>(in, n, out);
    default:
      throw ArgumentError(lowrank::detail::text("convert_from: ", dtype_name(d), " is not a real float type"));
  }
}

/// Writes n elements of T as type `d` into bytes of any alignment.
///
/// **Throws** ArgumentError unless `d` is F32, F64, BF16 or F16. **Cost** memory speed, threaded.
/// **Numerics** rounds to nearest, ties to even; overflow becomes infinity.
template <Real T>
void convert_to(Dtype d, const T* in, Index n, std::byte* out) {
  switch (d) {
    case Dtype::F32:
      return detail::convert_back_run<float>(in, n, out);
    case Dtype::F64:
      return detail::convert_back_run<double>(in, n, out);
    case Dtype::BF16:
      return detail::convert_back_run<bf16>(in, n, out);
    case Dtype::F16:
      return detail::convert_back_run<f16>(in, n, out);
    default:
      throw ArgumentError(lowrank::detail::text("convert_to: cannot write ", dtype_name(d)));
  }
}

}  // namespace lowrank::io
