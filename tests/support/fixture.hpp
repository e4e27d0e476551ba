// SPDX-License-Identifier: Apache-2.0
// Reads the figures an independent program left in tests/data: blocks of "name rows cols" followed by the numbers.
#pragma once

#include <fstream>
#include <map>
#include <stdexcept>
#include <string>

#include "lowrank/core/matrix.hpp"

namespace test {

class Fixture {
 public:
  explicit Fixture(const std::string& file) {
    std::ifstream in(std::string(LOWRANK_TEST_DATA) + "/" + file);
    if (!in) throw std::runtime_error("cannot open fixture " + file);
    std::string name;
    lowrank::Index rows = 0, cols = 0;
    while (in >> name >> rows >> cols) {
      lowrank::Matrix<double> m(rows, cols);
      for (lowrank::Index i = 0; i < m.size(); ++i)
        if (!(in >> m.data()[i])) throw std::runtime_error("short fixture " + file + " at " + name);
      entries_[name] = std::move(m);
    }
  }
  [[nodiscard]] const lowrank::Matrix<double>& operator[](const std::string& name) const { return entries_.at(name); }

 private:
  std::map<std::string, lowrank::Matrix<double>> entries_;
};

}  // namespace test
