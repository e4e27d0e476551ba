// SPDX-License-Identifier: Apache-2.0
// What makes lowrank::compiled safe: a program and the library it links must be compiled for the same vectors.
#pragma once

// A packed panel is as wide as the vectors of the build that packed it, and inline functions are merged by the linker.
// A program for AVX2 over a library for SSE would run one build's panels through the other's kernel, without a word. So
// every file that uses the compiled library refers to a symbol that names its own instruction set, and the library
// defines the one of its own: when they differ the program does not link, and the missing name says which set the file
// was compiled for. The remedy: the same -march for both (docs/compile-cost.md).
#if defined(LOWRANK_COMPILED)

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define LOWRANK_COMPILED_FOR lowrank_compiled_for_avx512
#elif defined(__AVX512F__)
#define LOWRANK_COMPILED_FOR lowrank_compiled_for_avx512f
#elif defined(__AVX2__) && defined(__FMA__)
#define LOWRANK_COMPILED_FOR lowrank_compiled_for_avx2_fma
#elif defined(__AVX__)
#define LOWRANK_COMPILED_FOR lowrank_compiled_for_avx
#elif defined(__aarch64__)
#define LOWRANK_COMPILED_FOR lowrank_compiled_for_aarch64
#else
#define LOWRANK_COMPILED_FOR lowrank_compiled_for_16_byte_vectors
#endif

extern "C" const char LOWRANK_COMPILED_FOR;

namespace lowrank::detail {
// Kept in every object file, optimised or not.
[[gnu::used]] static const char* const compiled_for = &LOWRANK_COMPILED_FOR;
}  // namespace lowrank::detail

#endif
