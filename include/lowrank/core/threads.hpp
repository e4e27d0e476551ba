// SPDX-License-Identifier: Apache-2.0
// How many threads a product may use, and the one parallel loop; OpenMP when the user's build has it, else one thread.
#pragma once

#include <algorithm>
#include <atomic>
#include <exception>
#include <type_traits>

#include "lowrank/core/matrix_view.hpp"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace lowrank {

/// The number of threads a parallel loop of this library would use now: OpenMP's setting (`OMP_NUM_THREADS`,
/// `omp_set_num_threads`), 1 without OpenMP or inside somebody's parallel region.
inline int max_threads() {
#if defined(_OPENMP)
  return omp_in_parallel() ? 1 : omp_get_max_threads();
#else
  return 1;
#endif
}

namespace detail {

/// The first exception of a parallel loop: no thread may let one out of its part of an OpenMP region, the program would
/// end. Keeps it and throws it again after the loop. Nothing is allocated, and without a throw nothing is written.
class FirstException {
 public:
  template <class F>
  void run(F&& f) noexcept {
    try {
      f();
    } catch (...) {
      if (!taken_.test_and_set()) first_ = std::current_exception();
    }
  }
  void rethrow() const {
    if (first_) [[unlikely]]
      std::rethrow_exception(first_);
  }

 private:
  std::atomic_flag taken_;
  std::exception_ptr first_;
};

/// A part of some parallel loop behind one type: f(part, parts).
using PartFunction = void (*)(const void* f, int part, int parts);

/// The one parallel loop a program holds: inlined where it is used, every body would be compiled twice.
[[gnu::noinline]] inline void run_parts(int parts, PartFunction call, const void* f) {
#if defined(_OPENMP)
  if (parts > 1) {
    FirstException exception;
#pragma omp parallel for schedule(static, 1) num_threads(parts)
    for (int p = 0; p < parts; ++p) exception.run([&] { call(f, p, parts); });
    exception.rethrow();
    return;
  }
#endif
  for (int p = 0; p < parts; ++p) call(f, p, parts);
}

}  // namespace detail

/// Calls f(part, parts) once for every part in [0, parts), on as many threads.
///
/// **Throws** what a part throws, the first that did, once all have ended; without OpenMP the parts after it are not
/// run. **Cost** no allocation.
template <class F>
void parallel_parts(int parts, F&& f) {
  using Body = std::remove_reference_t<F>;
  detail::run_parts(
      parts, [](const void* body, int part, int of) { (*static_cast<Body*>(const_cast<void*>(body)))(part, of); }, &f);
}

/// Splits [0, n) into at most max_threads() ranges of at least `grain` and calls f(begin, end) on each, in parallel.
/// The split changes which thread does an element, never how it is computed.
///
///     parallel_ranges(m, 16, [&](Index begin, Index end) {
///       for (Index i = begin; i < end; ++i) …
///     });
///
/// **Throws** what f throws, the first that did, once all ranges have ended. **Cost** no allocation; nothing is run
/// beside the caller without OpenMP, or inside somebody's parallel region.
template <class F>
void parallel_ranges(Index n, Index grain, F&& f) {
  if (n <= 0) return;
  const int parts = int(std::clamp<Index>(n / std::max<Index>(grain, 1), 1, max_threads()));
  parallel_parts(parts, [&](int p, int of) { f(n * p / of, n * (p + 1) / of); });
}

}  // namespace lowrank
