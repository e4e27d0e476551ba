// SPDX-License-Identifier: Apache-2.0
// The default of LoRA: A uniform as PyTorch initialises a linear layer, B zero.
#pragma once

#include "lowrank/core/rng.hpp"
#include "lowrank/init/initialised.hpp"

namespace lowrank {

struct KaimingOptions {
  /// r, 1 … min(out, in).
  Index rank = 16;
  /// α; s = α/r, or α/√r when rank_stabilised.
  double alpha = 16;
  bool rank_stabilised = false;
  /// Of A's random numbers; none: the next of the process-wide sequence that seed_everything starts.
  std::optional<std::uint64_t> seed = std::nullopt;
};

/// Factors with A random and B zero, so that training starts from W: A_ij ~ U(−1/√in, 1/√in), B = 0.
///
/// This is `kaiming_uniform` with gain for a = √5, what `torch.nn.Linear` and PEFT's `init_lora_weights=True` use. For
/// a convolution `in` is channels·height·width of the kernel.
/// **Shapes** A r×in, B out×r. **Scale** s = α/r or α/√r.
/// **Throws** ArgumentError: rank outside [1, min(out, in)], α not positive and finite.
/// **Cost** r·in random numbers. **Numerics** same seed, same bits, whatever the threads; without a seed
/// every call draws other numbers, the same in every run (seed_everything). `report.seed` is the one taken.
/// **Source** He et al., arXiv 1502.01852; Hu et al., arXiv 2106.09685, §4.1.
template <Real T>
Initialised<T> kaiming(Index out, Index in, const KaimingOptions& options = {}) {
  const detail::Stopwatch watch;
  detail::check_rank("kaiming", options.rank, out, in);
  Initialised<T> result;
  result.factors.scale = T(detail::scale_of<T>(options));
  result.factors.A.resize(options.rank, in);
  result.factors.B = Matrix<T>(out, options.rank);
  const double bound = 1 / std::sqrt(double(in));
  result.report.seed = detail::seed_or_fresh(options.seed);
  CounterRng(result.report.seed).fill_uniform(result.factors.A.view(), -bound, bound);
  result.report.method = "kaiming";
  result.report.seconds = watch.seconds();
  return result;
}

}  // namespace lowrank
