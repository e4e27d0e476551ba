// SPDX-License-Identifier: Apache-2.0
// What `lowrank spectrum` says of one matrix: the entries of its report.
#pragma once

#include "spectrum_scan.hpp"

namespace lowrank::tool {

struct SpectrumOptions {
  Index top = 0;        ///< only so many singular values; 0: all
  Index alignment = 0;  ///< leading directions of the weight that an update is seen from; 0: not asked for
  bool values = false, side_by_side = false;
};

/// The entry of a weight.
Json weight_entry(const MatrixTensor& w, const SpectrumOptions& o);
/// The entry of tuned − base, with what rounding and storage make of it.
Json difference_entry(const MatrixPair& pair, const SpectrumOptions& o);
/// The entry of an adapter's module, exact from its factors.
Json adapter_entry(const ModulePair& pair, const SpectrumOptions& o);

}  // namespace lowrank::tool
