// SPDX-License-Identifier: Apache-2.0
// Whole-checkpoint scans: many matrices in flight, results journaled as they come, resumable, spread over MPI ranks.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "lowrank/io/bitsandbytes.hpp"
#include "lowrank/io/float8.hpp"
#include "models.hpp"

namespace lowrank::tool {

/// Where a scan writes, and how it runs.
struct ScanOptions {
  Common common;
  std::string json, csv, html, pictures;  ///< pictures: directory for svg and png files
  bool svg = false, png = false, fresh = false;
  int in_flight = 0;  ///< matrices at once; 0: as many as there are threads

  /// --json OUT, --csv, --html, --svg, --png, --fresh, --jobs, -q.
  void add_to(CLI::App* sub);
};

/// One matrix: what it will cost in flops, and how its entry of the report is made. `work` may throw lowrank::Error.
struct ScanJob {
  std::string name;
  std::uint64_t bytes = 0;
  double cost = 0;
  std::function<Json()> work;
};

/// A tensor left out, and why.
struct Skipped {
  std::string name, reason;
  bool fault = false;  ///< true: the inputs do not fit each other, exit code 1 in the end
};

/// What a scan found. `matrices` is in the order of the jobs whatever the number of threads and ranks.
struct ScanResult {
  std::vector<Json> matrices;
  std::vector<Skipped> skipped;
  std::vector<Skipped> failed;  ///< NaN and the like; the rest of the scan went on
  bool leader = true;           ///< this process writes the report
  std::size_t resumed = 0;
  std::string journal;  ///< of this process; empty without an output file
  double seconds = 0;
};

/// Runs the jobs. With an output file, finished matrices are appended to `<output>.journal`, and a later call with the
/// same fingerprint takes them from there; the journal is removed by `finish`.
ScanResult run_scan(const ScanOptions& o, const std::string& what, const std::string& fingerprint,
                    const std::vector<ScanJob>& jobs);

/// Writes JSON, CSV, HTML and pictures; prints the table or (without --json) nothing but it; throws Error at the very
/// end when matrices failed or inputs did not fit, so that the exit code says so.
void finish_scan(const ScanOptions& o, ScanResult&& result, Json header, const std::string& table);

/// A text that changes when the inputs or the options do: paths, sizes and times of the files, and `options`.
std::string fingerprint(const std::vector<std::string>& paths, const std::string& options);

/// x, or null when it is not finite.
inline Json finite(double x) { return std::isfinite(x) ? Json(x) : Json(nullptr); }

/// One matrix of a checkpoint: a tensor of two dimensions, a convolution folded to two, a slice of a stack of three.
/// A 4-bit weight of bitsandbytes and an 8-bit one with its scales are dequantised when their values are asked for.
struct MatrixTensor {
  std::string name;  ///< with "[e]" for a slice
  io::TensorView tensor;
  Index rows = 0, cols = 0, slice = 0;
  std::string quantised = {};              ///< "nf4", "fp4"; empty for floating-point storage
  const io::Checkpoint* packed = nullptr;  ///< where a 4-bit weight's parts are
  const io::Checkpoint* float8 = nullptr;  ///< where an 8-bit weight's scales are looked for

  [[nodiscard]] std::uint64_t bytes() const {
    return std::uint64_t(rows) * std::uint64_t(cols) * std::uint64_t(io::dtype_bits(tensor.dtype())) /
           (packed != nullptr ? 16 : 8);
  }
  [[nodiscard]] std::string stored_as() const {
    return packed != nullptr ? quantised : std::string(io::dtype_name(tensor.dtype()));
  }
  /// 4 or 8 for a quantised weight, 0 for any other.
  [[nodiscard]] int quantised_bits() const { return packed != nullptr ? 4 : float8 != nullptr ? 8 : 0; }
  [[nodiscard]] bool is_16_bit() const {
    return packed == nullptr && (tensor.dtype() == io::Dtype::BF16 || tensor.dtype() == io::Dtype::F16);
  }
};
/// Says in the entry of a report how its matrices are stored: "dequantised", and for 8-bit ones under the key given
/// what their scales are ("none" where there is none). A null matrix is passed over.
void say_storage(Json& j, std::initializer_list<std::pair<const char*, const MatrixTensor*>> matrices);
/// Notes on stderr how many matrices are dequantised, and how many have 8 bits without a scale.
void note_quantised(const Common& common, std::initializer_list<const std::vector<MatrixTensor>*> lists);
std::vector<MatrixTensor> matrices_of(const io::Checkpoint& checkpoint, std::vector<Skipped>& skipped);
const MatrixTensor* find_matrix(const std::vector<MatrixTensor>& list, const std::string& name);
/// Whether name contains the filter (empty: everything).
bool selected(const std::string& name, const std::string& filter);

/// The values of a matrix as T, copied. Throws NonFiniteError naming the first value that is not finite.
template <Real T>
Matrix<T> values_of(const MatrixTensor& m) {
  if (m.packed != nullptr) return io::read_bitsandbytes<T>(*m.packed, m.name).dequantise();
  if (m.float8 != nullptr) return io::read_float8<T>(*m.float8, m.tensor, m.slice);
  Matrix<T> out;
  out.resize(m.rows, m.cols);
  const std::size_t bytes = std::size_t(m.bytes());
  io::convert_from(m.tensor.dtype(), m.tensor.bytes().data() + std::size_t(m.slice) * bytes, m.rows * m.cols,
                   out.data());
  return out;
}

}  // namespace lowrank::tool
