// SPDX-License-Identifier: Apache-2.0
// The entries of a report as a table.
#pragma once

#include <string>
#include <vector>

#include "tool.hpp"

namespace lowrank::tool {

/// One row a matrix, one column a scalar; what a matrix lacks stays empty.
///
/// Metrics keep their names; an object's scalars bear its name in front (noise_stable_rank, left_phi,
/// base_energy_rank_90); bounds are two columns, NAME_lo and NAME_hi; `intruders` and `angles` are lists with blanks
/// between. Curves, values and grids are in the JSON report only.
std::string csv_text(const std::vector<Json>& matrices);

}  // namespace lowrank::tool
