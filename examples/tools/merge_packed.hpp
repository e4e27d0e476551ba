// SPDX-License-Identifier: Apache-2.0
// Merging into weights that a checkpoint keeps in bitsandbytes' 4 bits: unpacked, added to, packed again, the layout
// kept.
#pragma once

#include <functional>
#include <map>

#include "lowrank/io/bitsandbytes.hpp"
#include "lowrank/quant/merge.hpp"

namespace lowrank::tool {

/// The tensors of one packed weight as they come out of a merge, whichever is asked for first.
///
/// Files hold the widest types first: all scales of a model may come before the first codes. Codes are therefore only
/// kept for the weight merged last, and merged once more where they are asked for later; everything else is small.
class PackedMerge {
 public:
  /// `factors(weight)` are those of a weight, as it is stored; `done(weight, report)` is called once for each.
  PackedMerge(const io::Checkpoint& checkpoint, const RequantiseOptions& options,
              std::function<LoraFactors<float>(const std::string&)> factors,
              std::function<void(const std::string&, const MergeReport&)> done)
      : checkpoint_(checkpoint), options_(options), factors_(std::move(factors)), done_(std::move(done)) {}

  /// The names of all tensors of a packed weight that a merge changes.
  [[nodiscard]] static std::vector<std::string> parts(const io::Checkpoint& checkpoint, const std::string& weight);
  /// What a part will be: the same but for the length of a description whose numbers change.
  [[nodiscard]] io::TensorSpec spec(const std::string& weight, const std::string& part) const;
  /// Its bytes. **Throws** IoError naming the weight, also for a merge that was refused.
  [[nodiscard]] std::vector<std::byte> bytes(const std::string& weight, const std::string& part);
  /// The report alone.
  [[nodiscard]] MergeReport report(const std::string& weight) const;

 private:
  void merge(const std::string& weight);
  [[nodiscard]] RequantisedMerge<float> merged(const std::string& weight) const;

  const io::Checkpoint& checkpoint_;
  RequantiseOptions options_;
  std::function<LoraFactors<float>(const std::string&)> factors_;
  std::function<void(const std::string&, const MergeReport&)> done_;
  std::map<std::string, std::map<std::string, std::vector<std::byte>>> small_;  ///< by weight, by part
  std::string last_;                                                            ///< whose codes these are
  std::vector<std::byte> codes_;
};

}  // namespace lowrank::tool
