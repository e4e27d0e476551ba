// SPDX-License-Identifier: Apache-2.0
// The widest vector the build targets, through the vector extension GCC and Clang share; no intrinsics, any machine.
#pragma once

#include <bit>
#include <concepts>
#include <cstdint>
#include <cstring>
#include <utility>

#include "lowrank/core/half.hpp"
#include "lowrank/core/matrix_view.hpp"
#include "lowrank/linalg/detail/compiled.hpp"

#if !defined(__GNUC__)
#error "lowrank needs GCC or Clang: its kernels are written in their common vector extension"
#endif

// Register tiles must be unrolled completely, or they live in memory; the two compilers spell that differently.
#if defined(__clang__)
#define LOWRANK_UNROLL _Pragma("clang loop unroll(full)")
#else
#define LOWRANK_UNROLL _Pragma("GCC unroll 16")
#endif

// **Throws** nothing in here does. **Numerics** every operation is IEEE's, lane by lane; how many lanes a sum has, and
// so its last bits, depends on the build's target. **Source** GCC's manual, "Vector Extensions".

namespace lowrank::detail {

#if defined(__AVX512F__)
inline constexpr int vector_bytes = 64;
inline constexpr int kernel_rows = 14;  // 14 x 2 accumulators + 2 loads + 1 broadcast of 32 registers
#elif defined(__AVX__)
inline constexpr int vector_bytes = 32;
inline constexpr int kernel_rows = 6;  // 6 x 2 + 2 + 1 of 16 registers
#elif defined(__aarch64__)
inline constexpr int vector_bytes = 16;
inline constexpr int kernel_rows = 8;
#else
inline constexpr int vector_bytes = 16;
inline constexpr int kernel_rows = 4;
#endif

template <class T, int Bytes>
struct VecOf {
  typedef T type __attribute__((vector_size(Bytes)));
};
/// A vector of `lanes<T>` scalars; +, * and indexing work on it.
template <class T>
using Vec = typename VecOf<T, vector_bytes>::type;
template <class T>
inline constexpr int lanes = vector_bytes / int(sizeof(T));

template <class V, class T>
inline V load(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);  // unaligned; compiles to one instruction
  return v;
}
template <class V, class T>
inline void store(T* p, const V& v) {
  std::memcpy(p, &v, sizeof v);
}
/// N consecutive elements stored as S, as a vector of N scalars T: a plain load, or two bytes widened to float exactly.
template <class T, int N, class S>
inline auto load_as(const S* p) {
  using V = typename VecOf<T, N* int(sizeof(T))>::type;
  if constexpr (std::same_as<S, T>) {
    return load<V>(p);
  } else {
    using U16 = typename VecOf<std::uint16_t, N * 2>::type;
    using U32 = typename VecOf<std::uint32_t, N * 4>::type;
    const U32 u = __builtin_convertvector(load<U16>(reinterpret_cast<const std::uint16_t*>(p)), U32);
    if constexpr (std::same_as<S, bf16>) {
      return std::bit_cast<V>(u << 16);
    } else {
      // Scaling by 2^112 moves the exponent to float's bias and makes subnormals normal; infinities and NaN need theirs
      // set. Same values as f16's own conversion.
      const U32 magnitude = (u & 0x7fffU) << 13, sign = (u & 0x8000U) << 16;
      const U32 special = U32(magnitude >= 0x0f800000U) & 0x7f800000U;
      const V scaled = std::bit_cast<V>(magnitude) * 0x1p112F;
      const U32 finite = std::bit_cast<U32>(scaled) & ~U32(magnitude >= 0x0f800000U);
      return std::bit_cast<V>(finite | (special | (magnitude & U32(magnitude >= 0x0f800000U))) | sign);
    }
  }
}
template <class T>
inline T sum_lanes(const Vec<T>& v) {
  T s = 0;
  for (int l = 0; l < lanes<T>; ++l) s += v[l];
  return s;
}

/// In-register transpose of N vectors of N scalars, log2(N) rounds of pairwise shuffles.
template <int N, class V, int Step = 1>
inline void transpose_square(V (&r)[N]) {
  if constexpr (Step < N) {
    const auto swap_blocks = []<int... I>(V & a, V & b, std::integer_sequence<int, I...>) {
      // Lane i of the new a: a[i] where bit Step of i is clear, else b[i - Step]; the new b gets the rest.
      const V low = __builtin_shufflevector(a, b, ((I & Step) ? N + I - Step : I)...);
      const V high = __builtin_shufflevector(a, b, ((I & Step) ? N + I : I + Step)...);
      a = low;
      b = high;
    };
    LOWRANK_UNROLL
    for (int i = 0; i < N; ++i)
      if (!(i & Step)) swap_blocks(r[i], r[i + Step], std::make_integer_sequence<int, N>{});
    transpose_square<N, V, Step * 2>(r);
  }
}

}  // namespace lowrank::detail
