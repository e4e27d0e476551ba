// SPDX-License-Identifier: Apache-2.0
// Pictures by gnuplot and one self-contained page around them.
#pragma once

#include <string>
#include <vector>

#include "tool.hpp"

namespace lowrank::tool {

struct Picture {
  std::string name, caption;
  std::string inline_svg;  ///< text and axes in currentColor, so that the page's colour scheme reaches them
  std::string light;       ///< the same as a file of its own, black on white
  std::string png;         ///< bytes, when asked for
};
struct Pictures {
  std::vector<Picture> list;
  std::string problem;  ///< why there are none, or fewer; empty when all went well
};

/// Draws what the reports hold: a heat map layer × module, spectra with their noise edges, growth over several reports.
/// `raster`: "png" to make those too.
Pictures draw_pictures(const std::vector<Json>& reports, const char* raster);

/// One page that opens without a network: summary, pictures, worst offenders, sortable table, how it was computed.
std::string html_report(const std::vector<Json>& reports, const Pictures& pictures);

}  // namespace lowrank::tool
