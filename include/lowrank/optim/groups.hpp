// SPDX-License-Identifier: Apache-2.0
// Parameter groups: which stretch of a flat block gets which multiple of the learning rate and how much decay.
#pragma once

#include <cmath>
#include <string_view>
#include <vector>

#include "lowrank/adapter/parameters.hpp"

namespace lowrank {

/// A stretch of a flat parameter block with settings of its own.
struct ParameterGroup {
  Index offset = 0, size = 0;
  double lr_factor = 1;     ///< multiplies the step's learning rate
  double weight_decay = 0;  ///< decoupled, per unit of learning rate
};

/// A group for every entry of a table: `weight_decay` for all, and lr_factor `ratio` for the B matrices ("lora_B",
/// "lora_embedding_B"), 1 for the rest: LoRA+.
///
/// **Scale** ratio λ = lr_B/lr_A, about 16 in the paper; 1 is plain LoRA. **Throws** ArgumentError unless ratio is
/// positive and weight_decay not negative, both finite.
/// **Source** Hayou et al., "LoRA+", arXiv 2402.12354, §5.
inline std::vector<ParameterGroup> lora_plus_groups(const std::vector<ParameterInfo>& table, double ratio,
                                                    double weight_decay = 0) {
  if (!(ratio > 0) || !std::isfinite(ratio))
    throw ArgumentError(detail::text("lora_plus_groups: ratio must be positive and finite, got ", ratio));
  if (!(weight_decay >= 0) || !std::isfinite(weight_decay))
    throw ArgumentError(
        detail::text("lora_plus_groups: weight_decay must be finite and not negative, got ", weight_decay));
  std::vector<ParameterGroup> groups;
  for (const ParameterInfo& p : table) {
    const std::string_view name = p.name;
    const bool is_b = name.ends_with("lora_B") || name.ends_with("lora_embedding_B");
    groups.push_back({p.offset, p.size(), is_b ? ratio : 1.0, weight_decay});
  }
  return groups;
}

}  // namespace lowrank
